"""Python processes that work for this one: whether there can be such, and what they are started in."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

CAN_INHERIT = hasattr(os, "fork")
"""Whether a process gets open descriptors, and so memory without a name, from the one that starts it."""


def child_environment(paths: Iterable[str]) -> dict[str, str]:
    """Return this process's environment with one BLAS thread, this minivit, and after it ``paths`` to import from."""
    one = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    here = str(Path(__file__).parents[2])
    return os.environ | one | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([here, *filter(None, paths)]))}
