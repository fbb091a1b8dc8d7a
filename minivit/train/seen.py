"""Whether the settings that some work reads are as they were when it was recorded, or told to another process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minivit.autograd.tensor import Tensor
from minivit.nn.module import Module


class Seen:
    """The settings of a model and a step at one time, which recorded work has in it as they were.

    ``settings()`` is what the work reads besides the model and the batch, by name.
    """

    def __init__(self, model: Module, settings: Callable[[], dict[str, Any]]) -> None:
        self.settings = settings
        self.modules = [(path or "the model", vars(module)) for path, module in model.named_modules()]
        self.before = self._now()
        # what is told apart by its address must not leave it to another
        self._kept = [dict(values) for _, values in self.modules], self.settings()

    def _now(self) -> list[Any]:
        return [_seen(values) for _, values in self.modules] + [_seen(self.settings())]

    def changed(self) -> str:
        """Return the name of a setting that is another now, "" if all are as they were."""
        now = self._now()
        if now == self.before:
            return ""
        paths = [*(path for path, _ in self.modules), ""]
        path, was, is_now = next(x for x in zip(paths, self.before, now, strict=True) if x[1] != x[2])
        names = [name for name, _ in set(was) ^ set(is_now)]
        return f"{path}.{names[0]}".removeprefix(".")


_PLAIN = frozenset({bool, int, float, str, type(None)})


def _seen(value: Any) -> Any:
    """Return what tells a setting from another: plain values themselves, what holds some by these, objects as such."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return id(value), id(value.data), value.node is None
    if isinstance(value, dict):
        return tuple([(name, _seen(part)) for name, part in value.items()])
    if isinstance(value, list | tuple):
        return tuple(map(_seen, value))
    if isinstance(value, partial):
        return id(value.func), _seen(value.args), _seen(value.keywords)
    return id(value)
