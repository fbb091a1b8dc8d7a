"""The training step against PyTorch's losses, against plain backward, and against itself on other threads."""

import contextlib
import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import memory_in_use, normal, uniform
from minivit.backend.threads import wait
from minivit.errors import CheckpointError, ConfigError, DataError, GraphError, NonFiniteError, ShapeError
from minivit.measure.speed import image_flops
from minivit.nn.module import mode
from minivit.runs.results import draw_attention
from minivit.train.ema import EMA
from minivit.train.optim import SGD, AdamW, Muon, clip_grad_norm, layer_scales
from minivit.train.pieces import Piece, Totals
from tests.test_vit import SMALL, disturbed, golden_model, goldens  # noqa: F401


def make(dtype=np.float32, **settings):
    model = disturbed(mv.ViT(**{**SMALL, "depth": 2, **settings})).to(dtype)
    return model, AdamW(model.named_parameters(), lr=1e-2)


def batch(n=7):
    return normal(mv.Key(1), (n, 3, 12, 8)).astype(np.float32), np.arange(n) % 5


def plain_gradients(model, images, labels):
    ops.cross_entropy(model(images), labels).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return grads


# ---- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plain", "step"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_twenty_steps_follow_pytorchs_losses(goldens, kind, how):  # noqa: F811
    model = golden_model(goldens, np.float32)
    opt = AdamW(model.named_parameters()) if kind == "adamw" else SGD(model.named_parameters(), lr=0.01)
    step = mv.TrainStep(model, opt)
    losses = []
    for images, labels in zip(goldens["train/images"], goldens["train/labels"], strict=True):
        if how == "step":
            losses.append(step(images, labels))
        else:
            loss = ops.cross_entropy(model(images), labels)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
    assert len(losses) == 20
    np.testing.assert_allclose(losses, goldens[f"{kind}/losses"], rtol=0, atol=1e-5)
    if kind == "adamw":
        for name, p in model.named_parameters():
            ours, theirs = p.data, goldens[f"adamw/final/{name}"]
            if name.endswith(
                "qkv.bias"
            ):  # the keys' bias has no gradient but rounding noise, which Adam makes steps of
                ours, theirs = np.delete(ours, slice(16, 32)), np.delete(theirs, slice(16, 32))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6, err_msg=name)


def test_one_adamw_step_is_its_closed_form():
    p = mv.nn.Parameter(np.array([[1.0, -2.0]]))
    opt = AdamW([("w", p)], lr=0.1, betas=(0.8, 0.9), eps=0.01, weight_decay=0.5)
    expected = p.data.copy()
    m = v = 0.0
    for t, g in enumerate(([[0.3, -0.1]], [[0.2, 0.4]]), start=1):
        g = np.array(g)
        p.grad = g
        opt.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 0.01)
        np.testing.assert_allclose(p.data, expected, rtol=1e-14)


def test_biases_norms_class_token_and_positions_do_not_decay():
    model = mv.ViT(**SMALL)
    decayed = {n for n, p in model.named_parameters() if p.decays}
    blocks = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"blocks.{i}.{b}.weight" for i in range(3) for b in blocks
    }
    before = {n: p.data.copy() for n, p in disturbed(model).named_parameters()}
    opt = AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5)
    opt.update()  # with gradients of zero, decay is all that moves a parameter
    for name, p in model.named_parameters():
        np.testing.assert_allclose(p.data, before[name] * (0.95 if name in decayed else 1.0), rtol=1e-6, err_msg=name)


def test_parameters_without_gradient_are_left_alone():
    model, opt = make()
    before = model.state_dict()
    model.head.weight.grad = np.ones_like(model.head.weight.data)
    opt.step()
    changed = {n for n, v in model.state_dict().items() if (v != before[n]).any()}
    assert changed == {"head.weight"}


def test_frozen_parameters_cost_nothing_and_stay():
    model = disturbed(mv.ViT(**SMALL))
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("head.")
    opt = AdamW(model.named_parameters())
    assert opt.names == ["head.weight", "head.bias"]
    before = model.state_dict()
    mv.TrainStep(model, opt)(*batch())
    assert {n for n, v in model.state_dict().items() if (v != before[n]).any()} == {"head.weight", "head.bias"}


