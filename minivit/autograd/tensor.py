"""Tensor: an array and its place in the graph. Its arithmetic is attached by :mod:`minivit.ops`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, propagate, recording
from minivit.backend import Array, array_module, device_of, is_array, on_device_of, to_device, to_numpy
from minivit.errors import DTypeError, GraphError, ShapeError


class Tensor:
    """An array that can be differentiated through.

    ``data`` is the NumPy or CuPy array, ``grad`` an array of the same shape and dtype once ``backward`` has reached
    this Tensor, else None. Make one with :func:`tensor`.
    """

    __slots__ = ("__weakref__", "data", "grad", "node")
    __array_ufunc__ = None  # NumPy's operators then leave `array + tensor` to Tensor.__radd__
    __array_priority__ = 1000  # CuPy's likewise

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
        if value and self.dtype.kind not in "fc":
            raise DTypeError(f"a Tensor of {self.dtype} cannot require a gradient", "convert it: x.to(np.float32)")
        if value != self.requires_grad:
            self.node = Node.leaf(self) if value else None

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

    def __bool__(self) -> bool:
        return bool(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
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
            if leaf.grad is None:
                leaf.grad = _array(part).copy()  # a view of another gradient, or of the cotangent, must not be added to
            elif leaf.grad.ndim:
                leaf.grad += part
            else:
                leaf.grad = _array(leaf.grad + part)


def tensor(data: Any, dtype: Any = None, device: str | None = None, requires_grad: bool = False) -> Tensor:
    """Return a Tensor of ``data``: an array, a (nested) list, a number or a Tensor.

    A NumPy or CuPy array keeps its dtype and, unless ``dtype`` or ``device`` ask for a copy, its memory. Python floats
    become float32.
    """
    if isinstance(data, Tensor):
        data = data.data
    if not (is_array(data) or isinstance(data, np.generic)):
        try:
            data = np.asarray(data)
        except ValueError as error:
            raise ShapeError(f"tensor: {error}", "give rows of equal length") from None
        if data.dtype == np.float64 and dtype is None:
            data = data.astype(np.float32)
    data = np.asarray(data) if isinstance(data, np.generic) else data
    if data.dtype.kind not in "fiubc":
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
    output: Tensor, inputs: Sequence[Tensor], grad_output: Any = None, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return d(output·grad_output)/d(input) for each input, as Tensors; ``.grad`` fields stay as they are.

    An input that the output does not depend on gets zeros. With ``create_graph=True`` the gradients are themselves
    recorded, to be differentiated again, and the graph of ``output`` is kept; otherwise it is freed.
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
    for x in inputs:
        part = sums.get(x.node) if x.node is not None else None
        if part is None:
            with on_device_of(x.data):
                part = array_module(x.data).zeros(x.shape, x.dtype)
        # a copy: gradients may be views of each other
        results.append(part if isinstance(part, Tensor) else Tensor(_array(part).copy()))
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
