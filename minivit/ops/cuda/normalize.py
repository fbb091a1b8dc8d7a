"""The twins of :mod:`minivit.ops.normalize`: layer_norm and rms_norm."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.needs import SoFar
from minivit.backend import Array, array_module, tile
from minivit.ops.cuda import sums
from minivit.ops.cuda.rows import as_rows, serves
from minivit.ops.normalize import layer_norm, rms_norm

_FORWARD = tile.Kernel("normalize", "layer_norm_forward")
_BACKWARD = tile.Kernel("normalize", "layer_norm_backward", occupancy=2)
_RMS_FORWARD = tile.Kernel("normalize", "rms_norm_forward")
_RMS_BACKWARD = tile.Kernel("normalize", "rms_norm_backward", occupancy=2)
MOST = 4096  # numbers in a row: longer ones do not fit a program's registers


def _height(width: int, numbers: int) -> int:
    """Return how many rows of ``width`` a tile has, a power of two, for about so many numbers in it."""
    return 1 << max((numbers // max(width, 16)).bit_length() - 1, 0)


def _backward_constants(rows: Array, add: bool) -> dict[str, Any]:
    # as many numbers as two programs on a multiprocessor have registers for
    width, numbers = rows.shape[1], 3072 if rows.dtype.itemsize == 2 else 1536
    return {"D": width, "R": _height(width, numbers), "rows": sums.ROWS, "add": add}


@layer_norm.twin("cuda")
def _(x: Array, weight: Array, bias: Array, eps: float) -> Any:
    if not serves(x) or x.ndim == 0 or not weight.shape == bias.shape == x.shape[-1:] or x.shape[-1] > MOST:
        return NotImplemented
    xp, rows, width = array_module(x), as_rows(x), x.shape[-1]  # (…, D) → (M, D)
    out, statistics = xp.empty(x.shape, x.dtype), xp.empty((2, len(rows)), np.float32)
    like = tile.Like(x.dtype, rows.shape)
    loose = tile.Loose(statistics)
    arguments = (rows, weight, bias, out.reshape(rows.shape), loose)
    constants = {"D": width, "R": _height(width, 2048), "eps": float(eps)}
    back = (like, rows, weight, loose, like, sums.like(3 * width).reshape(-1, 3, width))
    if not (_FORWARD.ready(*arguments, **constants) and _BACKWARD.ready(*back, **_backward_constants(rows, False))):
        return NotImplemented
    _FORWARD(-(-len(rows) // constants["R"]), *arguments, **constants)
    return out, (rows, weight, loose)


def _backward(kernel: tile.Kernel, g: Array, kept: Any, need: Any, vectors: int) -> tuple[Any, list[Array]]:
    """Return the gradient of x, on top of what there is so far, and partial sums of those of so many vectors (D,)."""
    rows, weight, statistics = kept
    xp, width = array_module(g), rows.shape[1]
    given = xp.ascontiguousarray(g).reshape(rows.shape)  # (…, D) → (M, D)
    gx, partials = xp.empty(g.shape, g.dtype), sums.scratch(g, (vectors + 1) * width)
    sources = (given, rows, weight, statistics)
    results = (gx.reshape(rows.shape), partials.reshape(-1, vectors + 1, width))
    if add := type(need) is SoFar:
        on_top = (*sources, xp.ascontiguousarray(need.array).reshape(rows.shape), *results)
        add = kernel.ready(*on_top, **_backward_constants(rows, True))
    kernel(sums.ROWS, *(on_top if add else (*sources, *results)), **_backward_constants(rows, add))
    *of_vectors, of_x = (partials[:, i * width : (i + 1) * width] for i in range(vectors + 1))  # (ROWS, D) each
    sums.note(gx, of_x)
    return need.total(gx) if add else gx, of_vectors


@layer_norm.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    gx, [of_weight, of_bias] = _backward(_BACKWARD, g, kept, needs[0], 2)
    return (
        gx,
        sums.deliver(of_weight, needs[1], g.dtype) if needs[1] else None,
        sums.deliver(of_bias, needs[2], g.dtype) if needs[2] else None,
    )


@rms_norm.twin("cuda")
def _(x: Array, weight: Array, eps: float) -> Any:
    if not serves(x) or x.ndim == 0 or weight.shape != x.shape[-1:] or x.shape[-1] > MOST:
        return NotImplemented
    xp, rows, width = array_module(x), as_rows(x), x.shape[-1]  # (…, D) → (M, D)
    out, statistics = xp.empty(x.shape, x.dtype), xp.empty((1, len(rows)), np.float32)
    like = tile.Like(x.dtype, rows.shape)
    loose = tile.Loose(statistics)
    arguments = (rows, weight, out.reshape(rows.shape), loose)
    constants = {"D": width, "R": _height(width, 2048), "eps": float(eps)}
    back = (like, rows, weight, loose, like, sums.like(2 * width).reshape(-1, 2, width))
    ready = _RMS_FORWARD.ready(*arguments, **constants)
    if not (ready and _RMS_BACKWARD.ready(*back, **_backward_constants(rows, False))):
        return NotImplemented
    _RMS_FORWARD(-(-len(rows) // constants["R"]), *arguments, **constants)
    return out, (rows, weight, loose)


@rms_norm.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    gx, [of_weight] = _backward(_RMS_BACKWARD, g, kept, needs[0], 1)
    return gx, sums.deliver(of_weight, needs[1], g.dtype) if needs[1] else None
