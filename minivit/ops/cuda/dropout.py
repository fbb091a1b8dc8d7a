"""The twins of :mod:`minivit.ops.dropout`: the numbers are drawn where they are used, in one pass over memory."""

from __future__ import annotations

import math
from typing import Any

from minivit.backend import Array, Key, array_module, is_array, tile
from minivit.ops.cuda import sums
from minivit.ops.cuda.rows import as_rows, power, serves
from minivit.ops.dropout import drop_path, dropout

_DROP = tile.Kernel("dropout", "drop")


def _constants(x: Array, rows: Array, each: bool) -> dict[str, Any]:
    width = min(128, power(rows.shape[1]))  # of a tile
    samples = max(math.prod(x.shape[1:-1]), 1)  # rows for each
    return {"N": rows.shape[1], "T": samples, "each": each, "rows": sums.ROWS, "R": 2048 // width, "W": width}


def _dropped(x: Array, p: float, key: Key, each: bool) -> Any:
    """Return x with what the key says dropped, and what the gradient needs for the same."""
    fit = is_array(key.step) and 0.0 <= p < 1.0 and key.row < 1 << 31  # a step that is a number is no device's
    if not serves(x) or x.ndim < 2 or not fit:
        return NotImplemented
    xp, rows = array_module(x), as_rows(x)  # (B, …, N) → (M, N)
    out, base, constants = xp.empty(x.shape, x.dtype), key.base(), _constants(x, rows, each)
    step, like = key.step.reshape(1), tile.Like(x.dtype, rows.shape)
    numbers = *((base >> shift) & ((1 << 22) - 1) for shift in (0, 22, 44)), key.row, float(p), 1.0 / (1.0 - p)
    forward = (rows, step, out.reshape(rows.shape), step, *numbers)
    back = (like, step, like, sums.like(rows.shape[1]), *numbers)
    if not (_DROP.ready(*forward, summed=False, **constants) and _DROP.ready(*back, summed=True, **constants)):
        return NotImplemented
    _DROP(_grid(rows, constants), *forward, summed=False, **constants)
    return out, (rows.shape, step, numbers, constants)


def _grid(rows: Array, constants: dict[str, Any]) -> tuple[int, int]:
    return -(-rows.shape[1] // constants["W"]), sums.ROWS


def _gradient(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    shape, step, numbers, constants = kept
    xp = array_module(g)
    gx, given = xp.empty(g.shape, g.dtype), xp.ascontiguousarray(g).reshape(shape)
    partials = sums.partial(gx, shape[1])
    _DROP(_grid(given, constants), given, step, gx.reshape(shape), partials, *numbers, summed=True, **constants)
    return (gx,)


@dropout.twin("cuda")
def _(x: Array, p: float, key: Key) -> Any:
    return _dropped(x, p, key, each=True)


@drop_path.twin("cuda")
def _(x: Array, p: float, key: Key) -> Any:
    return _dropped(x, p, key, each=False)


dropout.twin("cuda").vjp(_gradient)
drop_path.twin("cuda").vjp(_gradient)
