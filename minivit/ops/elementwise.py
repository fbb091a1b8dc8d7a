"""Elementwise operations, with NumPy's broadcasting: the engine sums a gradient over the axes that were broadcast.

Kinks (abs, maximum, clip, …) decide by the real part, so that every forward here is analytic on either side of its kink
and can be checked with a complex step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module, device_of, is_array, to_device

# ---- arithmetic ------------------------------------------------------------------------------------------------------


@op()
def add(a: Array, b: Array) -> Array:
    """Return a + b."""
    return a + b


add.vjps(lambda g, out, a, b: g,
         lambda g, out, a, b: g)  # fmt: skip


@op()
def sub(a: Array, b: Array) -> Array:
    """Return a - b."""
    return a - b


sub.vjps(lambda g, out, a, b: g,
         lambda g, out, a, b: -g)  # fmt: skip


@op(save=("a", "b"))
def mul(a: Array, b: Array) -> Array:
    """Return a · b, elementwise."""
    return a * b


mul.vjps(lambda g, out, a, b: g * b,
         lambda g, out, a, b: g * a)  # fmt: skip


@op(save=("b", "out"))
def div(a: Array, b: Array) -> Array:
    """Return a / b."""
    return a / b


div.vjps(lambda g, out, a, b: g / b,
         lambda g, out, a, b: -g * out / b)  # fmt: skip


@op(save=("a", "b", "out"))
def pow(a: Array, b: Array) -> Array:
    """Return aᵇ; for a gradient in b, a must be positive."""
    return a * a if not is_array(b) and b == 2 else a**b  # NumPy's float32 power is 400 times slower than a product


@pow.vjp
def _(g: Any, out: Any, a: Any, b: Any, needs: tuple[bool, ...]) -> Any:
    constant = not is_array(raw(b)) and b == 0  # 0·0⁻¹ would be NaN where a is 0
    ga = (g * 0 if constant else g * (b * pow(a, b - 1))) if needs[0] else None
    if not needs[1]:
        return ga, None
    return ga, g * out * (log(a) if is_array(raw(a)) else math.log(a))  # NumPy's log of a number would be float64


@op()
def neg(x: Array) -> Array:
    """Return -x."""
    return -x


neg.vjps(lambda g, out, x: -g)


# ---- functions -------------------------------------------------------------------------------------------------------


@op(save=("out",))
def exp(x: Array) -> Array:
    """Return eˣ."""
    return array_module(x).exp(x)


exp.vjps(lambda g, out, x: g * out)


@op(save=("x",))
def log(x: Array) -> Array:
    """Return the natural logarithm."""
    return array_module(x).log(x)


log.vjps(lambda g, out, x: g / x)


@op(save=("out",))
def sqrt(x: Array) -> Array:
    """Return √x."""
    return array_module(x).sqrt(x)


sqrt.vjps(lambda g, out, x: g * 0.5 / out)


@op(save=("out",))
def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent."""
    return array_module(x).tanh(x)


tanh.vjps(lambda g, out, x: g * (1.0 - out * out))


@op(save=("x",))
def sin(x: Array) -> Array:
    """Return the sine of x in radians."""
    return array_module(x).sin(x)


@op(save=("x",))
def cos(x: Array) -> Array:
    """Return the cosine of x in radians."""
    return array_module(x).cos(x)


sin.vjps(lambda g, out, x: g * cos(x))
cos.vjps(lambda g, out, x: -g * sin(x))


@op(save=("x",))
def erf(x: Array) -> Array:
    """Return the error function 2/√π ∫₀ˣ e^(-t²) dt (Abramowitz and Stegun 7.1.1)."""
    if array_module(x) is not np:
        import importlib

        # of float16 CuPy's is float64, of bfloat16 float32
        return importlib.import_module("cupyx.scipy.special").erf(x).astype(x.dtype, copy=False)
    x = np.asarray(x)
    if x.dtype == np.float32:
        return _erf_float32(x)
    return _erf_series(x) if x.dtype.kind == "c" else np.asarray(_erf_exact(x), x.dtype)


erf.vjps(lambda g, out, x: g * (2.0 / math.sqrt(math.pi) * exp(-x * x)))

_erf_exact = np.frompyfunc(math.erf, 1, 1)  # the C library's, one element at a time: exact, and used for float64 only


def _erf_float32(x: np.ndarray) -> np.ndarray:
    """Return erf(x) ≈ tanh(x·p(x²)), p fitted to float32 (error at most 6e-8)."""
    return tanh_of_odd(x, x * x, ERF_TANH, out=np.empty_like(x))


