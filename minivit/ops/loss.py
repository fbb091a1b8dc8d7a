"""Losses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module, device_of, is_array, to_device
from minivit.errors import ConfigError, DataError, DTypeError, ShapeError
from minivit.ops.normalize import log_softmax, softmax
from minivit.ops.reduce import sum


def targets(logits: Array, labels: Any, smoothing: float) -> Array:
    """Return the target distribution (…, K): labels made one-hot, and smoothed (Szegedy et al. 2015, section 7)."""
    xp, labels = array_module(logits), raw(labels)
    if not is_array(labels):  # a list or a number; its floats, as everywhere, take the dtype of what they meet
        labels = np.asarray(labels)
        labels = labels.astype(logits.real.dtype) if labels.dtype.kind == "f" else labels
    classes = logits.shape[-1]
    if not 0.0 <= smoothing < 1.0:
        raise ConfigError(f"cross_entropy: smoothing {smoothing} is outside [0, 1)", "0.1 is usual")
    if labels.dtype.kind in "iu":
        if labels.shape != logits.shape[:-1]:
            raise ShapeError(
                f"cross_entropy: logits {logits.shape} need labels {logits.shape[:-1]}, got {labels.shape}",
                "give one label for each row of logits",
            )
        check_labels(labels, classes)
        labels = to_device(labels, device_of(logits))
        target = (labels[..., None] == xp.arange(classes)).astype(logits.real.dtype)  # (…,) → (…, K)
    elif labels.dtype != logits.real.dtype:
        raise DTypeError(
            f"cross_entropy: soft labels are {labels.dtype}, logits {logits.dtype}", "convert the labels to match"
        )
    elif labels.shape != logits.shape:
        raise ShapeError(f"cross_entropy: soft labels {labels.shape}, logits {logits.shape}", "give equal shapes")
    else:
        target = to_device(labels, device_of(logits))
    return target * (1.0 - smoothing) + smoothing / classes if smoothing else target


def check_labels(labels: Array, classes: int) -> None:
    """Raise DataError for the first label outside 0 … classes-1. Labels on a GPU are not looked at: that would wait."""
    if isinstance(labels, np.ndarray) and labels.size and (labels.min() < 0 or labels.max() >= classes):
        row = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(
            f"label {labels.reshape(-1)[row]} at row {row} is outside 0 … {classes - 1}",
            f"the model has {classes} classes: mend the labels or set num_classes",
        )


@op(save=("logits",))
def cross_entropy(logits: Array, labels: Any, smoothing: float = 0.0) -> Array:
    """Return the mean over rows of -Σ target · log softmax(logits), a 0-d array.

    logits (…, K); labels (…) of integers, or (…, K) of probabilities in the dtype of the logits; a list will do.
    ``smoothing`` moves that share of each target to all classes alike.
    """
    target = targets(logits, labels, smoothing)
    return (log_softmax(logits) * target).sum() / -count_rows(logits.shape)


@cross_entropy.vjp
def _(g: Any, out: Any, logits: Any, labels: Any, smoothing: float, needs: tuple[bool, ...]) -> Any:
    target = targets(raw(logits), labels, smoothing)
    # Σ target is 1 for probabilities, but a user's soft labels may sum to something else
    total = target.sum(axis=-1, keepdims=True)
    return (softmax(logits) * total - target) * (g / count_rows(logits.shape))


@cross_entropy.composed
def _(logits: Any, labels: Any, smoothing: float = 0.0) -> Any:
    target = targets(raw(logits), labels, smoothing)
    return sum(log_softmax(logits) * target) / -count_rows(logits.shape)


def count_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows of logits (…, K) that the mean is over; raise ShapeError if there are none."""
    if 0 in shape or not shape:
        raise ShapeError(f"cross_entropy: logits of shape {shape} have no rows", "give at least one")
    return math.prod(shape[:-1])
