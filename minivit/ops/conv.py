"""Convolution and pooling of images (B, C, H, W): what slides a window over them, named and meant as in PyTorch.

Everywhere ``kernel_size`` and ``stride`` are a number for both axes or (height, width). ``padding`` is a number for all
sides, (height, width), or ((top, bottom), (left, right)), which may differ: :func:`same_padding` makes some.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from numbers import Integral
from typing import Any, NamedTuple

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module, is_floating
from minivit.errors import ConfigError, DTypeError, ShapeError, value_text
from minivit.ops.matmul import as_matrix, matmul
from minivit.ops.reduce import max, mean, narrow, sum, wide
from minivit.ops.shape import broadcast_to, getitem, pad, reshape, stack, swapaxes

Sides = tuple[tuple[int, int], tuple[int, int]]
"""((top, bottom), (left, right))."""


class Windows(NamedTuple):
    """A window at every place of a grid over an image."""

    size: tuple[int, int]  # of the image
    kernel: tuple[int, int]
    stride: tuple[int, int]
    sides: Sides  # what is put around the image first
    grid: tuple[int, int]  # how many windows there are, down and across

    @property
    def places(self) -> int:
        """The number of windows."""
        return self.grid[0] * self.grid[1]

    @property
    def taps(self) -> int:
        """The number of pixels in a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def moves_nothing(self) -> bool:
        """Whether the windows are the image's own pixels, one after the other."""
        return self.kernel == self.stride == (1, 1) and self.grid == self.size

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the image with what is around it."""
        (h, w), (rows, columns) = self.size, self.sides
        return h + rows[0] + rows[1], w + columns[0] + columns[1]

    @property
    def inside(self) -> tuple[Any, ...]:
        """Where the image (…, H, W) is in the padded one, as an index."""
        (h, w), ((top, _), (left, _)) = self.size, self.sides
        return ..., slice(top, top + h), slice(left, left + w)

    def padded(self, x: Array, value: float = 0.0) -> Array:
        """Return x (B, C, H, W) with ``value`` around it; x itself if nothing is."""
        if self.padded_size == self.size:
            return x
        out = array_module(x).empty_like(x, shape=(*x.shape[:2], *self.padded_size), order="C")
        out[...] = value
        out[self.inside] = x
        return out

    def over(self, padded: Array) -> Array:
        """Return a view of all windows of a padded image (B, C, …): (B, C, kh, kw, down, across)."""
        sliding = array_module(padded).lib.stride_tricks.sliding_window_view
        view = sliding(padded, self.kernel, axis=(2, 3))[:, :, :: self.stride[0], :: self.stride[1]]
        return view.transpose(0, 1, 4, 5, 2, 3)

    def each_tap(self) -> Iterator[tuple[tuple[int, int], tuple[Any, ...]]]:
        """Yield ((i, j), where in the padded image the windows have their pixel (i, j), as an index)."""
        for i in range(self.kernel[0]):
            for j in range(self.kernel[1]):
                starts = zip((i, j), self.stride, self.grid, strict=True)
                yield (i, j), (..., *[slice(at, at + step * (n - 1) + 1, step) for at, step, n in starts])


def windows(name: str, shape: Any, kernel_size: Any, stride: Any, padding: Any) -> Windows:
    """Return the windows over images of ``shape``; raise ShapeError or ConfigError, for the operation ``name``."""
    if len(shape) != 4:
        raise ShapeError(f"{name}: images of shape {tuple(shape)}", "give them as (batch, channels, height, width)")
    kernel, steps, sides = _pair(kernel_size), _pair(stride), sides_of(padding)
    if kernel is None or steps is None or sides is None or min(*kernel, *steps) < 1 or min(*sides[0], *sides[1]) < 0:
        raise ConfigError(
            f"{name}: kernel_size={value_text(kernel_size)}, stride={value_text(stride)}, "
            f"padding={value_text(padding)}",
            "whole numbers, from 1 on, of padding from 0 on, or pairs of them for height and width",
        )
    around = [a + n + b for n, (a, b) in zip(shape[2:], sides, strict=True)]
    if any(n < k for n, k in zip(around, kernel, strict=True)):
        raise ShapeError(
            f"{name}: a window of {kernel[0]}x{kernel[1]} does not fit into an image of {shape[2]}x{shape[3]} "
            f"padded to {around[0]}x{around[1]}",
            "use a smaller kernel, more padding, or larger images",
        )
    grid = [(n - k) // step + 1 for n, k, step in zip(around, kernel, steps, strict=True)]
    return Windows(tuple(shape[2:]), kernel, steps, sides, (grid[0], grid[1]))


def _pair(value: Any) -> tuple[int, int] | None:
    """Return (height, width) of a number or a pair, None if it is neither."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    whole = len(numbers) == 2 and all(isinstance(n, Integral) and not isinstance(n, bool) for n in numbers)
    return (int(numbers[0]), int(numbers[1])) if whole else None


def sides_of(padding: Any) -> Sides | None:
    """Return ((top, bottom), (left, right)) of a padding, None if it is none."""
    down, across = padding if isinstance(padding, (tuple, list)) and len(padding) == 2 else (padding, padding)
    rows, columns = _pair(down), _pair(across)
    return None if rows is None or columns is None else (rows, columns)