def test_optimizer_state_round_trip():
    (a, opt_a), (b, opt_b) = make(), make()
    step_a, step_b = mv.TrainStep(a, opt_a), mv.TrainStep(b, opt_b)
    for _ in range(3):
        step_a(*batch())
    b.load_state_dict(a.state_dict())
    opt_b.load_state_dict(opt_a.state_dict())
    assert step_a(*batch()) == step_b(*batch())
    assert all((x == y).all() for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    state = opt_a.state_dict()
    state["m/head.weight"] = np.zeros(3)
    with pytest.raises(CheckpointError, match=r"m/head\.weight"):
        opt_b.load_state_dict(state)


def test_clip_grad_norm():
    a, b = mv.nn.Parameter(np.zeros((2, 2))), mv.nn.Parameter(np.zeros(3))
    a.grad, b.grad = np.full((2, 2), 3.0), np.full(3, 4.0)
    norm = math.sqrt(4 * 9 + 3 * 16)
    assert clip_grad_norm([a, b], 1.0) == pytest.approx(norm)
    assert np.sqrt((a.grad**2).sum() + (b.grad**2).sum()) == pytest.approx(1.0, rel=1e-6)
    assert a.grad[0, 0] / b.grad[0] == pytest.approx(0.75)
    assert clip_grad_norm([a, b], 10.0) == pytest.approx(1.0, rel=1e-6)  # and left alone


def test_bad_optimizers():
    with pytest.raises(ConfigError, match="no parameter"):
        AdamW([])
    with pytest.raises(ConfigError, match="at least 0"):
        AdamW(mv.ViT(**SMALL).named_parameters(), lr=-1.0)
    model, opt = make()
    with pytest.raises(GraphError, match=r"call loss\.backward"):
        opt.step()
    model.to(np.float64)
    with pytest.raises(GraphError, match=r"after model\.to"):
        opt.update()


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 100])
@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 1e-6)], ids=["float64", "float32"])
def test_gradients_equal_the_plain_ones(threads, micro_batch, dtype, tolerance):
    model, opt = make(dtype)
    images, labels = batch()
    plain = plain_gradients(model, images.astype(dtype), labels)
    opt.lr = 0.0
    mv.TrainStep(model, opt, threads=threads, micro_batch=micro_batch)(images, labels)
    difference = opt.store.grad - np.concatenate([plain[name].reshape(-1) for name in opt.names])
    assert np.linalg.norm(difference) <= tolerance * np.linalg.norm(opt.store.grad)
    if dtype == np.float64:  # in float32 the rounding of a small gradient, of either way, is larger
        for name, d in zip(opt.names, opt.store.split(difference), strict=True):
            assert np.linalg.norm(d) <= tolerance * max(np.linalg.norm(plain[name]), 1e-3), name


def test_dropout_does_not_depend_on_threads_or_micro_batches():
    results = []
    for threads, micro_batch in ((1, None), (2, 2), (3, 1)):
        model, opt = make(dropout=0.2, attention_dropout=0.2, embed_dropout=0.1, drop_path=0.3)
        opt.lr = 0.0
        loss = mv.TrainStep(model, opt, threads=threads, micro_batch=micro_batch)(*batch())
        results.append((loss, opt.store.grad.copy()))
    for loss, grad in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        np.testing.assert_allclose(grad, results[0][1], atol=1e-6 * np.abs(grad).max())


def test_equal_settings_give_equal_bits():
    states = []
    for _ in range(3):
        model, opt = make(dropout=0.1)
        step = mv.TrainStep(model, opt, threads=2, micro_batch=2)
        for _ in range(4):
            step(*batch())
        states.append(model.state_dict())
    for state in states[1:]:
        assert all((state[n] == v).all() for n, v in states[0].items())


def test_each_step_draws_other_masks():
    model, opt = make(dropout=0.5)
    opt.lr = 0.0
    step = mv.TrainStep(model, opt)
    assert step(*batch()) != step(*batch())


def test_clipping_in_the_step():
    model, opt = make()
    step = mv.TrainStep(model, opt, clip_norm=1e-3)
    step(*batch())
    assert step.grad_norm > 1e-3
    assert np.linalg.norm(opt.store.grad) == pytest.approx(1e-3, rel=1e-3)


def test_non_finite_loss_stops_before_the_update():
    model, opt = make()
    step = mv.TrainStep(model, opt, threads=1)
    before = model.state_dict()
    images, labels = batch()
    bad = images.copy()
    bad[3, 1, 2, 3] = np.nan
    with pytest.raises(NonFiniteError, match="the images"):
        step(bad, labels)
    assert opt.steps == 0
    assert all((before[n] == v).all() for n, v in model.state_dict().items())
    with np.errstate(all="ignore"):
        model.blocks[1].mlp.fc1.weight.data[...] = 3e38
        with pytest.raises(NonFiniteError, match=r"the output of blocks\.1\.mlp\.fc1"):
            step(images, labels)
        model.blocks[0].mlp.fc1.weight.data[0, 0] = np.inf
        with pytest.raises(NonFiniteError, match=r"the parameter blocks\.0\.mlp\.fc1\.weight"):
            step(images, labels)


