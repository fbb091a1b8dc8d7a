"""Op: a function of arrays with its gradient, made differentiable.

    @op(save=("out",))                       # all that the gradient may read, besides shapes and dtypes
    def exp(x: Array) -> Array:              # raw arrays; `Array` marks the differentiable inputs
        return array_module(x).exp(x)

    exp.vjps(lambda g, out, x: g * out)      # in public operations: runs on arrays, and on Tensors for second order

Called with plain arrays an Op runs its function and no more; called with a Tensor among its arguments it records.
What can be set on one:

    forward    (*arguments) → out                             the function itself, on raw arrays
    .vjp       (g, out, *arguments, needs) → one per input    the gradient, where inputs share work
    .vjps      (g, out, *arguments) → one, for each input     the gradient, an input at a time, where they do not
    .composed  (*arguments) → out                             the same of simpler operations: what tests compare with
    .changes_dtype    True or False (usual)                   whether a result may have another dtype than the inputs
    .twin("cpu")      (*arguments) → (out, kept)              a faster forward on NumPy arrays, under first_order()
    .twin("cpu").vjp  (g, kept, needs) → one per input        and its gradient, on raw arrays
    .twin("cuda"), .twin("cuda").vjp                          the same on CuPy arrays

g is the cotangent: the gradient that reaches the output. Every operation needs a vjp or vjps; the rest is extra. A twin
for CUDA that has no kernel for its arguments returns NotImplemented, and the plain operation runs. ``needs`` says which
inputs want a gradient; to a twin's vjp an entry may also be a place to put it in (autograd/needs.py).
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from numbers import Number
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, Unsaved, recording
from minivit.autograd.needs import rounded
from minivit.autograd.tensor import Tensor
from minivit.autograd.twin import KINDS, Twin
from minivit.backend import Array, device_of, is_array, is_floating, on_device_of, spelled
from minivit.backend.planning import is_on_gpu
from minivit.errors import ConfigError, DeviceError, DTypeError, GraphError, MinivitError, ShapeError

_INPUTS_REMEDY = "give Tensors, arrays or numbers; of a list make an array: np.asarray(x, np.float32)"

OPS: dict[str, Op] = {}
"""Every operation: minivit's by their names (the test suite's table must have a row for each), others, whose names are
their authors' business, by module and name: ``"__main__.rms_norm"``."""


