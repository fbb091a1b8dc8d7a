"""Layers that forget what they computed, and compute it again when its gradient is wanted.

Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv 1604.06174: one more forward pass, for the
memory of all that it would have kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from minivit.autograd.graph import Node, no_grad, propagate, recording
from minivit.autograd.tensor import Tensor
from minivit.backend import array_module
from minivit.errors import GraphError
from minivit.nn.module import Module, mode
from minivit.nn.random import Draws, drawing, draws


class _Now(threading.local):
    keeping = False


_now = _Now()


@contextlib.contextmanager
def keeping() -> Iterator[None]:
    """Let nothing be computed again in this block, in this thread: whoever looks at the graph sees all of it."""
    before, _now.keeping = _now.keeping, True
    try:
        yield
    finally:
        _now.keeping = before


def recompute(function: Callable[[Tensor], Tensor], x: Tensor, module: Module) -> Tensor:
    """Return function(x), keeping no more than x for the backward pass.

    ``function`` runs again in the backward pass, with the same random keys and in the same modes; the parameters and
    modules that it reads are those of ``module``. ``grad(..., create_graph=True)`` through the result raises
    :class:`GraphError`.
    """
    leaves = tuple([p.node for p in module.parameters() if p.requires_grad])
    if _now.keeping or not recording.enabled or (x.node is None and not leaves):
        return function(x)
    modes = {id(m): m.training for _, m in module.named_modules()}
    again = _Again(function, draws(), modes, recording.first_order)
    with no_grad():
        out = function(x)
    return Tensor(out.data, Node(again, [x.data], (x.node, *leaves), out.data))


class _Again:
    """What a recomputed function is to the graph: an operation whose gradient runs it once more, and back."""

    name = "recompute"
    saves_out = False

    def __init__(
        self, function: Callable[[Tensor], Tensor], state: Draws, modes: dict[int, bool], first_order: bool
    ) -> None:
        self.function, self.state, self.modes, self.first_order = function, state, modes, first_order

    def gradient(self, node: Node, g: Any, needs: tuple[bool, ...], wrap: Any) -> list[Any]:
        """Return the gradients of x and of the parameters, in the order of the node's parents."""
        if wrap is not None:
            raise GraphError("a recomputed layer has first-order gradients only", "use recompute=False")
        parents = node.parents
        args, _ = node.read()
        x = Tensor(args[0])
        x.requires_grad = needs[0]
        before = recording.enabled, recording.first_order
        recording.enabled, recording.first_order = True, self.first_order
        try:
            with drawing(self.state), mode(self.modes):
                out = self.function(x)
        finally:
            recording.enabled, recording.first_order = before
        sums: dict[Any, Any] = {}
        if out.node is not None:
            for leaf, part in propagate(out.node, g):
                sums[leaf] = sums[leaf] + part if leaf in sums else part
        if not sums.keys() <= {x.node, *parents}:
            raise GraphError(
                "a recomputed function reads a Tensor that requires a gradient, and is neither its input nor a"
                " parameter of its module",
                "make it a Parameter of the module that recompute(…) is given",
            )
        results: list[Any] = []
        for own, parent in zip((x.node, *parents[1:]), parents, strict=True):
            if own is None or parent is None:
                results.append(None)
            else:  # zeros if the function does not depend on it
                results.append(sums[own] if own in sums else array_module(g).zeros(parent.shape, parent.dtype))
        return results