def test_bad_batches():
    model, opt = make()
    step = mv.TrainStep(model, opt)
    images, labels = batch()
    with pytest.raises(ShapeError, match="7 images, 6 labels"):
        step(images, labels[:6])
    with pytest.raises(DataError, match=r"label 5 .* outside"):
        step(images, labels + 1)
    with pytest.raises(DataError, match="empty"):
        step(images[:0], labels[:0])
    with pytest.raises(ConfigError, match="at least 1"):
        mv.TrainStep(model, opt, threads=0)
    with pytest.raises(ConfigError, match="positive"):
        mv.TrainStep(model, opt, clip_norm=-1.0)


def test_a_parameter_that_the_optimizer_does_not_have():
    model, opt = make()
    step = mv.TrainStep(model, opt)
    model.reset_head(5)
    with pytest.raises(GraphError, match=r"head\.(weight|bias) requires a gradient, but the optimizer"):
        step(*batch())
    assert opt.steps == 0


def test_lists_and_tensors_are_taken_too():
    images, labels = batch()
    losses = []
    for x, y in ((images, labels), (mv.tensor(images), labels.tolist()), (images.tolist(), mv.tensor(labels))):
        model, opt = make()
        losses.append(mv.TrainStep(model, opt)(x, y))
        assert mv.predict_logits(model, x).shape == (7, 5)
    assert losses[0] == losses[1] == losses[2]


