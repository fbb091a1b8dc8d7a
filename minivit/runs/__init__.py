"""A training run: from its settings to its results. ``mv.runs.train(data="digits", epochs=3)``.

Names are imported when they are first used, so that ``minivit train --help`` need not wait for NumPy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which type checkers know by its name, without the import
if TYPE_CHECKING:
    from typing import Any

    from minivit.runs.calls import resume, train
    from minivit.runs.run import Run
    from minivit.weights.place import find_checkpoint

_HOMES = {
    "Run": "minivit.runs.run",
    "find_checkpoint": "minivit.weights.place",
    "resume": "minivit.runs.calls",
    "train": "minivit.runs.calls",
}
"""The module that a public name comes from."""

__all__ = ["Run", "find_checkpoint", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'minivit.runs' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
