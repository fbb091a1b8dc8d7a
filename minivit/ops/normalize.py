"""Softmax and layer normalisation."""

from __future__ import annotations

from typing import Any

from minivit.autograd.op import op
from minivit.backend import Array, array_module
from minivit.ops.elementwise import exp, sqrt
from minivit.ops.reduce import logsumexp, mean, sum, var


@op(save=("out",))
def softmax(x: Array, axis: int = -1) -> Array:
    """Return e^x / Σ e^x along ``axis``, shifted by each row's own largest x so that nothing overflows."""
    out = array_module(x).exp(x - x.real.max(axis=axis, keepdims=True))
    out /= out.sum(axis=axis, keepdims=True)
    return out


softmax.vjps(lambda g, out, x, axis: out * (g - sum(g * out, axis, True)))
softmax.composed(lambda x, axis=-1: exp(x) / sum(exp(x), axis, True))


@op(save=("out",))
def log_softmax(x: Array, axis: int = -1) -> Array:
    """Return x - log Σ e^x along ``axis``."""
    xp = array_module(x)
    out = x - x.real.max(axis=axis, keepdims=True)
    out -= xp.log(xp.exp(out).sum(axis=axis, keepdims=True))
    return out


log_softmax.vjps(lambda g, out, x, axis: g - exp(out) * sum(g, axis, True))
log_softmax.composed(lambda x, axis=-1: x - logsumexp(x, axis, True))


@op(save=("x", "weight"))
def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-6) -> Array:
    """Return (x - μ)/√(σ² + eps) · weight + bias over the last axis (Ba, Kiros, Hinton 2016, arXiv 1607.06450, eq. 4).

    x (…, D), weight and bias (D,). The variance is taken of the centred x, in two passes: exact where E[x²] - E[x]²
    would cancel.
    """
    x_hat, _ = _normalized(x, eps)
    return x_hat * weight + bias


def _normalized(x: Any, eps: float) -> tuple[Any, Any]:
    """Return (x - μ)/σ and 1/σ, where σ² includes eps; on arrays or on Tensors."""
    centred = x - mean(x, -1, True)
    rstd = 1.0 / sqrt(mean(centred * centred, -1, True) + eps)
    return centred * rstd, rstd


@layer_norm.vjp
def _(g: Any, out: Any, x: Any, weight: Any, bias: Any, eps: float, needs: tuple[bool, ...]) -> Any:
    x_hat, rstd = _normalized(x, eps)
    gx = None
    if needs[0]:
        gw = g * weight  # what reaches x_hat; its parts along 1 and along x_hat cannot change it
        gx = rstd * (gw - mean(gw, -1, True) - x_hat * mean(gw * x_hat, -1, True))
    return gx, g * x_hat if needs[1] else None, g  # the engine sums those of weight and bias over the rows


layer_norm.composed(
    lambda x, weight, bias, eps=1e-6: (x - mean(x, -1, True)) * (var(x, -1, True) + eps) ** -0.5 * weight + bias
)
