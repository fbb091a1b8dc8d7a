"""Learning rates over a run: linear warm-up, then a cosine or a straight line down."""

from __future__ import annotations

import math
from collections.abc import Callable

from minivit.errors import ConfigError

Schedule = Callable[[int], float]
"""Maps the number of updates done so far (0 before the first) to the learning rate of the next."""


def warmup_cosine(base_lr: float, total_steps: int, warmup_steps: int, final_lr: float = 0.0) -> Schedule:
    """Return η(t) = η_final + ½(η_base - η_final)(1 + cos πp), after a linear warm-up.

    The warm-up rises from base_lr/warmup_steps at step 0 to base_lr at step warmup_steps - 1 (Goyal et al. 2017,
    "Accurate, large minibatch SGD", section 2.2); from there p runs from 0 to 1 at the last step, which gets final_lr
    (Loshchilov and Hutter 2016, "SGDR", eq. 5, without restarts). Steps past the last keep final_lr.
    """
    return _schedule(base_lr, total_steps, warmup_steps, final_lr, lambda p: 0.5 * (1.0 + math.cos(math.pi * p)))


def warmup_linear(base_lr: float, total_steps: int, warmup_steps: int, final_lr: float = 0.0) -> Schedule:
    """Return η(t) = η_final + (η_base - η_final)(1 - p), after a linear warm-up; as :func:`warmup_cosine` otherwise."""
    return _schedule(base_lr, total_steps, warmup_steps, final_lr, lambda p: 1.0 - p)


def _schedule(base: float, total: int, warmup: int, final: float, shape: Callable[[float], float]) -> Schedule:
    """Return the schedule that falls from base to final as ``shape`` falls from 1 at p = 0 to 0 at p = 1."""
    if not 0.0 < base < math.inf:
        raise ConfigError(f"base_lr is {base}", "give a positive, finite learning rate; 1e-3 is usual for AdamW")
    if not 0.0 <= final <= base:
        raise ConfigError(
            f"final_lr {final} is outside 0 … base_lr = {base}", "the rate falls: give a smaller final_lr"
        )
    if total < 1:
        raise ConfigError(f"total_steps is {total}", "give epochs × batches in an epoch, at least 1")
    if not 0 <= warmup < total:
        raise ConfigError(
            f"warmup_steps {warmup} is outside 0 … {total - 1}", f"warm up for less than the run's {total} steps"
        )
    peak = max(warmup - 1, 0)  # the step that gets base_lr

    def rate(step: int) -> float:
        if step < peak:
            return base * (step + 1) / warmup
        p = min((step - peak) / max(total - 1 - peak, 1), 1.0)
        return final + (base - final) * shape(p)

    return rate
