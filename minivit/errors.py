"""Typed errors. Each says what happened and where, and carries a remedy: what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class MinivitError(Exception):
    """Base of every error that minivit raises on purpose: ``str(error)`` is what happened, then the remedy."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        # a line break of minivit's own is followed by two spaces; one in a file's name must forge no line or remedy
        what, remedy = ("\n  ".join(map(printable, re.split(r"\n  (?!→)", part))) for part in (self.what, self.remedy))
        return f"{what}\n  → {remedy}" if remedy else what


class ShapeError(MinivitError, ValueError):
    """Shapes that do not fit each other, or an axis that does not exist."""


class DTypeError(MinivitError, TypeError):
    """Mixed or unusable dtypes."""


class DeviceError(MinivitError, RuntimeError):
    """Arrays on different devices, or a device that is not there."""


class KernelError(MinivitError, RuntimeError):
    """A GPU kernel that cannot be compiled, loaded or launched."""


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


class WorkerError(MinivitError, RuntimeError):
    """A process that works for this one is dead, or hung."""


class Stopped(KeyboardInterrupt):
    """A run that Ctrl-C, SIGTERM or SIGHUP has ended between two steps: it is saved, and can be continued.

    Like KeyboardInterrupt, of which it is one, it is a request and no error: no ``except Exception`` or ``except
    MinivitError`` catches it, so that a program which goes on after a failed run does not go on after this one.

    ``signum`` is the signal's number, ``code`` the exit code by which a shell reports a process that it has ended, 128
    + ``signum``; ``path`` is what the run is saved in, ``what`` and ``remedy`` are as of a :class:`MinivitError`.
    """

    def __init__(self, signum: int, what: str = "stopped", remedy: str = "", path: str | None = None) -> None:
        super().__init__(signum, what, remedy, path)
        self.signum, self.code = signum, 128 + signum
        self.what, self.remedy, self.path = what, remedy, path

    def __str__(self) -> str:
        return str(MinivitError(self.what, self.remedy))


class MisfitError(CheckpointError):
    """A checkpoint of a model with other ``settings``, by name, than the one that is to start from it."""

    def __init__(self, what: str, remedy: str, settings: Mapping[str, object]) -> None:
        super().__init__(what, remedy)
        self.settings = settings


def unknown_name(kind: str, name: str, known: Iterable[str], error: type[MinivitError] = ConfigError) -> MinivitError:
    """Return an error for an unknown ``name``, with the nearest known ones: "did you mean …?"."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    return error(f"unknown {kind} {name!r}", remedy)


def printable(text: str) -> str:
    """Return ``text`` with every character escaped that does not show: a name can then say nothing but itself.

    Control characters (line breaks among them), marks that turn the direction of writing, invisible characters and
    bytes that were no UTF-8 become ``\\n``, ``\\u001b``, ``\\u202e``, ``\\udcff``, as JSON and TOML write them. Spaces
    of all widths and the two joiners that scripts and emoji need (U+200C, U+200D) stay.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(c: str) -> str:
    if c.isprintable() or c in "\u200c\u200d" or (c.isspace() and c > "\x9f" and c not in "\u2028\u2029"):
        return c
    if c in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[c]
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def value_text(value: object) -> str:
    """Return ``repr(value)`` as a message shows it, cut short where it is long, however large or deep the value is."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # more digits than Python writes, more lists within lists
        return "a value too long to show"
    return shortened(text, 100)


def shortened(text: str, width: int) -> str:
    """Return ``text`` cut to ``width`` characters, the last of them "…" then."""
    return text if len(text) <= width else f"{text[: width - 1]}…"
