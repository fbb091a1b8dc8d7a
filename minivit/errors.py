"""Typed errors. Each says what happened and where, and carries a remedy: what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MinivitError(Exception):
    """Base of every error that minivit raises on purpose: ``str(error)`` is what happened, then the remedy."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  → {self.remedy}" if self.remedy else self.what


class ShapeError(MinivitError, ValueError):
    """Shapes that do not fit each other, or an axis that does not exist."""


class DTypeError(MinivitError, TypeError):
    """Mixed or unusable dtypes."""


class DeviceError(MinivitError, RuntimeError):
    """Arrays on different devices, or a device that is not there."""


class GraphError(MinivitError, RuntimeError):
    """Differentiation asked for where there is no graph, or no longer one."""


class GradientError(MinivitError, AssertionError):
    """A gradient that a check has shown to be wrong."""


class UndecidedError(MinivitError, ArithmeticError):
    """Rounding hides whether a gradient is right."""


class NonFiniteError(MinivitError, ArithmeticError):
    """NaN or infinity where a finite number is needed."""


class ConfigError(MinivitError, ValueError):
    """A setting, argument or name that cannot be used."""


class DataError(MinivitError, ValueError):
    """Images or labels that cannot be used, or a file that cannot be read as data."""


class CheckpointError(MinivitError, ValueError):
    """A checkpoint that is missing, damaged or belongs to another model."""


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[MinivitError] = ConfigError) -> MinivitError:
    """Return an error for an unknown ``name``, with the nearest known ones: "did you mean …?"."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return error(f"unknown {kind} {name!r}", remedy)
