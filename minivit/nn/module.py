"""Module: parameters and layers, found by looking at an object's attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from minivit.autograd.graph import Node
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, device_of, to_device, to_numpy
from minivit.errors import CheckpointError, DTypeError
from minivit.ops.convert import device_or_dtype


class Parameter(Tensor):
    """A Tensor that a Module learns: it requires a gradient."""

    __slots__ = ()

    def __init__(self, data: Array) -> None:
        super().__init__(data)
        self.requires_grad = True


class Module:
    """Base of layers and models: assign Parameters and Modules as attributes, write ``forward``.

    They may also be in lists, tuples and dicts. A parameter's name is the path to it: ``blocks.0.attn.qkv.weight``,
    ``heads.digits.bias``. ``training`` says whether dropout acts.
    """

    training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output; subclasses write it."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``forward``."""
        return self.forward(*args, **kwargs)

    # ---- what it holds ----

    def children(self) -> Iterator[tuple[str, Module]]:
        """Yield (name, module) for each direct submodule."""
        return ((name, value) for name, value in _members(vars(self)) if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """Yield (path, module) for this module and all below it."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

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

    def num_parameters(self) -> int:
        """Return the number of learned numbers."""
        return sum(p.size for p in self.parameters())

    # ---- modes ----

    def train(self, mode: bool = True) -> Self:
        """Turn training mode on (dropout acts) or off; return the module."""
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
        if not is_device and target.kind != "f":
            raise DTypeError(f"a module cannot hold {target}", "use np.float32 or np.float64")
        for p in self.parameters():
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
        for name, p in own.items():
            if name in state:
                p.data[...] = to_device(np.asarray(state[name], p.dtype), device_of(p.data))


def _members(named: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of a mapping, and in the place of a list, tuple or dict its own: ``list.0``, ``dict.key``."""
    for name, value in named.items():
        if isinstance(value, (list, tuple)):
            value = dict(enumerate(value))
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", item) for inner, item in _members(value))
        else:
            yield name, value


@contextlib.contextmanager
def watching(
    model: Module, after: Callable[[str, Any], None], before: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Call ``after(path, output)`` whenever a module of ``model`` has run in this block, innermost first.

    ``before(path)`` is called as it begins.
    """

    def watch(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(path)
            out = forward(*args, **kwargs)
            after(path, out)
            return out

        return watched

    modules = list(model.named_modules())
    try:
        for path, module in modules:
            vars(module)["forward"] = watch(path, module.forward)
        yield
    finally:
        for _, module in modules:
            vars(module).pop("forward", None)
