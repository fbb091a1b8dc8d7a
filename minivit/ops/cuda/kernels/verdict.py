"""Kernels on the numbers of a step: see ops/cuda/verdict.py."""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, load, number, store


def is_finite(x):
    """Tell whether x is finite: of NaN no comparison holds."""
    return (x < float("inf")) & (x > -float("inf"))


def finish(counted):
    """Whether an update is made, its number, and the report of its step, for ``right`` if it was ``counted``."""

    @ct.kernel
    def kernel(loss, norm, right, running, steps, report):
        value, length = number(loss), number(norm)
        ok = (load(running, (0,), (1,), tma=False) != 0) & is_finite(value) & is_finite(length)
        count = load(steps, (0,), (1,), tma=False) + ok.astype(steps.dtype)
        store(running, (0,), ok, tma=False)
        store(steps, (0,), count, tma=False)
        store(report, (0,), value, tma=False)
        store(report, (1,), length, tma=False)
        if counted:
            store(report, (2,), load(right, (0,), (1,), tma=False), tma=False)
        else:
            store(report, (2,), ct.full((1,), -1.0, F32), tma=False)
        store(report, (3,), ok, tma=False)
        store(report, (4,), ok, tma=False)
        store(report, (5,), count, tma=False)

    return kernel


def clip():
    """factor = limit/(norm + 1e-6) if the ``norm`` is above the limit, else 1."""

    @ct.kernel
    def kernel(norm, factor, limit):
        length = number(norm)
        store(factor, (0,), ct.where(length > limit, limit / (length + 1e-6), 1.0), tma=False)

    return kernel
