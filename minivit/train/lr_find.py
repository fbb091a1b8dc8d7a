"""The learning rate range test: what a model's loss does while the rate rises from too low to too high."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from minivit.errors import ConfigError, NonFiniteError
from minivit.train.step import TrainStep

SMOOTHING = 0.9  # share of the past in the smoothed loss
TOO_HIGH = 4.0  # times the best smoothed loss: the test ends there


def lr_range_test(
    step: TrainStep, batches: Iterable[tuple[Any, Any]], low: float = 1e-6, high: float = 1.0, steps: int = 100
) -> list[tuple[float, float]]:
    """Return (learning rate, loss) of training steps whose rate rises from ``low`` to ``high`` by a constant factor.

    Smith 2017, "Cyclical learning rates for training neural networks", section 3.3, with a geometric rise. A loss is
    that of a batch before its update. The test ends early if the smoothed loss is four times its best, if loss or
    gradient is not finite, or with the last of ``batches``. Parameters and optimizer are then as they were before.
    """
    if not (0.0 < low < high < math.inf and steps >= 2):
        raise ConfigError(f"a range test from {low} to {high} in {steps} steps", "give 0 < low < high, and 2 steps")
    model, opt = step.model, step.opt
    before = model.state_dict(), opt.state_dict(), opt.lr
    points: list[tuple[float, float]] = []
    try:
        for i, (images, labels) in zip(range(steps), batches, strict=False):
            opt.lr = low * (high / low) ** (i / (steps - 1))
            try:
                loss = step(images, labels)
            except NonFiniteError:
                break
            points.append((opt.lr, loss))
            smooth = smoothed([loss for _, loss in points])
            if smooth[-1] > TOO_HIGH * min(smooth):
                break
    finally:
        model.load_state_dict(before[0])
        opt.load_state_dict(before[1])
        opt.lr = before[2]
    return points


def smoothed(losses: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Return the running means s_t = (share · S_(t-1) + (1 - share) · x_t) / (1 - shareᵗ), S being what is divided.

    The division is that of Adam (Kingma and Ba 2015, section 3): without it the mean would begin at 0.
    """
    total, means = 0.0, []
    for t, loss in enumerate(losses, 1):
        total = share * total + (1.0 - share) * loss
        means.append(total / (1.0 - share**t))
    return means


def suggest(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Return two learning rates to begin with: where the smoothed loss falls fastest, and a tenth of where it is least.

    None if it never falls.
    """
    if len(points) < 2:
        return None
    smooth = np.array(smoothed([loss for _, loss in points]))
    least = int(smooth.argmin())
    if least == 0:
        return None
    falls = np.gradient(smooth)[: least + 1]  # by equal steps of log(rate)
    return points[int(falls.argmin())][0], points[least][0] / 10
