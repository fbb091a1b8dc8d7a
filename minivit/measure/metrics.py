"""How good answers are: accuracy with its interval, loss, confusion."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit import ops


def wilson_interval(right: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a share, ``right`` of ``total`` (Wilson 1927, "Probable inference", JASA 22(158))."""
    z = 1.959963984540054
    share, n = right / total, total
    middle = share + z * z / (2 * n)
    half = z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def classification_metrics(logits: np.ndarray, labels: np.ndarray, unknown: int = 0) -> dict[str, Any]:
    """Return what logits (N, K) are worth against labels (N,).

    ``loss`` (mean cross-entropy), ``accuracy`` with its 95% ``interval``, ``top5`` where there are ten classes or more,
    ``count``, ``right``, and ``confusion`` (K, K): row = label, column = prediction. Labels K to K + ``unknown`` - 1
    are of classes that the model does not know: none of their images is right, the loss leaves them out, and confusion
    is (K + unknown, K).
    """
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)  # (N,)
    confusion = np.zeros((classes + unknown, classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right, count, known = int(np.trace(confusion)), len(labels), labels < classes
    result = {
        "loss": float(ops.cross_entropy(logits[known], labels[known])),
        "accuracy": right / count,
        "interval": wilson_interval(right, count),
        "count": count,
        "right": right,
        "confusion": confusion,
    }
    if classes >= 10:
        own = np.take_along_axis(logits[known], labels[known, None], axis=1)
        higher = (logits[known] > own).sum(axis=1)  # (N without the unknown,)
        result["top5"] = int((higher < 5).sum()) / count
    return result
