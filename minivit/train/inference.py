"""Prediction over all cores."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from minivit.autograd.graph import first_order, no_grad
from minivit.backend import Array, Team, to_numpy
from minivit.nn.module import Module, mode
from minivit.train.sharing import as_array, team_for

GPU_ROWS = 256  # predicted at a time on a GPU: enough to keep it busy


def predict_logits(
    model: Module, images: Any, threads: int | None = None, micro_batch: int | None = None
) -> np.ndarray:
    """Return the logits of images (N, C, H, W) in eval mode as one NumPy array, computed in micro-batches.

    The model stays set as it is: threads may predict with it, and one may train it, at the same time.
    """
    first = next(model.parameters())
    if micro_batch is None and first.device != "cpu":
        micro_batch = GPU_ROWS
    team, images = team_for(model, threads, micro_batch), as_array(images, first.dtype)
    return np.concatenate(team.run(partial(_logits, model, team, images), len(images)))


def _logits(model: Module, team: Team, images: Array, thread: int, start: int, stop: int) -> np.ndarray:
    """Return the logits of a piece of the images."""
    with mode(False), no_grad(), first_order():
        return to_numpy(model(team.here(images[start:stop])).data)
