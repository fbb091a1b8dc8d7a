"""The twin of :mod:`minivit.ops.loss`'s cross_entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.ops.loss import _cross_entropy, count_rows, target_of
from minivit.ops.normalize import log_softmax
from minivit.ops.reduce import narrow, wide


@_cross_entropy.twin("cpu")
def _(logits: np.ndarray, target: Any, labels: Any, smoothing: float) -> Any:
    log_p = log_softmax.forward(wide(logits), -1)
    rows, target = count_rows(logits.shape), target_of(logits, target, labels, smoothing)
    out = np.asarray(np.vecdot(log_p, target).sum() / -rows, log_p.dtype)
    p = np.exp(log_p, out=log_p)
    p *= target.sum(axis=-1, keepdims=True)
    p -= target
    p /= rows
    return out, (p, logits, smoothing)


@_cross_entropy.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    p, logits, smoothing = kept
    gt = None
    if needs[1]:
        gt = log_softmax.forward(wide(logits), -1) * (g / -count_rows(logits.shape))
        gt = narrow(gt * (1.0 - smoothing) if smoothing else gt, logits)
    return narrow(p * g, logits) if needs[0] else None, gt