class Op:
    """A differentiable operation. Arguments follow the forward function's signature."""

    def __init__(self, forward: Callable[..., Any], save: Sequence[str]) -> None:
        functools.update_wrapper(self, forward)
        parameters = list(inspect.signature(forward).parameters.values())
        self.forward = forward
        self.name = forward.__name__.lstrip("_")  # _concat(axis, *arrays) is behind concat(arrays, axis)
        self.home = f"{forward.__module__}.{forward.__qualname__}"
        self.names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        self.defaults = tuple(p.default for p in parameters if p.kind is not p.VAR_POSITIONAL)
        self.inputs = [
            i for i, p in enumerate(parameters) if "Array" in str(p.annotation) and p.kind is not p.VAR_POSITIONAL
        ]
        self.settings = [i for i in range(len(self.names)) if i not in self.inputs]  # what is not differentiated
        # def f(setting, *arrays: Array): everything from there on is an input
        self.variadic = len(self.names) if parameters[-1].kind is inspect.Parameter.VAR_POSITIONAL else None
        self.save = frozenset(save)
        self.saves_out = "out" in self.save
        self.changes_dtype = False
        self.reference: Callable[..., Any] | None = None
        self._vjp: Callable[..., Any] | None = None
        self._vjps: tuple[Callable[..., Any], ...] = ()
        self.twins: dict[str, Twin] = {}
        if not self.inputs and self.variadic is None:
            remedy = "annotate its inputs: x: Array, with Array of minivit.backend"
            raise ConfigError(f"op {self.name} has no differentiable input", remedy)
        unknown = self.save - set(self.names) - {"out"}
        if unknown:
            raise ConfigError(f"op {self.name}: save names {sorted(unknown)}", f"its arguments are {self.names}")
        self._register()

    def _register(self) -> None:
        """Enter the operation in ``OPS``. The same function defined again (a notebook's cell, a reload) replaces it."""
        name = self.name if self.home.startswith("minivit.") else self.home
        if (before := OPS.get(name, self)).home != self.home:
            raise ConfigError(f"op {name} is there twice: {before.home}, {self.home}", "give one another name")
        OPS[name] = self

    # ---- defining ----

    def vjp(self, gradient: Callable[..., Any]) -> Callable[..., Any]:
        """Set the gradient: ``gradient(g, out, *arguments, needs=...)`` → a gradient (or None) for each input.

        ``needs`` says which inputs want one. A gradient of the broadcast shape is fine: the engine sums it.
        """
        self._vjp = gradient
        return gradient

    def vjps(self, *gradients: Callable[..., Any]) -> None:
        """Set one gradient for each input, ``gradient(g, out, *arguments)``, called only where it is needed."""
        self._vjps = gradients

    def twin(self, kind: str) -> Twin:
        """Return the twin on one kind of arrays, ``"cpu"`` or ``"cuda"``: its decorators attach the functions."""
        if kind not in KINDS:
            raise ConfigError(f"{self.name}: a twin on arrays of kind {kind!r}", f"the kinds are {', '.join(KINDS)}")
        return self.twins.get(kind) or Twin(self.name, kind, self.twins)

    def composed(self, reference: Callable[..., Any]) -> Callable[..., Any]:
        """Set the same mathematics composed of simpler operations: what the tests hold a fused operation against."""
        self.reference = reference
        return reference

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Act as a method when attached to a class, as functions do."""
        return self if instance is None else types.MethodType(self, instance)

    def __reduce__(self) -> str:
        return self.forward.__qualname__  # as a function: copies are the operation itself, pickle looks up its name

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    # ---- running ----

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward function; with a Tensor among the arguments, return a Tensor and record."""
        if kwargs or len(args) < len(self.names):
            args = self._bind(args, kwargs)
        elif self.variadic is None and len(args) > len(self.names):
            raise ConfigError(f"{self.name} takes {len(self.names)} arguments, got {len(args)}", f"{self.names}")
        arrays, plain = list(args), True
        nodes: list[Node | None] = [None] * len(args)
        for i, a in enumerate(args):
            if isinstance(a, Tensor):
                arrays[i], nodes[i], plain = a.data, a.node, False
        if not plain:
            return self._record(arrays, nodes)
        first = next((a for a in args if is_array(a)), None)
        if first is None or isinstance(first, np.ndarray):
            return self._run(self.forward, args)
        with on_device_of(first):
            return self._run(self.forward, args)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        values = list(args) + list(self.defaults[len(args) :])
        for name, value in kwargs.items():
            if name not in self.names:
                raise ConfigError(f"{self.name} has no argument {name!r}", f"its arguments are {', '.join(self.names)}")
            if self.names.index(name) < len(args):
                raise ConfigError(f"{self.name} got {name!r} twice", "give it once")
            values[self.names.index(name)] = value
        for name, value in zip(self.names, values, strict=False):
            if value is inspect.Parameter.empty:
                raise ConfigError(f"{self.name} needs {name!r}", f"its arguments are {', '.join(self.names)}")
        return tuple(values)

    def _run(self, forward: Callable[..., Any], args: Sequence[Any]) -> Any:
        try:
            return forward(*args)
        except MinivitError:
            raise
        except (ValueError, IndexError) as error:
            raise ShapeError(f"{self.name}({_described(args)}): {error}", "check the shapes and axes") from error
        except (AttributeError, TypeError) as error:
            raise DTypeError(f"{self.name}({_described(args)}): {error}", _INPUTS_REMEDY) from error

    def input_positions(self, args: Sequence[Any]) -> Sequence[int]:
        """Return the positions of the differentiable inputs among ``args``."""
        return self.inputs if self.variadic is None else [*self.inputs, *range(self.variadic, len(args))]

    def _record(self, args: list[Any], nodes: list[Node | None]) -> Tensor:
        """Run on raw arguments; record the result, unless no input has a node."""
        for i in self.settings:
            if nodes[i] is not None and recording.enabled:
                raise GraphError(
                    f"{self.name} has no gradient in {self.names[i]}, which is a Tensor that requires one",
                    f"give {self.names[i]}.detach() to hold it constant, or bring it in by a differentiable operation",
                )
        positions = self.inputs if self.variadic is None else self.input_positions(args)
        first = args[positions[0]]
        for i in positions:
            a = args[i]
            # the usual case, CPU arrays of one dtype and nothing else, is seen to quickly
            if a is not None and (type(a) is not np.ndarray or a.dtype is not first.dtype):
                self._check_alike(args, positions)
                first = next((args[i] for i in positions if is_array(args[i])), first)
                break
        twin = self._twin_for(first) if self.twins and recording.first_order else None
        forward = self.forward if twin is None else twin.forward
        if type(first) is np.ndarray:
            out = self._run(forward, args)
        else:
            with on_device_of(first):
                out = self._run(forward, args)
        if out is NotImplemented:  # the twin has no kernel for these
            with on_device_of(first):
                twin, out = None, self._run(self.forward, args)
        if twin is not None:
            out, kept = out
        if isinstance(out, np.generic):
            out = np.asarray(out)
        if (type(first) is not np.ndarray or out.dtype is not first.dtype) and is_array(first):
            out = out if self.changes_dtype else rounded(out, first.dtype)
        parents = tuple([nodes[i] for i in positions])
        if not (recording.enabled and any(parents)):
            return Tensor(out)
        if twin is not None:
            return Tensor(out, Node(twin, (kept,), parents, out))
        for i in positions:
            if (i >= len(self.names) or self.names[i] not in self.save) and is_array(args[i]):
                args[i] = Unsaved(args[i])
        return Tensor(out, Node(self, args, parents, out))

    def _twin_for(self, first: Any) -> Twin | None:
        """Return the twin for arrays of the kind of ``first``, if there is one."""
        return self.twins.get("cuda" if is_on_gpu(first) else "cpu") if is_array(first) else None

    def _check_alike(self, args: list[Any], positions: Sequence[int]) -> None:
        """Raise unless the inputs are arrays of one dtype and device, or numbers; make NumPy scalars plain numbers."""
        for i in positions:
            if isinstance(args[i], np.generic):
                args[i] = args[i].item()  # a number, not an array: it takes the Tensor's dtype
            if not (is_array(args[i]) or args[i] is None or isinstance(args[i], Number)):
                raise DTypeError(f"{self.name}: an input is a {type(args[i]).__name__}", _INPUTS_REMEDY)
        arrays = [(i, args[i]) for i in positions if is_array(args[i])]
        first: Any = arrays[0][1] if arrays else None
        for _, a in arrays[1:]:
            if a.dtype != first.dtype:
                if {a.dtype.char, first.dtype.char} == {"d", "D"}:  # a gradient check's complex step among constants
                    for j, b in arrays:
                        args[j] = b.astype("complex128")
                    return
                # a mask becomes numbers, not they a mask
                to = spelled(first.dtype if is_floating(first.dtype) else a.dtype)
                raise DTypeError(
                    f"{self.name}: {first.dtype}{first.shape} and {a.dtype}{a.shape} have different dtypes",
                    f"convert one side: .to({to}) or array.astype({to})",
                )
            if device_of(a) != device_of(first):
                raise DeviceError(
                    f"{self.name}: {first.shape} is on {device_of(first)}, {a.shape} on {device_of(a)}",
                    f"move one side: .to({device_of(first)!r})",
                )

    # ---- differentiating ----

    def gradient(self, node: Node, g: Any, needs: tuple[bool, ...], wrap: Callable[..., Any] | None) -> Sequence[Any]:
        """Return the gradient for each input of ``node``; with ``wrap`` on Tensors, re-joined to the graph."""
        parents, (args, out) = node.parents, node.read()
        if wrap is not None:
            args = list(args)
            for i, parent in zip(self.input_positions(args), parents, strict=True):
                if parent is not None and not isinstance(args[i], Unsaved):
                    args[i] = wrap(args[i], parent)
            out = wrap(out, node) if out is not None else None
        if self._vjp is None and not self._vjps:
            raise GraphError(f"{self.name} has no gradient", "detach its input, or define one with .vjp")
        if wrap is None:
            return self._differentiate(g, out, args, needs)
        try:
            results = self._differentiate(g, out, args, needs)
        except (AttributeError, TypeError, GraphError) as error:
            if isinstance(error, MinivitError) and not isinstance(error, GraphError):
                raise
            raise self._order_one(getattr(error, "what", f"{type(error).__name__}: {error}")) from error
        for result, need in zip(results, needs, strict=True):
            if need and not isinstance(result, Tensor):
                raise self._order_one(f"it returns {type(result).__name__}, not a Tensor")
        return results

    def _differentiate(self, g: Any, out: Any, args: Sequence[Any], needs: tuple[bool, ...]) -> Sequence[Any]:
        if self._vjps:
            each = self._vjps if self.variadic is None else self._vjps * len(needs)
            return [f(g, out, *args) if need else None for f, need in zip(each, needs, strict=True)]
        assert self._vjp is not None
        result = self._vjp(g, out, *args, needs=needs)
        return result if isinstance(result, (tuple, list)) else (result,)

    def _order_one(self, why: str) -> GraphError:
        return GraphError(
            f"the gradient of {self.name} cannot itself be differentiated, it is one of order 1: {why}",
            "write it in public operations (mv.ops, arithmetic of Tensors) instead of NumPy's functions; or stay at "
            "order 1: check_grads(..., order=1), grad without create_graph",
        )


