"""Passes over the flat store on a GPU: AdamW's update in one, and the sum of squares of a gradient in a fixed order.

What changes from step to step is read from device memory, so a CUDA graph may record them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.backend import Array, array_module, tile
from minivit.ops.cuda.sums import ROWS

_ADAMW = tile.Kernel("update", "adamw")
_AVERAGE = tile.Kernel("update", "average")
_SQUARES = tile.Kernel("update", "squares")
_TOTAL = tile.Kernel("update", "total")
_BLOCK = 1024  # numbers that a program updates
_STRETCH = 2048  # numbers that a program squares at a time


def adamw(
    values: Array, grad: Array, m: Array, v: Array, ok: Array, count: Array, lr: Array, factor: Array, *,
    betas: tuple[float, float], eps: float, scale: float, decay: float,
) -> bool:  # fmt: skip
    """Update a stretch of the flat store, float32 (n,), in one launch; False, nothing done, if no kernel is ready.

    As :class:`minivit.train.optimizer.AdamW` does, by ``factor`` times ``grad`` at the rate ``lr`` · ``scale`` for the
    ``count``-th time, where ``ok`` is not 0: else every bit stays. Those four are 0-d on the device, of any dtype.
    """
    ok, count, lr, factor = (x.reshape(1) for x in (ok, count, lr, factor))  # () → (1,)
    beta1, beta2 = map(float, betas)
    constants: dict[str, Any] = {
        "beta1": beta1, "beta2": beta2, "half_log1": _half_log(beta1), "half_log2": _half_log(beta2),
        "eps": float(eps), "B": _BLOCK,
    }  # fmt: skip
    arrays = (values, grad, m, v, ok, count, lr, factor)
    if not _ADAMW.ready(*arrays, float(scale), float(decay), **constants):
        return False
    _ADAMW(-(-values.size // _BLOCK), *arrays, float(scale), float(decay), **constants)
    return True


def average(flat: Array, values: Array, ok: Array, count: Array, decay: float) -> bool:
    """Take ``values`` into the average ``flat``, float32 (n,), in one launch; False, nothing done, if none is ready.

    As :class:`minivit.train.ema.EMA` does for the ``count``-th time, where ``ok`` is not 0: else every bit stays.
    """
    arguments = (flat, values, ok.reshape(1), count.reshape(1), 1.0 - decay)  # () → (1,)
    if flat.dtype != np.float32 or not _AVERAGE.ready(*arguments, B=_BLOCK):
        return False
    _AVERAGE(-(-flat.size // _BLOCK), *arguments, B=_BLOCK)
    return True


def _half_log(beta: float) -> float:
    """Return -log(β)/2; of 0 a number as good as infinity."""
    return -0.5 * math.log(beta) if beta > 0.0 else 1e4


def squares(flat: Array) -> Array | None:
    """Return the sum of the squares of ``flat`` (n,), float32 0-d, in two launches; None if no kernel is ready.

    It is not finite if any of the numbers is not.
    """
    xp = array_module(flat)
    sums, out = xp.empty(ROWS, np.float32), xp.empty(1, np.float32)
    ready = _SQUARES.ready(flat, sums, rows=ROWS, B=_STRETCH) and _TOTAL.ready(sums, out, rows=ROWS)
    if not ready or flat.dtype != np.float32 or not flat.size:
        return None
    _SQUARES(ROWS, flat, sums, rows=ROWS, B=_STRETCH)
    _TOTAL(1, sums, out, rows=ROWS)
    return out.reshape(())  # (1,) → ()
