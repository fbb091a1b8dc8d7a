"""What NumPy's functions do with a Tensor (NEP 13 and NEP 18): no result leaves the graph unnoticed.

Operators between an array and a Tensor record. Any other NumPy function would return a plain array, through which
nothing below gets a gradient: given a Tensor that is recorded, it raises GraphError and names the operation to use.
Other Tensors, and all under ``no_grad``, are arrays to NumPy.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minivit.autograd.op import raw
from minivit.autograd.tensor import Tensor
from minivit.errors import DTypeError, GraphError, ShapeError
from minivit.ops.elementwise import add, div, mul, pow, sub
from minivit.ops.matmul import matmul


def compare(comparison: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    """Return a boolean array: comparisons have no gradient."""
    try:
        return comparison(raw(a), raw(b))
    except ValueError as error:
        raise ShapeError(f"{comparison.__name__}: {error}", "compare shapes that broadcast") from error


_OPERATORS: dict[np.ufunc, Callable[[Any, Any], Any]] = {
    np.add: add, np.subtract: sub, np.multiply: mul, np.true_divide: div, np.power: pow, np.matmul: matmul,
    np.equal: partial(compare, operator.eq), np.not_equal: partial(compare, operator.ne),
    np.less: partial(compare, operator.lt), np.less_equal: partial(compare, operator.le),
    np.greater: partial(compare, operator.gt), np.greater_equal: partial(compare, operator.ge),
}  # fmt: skip
"""What `array + tensor` comes to: NumPy calls it by the function, np.add."""

READ_NO_VALUES = {
    np.common_type, np.empty_like, np.iscomplexobj, np.isrealobj, np.may_share_memory, np.ndim,
    np.ones_like, np.result_type, np.shape, np.shares_memory, np.size, np.zeros_like,
}  # fmt: skip
"""NumPy's functions whose result depends on shapes and dtypes alone: it has no gradient to lose."""

EQUIVALENTS = {
    name: name
    for name in (
        "abs", "add", "broadcast_to", "clip", "concat", "cos", "erf", "exp", "log", "matmul", "max", "maximum", "mean",
        "min", "minimum", "pad", "pow", "reshape", "sin", "split", "sqrt", "stack", "sum", "swapaxes",
        "take_along_axis", "tanh", "transpose", "var", "where",
    )
} | {
    "absolute": "abs", "amax": "max", "amin": "min", "append": "concat", "column_stack": "concat",
    "concatenate": "concat", "dot": "matmul", "divide": "div", "expand_dims": "reshape", "hstack": "concat",
    "matrix_transpose": "swapaxes", "multiply": "mul", "negative": "neg", "permute_dims": "transpose", "power": "pow",
    "ravel": "reshape", "squeeze": "reshape", "subtract": "sub", "true_divide": "div", "vstack": "concat",
}  # fmt: skip
"""NumPy's name → the operation of minivit.ops that does the same or, with other arguments, serves for it."""


def array_function(self: Tensor, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
    """Run a NumPy function on the arrays of its Tensors (NEP 18), unless that cuts a graph."""
    name = f"{function.__module__}.{function.__name__}".replace("numpy", "np", 1)
    given = [*args, *kwargs.values()]
    arrays = _arrays(name, given, allowed=function in READ_NO_VALUES)
    return function(*arrays[: len(args)], **dict(zip(kwargs, arrays[len(args) :], strict=True)))


def array_ufunc(self: Tensor, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
    """Record a NumPy operator; run another ufunc on the arrays of its Tensors (NEP 13), unless that cuts a graph."""
    if method == "__call__" and not kwargs and ufunc in _OPERATORS:
        return _OPERATORS[ufunc](*inputs)
    name = f"np.{ufunc.__name__}" if getattr(np, ufunc.__name__, None) is ufunc else ufunc.__name__  # SciPy's, …
    name = name if method == "__call__" else f"{name}.{method}"
    arrays = _arrays(name, [*inputs, *kwargs.values()])
    return getattr(ufunc, method)(*arrays[: len(inputs)], **dict(zip(kwargs, arrays[len(inputs) :], strict=True)))


class OfTheClass:
    """A function that NumPy finds, because it asks the class, and CuPy does not, because it asks the object.

    CuPy then leaves `array @ tensor` to ``Tensor.__rmatmul__``: it asks no further for matrix products.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self.function if instance is None else None


def _arrays(name: str, given: list[Any], allowed: bool = False) -> list[Any]:
    """Return arguments with arrays for Tensors, in lists and tuples too; raise if the function must not have them."""
    found = False

    def array(x: Any) -> Any:
        nonlocal found
        if isinstance(x, Tensor):
            found = True
            if x.is_recorded and not allowed:
                raise _cut(name, x)
            return x.data
        return type(x)(map(array, x)) if type(x) in (list, tuple) else x

    arrays = list(map(array, given))
    if not found:
        raise DTypeError(f"{name}: a Tensor is inside of an argument that is no list", "give a list or a tuple")
    return arrays


def _cut(name: str, x: Tensor) -> GraphError:
    own = EQUIVALENTS.get(name.removeprefix("np.").removeprefix("linalg."))
    use = f"mv.ops.{own}, which records" if own else "operations of mv.ops, which record"
    return GraphError(
        f"{name} does not record: what a Tensor of shape {x.shape} was computed from would get no gradient through it",
        f"use {use}; x.numpy() reads the values, x.detach() cuts the graph on purpose",
    )
