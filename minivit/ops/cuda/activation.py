"""The twin of :mod:`minivit.ops.activation`'s gelu."""

from __future__ import annotations

from typing import Any

from minivit.backend import Array, array_module, tile
from minivit.ops.activation import gelu
from minivit.ops.cuda import sums
from minivit.ops.cuda.rows import as_rows, power, serves

_FORWARD = tile.Kernel("activation", "gelu_forward")
_BACKWARD = tile.Kernel("activation", "gelu_backward")


def _constants(rows: Array, approximate: str) -> dict[str, Any]:
    width = min(256, power(rows.shape[1]))  # of a tile
    return {"tanh": approximate == "tanh", "exact": rows.dtype.itemsize == 4, "R": 2048 // width, "W": width}


@gelu.twin("cuda")
def _(x: Array, approximate: str) -> Any:
    if not serves(x) or approximate not in ("none", "tanh"):
        return NotImplemented
    xp, rows = array_module(x), as_rows(x)  # (…, N) → (M, N)
    constants = _constants(rows, approximate)
    if len(rows) > constants["R"] * tile.GRID[1]:
        return NotImplemented
    out = xp.empty(x.shape, x.dtype)
    flat, like = out.reshape(rows.shape), tile.Like(x.dtype, rows.shape)
    back = (like, rows, like, sums.like(rows.shape[1]))
    if not (_FORWARD.ready(rows, flat, **constants) and _BACKWARD.ready(*back, rows=sums.ROWS, **constants)):
        return NotImplemented
    _FORWARD((-(-rows.shape[1] // constants["W"]), -(-len(rows) // constants["R"])), rows, flat, **constants)
    return out, (rows, constants)


@gelu.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    rows, constants = kept
    xp, width = array_module(g), rows.shape[1]
    gx = xp.empty(g.shape, g.dtype)
    _BACKWARD(
        (-(-width // constants["W"]), sums.ROWS), xp.ascontiguousarray(g).reshape(rows.shape), rows,
        gx.reshape(rows.shape), sums.partial(gx, width), rows=sums.ROWS, **constants,
    )  # fmt: skip
    return (gx,)
