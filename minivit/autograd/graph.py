"""The graph: nodes that remember how an array was made, and the walk back through them.

A node holds raw arrays and its parent nodes, never Tensors, and a leaf refers only weakly to its Tensor: there are no
reference cycles, so the graph is freed by reference counts alone. Nothing here knows what an operation computes.

Reverse-mode differentiation: Griewank and Walther 2008, "Evaluating Derivatives", chapter 3.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minivit.autograd.needs import Slot, Total, places, rounded, unbroadcast
from minivit.backend import Array, device_of, on_device_of
from minivit.errors import GraphError

# ---- recording -------------------------------------------------------------------------------------------------------


class _Recording(threading.local):
    enabled = True
    first_order = False


recording = _Recording()
"""What this thread records: threads may run forward and backward passes side by side."""


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Record nothing in this block (or function, as a decorator): results have no graph."""
    before, recording.enabled = recording.enabled, False
    try:
        yield
    finally:
        recording.enabled = before


@contextlib.contextmanager
def first_order() -> Iterator[None]:
    """Record, in this block, for ``backward`` only.

    Operations with a twin for the arrays at hand then run it, which keeps what its gradient reads (a derivative,
    probabilities) instead of the inputs. ``grad(..., create_graph=True)`` through such a graph raises
    :class:`GraphError`.
    """
    before, recording.first_order = recording.first_order, True
    try:
        yield
    finally:
        recording.first_order = before


# ---- nodes -----------------------------------------------------------------------------------------------------------


class Unsaved:
    """Stands for an input that an operation did not ask to keep: it has a shape and a dtype, and nothing to read."""

    __slots__ = ("device", "dtype", "shape")

    def __init__(self, array: Array) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.dtype = array.dtype
        self.device = "cpu" if type(array) is np.ndarray else device_of(array)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getattr__(self, name: str) -> Any:
        raise GraphError(
            f"a gradient reads {name!r} of an input of shape {self.shape} that its operation does not keep",
            "name that input in @op(save=...)",
        )


_ages = itertools.count()  # a node is younger than its parents: order by age is a topological order
_age = operator.attrgetter("age")


def moment() -> int:
    """Return a number greater than the ages of all nodes made so far, and less than those of the nodes to come."""
    return next(_ages)


class Node:
    """One recorded operation, or a leaf (``op`` None).

    ``op`` is whatever has the gradient: an operation, or a twin of one. ``args`` is what it reads: an operation's
    arguments in the order of its signature, as raw arrays, with :class:`Unsaved` for what it does not keep; for a twin
    what its forward kept. ``parents`` has one entry for each differentiable input: its node, or None for a constant.
    """

    __slots__ = ("__weakref__", "age", "args", "dtype", "op", "out", "parents", "shape", "tensor")

    def __init__(self, op: Any, args: Sequence[Any], parents: tuple[Node | None, ...], out: Array) -> None:
        self.age = next(_ages)
        self.op = op
        self.args: Any = args
        self.parents = parents
        self.shape: tuple[int, ...] = out.shape
        self.dtype = out.dtype
        self.out = out if op.saves_out else None
        self.tensor: Callable[[], Any] = _no_tensor

    @classmethod
    def leaf(cls, tensor: Any) -> Node:
        """Return the node of a Tensor that is nobody's result."""
        node = cls.__new__(cls)
        node.op = node.args = node.out = None
        node.parents = ()
        node.shape, node.dtype = tensor.data.shape, tensor.data.dtype
        node.tensor = weakref.ref(tensor)
        return node

    @property
    def freed(self) -> bool:
        """Whether a walk has passed here and dropped the arrays."""
        return self.op is not None and self.args is None

    def free(self) -> None:
        """Drop the arrays; a later walk through this node raises."""
        self.args = self.out = None
        self.parents = ()

    def read(self) -> tuple[Any, Any]:
        """Return (args, out), what a gradient may read; raise GraphError if a walk has dropped them."""
        args, out = self.args, self.out
        # asked last, because another thread may walk through this node too, and drop them meanwhile
        if self.args is None:
            raise GraphError(
                f"backward reached a result of {self.op.name} whose graph is already freed",
                "run the forward pass again, add the losses up before one backward, "
                "or use grad(..., create_graph=True), which keeps the graph",
            )
        return args, out


