"""The twins of :mod:`minivit.ops.conv`: conv2d and max_pool2d, on a part of the batch that fits the cache at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minivit.ops.conv import Windows, conv2d, convolved, max_pool2d, pooled
from minivit.ops.matmul import as_matrix
from minivit.ops.reduce import narrow, wide

BLOCK = 1 << 17  # numbers of the columns that are made at a time
WIDTH = 512  # columns of one product: OpenBLAS is slower with more where they are short, and with few


class _Block(NamedTuple):
    """Some strips, each of as many rows, of the windows of some images; or of small images all windows, joined.

    A product has the columns of one strip, or of all images that are joined.
    """

    images: slice
    strips: slice
    lead: tuple[int, int]  # how many images, not joined; how many are joined
    rows: int  # of a strip

    def cut(self, x: np.ndarray) -> np.ndarray:
        """Return this block's places in x (n, …, down, across) of its images: (n, strips, …, joined, rows, across)."""
        depth, (down, across) = x.shape[1:-2], x.shape[-2:]
        parts = x.reshape(*self.lead, *depth, down // self.rows, self.rows, across)[..., self.strips, :, :]
        last = parts.ndim - 3
        return parts.transpose(0, last, *range(2, last), 1, last + 1, last + 2)

    def columns(self, x: np.ndarray, ones: bool = False) -> np.ndarray:
        """Return :meth:`cut` x as columns (n, strips, numbers of one, places), with a 1 below each if asked for."""
        parts = self.cut(x)
        depth = math.prod(parts.shape[2:-3])
        if not ones:
            return parts.reshape(*parts.shape[:2], depth, -1)
        made = np.empty_like(x, shape=(*parts.shape[:2], depth + 1, math.prod(parts.shape[-3:])))
        made[:, :, :depth].reshape(parts.shape)[...] = parts
        made[:, :, depth:] = 1.0
        return made


def _blocks(w: Windows, images: int, depth: int) -> Iterator[_Block]:
    """Yield the blocks in which a convolution, whose columns have ``depth`` numbers, is worked off."""
    down, across = w.grid
    if w.places < WIDTH // 4:
        joined = WIDTH // w.places
        for a in range(0, images, joined):
            count = min(joined, images - a)
            yield _Block(slice(a, a + count), slice(0, 1), (1, count), down)
        return
    fitting = [n for n in range(1, down + 1) if down % n == 0 and WIDTH // 4 <= n * across <= WIDTH]
    rows = max(fitting, default=down)
    at_once = max(1, BLOCK // (depth * w.places))
    strips = down // rows if at_once > 1 else max(1, min(down // rows, BLOCK // (depth * rows * across)))
    for a in range(0, images, at_once):
        part = slice(a, min(a + at_once, images))
        for s in range(0, down // rows, strips):
            yield _Block(part, slice(s, min(s + strips, down // rows)), (part.stop - a, 1), rows)


def _windows_of(x: np.ndarray, w: Windows, depth: int) -> Iterator[tuple[_Block, np.ndarray]]:
    """Yield each block with the windows of its images (n, C, kh, kw, down, across), a view."""
    if w.padded_size == w.size:
        over = w.over(x)
        yield from ((block, over[block.images]) for block in _blocks(w, len(x), depth))
        return
    room: Any = None
    for block in _blocks(w, len(x), depth):
        if room is None:
            room = w.padded(x[block.images])
            over = w.over(room)
        elif block.strips.start == 0:
            room[: sum(block.lead) - 1][w.inside] = x[block.images]
        yield block, over[: sum(block.lead) - 1]


@conv2d.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: Any, padding: Any) -> Any:
    w = convolved(x, weight, bias, stride, padding)
    like, x, weight = x, wide(x), wide(weight)
    matrix = as_matrix(weight)
    if bias is not None:
        matrix = np.concatenate([matrix, wide(bias)[:, None]], axis=1)  # → (O, C·kh·kw + 1)
    out = np.empty_like(x, shape=(len(x), len(weight), *w.grid), order="C")
    with np.errstate(invalid="ignore"):  # see ops/matmul.py
        for block, view in _windows_of(x, w, matrix.shape[1]):
            to = block.cut(out[block.images])
            to[...] = (matrix @ block.columns(view, ones=bias is not None)).reshape(to.shape)
    return narrow(out, like), (x, weight, w)


@conv2d.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[Any, ...]) -> Any:
    x, weight, w = kept
    like, g, matrix = g, wide(g), as_matrix(weight)
    (out, depth), biased = matrix.shape, bool(needs[2])
    gx = np.empty_like(x, order="C") if needs[0] else None
    # the gradients of weight and bias, (O, C·kh·kw + 1): the longer axis first, for a faster product
    total: Any = np.zeros_like(matrix, shape=(out, depth + biased) if out > depth else (depth + biased, out))
    room: Any = None
    with np.errstate(invalid="ignore"):
        for block, view in _windows_of(x, w, depth):
            rows = block.columns(g[block.images])  # (n, strips, O, places)
            if needs[1] or biased:
                columns = block.columns(view, ones=biased)
                left, right = (rows, columns) if out > depth else (columns, rows)
                total += (left @ right.swapaxes(2, 3)).sum((0, 1))
            if gx is not None:
                room = _spread(matrix.T @ rows, block, w, room, gx)
    total = total if out > depth else total.T
    return (
        None if gx is None else narrow(gx, like),
        narrow(total[:, :depth].reshape(weight.shape), like) if needs[1] else None,
        narrow(total[:, depth], like) if biased else None,
    )


def _spread(columns: np.ndarray, block: _Block, w: Windows, room: Any, gx: np.ndarray) -> np.ndarray:
    """Add a block's columns up where their pixels are, in ``room``, and put images that are done into ``gx``."""
    count = sum(block.lead) - 1
    if w.moves_nothing:
        to = block.cut(gx[block.images])
        to[...] = columns.reshape(to.shape)
        return room
    if room is None:
        room = np.empty_like(gx, shape=(count, gx.shape[1], *w.padded_size), order="C")
    if block.strips.start == 0:
        room[...] = 0.0
    parts = columns.reshape(*columns.shape[:2], gx.shape[1], *w.kernel, block.lead[1], block.rows, -1)
    for (i, j), where in w.each_tap():
        to = block.cut(room[:count][where])
        to += parts[:, :, :, i, j]
    if block.strips.stop * block.rows == w.grid[0]:
        gx[block.images] = room[:count][w.inside]
    return room


# ---- the largest pixel: of each row of a window first, then of these -------------------------------------------------


def _planes(x: np.ndarray, w: Windows) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield some planes of x (B, C, H, W) at a time: which of all B · C they are, and these, padded (n, 1, …)."""
    planes = x.reshape(-1, 1, *w.size)
    at_once = max(1, BLOCK // math.prod(w.padded_size))
    for a in range(0, len(planes), at_once):
        part = slice(a, min(a + at_once, len(planes)))
        yield part, w.padded(planes[part], -math.inf)


def _along(w: Windows, axis: int) -> list[tuple[Any, ...]]:
    """Return where the windows have their first, second, … row (axis 0) or column (axis 1), as indices."""
    starts = [slice(i, i + w.stride[axis] * (w.grid[axis] - 1) + 1, w.stride[axis]) for i in range(w.kernel[axis])]
    return [(..., part, slice(None)) if axis == 0 else (..., part) for part in starts]


def _largest_along(x: np.ndarray, where: list[tuple[Any, ...]]) -> np.ndarray:
    """Return the elementwise maximum of the parts of x."""
    out = x[where[0]].copy()
    for part in where[1:]:
        np.maximum(out, x[part], out=out)
    return out


def _back_along(g: np.ndarray, x: np.ndarray, largest: np.ndarray, where: list[tuple[Any, ...]]) -> np.ndarray:
    """Return the gradient of :func:`_largest_along` in x: it goes to the first part that has the largest number."""
    gx, left = np.zeros_like(x), g.copy()
    for part in where:
        goes = left * (x[part] == largest)
        gx[part] += goes
        left -= goes
    return gx


@max_pool2d.twin("cpu")
def _(x: np.ndarray, kernel_size: Any, stride: Any, padding: Any) -> Any:
    w = pooled("max_pool2d", x, kernel_size, stride, padding)
    like, x = x, wide(x)
    out = np.empty_like(x, shape=(*x.shape[:2], *w.grid), order="C")
    flat = out.reshape(-1, 1, *w.grid)
    for part, planes in _planes(x, w):
        flat[part] = _largest_along(_largest_along(planes, _along(w, 1)), _along(w, 0))
    return narrow(out, like), (x, out, w)


@max_pool2d.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[Any, ...]) -> Any:
    x, out, w = kept
    gx = np.empty_like(x, order="C")
    given, largest, into = (a.reshape(-1, 1, *a.shape[2:]) for a in (wide(g), out, gx))
    for part, planes in _planes(x, w):
        across = _largest_along(planes, _along(w, 1))  # (n, 1, padded H, across)
        back = _back_along(given[part], across, largest[part], _along(w, 0))
        into[part] = _back_along(back, planes, across, _along(w, 1))[w.inside]
    return (narrow(gx, g),)
