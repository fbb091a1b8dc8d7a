"""The twins of :mod:`minivit.ops.normalize`: softmax, layer_norm, rms_norm and group_norm."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import is_half
from minivit.ops.cpu.sums import column_sums, ones_vector, row_dots, row_sums, shares
from minivit.ops.normalize import check_group_norm, group_norm, layer_norm, rms_norm, softmax
from minivit.ops.reduce import narrow, wide


def softmax_rows(scores: np.ndarray) -> np.ndarray:
    """Make scores (…, n), float32 or float64, probabilities, in place."""
    if not (scores.max(initial=0.0) < 60.0 and scores.min(initial=0.0) > -60.0):  # else no e^x overflows or vanishes
        scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = row_sums(scores)
    np.reciprocal(total, out=total)
    scores *= total
    return scores


@softmax.twin("cpu")
def _(x: np.ndarray, axis: int) -> Any:
    if axis % x.ndim != x.ndim - 1:
        return (out := softmax.forward(x, axis)), (out, axis)
    out = narrow(softmax_rows(wide(x) if is_half(x.dtype) else x.copy()), x)
    return out, (out, -1)


@softmax.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    out, axis = kept
    gx = g - (row_dots(g, out) if axis == -1 else (g * out).sum(axis=axis, keepdims=True))
    gx *= out
    return (gx,)


@rms_norm.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, eps: float) -> Any:
    if weight.shape != x.shape[-1:]:
        return NotImplemented  # the plain one says what is wrong
    rows = wide(x).reshape(-1, x.shape[-1])  # (…, D) → (rows, D)
    root = (rows * rows) @ shares(rows.shape[1], rows.dtype)
    root += eps
    np.sqrt(root, out=root)
    x_hat = rows / root[:, None]
    return narrow(x_hat * wide(weight), x).reshape(x.shape), (x_hat, root[:, None], weight)


@rms_norm.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    x_hat, root, weight = kept
    like, g = g, wide(g).reshape(x_hat.shape)
    product = g * x_hat
    g_weight = narrow(column_sums(product), like) if needs[1] else None
    if not needs[0]:
        return None, g_weight
    along_x_hat = product @ (wide(weight) / g.shape[-1])  # the mean of a row's products with weight
    gx = g * wide(weight)
    np.multiply(x_hat, along_x_hat[:, None], out=product)
    gx -= product
    gx /= root
    return narrow(gx, like).reshape(like.shape), g_weight


FAR = 100.0  # standard deviations from 0 to a row's mean: further off, the mean's own rounding is seen in what is left


def _centred(rows: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows (rows, D) less their means, the means, and √(σ² + eps)."""
    share = shares(rows.shape[1], rows.dtype)
    mean = rows @ share
    offsets = rows - mean[:, None]
    std = (offsets * offsets) @ share
    std += eps
    np.sqrt(std, out=std)
    return offsets, mean, std


