"""The twins of :mod:`minivit.ops.conv`: conv2d and max_pool2d, on a part of the batch that fits the cache at a time.

What they return is (B, C, H, W) with the channels next to each other in memory, as (B, H, W, C). A window is then a few
long runs of numbers, its pooling a few long vectors, and a product's result is in place. Images of any other memory
are taken, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minivit.autograd.graph import recording
from minivit.ops.conv import Windows, conv2d, convolved, max_pool2d, pooled
from minivit.ops.cpu.masks import mask, maskable, masked, unmasked
from minivit.ops.matmul import as_matrix
from minivit.ops.reduce import narrow, wide

PLACES = 1 << 9  # windows that are multiplied at a time: of fewer, BLAS is slower, and more do not fit the cache
SMALL_PLACES = 1 << 10, 1 << 11  # of windows with few numbers, of which more fit: at least, and at most
BLOCK = 1 << 17  # numbers of the images that are pooled at a time
FEW = 16  # numbers next to each other in a window: with fewer, windows are made pixel by pixel and not one by one


def _last(x: np.ndarray) -> np.ndarray:
    """Return a view (B, H, W, C) of images (B, C, H, W)."""
    return x.transpose(0, 2, 3, 1)


def _first(x: np.ndarray) -> np.ndarray:
    """Return a view (B, C, H, W) of images (B, H, W, C)."""
    return x.transpose(0, 3, 1, 2)


# ---- convolution: a product of the windows and the weight ------------------------------------------------------------


def _pieces(w: Windows, images: int, few: bool) -> Iterator[tuple[slice, slice]]:
    """Yield (images, rows of their grids) that are worked on at a time, the largest first."""
    down, (least, most) = w.grid[0], SMALL_PLACES
    places = min(max(least, 2 * w.places), most) if few else PLACES
    at_once, strips = max(1, places // w.places), min(down, -(-w.places // places))
    rows = -(-down // strips)
    for a in range(0, images, at_once):
        for r in range(0, down, rows):
            yield slice(a, min(a + at_once, images)), slice(r, min(r + rows, down))


def _is_few(channels: int, w: Windows) -> bool:
    return channels * w.kernel[1] < FEW


def _matrix(weight: np.ndarray, few: bool) -> np.ndarray:
    """Return a weight (O, C, kh, kw) as (O, C·kh·kw), its columns in the order of the numbers of a window."""
    return as_matrix(weight if few else weight.transpose(0, 2, 3, 1))


def _windows_of(x: np.ndarray, w: Windows, ones: bool = False) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Yield each piece of :func:`_pieces`, and its windows (places, numbers of one), with a 1 after each if asked for.

    A window's numbers are in the order (kh, kw, C), or, of few channels, (C, kh, kw); the array is used again.
    """
    channels = x.shape[1]
    few, depth = _is_few(channels, w), channels * w.taps
    pieces = list(_pieces(w, len(x), few))
    if not pieces:
        return
    (first, rows) = pieces[0]
    room, places = None, first.stop * rows.stop * w.grid[1]
    if w.padded_size != w.size or not (few or _last(x).flags.c_contiguous):
        (height, width), count = w.padded_size, first.stop
        shape = (count, channels, height, width) if few else (count, height, width, channels)
        room = np.empty_like(x, shape=shape, order="C")
        room[...] = 0.0
        room = room if few else _first(room)
    view = w.over(x if room is None else room)  # (B, C, kh, kw, down, across)
    view = view.transpose((1, 2, 3, 0, 4, 5) if few else (0, 4, 5, 2, 3, 1))
    copied = room is not None or ones or few or not w.moves_nothing
    if copied:
        made = np.empty_like(x, shape=(depth + ones, places) if few else (places, depth + ones), order="C")
        made = made.T if few else made
        made[:, depth:] = 1.0
    for images, rows in pieces:
        if room is not None and rows.start == 0:
            room[: images.stop - images.start][w.inside] = x[images]
        here = images if room is None else slice(images.stop - images.start)
        part = view[:, :, :, here, rows] if few else view[here, rows]
        if not copied:
            yield (images, rows), part.reshape(-1, depth)
            continue
        windows = made[: part.size // depth]
        into = windows[:, :depth]
        into = into.T.reshape(part.shape) if few else into.reshape(part.shape)
        into[...] = part
        yield (images, rows), windows


def _convolve(x: np.ndarray, matrix: np.ndarray, w: Windows, out: np.ndarray, ones: bool = False) -> None:
    """Write each window of x times a matrix (O, numbers of a window) into ``out`` (B, down, across, O)."""
    for piece, columns in _windows_of(x, w, ones):
        to = out[piece]
        if to.flags.c_contiguous:
            np.matmul(columns, matrix.T, out=to.reshape(-1, to.shape[3]))
        else:
            to[...] = (columns @ matrix.T).reshape(to.shape)


@conv2d.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, stride: Any, padding: Any) -> Any:
    w = convolved(x, weight, bias, stride, padding)
    like, x, weight = x, wide(x), wide(weight)
    matrix = _matrix(weight, _is_few(x.shape[1], w))
    if bias is not None:
        matrix = np.concatenate([matrix, wide(bias)[:, None]], axis=1)  # → (O, C·kh·kw + 1)
    out = np.empty_like(x, shape=(len(x), *w.grid, len(weight)), order="C")
    with np.errstate(invalid="ignore"):  # see ops/matmul.py
        _convolve(x, matrix, w, out, ones=bias is not None)
    return narrow(_first(out), like), (x, weight, w)


