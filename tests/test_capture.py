"""Steps on a GPU are recorded and replayed: to the bits of launched ones, and to the CPU's numbers but for rounding."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import normal, tile, to_numpy
from minivit.errors import ConfigError, DataError, GraphError, NonFiniteError, ShapeError
from minivit.nn.module import watching
from minivit.train import capture as capture_module
from minivit.train.ema import EMA
from minivit.train.optim import SGD, AdamW, Muon, layer_scales
from minivit.train.pieces import Totals
from tests import strict
from tests.test_step import SETTINGS, everything
from tests.test_vit import SMALL, disturbed

any_cupy = strict.any_cupy


@pytest.fixture
def plain(monkeypatch):
    """Let the plain operations run: the stand-in for kernels takes a hundred times as long."""
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)


class Masked(mv.ViT):
    """A ViT some of whose tokens may not be looked at."""

    def forward(self, images):
        xp = type(self).xp
        return super().forward(images, mask=xp.tri(self.tokens, dtype=bool).T if xp is not None else None)


def freeze(model):
    for name, p in model.named_parameters():
        p.requires_grad = "blocks.0." not in name and "cls_token" not in name


def with_parts_in_eval_mode(model):
    model.blocks[0].eval()


MODELS = {"plain": {}, "dropout": SETTINGS, "recompute": SETTINGS | {"recompute": True}, "mean": {"pool": "mean"}}
OPTIMIZERS = {
    "adamw": lambda m: AdamW(m.named_parameters(), lr=1e-2, weight_decay=0.1),
    "scaled": lambda m: AdamW(m.named_parameters(), lr=1e-2, lr_scales=layer_scales(m.named_parameters(), 0.5)),
    "sgd": lambda m: SGD(m.named_parameters(), lr=1e-2, weight_decay=0.1),
    "muon": lambda m: Muon(m.named_parameters(), lr=1e-2),
}
CASES = {
    "plain": {},
    "dropout": {"model": "dropout", "clip_norm": 1.0},
    "recompute": {"model": "recompute"},
    "micro-batches": {"model": "dropout", "micro_batch": 3},
    "sgd, averaged": {"opt": "sgd", "ema": 0.9},
    "muon, averaged": {"opt": "muon", "ema": 0.9, "clip_norm": 0.5},
    "layer-wise rates": {"opt": "scaled"},
    "frozen": {"change": freeze, "ema": 0.9},
    "soft labels": {"soft": True, "loss": partial(ops.cross_entropy, smoothing=0.1)},
    "parts in eval mode": {"model": "dropout", "change": with_parts_in_eval_mode},
    "float64": {"dtype": np.float64},
    "tf32": {"precision": "tf32"},
    "bfloat16": {"precision": "bfloat16", "clip_norm": 1.0, "ema": 0.9},
    "bfloat16, micro-batches": {"precision": "bfloat16", "micro_batch": 2, "change": freeze},
    "float16": {"precision": "float16", "clip_norm": 1.0},
}


def make(device="cuda", model="plain", opt="adamw", change=None, ema=None, dtype=np.float32, **settings):
    """Return a step on a device, the same as on any other."""
    built = disturbed(mv.ViT(**{**SMALL, "depth": 2, **MODELS[model]})).to(dtype).to(device)
    if change is not None:
        change(built)
    optimizer = OPTIMIZERS[opt](built)
    average = None if ema is None else EMA(optimizer.store, ema)
    return mv.TrainStep(built, optimizer, ema=average, **settings)


def batches(count, rows=7, soft=False):
    for t in range(count):
        images, labels = normal(mv.Key(1, t), (rows, 3, 12, 8)).astype(np.float32), (np.arange(rows) + t) % 5
        yield images, 0.8 * np.eye(5, dtype=np.float32)[labels] + np.float32(0.04) if soft else labels


def train(step, count, soft=False, rows=7):
    """Return what each of some steps came to, and all that they have changed."""
    found = []
    for t, (images, labels) in enumerate(batches(count, rows, soft)):
        step.opt.lr = 1e-2 / (1 + t)
        found.append((step(images, labels), step.grad_norm, step.right))
    average = step.ema or EMA(step.opt.store, 0.5)
    return found, everything(step.model, step.opt, average)


def nodes(step):
    return step.underway.capture.nodes()


@pytest.fixture
def launched(monkeypatch):
    """Return a function that has everything launched from then on."""
    return lambda: monkeypatch.setattr(capture_module, "SHAPES", 0)


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_launched_one_to_the_bit(any_cupy, plain, launched, case):
    settings = dict(CASES[case])
    soft, results = settings.pop("soft", False), []
    count = 20 if case in ("plain", "dropout", "bfloat16") else 6
    for how in ("recorded", "launched"):
        if how == "launched":
            launched()
        step = make(**settings)
        results.append(train(step, count, soft))
        assert step.why_launched == "" and step.opt.steps == count
        assert list(nodes(step)) == ([(7, 3, 12, 8)] if how == "recorded" else [])
    (found, state), (found_launched, state_launched) = results
    assert found == found_launched
    for name, value in state.items():
        assert value.tobytes() == state_launched[name].tobytes(), name
    if "16" in case or case == "tf32":
        return
    found_cpu, state_cpu = train(make("cpu", **settings), count, soft)
    rounding = 1e-9 if case == "float64" else 2e-3
    for ours, theirs in zip(found, found_cpu, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=rounding)
    assert sum(right for *_, right in found) == pytest.approx(sum(right for *_, right in found_cpu), abs=1)
    if case == "float64":
        for name, value in state_cpu.items():
            if not name.endswith("qkv.bias"):  # the keys' bias has no gradient but noise
                np.testing.assert_allclose(state[name], value, rtol=1e-6, atol=1e-9, err_msg=name)
    else:
        assert state.keys() == state_cpu.keys()


def test_recorded_kernels_are_the_launched_ones_to_the_bit(any_cupy, launched):
    if any_cupy is not strict.cupy and (why_not := tile.why_not()):
        pytest.skip(why_not)
    results = []
    for how in ("recorded", "launched"):
        if how == "launched":
            launched()
        step = make(model="dropout", micro_batch=2, precision="bfloat16", clip_norm=1.0, ema=0.9)
        results.append(train(step, 3, rows=3))
        assert step.why_launched == "" and bool(nodes(step)) == (how == "recorded")
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert value.tobytes() == results[1][1][name].tobytes(), name


# ---- what a step costs -----------------------------------------------------------------------------------------------


def test_a_step_waits_once_and_brings_over_its_batch(strict_cupy, plain):
    step, counters = make(model="dropout", micro_batch=3, clip_norm=1.0, ema=0.9), strict_cupy.counters
    given = list(batches(6))
    for t, (images, labels) in enumerate(given):
        counters.reset()
        step(images, labels)
        if t == 1:  # recorded, and not run
            recorded = counters.launches
        if t > 1:
            assert counters.syncs == 1, counters.synced
            assert counters.transfers == 3, counters.transferred  # images and labels in, what they came to out
            assert counters.launches == 2  # the batch put where it is read
    assert 300 < nodes(step)[7, 3, 12, 8] <= recorded
    on_gpu = [strict_cupy.asarray(x) for x in given[0]]
    waiting = [step.submit(*on_gpu)]
    counters.reset()
    for _ in range(3):  # the rate, and the batch; nobody waits
        waiting.append(step.submit(*on_gpu))
    assert (counters.syncs, counters.transfers, counters.launches) == (0, 3, 6)
    for t, submitted in enumerate(waiting, 7):
        assert math.isfinite(submitted.totals().loss) and step.opt.steps == t


def test_a_rate_that_changes_is_one_launch(strict_cupy, plain):
    step = make()
    for images, labels in batches(3):
        step(images, labels)
    strict_cupy.counters.reset()
    step.opt.lr *= 0.5
    step(images, labels)
    assert strict_cupy.counters.launches == 3


# ---- shapes and settings ---------------------------------------------------------------------------------------------


def test_each_shape_is_recorded_once_and_few_are(any_cupy, plain, launched):
    results = []
    for how in ("recorded", "launched"):
        if how == "launched":
            launched()
        step, losses = make(model="dropout"), []
        for _ in range(3):
            for rows in (7, 3, 5, 2, 4):
                losses += [step(*b) for b in batches(1, rows)]
        results.append((losses, step.model.state_dict()))
        if how == "recorded":
            assert [shape[0] for shape in nodes(step)] == [7, 3, 5, 2] and not step.why_launched
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert (value == results[1][1][name]).all(), name


def other_loss(logits, labels):
    return ops.cross_entropy(logits, labels, smoothing=0.2)


def thaw(step):
    step.model.blocks[0].mlp.fc1.weight.requires_grad = False


CHANGES = {
    "weight_decay": lambda step: setattr(step.opt, "weight_decay", 0.5),
    "betas": lambda step: setattr(step.opt, "betas", (0.5, 0.9)),
    "clip_norm": lambda step: setattr(step, "clip_norm", 1e-3),
    "no clip_norm": lambda step: setattr(step, "clip_norm", None),
    "loss": lambda step: setattr(step, "loss", other_loss),
    "seed": lambda step: setattr(step, "seed", 5),
    "micro_batch": lambda step: setattr(step.team, "micro_batch", 2),
    "frozen": thaw,
    "a layer's mode": lambda step: step.model.blocks[0].eval(),
    "a layer's setting": lambda step: setattr(step.model.embed_drop, "p", 0.5),
    "a layer": lambda step: setattr(step.model, "embed_drop", mv.nn.Dropout(0.4)),
    "a list of layers": lambda step: step.model.blocks.pop(),
    "decay of the average": lambda step: setattr(step.ema, "decay", 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_that_changes_is_heeded(strict_cupy, plain, launched, change):
    results = []
    for how in ("recorded", "launched"):
        if how == "launched":
            launched()
        step, losses = make(model="dropout", clip_norm=0.5, ema=0.9), []
        for t, (images, labels) in enumerate(batches(8)):
            if t == 4:
                CHANGES[change](step)
            losses.append(step(images, labels))
        results.append((losses, step.grad_norm, everything(step.model, step.opt, step.ema)))
        assert len(nodes(step)) == (how == "recorded") and not step.why_launched
    assert results[0][:2] == results[1][:2]
    for name, value in results[0][2].items():
        assert (value == results[1][2][name]).all(), name


def test_values_set_in_place_are_read_and_record_nothing_anew(strict_cupy, plain):
    step, (images, labels) = make(), next(batches(1))
    for _ in range(3):
        step(images, labels)
    graph = next(iter(step.underway.capture.shapes.values())).graph
    before = step.model.state_dict(), step.opt.state_dict()
    losses = []
    for _ in range(2):
        step.model.load_state_dict(before[0])
        step.opt.load_state_dict(before[1])
        losses.append([step(images, labels) for _ in range(3)])
    assert losses[0] == losses[1] and losses[0][0] > losses[0][2] and step.opt.steps == 6
    assert next(iter(step.underway.capture.shapes.values())).graph is graph


def test_a_setting_that_differs_in_every_step_is_launched_and_said(strict_cupy, plain):
    class Counting(mv.ViT):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return super().forward(images) * (1.0 + self.calls)

    results = []
    for device in ("cpu", "cuda"):
        model = disturbed(Counting(**{**SMALL, "depth": 1})).to(device)
        step = mv.TrainStep(model, SGD(model.named_parameters(), lr=1e-3))
        results.append([step(images, labels) for images, labels in batches(8)])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert step.why_launched == "the model.calls differs from step to step" and not nodes(step)


# ---- what cannot be recorded -----------------------------------------------------------------------------------------


class Looking(mv.ViT):
    """A ViT that looks at a value on its way."""

    def forward(self, images):
        out = super().forward(images)
        self.__dict__.setdefault("seen", []).append(0)
        self.seen.clear()
        return out * (1.0 if float(out.sum()) > 0.0 else 0.5)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_model_that_looks_at_values_is_launched_and_says_so(any_cupy, plain, ahead):
    results = []
    for device in ("cpu", "cuda"):
        model = disturbed(Looking(**{**SMALL, "depth": 1})).to(device)
        step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), clip_norm=1.0)
        if ahead and device == "cuda":
            submitted = [step.submit(*b) for b in batches(5)]
            results.append([s.totals().loss for s in submitted])
        else:
            results.append([step(*b) for b in batches(5)])
        assert step.opt.steps == 5
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert "the current stream is capturing" in step.why_launched and not nodes(step)
    assert any_cupy.cuda.get_current_stream() == any_cupy.cuda.Stream.null


def test_who_watches_the_modules_sees_them(strict_cupy, plain):
    step, seen = make(), []
    given = list(batches(5))
    for images, labels in given[:3]:
        step(images, labels)
    with watching(step.model, lambda path, out: seen.append(path)):
        step(*given[3])
    assert "blocks.1.attn" in seen
    step(*given[4])
    other = make()
    assert [other(*b) for b in given][-1] == step(*given[4]) or step.opt.steps == 6


def test_an_exchange_of_ones_own_is_recorded_or_launched(strict_cupy, plain):
    class Doubled(mv.TrainStep):
        def exchange(self, pieces):
            totals = super().exchange(pieces)
            self.opt.store.grad *= 2.0
            return totals._replace(grad_norm=totals.grad_norm * 2.0)

    class Looked(Doubled):
        def exchange(self, pieces):
            loss, norm, right = super().exchange(pieces)
            return Totals(float(loss), float(norm), int(right))

    losses = []
    for kind, device in ((Doubled, "cpu"), (Doubled, "cuda"), (Looked, "cuda")):
        model = disturbed(mv.ViT(**{**SMALL, "depth": 1})).to(device)
        step = kind(model, AdamW(model.named_parameters(), lr=1e-2), clip_norm=1.0)
        losses.append([(step(*b), step.grad_norm, step.right) for b in batches(5)])
        assert bool(step.why_launched) == (kind is Looked)
    for other in losses[1:]:
        for ours, theirs in zip(losses[0], other, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)


def test_errors_of_a_batch_are_those_of_the_cpu(strict_cupy, plain):
    step, (images, labels) = make(), next(batches(1))
    for t in range(4):  # launched, recorded, replayed
        before = everything(step.model, step.opt, EMA(step.opt.store, 0.5))
        with pytest.raises(ShapeError, match="7 images, 6 labels"):
            step(images, labels[:6])
        wrong = labels.copy()
        wrong[3] = 5
        with pytest.raises(DataError, match=r"label 5 at row 3 is outside 0 … 4"):
            step(images, wrong)
        with pytest.raises(DataError, match="empty"):
            step(images[:0], labels[:0])
        step.opt.lr, lr = math.nan, step.opt.lr
        with pytest.raises(ConfigError, match=rf"^step {t}: lr=nan"):
            step(images, labels)
        step.opt.lr = lr
        after = everything(step.model, step.opt, EMA(step.opt.store, 0.5))
        assert all((before[name] == value).all() for name, value in after.items())
        step(images, labels)
    assert nodes(step) and not step.why_launched
    step.model.head.weight.data = step.model.head.weight.data.copy()
    with pytest.raises(GraphError, match=r"head\.weight\.data was replaced"):
        step(images, labels)


def test_a_loss_that_wants_its_labels_on_the_host_gets_them_and_is_launched(any_cupy, plain):
    def loss(logits, labels):
        return ops.cross_entropy(logits, np.eye(5, dtype=np.float32)[labels])

    losses = []
    for kind in (ops.cross_entropy, loss):
        step = make(loss=kind, micro_batch=3)
        losses.append([step(*b) for b in batches(4)])
        assert bool(step.why_launched) == (kind is loss)
    assert losses[0] == losses[1] and "H2D transfers" in step.why_launched


def test_a_step_that_fails_at_first_is_recorded_later(strict_cupy, plain):
    step = make()
    images, labels = next(batches(1))
    with pytest.raises(DataError):
        step(images, labels + 5)
    for _ in range(3):
        step(images, labels)
    assert nodes(step) and not step.why_launched


# ---- what is not finite ----------------------------------------------------------------------------------------------


def bad(images):
    images = images.copy()
    images[3, 1, 2, 3] = np.nan
    return images


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_nothing_is_updated_after_a_step_that_is_not_finite_until_somebody_has_looked(any_cupy, plain, precision):
    given = list(batches(8))
    step, other = make(precision=precision, ema=0.9), make(precision=precision, ema=0.9)
    for images, labels in given[:3]:
        step(images, labels)
        other(images, labels)
    before = everything(step.model, step.opt, step.ema)
    submitted = [
        step.submit(bad(images) if t == 0 else images, labels) for t, (images, labels) in enumerate(given[3:6])
    ]
    after = everything(step.model, step.opt, step.ema)
    assert all((before[name] == value).all() for name, value in after.items())
    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan, .* is in the images"):
        submitted[1].totals()
    for late in submitted[:2]:
        with pytest.raises(NonFiniteError, match="a step was not made"):
            late.totals()
    assert step.opt.steps == 3
    for images, labels in given[4:]:  # handed in again
        assert step(images, labels) == other(images, labels)
    after, expected = (everything(s.model, s.opt, s.ema) for s in (step, other))
    assert all((after[name] == value).all() for name, value in expected.items())


def test_the_gradient_that_is_not_finite_is_named_though_the_next_is_there(strict_cupy, plain):
    def loss(logits, labels):  # finite, with an infinite slope where no label is 4
        slope = ops.sqrt(ops.mean(logits) * 0.0) if 4 not in to_numpy(labels) else 0.0
        return ops.cross_entropy(logits, labels) + slope

    step = make()
    step.loss = loss
    images, labels = next(batches(1))
    first = step.submit(images, labels % 4)
    step.submit(images, labels)
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is 1\..*, the gradient's norm nan; .* head\.bias"):
        first.totals()


def test_a_gradient_that_overflows_in_float16_is_worked_on_again(any_cupy, plain):
    step, (images, labels) = make(precision="float16"), next(batches(1))
    assert step.ahead == 0 and make().ahead == 1 and make("cpu").ahead == 0
    step.loss = lambda logits, labels: ops.cross_entropy(logits, labels) * 100.0
    losses = [step(images, labels) for _ in range(5)]
    assert step.opt.steps == 5 and losses[-1] < losses[0]
    assert float(step.numbers.scale.value) < step.numbers.scale.FIRST
    kept = step.state_dict()
    again = make(precision="float16")
    again.load_state_dict(kept)
    assert again.state_dict() == kept


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_second_gpu_does_the_same(strict_cupy, plain, precision):
    found = []
    for device in ("cuda:0", "cuda:1"):
        step = make(device, model="dropout", precision=precision, clip_norm=1.0, ema=0.9)
        step.loss = lambda logits, labels: ops.cross_entropy(logits, labels) * 100.0  # overflows in float16 at first
        losses = [step(*b) for b in batches(4)]
        images, labels = next(batches(1))
        with pytest.raises(NonFiniteError, match="is in the images"):
            step(bad(images), labels)
        found.append((losses, step(images, labels), step.grad_norm))
        assert nodes(step) and step.underway.capture.memory() > 0 and strict_cupy.cuda.Device().id == 0
    assert found[0] == found[1]


def test_copies_record_their_own(strict_cupy, plain):
    step = make(ema=0.9)
    given = list(batches(8))
    for images, labels in given[:4]:
        step(images, labels)
    twin = copy.deepcopy(step)
    assert [step(*b) for b in given[4:]] == [twin(*b) for b in given[4:]]
    ours, theirs = (everything(s.model, s.opt, s.ema) for s in (step, twin))
    assert all((ours[name] == value).all() for name, value in theirs.items())
    assert nodes(twin) == nodes(step)
