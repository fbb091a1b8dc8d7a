"""Training on a GPU goes as on the CPU: the losses of twenty steps, recorded and replayed, by kernels and without."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import Key, normal, tile
from minivit.models import build
from minivit.runs.recipes import recipe_model
from minivit.train.ema import EMA
from minivit.train.optim import AdamW, Muon
from tests import strict

any_cupy = strict.any_cupy
SMALL = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 24}


def losses(device: str, dtype: str, optimizer: str, rows: int, **settings: object) -> list[float]:
    kind, values = recipe_model("digits")
    model = build(kind, {**values, **settings})
    model.head.weight.data[...] = 0.1 * normal(Key(3), model.head.weight.shape)
    model = model.to(np.dtype(dtype)).to(device)
    opt = {"adamw": AdamW, "muon": Muon}[optimizer](model.named_parameters(), lr=1e-3, weight_decay=0.05)
    loss = partial(ops.cross_entropy, smoothing=0.1)
    step = mv.TrainStep(model, opt, loss, clip_norm=1.0, seed=1, ema=EMA(opt.store, 0.9))
    found = []
    for t in range(20):
        opt.lr = 1e-3 * (t + 1) / 20
        images = normal(Key(1, t), (rows, *model.settings.image_shape)).astype(dtype)
        found.append(step(images, (np.arange(rows) * 7 + t) % 10))
    assert step.why_launched == ""
    return found


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float64", 1e-10)])
def test_losses_are_those_of_the_cpu(any_cupy, monkeypatch, dtype, bound, optimizer):
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)  # the stand-in for them takes long
    cpu, gpu = (losses(device, dtype, optimizer, 8) for device in ("cpu", "cuda"))
    assert abs(cpu[0] - cpu[-1]) > 1e-3
    assert np.abs(np.subtract(cpu, gpu)).max() <= bound


def test_losses_by_kernels_are_those_of_the_cpu(any_cupy):
    cpu, gpu = (losses(device, "float32", "adamw", 3, **SMALL) for device in ("cpu", "cuda"))
    assert np.abs(np.subtract(cpu, gpu)).max() <= 1e-4
