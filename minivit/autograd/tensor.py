"""Tensor: an array and its place in the graph. Its arithmetic is attached by :mod:`minivit.ops`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, propagate, recording
from minivit.backend import Array, array_module, device_of, is_array, is_floating, on_device_of, to_device, to_numpy
from minivit.errors import DTypeError, GraphError, ShapeError

_adding = threading.Lock()  # held while a part is added to a leaf's gradient: threads may share the leaf
if hasattr(os, "register_at_fork"):  # a child has no other threads: nobody there would release it
    os.register_at_fork(before=_adding.acquire, after_in_parent=_adding.release, after_in_child=_adding.release)


class Tensor:
    """An array that can be differentiated through.

    ``data`` is the NumPy or CuPy array, ``grad`` an array of the same shape and dtype once ``backward`` has reached
    this Tensor, else None. Make one with :func:`tensor`.

    While it is recorded NumPy's functions refuse it, because their results have no graph; ``float(x)`` and whatever
    asks for one number (``math.exp(x)``, ``array[0] = x``), ``x.item()``, ``x.numpy()`` and ``x.data`` read the values.
    """

    __slots__ = ("__weakref__", "data", "grad", "node")

    def __init__(self, data: Array, node: Node | None = None) -> None:
        self.data = data
        self.grad: Array | None = None
        self.node = node

    # ---- what it is ----

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def dtype(self) -> Any:
        """The array's NumPy dtype."""
        return self.data.dtype

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return device_of(self.data)

    @property
    def requires_grad(self) -> bool:
        """Whether results computed from this Tensor are recorded; can be set on a leaf."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if not self.is_leaf:
            raise GraphError("requires_grad can be set on leaf Tensors only", "use detach() to cut a result off")
        if value and not is_floating(self.dtype):
            raise DTypeError(f"a Tensor of {self.dtype} cannot require a gradient", "convert it: x.to(np.float32)")
        if value != self.requires_grad:
            self.node = Node.leaf(self) if value else None

    @property
    def is_recorded(self) -> bool:
        """Whether an operation on this Tensor, here and now, is recorded: not under ``no_grad``."""
        return self.node is not None and recording.enabled

    @property
    def is_leaf(self) -> bool:
        """Whether it is nobody's result."""
        return self.node is None or self.node.op is None

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]  # __getitem__ is attached by minivit.ops

    def __repr__(self) -> str:
        graph = "" if self.node is None else ", requires_grad=True" if self.is_leaf else f", from {self.node.op.name}"
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"Tensor({np.array2string(to_numpy(self.data), separator=', ', prefix='Tensor(')}{device}{graph})"

    __hash__ = object.__hash__  # by identity, although == compares elements: Tensors can be keys

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how copy, deepcopy and pickle make another: with a node of its own, or gradients would go to this one."""
        if not self.is_leaf:
            raise GraphError("a result cannot be copied with its graph", "copy x.detach(), or leaves only")
        return _remade, (type(self), self.data, self.grad, self.requires_grad)

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.is_recorded:
            raise GraphError(
                f"NumPy would make a plain array of a Tensor of shape {self.shape} that is recorded: "
                "what it was computed from would get no gradient through it",
                "go on with mv.ops (mv.ops.stack joins a list of Tensors); x.numpy() reads the values, "
                "x.detach() cuts the graph on purpose",
            )
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    # ---- out of the graph ----

    def numpy(self) -> np.ndarray:
        """Return the values as a NumPy array: the array itself on the CPU, a copy from a GPU."""
        return to_numpy(self.data)

    def item(self) -> float:
        """Return the one value as a Python number."""
        if self.size != 1:
            raise ShapeError(f"item() needs one element, the shape is {self.shape}", "reduce it first, or use numpy()")
        return self.data.item()

    def detach(self) -> Tensor:
        """Return a Tensor with the same array and no graph."""
        return Tensor(self.data)

    # ---- differentiation ----

    def backward(self, grad: Any = None) -> None:
        """Add d(self·grad)/d(leaf) to ``leaf.grad`` for every leaf that requires it, and free the graph.

        ``grad`` is the cotangent, of this Tensor's shape; it may be left out for a single element.
        """
        root, cotangent = _start(self, grad)
        for node, part in propagate(root, cotangent):
            leaf = node.tensor()
            if leaf is None:
                continue  # the Tensor is gone: nobody can read its gradient
            with _adding:
                if leaf.grad is None:
                    leaf.grad = _array(part).copy()  # a view of another gradient, or of the cotangent, is not added to
                elif leaf.grad.ndim:
                    leaf.grad += part
                else:
                    leaf.grad = _array(leaf.grad + part)


def _remade(kind: type[Tensor], data: Array, grad: Array | None, requires_grad: bool) -> Tensor:
    """Return a leaf of the given class with these contents."""
    made = kind.__new__(kind)
    made.data, made.grad, made.node = data, grad, None
    made.requires_grad = requires_grad
    return made


def tensor(data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """Return a Tensor of ``data``: an array, a (nested) list, a number or a Tensor.

    A NumPy or CuPy array keeps its dtype and, unless ``dtype`` or ``device`` ask for a copy, its memory. Python floats
    become float32. Raises GraphError for a Tensor that is recorded: the new one would have no graph.
    """
    if isinstance(data, Tensor):
        if data.is_recorded:
            raise GraphError(
                f"tensor() of a Tensor of shape {data.shape} that is recorded would cut its graph",
                "use the Tensor itself, x.to(...) for another dtype or device, or x.detach() to cut it on purpose",
            )
        data = data.data
    if not (is_array(data) or isinstance(data, np.generic)):
        try:
            data = np.asarray(data)
        except ValueError as error:
            raise ShapeError(f"tensor: {error}", "give rows of equal length") from None
        if data.dtype == np.float64 and dtype is None:
            data = data.astype(np.float32)
    data = np.asarray(data) if isinstance(data, np.generic) else data
    if not (data.dtype.kind in "iub" or is_floating(data.dtype)):
        raise DTypeError(f"a Tensor cannot hold {data.dtype}", "give numbers")
    if dtype is not None:
        data = data.astype(dtype, copy=False)
    if device is not None:
        data = to_device(data, device)
    result = Tensor(data)
    if requires_grad:
        result.requires_grad = True
    return result


def grad(
    output: Tensor,
    inputs: Sequence[Tensor],
    grad_output: Any = None,
    create_graph: bool = False,
    allow_unused: bool = False,
) -> tuple[Any, ...]:
    """Return d(output·grad_output)/d(input) for each input, as Tensors; ``.grad`` fields stay as they are.

    With ``create_graph=True`` the gradients are themselves recorded, to be differentiated again, and the graph of
    ``output`` is kept; otherwise it is freed. Raises GraphError for an input that ``output`` was not computed from;
    with ``allow_unused=True`` such an input gets None.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.node is None:
            raise GraphError(
                f"grad: input {i} of shape {np.shape(x)} does not require a gradient",
                "make it with requires_grad=True, before the output is computed",
            )
    root, cotangent = _start(output, grad_output, wrap=create_graph)
    wanted = {x.node for x in inputs if x.node is not None}
    sums: dict[Node, Any] = {}
    for node, part in propagate(root, cotangent, wanted, Tensor if create_graph else None):
        sums[node] = sums[node] + part if node in sums else part
    results = []
    for i, x in enumerate(inputs):
        part = sums.get(x.node) if x.node is not None else None
        if part is None and not allow_unused:
            raise GraphError(
                f"grad: the output was not computed from input {i} of shape {x.shape}",
                "ask for Tensors of the very forward pass that gave the output (another pass makes others), "
                "or pass allow_unused=True to get None for it",
            )
        # a copy: gradients may be views of each other
        results.append(part if part is None or isinstance(part, Tensor) else Tensor(_array(part).copy()))
    return tuple(results)


