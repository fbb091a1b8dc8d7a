"""Ctrl-C, SIGTERM and SIGHUP as requests: they are noted, and acted upon between two steps."""

from __future__ import annotations

import signal
import threading
from types import TracebackType
from typing import Any

from minivit.errors import Stopped

NOTED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Windows has no SIGHUP, which comes when a terminal is closed or a connection is lost."""


def handle(handler: Any) -> None:
    """Have the :data:`NOTED` signals handled so in this process, from now on."""
    for number in NOTED:
        signal.signal(number, handler)


class StopSignals:
    """Notes the first of the :data:`NOTED` signals in its ``with`` block; a second one acts at once, as outside of it.

    It leaves signals alone if it is not ``active``, and outside the main thread, where Python runs no handlers; and
    one that is ignored, as ``nohup`` has it with SIGHUP.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if self.active:
            before = {s: signal.getsignal(s) or signal.SIG_DFL for s in NOTED}
            self._before = {s: handler for s, handler in before.items() if handler is not signal.SIG_IGN}
        for s in self._before:
            signal.signal(s, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def raise_if_noted(self) -> None:
        """Raise :class:`~minivit.errors.Stopped` if there was a signal."""
        if self.noted is not None:
            raise Stopped(self.noted)

    def _note(self, signum: int, frame: Any) -> None:
        self.noted = signum
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
