"""What a run is made of, as plain values: a checkpoint keeps them, and a run that is resumed is held against them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from minivit.data.dataset import Dataset
from minivit.errors import shortened


def settings_of(x: Any, *left_out: str) -> dict[str, Any]:
    """Return the ``kind`` of an object, and the values it has for what its constructor takes, but for ``left_out``.

    So a new setting of an optimizer, a loader or an augmentation counts from the day it is there.
    """
    try:
        names = [name for name in inspect.signature(type(x)).parameters if name not in left_out and hasattr(x, name)]
    except ValueError:  # of a type that is not written in Python
        names = []
    return {"kind": type(x).__name__} | {name: plain(getattr(x, name)) for name in names}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers and texts as they are, other objects by :func:`settings_of`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Dataset):
        return value.fingerprint
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, partial):
        return {"function": plain(value.func), "args": plain(value.args), "keywords": plain(value.keywords)}
    if inspect.isroutine(value) or isinstance(value, type):
        return value.__name__
    return settings_of(value)


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Return "name: before → now" for each value that differs between two that :func:`plain` gave.

    Settings that only one of two objects of a kind has are passed over: they came or went with a version.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(before | now)
        if "kind" in before and before["kind"] == now.get("kind"):
            keys = [key for key in before if key in now]
        elif "kind" in before or "kind" in now:
            keys = ["kind"]
        found: list[str] = []
        for key in keys:
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if before == now else [f"{name}: {shortened(str(before), 60)} → {shortened(str(now), 60)}"]
