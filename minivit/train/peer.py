"""A process at the other end of a connection: what is said to it, and how it is noticed that it is dead, or hung."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import errors
from minivit.backend.wire import packed, unpacked, with_length
from minivit.errors import MinivitError, WorkerError

HEARTBEAT = 0.5
"""Seconds between two signs of a process's life."""

SILENCE = 7
"""So many seconds without one, and it counts as hung."""


def framed(message: dict[str, Any]) -> bytes:
    """Return a message, as :mod:`minivit.backend.wire` packs it, with its length before it."""
    return with_length(packed(message, sys.maxsize))


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message."""
    connection.sendall(framed(message))


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None if the other end is closed."""
    body = frame(connection.recv)
    return None if body is None else unpacked(body)


def frame(some: Callable[[int], bytes]) -> bytes | None:
    """Return the next message as it is packed, of which ``some`` returns up to so many bytes; None without any more."""
    head = _read(some, 8)
    return None if head is None else _read(some, int.from_bytes(head, "big"))


def _read(some: Callable[[int], bytes], size: int) -> bytes | None:
    parts, left = [], size
    while left:
        if not (part := some(min(left, 1 << 20))):
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


class Peer:
    """The other end of a ``connection``; ``beats`` (1,) is a number that the process there counts up while it lives."""

    def __init__(self, connection: socket.socket, beats: np.ndarray) -> None:
        self.connection, self.beats = connection, beats
        connection.settimeout(1.0)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; raise WorkerError if the process is dead or hung."""
        left = memoryview(framed(message))
        while left:
            left = left[self._patiently(lambda: self.connection.send(left)) :]  # noqa: B023 - called at once

    def receive(self) -> dict[str, Any]:
        """Return the answer; raise the error that was met there, or WorkerError if the process is dead or hung."""
        reply = self.reply()
        if "error" in reply:
            kind, what, remedy = reply["error"]
            known = getattr(errors, kind, None) if kind else None
            if isinstance(known, type) and issubclass(known, MinivitError):
                raise known(what, remedy)
            raise self.failed(f"met an error: {what}")
        return reply

    def reply(self) -> dict[str, Any]:
        """Return the answer, an error that was met there, too; raise WorkerError if the process is dead or hung."""
        body = frame(lambda size: self._patiently(lambda: self.connection.recv(size)))
        if body is None:
            raise self.dead()
        answer: dict[str, Any] = unpacked(body)
        return answer

    def _patiently(self, act: Callable[[], Any]) -> Any:
        """Do what may wait for the process, as long as that shows signs of life."""
        silent, before = 0, -1
        while True:
            try:
                return act()
            except TimeoutError:  # after a second of this process's own: it may have been stopped, too
                now = int(self.beats[0])
                silent, before = (silent + 1 if now == before else 0), now
                if self.has_ended():
                    raise self.dead() from None
                if silent >= SILENCE:
                    raise self.hung(f"has shown no sign of life for {SILENCE} seconds") from None
            except OSError:
                raise self.dead() from None

    def has_ended(self) -> bool:
        """Tell whether the process is known to be gone, although its connection is not closed."""
        return False

    def dead(self) -> WorkerError:
        """Return the error of a process that is gone."""
        return self.failed("closed its connection")

    def hung(self, how: str) -> WorkerError:
        """Return the error of a process that lives, but does nothing."""
        return self.failed(how)

    def failed(self, how: str) -> WorkerError:
        """Return the error that names the process, and says how it failed."""
        raise NotImplementedError
