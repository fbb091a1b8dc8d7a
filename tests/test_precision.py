"""Precisions by name, and the working copy that a model is lent in a step: the values that are learned stay float32."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import named_dtype, normal, to_numpy
from minivit.errors import ConfigError, DeviceError, DTypeError
from minivit.train import precision
from minivit.train.ema import EMA
from minivit.train.optim import AdamW
from minivit.train.precision import NAMES, WorkingCopy, check_precision

BF16 = named_dtype("bfloat16")
SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2}
IMAGES, LABELS = normal(mv.Key(7), (5, 1, 8, 8)).astype(np.float32), np.array([0, 1, 2, 1, 0])

halves = pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)


def make(device: str = "cpu", frozen: str = "") -> tuple[mv.ViT, AdamW]:
    model = mv.ViT(**SMALL).to(device)
    for name, p in model.named_parameters():
        p.requires_grad = not (frozen and name.startswith(frozen))
    return model, AdamW(model.named_parameters(), lr=0.01)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_float32_is_for_every_device():
    assert check_precision("float32", "cpu").dtype == np.float32
    assert not check_precision("float32", "cpu").is_half


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_cpu_trains_in_float32_alone(name):
    with pytest.raises(DeviceError, match=f"training in {name} on a CPU\n  → use float32"):
        check_precision(name, "cpu")


def test_an_unknown_name():
    with pytest.raises(ConfigError, match="unknown precision 'bf16'"):
        check_precision("bf16", "cpu")
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        check_precision("bfloat", "cpu")


def test_what_each_computes_in(strict_cupy, monkeypatch):
    monkeypatch.setattr(precision, "compute_capability", lambda device: (9, 0))
    found = {name: check_precision(name, "cuda") for name in NAMES}
    assert [(p.dtype, p.tf32, p.scaled, p.is_half) for p in found.values()] == [
        (np.float32, False, False, False),
        (np.float32, True, False, False),
        (BF16, False, False, True),
        (np.float16, False, True, True),
    ]


def test_an_old_gpu_and_a_missing_package(strict_cupy, monkeypatch):
    monkeypatch.setattr(precision, "compute_capability", lambda device: (7, 5))
    assert check_precision("float32", "cuda").dtype == np.float32
    for name in NAMES[1:]:
        with pytest.raises(DeviceError, match=rf"training in {name} on cuda:0, a GPU of compute capability 7\.5"):
            check_precision(name, "cuda")
    monkeypatch.setattr(precision, "compute_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert check_precision("float16", "cuda").scaled
    with pytest.raises(DTypeError, match="pip install"):
        check_precision("bfloat16", "cuda")


# ---- the working copy ------------------------------------------------------------------------------------------------


@halves
@pytest.mark.parametrize("frozen", ["", "blocks.0"], ids=["all", "frozen"])
def test_a_model_computes_in_what_it_is_lent(dtype, frozen):
    model, opt = make(frozen=frozen)
    copy, before = WorkingCopy(opt.store, model, dtype), model.state_dict()
    data, nodes = [p.data for p in model.parameters()], [p.node for p in model.parameters()]
    with copy.lent():
        assert all(p.dtype == dtype for p in model.parameters())
        logits = model(IMAGES.astype(dtype))
        loss = ops.cross_entropy(logits, LABELS)
        loss.backward()
        for p in model.parameters():
            assert (p.grad is None) == (not p.requires_grad)
            assert p.grad is None or p.grad.dtype == dtype
    assert logits.dtype == dtype and loss.dtype == np.float32
    assert all(a is b for a, b in zip(data, [p.data for p in model.parameters()], strict=True))
    assert all(a is b for a, b in zip(nodes, [p.node for p in model.parameters()], strict=True))
    for name, value in model.state_dict().items():
        assert value.dtype == np.float32 and (value == before[name]).all()
    assert len(copy.frozen) == sum(not p.requires_grad for p in model.parameters())


def test_the_gradients_are_those_of_the_float32_model():
    model, opt = make()
    copy = WorkingCopy(opt.store, model, BF16)
    with copy.lent():
        ops.cross_entropy(model(IMAGES.astype(BF16)), LABELS).backward()
    half = [p.grad.astype(np.float32) for p in model.parameters()]
    model.zero_grad()
    ops.cross_entropy(model(IMAGES), LABELS).backward()
    error = sum(float(((a - p.grad) ** 2).sum()) for a, p in zip(half, model.parameters(), strict=True))
    assert 0 < error < 0.03**2 * sum(float((p.grad**2).sum()) for p in model.parameters())


def test_what_is_lent_comes_back_after_an_error():
    model, opt = make()
    copy = WorkingCopy(opt.store, model, BF16)
    with pytest.raises(ValueError, match="stop"), copy.lent():
        raise ValueError("stop")
    opt.store.check_views()
    assert all(p.dtype == np.float32 and p.node.dtype == np.float32 for p in model.parameters())


@halves
def test_it_is_the_values_as_they_are_when_it_is_refreshed(strict_cupy, dtype):
    model, opt = make("cuda", frozen="head")
    copy, ema = WorkingCopy(opt.store, model, dtype), EMA(opt.store, 0.9)

    def is_fresh() -> bool:
        return all((to_numpy(c) == to_numpy(p.data).astype(dtype)).all() for p, c in copy.copies)

    assert is_fresh() and len(copy.copies) == len(list(model.parameters()))
    for change in (opt.update, ema.update, lambda: model.load_state_dict(mv.ViT(**SMALL, seed=3).state_dict())):
        opt.store.grad[...] = 1.0
        change()
        copy.refresh()
        assert is_fresh()
    head = dict(model.named_parameters())["head.weight"]
    head.data += 1.0  # frozen, and changed all the same
    assert not is_fresh()
    strict_cupy.counters.reset()
    copy.refresh()
    counters = strict_cupy.counters
    assert (counters.launches, counters.syncs, counters.transfers) == (1 + len(copy.frozen), 0, 0)
    assert is_fresh()
    opt.store.values += 1.0
    assert not is_fresh()
    with copy.lent():  # of itself
        pass
    assert is_fresh()


def test_between_the_parameters_the_copy_is_zero(strict_cupy):
    model, opt = make("cuda")
    copy = WorkingCopy(opt.store, model, BF16)
    between = np.ones(opt.store.values.size, bool)
    for start, stop in opt.store.spans:
        between[start:stop] = False
    assert between.any() and not to_numpy(copy.flat)[between].astype(np.float32).any()


def test_updates_and_averages_work_outside_of_what_is_lent(strict_cupy):
    model, opt = make("cuda")
    copy = WorkingCopy(opt.store, model, BF16)
    images = strict_cupy.asarray(IMAGES).astype(BF16)
    losses = []
    for _ in range(5):
        with copy.lent():
            loss = ops.cross_entropy(model(images), strict_cupy.asarray(LABELS))
            loss.backward()
        opt.step()  # a gradient in bfloat16 becomes float32 in the flat one
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
