"""Runs a learner's file in a process of its own, with bounds on time and memory, and asks it for values."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivit.backend.children import child_environment
from minivit.backend.wire import LARGEST, packed, unpacked, with_length
from minivit.learn.calling import Outcome

SECONDS = 5.0
"""So long may one call take, and loading the file."""

TOTAL = 20.0
"""So long may all calls of one file take together."""

_GRACE = 1.5  # what a call gets to end by itself, before the process is ended


class Child:
    """A process with a learner's file in it; a context that ends the process, and whatever it has started."""

    def __init__(self, path: Path, given: Sequence[str] = ()) -> None:
        self.path, self.given = path, given  # what of minivit.learn.given the file may import
        self.functions: list[str] = []
        self._ended: Outcome | None = None  # how the process came to its end
        self._spent: dict[str, float] = {}  # seconds, by the function's name
        self._running = False

    def __enter__(self) -> Child:
        environment = child_environment([os.environ.get("PYTHONPATH", "")])
        # -P: no file beside the learner's may stand in for one of Python's
        command = [sys.executable, "-P", "-m", "minivit.learn.runner", *self.given]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self._running = True
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what it had not read is lost with it
                pipe.close()
        self._process.wait()

    def load(self) -> Outcome:
        """Run the file, and return what came of it; ``functions`` are then the names of those in it."""
        reply = self._ask({"do": "load", "path": str(self.path), "seconds": SECONDS}, 10.0)  # with Python's own start
        if isinstance(reply, Outcome):
            return reply
        reply = reply if isinstance(reply, dict) else {}
        functions = reply.get("functions")
        self.functions = functions if isinstance(functions, list) else []
        return _outcome(reply.get("outcome"))

    def run(self, name: str, many: Sequence[tuple[Any, ...]], measured: bool = False) -> list[Outcome]:
        """Call the function ``name`` with each of many arguments.

        After a call that takes too long, or ends the process, none is made: the others have the same outcome.
        """
        outcomes: list[Outcome] = []
        for args in many:
            if outcomes and (outcomes[-1].name == "no end" or self._ended is not None):
                outcomes.append(outcomes[-1])
                continue
            left = TOTAL - sum(self._spent.values())
            if left <= 0.0:
                outcomes.append(self._too_slow())
                continue
            started, seconds = time.monotonic(), min(SECONDS, max(0.5, left))
            reply = self._ask({"do": "call", "name": name, "args": args, "measured": measured, "seconds": seconds})
            outcomes.append(reply if isinstance(reply, Outcome) else _outcome(reply))
            self._spent[name] = self._spent.get(name, 0.0) + time.monotonic() - started
        changed = self._ask({"do": "overwritten"})
        for i, outcome in enumerate(outcomes):
            outcome.overwritten = isinstance(changed, list) and i in changed
        return outcomes

    def _too_slow(self) -> Outcome:
        slowest = max(self._spent, key=lambda name: self._spent[name])
        took = f"the calls of {slowest} took {self._spent[slowest]:.0f} s of them"
        return Outcome(name="too slow", fault=f"marking a file has {TOTAL:g} s, and {took}: it has to be faster")

    def _ask(self, request: dict[str, Any], extra: float = 0.0) -> Any:
        """Return the reply to a request, or the Outcome that says how the process ended."""
        if self._ended is None:
            body = packed(request)
            deadline = time.monotonic() + request.get("seconds", 0.0) + _GRACE + extra
            try:
                return unpacked(self._exchange(with_length(body), deadline))
            except TimeoutError:
                self._ended = Outcome(
                    name="no end", fault=f"it had not come to an end after {request.get('seconds', _GRACE):g} s"
                )
            except (OSError, EOFError, ValueError):  # it closed its pipes, or wrote nonsense into them
                self._ended = self._how_it_ended()
            self._end()
        return self._ended

    def _exchange(self, out: bytes, deadline: float) -> bytes:
        """Write a frame, and return the body of the one that comes back; neither may wait beyond the deadline."""
        assert self._process.stdin is not None and self._process.stdout is not None
        writing, reading, got = self._process.stdin.fileno(), self._process.stdout.fileno(), bytearray()
        os.set_blocking(writing, False)
        size = 0
        while not size or len(got) < 8 + size:
            left = max(0.0, deadline - time.monotonic())
            readable, writable, _ = select.select([reading], [writing] if out else [], [], left)
            if not readable and not writable:
                raise TimeoutError
            if writable:
                out = out[os.write(writing, out[: 1 << 16]) :]
            if readable:
                chunk = os.read(reading, 1 << 16)
                if not chunk:
                    raise EOFError
                got += chunk
            size = int.from_bytes(got[:8], "big") if len(got) >= 8 else 0
            if size > LARGEST:
                raise ValueError("a frame that is too long")
        return bytes(got[8 : 8 + size])

    def _how_it_ended(self) -> Outcome:
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return Outcome(name="no answer", fault="it writes where its results are read, or closes that")
        if code < 0:
            return Outcome(name="crash", fault=f"it crashes Python ({signal.Signals(-code).name})")
        return Outcome(name="ends the program", fault="it ends the program, and should return a value")

    def _end(self) -> None:
        """End the process and those that it has started, once: later its number may be another's."""
        if self._running:
            self._running = False
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _outcome(reply: Any) -> Outcome:
    """Return an Outcome made of a reply, in which a learner's file may have written anything."""
    found, given = Outcome(), reply if isinstance(reply, dict) else {}
    for name, default in vars(found).items():
        if type(given.get(name)) is type(default) or name == "value":
            setattr(found, name, given.get(name))
    found.changed = tuple(i for i in found.changed if isinstance(i, int))
    return found
