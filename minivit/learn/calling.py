"""Calls a learner's function and says what came of it; knows NumPy and nothing of minivit (see runner.py)."""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
import traceback
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PRINTED = 2000
"""So many characters of what a call prints are kept."""


class OverTime(BaseException):
    """A call has taken too long; no ``except Exception`` catches it."""


class Forbidden(ImportError):
    """A learner's file imports what it may not."""


@dataclass
class Outcome:
    """What came of one call: a ``value``, or the ``fault`` that stopped it, in words, its name, and the learner's line.

    ``unwritten`` says that it raised NotImplementedError. ``changed`` are the positions of arguments that the call
    wrote into; ``overwritten`` says that a later call changed what this one had returned. ``printed`` is the beginning
    of what it printed, ``warned`` NumPy's first warning (an overflow, a division by 0, no number) with the line.
    ``peak`` is how many bytes NumPy held at once, where that was measured.
    """

    value: Any = None
    fault: str = ""
    name: str = ""
    line: str = ""
    unwritten: bool = False
    changed: tuple[int, ...] = ()
    overwritten: bool = False
    printed: str = ""
    warned: str = ""
    peak: int = 0

    @property
    def stopped(self) -> bool:
        """Whether there is no value."""
        return bool(self.fault) or self.unwritten


def call(function: Callable[..., Any], args: Sequence[Any], file: str, measured: bool = False) -> Outcome:
    """Call ``function`` with copies of ``args``; ``file`` is where it is written, for the line of an error.

    ``measured`` asks for the peak of what NumPy holds meanwhile, the arguments left out.
    """
    given, out = [copied(x) for x in args], Outcome()
    printed, warn = _Short(), _Warned(out, file)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            np.errstate(all="call", under="ignore", call=warn),
        ):
            if measured:
                tracemalloc.start()
            out.value = function(*given)
    except NotImplementedError as error:
        out.unwritten, out.line = True, line_of(error, file)
    except BaseException as error:  # SystemExit and KeyboardInterrupt, too
        out.name, out.fault = words_for(error)
        out.line = line_of(error, file)
    if tracemalloc.is_tracing():
        out.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    out.printed = printed.getvalue()
    out.changed = tuple(i for i, (x, y) in enumerate(zip(args, given, strict=True)) if not same(x, y))
    return out


@dataclass
class _Warned:
    """What NumPy calls when a number overflows or is none: the first time is kept, with the learner's line."""

    out: Outcome
    file: str

    def __call__(self, what: str, flag: int) -> None:
        """Keep "overflow in line 12: e = np.exp(x)"."""
        frame = None if self.out.warned else sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        if frame is not None:
            text = linecache.getline(self.file, frame.f_lineno).strip()[:100]
            self.out.warned = f"{what}, in line {frame.f_lineno}: {text}"


class _Short(io.StringIO):
    """Keeps the first characters that are written, and lets the rest go."""

    def write(self, text: str) -> int:
        """Keep what there is room for."""
        super().write(text[: max(0, PRINTED - self.tell())])
        return len(text)


def copied(value: Any, depth: int = 0) -> Any:
    """Return a copy of arrays, or of dicts, lists and tuples of them, as deep as any exercise has them."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) in (list, tuple) and depth < 4:
        return type(value)(copied(x, depth + 1) for x in value)
    if type(value) is dict and depth < 4:
        return {key: copied(x, depth + 1) for key, x in value.items()}
    return value


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal to the bit (NaN equals NaN), and of one kind."""
    if a is b and type(a) is not np.ndarray:
        return True
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        floats = a.dtype.kind in "fc"
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=floats)
    if type(a) is not type(b):
        return False
    if type(a) in (list, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) is dict:
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


def words_for(error: BaseException) -> tuple[str, str]:
    """Return (the name of what stopped a call, what the learner reads)."""
    text, kind = _short(error), type(error).__name__
    if isinstance(error, OverTime):
        return "no end", f"it had not come to an end after {text} s"
    if isinstance(error, RecursionError):
        return "no end", "it calls itself without end (RecursionError)"
    if isinstance(error, MemoryError):
        return "too much memory", f"it asks for more memory than an exercise gets: {text}".removesuffix(": ")
    if isinstance(error, Forbidden):
        return "not plain NumPy", text
    if not isinstance(error, Exception):
        return "ends the program", f"it ends the program ({kind}), and should return a value"
    if isinstance(error, SyntaxError):
        return "no Python", f"this is no Python: {kind}: {error.msg}"
    return "stopped", f"{kind}: {text}".removesuffix(": ")


def _short(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except BaseException:  # a learner's own exception may be broken itself
        return ""
    return text if len(text) <= 300 else f"{text[:299]}…"


def line_of(error: BaseException, file: str) -> str:
    """Return "line 12: y = x / 0" for the last line of ``file`` that the error went through, or ""."""
    if isinstance(error, SyntaxError) and error.filename == file:
        number: int | None = error.lineno
        text = (error.text or "").strip()
    else:
        places = [(frame.f_code.co_filename, at) for frame, at in traceback.walk_tb(error.__traceback__)]
        numbers = [at for name, at in places if name == file]
        number = numbers[-1] if numbers else None
        text = linecache.getline(file, number or 0).strip()
    return f"line {number}: {text[:100]}".rstrip(": ") if number else ""