def grad_or_zeros(
    output: Tensor, inputs: Sequence[Tensor], grad_output: Any = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return :func:`grad`'s gradients, and zeros for an input that the output was not computed from."""
    results = []
    for x, g in zip(inputs, grad(output, inputs, grad_output, create_graph, allow_unused=True), strict=True):
        with on_device_of(x.data):
            results.append(Tensor(array_module(x.data).zeros(x.shape, x.dtype)) if g is None else g)
    return tuple(results)


def _start(output: Tensor, cotangent: Any, wrap: bool = False) -> tuple[Node, Any]:
    """Return the root node and the checked cotangent, raw or (``wrap``) as a Tensor."""
    if not isinstance(output, Tensor) or output.node is None:
        raise GraphError(
            "this result has no graph: nothing it was computed from requires a gradient"
            + ("" if recording.enabled else ", or it was computed under no_grad"),
            "make an input with requires_grad=True before the forward pass",
        )
    if cotangent is None:
        if output.size != 1:
            raise ShapeError(
                f"backward of a Tensor of shape {output.shape} needs a cotangent of that shape",
                "pass grad=, or reduce to one number first: .sum() or .mean()",
            )
        with on_device_of(output.data):
            cotangent = array_module(output.data).ones(output.shape, output.dtype)
    if not isinstance(cotangent, Tensor):
        # a Python number or list takes the output's dtype; arrays must already have it
        array = cotangent if is_array(cotangent) else np.asarray(cotangent, output.dtype)
        cotangent = Tensor(array if is_array(cotangent) else to_device(array, output.device))
    if cotangent.shape != output.shape:
        raise ShapeError(f"the cotangent has shape {cotangent.shape}, the output {output.shape}", "give equal shapes")
    if cotangent.dtype != output.dtype:
        raise DTypeError(f"the cotangent is {cotangent.dtype}, the output {output.dtype}", "convert the cotangent")
    return output.node, cotangent if wrap else cotangent.data


def _array(x: Any) -> Array:
    """NumPy's arithmetic on 0-d arrays gives scalars: make them arrays again."""
    return np.asarray(x) if isinstance(x, np.generic) else x
