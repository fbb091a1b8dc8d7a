"""Activation functions."""

from __future__ import annotations

import math
from typing import Any

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module
from minivit.errors import ConfigError
from minivit.ops.elementwise import erf, exp, maximum, tanh, where
from minivit.ops.reduce import narrow, wide

_SQRT_HALF = math.sqrt(0.5)
TANH_SCALE = math.sqrt(2.0 / math.pi)
TANH_CUBIC = 0.044715


@op(save=("x",))
def relu(x: Array) -> Array:
    """Return max(x, 0); the gradient at 0 is 0. Twins: ops/cpu/activation.py."""
    xp = array_module(x)
    return xp.where(x.real > 0, x, 0.0) if x.dtype.kind == "c" else xp.maximum(x, 0)


relu.vjps(lambda g, out, x: where(raw(x).real > 0, g, 0.0))
relu.composed(lambda x: maximum(x, 0.0))


@op(save=("x",))
def sigmoid(x: Array) -> Array:
    """Return 1/(1 + e^-x), as (1 + tanh(x/2))/2, which cannot overflow."""
    return array_module(x).tanh(x * 0.5) * 0.5 + 0.5


sigmoid.vjps(lambda g, out, x: g * sigmoid(x) * sigmoid(-x))
sigmoid.composed(lambda x: 1.0 / (1.0 + exp(-x)))


@op(save=("x",))
def silu(x: Array) -> Array:
    """Return x · sigmoid(x) (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * sigmoid(x)


@silu.vjp
def _(g: Any, out: Any, x: Any, needs: tuple[bool, ...]) -> Any:
    s = sigmoid(x)
    return g * (s + x * s * sigmoid(-x))


silu.composed(lambda x: x / (1.0 + exp(-x)))


@op(save=("x",))
def gelu(x: Array, approximate: str = "none") -> Array:
    """Return x · Φ(x), Φ the standard normal distribution (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

    ``approximate="none"`` is exact, by erf; ``"tanh"`` is 0.5x(1 + tanh(√(2/π)(x + 0.044715x³))), at most 5e-4 away.
    Twins: ops/cpu/activation.py, ops/cuda/activation.py.
    """
    return narrow(wide(x) * gelu_cdf(wide(x), approximate), x)


def gelu_cdf(x: Any, approximate: str) -> Any:
    """Return Φ(x), or what stands for it in the tanh form; on arrays or on Tensors."""
    if approximate == "none":
        return erf(x * _SQRT_HALF) * 0.5 + 0.5
    if approximate == "tanh":
        return tanh(x * (TANH_SCALE + (TANH_SCALE * TANH_CUBIC) * x * x)) * 0.5 + 0.5
    raise ConfigError(f"gelu: unknown approximate={approximate!r}", "use 'none' or 'tanh'")


@gelu.vjp
def _(g: Any, out: Any, x: Any, approximate: str, needs: tuple[bool, ...]) -> Any:
    x = wide(x)
    cdf = gelu_cdf(x, approximate)
    if approximate == "none":
        pdf = exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
    else:  # d/dx ½(1 + tanh u) = 2·cdf·(1 - cdf)·u′
        pdf = cdf * (1.0 - cdf) * (2.0 * TANH_SCALE + (6.0 * TANH_SCALE * TANH_CUBIC) * x * x)
    return narrow(wide(g) * (cdf + x * pdf), g)


@gelu.composed
def _(x: Any, approximate: str = "none") -> Any:
    if approximate == "none":
        return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Any] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "relu": relu,
    "silu": silu,
    "tanh": tanh,
}
"""Activations by the names that layers take."""