def test_an_interrupt_waits_for_the_threads_and_changes_nothing(monkeypatch):
    model, opt = make()
    step = mv.TrainStep(model, opt, threads=2, micro_batch=1)
    before, running = model.state_dict(), []

    def interrupted(futures, **how):
        if how:
            raise KeyboardInterrupt
        done = wait(futures)
        running.extend(f.running() for f in futures)
        return done

    monkeypatch.setattr("minivit.backend.threads.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(*batch())
    assert running == [False, False]
    monkeypatch.undo()
    assert opt.steps == 0
    assert all((before[n] == v).all() for n, v in model.state_dict().items())
    again, fresh = make()
    assert step(*batch()) == mv.TrainStep(again, fresh, threads=2, micro_batch=1)(*batch())


def test_neither_a_step_nor_a_failed_one_leaves_cycles():
    model, opt = make()
    step = mv.TrainStep(model, opt, threads=2, micro_batch=2)
    images, labels = batch()

    def fail():
        with contextlib.suppress(DataError):
            step(images, labels + 5)

    for run in (lambda: step(images, labels), fail):
        run()
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                run()
            assert gc.collect() == 0
        finally:
            gc.enable()


def test_small_batches_are_not_shared_out_unless_asked():
    model, opt = make()
    few, many = mv.TrainStep(model, opt).team, mv.TrainStep(model, opt, threads=2).team
    assert few.threads_for(7) == 1  # 7 · 13 tokens · 16 numbers
    assert many.threads_for(7) == 2
    few.threads = 4
    assert few.threads_for(100_000) == 4


def test_predict_logits_equal_the_models_and_leave_its_mode():
    model, _ = make(dropout=0.5)
    images, _ = batch(9)
    logits = mv.predict_logits(model, images, threads=2, micro_batch=2)
    assert model.training
    np.testing.assert_allclose(logits, model.eval()(images).numpy(), rtol=1e-5, atol=1e-6)


SETTINGS = {"dropout": 0.2, "attention_dropout": 0.2, "embed_dropout": 0.1, "drop_path": 0.3}


@pytest.mark.parametrize("settings", [{}, SETTINGS, {"pool": "mean", "head": "mlp"}])
def test_a_step_on_a_gpu_waits_for_it_once(strict_cupy, settings):
    """Through the strict stand-in: the CPU's loss and gradients, one sync (the loss), nothing brought over twice."""
    results = []
    for device in ("cpu", "cuda"):
        model = disturbed(mv.ViT(**{**SMALL, "depth": 2, **settings})).to(device)
        opt = AdamW(model.named_parameters(), lr=1e-2)
        step = mv.TrainStep(model, opt, clip_norm=1.0)
        images, labels = batch()
        step(images, labels)
        strict_cupy.counters.reset()
        loss = step(images, labels)
        if device == "cuda":
            assert model.head.weight.device == "cuda:0"
            assert strict_cupy.counters.launches > 100
            assert strict_cupy.counters.syncs == 1, strict_cupy.counters.synced
        results.append((loss, model.state_dict()))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for name, value in results[0][1].items():
        if not name.endswith("qkv.bias"):  # the keys' bias has no gradient but noise
            np.testing.assert_allclose(results[1][1][name], value, atol=2e-5, err_msg=name)


def test_a_thousand_steps_leak_nothing():
    model = mv.ViT(image_size=8, patch_size=4, in_channels=1, dim=8, depth=1, heads=2)
    step = mv.TrainStep(model, AdamW(model.named_parameters()))
    images, labels = uniform(mv.Key(1), (8, 1, 8, 8)), np.arange(8)
    for _ in range(50):
        step(images, labels)
    gc.collect()
    gc.disable()
    try:
        before = memory_in_use()
        for _ in range(1000):
            step(images, labels)
        assert memory_in_use() - before < 2_000_000
    finally:
        gc.enable()


def test_a_float64_model_trains_from_float32_images():
    model = disturbed(mv.ViT(**{**SMALL, "depth": 2})).to(np.float64)
    step = mv.TrainStep(model, AdamW(model.named_parameters()))
    assert step(*batch()) > 0
    assert mv.predict_logits(model, batch()[0]).dtype == np.float64


# ---- the four verbs --------------------------------------------------------------------------------------------------


def values(model, opt):
    """Return a copy of what a step may not change before its last verb."""
    return [opt.steps, opt.store.values.copy(), *(a.copy() for a in opt.state.values())]


def unchanged(before, model, opt):
    return all(np.array_equal(a, b) for a, b in zip(before, values(model, opt), strict=True))


def flat(opt, by_name):
    return np.concatenate([by_name[name].reshape(-1) for name in opt.names])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gradients_leaves_each_threads_sum_in_its_buffer_and_changes_nothing_else(threads):
    model, opt = make(np.float64)
    images, labels = batch()
    images = images.astype(np.float64)
    whole = ops.cross_entropy(model(images), labels).item()
    plain = flat(opt, plain_gradients(model, images, labels))
    step, before = mv.TrainStep(model, opt, threads=threads, micro_batch=2), values(model, opt)
    for buffer in step.buffers:
        buffer.flat[...] = 1e9  # what was there before is gone
    for _ in range(2):
        pieces = step.gradients(step._batch(images, labels))
        assert all(buffer.written == set(range(len(opt.names))) for buffer in step.buffers)
        np.testing.assert_allclose(sum(buffer.flat for buffer in step.buffers), plain, atol=1e-13)
    assert len(pieces) == len(step.team.pieces(7))
    assert sum(float(piece.loss) for piece in pieces) == pytest.approx(whole, rel=1e-13)
    assert unchanged(before, model, opt) and math.isnan(step.grad_norm) and step.right is None
    assert step.buffers[0].flat is opt.store.grad


def test_exchange_adds_up_what_the_threads_have_found():
    model, opt = make(np.float64)
    step, before = mv.TrainStep(model, opt, threads=3), values(model, opt)
    first, second, idle = step.buffers
    for value, buffer in enumerate(step.buffers, 1):
        buffer.flat[...] = 100.0 * value
    first.slots[0].add(np.full(opt.parameters[0].shape, 2.0))
    first.slots[0].add(np.full(opt.parameters[0].shape, 3.0))
    second.slots[0].add(np.full(opt.parameters[0].shape, 1.0))
    second.slots[4].add(np.full(opt.parameters[4].shape, 7.0))
    pieces = [Piece(np.asarray(loss), np.asarray(right)) for loss, right in ((0.5, 3), (0.25, 0), (1.0, 2))]
    totals = step.exchange(pieces)
    expected = [np.full(p.shape, {0: 6.0, 4: 7.0}.get(i, 0.0)) for i, p in enumerate(opt.parameters)]
    for name, view, value in zip(opt.names, opt.store.split(opt.store.grad), expected, strict=True):
        np.testing.assert_array_equal(view, value, err_msg=name)
    assert first.written == {0, 4} and (idle.flat == 300.0).all()
    assert totals == (1.75, pytest.approx(np.linalg.norm(opt.store.grad), rel=1e-14), 5)
    assert unchanged(before, model, opt)
    assert step.exchange([*pieces, Piece(np.asarray(0.0), None)]).right is None  # unknown of one, unknown of all
    first.mark(())
    second.mark(())
    with pytest.raises(GraphError, match="no parameter of the optimizer gets a gradient"):
        step.exchange(pieces)


def test_clip_scales_the_whole_gradient_down_and_never_up():
    model, opt = make(np.float64)
    before = values(model, opt)
    for limit, scale in ((None, 1.0), (4.0, 0.5), (8.0, 1.0), (100.0, 1.0)):
        step = mv.TrainStep(model, opt, threads=2, clip_norm=limit)
        step.team.spread = lambda work, length: [work(a, b) for a, b in ((0, 100), (100, length))]
        gradient = normal(mv.Key(3), opt.store.grad.shape)
        opt.store.grad[...] = gradient
        step.clip(8.0)
        np.testing.assert_allclose(opt.store.grad, gradient * scale, rtol=1e-6)
        assert scale < 1.0 or (opt.store.grad == gradient).all()
    assert unchanged(before, model, opt)


def test_update_changes_what_is_written_in_the_first_buffer():
    model, opt = make(np.float64)
    step = mv.TrainStep(model, opt, threads=2)
    opt.store.grad[...] = 1.0
    step.buffers[0].mark({1, 2})
    step.buffers[1].mark({5})  # what exchange has not taken over is none of its business
    before = model.state_dict()
    step.update()
    assert {n for n, v in model.state_dict().items() if (v != before[n]).any()} == {opt.names[1], opt.names[2]}
    assert opt.steps == 1


def test_update_before_any_gradient_changes_nothing():
    model = mv.create_model("vit_digits", depth=1)
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5))
    before = step.opt.store.values.copy()
    with pytest.raises(GraphError, match="no gradient to update by"):
        step.update()
    np.testing.assert_array_equal(step.opt.store.values, before)
    assert step.opt.steps == 0


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
def test_an_exchange_of_ones_own_makes_two_steps_on_halves_one_on_the_whole(clip_norm):
    """As two machines would: either has half of the batch, and both have the mean of the halves' gradients."""
    images, labels = batch(8)
    images = images.astype(np.float64)

    class Half(mv.TrainStep):
        def exchange(self, pieces):
            totals = super().exchange(pieces)
            other = self.other
            other_totals = mv.TrainStep.exchange(other, other.gradients(other._batch(images[4:], labels[4:])))
            self.opt.store.grad += other.opt.store.grad
            self.opt.store.grad /= 2.0
            norm = float(np.linalg.norm(self.opt.store.grad))
            return Totals((totals.loss + other_totals.loss) / 2, norm, totals.right + other_totals.right)

    results = []
    for kind in (mv.TrainStep, Half):
        model, opt = make(np.float64)
        step = kind(model, opt, clip_norm=clip_norm, threads=1)
        if kind is Half:
            step.other = mv.TrainStep(*make(np.float64), threads=1)
        loss = step(images, labels) if kind is mv.TrainStep else step(images[:4], labels[:4])
        results.append((loss, step.grad_norm, step.right, model.state_dict()))
    (loss, norm, right, state), (*again, other) = results
    assert again == [pytest.approx(loss, rel=1e-13), pytest.approx(norm, rel=1e-13), right]
    for name, value in state.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-7, atol=1e-9, err_msg=name)


