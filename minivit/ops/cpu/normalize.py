"""The twins of :mod:`minivit.ops.normalize`: softmax, layer_norm, rms_norm and group_norm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.backend import is_half
from minivit.ops.cpu.sums import column_sums, row_dots, row_sums, shares
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


@group_norm.twin("cpu")
def _(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray, eps: float) -> Any:
    check_group_norm(x, groups, weight, bias)
    numbers = math.prod(x.shape[1:]) // groups
    x_hat, std = _standardized(wide(x).reshape(len(x) * groups, numbers), eps)  # (B, C, …) → (B · groups, numbers)
    x_hat = x_hat.reshape(*x.shape[:2], math.prod(x.shape[2:]))  # → (B, C, …)
    out = x_hat * wide(weight)[:, None]
    out += wide(bias)[:, None]
    return narrow(out, x).reshape(x.shape), (x_hat, std, weight, groups)


@group_norm.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    x_hat, std, weight, groups = kept
    like, g = g, wide(g).reshape(x_hat.shape)
    product = g * x_hat
    along_x_hat, along_one = row_sums(product)[..., 0], row_sums(g)[..., 0]  # (B, C)
    g_weight = narrow(column_sums(along_x_hat), like) if needs[1] else None
    g_bias = narrow(column_sums(along_one), like) if needs[2] else None
    if not needs[0]:
        return None, g_weight, g_bias
    of_channels, each = wide(weight), len(weight) // groups
    gx = g * of_channels[:, None]
    along_x_hat, along_one = (  # means over a group, of all that reaches x_hat
        (sums * of_channels).reshape(len(std), each).sum(1, keepdims=True) / (each * x_hat.shape[2])
        for sums in (along_x_hat, along_one)
    )
    rows, gx = (a.reshape(len(std), each * x_hat.shape[2]) for a in (product, gx))  # → (B · groups, numbers)
    np.multiply(x_hat.reshape(rows.shape), along_x_hat, out=rows)
    rows += along_one
    gx -= rows
    gx /= std
    return narrow(gx, like).reshape(like.shape), g_weight, g_bias
