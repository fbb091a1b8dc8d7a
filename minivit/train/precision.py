"""In which numbers a model is trained: what a step computes in, beside the float32 values that are learned.

Activations and a working copy of the parameters are in the data's dtype; the values that an optimizer updates, their
gradients, moments, norms and the loss are float32 always (Micikevicius et al. 2018, "Mixed precision training", arXiv
1710.03740).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.graph import Node
from minivit.backend import (
    Array,
    array_module,
    compute_capability,
    is_floating,
    named_dtype,
    on_device_of,
    products,
    resolve_device,
    to_numpy,
)
from minivit.backend.planning import planned
from minivit.errors import DeviceError, unknown_name
from minivit.nn.module import Module
from minivit.train.parameters import FlatParameters, LaidOut, load_arrays

NAMES = ("float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """What a step computes in: ``dtype`` of activations and of the parameters that the model sees.

    With ``tf32`` matrix products of float32 numbers round what they multiply to ten bits. ``scaled``: whether the
    loss needs a :class:`LossScale`.
    """

    name: str
    dtype: Any
    tf32: bool = False
    scaled: bool = False

    @property
    def is_half(self) -> bool:
        """Whether the model sees a :class:`WorkingCopy` of its parameters."""
        return self.dtype.itemsize == 2


def check_precision(name: str, device: str) -> Precision:
    """Return the precision of a name in ``NAMES`` for training on a device.

    Raises ConfigError for another name, and DeviceError where the device, or what is installed, cannot do it: all but
    float32 need a GPU of compute capability 8.0 (2020) or later, bfloat16 the package ml_dtypes as well.
    """
    if name not in NAMES:
        raise unknown_name("precision", name, NAMES)
    if name == "float32":
        return Precision(name, np.dtype(np.float32))
    device = resolve_device(device)
    planning = planned() is not None  # for a GPU that is elsewhere
    if device == "cpu" and not planning:
        raise DeviceError(f"training in {name} on a CPU", "use float32 there; all others need a GPU")
    if not planning and (found := compute_capability(device)) < (8, 0):
        what = f"training in {name} on {device}, a GPU of compute capability {found[0]}.{found[1]}"
        raise DeviceError(what, "it needs one of 8.0 (Ampere, 2020) or later: use float32")
    if name == "tf32":
        return Precision(name, np.dtype(np.float32), tf32=True)
    return Precision(name, named_dtype(name), scaled=name == "float16")


class WorkingCopy(LaidOut):
    """A store's parameters in the dtype that a step computes in: one flat array of the same layout.

    Parameters of the model that the store does not have, because they are frozen, have a copy as well. Whatever reads
    the model outside :meth:`lent` sees the values themselves.
    """

    def __init__(self, store: FlatParameters, model: Module, dtype: Any) -> None:
        with on_device_of(store.values):
            super().__init__(store, store.values.astype(dtype))
            ours = set(map(id, store.parameters))
            frozen = [p for p in model.parameters() if id(p) not in ours and is_floating(p.dtype)]
            self.frozen = [(p, p.data.astype(dtype)) for p in frozen]
        self.copies = [*zip(store.parameters, self.views, strict=True), *self.frozen]

    def refresh(self) -> None:
        """Copy the present values."""
        with on_device_of(self.flat):
            self.flat[...] = self.store.values
            for p, copy in self.frozen:
                copy[...] = p.data

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Let the model have a copy of the present values in this block, where its nodes are others than outside.

        The copy is made on entering, whoever has changed the values before.
        """
        self.refresh()
        before = [(p, p.data, p.node) for p, _ in self.copies]
        try:
            for p, copy in self.copies:
                p.data = copy
                p.node = None if p.node is None else Node.leaf(p)  # a leaf's gradient has the dtype of its node
            yield
        finally:
            for p, data, node in before:
                p.data, p.node = data, node


@contextlib.contextmanager
def computing(precision: Precision, working: WorkingCopy | None) -> Iterator[None]:
    """Let this block compute in a precision, the model with its present values as it has them in that."""
    with products("tf32") if precision.tf32 else contextlib.nullcontext():
        if working is None:
            yield
            return
        with working.lent():
            yield


class LossScale:
    """What the loss is multiplied by, so that gradients in float16 do not vanish: kept on the device of ``like``.

    Half as large after a gradient that overflows, whose update is left out; twice as large after PATIENCE updates in a
    row that were made (Micikevicius et al. 2018, section 3.2; the numbers are those of PyTorch's GradScaler).
    """

    FIRST, LEAST, MOST, PATIENCE = 2.0**16, 1.0, 2.0**24, 2000

    def __init__(self, like: Array) -> None:
        with on_device_of(like):
            self.value = array_module(like).full((), self.FIRST, np.float32)
            self.good = array_module(like).zeros((), np.int64)  # updates made in a row

    def advance(self, finite: Array, made: Array, running: Array) -> None:
        """Take in how a step went, ``finite`` (2,) of loss and norm and whether the update is ``made``.

        A gradient that overflows leaves ``running`` as it is while the scale can still fall; a loss that is not finite
        does not, for no scale would mend it.
        """
        xp = array_module(self.value)
        loss, norm = finite[0], finite[1]
        running &= loss & (norm | (self.value > self.LEAST))
        self.good += 1
        self.good *= made
        grown = self.good >= self.PATIENCE
        self.good *= ~grown
        less = xp.where(running & ~norm, xp.maximum(self.value * 0.5, self.LEAST), self.value)
        self.value[...] = xp.where(grown, xp.minimum(self.value * 2.0, self.MOST), less)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of the state."""
        return {"loss_scale": np.array(to_numpy(self.value)), "good_steps": np.array(to_numpy(self.good))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; raise CheckpointError, nothing changed, if it does not fit."""
        load_arrays({"loss_scale": self.value, "good_steps": self.good}, state, "the loss scale")
