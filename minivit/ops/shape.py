"""Operations that move elements and compute nothing. Their results are views where NumPy's are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module, device_of, is_bfloat16, to_device
from minivit.errors import ShapeError


@op()
def reshape(x: Array, shape: Any) -> Array:
    """Return x with another shape; one length may be -1."""
    return x.reshape(shape)


reshape.vjps(lambda g, out, x, shape: g.reshape(x.shape))


@op()
def transpose(x: Array, axes: Sequence[int] | None = None) -> Array:
    """Return x with its axes in another order, by default reversed."""
    return x.transpose(axes)


@transpose.vjp
def _(g: Any, out: Any, x: Any, axes: Any, needs: tuple[bool, ...]) -> Any:
    if axes is None:
        return transpose(g)
    back = [0] * len(axes)
    for i, a in enumerate(axes):
        back[a] = i
    return transpose(g, tuple(back))


@op()
def swapaxes(x: Array, axis1: int, axis2: int) -> Array:
    """Return x with two axes exchanged."""
    return x.swapaxes(axis1, axis2)


swapaxes.vjps(lambda g, out, x, axis1, axis2: swapaxes(g, axis1, axis2))


@op()
def broadcast_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Return a read-only view of x, repeated along axes of length 1 and new leading axes."""
    return array_module(x).broadcast_to(x, shape)


broadcast_to.vjps(lambda g, out, x, shape: g)  # the engine sums over what was broadcast


