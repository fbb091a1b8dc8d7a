"""The average of the parameters: its recurrence, in shares, in the model's place and back, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal
from minivit.errors import CheckpointError, ConfigError, GraphError
from minivit.train import parameters
from minivit.train.ema import EMA
from minivit.train.optim import AdamW

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 1, "heads": 2}
IMAGES = normal(mv.Key(7), (5, 1, 8, 8)).astype(np.float32)


def make(decay=0.99, dtype=np.float32):
    model = mv.ViT(**SMALL).to(dtype)
    opt = AdamW(model.named_parameters(), lr=0.01)
    return model, opt, EMA(opt.store, decay)


def train(opt, ema, steps=5):
    for _ in range(steps):
        opt.store.grad[...] = normal(mv.Key(1, opt.steps), opt.store.grad.shape)
        opt.update()
        ema.update()


@pytest.mark.parametrize("decay", [0.3, 0.99, 0.0])
def test_the_average_is_its_recurrence(decay):
    _, opt, ema = make(decay, np.float64)
    expected = opt.store.values.copy()
    for t in range(1, 30):
        train(opt, ema, steps=1)
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * opt.store.values
        np.testing.assert_allclose(ema.flat, expected, rtol=1e-12)
    assert (np.abs(ema.flat - opt.store.values).max() > 1e-3) == (decay > 0)


def test_shares_of_threads_give_the_bits_of_the_whole(monkeypatch):
    (_, opt, ema), (_, other, shared) = make(), make()
    for _ in range(4):
        train(opt, ema, steps=1)
        other.store.grad[...] = opt.store.grad
        monkeypatch.setattr(parameters, "CHUNK", 7)
        other.begin_update()
        for span in ((500, other.store.values.size), (0, 33), (33, 500)):
            other.update_spans([span])
            shared.update_spans([span])
        monkeypatch.undo()
    assert (ema.flat == shared.flat).all()


def test_swapped_puts_the_average_in_and_the_parameters_back():
    model, opt, ema = make()
    train(opt, ema)
    own, average = model.state_dict(), ema.state_dict()
    values = opt.store.values.copy()
    other = mv.ViT(**SMALL)
    other.load_state_dict(average)
    with ema.swapped():
        np.testing.assert_array_equal(mv.predict_logits(model, IMAGES), mv.predict_logits(other, IMAGES))
        with ema.swapped():
            pass
        assert all((a == average[n]).all() for n, a in model.state_dict().items())
        assert (opt.store.values == values).all()
        with pytest.raises(GraphError, match="was replaced"):
            opt.update()
    assert all((a == own[n]).all() for n, a in model.state_dict().items())
    assert any((a != average[n]).any() for n, a in own.items())
    train(opt, ema)  # and it goes on


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_the_parameters_come_back_however_the_block_ends(error):
    model, opt, ema = make()
    train(opt, ema)
    own = model.state_dict()
    with pytest.raises(error), ema.swapped():
        raise error
    assert all((a == own[n]).all() for n, a in model.state_dict().items())
    train(opt, ema)


def test_the_state_comes_back_to_the_bit():
    (_, opt, ema), (_, other, loaded) = make(), make()
    train(opt, ema)
    state = ema.state_dict()
    assert state.keys() == set(opt.names)
    loaded.load_state_dict(state)
    other.load_state_dict(opt.state_dict())
    other.store.values[...] = opt.store.values
    train(opt, ema, 3)
    train(other, loaded, 3)
    assert (ema.flat == loaded.flat).all()
    assert all((state[n] != a).any() for n, a in ema.state_dict().items()), "a copy, not views"


@pytest.mark.parametrize("spoil", [{"norm.bias": np.zeros(3)}, {"more": np.zeros(1)}, None])
def test_a_state_that_does_not_fit_changes_nothing(spoil):
    _, opt, ema = make()
    train(opt, ema)
    before = ema.flat.copy()
    state = {n: a + 1 for n, a in ema.state_dict().items()}
    if spoil is None:
        del state["norm.bias"]
    else:
        state |= spoil
    with pytest.raises(CheckpointError, match=r"averaged parameters.*(norm\.bias|more)"):
        ema.load_state_dict(state)
    assert (ema.flat == before).all()


def test_frozen_parameters_have_no_average():
    model = mv.ViT(**SMALL)
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("head.")
    ema = EMA(AdamW(model.named_parameters()).store, 0.9)
    assert ema.state_dict().keys() == {"head.weight", "head.bias"}
    with ema.swapped():
        assert mv.predict_logits(model, IMAGES).shape == (5, 3)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_bad_decays(decay):
    with pytest.raises(ConfigError, match="in \\[0, 1\\)"):
        make(decay)


def test_on_a_gpu_nothing_waits_or_crosses(strict_cupy):
    _, opt, ema = make()
    train(opt, ema)
    model = mv.ViT(**SMALL).to("cuda")
    opt_gpu = AdamW(model.named_parameters(), lr=0.01)
    on_gpu = EMA(opt_gpu.store, 0.99)
    for t in range(5):
        grad = normal(mv.Key(1, t), opt.store.grad.shape).astype(np.float32)
        for name, view in opt_gpu.store.by_name(opt_gpu.store.grad).items():
            view[...] = strict_cupy.asarray(opt.store.by_name(grad)[name])
        opt_gpu.update()
        strict_cupy.counters.reset()
        on_gpu.update()
        assert (strict_cupy.counters.syncs, strict_cupy.counters.transfers) == (0, 0)
        assert strict_cupy.counters.launches <= 3
    for name, average in on_gpu.state_dict().items():
        np.testing.assert_allclose(average, ema.state_dict()[name], rtol=1e-6, atol=1e-7)
    on_gpu.load_state_dict(ema.state_dict())
    for name, average in on_gpu.state_dict().items():
        assert (average == ema.state_dict()[name]).all()
    with on_gpu.swapped():
        assert mv.predict_logits(model, IMAGES).shape == (5, 3)
