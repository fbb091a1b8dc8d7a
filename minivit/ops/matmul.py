"""Matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.op import op
from minivit.backend import Array, product
from minivit.backend.planning import is_on_gpu
from minivit.errors import ShapeError
from minivit.ops.elementwise import add
from minivit.ops.shape import reshape, swapaxes


def matmul(a: Any, b: Any) -> Any:
    """Return a @ b: (…, n, k) · (…, k, m) → (…, n, m), leading axes broadcast; a vector on either side as in NumPy."""
    if _is_vector(a) and _is_vector(b):
        return reshape(_matmul(reshape(a, (1, -1)), reshape(b, (-1, 1))), ())
    if _is_vector(a):
        product = _matmul(reshape(a, (1, -1)), b)  # (…, 1, m)
        return reshape(product, (*product.shape[:-2], product.shape[-1]))
    if _is_vector(b):
        product = _matmul(a, reshape(b, (-1, 1)))  # (…, n, 1)
        return reshape(product, product.shape[:-1])
    return _matmul(a, b)


def _is_vector(x: Any) -> bool:
    return getattr(x, "ndim", None) == 1  # the operation says what is wrong with a list


@op(save=("a", "b"))
def _matmul(a: Array, b: Array) -> Array:
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"matmul: {a.shape} @ {b.shape}: the last axis of the left, {a.shape[-1]}, is not "
            f"the last but one of the right, {b.shape[-2]}",
            "transpose one side?",
        )
    return _product(a, b)


def _product(a: Array, b: Array) -> Array:
    """Return a @ b, without NumPy's "invalid value" warnings.

    OpenBLAS's kernels compute on what happens to lie in unused lanes of their registers, throw it away, and leave the
    processor's flag for an invalid operation set: NumPy would warn of results that have nothing wrong.
    """
    if is_on_gpu(a):
        return product(a, b)
    with np.errstate(invalid="ignore"):
        return a @ b


_matmul.vjps(lambda g, out, a, b: matmul(g, swapaxes(b, -1, -2)),
             lambda g, out, a, b: matmul(swapaxes(a, -1, -2), g))  # fmt: skip


@op(save=("x", "weight"))
def linear(x: Array, weight: Array, bias: Array | None = None, onto: Array | None = None) -> Array:
    """Return onto + x·Wᵀ + b: x (…, in), weight (out, in) as in PyTorch, bias (out,), onto (…, out) → (…, out).

    A weight of more axes, as a convolution's (out, C, P, Q), counts as one of (out, C·P·Q). ``onto`` is what the result
    is added to, as in a residual block: the product then writes their sum at once.
    Twins: ops/cpu/matmul.py, ops/cuda/matmul.py.
    """
    weight = as_matrix(weight)
    check_linear(x, weight, onto)
    # (…, in) → (rows, in) → (rows, out): one product, not one for each entry of the batch
    out = _product(x.reshape(-1, x.shape[-1]), weight.T)
    if bias is not None:
        out += bias
    out = out.reshape(*x.shape[:-1], weight.shape[0])  # (rows, out) → (…, out)
    if onto is not None:
        out += onto
    return out


def as_matrix(weight: Array) -> Array:
    """Return a weight (out, …) as a matrix (out, in): a view."""
    return weight if weight.ndim <= 2 else weight.reshape(len(weight), -1)


def check_linear(x: Array, weight: Array, onto: Array | None) -> None:
    """Raise unless x (…, in) fits a weight (out, in), and the result what it is added to."""
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear: an input of shape {x.shape} does not fit a weight of {weight.shape} (out, in)",
            f"give an input of shape (…, {weight.shape[1]})",
        )
    if onto is not None and onto.shape != (*x.shape[:-1], weight.shape[0]):
        raise ShapeError(
            f"linear: a result of {(*x.shape[:-1], weight.shape[0])} does not fit onto {onto.shape}",
            "give an onto of the result's shape, or add it afterwards",
        )


def _matrix(weight: Any) -> Any:
    return weight if weight.ndim == 2 else reshape(weight, (weight.shape[0], -1))


def _shaped(gradient: Any, weight: Any) -> Any:
    return gradient if weight.ndim == 2 else reshape(gradient, weight.shape)


@linear.vjp
def _(g: Any, out: Any, x: Any, weight: Any, bias: Any, onto: Any, needs: tuple[bool, ...]) -> Any:
    rows = reshape(g, (-1, weight.shape[0]))  # (…, out) → (rows, out)
    gx = reshape(matmul(rows, _matrix(weight)), x.shape) if needs[0] else None
    gw = _shaped(matmul(swapaxes(rows, 0, 1), reshape(x, (-1, x.shape[-1]))), weight) if needs[1] else None
    return gx, gw, rows if needs[2] else None, g  # the engine sums the bias gradient over the rows


@linear.composed
def _(x: Any, weight: Any, bias: Any = None, onto: Any = None) -> Any:
    out = matmul(x, swapaxes(_matrix(weight), 0, 1))
    out = out if bias is None else add(out, bias)
    return out if onto is None else add(onto, out)