def test_each_verb_is_called_once_in_its_order():
    model, opt = make()
    step, called = mv.TrainStep(model, opt), []
    for name in ("update", "clip", "exchange", "gradients"):
        verb = getattr(step, name)
        setattr(step, name, lambda *given, name=name, verb=verb: called.append(name) or verb(*given))
    step(*batch())
    assert called == ["gradients", "exchange", "clip", "update"]
    model.head.weight.data[0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        step(*batch())
    assert called[4:] == ["gradients", "exchange"]


# ---- only what gets a gradient ---------------------------------------------------------------------------------------

KINDS = {
    "adamw": lambda model: AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.3),
    "muon": lambda model: Muon(model.named_parameters(), lr=1e-2, weight_decay=0.3),
    "sgd": lambda model: SGD(model.named_parameters(), lr=1e-2, weight_decay=0.3),
}


class WithSpares(mv.ViT):
    """A ViT with a layer that no image uses, and one that only the image with the label 4 uses."""

    def __init__(self, **settings):
        super().__init__(**settings)
        with mv.random_key(mv.Key(3)):
            self.unused, self.seldom = mv.nn.Linear(16, 16), mv.nn.Linear(5, 5)

    def forward(self, images):
        logits = super().forward(images)
        odd = [i for i in range(len(images)) if images[i, 0, 0, 0] == 9.0]
        return logits + self.seldom(logits[odd[0]]) if odd else logits


