"""The twin of :mod:`minivit.ops.matmul`'s linear: its products, with what is added to them, and their sums in place."""

from __future__ import annotations

from typing import Any

from minivit.autograd.needs import Slot, SoFar
from minivit.backend import Array, product
from minivit.ops.cuda import sums
from minivit.ops.matmul import as_matrix, check_linear, linear


@linear.twin("cuda")
def _(x: Array, weight: Array, bias: Array | None, onto: Array | None) -> Any:
    if x.dtype.kind == "c" or not (x.dtype == weight.dtype and x.ndim):
        return NotImplemented  # the plain operation says what is wrong
    shape, weight = weight.shape, as_matrix(weight)  # (out, …) → (out, in)
    check_linear(x, weight, onto)
    rows = x.reshape(-1, x.shape[-1])  # (…, in) → (rows, in)
    added = None if onto is None else onto.reshape(-1, weight.shape[0])  # (…, out) → (rows, out)
    out = product(rows, weight.T, bias=bias, onto=added)  # → (rows, out)
    return out.reshape(*x.shape[:-1], weight.shape[0]), (rows, weight, x.shape, shape)


@linear.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    rows, weight, shape, weight_shape = kept
    g_rows = g.reshape(-1, weight.shape[0])  # (…, out) → (rows, out), of which a part of another array is a copy
    summed = g if g.flags.c_contiguous else g_rows  # g itself may be known by the sums that its kernel left
    return (
        _onto_so_far(g_rows, weight, shape, needs[0]) if needs[0] else None,
        _of_weight(g_rows, rows, weight_shape, needs[1]) if needs[1] else None,
        sums.deliver(sums.of(summed), needs[2], weight.dtype) if needs[2] else None,
        needs[3].total(g + needs[3].array) if type(needs[3]) is SoFar else g,
    )


def _onto_so_far(g: Array, weight: Array, shape: tuple[int, ...], need: Any) -> Any:
    """Return the gradient of x, g·W, with what had reached x before."""
    if type(need) is not SoFar:
        return product(g, weight).reshape(shape)  # (rows, in) → (…, in)
    return need.total(product(g, weight, onto=need.array.reshape(-1, weight.shape[1])).reshape(shape))


def _of_weight(g: Array, rows: Array, shape: tuple[int, ...], need: Any) -> Any:
    """Return the gradient of the weight, gᵀ·x: (out, rows) · (rows, in), in float32 where it is added up."""
    if type(need) is not Slot or need.array.dtype.itemsize < g.dtype.itemsize:
        return product(g.T, rows).reshape(shape)  # (out, in) → (out, …)
    product(g.T, rows, as_matrix(need.array), add=need.filled)
    return need.done()
