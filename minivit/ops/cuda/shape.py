"""The twins of :mod:`minivit.ops.shape`'s patchify and embed_tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.needs import Slot
from minivit.backend import Array, array_module, tile
from minivit.ops.cuda import sums
from minivit.ops.cuda.rows import DTYPES, power, serves
from minivit.ops.shape import embed_tokens, patchify, unpatchify

WIDTH, HEIGHT = 64, 32  # numbers of a token, and images, at a time
LARGEST = 1 << 14  # numbers of a tile

_PATCHIFY = tile.Kernel("shape", "patchify")
_FORWARD = tile.Kernel("shape", "embed_forward")
_BACKWARD = tile.Kernel("shape", "embed_backward")


@patchify.twin("cuda")
def _(images: Array, patch: tuple[int, int], dtype: Any) -> Any:
    out_dtype = np.dtype(images.dtype if dtype is None else dtype)
    if images.ndim != 4 or not images.size or images.shape[2] % patch[0] or images.shape[3] % patch[1]:
        return NotImplemented  # the plain operation says why
    (b, c, h, w), (p, q) = images.shape, patch
    down, across = h // p, w // q
    numbers = power(p) * power(across) * power(q)
    if not serves(images) or out_dtype.name not in DTYPES or numbers > LARGEST:
        return NotImplemented
    xp = array_module(images)
    out = xp.empty((b, down * across, c * p * q), out_dtype)
    split = xp.ascontiguousarray(images).reshape(b, c, down, p, across, q)
    arguments = (split, out.reshape(b, down, across, c, p, q))
    constants = {"R": max(1, 2048 // numbers), "P": p, "Q": q, "across": across}
    if not _PATCHIFY.ready(*arguments, **constants):
        return NotImplemented
    _PATCHIFY((-(-b // constants["R"]), down, c), *arguments, **constants)
    return out, (patch, images.dtype, (h, w))


@patchify.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    patch, dtype, size = kept
    return (unpatchify.forward(g, patch, size).astype(dtype, copy=False),)


@embed_tokens.twin("cuda")
def _(patches: Array, cls: Array | None, positions: Array | None) -> Any:
    first = 0 if cls is None else 1
    b, n, d = patches.shape
    fit = (cls is None or cls.shape == (1, 1, d)) and (positions is None or positions.shape == (1, n + first, d))
    if (cls is None and positions is None) or not (fit and serves(patches)) or n + first >= 1 << 16:
        return NotImplemented
    xp = array_module(patches)
    out, rows = xp.empty((b, n + first, d), patches.dtype), xp.ascontiguousarray(patches)
    width, height = min(WIDTH, power(d)), HEIGHT  # of any batch: one kernel serves all
    constants = {"R": height, "W": width, "has_cls": cls is not None, "has_positions": positions is not None}
    nothing = rows[0]  # (N, D), in the place of what is not there
    flat = [nothing if x is None else xp.ascontiguousarray(x[0]) for x in (cls, positions)]  # (1, D), (T, D)
    if not _FORWARD.ready(rows, *flat, out, **constants):
        return NotImplemented
    _FORWARD((-(-b // height), n + first, -(-d // width)), rows, *flat, out, **constants)
    return out, (patches.shape, None if cls is None else cls.shape, None if positions is None else positions.shape)


def _written_to(need: Any, shape: tuple[int, ...], dtype: Any, xp: Any) -> tuple[Array, bool]:
    """Return where a gradient is written, and whether it is added there: in the slot, else in an array of its own."""
    if type(need) is Slot and need.array.flags.c_contiguous:
        return need.array.reshape(shape), need.filled
    return xp.empty(shape, dtype), False


def _handed(need: Any, array: Array, shape: Any) -> Any:
    """Return what the gradient returns for an input whose gradient is in ``array``."""
    if not need:
        return None
    if type(need) is not Slot:
        return array.reshape(shape)
    if not need.array.flags.c_contiguous:
        need.add(array.reshape(shape))
    return need.done()


@embed_tokens.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    patches_shape, cls_shape, positions_shape = kept
    xp, (_, t, d) = array_module(g), g.shape
    copies = cls_shape is not None and bool(needs[0])
    given = xp.ascontiguousarray(g)
    of_patches = xp.empty(patches_shape, g.dtype) if copies else g
    of_cls, add_cls = _written_to(needs[1], (1, d), g.dtype, xp)
    of_positions, add_positions = _written_to(needs[2], (t, d), g.dtype, xp)
    width, height = min(WIDTH, power(d)), HEIGHT
    constants = {
        "R": height, "W": width, "has_cls": cls_shape is not None, "copies": copies, "adds": (add_cls, add_positions)
    }  # fmt: skip
    arguments = (given, of_patches if copies else given, of_cls, of_positions)
    if not _BACKWARD.ready(*arguments, sums.like(d), **constants):
        first = 0 if cls_shape is None else 1
        return g[:, first:], g[:, :1] if first else None, g if positions_shape else None  # the engine sums them
    partials = sums.partial(of_patches, d)
    _BACKWARD((-(-d // width), sums.ROWS), *arguments, partials, **constants)
    return (
        of_patches if needs[0] else None,
        _handed(needs[1], of_cls, cls_shape),
        _handed(needs[2], of_positions, positions_shape),
    )