@pytest.mark.parametrize("clip_norm", [None, 1e-2])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_gets_no_gradient_stays_and_the_rest_moves_as_in_plain_steps(kind, threads, clip_norm):
    images, labels = batch()
    images[4, 0, 0, 0] = 9.0
    results = []
    for how in ("step", "plain"):
        model = disturbed(WithSpares(**{**SMALL, "qkv_bias": False})).to(np.float64)
        opt = KINDS[kind](model)
        ema = EMA(opt.store, 0.9)
        step = mv.TrainStep(model, opt, threads=threads, micro_batch=7, clip_norm=clip_norm)
        norms = []
        for t in range(5):
            if t == 2:  # after it has moved, and has moments and an average of its own
                for name, p in model.named_parameters():
                    if name.startswith(("blocks.1.", "cls_token", "norm.")):
                        p.requires_grad = False
                        p.grad = None if how == "step" else np.ones_like(p.data)  # left over from before
                frozen = everything(model, opt, ema)
            images[4, 0, 0, 0] = 9.0 if t < 3 else 0.0
            if how == "step":
                step(images[4:5] if threads == 1 else images[3:5], labels[4:5] if threads == 1 else labels[3:5])
                norms.append(step.grad_norm)
            else:
                for p in model.parameters():
                    p.grad = None if p.requires_grad else p.grad
                pieces = [slice(4, 5)] if threads == 1 else [slice(3, 4), slice(4, 5)]
                for piece in pieces:  # as the threads have them: the odd image is alone
                    loss = ops.cross_entropy(model(images[piece].astype(np.float64)), labels[piece]) / len(pieces)
                    loss.backward()
                norms.append(clip_grad_norm(model.parameters(), clip_norm or math.inf))
                opt.step()
            ema.update()
        after = everything(model, opt, ema)
        for name, value in frozen.items():
            if any(part in name for part in ("blocks.1.", "cls_token", "/norm.", "unused")):
                assert (after[name] == value).all(), name
            elif "steps" not in name and "seldom" not in name and not name.startswith("opt/v/"):
                assert (after[name] != value).any(), name
        results.append(after | {"norms": np.array(norms)})
    for name, value in results[0].items():
        np.testing.assert_allclose(value, results[1][name], rtol=1e-9, atol=1e-13, err_msg=name)


def everything(model, opt, ema):
    states = {"model": model.state_dict(), "opt": opt.state_dict(), "ema": ema.state_dict()}
    return {f"{what}/{name}": value for what, state in states.items() for name, value in state.items()}


def test_a_step_in_which_nothing_gets_a_gradient():
    model, opt = make()
    before = model.state_dict()
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(GraphError, match="no parameter of the optimizer gets a gradient"):
        mv.TrainStep(model, opt)(*batch())
    model.head.weight.requires_grad = True
    for loss, wrong in ((lambda x, y: 1.0, "is a float"), (lambda x, y: (x * x).sum(axis=1), r"shape \(7,\)")):
        with pytest.raises((GraphError, ShapeError), match=wrong):
            mv.TrainStep(model, opt, loss)(*batch())
    assert opt.steps == 0 and all((before[n] == v).all() for n, v in model.state_dict().items())


def test_buffers_of_threads_without_work_are_neither_cleared_nor_added():
    model, opt = make(np.float64)
    images, labels = batch(1)
    plain = plain_gradients(model, images.astype(np.float64), labels)
    step = mv.TrainStep(model, opt, threads=3)
    for buffer in step.buffers[1:]:
        buffer.flat[...] = 7.0
    step(images, labels)
    np.testing.assert_allclose(opt.store.grad, np.concatenate([plain[n].reshape(-1) for n in opt.names]), atol=1e-13)
    assert all((buffer.flat == 7.0).all() for buffer in step.buffers[1:])


@pytest.mark.parametrize("rate", [math.nan, math.inf, -1e-3, 1e39, 10**400, None, "fast"], ids=lambda r: str(r)[:6])
def test_a_rate_that_is_none_changes_nothing(rate):
    model, opt = make()
    step = mv.TrainStep(model, opt)
    step(*batch())
    before = everything(model, opt, EMA(opt.store, 0.9))
    for name in ("lr", "weight_decay"):
        usual = getattr(opt, name)
        setattr(opt, name, rate)
        with pytest.raises(ConfigError, match=rf"^step 1: {name}="):
            step(*batch())
        with pytest.raises(ConfigError, match=rf"^step 1: {name}="):
            opt.update()
        setattr(opt, name, usual)
    after = everything(model, opt, EMA(opt.store, 0.9))
    assert all((after[name] == value).all() for name, value in before.items())
    step(*batch())


def test_the_first_non_finite_gradient_is_that_of_the_last_layer():
    model = disturbed(mv.ViT(**{**SMALL, "depth": 2}))
    scales = layer_scales(model.named_parameters(), 0.5)
    opt = AdamW(model.named_parameters(), lr=1e-2, lr_scales=scales)
    assert not opt.names[-1].startswith("head.")

    def loss(logits, labels):  # finite, with an infinite slope
        return ops.cross_entropy(logits, labels) + ops.sqrt(ops.mean(logits) * 0.0)

    with pytest.raises(NonFiniteError, match=r"the gradient of head\.bias"):
        mv.TrainStep(model, opt, loss)(*batch())