def tanh_of_odd(x: np.ndarray, z: np.ndarray, coefficients: Sequence[float], out: np.ndarray) -> np.ndarray:
    """Write tanh(x·p(z)) into ``out`` and return it; ``coefficients`` of p from the constant up, z is x²."""
    np.multiply(z, coefficients[-1], out=out)
    for c in coefficients[-2:0:-1]:
        out += c
        out *= z
    out += coefficients[0]
    out *= x
    return np.tanh(out, out=out)


ERF_TANH = (1.12837971, 0.102765481, -1.84382948e-4, -6.25720277e-4, 8.97128737e-5, -5.9857408e-6, 1.58963268e-7)


def _erf_series(z: np.ndarray) -> np.ndarray:
    """Return erf of complex z by 2/√π e^(-z²) Σ 2ⁿ z²ⁿ⁺¹ / (2n+1)!! (Abramowitz and Stegun 7.1.6).

    For the complex step: no term of it cancels another near the real axis, and it knows nothing of the derivative.
    """
    inside = np.where(np.abs(z.real) < 6, z, 0)  # beyond 6, erf is ±1 to the last bit
    term = inside * (2.0 / math.sqrt(math.pi)) * np.exp(-inside * inside)
    total = term.copy()
    for n in range(1, 160):
        term = term * (2.0 * inside * inside / (2 * n + 1))
        total += term
    return np.where(np.abs(z.real) < 6, total, np.sign(z.real))


# ---- kinks -----------------------------------------------------------------------------------------------------------


def _real(x: Any) -> Any:
    x = raw(x)
    return x.real if is_array(x) else x


def _complex(*xs: Any) -> bool:
    return any(is_array(x) and x.dtype.kind == "c" for x in xs)


@op(save=("x",))
def abs(x: Array) -> Array:
    """Return |x|; the gradient at 0 is 0."""
    return array_module(x).where(_real(x) < 0, -x, x) if _complex(x) else array_module(x).abs(x)


abs.vjps(lambda g, out, x: g * array_module(raw(x)).sign(_real(x)))


@op(save=("a", "b"))
def maximum(a: Array, b: Array) -> Array:
    """Return the larger of a and b; where they are equal, each gets half of the gradient."""
    xp = array_module(a, b)
    return xp.where(_real(a) >= _real(b), a, b) if _complex(a, b) else xp.maximum(a, b)


maximum.vjps(lambda g, out, a, b: g * _share(a, b, g),
             lambda g, out, a, b: g * _share(b, a, g))  # fmt: skip


@op(save=("a", "b"))
def minimum(a: Array, b: Array) -> Array:
    """Return the smaller of a and b; where they are equal, each gets half of the gradient."""
    xp = array_module(a, b)
    return xp.where(_real(a) <= _real(b), a, b) if _complex(a, b) else xp.minimum(a, b)


minimum.vjps(lambda g, out, a, b: g * _share(b, a, g),
             lambda g, out, a, b: g * _share(a, b, g))  # fmt: skip


def _share(a: Any, b: Any, g: Any) -> Array:
    """Return 1 where a > b, ½ where they are equal, else 0, in the gradient's dtype."""
    a, b = _real(a), _real(b)
    return (a > b).astype(g.dtype) + (a == b).astype(g.dtype) * 0.5


@op()
def where(condition: Any, a: Array, b: Array) -> Array:
    """Return a where ``condition`` (bool, broadcast) holds, else b; a NaN in the other side's gradient stays there."""
    xp = array_module(a, b)
    return xp.where(_here(condition, a, b), a, b)


where.vjps(lambda g, out, condition, a, b: where(condition, g, 0.0),
           lambda g, out, condition, a, b: where(condition, 0.0, g))  # fmt: skip


def _here(condition: Any, *arrays: Any) -> Any:
    """Return a NumPy mask on the device of the arrays that it selects from."""
    on_gpu = next((a for a in arrays if array_module(a) is not np), None)
    if isinstance(condition, np.ndarray) and on_gpu is not None:
        return to_device(condition, device_of(on_gpu))
    return condition


@op(save=("x",))
def clip(x: Array, low: float | None = None, high: float | None = None) -> Array:
    """Return x held to [low, high]; the gradient is that of x inside and on the bounds, 0 outside."""
    xp = array_module(x)
    if low is not None:
        x = xp.where(_real(x) < low, low, x)
    return x if high is None else xp.where(_real(x) > high, high, x)


@clip.vjp
def _(g: Any, out: Any, x: Any, low: Any, high: Any, needs: tuple[bool, ...]) -> Any:
    x = _real(x)
    inside = x == x
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return where(inside, g, 0.0)
