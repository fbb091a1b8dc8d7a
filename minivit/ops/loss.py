"""Losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, array_module, device_of, is_array, on_device_of, to_device
from minivit.errors import ConfigError, DataError, DTypeError, ShapeError
from minivit.ops.convert import convert
from minivit.ops.normalize import log_softmax, softmax
from minivit.ops.reduce import narrow, sum, wide


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Return the mean over rows of -Σ target · log softmax(logits), a 0-d array.

    logits (…, K); labels (…) of integers, or (…, K) of probabilities in the dtype of the logits, and differentiated as
    they are; a list will do. ``smoothing`` moves that share of each target to all classes alike (Szegedy et al. 2015,
    arXiv 1512.00567, section 7).
    """
    array = raw(logits)
    if not is_array(array):
        raise DTypeError(f"cross_entropy: the logits are a {type(logits).__name__}", "give an array or a Tensor (…, K)")
    if not (isinstance(smoothing, int | float | np.floating) and 0.0 <= smoothing < 1.0):
        raise ConfigError(f"cross_entropy: smoothing is {smoothing!r}", "give a number in [0, 1): 0.1 is usual")
    share = float(smoothing)  # NumPy's scalars would make float64 of float32
    with on_device_of(array):
        target = _target(array, labels)
        if share:
            target = target * (1.0 - share) + share / array.shape[-1]
        return _cross_entropy(logits, target)


def _target(logits: Array, labels: Any) -> Any:
    """Return the target distribution (…, K) in the logits' dtype and on their device, an array or a Tensor."""
    count_rows(logits.shape)
    given, real = raw(labels), logits.real.dtype
    if not is_array(given):  # a list or a number; its floats, as everywhere, take the dtype of what they meet
        try:
            given = np.asarray(given)
        except ValueError as error:
            raise ShapeError(f"cross_entropy: labels of {error}", "give a label, or K numbers, for each row") from None
        labels = given = given.astype(real) if given.dtype.kind == "f" else given
    if given.dtype.kind in "iu":
        if given.shape != logits.shape[:-1]:
            raise ShapeError(
                f"cross_entropy: logits {logits.shape} need labels {logits.shape[:-1]}, got {given.shape}",
                "give one label for each row of logits",
            )
        check_labels(given, logits.shape[-1])
        places = to_device(given, device_of(logits))[..., None]
        target = (places == array_module(logits).arange(logits.shape[-1])).astype(real)  # (…,) → (…, K)
        return Tensor(target) if isinstance(labels, Tensor) else target
    if given.shape == logits.shape[:-1]:
        what = f"cross_entropy: labels {given.shape}, one for each row of logits, are {given.dtype}"
        raise DTypeError(what, "give whole numbers: labels.astype(np.int64), or the places of names in their list")
    if given.dtype.kind not in "fc" or given.real.dtype != real:
        raise DTypeError(
            f"cross_entropy: soft labels are {given.dtype}, logits {logits.dtype}", "convert the labels to match"
        )
    if given.shape != logits.shape:
        raise ShapeError(f"cross_entropy: soft labels {given.shape}, logits {logits.shape}", "give equal shapes")
    return convert(labels, device_of(logits))


def check_labels(labels: Array, classes: int) -> None:
    """Raise DataError for the first label outside 0 … classes-1. Labels on a GPU are not looked at: that would wait."""
    if isinstance(labels, np.ndarray) and labels.size and (labels.min() < 0 or labels.max() >= classes):
        place = tuple(np.argwhere((labels < 0) | (labels >= classes))[0].tolist())
        where = "" if not place else f" at row {place[0]}" if len(place) == 1 else f" at {list(place)}"
        raise DataError(
            f"label {labels[place]}{where} is outside 0 … {classes - 1}",
            f"the model has {classes} classes: mend the labels or set num_classes",
        )


@op(save=("logits", "target"))
def _cross_entropy(logits: Array, target: Array) -> Array:
    """Return the mean over rows of -Σ target · log softmax(logits). Twins: ops/cpu/loss.py."""
    return narrow(wide(log_softmax(logits) * target).sum() / -count_rows(logits.shape), logits)


@_cross_entropy.vjp
def _(g: Any, out: Any, logits: Any, target: Any, needs: tuple[bool, ...]) -> Any:
    g = g / count_rows(logits.shape)
    gl = gt = None
    if needs[0]:
        # Σ target is 1 for probabilities, but a user's soft labels may sum to something else
        gl = (softmax(logits) * target.sum(axis=-1, keepdims=True) - target) * g
    if needs[1]:
        gt = log_softmax(logits) * -g
    return gl, gt


@_cross_entropy.composed
def _(logits: Any, target: Any) -> Any:
    return sum(log_softmax(logits) * target) / -count_rows(logits.shape)


def count_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of logits (…, K) that the mean is over; raise ShapeError if there are none."""
    if 0 in shape or not shape:
        raise ShapeError(f"cross_entropy: logits of shape {shape} have no rows", "give at least one")
    return math.prod(shape[:-1])