# ---- how many are right ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_right_counts_the_images_whose_largest_logit_is_their_label(threads):
    model, opt = make()
    images, labels = batch()
    step = mv.TrainStep(model, opt, threads=threads, micro_batch=2)
    assert step.right is None
    for y in (labels, labels.tolist(), np.eye(5, dtype=np.float32)[labels] * 0.7 + 0.06):
        expected = int((mv.predict_logits(model, images).argmax(axis=1) == labels).sum())
        step(images, y)
        assert step.right == expected and type(step.right) is int
    with pytest.raises(DataError):
        step(images, labels + 5)
    assert step.right is None


def test_right_is_unknown_where_a_logit_is_no_answer():
    images, labels = batch()
    for settings, y, loss in (
        ({"pool": "none"}, np.repeat(labels[:, None], 12, axis=1), ops.cross_entropy),
        ({}, labels.astype(np.float32), lambda logits, y: ((logits[:, 0] - y) ** 2).mean()),
        ({}, np.ones((7, 5), np.float32), lambda logits, y: ((logits - y) ** 2).mean()),
        ({"num_classes": 1}, labels.astype(np.float32)[:, None], lambda logits, y: ((logits - y) ** 2).mean()),
    ):
        model, opt = make(**settings)
        step = mv.TrainStep(model, opt, loss)
        step(images, y)
        assert step.right is None


# ---- modes -----------------------------------------------------------------------------------------------------------


def flags(model):
    return [m.training for _, m in model.named_modules()]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_in_eval_mode_trains_as_one_in_training_mode(threads, recompute):
    results = []
    for training in (True, False):
        model, opt = make(**SETTINGS, recompute=recompute)
        model.train(training)
        before = flags(model)
        loss = mv.TrainStep(model, opt, threads=threads, micro_batch=2)(*batch())
        assert flags(model) == before
        results.append((loss, opt.store.grad.copy()))
    assert results[0][0] == results[1][0] and (results[0][1] == results[1][1]).all()
    model, opt = make()  # and dropout is on
    assert mv.TrainStep(model, opt, threads=threads, micro_batch=2)(*batch()) != results[0][0]


def test_fit_after_load_model_trains_with_dropout(tmp_path):
    train = mv.data.Loader(mv.data.load("digits").subset(np.arange(64)), 32, mv.Key(0))
    settings = {"image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 8, "depth": 1, "heads": 2, "dropout": 0.5}
    rows = []
    for start in ("new", "loaded"):
        model = mv.ViT(**settings)
        if start == "loaded":
            trainer = mv.Trainer(model, AdamW(model.named_parameters(), lr=0.0), epochs=1, folder=tmp_path)
            trainer.fit(train)
            model = mv.load_model(tmp_path / "checkpoints" / "last.npz")
        trainer = mv.Trainer(model, AdamW(model.named_parameters(), lr=1e-2), epochs=2)
        rows.append([row["loss"] for row in trainer.fit(train)])
        assert model.training == (start == "new")
    assert rows[0] == rows[1]


def test_parts_that_were_set_to_eval_mode_stay_in_it():
    losses = []
    for off in ("rate", "mode"):
        model, opt = make(**SETTINGS if off == "mode" else {**SETTINGS, "embed_dropout": 0.0})
        if off == "mode":
            model.embed_drop.eval()
        before = flags(model)
        with mv.random_key(mv.Key(1)):
            losses.append(mv.TrainStep(model, opt, mean_square)(*batch()))
        mv.predict_logits(model, batch()[0])
        assert flags(model) == before and model.training
    assert losses[0] == losses[1]


def test_what_looks_at_a_model_leaves_the_modes_of_its_parts(tmp_path):
    few = mv.data.load("digits").subset(np.arange(4))
    model = mv.create_model("vit_digits", depth=1)
    model.blocks[0].eval()
    before = flags(model)
    image_flops(model)
    draw_attention(model, mv.data.Loader(few, 4, mv.Key(0), shuffle=False), tmp_path / "attention.png")
    assert flags(model) == before and len(set(before)) == 2


def mean_square(logits, labels):
    return (logits * logits).mean()


def test_predictions_side_by_side_see_no_dropout():
    """The first ends while the second is under way, and a step is made meanwhile."""
    first_ended, second_begun = threading.Event(), threading.Event()

    class Waiting(mv.nn.Module):
        def __init__(self):
            self.linear, self.drop, self.seen = mv.nn.Linear(4, 3), mv.nn.Dropout(0.5), {}

        def forward(self, x):
            name = threading.current_thread().name
            if name == "first":
                assert second_begun.wait(20)
            elif name == "second":
                second_begun.set()
                assert first_ended.wait(20)
            self.seen.setdefault(name, set()).add((self.training, self.drop.training))
            return self.drop(self.linear(x))

    model, results = Waiting(), {}
    images = normal(mv.Key(1), (5, 4)).astype(np.float32)

    def predict():
        results[threading.current_thread().name] = mv.predict_logits(model, images, threads=1)

    first, second = (threading.Thread(target=predict, name=name) for name in ("first", "second"))
    second.start()
    first.start()
    first.join(20)
    step = mv.TrainStep(model, SGD(model.named_parameters(), lr=0.0), threads=1)
    step(images, np.arange(5) % 3)
    first_ended.set()
    second.join(20)
    assert model.seen["first"] == model.seen["second"] == {(False, False)}
    assert model.seen["MainThread"] == {(True, True)}
    assert (results["first"] == results["second"]).all() and model.training and model.drop.training


def test_a_block_in_another_mode_holds_for_its_thread_only():
    drop, seen = mv.nn.Dropout(0.5), []
    with mode(False):
        assert not drop.training
        thread = threading.Thread(target=lambda: seen.append(drop.training))
        thread.start()
        thread.join()
        with mode(True):
            assert drop.training
        with mode(None):
            assert drop.training
        drop.eval()
    assert seen == [True] and not drop.training


# ---- forks -----------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading, time
import numpy as np, threadpoolctl
import minivit as mv
from minivit.backend import blas_threads

signal.alarm(50)
model = mv.ViT(image_size=8, patch_size=4, in_channels=1, num_classes=3, dim=8, depth=1, heads=2)
step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters()), threads=2, micro_batch=2)
images, labels = np.zeros((6, 1, 8, 8), np.float32), np.arange(6) % 3
step(images, labels)
held, leave = threading.Event(), threading.Event()

