"""The twin of :mod:`minivit.ops.loss`'s cross_entropy, which counts what is right on the way."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np

from minivit.backend import Array, address_of, array_module, device_of, tile, to_device
from minivit.ops.cuda.rows import power, serves
from minivit.ops.loss import _cross_entropy, count_rows
from minivit.ops.normalize import log_softmax
from minivit.ops.reduce import narrow, wide

WIDEST = 2048  # columns at a time
TALLEST = 16  # rows

_ROWS = tile.Kernel("loss", "cross_entropy_rows")
_TOTAL = tile.Kernel("loss", "cross_entropy_total")
_BACKWARD = tile.Kernel("loss", "cross_entropy_backward")


class _Counted(threading.local):
    """What this thread's last loss was of, and how many of its rows were right."""

    logits: weakref.ref | None = None
    labels: tuple[int, tuple[int, ...]] = (0, ())
    right: Array | None = None


_counted = _Counted()


def counted_right(logits: Array, labels: Array) -> Array | None:
    """Return how many rows of logits (B, K) are largest at their label, 0-d, float32, where the loss has counted them.

    None unless this thread's last cross_entropy on a GPU was of these very logits and labels; ties go to the first.
    """
    of = _counted.logits
    same = of is not None and of() is logits and _counted.labels == (address_of(labels), labels.shape)
    return _counted.right if same else None


def _constants(classes: int, soft: bool) -> dict[str, Any]:
    width = min(WIDEST, max(16, power(classes)))
    return {"K": classes, "R": min(TALLEST, WIDEST // width), "W": width, "soft": soft}


@_cross_entropy.twin("cuda")
def _(logits: Array, target: Array | None, labels: Any, smoothing: float) -> Any:
    m, classes = count_rows(logits.shape), logits.shape[-1]
    given = to_device(labels, device_of(logits)) if target is None else target
    soft = given.shape == logits.shape
    if not serves(logits):
        return NotImplemented
    xp, constants = array_module(logits), _constants(classes, soft)
    if m > constants["R"] * tile.GRID[1]:
        return NotImplemented
    rows = xp.ascontiguousarray(logits).reshape(m, classes)  # (…, K) → (M, K)
    held = xp.ascontiguousarray(given).reshape(rows.shape if soft else (m,))
    held = held if soft else tile.Loose(held)
    stats = tile.Loose(xp.empty((5, m), np.float32))
    loss, count = xp.empty(1, np.float32), xp.empty(1, np.float32)
    forward, total = (rows, held, stats, smoothing), (stats, loss, count, 1.0 / m)
    back = (rows, held, stats, tile.Like(np.float32, (1,)), tile.Like(rows.dtype, rows.shape), smoothing, 1.0 / m)
    if not (
        _ROWS.ready(*forward, **constants) and _TOTAL.ready(*total, R=1024) and _BACKWARD.ready(*back, **constants)
    ):
        return NotImplemented
    _ROWS(-(-m // constants["R"]), *forward, **constants)
    _TOTAL(1, *total, R=1024)
    _counted.logits, _counted.right = weakref.ref(logits), count.reshape(())  # (1,) → ()
    _counted.labels = address_of(given), given.shape
    return loss.reshape(()), (logits, rows, target, held, stats, smoothing, constants)


@_cross_entropy.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    logits, rows, target, held, stats, smoothing, constants = kept
    m, gx, gt = len(rows), None, None
    if needs[0]:
        gx = array_module(g).empty(rows.shape, rows.dtype)
        grid = (-(-rows.shape[1] // constants["W"]), -(-m // constants["R"]))
        _BACKWARD(grid, rows, held, stats, g.reshape(1), gx, smoothing, 1.0 / m, **constants)
        gx = gx.reshape(logits.shape)  # (M, K) → (…, K)
    if needs[1]:
        gt = log_softmax.forward(wide(logits), -1) * (g / -m)
        gt = narrow(gt * (1.0 - smoothing) if smoothing else gt, target)
    return gx, gt
