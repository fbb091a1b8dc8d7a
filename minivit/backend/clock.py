"""The GPU's clock: marks in the work of its current stream, and the time between two of them.

A GPU that waits for its next launch waits between two marks as well. Whoever asks how long the work itself takes keeps
the GPU busy until all of it is launched: :func:`backlog`.
"""

from __future__ import annotations

import math
from typing import Any

from minivit.backend.devices import Array, array_module, gpu, resolve_device


def mark() -> Any:
    """Return a mark at the end of all that has been launched on the current stream."""
    import cupy

    event = cupy.cuda.Event()
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Return the seconds that the GPU took from one mark to the other; wait for it."""
    import cupy

    end.synchronize()
    return 1e-3 * float(cupy.cuda.get_elapsed_time(start, end))


def wait_for(device: str) -> None:
    """Wait until a GPU has done all its work; the CPU's is done when a call returns."""
    if (device := resolve_device(device)) != "cpu":
        with gpu(device) as here:
            here.synchronize()


def backlog(source: Array, target: Array, seconds: float, bytes_per_second: float) -> None:
    """Launch copies from one array on the GPU to another that take it about so long.

    What is launched meanwhile lies ready when they are done, and then runs without a wait for the host.
    """
    for _ in range(math.ceil(seconds * bytes_per_second / (2 * source.nbytes))):
        array_module(target).copyto(target, source)