@conv2d.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[Any, ...]) -> Any:
    x, weight, w = kept
    like, g, biased = g, wide(g), bool(needs[2])
    few, depth, gw, gb = _is_few(x.shape[1], w), x.shape[1] * w.taps, None, None
    with np.errstate(invalid="ignore"):
        if needs[1] or biased:
            total: Any = np.zeros_like(weight, shape=(len(weight), depth + biased))
            for piece, columns in _windows_of(x, w, ones=biased):
                rows = _last(g)[piece].reshape(-1, len(weight))
                # the longer axis first, for a faster product
                total += (columns.T @ rows).T if few else rows.T @ columns
            gw = _like_weight(total[:, :depth], weight, few) if needs[1] else None
            gb = total[:, depth] if biased else None
        gx = _gradient_of_images(g, x, weight, w) if needs[0] else None
    return [None if a is None else narrow(a, like) for a in (gx, gw, gb)]


def _like_weight(matrix: np.ndarray, weight: np.ndarray, few: bool) -> np.ndarray:
    """Return what is as a weight's :func:`_matrix` in the shape of the weight."""
    if few:
        return matrix.reshape(weight.shape)
    out, channels, *kernel = weight.shape
    return np.ascontiguousarray(matrix.reshape(out, *kernel, channels).transpose(0, 3, 1, 2))


def _gradient_of_images(g: np.ndarray, x: np.ndarray, weight: np.ndarray, w: Windows) -> np.ndarray:
    """Return the gradient of a convolution in its images: g convolved with the weight's taps in reverse order.

    A stride of s parts the pixels of a side into s sets, each of which is under every s-th tap only.
    """
    gx = np.empty_like(x, shape=(len(x), *w.size, x.shape[1]), order="C")
    for down in _sets(w, 0):
        for across in _sets(w, 1):
            (to_rows, taps_rows, from_rows, above), (to_columns, taps_columns, from_columns, left) = down, across
            to = gx[:, to_rows, to_columns]
            taps = weight[:, :, taps_rows, taps_columns]
            if taps.size == 0 or to.size == 0:
                to[...] = 0.0
                continue
            kernel = taps.shape[2:]
            seen = g[:, :, from_rows, from_columns]
            inner = Windows(seen.shape[2:], kernel, (1, 1), (above, left), to.shape[1:3])
            flipped = taps[:, :, ::-1, ::-1].swapaxes(0, 1)  # → (C, O, …)
            _convolve(seen, _matrix(flipped, _is_few(len(weight), inner)), inner, to)
    return _first(gx)


