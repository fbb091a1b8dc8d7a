"""Module: parameters and layers, found by looking at an object's attributes."""

from __future__ import annotations

import contextlib
import itertools
import reprlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from minivit.autograd.graph import Node
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, device_of, is_floating, on_device_of, to_device, to_numpy
from minivit.errors import CheckpointError, DTypeError
from minivit.ops.convert import device_or_dtype


class Parameter(Tensor):
    """A Tensor that a Module learns: it requires a gradient.

    It says what it is, so that whoever trains it needs no names. The layer or model that makes it sets:

    - ``decays``: whether weight decay pulls it to 0. Unless told, it does if there is more than one axis: biases and
      norms have one;
    - ``layer``: the number of its layer, counted from the input, for rates that fall from layer to layer
      (:func:`minivit.train.parameters.layer_scales`); None if it belongs to none;
    - ``matrices``: how many hidden matrices are stacked along its first axis, for :class:`minivit.train.muon.Muon`;
      0 if it is no hidden matrix.

    Copies and pickles keep them, and so does :meth:`Module.to`.
    """

    __slots__ = ("decays", "layer", "matrices")

    def __init__(self, data: Array, decays: bool | None = None, layer: int | None = None, matrices: int = 0) -> None:
        super().__init__(data)
        self.requires_grad = True
        self.decays = self.ndim > 1 if decays is None else decays
        self.layer, self.matrices = layer, matrices

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), (self.decays, self.layer, self.matrices)

    def __setstate__(self, state: tuple[bool, int | None, int]) -> None:
        self.decays, self.layer, self.matrices = state


class Constant(Tensor):
    """A Tensor that a Module computes with and does not learn, such as fixed positions.

    :meth:`Module.to` moves and converts it as it does parameters. It follows from the settings: no state holds it.
    """

    __slots__ = ()


class RowSize(NamedTuple):
    """What one row of a batch makes a model work on and keep: see :meth:`Module.row_size`."""

    numbers: int  # of a row's activations between two layers: tokens · dim
    layers: int  # that keep some of them for the backward pass


class Watch(NamedTuple):
    """Who is told of the modules that run: see :func:`watching`."""

    paths: Mapping[int, str]  # by the module's id
    after: Callable[[str, Any], None]
    before: Callable[[str], None] | None


class _Pass(threading.local):
    mode: bool | Mapping[int, bool] | None = None  # of all modules, or by a module's id; None: as each was set
    watches: tuple[Watch, ...] = ()


_pass = _Pass()
"""What holds for the passes of this thread only; other threads may use the same model in another way meanwhile."""


