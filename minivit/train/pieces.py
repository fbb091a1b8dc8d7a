"""What a step is made of: what its micro-batches come to, where their gradients are added up, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minivit.autograd.needs import Slot
from minivit.autograd.op import raw
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, Key, array_module, device_of, is_array, square_sum, to_device
from minivit.backend.planning import is_on_gpu
from minivit.errors import DataError, GraphError, ShapeError
from minivit.ops.cuda.loss import counted_right
from minivit.ops.cuda.update import squares
from minivit.ops.loss import check_labels, noting_checks
from minivit.train.parameters import FlatParameters, LaidOut
from minivit.train.sharing import as_array


@dataclass(frozen=True)
class Batch:
    """What the micro-batches of one step have in common."""

    images: Array  # (B, C, H, W)
    labels: Array  # (B, …)
    key: Key  # of dropout and drop path, in this step
    training: bool | None  # the mode of all modules, or None: as each was set
    counted: bool = True  # whether a label may be one that a largest logit can be right by
    first: int = 0  # the place of the first image, and the number of all: of more that are worked on elsewhere
    rows: int | None = None
    # on a GPU:
    sums: Any = None  # the Arena in which partial sums of columns are collected
    given: Array = None  # the labels as they were given: where they lie on the host they can be checked
    asked: list[int] = field(default_factory=list)  # the numbers of classes that the loss would have checked them for


class Piece(NamedTuple):
    """What a micro-batch came to, on the device: its share of the batch's mean loss, and how many were right."""

    loss: Array
    right: Array | None


class Totals(NamedTuple):
    """What a batch came to: its mean loss, the norm of its gradient before it is clipped, and how many were right.

    On a GPU they are 0-d arrays there, until somebody waits for them.
    """

    loss: Any
    grad_norm: Any
    right: Any


class Buffer(LaidOut):
    """A flat sum of gradients: a :class:`~minivit.autograd.needs.Slot` for each parameter, in the store's order."""

    def __init__(self, store: FlatParameters, flat: Array) -> None:
        super().__init__(store, flat)
        self.slots = [Slot(view) for view in self.views]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "slots"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.slots = [Slot(view) for view in self.views]

    @property
    def written(self) -> set[int]:
        """The places of the parameters that it has got a part for."""
        return {i for i, slot in enumerate(self.slots) if slot.filled}

    def mark(self, places: Iterable[int]) -> None:
        """Count the parameters at these places as written, and no others."""
        chosen = set(places)
        for i, slot in enumerate(self.slots):
            slot.filled = i in chosen

    def clear_the_rest(self) -> None:
        """Zero the gradients that have got no part."""
        for slot in self.slots:
            if not slot.filled:
                slot.array[...] = 0.0


def checked(images: Any, labels: Any, dtype: Any) -> tuple[Array, Array]:
    """Return a batch as arrays, floating images in ``dtype``; raise an error for what is none."""
    for name, given in (("images", images), ("labels", labels)):
        if isinstance(given, Tensor) and given.is_recorded:
            what = f"a TrainStep has no gradient in its {name}, a Tensor that requires one"
            raise GraphError(what, f"give {name}.detach() to hold them constant, or train by loss.backward()")
    images, labels = as_array(images, dtype), as_array(labels)
    if not (images.ndim and labels.ndim):
        raise ShapeError(f"images {images.shape}, labels {labels.shape}", "give arrays (B, C, H, W) and (B,)")
    if len(images) != len(labels):
        raise ShapeError(f"{len(images)} images, {len(labels)} labels", "give one label for each image")
    return images, labels


def add_share(total: Array, others: Sequence[Array], start: int, stop: int) -> Array:
    """Add a share of other flat arrays to that of ``total``, in place; return the sum of its squares, 0-d."""
    share = total[start:stop]
    for other in others:
        share += other[start:stop]
    found = squares(share) if is_on_gpu(share) else None
    return square_sum(share) if found is None else found


def loss_of(loss: Callable[..., Any], logits: Any, batch: Batch, start: int, stop: int) -> Tensor:
    """Return the loss of a piece of the batch; raise DataError for labels that it does not take."""
    labels, given = batch.labels, batch.given
    try:
        if given is None:
            return check_loss(loss(logits, labels[start:stop]))
        with noting_checks() as checks:
            try:
                found = check_loss(loss(logits, labels[start:stop]))
            except Exception:  # whatever it is: the loss may want its labels where they came from
                return check_loss(loss(logits, given[start:stop]))
    except DataError:  # of a label: then name its row in the batch, not in this piece of it
        if labels.dtype.kind in "iu":
            check_labels(labels if given is None else given, logits.shape[-1], batch.first)
        raise
    for checked_labels, classes in checks:  # on the GPU, and so not looked at
        if array_module(labels).may_share_memory(checked_labels, labels):
            check_labels(given, classes)
            batch.asked.append(classes)
    return found


def check_loss(loss: Any) -> Tensor:
    """Return the loss; raise if it is not what a step can go back from."""
    if not isinstance(loss, Tensor):
        raise GraphError(f"the loss is a {type(loss).__name__}, not a Tensor", "make it of mv.ops, and keep its graph")
    if loss.ndim:
        raise ShapeError(f"the loss has the shape {loss.shape}", "give one number, the mean over the rows: mv.ops.mean")
    return loss


def are_shares(labels: Array) -> bool:
    """Tell whether labels may be classes, or shares of them, and not several classes at once, or other numbers.

    Of labels on a GPU it is taken to be so: to look would be to wait.
    """
    if not isinstance(labels, np.ndarray) or labels.ndim != 2:
        return True
    return bool((np.abs(labels.sum(axis=1) - 1.0) < 0.01).all())


def count_right(logits: Any, labels: Array) -> Array | None:
    """Return how many rows of logits (B, K) are largest at their label, as a 0-d array.

    labels (B,) of integers or (B, K) of shares; None if logits or labels are anything else.
    """
    logits = raw(logits)
    if not is_array(logits) or logits.ndim != 2 or logits.shape[1] < 2:
        return None
    is_soft = labels.shape == logits.shape
    if not (are_shares(labels) if is_soft else labels.shape == logits.shape[:1] and labels.dtype.kind in "iu"):
        return None
    if (found := counted_right(logits, labels)) is not None:
        return found
    labels = labels.argmax(axis=1) if is_soft else labels  # (B, K) → (B,)
    return (logits.argmax(axis=1) == to_device(labels, device_of(logits))).sum()
