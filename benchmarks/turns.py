"""Processes that get ready side by side and are measured one by one: what parent and children say to each other.

A child prints READY once it has compiled and warmed up, waits for a line, measures, and prints RESULT with JSON. So the
minutes that compiling takes are shared, and no child is measured while another works.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# ---- the child's side ------------------------------------------------------------------------------------------------


def ready(**about: Any) -> None:
    """Say that all is compiled, and wait for one's turn."""
    print("READY", json.dumps(about), flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody waits for this measurement")


def result(**found: Any) -> None:
    print("RESULT", json.dumps(found), flush=True)


def time_blocks(step: Callable[[], Any], wait: Callable[[], Any], steps: int, blocks: int = 10) -> list[float]:
    """Return the seconds of a step in each of some blocks of steps, at whose end alone the GPU is waited for."""
    blocks = min(blocks, steps)
    times, each = [], steps // blocks
    wait()
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(each):
            step()
        wait()
        times.append((time.perf_counter() - start) / each)
    return times


# ---- the parent's side -----------------------------------------------------------------------------------------------


class Child:
    """A process that measures; ``found`` is what it has printed as its result, ``why_not`` why there is none."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.log, self.state = log, "starting"
        self.about: dict[str, Any] = {}
        self.found: dict[str, Any] = {}
        self.why_not = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **environment}, cwd=cwd, start_new_session=True,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def wait_ready(self, until: float) -> bool:
        """Wait until it is ready; return whether it is before ``until``, by time.monotonic."""
        return self._wait("READY", until)

    def measure(self, until: float) -> bool:
        """Let it measure; return whether it has a result before ``until``. It is then ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("GO\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has died: the wait finds out why
        done = self._wait("RESULT", until)
        self.end()
        return done

    def _wait(self, word: str, until: float) -> bool:
        while not self.why_not:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.why_not = f"not {word.lower()} within its time"
                break
            if line is None:
                self.why_not = last_line(self.log)
            elif line.startswith(word):
                found = json.loads(line.removeprefix(word))
                if word == "READY":
                    self.about = found
                else:
                    self.found = found
                return True
        self.end()
        return False

    def end(self) -> None:
        """End the process, and those that it has started."""
        if self._process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGKILL):  # it may have children in sessions of their own to end
                with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                    os.killpg(self._process.pid, number)  # a session of its own: with its compiler's workers
                    self._process.wait(5.0)
                    break
        self._process.wait()
        self.state = "ended"
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def last_line(log: Path) -> str:
    """Return the last line of what a process wrote to its error stream."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it ended without a word"
