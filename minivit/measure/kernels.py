"""Which kernels the training step of a model launches: found by going through one, without a GPU and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minivit.backend.compiling import Plan
from minivit.backend.planning import planning
from minivit.models import model_outline
from minivit.nn.module import Parameter
from minivit.ops.cuda.sums import Arena
from minivit.train.ema import EMA
from minivit.train.optim import AdamW
from minivit.train.parameters import FlatParameters
from minivit.train.step import TrainStep

IMAGES = 4  # any number would do: a kernel serves all batches
BLOCKS = 3  # as many have all kernels that more have: the first drops no path, the last works on one token


def kernels_of(kind: str, values: Mapping[str, Any], precision: str) -> dict[Plan, int]:
    """Return the kernels of training steps of a model, with how often they launch each (0: asked for only).

    ``precision`` is one of :data:`minivit.train.precision.NAMES`. The steps are AdamW's, on labels and on shares, alone
    and with clipping, averaged weights and a second micro-batch. A model of more than three blocks is gone through as
    one of three.
    """
    values = {**values, "depth": min(values["depth"], BLOCKS)} if "depth" in values else values
    model = model_outline(kind, values)
    images = np.empty((IMAGES, *model.settings.image_shape), np.float32)
    labels = np.zeros(len(images), np.int64)
    shares = np.full((len(images), model.settings.num_classes), 1.0 / model.settings.num_classes, np.float32)
    with planning() as plans, np.errstate(all="ignore"):
        for p in model.parameters():
            _fill(p)
        store = FlatParameters(model.named_parameters())
        optimizer, average = AdamW(store, lr=1e-3), EMA(store, 0.999)
        for given in (labels, shares):
            for clip_norm, ema, pieces in ((None, None, 1), (1.0, average, 2)):
                step = TrainStep(model, optimizer, threads=1, micro_batch=IMAGES // pieces, clip_norm=clip_norm,
                                 precision=precision, ema=ema)  # fmt: skip
                batch = step._batch(images, given)
                step._work(replace(batch, sums=Arena(store.grad)))
    return plans


def _fill(p: Parameter) -> None:
    """Give a parameter that is an outline an array."""
    p.data = np.zeros(p.shape, p.dtype)