_no_tensor = lambda: None
_HERE = contextlib.nullcontext()


# ---- the walk back ---------------------------------------------------------------------------------------------------


def propagate(
    root: Node,
    cotangent: Any,
    wanted: set[Node] | None = None,
    wrap: Callable[[Array, Node | None], Any] | None = None,
    slots: Mapping[Node, Slot] | None = None,
) -> Iterator[tuple[Node, Any]]:
    """Walk from ``root`` to its leaves and yield (node, gradient) for every leaf, or for every ``wanted`` node.

    A leaf is yielded each time a part of it is known, so that the caller can add it up at once and none has to wait,
    unless a twin has put it in the leaf's slot; any other node is yielded once. Yielded arrays may be views of others.

    Without ``wrap`` gradients are raw arrays and each node is freed when it is done. With ``wrap`` (array, node →
    Tensor) the gradients run on Tensors, are themselves recorded, and the graph stays.
    """
    if root.op is None:
        yield root, cotangent
        return
    alive = None if wanted is None else _above(_from_root(root), wanted)
    grads: dict[Node, Any] = {root: cotangent}
    ours: set[Node] = set()  # nodes whose sum so far is an array made here, to be added to in place
    waiting = [(-root.age, root)]  # a heap, the youngest node first: all that was made of it is then done
    while waiting:
        _, node = heapq.heappop(waiting)
        grad = grads.pop(node)
        if wanted is not None and node in wanted:
            yield node, grad
        op, parents = node.op, node.parents
        if node.freed:
            node.read()  # raises; a freed node has no parents, and would be passed over as one that is not needed
        needs = tuple([p is not None and (alive is None or p in alive) for p in parents])
        if alive is not None and not any(needs):
            continue
        needs = needs if slots is None else places(parents, needs, slots, grads)
        # what a gradient makes must be made where its arrays are; a Tensor's operations see to that themselves
        with _HERE if type(grad) is np.ndarray else on_device_of(grad):
            results = op.gradient(node, grad, needs, wrap)
            if wrap is None:
                node.free()
            del grad
            for parent, needed, part in zip(parents, needs, results, strict=True):
                if not needed or parent is None or type(part) is Slot:
                    continue
                if type(part) is Total:
                    grads[parent] = _fitting(part.array, parent, op)
                    ours.discard(parent)
                    continue
                if part.shape != parent.shape or part.dtype is not parent.dtype:
                    part = _fitting(part, parent, op)
                if parent.op is None:
                    yield parent, part
                elif (so_far := grads.get(parent)) is None:
                    grads[parent] = part
                    heapq.heappush(waiting, (-parent.age, parent))
                elif parent in ours:
                    so_far += part
                else:
                    grads[parent] = so_far + part
                    if wrap is None and part.ndim:  # NumPy's sum of two 0-d arrays is no array
                        ours.add(parent)


def _fitting(part: Any, parent: Node, op: Any) -> Any:
    """Return a gradient summed over what was broadcast; raise if it does not fit its input then."""
    part = rounded(unbroadcast(part, parent.shape), parent.dtype)
    if part.shape != parent.shape or part.dtype != parent.dtype:
        raise GraphError(
            f"a gradient of {op.name} is {part.dtype}{part.shape}, its input is {parent.dtype}{parent.shape}",
            "mend the operation's gradient; Python scalars keep float32 as it is, NumPy scalars do not",
        )
    return part


def _from_root(root: Node) -> list[Node]:
    """Return the recorded nodes that ``root`` was made from, latest first: each comes before its parents."""
    seen = {root}
    stack = [root]
    while stack:
        for parent in stack.pop().parents:
            if parent is not None and parent.op is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=_age, reverse=True)


def _above(order: list[Node], wanted: set[Node]) -> set[Node]:
    """Return the nodes from which a wanted node can be reached, or could before they were freed."""
    alive = set(wanted)
    for node in reversed(order):
        if node.freed or any(p in alive for p in node.parents):
            alive.add(node)
    return alive
