"""The process in which a learner's file runs: it answers requests until its input ends (see child.py).

It knows neither right answers nor mistakes: whatever the file does here, it cannot change how it is marked.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import signal
import sys
import types
from collections.abc import Sequence
from typing import Any

from minivit.backend.wire import packed, unpacked, with_length
from minivit.learn.calling import Forbidden, OverTime, call, copied, same

MEMORY = 1 << 30
"""So many bytes more than at its start may the process ask for."""


class OnlyNumPy:
    """Refuses, on sys.meta_path, to import what is neither NumPy nor Python's own; ``given`` are pieces that it has."""

    def __init__(self, given: Sequence[str] = ()) -> None:
        self.given = given

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Raise Forbidden, or leave it to the others; NumPy and Python may load late what they need."""
        root = name.partition(".")[0]
        if root == "minivit" and self.given:
            raise Forbidden(f"of minivit there is only: from minivit.learn.given import {', '.join(self.given)}")
        if root != "numpy" and root not in sys.stdlib_module_names and not _imported_by_a_library():
            raise Forbidden(f"{root} may not be imported: exercises are solved in plain NumPy, each file by itself")


_ON_BEHALF = {"importlib", "_frozen_importlib", "_frozen_importlib_external", "pkgutil", "runpy"}


def _imported_by_a_library() -> bool:
    """Return whether it is NumPy, or a module of Python's own, that imports, and not on behalf of the learner."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if name not in _ON_BEHALF:
            return name == "numpy" or name in sys.stdlib_module_names
        frame = frame.f_back
    return False


def serve() -> None:
    """Answer requests: a frame in, a frame out, each with its length before it."""
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what the file prints past sys.stdout goes nowhere
        os.dup2(nothing, stream)
    names = sys.argv[1:]
    given = pieces(names)
    _bound_memory()
    for name in [name for name in sys.modules if name.partition(".")[0] == "minivit"]:
        del sys.modules[name]  # or `import minivit` would find it there
    sys.modules |= given
    sys.meta_path.insert(0, OnlyNumPy(names))
    sys.dont_write_bytecode = True
    work = Work()
    while size := requests.read(8):
        request = unpacked(requests.read(int.from_bytes(size, "big")))
        body = packed(getattr(work, request.pop("do"))(**request))
        replies.write(with_length(body))
        replies.flush()


def _bound_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # where there is no such bound, or no /proc
        import resource

        with open("/proc/self/statm", "rb") as f:
            pages = int(f.read().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pieces(names: Sequence[str]) -> dict[str, types.ModuleType]:
    """Return by its name a module minivit.learn.given that has only the pieces that the exercise gives; {} of none."""
    if not names:
        return {}
    whole = importlib.import_module("minivit.learn.given")
    part = types.ModuleType(whole.__name__, whole.__doc__)
    vars(part).update({name: getattr(whole, name) for name in names})
    return {part.__name__: part}


class Work:
    """A learner's file, and what its functions have returned."""

    def __init__(self) -> None:
        self.module: types.ModuleType | None = None
        self.file = ""
        self.returned: list[tuple[Any, Any]] = []  # with a copy made at once

    def load(self, path: str, seconds: float) -> dict[str, Any]:
        """Run the file; reply with what stopped it, and the names of its functions."""
        self.file = path
        loader = importlib.machinery.SourceFileLoader("exercise", path)
        spec = importlib.util.spec_from_loader("exercise", loader)
        assert spec is not None
        self.module = importlib.util.module_from_spec(spec)
        with _ended_after(seconds):
            outcome = call(lambda: loader.exec_module(self.module), (), path)  # type: ignore[arg-type]
        functions = [name for name, value in vars(self.module).items() if callable(value)]
        return {"outcome": vars(outcome), "functions": functions}

    def call(self, name: str, args: Sequence[Any], measured: bool, seconds: float) -> dict[str, Any]:
        """Call a function of the file."""
        with _ended_after(seconds):
            outcome = call(getattr(self.module, name), args, self.file, measured)
        self.returned.append((outcome.value, copied(outcome.value)))
        return vars(outcome)

    def overwritten(self) -> list[int]:
        """Reply with the numbers of the calls whose results have changed since, and forget these calls."""
        found = [i for i, (value, before) in enumerate(self.returned) if not same(value, before)]
        self.returned = []
        return found


@contextlib.contextmanager
def _ended_after(seconds: float) -> Any:
    """Raise OverTime in the block when it takes longer; what does not heed it is ended by the other process."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def ring(*_: Any) -> None:
        raise OverTime(f"{seconds:g}")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


if __name__ == "__main__":
    serve()
