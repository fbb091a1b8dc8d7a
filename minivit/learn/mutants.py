"""How a mistake in a backward pass is written as a forward pass: right numbers, and a wrong way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivit.autograd.tensor import Tensor


def cut(x: Any) -> Any:
    """Return x with no way back: a term that was forgotten in the gradient."""
    return x.detach() if isinstance(x, Tensor) else x


def seen_as(x: Any, value: Any) -> Any:
    """Return ``value``, with the way back to x as if it were x."""
    return x + cut(value - x)


def misread(piece: Callable[..., Any], x: Any, read: Any, *parameters: Any) -> Any:
    """Return piece(x, *parameters); its gradient is taken at ``read`` by mistake, or at x if that is None.

    So it is when a backward is handed something else than what went into the forward.
    """
    if read is None:
        return piece(x, *parameters)
    return seen_as(piece(seen_as(x, read), *parameters), piece(x, *parameters))


def but(right: Callable[..., Any], place: int, change: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``right`` with output number ``place`` changed to change(output, *arguments)."""

    def gives(*args: Any) -> tuple[Any, ...]:
        outputs = list(right(*args))
        outputs[place] = change(outputs[place], *args)
        return tuple(outputs)

    return gives
