"""Optimizers: AdamW and SGD, and what they share. They work on :class:`~minivit.train.parameters.FlatParameters`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from minivit.backend import Array, array_module, largest, to_numpy
from minivit.errors import ConfigError
from minivit.nn.module import Parameter
from minivit.ops.cuda.update import adamw
from minivit.train.numbers import scaled_gradient, unless_stopped
from minivit.train.parameters import FlatParameters, Group, Span, chunks, load_arrays, overlaps


class Optimizer:
    """Base: updates the parameters in ``store`` by their gradients, and keeps ``slots`` arrays of state beside them.

    Takes ``model.named_parameters()``, of which it makes the store, or a store that is there already. ``lr`` may be set
    before every step; ``steps`` counts the updates made. Parameters that do not require a gradient are left out. One
    that is frozen later (``requires_grad = False``), or that the loss does not reach, is left alone by an update: its
    value, its state, and its average (:class:`minivit.train.ema.EMA`) stay. Move or convert the model before making its
    optimizer, not after. ``lr_scales`` are factors on ``lr`` by parameter name, 1 where there is none:
    :func:`~minivit.train.parameters.layer_scales` makes such. ``lr`` and the other settings are no part of the state: a
    run that is resumed without a schedule goes on with those that its optimizer was made with.

    Raises ConfigError for settings or parameters that cannot be used.
    """

    slots: tuple[str, ...] = ()

    def __init__(
        self,
        named_parameters: FlatParameters | Iterable[tuple[str, Parameter]],
        lr: float,
        weight_decay: float,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            check_rate(name, value)  # before the parameters are laid out, which changes what they are views of
        if not isinstance(named_parameters, FlatParameters):
            named_parameters = FlatParameters(named_parameters, lr_scales)
        elif lr_scales is not None:
            raise ConfigError("lr_scales beside FlatParameters, whose factors are set", "give them to FlatParameters")
        self.store = named_parameters
        self.lr, self.weight_decay = lr, weight_decay
        self._check_rates()
        self.state = {slot: self.store.zeros() for slot in self.slots}

    @property
    def names(self) -> list[str]:
        """The parameters' names, in the order of the store."""
        return self.store.names

    @property
    def parameters(self) -> list[Parameter]:
        """The parameters, in the order of the store."""
        return self.store.parameters

    @property
    def groups(self) -> list[Group]:
        """What is updated alike."""
        return self.store.groups

    @property
    def steps(self) -> Any:
        """Number of updates made; in an update that is led by numbers on the GPU a 0-d float64 array there."""
        return self.store.count

    def zero_grad(self) -> None:
        """Forget the parameters' gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient by it; the others keep their values and their state."""
        self.update(self.store.gather())

    def update(self, spans: Sequence[Span] = ()) -> None:
        """Update from the flat gradient ``store.grad``: all of it, or the given spans."""
        self.begin_update(spans)
        self.update_spans([(0, self.store.values.size)])

    def begin_update(self, spans: Sequence[Span] = ()) -> None:
        """Count an update of the given spans, or of all, which :meth:`update_spans` may then make in shares.

        Raises ConfigError, nothing changed, if a learning rate or weight decay was set that is not finite.
        """
        self.check_rates()
        self.store.begin_update(spans)

    def check_rates(self) -> None:
        """Raise ConfigError if a learning rate or weight decay was set that is not finite, and name the step."""
        try:
            self._check_rates()
        except ConfigError as error:
            raise ConfigError(f"step {self.store.steps}: {error.what}", error.remedy) from None

    def update_spans(self, spans: Sequence[Span]) -> None:
        """Make the part of the update that lies in the given spans; threads may share them out."""
        spans = overlaps(spans, self.store.updated)
        for group in self.groups:
            for start, stop in chunks(self.store.values, overlaps(spans, [(group.start, group.stop)])):
                self.update_piece(slice(start, stop), group)

    def update_piece(self, piece: slice, group: Group) -> None:
        """Update a piece of a group by its gradient, which it alone reads."""
        lr, decay = self._rates(group)
        p, *state = [flat[piece] for flat in (self.store.values, *self.state.values())]
        with unless_stopped(self.store, [p, *state]):
            self.update_chunk(p, scaled_gradient(self.store, self.store.grad[piece]), lr, decay, *state)

    def _rates(self, group: Group) -> tuple[Any, float]:
        """Return the learning rate and the weight decay of a group at this step."""
        numbers = self.store.numbers
        lr = self.lr * group.scale if numbers is None else numbers.rate(group.scale)
        return lr, self.weight_decay if group.decayed else 0.0

    def _check_rates(self) -> None:
        """Raise ConfigError unless both rates are finite numbers from 0 on, also in the values' dtype and scaled."""
        most = largest(self.store.values.dtype)
        for name, value in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            check_rate(name, value, most)
        scale = max(group.scale for group in self.groups)
        if scale * self.lr * max(1.0, self.weight_decay) > most:
            what = f"lr={self.lr}, scaled by {scale}, and weight_decay={self.weight_decay}"
            raise ConfigError(what, "together they overflow")

    def update_chunk(self, p: Array, g: Array, lr: Any, decay: float, *state: Array) -> None:
        """Update the slice ``p`` of the parameters in place by its gradient ``g``, which is not changed.

        In an update that is led by numbers on the GPU ``lr``, in the dtype of ``p``, and ``self.steps``, float64, are
        0-d arrays there: arithmetic takes them as it does numbers, a look at a value (``if``, ``float``) would wait.
        """
        raise NotImplementedError

    # ---- state ----

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of the state: ``steps``, and an array ``slot/parameter name`` for each slot."""
        state = {"steps": np.asarray(self.steps)}
        for slot, flat in self.state.items():
            views = self.store.by_name(np.array(to_numpy(flat)))
            state |= {f"{slot}/{name}": view for name, view in views.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; nothing is changed if it does not fit."""
        steps = np.zeros((), np.int64)
        into = {"steps": steps}
        for slot, flat in self.state.items():
            into |= {f"{slot}/{name}": view for name, view in self.store.by_name(flat).items()}
        load_arrays(into, state, "the optimizer state")
        self.store.steps = int(steps)