def hold():
    with blas_threads(1):
        held.set()
        leave.wait()

def blas():
    return {lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"}

threadpoolctl.threadpool_limits(2, "blas")
other = threading.Thread(target=hold, daemon=True)
other.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(20)  # it is its own, and must not wait for ever either
    before = blas()
    loss = step(images, labels)
    mv.predict_logits(model, images, threads=2)
    os._exit(0 if np.isfinite(loss) and before == blas() == {2} else 1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
leave.set()
other.join()
step(images, labels)
print(code, blas())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_makes_steps_with_a_team_that_was_used_before():
    program = [sys.executable, "-W", "ignore", "-c", FORK]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split("\n")[0] == "0 {2}", done.stdout + done.stderr


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_model_optimizer_average_and_step_train_on_as_the_originals(copied):
    images, labels = batch(16)
    model, opt = make()
    ema, step = EMA(opt.store, 0.9), mv.TrainStep(model, opt, threads=2, micro_batch=3)
    step(images, labels)
    ema.update()
    before = model.state_dict()
    twins = copied((model, opt, ema, step))
    for m, o, e, s in (twins, (model, opt, ema, step)):
        s(images, labels)
        e.update()
        ops.cross_entropy(m(images), labels).backward()
        o.step()
        assert all(np.shares_memory(p.data, o.store.values) for p in o.parameters)
    first, second = everything(*twins[:3]), everything(model, opt, ema)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
    assert any((model.state_dict()[n] != a).any() for n, a in before.items())


def test_an_optimizer_refuses_a_name_or_a_parameter_given_twice():
    (model, _), (other, _) = make(), make()
    with pytest.raises(ConfigError, match=r"the same name twice: .*\n  → give each parameter once, by a name"):
        AdamW([*model.named_parameters(), *other.named_parameters()])
    with pytest.raises(ConfigError, match=r"the same parameter twice: head\.weight, again"):
        AdamW([("head.weight", model.head.weight), ("again", model.head.weight)])


@pytest.mark.parametrize("norm", [-1.0, 0.0, math.nan, "1", None])
def test_gradients_are_not_scaled_to_a_norm_that_is_none(norm):
    p = mv.nn.Parameter(np.ones(3))
    p.grad = np.ones(3)
    with pytest.raises(ConfigError, match="give a positive number"):
        clip_grad_norm([p], norm)
    np.testing.assert_array_equal(p.grad, np.ones(3))


def test_a_step_refuses_tensors_whose_graph_it_would_cut():
    images, labels = batch()
    step = mv.TrainStep(*make())
    soft = ops.softmax(mv.tensor(np.zeros((len(images), 5), np.float32), requires_grad=True))
    with pytest.raises(GraphError, match="no gradient in its labels"):
        step(images, soft)
    with pytest.raises(GraphError, match="no gradient in its images"):
        step(mv.tensor(images, requires_grad=True), labels)
    with pytest.raises(ShapeError, match=r"give arrays"):
        step(None, labels)
    assert math.isfinite(step(images, soft.detach()))


@pytest.mark.parametrize("count", [1.5, "2", 0])
def test_threads_are_a_whole_number(count):
    with pytest.raises(ConfigError, match="each must be a whole number"):
        mv.predict_logits(make()[0], batch()[0], threads=count)
