"""Planning: a training step is walked on NumPy's arrays as if they were a GPU's, to note the kernels that it needs.

So what it needs can be compiled on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np

from minivit.backend.compiling import Plan
from minivit.backend.devices import Array


class _Planned(threading.local):
    plans: dict[Plan, int] | None = None


_planned = _Planned()


@contextlib.contextmanager
def planning() -> Iterator[dict[Plan, int]]:
    """Run no kernel in this block, in this thread: yield which would have been loaded, and how often launched.

    Arrays are NumPy's, and operations run their twins for CUDA on them; what the kernels would have written is left as
    it was made.
    """
    before, _planned.plans = _planned.plans, {}
    try:
        yield _planned.plans
    finally:
        _planned.plans = before


def planned() -> dict[Plan, int] | None:
    """Return what this thread has noted while planning, for more to be added; None where kernels run."""
    return _planned.plans


def is_on_gpu(array: Array) -> bool:
    """Tell whether an array lies on a GPU, or, while planning, stands for one that does."""
    return not isinstance(array, np.ndarray) or _planned.plans is not None
