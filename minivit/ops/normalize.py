"""Softmax, and normalisation: of layers, by the root mean square, of groups."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from minivit.autograd.op import op
from minivit.backend import Array, array_module
from minivit.errors import ConfigError, ShapeError, value_text
from minivit.ops.elementwise import exp, sqrt
from minivit.ops.reduce import centred, logsumexp, mean, narrow, sum, var, wide


@op(save=("out",))
def softmax(x: Array, axis: int = -1) -> Array:
    """Return e^x / Σ e^x along ``axis``, shifted by each row's own largest x so that nothing overflows.

    Twins: ops/cpu/normalize.py.
    """
    out = array_module(x).exp(wide(x) - x.real.max(axis=axis, keepdims=True))
    out /= out.sum(axis=axis, keepdims=True)
    return narrow(out, x)


softmax.vjps(lambda g, out, x, axis: out * (g - sum(g * out, axis, True)))
softmax.composed(lambda x, axis=-1: exp(x) / sum(exp(x), axis, True))


@op(save=("out",))
def log_softmax(x: Array, axis: int = -1) -> Array:
    """Return x - log Σ e^x along ``axis``."""
    xp = array_module(x)
    out = wide(x) - x.real.max(axis=axis, keepdims=True)
    out -= xp.log(xp.exp(out).sum(axis=axis, keepdims=True))
    return narrow(out, x)


log_softmax.vjps(lambda g, out, x, axis: g - exp(out) * sum(g, axis, True))
log_softmax.composed(lambda x, axis=-1: x - logsumexp(x, axis, True))


@op(save=("x", "weight"))
def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Return (x - μ)/√(σ² + eps) · weight + bias over the last axis (Ba, Kiros, Hinton 2016, arXiv 1607.06450, eq. 4).

    x (…, D), weight and bias (D,). The variance is taken of the centred x, in two passes: exact where E[x²] - E[x]²
    would cancel. A row of equal numbers gives the bias. Twins: ops/cpu/normalize.py,
    ops/cuda/normalize.py.
    """
    x_hat, _ = _normalized(x, eps)
    return narrow(x_hat * weight + bias, x)


def _normalized(x: Any, eps: float) -> tuple[Any, Any]:
    """Return (x - μ)/σ and 1/σ, where σ² includes eps, float16 as float32; on arrays or on Tensors."""
    offsets = centred(wide(x), -1)
    rstd = 1.0 / sqrt(mean(offsets * offsets, -1, True) + eps)
    return offsets * rstd, rstd