def concat(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Join arrays along an axis that they have."""
    return _concat(axis, *arrays)


@op()
def _concat(axis: int, *arrays: Array) -> Array:
    return array_module(*arrays).concatenate(arrays, axis=axis)


@_concat.vjp
def _(g: Any, out: Any, axis: int, *arrays: Any, needs: tuple[bool, ...]) -> Any:
    return split(g, [x.shape[axis] for x in arrays], axis)


def stack(arrays: Sequence[Any], axis: int = 0) -> Any:
    """Join arrays of one shape along a new axis."""
    return _stack(axis, *arrays)


@op()
def _stack(axis: int, *arrays: Array) -> Array:
    return array_module(*arrays).stack(arrays, axis=axis)


@_stack.vjp
def _(g: Any, out: Any, axis: int, *arrays: Any, needs: tuple[bool, ...]) -> Any:
    return [getitem(g, _along(axis % g.ndim, i)) if needed else None for i, needed in enumerate(needs)]


def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Any]:
    """Cut x along an axis: into that many equal parts, or into parts of the given lengths."""
    n = x.shape[axis]
    if isinstance(sections, int):
        if sections < 1 or n % sections:
            raise ShapeError(f"split: axis {axis} of length {n} has no {sections} equal parts", "give the lengths")
        sections = [n // sections] * sections
    if sum(sections) != n:
        raise ShapeError(f"split: lengths {list(sections)} add up to {sum(sections)}, the axis has {n}", "mend them")
    edges = itertools.pairwise([0, *np.cumsum(sections).tolist()])
    return [getitem(x, _along(axis % len(x.shape), slice(a, b))) for a, b in edges]


def _along(axis: int, index: Any) -> tuple[Any, ...]:
    return (*[slice(None)] * axis, index)


@op()
def pad(x: Array, widths: Sequence[tuple[int, int]], value: float = 0.0) -> Array:
    """Return x with ``value`` around it; ``widths`` has (before, after) for each axis."""
    return array_module(x).pad(x, widths, constant_values=value)


@pad.vjp
def _(g: Any, out: Any, x: Any, widths: Any, value: float, needs: tuple[bool, ...]) -> Any:
    return getitem(g, tuple([slice(before, before + n) for (before, _), n in zip(widths, x.shape, strict=True)]))


# ---- indexing: each of the two is the other's gradient ---------------------------------------------------------------


@op()
def getitem(x: Array, index: Any) -> Array:
    """Return x[index]: slices, integers, None, Ellipsis, integer arrays and boolean masks, as in NumPy."""
    return x[_raw_index(index)]


@op()
def scatter(x: Array, index: Any, shape: tuple[int, ...]) -> Array:
    """Return zeros of ``shape`` with x added at [index]; places named twice get the sum."""
    xp = array_module(x)
    index = _raw_index(index)
    if _names_all(index, shape, x.shape):  # as [:, 0] of one token
        return x.reshape(shape)
    out = xp.zeros(shape, x.dtype)
    if _may_repeat(index):
        if is_bfloat16(x.dtype):  # in which a sum soon stops
            return scatter(x.astype(np.float32), index, shape).astype(x.dtype)
        xp.add.at(out, index, x)
    else:
        out[index] = x
    return out


getitem.vjps(lambda g, out, x, index: scatter(g, index, x.shape))
scatter.vjps(lambda g, out, x, index, shape: getitem(g, index))


@op()
def take_along_axis(x: Array, indices: Any, axis: int = -1) -> Array:
    """Return x at ``indices`` along an axis; the other axes of ``indices`` (int) match those of x."""
    return array_module(x).take_along_axis(x, to_device(raw(indices), device_of(x)), axis)


@take_along_axis.vjp
def _(g: Any, out: Any, x: Any, indices: Any, axis: int, needs: tuple[bool, ...]) -> Any:
    indices = to_device(raw(indices), device_of(raw(g)))
    xp = array_module(indices)
    shape = indices.shape
    index = [xp.arange(n).reshape([-1 if j == i else 1 for j in range(len(shape))]) for i, n in enumerate(shape)]
    index[axis] = indices
    return scatter(g, tuple(index), x.shape)


def _raw_index(index: Any) -> Any:
    return tuple([raw(i) for i in index]) if isinstance(index, tuple) else raw(index)


def _may_repeat(index: Any) -> bool:
    """Tell whether an index may name a place twice: all may but slices, numbers, None, Ellipsis and boolean masks."""
    parts = index if isinstance(index, tuple) else (index,)
    return not all(isinstance(i, _BASIC) or (hasattr(i, "dtype") and i.dtype.kind == "b") for i in parts)


def _names_all(index: Any, shape: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Tell whether an index that gives ``found`` of an array of ``shape`` names every place of it, in their order."""
    parts = index if isinstance(index, tuple) else (index,)
    in_order = all(i.step is None or i.step > 0 if isinstance(i, slice) else isinstance(i, _BASIC) for i in parts)
    return in_order and math.prod(found) == math.prod(shape) and np.broadcast_to(False, shape)[index].shape == found


_BASIC = (slice, int, np.integer, type(None), type(Ellipsis))
"""What an index may be made of that takes a view."""


# ---- patches ---------------------------------------------------------------------------------------------------------


@op()
def patchify(images: Array, patch: tuple[int, int], dtype: Any = None) -> Array:
    """Cut images (B, C, H, W) into patches (B, N, C·P·Q) of P by Q pixels, row by row (ViT section 3.1, eq. 1).

    Within a patch the order is (C, P, Q), that of a convolution's weight, so that timm's weights fit as they are.
    ``dtype`` is that of the patches, the images' own unless given. Twins: ops/cuda/shape.py.
    """
    b, c, h, w = images.shape
    p, q = patch
    if h % p or w % q:
        raise ShapeError(f"patchify: an image of {h}x{w} has no whole patches of {p}x{q}", "crop or resize the image")
    grid = images.reshape(b, c, h // p, p, w // q, q)
    patches = grid.transpose(0, 2, 4, 1, 3, 5).reshape(b, (h // p) * (w // q), c * p * q)
    return patches if dtype is None else patches.astype(dtype, copy=False)


patchify.changes_dtype = True


@op()
def unpatchify(patches: Array, patch: tuple[int, int], size: tuple[int, int]) -> Array:
    """Put patches (B, N, C·P·Q) back together into images (B, C, H, W) of ``size`` (H, W)."""
    p, q = patch
    h, w = size
    b, n, length = patches.shape
    if h % p or w % q or n != (h // p) * (w // q) or length % (p * q):
        raise ShapeError(f"unpatchify: {n} patches of length {length} do not make images of {h}x{w} with patch {p}x{q}",
                         "give the size and patch that patchify had")  # fmt: skip
    grid = patches.reshape(b, h // p, w // q, length // (p * q), p, q)
    return grid.transpose(0, 3, 1, 4, 2, 5).reshape(b, length // (p * q), h, w)


patchify.vjps(
    lambda g, out, images, patch, dtype: unpatchify(
        g if dtype is None else g.astype(images.dtype), patch, images.shape[2:]
    )
)
unpatchify.vjps(lambda g, out, patches, patch, size: patchify(g, patch))


# ---- tokens ----------------------------------------------------------------------------------------------------------


@op()
def embed_tokens(patches: Array, cls: Array | None = None, positions: Array | None = None) -> Array:
    """Return the tokens that enter an encoder (ViT eq. 1): the class token, then the patches, plus the positions.

    patches (B, N, D), cls (1, 1, D), positions (1, T, D) → (B, T, D), T = N + 1, or N without a class token. With more
    tokens than that of the class, cls (1, P, D), T = N + P. Twins: ops/cuda/shape.py.
    """
    xp, tokens = array_module(patches), patches
    if cls is not None:
        first = xp.broadcast_to(cls, (len(patches), *cls.shape[1:]))
        tokens = xp.concatenate([first, patches], axis=1)  # (B, N, D) → (B, P + N, D)
    return tokens if positions is None else tokens + positions


@embed_tokens.vjp
def _(g: Any, out: Any, patches: Any, cls: Any, positions: Any, needs: tuple[bool, ...]) -> Any:
    first = 0 if cls is None else cls.shape[1]
    return (
        getitem(g, (slice(None), slice(first, None))) if first else g,
        getitem(g, (slice(None), slice(0, first))) if needs[1] else None,  # the engine sums over the batch
        g if needs[2] else None,
    )


@embed_tokens.composed
def _(patches: Any, cls: Any = None, positions: Any = None) -> Any:
    if cls is not None:
        patches = concat([broadcast_to(cls, (patches.shape[0], *cls.shape[1:])), patches], axis=1)
    return patches if positions is None else patches + positions
