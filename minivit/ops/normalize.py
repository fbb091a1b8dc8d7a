"""Softmax and layer normalisation."""

from __future__ import annotations

from typing import Any

from minivit.autograd.op import op
from minivit.backend import Array, array_module
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