@layer_norm.vjp
def _(g: Any, out: Any, x: Any, weight: Any, bias: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    x_hat, rstd = _normalized(x, eps)
    gx = None
    if needs[0]:
        gw = wide(g) * wide(weight)  # what reaches x_hat; its parts along 1 and along x_hat cannot change it
        gx = narrow(rstd * (gw - mean(gw, -1, True) - x_hat * mean(gw * x_hat, -1, True)), x)
    # the engine sums those of weight and bias over the rows
    return gx, narrow(wide(g) * x_hat, x) if needs[1] else None, g


@layer_norm.composed
def _(x: Any, weight: Any, bias: Any, eps: float = 1e-6) -> Any:
    from_first = x - x[..., :1]  # keeps the digits of numbers far from 0
    return (from_first - mean(from_first, -1, True)) * (var(x, -1, True) + eps) ** -0.5 * weight + bias


@op(save=("x", "weight"))
def rms_norm(x: Array, weight: Array, eps: float = 1e-6) -> Array:
    """Return x / √(mean x² + eps) · weight over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    x (…, D), weight (D,). Twins: ops/cpu/normalize.py, ops/cuda/normalize.py.
    """
    x_hat, _ = _by_root(x, eps)
    return narrow(x_hat * wide(weight), x)


def _by_root(x: Any, eps: float) -> tuple[Any, Any]:
    """Return x/r and r, the root of the mean square and eps, float16 as float32; on arrays or on Tensors."""
    full = wide(x)  # the square of a float16 number overflows soon
    root = sqrt(mean(full * full, -1, True) + eps)
    return full / root, root


@rms_norm.vjp
def _(g: Any, out: Any, x: Any, weight: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    x_hat, root = _by_root(x, eps)
    gx = None
    if needs[0]:
        gw = wide(g) * wide(weight)  # what reaches x_hat; its part along x_hat cannot change it
        gx = narrow((gw - x_hat * mean(gw * x_hat, -1, True)) / root, x)
    return gx, narrow(wide(g) * x_hat, x) if needs[1] else None  # the engine sums that of weight over the rows


rms_norm.composed(lambda x, weight, eps=1e-6: x * (mean(x * x, -1, True) + eps) ** -0.5 * weight)


@op(save=("x", "weight"))
def group_norm(x: Array, groups: int, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
    """Return (x - μ)/√(σ² + eps) · weight + bias, μ and σ² over a group of channels (Wu and He 2018, section 3).

    x (B, C, …), C/groups channels next to each other a group, weight and bias (C,), for a channel each. As with
    ``layer_norm``, the variance is taken in two passes. Source: arXiv 1803.08494. Twins: ops/cpu/normalize.py.
    """
    check_group_norm(x, groups, weight, bias)
    x_hat, _ = _normalized(_in_groups(x, groups), eps)
    return narrow(x_hat.reshape(x.shape) * _of_channels(weight, x) + _of_channels(bias, x), x)


def check_group_norm(x: Array, groups: int, weight: Array, bias: Array) -> None:
    """Raise unless the channels of x (B, C, …) make so many groups, and weight and bias are (C,)."""
    channels = x.shape[1] if x.ndim > 1 else 0
    if isinstance(groups, bool) or not isinstance(groups, Integral) or groups < 1:
        raise ConfigError(f"group_norm: groups={value_text(groups)}", "it must be a whole number, at least 1")
    if channels == 0 or channels % groups:
        raise ShapeError(
            f"group_norm: {channels} channels of {x.shape} (batch, channels, …) do not make {groups} groups",
            "use a number of groups that divides the channels",
        )
    if weight.shape != (channels,) or bias.shape != (channels,):
        what = f"group_norm: {channels} channels, but a weight of {weight.shape} and a bias of {bias.shape}"
        raise ShapeError(what, f"give both as ({channels},)")


def _in_groups(x: Any, groups: int) -> Any:
    """Return x (B, C, …) as (B, groups, C/groups · …)."""
    return x.reshape((x.shape[0], groups, math.prod(x.shape[1:]) // groups))


def _of_channels(weight: Any, x: Any) -> Any:
    """Return a number for each channel of x (B, C, …) in a shape that broadcasts to it: (C, 1, …)."""
    return weight.reshape((-1, *[1] * (len(x.shape) - 2)))


@group_norm.vjp
def _(g: Any, out: Any, x: Any, groups: int, weight: Any, bias: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    x_hat, rstd = _normalized(_in_groups(x, groups), eps)
    gx = gw = None
    if needs[0]:
        part = (wide(g) * _of_channels(wide(weight), x)).reshape(x_hat.shape)  # as in layer_norm
        along_x_hat = x_hat * mean(part * x_hat, -1, True)
        gx = narrow((rstd * (part - mean(part, -1, True) - along_x_hat)).reshape(x.shape), x)
    elsewhere = (0, *range(2, len(x.shape)))  # all axes but the channels'
    if needs[1]:
        gw = narrow(sum(wide(g) * x_hat.reshape(x.shape), elsewhere), x)
    return gx, gw, sum(g, elsewhere) if needs[2] else None


@group_norm.composed
def _(x: Any, groups: int, weight: Any, bias: Any, eps: float = 1e-5) -> Any:
    parts = _in_groups(x, groups)
    from_first = parts - parts[..., :1]
    x_hat = (from_first - mean(from_first, -1, True)) * (var(parts, -1, True) + eps) ** -0.5
    return x_hat.reshape(x.shape) * _of_channels(weight, x) + _of_channels(bias, x)
