"""Cores, their cache, how many threads BLAS runs on, and a team of threads that share the rows of a batch."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from numbers import Integral
from typing import Any

import numpy as np

from minivit.backend.devices import Array, to_device
from minivit.errors import ConfigError, DataError

SHARE_NUMBERS = 1 << 18  # numbers of a flat array worth a thread of its own
THREAD_NUMBERS = 1 << 15  # of a batch's rows worth a thread of its own: with fewer, threads wait for the interpreter


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


class Team:
    """Threads that share the rows of a batch, BLAS held to one thread meanwhile; on a GPU, one thread and one piece.

    ``threads`` is the number of cores unless given, ``micro_batch`` the most rows in a piece, None for as many as a
    thread gets. ``row_numbers`` says how many numbers a row is worked on in at a time: unless ``threads`` were asked
    for, a small batch gets no more threads than pay. Raises ConfigError for anything but whole numbers from 1 on.
    """

    def __init__(
        self,
        threads: int | None = None,
        micro_batch: int | None = None,
        device: str = "cpu",
        row_numbers: int = THREAD_NUMBERS,
    ) -> None:
        if not all(n is None or (isinstance(n, Integral) and n >= 1) for n in (threads, micro_batch)):
            remedy = "each must be a whole number, at least 1, or None"
            raise ConfigError(f"threads={threads}, micro_batch={micro_batch}", remedy)
        self.device, self.micro_batch, self.row_numbers = device, micro_batch, row_numbers
        self.threads = (threads or cpu_cores()) if device == "cpu" else 1
        self.all_threads = threads is not None  # asked for, whether they pay or not
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it was started in

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the threads."""
        return vars(self) | {"_pool": None}

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads, started when they are first needed, and anew in a forked child, which has none of them."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads, "minivit")
        return self._pool[1]

    def here(self, rows: Array) -> Array:
        """Return an array on the team's device."""
        return to_device(rows, self.device)

    def threads_for(self, rows: int) -> int:
        """Return how many threads to work on so many rows with."""
        if self.all_threads:
            return self.threads
        return min(self.threads, max(1, rows * self.row_numbers // THREAD_NUMBERS))

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """Return the micro-batches (start, stop): of even size, and as many for every thread if there are enough."""
        if rows < 1:
            raise DataError("an empty batch", "give at least one image")
        threads = self.threads_for(rows)
        size = min(self.micro_batch or rows, -(-rows // threads))
        rounds = -(-rows // (size * threads))
        count = min(rounds * threads, rows)
        edges = [rows * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))

    def run(self, work: Callable[[int, int, int], Any], rows: int) -> list[Any]:
        """Call work(thread, start, stop) for every micro-batch; return the results in the order of the rows."""
        return self._run(work, self.pieces(rows), self.threads_for(rows))

    def spread(self, work: Callable[[int, int], Any], length: int) -> list[Any]:
        """Call work(start, stop) for even shares of a flat array, one a thread; return the results in their order."""
        threads = min(self.threads, max(1, length // SHARE_NUMBERS))
        edges = [length * i // threads for i in range(threads + 1)]
        return self._run(lambda thread, start, stop: work(start, stop), list(itertools.pairwise(edges)), threads)

    def _run(self, work: Callable[[int, int, int], Any], pieces: list[tuple[int, int]], threads: int) -> list[Any]:
        results: list[Any] = [None] * len(pieces)
        stop = threading.Event()

        def share(thread: int) -> None:
            with np.errstate(all="ignore"):  # what is not finite is looked for in the result
                for i in range(thread, len(pieces), threads):
                    if not stop.is_set():
                        results[i] = work(thread, *pieces[i])

        with blas_threads(1) if self.device == "cpu" else contextlib.nullcontext():
            if threads == 1:
                share(0)
                return results
            pool = self.pool
            futures = [pool.submit(share, t) for t in range(threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also of an interrupt: the others end with their piece, before their buffers are used again
                stop.set()
                wait(futures)
            error = next((e for e in [f.exception() for f in futures] if e is not None), None)
            del futures  # an error refers to this frame: what refers to the error here would keep both alive
        if error is not None:
            try:
                raise error
            finally:
                del error
        return results
