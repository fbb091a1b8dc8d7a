"""Losses."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, array_module, device_of, is_array, is_floating, is_half, on_device_of, to_device
from minivit.errors import ConfigError, DataError, DTypeError, ShapeError
from minivit.ops.convert import convert
from minivit.ops.normalize import log_softmax, softmax
from minivit.ops.reduce import narrow, sum, wide


def cross_entropy(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    """Return the mean over rows of -Σ target · log softmax(logits), a 0-d array.

    logits (…, K); labels (…) of integers, or (…, K) of probabilities in the dtype of the logits, and differentiated as
    they are; a list will do. ``smoothing`` moves that share of each target to all classes alike (Szegedy et al. 2015,
    arXiv 1512.00567, section 7). Of float16 and bfloat16 logits the loss is float32, and so may soft labels be.
    """
    array = raw(logits)
    if not is_array(array):
        raise DTypeError(f"cross_entropy: the logits are a {type(logits).__name__}", "give an array or a Tensor (…, K)")
    if not (isinstance(smoothing, int | float | np.floating) and 0.0 <= smoothing < 1.0):
        raise ConfigError(f"cross_entropy: smoothing is {smoothing!r}", "give a number in [0, 1): 0.1 is usual")
    share = float(smoothing)  # NumPy's scalars would make float64 of float32
    with on_device_of(array):
        labels = _checked(array, labels)
        if isinstance(labels, Tensor) and labels.dtype.kind not in "iu":
            return _cross_entropy(wide(logits), wide(labels), None, share)
        return _cross_entropy(logits, None, labels, share)


def _checked(logits: Array, labels: Any) -> Any:
    """Return the labels on the logits' device, an array or a Tensor; raise an error for what are none."""
    count_rows(logits.shape)
    given, real = raw(labels), _real(logits)
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
        return labels
    if given.shape == logits.shape[:-1]:
        what = f"cross_entropy: labels {given.shape}, one for each row of logits, are {given.dtype}"
        raise DTypeError(what, "give whole numbers: labels.astype(np.int64), or the places of names in their list")
    if not is_floating(given.dtype) or given.real.dtype not in (real, logits.dtype):
        raise DTypeError(
            f"cross_entropy: soft labels are {given.dtype}, logits {logits.dtype}", "convert the labels to match"
        )
    if given.shape != logits.shape:
        raise ShapeError(f"cross_entropy: soft labels {given.shape}, logits {logits.shape}", "give equal shapes")
    return convert(labels, device_of(logits))


def _real(logits: Any) -> np.dtype:
    """Return the dtype of the loss, and of what logits are held against."""
    return np.dtype(np.float32) if is_half(logits.dtype) else raw(logits).real.dtype


class _Noted(threading.local):
    checks: list[tuple[Array, int]] | None = None


_noted = _Noted()


@contextlib.contextmanager
def noting_checks() -> Iterator[list[tuple[Array, int]]]:
    """Yield a list to which this block, in this thread, adds the labels on a GPU that it would check, and the classes.

    Whoever records a loss, to run it on other labels later, checks those beforehand, where they come from the host.
    """
    before, _noted.checks = _noted.checks, []
    try:
        yield _noted.checks
    finally:
        _noted.checks = before


def check_labels(labels: Array, classes: int, first: int = 0) -> None:
    """Raise DataError for the first label outside 0 … classes-1; ``first`` is the row of a batch that they begin at.

    Labels on a GPU are not looked at, which would wait: such a one makes the loss NaN.
    """
    if _noted.checks is not None and not isinstance(labels, np.ndarray):
        _noted.checks.append((labels, classes))
    if isinstance(labels, np.ndarray) and labels.size and (labels.min() < 0 or labels.max() >= classes):
        place = tuple(np.argwhere((labels < 0) | (labels >= classes))[0].tolist())
        where = "" if not place else f" at row {first + place[0]}" if len(place) == 1 else f" at {list(place)}"
        raise DataError(
            f"label {labels[place]}{where} is outside 0 … {classes - 1}",
            f"the model has {classes} classes: mend the labels or set num_classes",
        )


@op(save=("logits", "target"))
def _cross_entropy(
    logits: Array, target: Array | None = None, labels: Any = None, smoothing: float = 0.0
) -> Array:  # fmt: skip
    """Return the mean over rows of -Σ target · log softmax(logits), see :func:`target_of`; 0-d, never half precision.

    Twins: ops/cpu/loss.py, ops/cuda/loss.py.
    """
    rows, target = count_rows(logits.shape), target_of(logits, target, labels, smoothing)
    return (log_softmax(wide(logits)) * target).sum() / -rows


_cross_entropy.changes_dtype = True


def target_of(logits: Any, target: Any, labels: Any, smoothing: float) -> Any:
    """Return what logits (…, K) are held against, (…, K) in the loss's dtype; an array, or a Tensor if ``target`` is.

    It is ``target``, or, of what has no gradient, ``labels``: the same, or (…) of integers; either is smoothed.
    """
    if target is None:
        target = labels = to_device(labels, device_of(raw(logits)))
        if labels.dtype.kind in "iu":
            classes = array_module(raw(logits)).arange(logits.shape[-1])
            target = (labels[..., None] == classes).astype(_real(logits))  # (…,) → (…, K)
            if not isinstance(labels, np.ndarray):  # see check_labels
                outside = (labels < 0) | (labels >= logits.shape[-1])
                target = array_module(target).where(outside[..., None], np.nan, target).astype(target.dtype, copy=False)
    target = wide(target)
    return target * (1.0 - smoothing) + smoothing / logits.shape[-1] if smoothing else target


@_cross_entropy.vjp
def _(g: Any, out: Any, logits: Any, target: Any, labels: Any, smoothing: float, needs: tuple[bool, ...]) -> Any:
    g, held = g / count_rows(logits.shape), target_of(logits, target, labels, smoothing)
    gl = gt = None
    if needs[0]:
        # Σ target is 1 for probabilities, but a user's soft labels may sum to something else
        gl = narrow((softmax(wide(logits)) * held.sum(axis=-1, keepdims=True) - held) * g, logits)
    if needs[1]:
        gt = log_softmax(wide(logits)) * -g
        gt = narrow(gt * (1.0 - smoothing) if smoothing else gt, target)
    return gl, gt


@_cross_entropy.composed
def _(logits: Any, target: Any = None, labels: Any = None, smoothing: float = 0.0) -> Any:
    return sum(log_softmax(logits) * target_of(logits, target, labels, smoothing)) / -count_rows(logits.shape)


def count_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of logits (…, K) that the mean is over; raise ShapeError if there are none."""
    if 0 in shape or not shape:
        raise ShapeError(f"cross_entropy: logits of shape {shape} have no rows", "give at least one")
    return math.prod(shape[:-1])