def same_padding(size: Any, kernel_size: Any, stride: Any) -> Sides:
    """Return the padding with which an image of ``size`` (height, width) gives ⌈size / stride⌉ windows a side.

    TensorFlow's "SAME": what does not go up in two equal halves has the larger one at the bottom and on the right.
    """
    sides = []
    for n, k, step in zip(size, _pair(kernel_size) or (), _pair(stride) or (), strict=True):
        missing = (-(-n // step) - 1) * step + k - n
        missing = missing if missing > 0 else 0
        sides.append((missing // 2, missing - missing // 2))
    return sides[0], sides[1]


# ---- windows as columns: each of the two is the other's adjoint, and so its gradient ---------------------------------


@op()
def unfold(x: Array, kernel_size: Any, stride: Any = 1, padding: Any = 0) -> Array:
    """Return the windows of images (B, C, H, W) as columns (B, C·kh·kw, L), L windows row by row; zeros around them."""
    w = windows("unfold", x.shape, kernel_size, stride, padding)
    # (B, C, kh, kw, down, across) → (B, C·kh·kw, L)
    return w.over(w.padded(x)).reshape(x.shape[0], x.shape[1] * w.taps, w.places)


@op()
def fold(columns: Array, output_size: Any, kernel_size: Any, stride: Any = 1, padding: Any = 0) -> Array:
    """Return images (B, C, H, W) of ``output_size`` (H, W) from the columns (B, C·kh·kw, L) of their windows.

    Where windows overlap they are added: ``unfold``'s adjoint, and its inverse only if none overlap and none is left
    out.
    """
    size = _pair(output_size)
    if len(columns.shape) != 3 or size is None:
        raise ShapeError(
            f"fold: columns of shape {columns.shape} for images of {value_text(output_size)}",
            "give them as (batch, channels · kernel, windows), and output_size as (height, width)",
        )
    w = windows("fold", (len(columns), 1, *size), kernel_size, stride, padding)
    channels, rest = divmod(columns.shape[1], w.taps)
    if rest or columns.shape[2] != w.places:
        raise ShapeError(
            f"fold: columns of shape {columns.shape} do not make images of {size[0]}x{size[1]}",
            f"with this kernel, stride and padding they are (batch, a multiple of {w.taps}, {w.places})",
        )
    parts = wide(columns).reshape(len(columns), channels, *w.kernel, *w.grid)  # → (B, C, kh, kw, down, across)
    out = array_module(parts).empty_like(parts, shape=(len(columns), channels, *w.padded_size), order="C")
    out[...] = 0.0
    for (i, j), where in w.each_tap():
        out[where] += parts[:, :, i, j]
    return narrow(out[w.inside], columns)


unfold.vjps(lambda g, out, x, kernel_size, stride, padding: fold(g, x.shape[2:], kernel_size, stride, padding))
fold.vjps(lambda g, out, columns, output_size, kernel_size, stride, padding: unfold(g, kernel_size, stride, padding))


# ---- convolution -----------------------------------------------------------------------------------------------------


@op(save=("x", "weight"))
def conv2d(x: Array, weight: Array, bias: Array | None = None, stride: Any = 1, padding: Any = 0) -> Array:
    """Return the convolution of images (B, C, H, W) with a weight (out, C, kh, kw), plus a bias (out,).

    Each window times the weight, which is not flipped: → (B, out, down, across). Twins: ops/cpu/conv.py.
    """
    w = convolved(x, weight, bias, stride, padding)
    out = matmul(as_matrix(weight), unfold.forward(x, w.kernel, stride, padding))  # → (B, out, L)
    if bias is not None:
        out += bias[:, None]
    return out.reshape(len(x), len(weight), *w.grid)


def convolved(x: Array, weight: Array, bias: Array | None, stride: Any, padding: Any) -> Windows:
    """Return the windows of a convolution; raise unless its arrays fit each other."""
    if len(weight.shape) != 4 or len(x.shape) != 4 or weight.shape[1] != x.shape[1]:
        raise ShapeError(
            f"conv2d: images of shape {x.shape} do not fit a weight of {weight.shape} (out, in, kernel's two)",
            f"give images of (batch, {weight.shape[1] if len(weight.shape) > 1 else 'in'}, height, width)",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ShapeError(f"conv2d: a bias of {bias.shape} for {len(weight)} channels", "give one number for each")
    return windows("conv2d", x.shape, weight.shape[2:], stride, padding)


@conv2d.vjp
def _(g: Any, out: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, needs: tuple[bool, ...]) -> Any:
    kernel, rows = weight.shape[2:], reshape(g, (*g.shape[:2], g.shape[2] * g.shape[3]))  # → (B, out, L)
    gx = gw = None
    if needs[0]:
        columns = matmul(swapaxes(reshape(weight, (weight.shape[0], -1)), 0, 1), rows)  # → (B, C·kh·kw, L)
        gx = fold(columns, x.shape[2:], kernel, stride, padding)
    if needs[1]:
        columns = unfold(x, kernel, stride, padding)
        gw = reshape(sum(matmul(rows, swapaxes(columns, 1, 2)), 0), weight.shape)  # → (out, C·kh·kw)
    return gx, gw, sum(rows, (0, 2)) if needs[2] else None


def _taps(x: Any, w: Windows, value: float) -> Iterator[tuple[int, int, Any]]:
    """Yield (i, j, the pixel (i, j) of each window: (B, C, down, across)), with public operations."""
    around = pad(x, ((0, 0), (0, 0), *w.sides), value)
    for (i, j), where in w.each_tap():
        yield i, j, getitem(around, where)


@conv2d.composed
def _(x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0) -> Any:
    w = windows("conv2d", x.shape, weight.shape[2:], stride, padding)
    out: Any = 0.0 if bias is None else reshape(bias, (1, -1, 1))
    for i, j, pixels in _taps(x, w, 0.0):
        out = out + matmul(weight[:, :, i, j], reshape(pixels, (*pixels.shape[:2], -1)))
    return reshape(out, (x.shape[0], weight.shape[0], *w.grid))


# ---- pooling ---------------------------------------------------------------------------------------------------------


def pooled(name: str, x: Array, kernel_size: Any, stride: Any, padding: Any) -> Windows:
    """Return a pooling's windows, side by side unless ``stride`` is given; raise if one may lie outside the image."""
    w = windows(name, x.shape, kernel_size, kernel_size if stride is None else stride, padding)
    if any(side >= k for k, sides in zip(w.kernel, w.sides, strict=True) for side in sides):
        remedy = "pad by less than the kernel"
        raise ConfigError(f"{name}: windows of {w.kernel[0]}x{w.kernel[1]} lie in a padding of {w.sides}", remedy)
    return w


@op(save=("x",))
def max_pool2d(x: Array, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Array:
    """Return the largest pixel of each window, (B, C, H, W) → (B, C, down, across); what is around counts as -∞.

    ``stride`` is ``kernel_size`` unless given. Of equal ones the first, row by row, gets the gradient.
    Twins: ops/cpu/conv.py.
    """
    w = pooled("max_pool2d", x, kernel_size, stride, padding)
    if not is_floating(x.dtype):
        raise DTypeError(f"max_pool2d: images of {x.dtype}, which has no -∞", "convert them: images.astype(np.float32)")
    if x.dtype.kind != "c":
        return w.over(w.padded(x, -inf)).max(axis=(2, 3))  # (B, C, kh, kw, down, across) → (B, C, down, across)
    parts, chosen = _largest(x, w)
    return array_module(x).where(chosen, parts, 0.0).sum(axis=2).reshape(*x.shape[:2], *w.grid)


def _largest(x: Array, w: Windows) -> tuple[Array, Array]:
    """Return the windows (B, C, kh·kw, L), and a mask of the first pixel of each with the largest real part."""
    parts = w.over(w.padded(x, -inf)).reshape(*x.shape[:2], w.taps, w.places)
    first = wide(parts.real).argmax(axis=2)[:, :, None]  # → (B, C, 1, L)
    return parts, first == array_module(x).arange(w.taps)[:, None]


@max_pool2d.vjp
def _(g: Any, out: Any, x: Any, kernel_size: Any, stride: Any, padding: Any, needs: tuple[bool, ...]) -> Any:
    w = pooled("max_pool2d", x, kernel_size, stride, padding)
    _, chosen = _largest(raw(x), w)
    columns = reshape(g, (*g.shape[:2], 1, w.places)) * chosen.astype(g.dtype)
    return fold(reshape(columns, (x.shape[0], x.shape[1] * w.taps, w.places)), w.size, w.kernel, w.stride, w.sides)


@max_pool2d.composed
def _(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
    w = pooled("max_pool2d", x, kernel_size, stride, padding)
    return max(stack([pixels for _, _, pixels in _taps(x, w, -inf)]), 0)


@op()
def avg_pool2d(x: Array, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Array:
    """Return the mean of each window, (B, C, H, W) → (B, C, down, across); what is around counts as zeros, as pixels.

    ``stride`` is ``kernel_size`` unless given. The mean over whole images is ``mean(x, (2, 3))``.
    """
    w = pooled("avg_pool2d", x, kernel_size, stride, padding)
    return narrow(w.over(w.padded(wide(x))).sum(axis=(2, 3)) / w.taps, x)


@avg_pool2d.vjp
def _(g: Any, out: Any, x: Any, kernel_size: Any, stride: Any, padding: Any, needs: tuple[bool, ...]) -> Any:
    w = pooled("avg_pool2d", x, kernel_size, stride, padding)
    shares = broadcast_to(reshape(g / w.taps, (*x.shape[:2], 1, w.places)), (*x.shape[:2], w.taps, w.places))
    return fold(reshape(shares, (x.shape[0], x.shape[1] * w.taps, w.places)), w.size, w.kernel, w.stride, w.sides)


@avg_pool2d.composed
def _(x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0) -> Any:
    w = pooled("avg_pool2d", x, kernel_size, stride, padding)
    return mean(stack([pixels for _, _, pixels in _taps(x, w, 0.0)]), 0)
