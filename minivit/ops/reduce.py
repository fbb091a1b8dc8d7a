"""Reductions. ``axis`` is None (all), an int or a tuple of ints; ``keepdims`` keeps reduced axes with length 1."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.backend import Array, array_module, is_half
from minivit.ops.convert import convert
from minivit.ops.elementwise import exp
from minivit.ops.shape import broadcast_to

Axis = int | tuple[int, ...] | None


def _axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(ndim))
    return tuple(a % ndim for a in (axis if isinstance(axis, Iterable) else (axis,)))


def _count(shape: tuple[int, ...], axis: Axis) -> int:
    return math.prod(shape[a] for a in _axes(axis, len(shape)))


def _keep(g: Any, shape: tuple[int, ...], axis: Axis) -> Any:
    """Give a reduced array its axes back, with length 1."""
    axes = _axes(axis, len(shape))
    return g.reshape(tuple([1 if i in axes else n for i, n in enumerate(shape)]))


def wide(x: Any) -> Any:
    """Return an array or a Tensor, float16 and bfloat16 as float32.

    A sum in float16 ends at 65504, and of ones stops at 2048; in bfloat16 it stops at 256.
    """
    return convert(x, np.float32) if is_half(x.dtype) else x


def narrow(out: Any, x: Any) -> Any:
    """Return what was made of :func:`wide` x in the dtype of x again, if that is half as wide."""
    return convert(out, x.dtype) if is_half(x.dtype) else out


def centred(x: Any, axis: Axis) -> Any:
    """Return x less its mean over ``axis``; on arrays or on Tensors.

    The first number is taken off before: equal numbers give 0 exactly, and numbers far from 0 keep their digits, where
    the mean itself is off by a rounding of its size.
    """
    axes = _axes(axis, len(x.shape))
    x = x - raw(x)[tuple([slice(0, 1) if i in axes else slice(None) for i in range(len(x.shape))])]
    return x - mean(x, axis, True)


@op()
def sum(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the sum over ``axis``."""
    return narrow(wide(x).sum(axis=axis, keepdims=keepdims), x)


sum.vjps(lambda g, out, x, axis, keepdims: broadcast_to(_keep(g, x.shape, axis), x.shape))


@op()
def mean(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the mean over ``axis``."""
    return narrow(wide(x).sum(axis=axis, keepdims=keepdims) / _count(x.shape, axis), x)


@mean.vjp
def _(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, needs: tuple[bool, ...]) -> Any:
    return broadcast_to(_keep(g / _count(x.shape, axis), x.shape, axis), x.shape)


@op(save=("x",))
def var(x: Array, axis: Axis = None, keepdims: bool = False, correction: int = 0) -> Array:
    """Return Σ(x - mean)² / (n - correction) over ``axis``; ``correction=1`` is the unbiased estimate."""
    offsets = centred(wide(x), axis)
    squares = (offsets * offsets).sum(axis=axis, keepdims=keepdims)
    return narrow(squares / (_count(x.shape, axis) - correction), x)


@var.vjp
def _(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, correction: int, needs: tuple[bool, ...]) -> Any:
    return _keep(g * (2.0 / (_count(x.shape, axis) - correction)), x.shape, axis) * centred(x, axis)


def _largest(x: Array, axis: Axis) -> Array:
    """Return max(x, axis, keepdims=True), of complex numbers the one with the largest real part."""
    top = x.real.max(axis=axis, keepdims=True)
    if x.dtype.kind != "c":
        return top
    is_top = x.real == top  # equal ones share: their imaginary parts are averaged
    return top + 1j * (x.imag * is_top).sum(axis=axis, keepdims=True) / is_top.sum(axis=axis, keepdims=True)


@op(save=("x", "out"))
def max(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the largest element over ``axis``; equal ones share the gradient."""
    top = _largest(x, axis)
    return top if keepdims else top.squeeze(_axes(axis, x.ndim))


@op(save=("x", "out"))
def min(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Return the smallest element over ``axis``; equal ones share the gradient."""
    bottom = -_largest(-x, axis)
    return bottom if keepdims else bottom.squeeze(_axes(axis, x.ndim))


@max.vjp
@min.vjp
def _(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, needs: tuple[bool, ...]) -> Any:
    x = raw(x)
    chosen = (x.real == _keep(raw(out).real, x.shape, axis)).astype(g.dtype)
    return _keep(g, x.shape, axis) * narrow(chosen / wide(chosen).sum(axis=axis, keepdims=True), chosen)


@op(save=("x",))
def logsumexp(x: Array, axis: Axis = -1, keepdims: bool = False) -> Array:
    """Return log Σ eˣ over ``axis``, shifted by the largest x so that nothing overflows."""
    xp, top = array_module(x), wide(x.real.max(axis=axis, keepdims=True))
    out = narrow(xp.log(xp.exp(wide(x) - top).sum(axis=axis, keepdims=True)) + top, x)
    return out if keepdims else out.squeeze(_axes(axis, x.ndim))


@logsumexp.vjp
def _(g: Any, out: Any, x: Any, axis: Axis, keepdims: bool, needs: tuple[bool, ...]) -> Any:
    p = exp(wide(x) - wide(raw(x).real.max(axis=axis, keepdims=True)))  # e^(x - out) would have out's rounding in it
    return _keep(g, x.shape, axis) * narrow(p / sum(p, axis, True), x)
