"""Cores, their cache, and how many threads BLAS runs on."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from minivit.errors import ConfigError


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not tell
        return os.cpu_count() or 1


@functools.cache
def l2_cache() -> int:
    """Return the size of a core's second-level cache in bytes; 1 MiB where the system does not tell."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index2/size") as f:
            return int(f.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


class _BlasLimit:
    """Holds the process's BLAS to few threads as long as anybody asks for it, and gives it back its own after the last.

    The number is the process's: a thread that puts back what it found would put back another one's limit.
    """

    def __init__(self) -> None:
        self.asked: dict[object, tuple[int, int]] = {}  # thread that asks, number of BLAS threads
        self.lock, self.limit, self.held = threading.Lock(), None, 0

    @contextlib.contextmanager
    def to(self, threads: int) -> Iterator[None]:
        """Hold BLAS to ``threads`` threads in this block; to the fewest that are asked for at the time."""
        token = object()
        try:
            with self.lock:
                self.asked[token] = threading.get_ident(), threads
                self.apply()
            yield
        finally:
            with self.lock:
                self.asked.pop(token, None)
                self.apply()

    def apply(self) -> None:
        """Set what is asked for, unless it is set already."""
        wanted = min((threads for _, threads in self.asked.values()), default=0)  # 0: no limit
        if wanted != self.held:
            if self.limit is not None:
                self.limit.restore_original_limits()
                self.limit = None
            if wanted:
                self.limit = _threadpools().limit(limits=wanted, user_api="blas")
            self.held = wanted

    def after_fork(self) -> None:
        """Forget, in a child, the threads that it does not have: nobody there would ever end their block or unlock."""
        self.lock = threading.Lock()
        own = threading.get_ident()
        self.asked = {token: asked for token, asked in self.asked.items() if asked[0] == own}
        self.apply()


_blas = _BlasLimit()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_blas.after_fork)


def blas_threads(threads: int) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the CPU's BLAS is held to ``threads`` threads, or fewer if another thread asks for it.

    It has its own number again when the last such block of the process has ended.
    """
    if threads < 1:
        raise ConfigError(f"BLAS cannot run on {threads} threads", "use at least 1")
    return _blas.to(threads)


@functools.cache
def _threadpools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looks through all loaded libraries: once is enough
