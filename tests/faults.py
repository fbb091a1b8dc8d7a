"""Faults on demand: the N-th open, write, fsync, rename or unlink under a folder fails, or the process is killed there.

SQLite's loop (sqlite.org/testing.html, section 3): for N = 1, 2, 3 … let the N-th call go wrong, until none does, and
see each time that what must hold still holds. In this process:

    for fault in every_fault(folder, failing(errno.ENOSPC)):
        with fault:
            ...

or in a child that runs the real command, ``start("kill", 7, folder, "train", …)``: this file is also that child's
program. Writes are those that reach the system: a buffer's, when it is full, flushed or closed.
"""

from __future__ import annotations

import builtins
import errno
import fnmatch
import io
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEMPORARY = re.compile(r"\.([^/]+)\.[0-9a-f]{16}\.minivit-tmp")
ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
Act = Callable[[], None]


def failing(number: int) -> Act:
    """Return what raises an OSError."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def kill() -> None:
    """End the process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def signals(number: int, times: int = 1) -> Act:
    """Return what sends this process a signal so many times."""

    def act() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return act


class Faults:
    """In its block, ``act()`` comes before the ``at``-th call below ``folder`` that fits ``match``, as in a shell.

    ``calls`` lists them, named points all: "rename checkpoints/last.npz", "write config.toml.tmp", which is the
    temporary file that will be config.toml. A write has written half of its bytes when it fails. With ``at=0`` calls
    are listed only.
    """

    def __init__(self, folder: str | Path, at: int, act: Act = kill, match: str = "*") -> None:
        self.folder, self.at, self.act, self.match = os.path.abspath(folder), at, act, match
        self.calls: list[str] = []
        self.fired = ""
        self._paths: dict[int, str] = {}  # of the descriptors open for writing
        self._before: list[tuple[Any, str, Any]] = []

    def come(self, call: str, path: Any, first_half: Act | None = None) -> None:
        """Note a call; do what was asked for if it is its turn."""
        place = os.path.relpath(os.path.abspath(os.fspath(path)), self.folder)
        point = f"{call} " + TEMPORARY.sub(r"\1.tmp", place)
        if place.startswith("..") or not fnmatch.fnmatchcase(point, self.match):
            return
        self.calls.append(point)
        if len(self.calls) == self.at:
            self.fired = point
            if first_half is not None:
                first_half()
            self.act()

    def __enter__(self) -> Faults:
        real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "open", "write")}

        def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            self.come("open", path)
            descriptor: int = real["open"](path, flags, *args, **kwargs)
            self._paths[descriptor] = os.path.abspath(path)
            return descriptor

        def write(descriptor: int, data: bytes) -> int:
            if descriptor in self._paths:
                half = lambda: real["write"](descriptor, bytes(data)[: len(data) // 2])
                self.come("write", self._paths[descriptor], half)
            return int(real["write"](descriptor, data))

        def fsync(descriptor: int) -> None:
            if descriptor in self._paths:
                self.come("fsync", self._paths[descriptor])
            real["fsync"](descriptor)

        def replace(source: Any, target: Any) -> None:
            self.come("rename", target)
            real["replace"](source, target)

        def unlink(path: Any, **kwargs: Any) -> None:
            self.come("unlink", path)
            real["unlink"](path, **kwargs)

        places = [(os, "open", opened), (os, "write", write), (os, "fsync", fsync), (os, "replace", replace)]
        places += [(os, "rename", replace), (os, "unlink", unlink), (os, "remove", unlink)]
        places += [(builtins, "open", self._open), (io, "open", self._open)]
        for module, name, function in places:
            self._before.append((module, name, getattr(module, name)))
            setattr(module, name, function)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            setattr(*self._before.pop())

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        """Open as ``io.open`` does, with writes that are noted."""
        real = self._before[-1][2]
        if isinstance(file, int) and file not in self._paths:
            return real(file, mode, buffering, *args, **kwargs)
        if not set(mode) & set("wax+"):
            if isinstance(file, int):
                return real(file, mode, buffering, *args, **kwargs)
            self.come("open", file)
            return real(file, mode, buffering, *args, **kwargs)
        raw = _Raw(self, file, mode.replace("b", "").replace("t", ""))
        self._paths[raw.fileno()] = raw.path
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw, size)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)


class _Raw(io.FileIO):
    """A file whose writes are noted."""

    def __init__(self, faults: Faults, file: Any, mode: str) -> None:
        if isinstance(file, int):  # opened already, which was noted
            self.path = faults._paths[file]
        else:
            self.path = os.path.abspath(file)
            faults.come("open", file)
        super().__init__(file, mode)
        self.faults = faults

    def write(self, data: Any) -> int:
        self.faults.come("write", self.path, lambda: super(_Raw, self).write(bytes(data)[: len(data) // 2]))
        return super().write(data)


def every_fault(folder: str | Path, act: Act, match: str = "*") -> Iterator[Faults]:
    """Yield faults for N = 1, 2, 3 …, until the last one's block has gone through without it; check that some came."""
    at = 1
    while True:
        fault = Faults(folder, at, act, match)
        yield fault
        if not fault.fired:
            break
        at += 1
    assert at > 1, f"there was no call {match!r} below {folder}"


# ---- the real command in a child process -----------------------------------------------------------------------------


def start(act: str, at: int, folder: str | Path, *command: str, match: str = "*", cwd: Path) -> subprocess.Popen[str]:
    """Start ``minivit COMMAND`` with a fault: ``act`` is "kill", or the name of an errno or of a signal."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.faults", act, str(at), str(folder), match, *command]
    return subprocess.Popen(
        program, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _act(name: str) -> Act:
    if name == "kill":
        return kill
    return signals(getattr(signal, name)) if name.startswith("SIG") else failing(getattr(errno, name))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    with Faults(sys.argv[3], int(sys.argv[2]), _act(sys.argv[1]), sys.argv[4]):
        sys.argv = ["minivit", *sys.argv[5:]]
        runpy.run_module("minivit", run_name="__main__", alter_sys=True)