def _sets(w: Windows, axis: int) -> Iterator[tuple[slice, slice, slice, tuple[int, int]]]:
    """Yield (pixels, the taps over them, the windows that these are in, the padding of these) of each set."""
    length, kernel, stride, before, places = (
        w.size[axis],
        w.kernel[axis],
        w.stride[axis],
        w.sides[axis][0],
        w.grid[axis],
    )
    for tap in range(stride):
        pixels = range((tap - before) % stride, length, stride)
        taps = len(range(tap, kernel, stride))
        last = (pixels.start + before) // stride  # window with the first pixel under its first tap of the set
        start, stop = last - taps + 1, last + len(pixels)
        inside = slice(max(start, 0), max(stop, 0))
        padding = max(min(stop, 0) - start, 0), max(stop - max(start, places), 0)
        yield slice(pixels.start, None, stride), slice(tap, None, stride), inside, padding


# ---- the largest pixel: of each row of a window first, then of these -------------------------------------------------


def _along(w: Windows, axis: int) -> list[tuple[Any, ...]]:
    """Return where the windows have their first, second, … row (axis 0) or column (axis 1), in (n, H, W, C)."""
    starts = [slice(i, i + w.stride[axis] * (w.grid[axis] - 1) + 1, w.stride[axis]) for i in range(w.kernel[axis])]
    return [(slice(None),) * (1 + axis) + (part,) for part in starts]


def _pooled_windows(x: np.ndarray, w: Windows) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield some images of x (B, C, H, W) at a time: which, and these, padded (n, H, W, C)."""
    at_once = max(1, BLOCK // max(1, math.prod(w.padded_size) * x.shape[1]))
    room: Any = None
    for a in range(0, len(x), at_once):
        part = slice(a, min(a + at_once, len(x)))
        if w.padded_size == w.size:
            yield part, _last(x)[part]
            continue
        if room is None:
            room = np.empty_like(x, shape=(part.stop, *w.padded_size, x.shape[1]), order="C")
            room[...] = -math.inf
        _first(room)[: part.stop - a][w.inside] = x[part]
        yield part, room[: part.stop - a]


def _largest_along(x: np.ndarray, where: list[tuple[Any, ...]], later: list[np.ndarray] | None) -> np.ndarray:
    """Return the elementwise maximum of the parts of x; add to ``later``, if given, masks of where each but the first
    is larger than those before it."""
    out = x[where[0]].copy()
    for part in where[1:]:
        if later is not None:
            later.append(mask(x[part] > out))
        np.maximum(out, x[part], out=out)
    return out


def _back_along(
    g: np.ndarray, size: tuple[int, int], later: list[np.ndarray], where: list[tuple[Any, ...]]
) -> np.ndarray:
    """Return the gradient of :func:`_largest_along` in x: it goes to the first part that has the largest number.

    g (n, …, C), x (n, *size, C).
    """
    gx = np.zeros_like(g, shape=(len(g), *size, g.shape[3]))
    for bits, part in zip(later[::-1], where[:0:-1], strict=True):
        goes, to = masked(g, bits), gx[part]
        to += goes
        g = unmasked(g, goes)
    to = gx[where[0]]
    to += g
    return gx


@max_pool2d.twin("cpu")
def _(x: np.ndarray, kernel_size: Any, stride: Any, padding: Any) -> Any:
    w = pooled("max_pool2d", x, kernel_size, stride, padding)
    like, x = x, wide(x)
    if not maskable(x):
        return NotImplemented
    out = np.empty_like(x, shape=(len(x), *w.grid, x.shape[1]), order="C")
    kept = []
    for part, images in _pooled_windows(x, w):
        later: Any = ([], []) if recording.enabled else (None, None)
        rows = _largest_along(images, _along(w, 1), later[0])  # (n, padded H, across, C)
        out[part] = _largest_along(rows, _along(w, 0), later[1])
        kept.append((part, *later))
    return narrow(_first(out), like), (kept, w)


@max_pool2d.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    blocks, w = kept
    like, g = g, wide(g)
    gx = np.empty_like(g, shape=(len(g), *w.size, g.shape[1]), order="C")
    (height, width), across = w.padded_size, w.grid[1]
    for part, along_rows, along_columns in blocks:
        given = np.ascontiguousarray(_last(g)[part])
        back = _back_along(given, (height, across), along_columns, _along(w, 0))
        back = _back_along(back, (height, width), along_rows, _along(w, 1))
        _first(gx)[part] = _first(back)[w.inside]
    return (narrow(_first(gx), like),)