def op(save: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Make a function of arrays an operation that is differentiated; a decorator, ``mv.op`` for short.

    ::

        import minivit as mv
        from minivit.backend import Array, array_module

        @mv.op(save=("x",))                  # the inputs (and "out") that the gradient reads
        def softplus(x: Array) -> Array:     # Array marks a differentiable input; NumPy's functions are fine in here
            return array_module(x).log1p(array_module(x).exp(x))

        softplus.vjps(lambda g, out, x: g * mv.ops.sigmoid(x))   # mv.ops in here: then it has a second order too

        mv.check_grads(softplus, [np.array([-1.0, 0.5])])        # proves it, orders 1 and 2

    The gradient is given by ``.vjps`` (one function of g, out and the arguments for each input) or by ``.vjp`` (one for
    all, see :meth:`Op.vjp`); g is the gradient that reaches the output. Names are free: an operation of your own may
    be called like one of ``mv.ops``. Raises ConfigError for a function without inputs or for an unknown name to save.
    """
    if callable(save):
        raise ConfigError("op stands above a function without its parentheses", "write @op() or @op(save=(...))")
    return lambda forward: Op(forward, save)


def _described(args: Sequence[Any]) -> str:
    """Return the arguments' dtypes and shapes, or types, for a message."""
    return ", ".join(f"{a.dtype}{a.shape}" if is_array(a) else type(a).__name__ for a in args)


def raw(x: Any) -> Array:
    """Return the array of a Tensor, or ``x`` itself: for masks and signs, which are constants to a gradient."""
    return x.data if isinstance(x, Tensor) else x
