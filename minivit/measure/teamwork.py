"""How many processes pay on this machine: measured once for a kind of step, and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Mapping
from typing import Any

import numpy as np

from minivit.backend import Key, cpu_cores, normal, random_bits
from minivit.backend.children import CAN_INHERIT
from minivit.files import open_regular, user_cache, write_text
from minivit.measure.machine import cpu_text
from minivit.measure.speed import step_flops, time_steps
from minivit.models import Model, build
from minivit.train.optim import AdamW
from minivit.train.step import TrainStep

WORTH = 2e11
"""So many FLOPs must a run have: one of fewer is over before it would be known."""

LARGE = 5e10
"""A step of more FLOPs keeps threads busy in few calls: of 1.2e11, two processes had 0.93 to 1.08 of their speed."""

STEPS = 9  # that are timed
GAIN = 1.05  # fewer gains of speed are within what a machine's speed drifts by
_LARGEST_FILE = 1 << 20


def workers_that_pay(model: Model, batch_size: int, steps: int) -> int:
    """Return how many processes make a step of such a model fastest on this CPU: 1, with threads, or one for each core.

    For a run of ``steps`` that is too short to be worth a measurement, and for large steps, it is 1. What was measured
    is kept in the user's cache, so that equal runs have equal bits.
    """
    cores = cpu_cores()
    if cores == 1 or not CAN_INHERIT:
        return 1
    flops = step_flops(model, batch_size)
    if flops * steps < WORTH or flops > LARGE:
        return 1
    described = json.dumps([cpu_text(), model.kind, model.config, batch_size], default=str)
    key, path = hashlib.sha256(described.encode()).hexdigest()[:32], user_cache() / "workers.json"
    known = _kept(path)
    if key not in known:
        alone, together = (seconds_a_step(model, batch_size, count) for count in (1, cores))
        known[key] = cores if alone > GAIN * together else 1
        with contextlib.suppress(OSError):  # a cache that cannot be written is measured for again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(known, indent=1))
    return known[key]


def seconds_a_step(model: Model, batch_size: int, workers: int, threads: int | None = None) -> float:
    """Return the median time of a training step of one like ``model``."""
    own = build(model.kind, model.config)
    step = TrainStep(own, AdamW(own.named_parameters()), threads=threads, workers=workers)
    images = normal(Key(0), (batch_size, *model.settings.image_shape)).astype(np.float32)
    labels = (random_bits(Key(1), (batch_size,)) % model.settings.num_classes).astype(np.int64)
    try:
        return statistics.median(time_steps(step, images, labels, STEPS))
    finally:
        step.crew.close()


def _kept(path: Any) -> dict[str, int]:
    """Return what was measured before; nothing where the file is missing or damaged."""
    try:
        with open_regular(path) as f:
            found = json.loads(f.read(_LARGEST_FILE))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, Mapping):
        return {}
    most = cpu_cores()
    return {key: n for key, n in found.items() if type(n) is int and 1 <= n <= most}
