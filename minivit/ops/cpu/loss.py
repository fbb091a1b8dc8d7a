"""The twin of :mod:`minivit.ops.loss`'s cross_entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.ops.loss import _cross_entropy, count_rows
from minivit.ops.normalize import log_softmax
from minivit.ops.reduce import wide


@_cross_entropy.twin("cpu")
def _(logits: np.ndarray, target: np.ndarray) -> Any:
    log_p = log_softmax.forward(logits, -1)
    rows = count_rows(logits.shape)
    out = np.asarray(wide(np.vecdot(log_p, target)).sum() / -rows, logits.dtype)
    p = np.exp(log_p, out=log_p)
    p *= target.sum(axis=-1, keepdims=True)
    p -= target
    p /= rows
    return out, (p, logits)


@_cross_entropy.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    p, logits = kept
    log_p = log_softmax.forward(logits, -1) if needs[1] else None
    return (p * g if needs[0] else None, None if log_p is None else log_p * (g / -count_rows(logits.shape)))