class Module:
    """Base of layers and models: assign Parameters and Modules as attributes, write ``forward``.

    They may also be in lists, tuples and dicts. A parameter's name is the path to it: ``blocks.0.attn.qkv.weight``,
    ``heads.digits.bias``. ``training`` says whether dropout acts: :meth:`train` and :meth:`eval` set it on a module and
    all below it, ``module.training = …`` on that one. :func:`mode` puts another in its place for a thread's passes and
    changes nothing on the module: so :func:`minivit.predict_logits` works in eval mode, and :class:`minivit.TrainStep`
    in training mode, however the model is set.
    """

    _training = True

    @property
    def training(self) -> bool:
        """Whether dropout acts: as :func:`mode` says in this thread, or else as it was set on this module."""
        mode = _pass.mode
        if mode is None:
            return self._training
        return mode if isinstance(mode, bool) else mode.get(id(self), self._training)

    @training.setter
    def training(self, value: bool) -> None:
        self._training = bool(value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; subclasses write it."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``."""
        if not _pass.watches:
            return self.forward(*args, **kwargs)
        watches = [(watch, watch.paths[id(self)]) for watch in _pass.watches if id(self) in watch.paths]
        for watch, path in watches:
            if watch.before is not None:
                watch.before(path)
        out = self.forward(*args, **kwargs)
        for watch, path in reversed(watches):
            watch.after(path, out)
        return out

    # ---- what it holds ----

    def children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for each direct submodule."""
        return ((name, value) for name, value in _members(vars(self)) if isinstance(value, Module))

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """Yield (path, module) for this module and all below it, each module once, by the first path to it."""
        seen: set[int] = set()

        def walk(path: str, module: Module) -> Iterator[tuple[str, Module]]:
            if id(module) not in seen:
                seen.add(id(module))
                yield path, module
                for name, child in module.children():
                    yield from walk(f"{path}.{name}" if path else name, child)

        return walk("", self)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Yield (path, parameter), each parameter once."""
        seen: set[int] = set()
        for path, module in self.named_modules():
            for name, value in _members(vars(module)):
                if isinstance(value, Parameter) and id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{name}" if path else name), value

    def parameters(self) -> Iterator[Parameter]:
        """Yield each parameter once."""
        for _, p in self.named_parameters():
            yield p

    def constants(self) -> Iterator[Constant]:
        """Yield what it computes with and does not learn; one that several modules hold comes from each."""
        for _, module in self.named_modules():
            yield from (value for _, value in _members(vars(module)) if isinstance(value, Constant))

    def num_parameters(self) -> int:
        """Return the number of learned numbers."""
        return sum(p.size for p in self.parameters())

    # ---- what it looks like ----

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of a layer besides its parts, such as sizes; if "", its parameters."""
        return ""

    def __repr__(self) -> str:
        return f"{self._tree()}\n{self.num_parameters():,} parameters"

    @reprlib.recursive_repr("…")  # a module may hold the one that holds it
    def _tree(self) -> str:
        """Return the module and, indented below it, its parts; equal ones that follow each other in a list as one."""
        extra = self.extra_repr()
        parts: list[tuple[str, str]] = []
        if not extra:
            own = [(name, p) for name, p in _members(vars(self)) if isinstance(p, Parameter)]
            parts = [(name, f"Parameter({shape_text(p.shape)})") for name, p in own]
        parts += [(name, child._tree()) for name, child in self.children()]
        lines = [f"{type(self).__name__}({extra})" if extra else type(self).__name__]
        for (folder, text), group in itertools.groupby(parts, lambda part: (_list_of(part[0]), part[1])):
            names = [name for name, _ in group]
            if folder is None or len(names) == 1:
                found = [f"({name}): {text}" for name in names]
            else:
                found = [f"({names[0]}-{names[-1].rpartition('.')[2]}): {len(names)} × {text}"]
            lines += [line.replace("\n", "\n  ") for line in found]
        return "\n  ".join(lines)

    def row_size(self) -> RowSize | None:
        """Return how much work one row of a batch is, from which a training step's pieces get their size.

        A model whose rows are small, or very large, says it; None leaves it at what is usual.
        """
        return None

    # ---- modes ----

    def train(self, mode: bool = True) -> Self:
        """Turn training mode on (dropout acts) or off, here and in all modules below; return the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Turn training mode off; return the module."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for p in self.parameters():
            p.grad = None

    def to(self, target: Any) -> Self:
        """Move to a device (``"cuda"``) or convert to a floating dtype (``np.float64``), in place; return the module.

        Gradients are forgotten. Optimizers made before keep their state for the old arrays: make them after.
        """
        target = device_or_dtype(target)
        is_device = isinstance(target, str)
        if not (is_device or (is_floating(target) and target.kind != "c")):
            raise DTypeError(f"a module cannot hold {target}", "use np.float32 or np.float64")
        for p in itertools.chain(self.parameters(), self.constants()):
            p.data = to_device(p.data, target) if is_device else p.data.astype(target, copy=False)
            p.grad = None
            p.node = Node.leaf(p) if p.requires_grad else None
        return self

    # ---- state ----

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of every parameter as a NumPy array, by name."""
        return {name: np.array(to_numpy(p.data)) for name, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy arrays into the parameters, converted to their dtype and device; nothing is changed if one does not fit.

        ``strict`` asks for the very same names; without it, names on one side only are passed over.
        """
        self.check_state_dict(state, strict)
        for name, p in self.named_parameters():
            if name in state:
                with on_device_of(p.data):
                    p.data[...] = to_device(np.asarray(state[name], p.dtype), device_of(p.data))

    def take_state_dict(self, state: dict[str, Any]) -> None:
        """Do as :meth:`load_state_dict`, where nobody else holds the arrays: they become the parameters, and no copies.

        It is for a model that has just been made: an optimizer would keep the parameters that were.
        """
        self.check_state_dict(state, strict=True)
        for name, p in self.named_parameters():
            p.data = to_device(np.ascontiguousarray(state.pop(name), p.dtype), device_of(p.data))
            p.node = Node.leaf(p) if p.requires_grad else None

    def check_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Raise CheckpointError, with the names, for arrays that do not fit."""
        own = dict(self.named_parameters())
        wrong = [
            f"{name}: {tuple(np.shape(state[name]))} in the state, {p.shape} in the model"
            for name, p in own.items()
            if name in state and tuple(np.shape(state[name])) != p.shape
        ]
        if strict:
            wrong += [f"{name}: missing in the state" for name in own if name not in state]
            wrong += [f"{name}: not in the model" for name in state if name not in own]
        if wrong:
            shown = "\n  ".join(wrong[:12] + ([f"… and {len(wrong) - 12} more"] if len(wrong) > 12 else []))
            raise CheckpointError(
                f"the state does not fit this {type(self).__name__}:\n  {shown}",
                "build the model with the settings that the state was saved with",
            )


def set_layer(layer: int, *parts: Module | Tensor | None) -> None:
    """Let every parameter of the parts say that it belongs to ``layer``."""
    for part in parts:
        for p in part.parameters() if isinstance(part, Module) else [part]:
            if isinstance(p, Parameter):
                p.layer = layer


def _members(named: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of a mapping, and in the place of a list, tuple or dict its own: ``list.0``, ``dict.key``."""
    for name, value in named.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", item) for inner, item in _members(value))
        else:
            yield name, value


def _list_of(name: str) -> str | None:
    """Return the path of the list that ``list.0`` is in; None if it is in none."""
    path, _, place = name.rpartition(".")
    return path if path and place.isdecimal() else None


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as text: ``64 × 192``."""
    return " × ".join(map(str, shape)) or "one number"


@contextlib.contextmanager
def mode(training: bool | Mapping[int, bool] | None) -> Iterator[None]:
    """Let modules be in training mode (True) or eval mode (False) for this thread's passes in this block.

    A mapping says it by the module's id; None leaves each as it was set. Nothing is written on the modules: other
    threads may use them in another mode at the same time.
    """
    before, _pass.mode = _pass.mode, training
    try:
        yield
    finally:
        _pass.mode = before


@contextlib.contextmanager
def watching(
    model: Module, after: Callable[[str, Any], None], before: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Call ``after(path, output)`` whenever this thread has run a module of ``model`` in this block, innermost first.

    ``before(path)`` is called as it begins. Blocks may be nested; each is told of its own model's modules.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    outer, _pass.watches = _pass.watches, (*_pass.watches, Watch(paths, after, before))
    try:
        yield
    finally:
        _pass.watches = outer


def is_watched() -> bool:
    """Tell whether somebody is told of the modules that this thread runs."""
    return bool(_pass.watches)
