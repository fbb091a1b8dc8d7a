"""Twin: a faster forward and gradient of an operation, for one kind of arrays.

    @linear.twin("cpu")                      # on NumPy arrays; "cuda": on CuPy's
    def _(x, weight, bias):
        …
        return out, (rows, weight)           # the output, and whatever the gradient reads

    @linear.twin("cpu").vjp
    def _(g, kept, needs):
        …
        return g_x, g_weight, g_bias         # None for what needs none

Nothing here knows what an operation is: to the graph a twin is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minivit.autograd.graph import Node
from minivit.errors import GraphError

KINDS = ("cpu", "cuda")
"""Whose arrays a twin can be for: NumPy's, CuPy's."""


class Twin:
    """A faster forward and gradient of an operation on one kind of arrays, NumPy's or CuPy's; first order only.

    It computes what the plain operation does, which is its definition and what the tests hold it to. Under
    ``first_order()`` the kind of the first array among the inputs decides whether it runs. The node that is recorded
    then is the twin's own: no other gradient than the twin's knows what its forward has kept.
    """

    saves_out = False
    forward: Callable[..., Any]

    def __init__(self, name: str, kind: str, twins: dict[str, Twin]) -> None:
        self.name, self.kind, self._twins = name, kind, twins
        self._vjp: Callable[..., Any] | None = None

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Set the forward, on raw arrays: ``forward(*arguments)`` → (out, what the gradient reads).

        On CuPy arrays it may return NotImplemented: then the plain operation runs. From now on the operation has this
        twin.
        """
        self.forward = forward
        self._twins[self.kind] = self
        return forward

    def vjp(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """Set the gradient, on raw arrays: ``gradient(g, kept, needs)`` → a gradient (or None) for each input.

        It may write over neither g nor what it did not make. An entry of ``needs`` may be a place to put the gradient
        in: see :mod:`minivit.autograd.needs`.
        """
        self._vjp = gradient
        return gradient

    def __repr__(self) -> str:
        return f"<{self.kind} twin of op {self.name}>"

    def gradient(self, node: Node, g: Any, needs: tuple[bool, ...], wrap: Callable[..., Any] | None) -> Sequence[Any]:
        """Return the gradient for each input of ``node``, which this twin recorded."""
        (kept,), _ = node.read()
        if wrap is not None:
            raise GraphError(
                f"{self.name} was recorded for first-order gradients only",
                "run the forward pass outside first_order() to use create_graph=True",
            )
        if self._vjp is None:
            raise GraphError(f"the {self.kind} twin of {self.name} has no gradient", "define one with .vjp")
        return self._vjp(g, kept, needs)