def _standardized(rows: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (rows, D) less their means, divided by √(σ² + eps), and these (rows, 1)."""
    x_hat, mean, std = _centred(rows, eps)
    mean /= std
    if not mean @ mean < FAR * FAR:  # squares add up to at least the largest
        x_hat, _, std = _centred(rows - rows[:, :1], eps)
    std = std[:, None]
    x_hat /= std
    return x_hat, std


@layer_norm.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> Any:
    rows = wide(x).reshape(-1, x.shape[-1])  # (…, D) → (rows, D)
    x_hat, std = _standardized(rows, eps)
    out = x_hat * weight
    out += bias
    return narrow(out, x).reshape(x.shape), (x_hat, std, weight)


@layer_norm.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    x_hat, std, weight = kept
    like, g = g, wide(g).reshape(x_hat.shape)
    product = g * x_hat
    g_weight = narrow(column_sums(product), like) if needs[1] else None
    g_bias = narrow(column_sums(g), like) if needs[2] else None
    if not needs[0]:
        return None, g_weight, g_bias
    mean_weight = wide(weight) / g.shape[-1]  # its product with a row is the mean of row·weight
    along_one = (g @ mean_weight)[:, None]
    along_x_hat = (product @ mean_weight)[:, None]
    gx = g * weight
    np.multiply(x_hat, along_x_hat, out=product)
    product += along_one
    gx -= product
    gx /= std
    return narrow(gx, like).reshape(like.shape), g_weight, g_bias


# ---- groups of channels, which lie next to each other in memory or apart: see ops/cpu/conv.py ------------------------

BLOCK = 1 << 17  # numbers that are worked on at a time


class _Channels(NamedTuple):
    """How images (B, C, …) lie in memory as rows: (B, C, all of a channel), or, with channels ``last``, (B, H, W · C).

    For a channel or a group each there are (B, C) or (B, groups) numbers.
    """

    number: int
    last: bool

    def rows(self, x: np.ndarray) -> np.ndarray:
        """Return images as rows: a view if they lie so."""
        if not self.last:
            return x.reshape(len(x), self.number, math.prod(x.shape[2:]))
        return x.transpose(0, 2, 3, 1).reshape(len(x), x.shape[2], x.shape[3] * self.number)

    def images(self, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return rows as images of a shape: a view."""
        if not self.last:
            return rows.reshape(shape)
        batch, channels, height, width = shape
        return rows.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)

    def sums(self, rows: np.ndarray) -> np.ndarray:
        """Return the sums of all channels."""
        if not self.last:
            return row_sums(rows)[..., 0]
        along = ones_vector(rows.shape[1], rows.dtype) @ rows  # (B, H, W · C) → (B, W · C)
        return along.reshape(len(rows), rows.shape[2] // self.number, self.number).sum(1)

    def means(self, rows: np.ndarray, groups: int) -> np.ndarray:
        """Return the means of all groups."""
        return self.grouped(self.sums(rows), groups) / (math.prod(rows.shape[1:]) // groups)

    def grouped(self, sums: np.ndarray, groups: int) -> np.ndarray:
        """Return the sums of all groups, from those of channels."""
        return sums.reshape(len(sums), groups, self.number // groups).sum(2)

    def each(self, numbers: np.ndarray) -> np.ndarray:
        """Return the numbers of groups for each channel."""
        return np.repeat(numbers, self.number // numbers.shape[1], axis=1)

    def spread(self, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the numbers of channels or groups as they go with rows: (B, C, 1), or (B, 1, W · C)."""
        each = self.each(numbers)
        return np.tile(each, rows.shape[2] // self.number)[:, None] if self.last else each[:, :, None]


def _moments(rows: np.ndarray, channels: _Channels, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means and variances of groups; the latter are right to all digits where means are no larger."""
    mean = channels.means(rows, groups)
    variance = channels.means(rows * rows, groups)
    variance -= mean * mean
    return mean, np.maximum(variance, 0.0)


def _parts(rows: np.ndarray) -> Iterator[slice]:
    """Yield some of the images at a time."""
    at_once = max(1, BLOCK // max(1, math.prod(rows.shape[1:])))
    return (slice(a, min(a + at_once, len(rows))) for a in range(0, len(rows), at_once))


@group_norm.twin("cpu")
def _(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> Any:
    check_group_norm(x, groups, weight, bias)
    like, x, weight, bias = x, wide(x), wide(weight), wide(bias)
    lies_last = x.ndim == 4 and not x.flags.c_contiguous and x.transpose(0, 2, 3, 1).flags.c_contiguous
    channels = _Channels(x.shape[1], lies_last)
    rows = channels.rows(x)
    out, kept = np.empty_like(rows), []
    for part in _parts(rows):
        here = rows[part]
        mean, variance = _moments(here, channels, groups)
        if not (mean * mean <= variance).all():
            here = here - channels.spread(mean, here)
            mean, variance = _moments(here, channels, groups)
        variance += eps
        std = np.sqrt(variance)
        scale = weight / channels.each(std)  # (B, C)
        to = np.multiply(here, channels.spread(scale, here), out=out[part])
        to += channels.spread(bias - channels.each(mean) * scale, here)
        kept.append((part, here, mean, std))
    return narrow(channels.images(out, x.shape), like), (kept, weight, channels)


@group_norm.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    parts, weight, channels = kept
    like, rows = g, channels.rows(wide(g))
    gx = np.empty_like(rows) if needs[0] else None
    g_weight, g_bias = np.zeros_like(weight), np.zeros_like(weight)
    for part, x, mean, std in parts:
        here, groups = rows[part], std.shape[1]
        product = here * x
        along_one = channels.sums(here)  # (B, C)
        along_x_hat = (channels.sums(product) - channels.each(mean) * along_one) / channels.each(std)
        g_weight += along_x_hat.sum(0)
        g_bias += along_one.sum(0)
        if gx is None:
            continue
        numbers = math.prod(x.shape[1:]) // groups
        # means over a group of all that reaches x̂ = (x - μ)/σ, (B, groups): gx = (g·weight - these - x̂·those)/σ
        along_one, along_x_hat = (channels.grouped(s * weight, groups) / numbers for s in (along_one, along_x_hat))
        slope = along_x_hat / std
        to = np.multiply(here, channels.spread(weight / channels.each(std), here), out=gx[part])
        np.multiply(x, channels.spread(slope / std, here), out=product)
        product += channels.spread((along_one - slope * mean) / std, here)
        to -= product
    gx = None if gx is None else narrow(channels.images(gx, like.shape), like)
    return gx, narrow(g_weight, like) if needs[1] else None, narrow(g_bias, like) if needs[2] else None
