"""What a hand-written forward and backward return: read, and refused where it cannot be what was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor
from minivit.errors import ConfigError, DTypeError, GradientError

__tracebackhide__ = True  # as in orders.py


def output_of(x: Any, place: str) -> Any:
    """Return an output as an array, a number as NumPy's and None, in its ``place`` among others, as None."""
    if x is None and place:
        return None
    array = np.asarray(x.data if isinstance(x, Tensor) else x)
    if isinstance(x, tuple | list | dict) or array.dtype.kind not in "fiubc":
        raise ConfigError(
            f"check_vjp: forward returns a {type(x).__name__}{place}",
            "return an array, or a tuple of arrays; if it is for backward, return (out, cache), and pass cache=True",
        )
    if array.dtype.kind == "c":
        raise DTypeError("check_vjp: forward returns complex numbers for real ones", "return real numbers")
    return array if array.ndim or isinstance(x, np.ndarray) else array[()]


def gradients_of(result: Any, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return what backward returned for each argument that has a shape in ``shapes``, by name.

    Raises GradientError unless it is one gradient for each of all ``names``, of its shape, and None for the others.
    """
    result = result if isinstance(result, tuple | list) else [result]
    if len(result) != len(names):
        constant = [name for name in names if name not in shapes]
        raise GradientError(
            f"backward returns {len(result)} gradient{'' if len(result) == 1 else 's'} for {len(names)} "
            f"argument{'' if len(names) == 1 else 's'} ({', '.join(names)})",
            "return a tuple with one for each, in their order"
            + (f", and None for {', '.join(constant)}" if constant else ""),
        )
    found = {}
    for name, x in zip(names, result, strict=True):
        if name in shapes:
            found[name] = _gradient_of(name, x, shapes[name])
        elif x is not None:
            raise GradientError(
                f"backward returns a gradient for {name}, which holds no floating numbers",
                "return None for it; what is to be differentiated is a float array, an argument of its own",
            )
    return found


def _gradient_of(name: str, result: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return one gradient as an array of real numbers."""
    if result is None:
        raise GradientError(
            f"backward returns None for {name}, which holds floating numbers",
            f"return its gradient; or hold it constant in both functions: functools.partial(forward, {name}=…)",
        )
    gradient = np.asarray(result.data if isinstance(result, Tensor) else result)
    if gradient.dtype.kind not in "fiub":
        kind = gradient.dtype if isinstance(result, np.ndarray) else f"a {type(result).__name__}"
        raise GradientError(f"the gradient for {name} is {kind}", "return an array of real numbers")
    if gradient.shape != shape:
        what = f"the gradient for {name} has shape {gradient.shape}, {name} {shape}"
        raise GradientError(what, _refit(gradient, shape))
    return gradient


def _refit(gradient: np.ndarray, shape: tuple[int, ...]) -> str:
    """Return what to do with a gradient that is not of the shape of its argument."""
    extra = gradient.ndim - len(shape)
    if extra >= 0:
        rest = gradient.shape[extra:]
        axes = [*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 != rest[i])]
        if all(n in (1, m) for n, m in zip(shape, rest, strict=True)):
            return f"sum it over the axes along which the argument was broadcast: {', '.join(map(str, axes))}"
    if gradient.shape == shape[::-1]:
        return "transpose it"
    return "return a gradient of the argument's shape"
