"""The twins of :mod:`minivit.ops.activation`: relu and gelu."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.autograd.graph import recording
from minivit.ops.activation import TANH_CUBIC, TANH_SCALE, gelu, gelu_cdf, relu
from minivit.ops.cpu.masks import mask, maskable, masked
from minivit.ops.elementwise import ERF_TANH, tanh_of_odd
from minivit.ops.reduce import narrow, wide


@relu.twin("cpu")
def _(x: np.ndarray) -> Any:
    if not maskable(x):
        return NotImplemented
    return relu.forward(x), mask(x > 0) if recording.enabled else None


@relu.twin("cpu").vjp
def _(g: np.ndarray, kept: np.ndarray, needs: tuple[bool, ...]) -> Any:
    return (masked(g, kept),)


BLOCK = 1 << 18  # numbers that a chain of elementwise steps works on at a time: about a cache full, and worth a call
_HALF_POWERS = [0.5 ** (i + 0.5) for i in range(len(ERF_TANH))]
_CDF_TANH = [c * h for c, h in zip(ERF_TANH, _HALF_POWERS, strict=True)]  # erf(x/√2) = tanh(x·p(x²))


def _gelu_block(x: np.ndarray, out: np.ndarray, slope: np.ndarray) -> None:
    """Write x·Φ(x) and, while recording, its derivative Φ(x) + x·φ(x), float32."""
    z = x * x
    tanh_of_odd(x, z, _CDF_TANH, out=slope)  # erf(x/√2)
    slope *= 0.5
    slope += 0.5  # Φ
    np.multiply(x, slope, out=out)
    if not recording.enabled:
        return
    z *= -0.5
    np.exp(z, out=z)
    z *= x
    z *= 1.0 / math.sqrt(2.0 * math.pi)  # x·φ
    slope += z


@gelu.twin("cpu")
def _(x: np.ndarray, approximate: str) -> Any:
    shape, like, x = x.shape, x, np.atleast_1d(wide(x))  # NumPy's results of 0-d arrays cannot be written to
    if approximate == "none" and x.dtype == np.float32:
        x = x if x.flags.c_contiguous else x.copy()  # as np.ascontiguousarray, but of an outline one
        out, slope = np.empty_like(x), np.empty_like(x if recording.enabled else x.reshape(-1)[:BLOCK])
        flat, flat_out, flat_slope = x.reshape(-1), out.reshape(-1), slope.reshape(-1)
        for start in range(0, x.size, BLOCK):
            part = slice(start, min(start + BLOCK, x.size))
            into = part if recording.enabled else slice(part.stop - start)  # else one block serves for all
            _gelu_block(flat[part], flat_out[part], flat_slope[into])
        return narrow(out, like).reshape(shape), narrow(slope, like)
    cdf = gelu_cdf(x, approximate)
    out = x * cdf
    if approximate == "none":  # kept: Φ + x·φ, the derivative itself: the gradient is then one product
        pdf = x * x
        pdf *= -0.5
        np.exp(pdf, out=pdf)
        pdf *= x
        pdf *= 1.0 / math.sqrt(2.0 * math.pi)
        cdf += pdf
        return out.reshape(shape), cdf
    slope = x * x
    slope *= TANH_SCALE * TANH_CUBIC * 6.0
    slope += TANH_SCALE * 2.0
    slope *= out
    slope *= 1.0 - cdf
    cdf += slope
    return narrow(out, like).reshape(shape), narrow(cdf, like)


@gelu.twin("cpu").vjp
def _(g: np.ndarray, kept: np.ndarray, needs: tuple[bool, ...]) -> Any:
    return (g * kept,)
