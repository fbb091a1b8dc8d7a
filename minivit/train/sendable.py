"""What of a training step can be told to another process: a model by its settings, and a loss by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.tensor import Tensor
from minivit.models import Model, build, model_outline
from minivit.nn.module import Module

LOSSES: Mapping[str, Callable[..., Any]] = {"cross_entropy": ops.cross_entropy}
"""The losses that have a name, by which another process knows them."""

_OF_THE_OUTSIDE = {"_training", "preparation", "class_names"}  # no pass through a model reads these of its vars


def description(model: Module, loss: Callable[..., Any]) -> dict[str, Any]:
    """Return what :func:`made` makes the same model and loss of, for JSON; raise ValueError, with why, if it cannot."""
    if not isinstance(model, Model) or not type(model).__module__.startswith("minivit."):
        raise ValueError(f"{type(model).__name__} is a model of your own")
    settings = asdict(model.settings)
    if foreign := next((m for _, m in model.named_modules() if not type(m).__module__.startswith("minivit.")), None):
        raise ValueError(f"{type(foreign).__name__} is a module of your own")
    if difference := _difference(model, model_outline(model.kind, settings), "", set()):
        raise ValueError(f"the model's {difference} is not as its settings make it")
    keywords: dict[str, Any] = {}
    if isinstance(loss, partial) and not loss.args:
        keywords, loss = loss.keywords, loss.func
    name = next((name for name, known in LOSSES.items() if known is loss), None)
    if name is None or not all(isinstance(value, bool | int | float | str) for value in keywords.values()):
        raise ValueError(f"{getattr(loss, '__name__', type(loss).__name__)} is a loss of your own")
    return {"kind": model.kind, "settings": settings, "loss": name, "keywords": dict(keywords)}


def made(description: Mapping[str, Any]) -> tuple[Model, Callable[..., Any]]:
    """Return a freshly initialised model, and the loss, of a :func:`description`."""
    model = build(description["kind"], description["settings"])
    return model, partial(LOSSES[description["loss"]], **description["keywords"])


def _difference(a: Any, b: Any, path: str, seen: set[int]) -> str:
    """Return the path of the first thing in which two modules differ, but for their numbers; "" if there is none."""
    if type(a) is not type(b):
        return path or type(a).__name__
    if isinstance(a, Tensor):
        return "" if a.shape == b.shape else path
    if isinstance(a, Module):
        if id(a) in seen:
            return ""
        seen.add(id(a))
        ours, theirs = ({k: v for k, v in vars(m).items() if k not in _OF_THE_OUTSIDE} for m in (a, b))
        return _difference(ours, theirs, path, seen)
    if isinstance(a, dict):
        names = [k for k in (*a, *b) if k not in a or k not in b]
        where = [f"{path}.{k}".removeprefix(".") for k in (names or a)]
        return where[0] if names else _first(a.values(), b.values(), where, seen)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return path
        return _first(a, b, [f"{path}.{i}" for i in range(len(a))], seen)
    if isinstance(a, partial):
        return _difference((a.func, a.args, a.keywords), (b.func, b.args, b.keywords), path, seen)
    if isinstance(a, np.ndarray):
        return "" if np.array_equal(a, b) else path
    return "" if a is b or a == b else path


def _first(a: Any, b: Any, paths: Any, seen: set[int]) -> str:
    found = (_difference(x, y, path, seen) for x, y, path in zip(a, b, paths, strict=True))
    return next(filter(None, found), "")
