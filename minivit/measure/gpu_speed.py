"""What a GPU can do, measured: bytes of a large copy and FLOPs of large matrix products, each a second."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minivit.backend import Array, Key, available_memory, product, products, to_device, uniform
from minivit.backend.clock import mark, seconds_between, wait_for
from minivit.measure.speed import time_steps
from minivit.nn.module import watching
from minivit.train.precision import check_precision

COPIED = 1 << 30  # bytes of one copy: far more than the cache holds
SIDES = (4096, 8192)  # rows and columns of the products
ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """The rates of a GPU: ``copy`` in bytes a second, read and written, ``product`` in FLOP a second."""

    copy: float
    product: float


def gpu_ceilings(device: str, dtype: str) -> Ceilings:
    """Return the best of several copies and products on ``device``, the products in the step's ``dtype``."""
    return Ceilings(copy_rate(device), product_rate(device, dtype))


def copy_pair(device: str) -> tuple[Array, Array]:
    """Return two arrays of as many bytes as are copied, but together no more than half of what is free."""
    size = max(1, min(COPIED, available_memory(device) // 4))
    return to_device(np.zeros(size, np.uint8), device), to_device(np.zeros(size, np.uint8), device)


def copy_rate(device: str) -> float:
    """Return the bytes that a large copy on the GPU reads and writes in a second, the best of several."""
    source, target = copy_pair(device)

    def copy() -> None:
        target[...] = source

    return 2 * source.nbytes / _best(copy, device)


def product_rate(device: str, dtype: str) -> float:
    """Return the FLOP/s of square products in numbers of ``dtype``, the best of several sizes and repeats."""
    best, precision = 0.0, check_precision(dtype, device)
    for n in SIDES:
        a, b = (to_device(uniform(Key(0, i), (n, n)).astype(precision.dtype), device) for i in range(2))
        out = to_device(np.zeros((n, n), precision.dtype), device)
        with products("tf32" if precision.tf32 else "float32"):
            best = max(best, 2 * n**3 / _best(partial(product, a, b, out), device))
    return best


def _best(work: Callable[[], Any], device: str, calls: int = 8) -> float:
    """Return the seconds of one of ``calls`` calls in a row, in the best of some rounds."""
    times = []
    work()  # what is made once is made
    for _ in range(ROUNDS):
        wait_for(device)
        start = mark()
        for _ in range(calls):
            work()
        times.append(seconds_between(start, mark()) / calls)
    return max(min(times), 1e-9)


def time_submitted(step: Any, images: Any, labels: Any, steps: int, warmup: int = 4) -> list[float]:
    """Return the seconds from one step's end to the next's, as a Trainer makes them: the next is handed in before."""
    waiting: deque[Any] = deque()
    ends = []
    for _ in range(warmup + steps + step.ahead + 1):
        waiting.append(step.submit(images, labels))
        if len(waiting) > step.ahead:
            waiting.popleft().totals()
            ends.append(time.perf_counter())
    while waiting:
        waiting.popleft().totals()
    return np.diff(ends)[warmup : warmup + steps].tolist()


def time_launched(step: Any, images: Any, labels: Any, steps: int, warmup: int = 2) -> list[float]:
    """Return the seconds of each of ``steps`` steps that are launched from Python instead of replayed."""
    with launched(step):
        return time_steps(step, images, labels, steps, warmup)


@contextlib.contextmanager
def launched(step: Any) -> Iterator[None]:
    """Have a step launched in this block: a model that is watched is not replayed, for a replay runs no module."""
    with watching(step.model, lambda path, out: None):
        yield