def check_rate(name: str, value: Any, most: float = float(np.finfo(np.float64).max)) -> None:
    """Raise ConfigError unless a learning rate or weight decay is a number from 0 to ``most``."""
    is_number: bool = isinstance(value, Real)  # whatever is annotated: a schedule may give anything
    if not (is_number and 0.0 <= value <= most):  # NaN compares with nothing
        remedy = "it must be finite and at least 0: look at what sets it, such as a schedule"
        raise ConfigError(f"{name}={value!r}", remedy)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, as in PyTorch).

    m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← (1 - lr·decay)·p - lr·m̂/(√v̂ + eps), with m̂ = m/(1-β₁ᵗ) and
    v̂ = v/(1-β₂ᵗ). t counts the optimizer's updates, also for a parameter that had no gradient in some of them.
    """

    slots = ("m", "v")

    def __init__(
        self,
        named_parameters: FlatParameters | Iterable[tuple[str, Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not (pair and all(isinstance(b, int | float | np.floating) and 0.0 <= b < 1.0 for b in betas)):
            raise ConfigError(f"betas={betas}", "give two numbers in [0, 1); 0.9 and 0.999 are usual")
        if not (isinstance(eps, int | float | np.floating) and 0.0 < eps < math.inf):
            raise ConfigError(f"eps={eps}", "it must be positive, or the update would divide by zero; 1e-8 is usual")
        super().__init__(named_parameters, lr, weight_decay, lr_scales)
        self.betas, self.eps = betas, eps

    def update_piece(self, piece: slice, group: Group) -> None:
        """Update a piece of a group: led by numbers on the GPU in one launch, where there is a kernel."""
        if self.store.numbers is None or not self._update_by_kernel(piece, group):
            super().update_piece(piece, group)

    def _update_by_kernel(self, piece: slice, group: Group) -> bool:
        """Update a piece as :meth:`update_chunk` does, or leave it alone and return False."""
        store, numbers = self.store, self.store.numbers
        if type(self).update_chunk is not AdamW.update_chunk or store.values.dtype != np.float32:
            return False
        m, v = (self.state[slot][piece] for slot in AdamW.slots)
        return adamw(
            store.values[piece], store.grad[piece], m, v,
            numbers.ok, numbers.count, numbers.lr, numbers.multiplier,
            betas=self.betas, eps=self.eps, scale=group.scale, decay=self.weight_decay if group.decayed else 0.0,
        )  # fmt: skip

    def update_chunk(self, p: Array, g: Array, lr: Any, decay: float, *state: Array) -> None:
        """Update one slice."""
        m, v = state
        b1, b2 = self.betas
        xp = array_module(p)
        t = xp.multiply(g, 1.0 - b1)  # the only memory that is taken: if there is none, nothing has changed yet
        m *= b1
        m += t
        v *= b2
        xp.multiply(g, g, out=t)
        t *= 1.0 - b2
        v += t
        xp.sqrt(v, out=t)
        t *= (1.0 - b2**self.steps) ** -0.5
        t += self.eps
        xp.divide(m, t, out=t)
        t *= lr / (1.0 - b1**self.steps)
        if decay:
            p *= 1.0 - lr * decay
        p -= t


class SGD(Optimizer):
    """Gradient descent with momentum (Sutskever et al. 2013, as in PyTorch): b ← momentum·b + g, p ← p - lr·b.

    Weight decay is coupled: g ← g + decay·p.
    """

    slots = ("momentum",)

    def __init__(
        self,
        named_parameters: FlatParameters | Iterable[tuple[str, Parameter]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        self.momentum = check_momentum(momentum)
        super().__init__(named_parameters, lr, weight_decay, lr_scales)

    def update_chunk(self, p: Array, g: Array, lr: Any, decay: float, *state: Array) -> None:
        """Update one slice."""
        (b,) = state
        xp = array_module(p)
        t = xp.multiply(p, decay)  # first, as in AdamW
        b *= self.momentum
        b += g
        if decay:
            b += t
        xp.multiply(b, lr, out=t)
        p -= t


def check_momentum(momentum: float) -> float:
    """Return ``momentum``; raise ConfigError for one that is no share of what was."""
    if not 0.0 <= momentum < 1.0:
        raise ConfigError(f"momentum={momentum}", "it must be in [0, 1); 0.9 is usual, for Muon 0.95")
    return momentum
