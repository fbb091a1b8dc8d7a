"""The trainer: what a run keeps, how it ends, and that it continues to the same bits."""

from __future__ import annotations

import csv
import itertools
import json
import re
import shutil
import signal
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.cli.epochs import shown
from minivit.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Stopped
from minivit.train import (
    SGD,
    AdamW,
    Muon,
    Trainer,
    evaluate,
    load_checkpoint,
    parameters_hash,
    predict_logits,
    save_checkpoint,
    warmup_cosine,
)
from minivit.train import keeper as keeper_module
from minivit.train import trainer as trainer_module
from minivit.weights.native import read_model
from tests.test_kill import BATCHES, EPOCHS, small_run

STEPS = EPOCHS * BATCHES


class Hooked:
    """A loader that calls ``hook(batch)`` before it yields each batch, counted over all epochs."""

    def __init__(self, loader, hook):
        self.loader, self.hook, self.count = loader, hook, 0

    def __len__(self):
        return len(self.loader)

    def batches(self, epoch, start=0):
        for batch in self.loader.batches(epoch, start):
            self.count += 1
            changed = self.hook(self.count)
            yield batch if changed is None else (changed(batch[0]), batch[1])


class PowerCut(Exception):
    pass


def fail_at(batch):
    def hook(count):
        if count == batch:
            raise PowerCut

    return hook


def timeless(rows):
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def rewritten(path, change):
    """Save the checkpoint at ``path`` again with its meta as ``change`` leaves it."""
    checkpoint = load_checkpoint(path)
    change(checkpoint.meta)
    del checkpoint.meta["format"]
    save_checkpoint(path, checkpoint.arrays, checkpoint.meta)


def as_by_version_0_1(meta):
    """Leave in a checkpoint's meta what the first version of minivit wrote."""
    train = meta["train"]
    for name in ("data", "machine", "limits", "right"):
        train.pop(name, None)
    for name in ("optimizer settings", "factors on the learning rate", "loss", "more learning rates"):
        train["settings"].pop(name, None)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder):
    with open(folder / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its history and its parameters' hash."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, train, valid = small_run(folder, save_every=None, meta={"classes": ["a", "b", "c", "d"]})
    history = trainer.fit(train, valid)
    return folder, history, parameters_hash(trainer.model)


# ---- what a run keeps ------------------------------------------------------------------------------------------------


def test_it_learns_and_reports_each_epoch(whole):
    _, history, _ = whole
    assert [(row["epoch"], row["step"]) for row in history] == [(e, e * BATCHES) for e in range(1, EPOCHS + 1)]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"] and history[-1]["valid_accuracy"] > 0.5
    assert history[-1]["lr"] == 0.0 and all(row["images_per_second"] > 0 for row in history)


def test_the_records_have_a_row_for_each_step_and_epoch(whole):
    folder, history, _ = whole
    rows = metrics(folder)
    steps = [row for row in rows if "batch_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert all(row["grad_norm"] > 0 for row in steps)
    assert [row for row in rows if "batch_loss" not in row] == history
    assert [{k: float(v) for k, v in row.items()} for row in results(folder)] == history
    # the epoch's loss is the mean over images, and the last batch is smaller
    first = [row["batch_loss"] for row in steps[:BATCHES]]
    assert history[0]["loss"] == pytest.approx((16 * sum(first[:-1]) + 4 * first[-1]) / 100)


def test_the_checkpoints_hold_the_last_and_the_best_epoch(whole):
    folder, history, digest = whole
    best = max(history, key=lambda row: (row["valid_accuracy"], -row["valid_loss"]))
    checkpoint = load_checkpoint(folder / "checkpoints" / "best.npz")
    assert checkpoint.meta["train"]["epoch"] == best["epoch"] and checkpoint.meta["train"]["best"] == best
    model = mv.ViT(**checkpoint.meta["model"])
    model.load_state_dict(checkpoint.under("model"))
    assert evaluate(model, small_run(None)[2])["accuracy"] == best["valid_accuracy"]
    last = load_checkpoint(folder / "checkpoints" / "last.npz")
    model.load_state_dict(last.under("model"))
    assert parameters_hash(model) == digest
    assert last.meta["classes"] == ["a", "b", "c", "d"] and last.meta["train"]["history"] == history


def test_soft_labels_are_refused_before_the_first_epoch(tmp_path):
    trainer, train, valid = small_run(tmp_path)

    class Soft:
        def __len__(self):
            return len(valid)

        def batches(self, epoch, start=0):
            return ((images, np.eye(4, dtype=np.float32)[labels]) for images, labels in valid.batches(epoch, start))

    with pytest.raises(DataError, match=r"a class for each image, not float32 labels of shape \(32, 4\)"):
        trainer.fit(train, Soft())
    assert trainer.opt.steps == 0
    with pytest.raises(DataError, match="a class for each image"):
        evaluate(trainer.model, Soft())
    (row,) = small_run(None, epochs=1)[0].fit(Soft(), valid)  # to train on them is fine
    assert row["valid_accuracy"] >= 0


def test_it_names_the_checkpoint_to_resume_and_no_command(tmp_path):
    folder = tmp_path / "my run"
    trainer, train, _ = small_run(folder, epochs=1)
    trainer.fit(train)
    for _ in range(2):  # also where the command line has made the run
        with pytest.raises(ConfigError, match=r"resume it from .*my run/checkpoints/last\.npz, or name another folder"):
            Trainer(trainer.model, trainer.opt, folder=folder).fit(train)
        (folder / "config.toml").touch()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, train, _ = small_run(None, epochs=1)
    (row,) = trainer.fit(train)
    assert "valid_loss" not in row and not list(tmp_path.iterdir())


def test_another_runs_folder_is_not_overwritten(whole):
    folder = whole[0]
    trainer, train, _ = small_run(None)
    other = Trainer(trainer.model, trainer.opt, folder=folder)
    with pytest.raises(ConfigError, match="already holds a run"):
        other.fit(train)


def test_evaluate_is_predict_logits_over_all_batches(whole):
    trainer, _, valid = small_run(whole[0])
    result = evaluate(trainer.model, valid)
    images, labels = (np.concatenate(x) for x in zip(*valid.batches(0), strict=True))
    logits = predict_logits(trainer.model, images)
    assert result["count"] == 50 and (result["labels"] == labels).all()
    assert np.allclose(result["logits"], logits, atol=1e-5)
    assert result["accuracy"] == (logits.argmax(1) == labels).mean()
    assert result["loss"] == pytest.approx(float(ops.cross_entropy(logits, labels)), rel=1e-5)


# ---- it continues to the same bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cut", "save_every"), [(2, 1), (8, 1), (8, 5), (18, 5), (STEPS, 5)])
def test_a_run_cut_anywhere_continues_to_the_same_bits(tmp_path, whole, cut, save_every):
    _, history, digest = whole
    trainer, train, valid = small_run(tmp_path, save_every=save_every)
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, fail_at(cut)), valid)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    half = tmp_path / "checkpoints" / f".best.npz.{'0' * 16}.minivit-tmp"
    half.write_bytes(b"half")
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"epoch": 99, "step": 999, "batch_loss": 0.0}) + '\n{"epoch": 1, "st')
    trainer, train, valid = small_run(tmp_path, save_every=save_every)  # resumes
    assert trainer.opt.steps == max((cut - 1) // save_every * save_every, (cut - 1) // BATCHES * BATCHES)
    resumed = trainer.fit(train, valid)
    assert parameters_hash(trainer.model) == digest
    assert timeless(resumed) == timeless(history)
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole[0])), "no row twice, none lost"
    assert len(results(tmp_path)) == EPOCHS
    assert not half.exists()


def test_a_run_cut_while_it_evaluates_evaluates_again(tmp_path, whole):
    trainer, train, valid = small_run(tmp_path, save_every=BATCHES)
    with pytest.raises(PowerCut):
        trainer.fit(train, Hooked(valid, fail_at(4)))  # in the second epoch's evaluation; the first batch is a look
    trainer, train, valid = small_run(tmp_path)
    assert (trainer.progress.epoch, trainer.progress.batch) == (1, BATCHES)
    assert timeless(trainer.fit(train, valid)) == timeless(whole[1])
    assert parameters_hash(trainer.model) == whole[2]
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole[0]))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5])  # saves: last at step 7, best, last; last at step 14, last
def test_a_run_cut_before_any_save_has_it_all_in_the_end(tmp_path, whole, cut, monkeypatch):
    saves = []

    def save_or_cut(*args):
        saves.append(args)
        if len(saves) == cut:
            raise PowerCut
        save_checkpoint(*args)

    monkeypatch.setattr(keeper_module, "save_checkpoint", save_or_cut)
    trainer, train, valid = small_run(tmp_path, save_every=BATCHES)
    with pytest.raises(PowerCut):
        trainer.fit(train, valid)
    trainer, train, valid = small_run(tmp_path, save_every=BATCHES)
    trainer.fit(train, valid)
    for name in ("best", "last"):
        ours, theirs = (load_checkpoint(folder / "checkpoints" / f"{name}.npz") for folder in (tmp_path, whole[0]))
        assert timeless(ours.meta["train"]["history"]) == timeless(theirs.meta["train"]["history"])
        assert all((ours.arrays[k] == array).all() for k, array in theirs.arrays.items())
    assert timeless(metrics(tmp_path)) == timeless(metrics(whole[0]))


def test_more_epochs_can_be_added(tmp_path):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    trainer, train, valid = small_run(tmp_path, epochs=2)
    assert [row["epoch"] for row in trainer.fit(train, valid)] == [1, 2]


def test_what_does_not_fit_is_refused(tmp_path, whole):
    last = whole[0] / "checkpoints" / "last.npz"
    trainer, train, _ = small_run(None)
    wide = mv.ViT(8, 2, 1, 4, dim=32, depth=2, heads=2)
    before = parameters_hash(wide)
    with pytest.raises(CheckpointError, match=r"model\.dim: 16 → 32"):
        Trainer(wide, AdamW(wide.named_parameters()), schedule=trainer.schedule, seed=3, clip_norm=1.0).resume(last)
    assert parameters_hash(wide) == before
    for meta in ({}, {"train": 5}, {"train": {"settings": {}}}, {"train": {"settings": {"total steps": "3"}}}):
        save_checkpoint(tmp_path / "a.npz", {}, meta)
        with pytest.raises(CheckpointError, match="holds no training run"):
            trainer.resume(tmp_path / "a.npz")
    trainer.resume(last)
    train.batch_size = 8
    with pytest.raises(ConfigError, match="the run had 7 batches in an epoch, now there are 13"):
        trainer.fit(train)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seed": 4}, "seed: 3 → 4"),
        ({"clip_norm": None}, "clip_norm: 1.0 → None"),
        ({"loss": partial(ops.cross_entropy, smoothing=0.1)}, "smoothing: 0.0 → 0.1"),
        ({"loss": partial(ops.cross_entropy, axis=1)}, r"loss.keywords.axis: None → 1"),
        ({"loss": lambda x, y: ops.cross_entropy(x, y)}, r"loss.function: cross_entropy → <lambda>"),
        ({"schedule": None}, "learning rates: .* → None"),
        ({"schedule": warmup_cosine(1e-2, STEPS + 7, BATCHES)}, "learning rates: .* → .*"),
        ({"schedule": warmup_cosine(1e-2, STEPS, BATCHES, 1e-4), "seed": 4}, "seed: 3 → 4; learning rates"),
        ({"schedule": lambda t: warmup_cosine(1e-2, STEPS, BATCHES)(t) * (1 + (t == 5))}, "more learning rates: "),
    ],
)
def test_a_run_made_with_other_settings_is_refused_by_their_names(whole, settings, said):
    trainer, *_ = small_run(None, **settings)
    before = parameters_hash(trainer.model)
    with pytest.raises(CheckpointError, match=f"was trained with other settings: {said}"):
        trainer.resume(whole[0] / "checkpoints" / "last.npz")
    assert parameters_hash(trainer.model) == before


def test_another_optimizer_setting_or_dtype_is_refused(whole):
    last = whole[0] / "checkpoints" / "last.npz"
    trainer, *_ = small_run(None)
    trainer.opt.weight_decay = 0.5
    with pytest.raises(CheckpointError, match=r"weight decay: 0\.05 → 0\.5"):
        trainer.resume(last)
    double = trainer.model.to(np.float64)
    trainer = Trainer(double, AdamW(double.named_parameters()), schedule=trainer.schedule, seed=3, clip_norm=1.0)
    with pytest.raises(CheckpointError, match="dtype: float32 → float64"):
        trainer.resume(last)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"heads": 4}, "model.heads: 2 → 4"),
        ({"activation": "relu"}, "model.activation: gelu → relu"),
        ({"norm_eps": 1e-5}, "model.norm_eps: 1e-06 → 1e-05"),
        ({"dropout": 0.2}, "model.dropout: 0.1 → 0.2"),
        ({"drop_path": 0.0}, "model.drop_path: 0.2 → 0.0"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_model_that_computes_something_else_is_refused(tmp_path, whole, changed, said, old):
    last = tmp_path / "checkpoints" / "last.npz"
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    if old:
        rewritten(last, as_by_version_0_1)
    trainer, *_ = small_run(None)
    model = mv.ViT(**trainer.model.config | changed)
    other = Trainer(model, AdamW(model.named_parameters()), schedule=trainer.schedule, seed=3, clip_norm=1.0)
    with pytest.raises(CheckpointError, match=f"other settings: {said}\n"):
        other.resume(last)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (partial(AdamW, betas=(0.9, 0.99)), r"betas: \[0.9, 0.999\] → \[0.9, 0.99\]"),
        (partial(AdamW, eps=1e-6), "eps: 1e-08 → 1e-06"),
        (partial(AdamW, lr_scales={"head.bias": 0.5}), "factors on the learning rate"),
        (partial(SGD, lr=0.1), "optimizer: AdamW → SGD"),
    ],
)
def test_an_optimizer_with_other_numbers_is_refused(whole, make, said):
    trainer, *_ = small_run(None)
    model = mv.ViT(**trainer.model.config)
    other = Trainer(model, make(model.named_parameters()), schedule=trainer.schedule, seed=3, clip_norm=1.0)
    with pytest.raises(CheckpointError, match=said):
        other.resume(whole[0] / "checkpoints" / "last.npz")


def inverted(dataset, count):
    """Return a data set whose first ``count`` images are negatives."""
    images = dataset.images.copy()
    images[:count] = 255 - images[:count]
    return replace(dataset, images=images)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda train, valid: setattr(train, "dataset", inverted(train.dataset, 1)), r"training\.dataset\.images"),
        (
            lambda train, valid: train.dataset.labels.__setitem__(3, 3 - train.dataset.labels[3]),
            r"training\.dataset\.labels",
        ),
        (lambda train, valid: setattr(valid, "dataset", inverted(valid.dataset, 1)), r"validation\.images"),
        (lambda train, valid: setattr(train, "augment", None), r"training\.augment"),
        (lambda train, valid: setattr(train, "shuffle", False), r"training\.shuffle: True → False"),
    ],
)
def test_other_images_labels_or_augmentation_are_refused(tmp_path, change, said):
    trainer, train, valid = small_run(tmp_path, save_every=None)
    with pytest.raises(PowerCut):
        real = trainer.keeper.save
        trainer.keeper.save = lambda trainer, *names: (real(trainer, *names), fail_at(1)("last" in names))
        trainer.fit(train, valid)
    again, train, valid = small_run(tmp_path)
    change(train, valid)
    with pytest.raises(CheckpointError, match=f"has had other data so far: {said}"):
        again.fit(train, valid)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.npz").meta["train"]["epoch"] == 1


def test_a_checkpoint_of_the_first_version_is_continued_to_the_same_bits(tmp_path, whole):
    trainer, train, valid = small_run(tmp_path)
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, fail_at(10)), valid)
    rewritten(tmp_path / "checkpoints" / "last.npz", as_by_version_0_1)
    trainer, train, valid = small_run(tmp_path)
    assert trainer.opt.steps == 9 and trainer.progress.right is None
    trainer.fit(train, valid)
    assert parameters_hash(trainer.model) == whole[2]


def test_other_threads_are_told(whole, capsys):
    trainer, *_ = small_run(None, threads=1, observers=shown())
    trainer.resume(whole[0] / "checkpoints" / "last.npz")
    assert "goes on with other threads: 2 → 1" in capsys.readouterr().err


def test_more_epochs_go_on_where_the_schedule_allows_and_the_rate_is_told(tmp_path, capsys):
    falls = warmup_cosine(1e-2, 2 * BATCHES, 2, 1e-4)
    trainer, train, valid = small_run(tmp_path, epochs=2, schedule=falls)
    trainer.fit(train, valid)
    for other in (warmup_cosine(1e-2, 3 * BATCHES, 2, 1e-4), None):  # never another schedule without a word
        with pytest.raises(CheckpointError, match="learning rates: "):
            small_run(tmp_path, epochs=3, schedule=other)
    with pytest.raises(ConfigError, match="epochs=1: the run is in epoch 2 already"):
        small_run(tmp_path, epochs=1, schedule=falls)
    trainer, train, valid = small_run(tmp_path, epochs=3, schedule=falls, observers=shown())
    assert "3 epochs instead of 2: the learning rate after epoch 2 is 0.0001" in capsys.readouterr().err
    assert [row["lr"] for row in trainer.fit(train, valid)][1:] == [1e-4, 1e-4]
    to_zero = tmp_path / "zero"
    falls = warmup_cosine(1e-2, 2 * BATCHES, 2)
    trainer, train, valid = small_run(to_zero, epochs=2, schedule=falls)
    trainer.fit(train, valid)
    with pytest.raises(ConfigError, match="the learning rate is 0 after epoch 2, more would change nothing"):
        small_run(to_zero, epochs=3, schedule=falls)


def test_a_run_that_a_limit_has_ended_goes_on_with_another_limit(tmp_path):
    trainer, train, valid = small_run(tmp_path, max_seconds=1e-9)
    trainer.fit(train, valid)
    assert len(small_run(tmp_path, max_seconds=1e-9)[0].fit(train, valid)) == 1
    trainer, train, valid = small_run(tmp_path)
    assert len(trainer.fit(train, valid)) == EPOCHS


# ---- nothing is lost -------------------------------------------------------------------------------------------------


def test_an_older_checkpoint_does_not_replace_what_is_newer(tmp_path):
    trainer, train, valid = small_run(tmp_path, on_nan="rollback")
    trainer.fit(train, valid)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    epoch = tmp_path / "checkpoints" / "epoch.npz"  # of the start of the last epoch
    trainer.resume(epoch)
    with pytest.raises(CheckpointError, match=r"epoch\.npz is at step 21, last\.npz at step 28: what is newer would"):
        trainer.fit(train, valid)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "checkpoints" / "last.npz").write_bytes(b"damaged")
    trainer.resume(epoch)
    assert [row["epoch"] for row in trainer.fit(train, valid)] == list(range(1, EPOCHS + 1))


def test_a_state_that_was_read_before_another_process_went_on_is_not_taken(tmp_path):
    trainer, train, valid = small_run(tmp_path)
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, fail_at(4)), valid)
    late = small_run(tmp_path)[0]
    early = small_run(tmp_path)[0]
    history = early.fit(train, valid)
    with pytest.raises(CheckpointError, match="has changed since then: another process has gone on"):
        late.fit(train, valid)
    with pytest.raises(CheckpointError, match="has changed since then"):
        trainer.fit(train, valid)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.npz").meta["train"]["history"] == history


def test_another_runs_checkpoint_does_not_replace_the_folders_own(tmp_path, whole):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    other, *_ = small_run(None)
    other = Trainer(
        other.model, other.opt, schedule=other.schedule, epochs=EPOCHS, seed=3, clip_norm=1.0, folder=tmp_path
    )
    other.resume(whole[0] / "checkpoints" / "last.npz")
    with pytest.raises(ConfigError, match="already holds a run"):
        other.fit(train, valid)


def test_files_of_others_in_the_folder_stay(tmp_path):
    notes = [tmp_path / name for name in ("notes.tmp", "deep/er/x.tmp", "checkpoints/y.tmp", "z.minivit-tmp")]
    notes.append(tmp_path / "deep" / f".a.{'0' * 16}.minivit-tmp")
    for path in notes:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    for name in ("results.csv", "metrics.jsonl"):  # the fixed names that were written through
        (tmp_path / f"{name}.tmp").symlink_to(notes[0])
    (tmp_path / "checkpoints" / "last.npz.tmp").symlink_to(notes[0])
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    assert all(path.read_text() == "mine" for path in notes)


@pytest.mark.parametrize(("name", "text"), [("results.csv", "a,b\n1,2\n"), ("metrics.jsonl", '{"loss": 1}\n')])
def test_records_of_others_are_not_overwritten(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    trainer, train, valid = small_run(tmp_path, epochs=1)
    with pytest.raises(ConfigError, match=f"holds {name} that no run of minivit has written"):
        trainer.fit(train, valid)
    assert (tmp_path / name).read_text() == text


# ---- how accurate it is on what it is trained on ---------------------------------------------------------------------


def counting(answers):
    """Return a TrainStep that says how many images of each batch were right, as ``answers`` has it."""

    class Counting(mv.TrainStep):
        def exchange(self, pieces):
            return super().exchange(pieces)._replace(right=next(answers))

    return Counting


def test_the_training_accuracy_is_over_the_epochs_images(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        trainer_module, "TrainStep", counting(itertools.chain([1, 2, 3, 4, 5, 6, 4], itertools.repeat(8)))
    )
    trainer, train, valid = small_run(tmp_path, epochs=2, observers=shown())
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, fail_at(10)), valid)
    monkeypatch.setattr(trainer_module, "TrainStep", counting(itertools.repeat(1)))
    trainer, train, valid = small_run(tmp_path, epochs=2)
    history = trainer.fit(train, valid)  # two batches before the cut, five after it
    assert [row["accuracy"] for row in history] == [0.25, (2 * 8 + 5 * 1) / 100]
    assert "accuracy 25.00%, valid " in capsys.readouterr().err
    assert [float(row["accuracy"]) for row in results(tmp_path)] == [0.25, 0.21]
    monkeypatch.setattr(trainer_module, "TrainStep", counting(itertools.chain([1, None], itertools.repeat(1))))
    trainer, train, valid = small_run(None, epochs=2)
    first, second = trainer.fit(train, valid)  # of mixed labels none is the right one
    assert "accuracy" not in first and second["accuracy"] == 0.07


# ---- how it ends early -----------------------------------------------------------------------------------------------


@pytest.fixture
def python_handlers():
    """Python's own handlers, which a shell's background job does not have; check that they are there again after."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signal.signal(signal.SIGINT, before)


def raise_at(batch, number):
    return lambda count: signal.raise_signal(number) if count == batch else None


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_lets_the_step_finish_saves_and_raises_stopped(tmp_path, whole, python_handlers, number, code):
    trainer, train, valid = small_run(tmp_path, save_every=None)
    with pytest.raises(Stopped) as caught:
        trainer.fit(Hooked(train, raise_at(10, number)), valid)
    stop, last = caught.value, str(tmp_path / "checkpoints" / "last.npz")
    assert (stop.signum, stop.code, stop.path) == (number, code, last)
    assert str(stop) == f"stopped and saved after step 10\n  → continue with Trainer.resume({last!r}), and fit"
    assert not isinstance(stop, Exception), "a loop that goes on after a failed run would go on"
    assert [row["step"] for row in metrics(tmp_path) if "batch_loss" in row] == list(range(1, 11))
    trainer, train, valid = small_run(tmp_path)
    assert trainer.opt.steps == 10
    trainer.fit(train, valid)
    assert parameters_hash(trainer.model) == whole[2]


def test_a_signal_while_it_evaluates_does_not_wait_for_the_end(tmp_path, whole, python_handlers):
    trainer, train, valid = small_run(tmp_path, save_every=None)
    valid = Hooked(valid, raise_at(2, signal.SIGINT))  # the first batch is a look at the labels
    with pytest.raises(Stopped):
        trainer.fit(train, valid)
    assert valid.count == 2 and trainer.opt.steps == BATCHES
    trainer, train, valid = small_run(tmp_path)
    assert timeless(trainer.fit(train, valid)) == timeless(whole[1])


def test_an_ignored_signal_stays_ignored(tmp_path, python_handlers):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        trainer, train, valid = small_run(tmp_path, epochs=1)
        assert len(trainer.fit(Hooked(train, raise_at(2, signal.SIGHUP)), valid)) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_leaves_at_once(tmp_path, python_handlers):
    def twice(count):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer, train, valid = small_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Hooked(train, twice), valid)
    assert trainer.opt.steps == 0 and not list(tmp_path.rglob("*.npz*"))


def test_without_a_folder_ctrl_c_is_pythons_own(python_handlers):
    trainer, train, _ = small_run(None)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Hooked(train, raise_at(2, signal.SIGINT)))


def test_in_another_thread_it_leaves_signals_alone(tmp_path, python_handlers):
    trainer, train, _ = small_run(tmp_path, epochs=1)
    seen = []
    hook = Hooked(train, lambda count: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=trainer.fit, args=(hook,))
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler] * BATCHES and trainer.progress.epoch == 1


def test_a_nan_stops_before_the_update_and_the_last_checkpoint_stays(tmp_path, capfd):
    digests = []

    def poison(count):
        digests.append(parameters_hash(trainer.model))
        return (lambda images: images * np.float32(np.nan)) if count == 10 else None

    trainer, train, valid = small_run(tmp_path, save_every=None)
    with pytest.raises(NonFiniteError, match="the images"):
        trainer.fit(Hooked(train, poison), valid)
    assert parameters_hash(trainer.model) == digests[9] and trainer.opt.steps == 9
    last = load_checkpoint(tmp_path / "checkpoints" / "last.npz")
    assert last.meta["train"]["epoch"] == 1 and last.arrays["optimizer/steps"] == BATCHES
    assert len([row for row in metrics(tmp_path) if "batch_loss" in row]) == 9
    assert capfd.readouterr() == ("", "")


def nan_at(*batches):
    return lambda count: (lambda images: images * np.float32(np.nan)) if count in batches else None


def test_a_batch_with_a_nan_can_be_left_out(tmp_path, capsys):
    trainer, train, valid = small_run(tmp_path, save_every=None, on_nan="skip", observers=shown())
    history = trainer.fit(Hooked(train, nan_at(3)), valid)
    assert trainer.opt.steps == STEPS - 1 and [row["epoch"] for row in history] == list(range(1, EPOCHS + 1))
    left_out = [row for row in metrics(tmp_path) if "left_out" in row]
    assert [row["step"] for row in left_out] == [2] and "the images" in left_out[0]["left_out"]
    assert "batch 3 of epoch 1 left out" in capsys.readouterr().err
    without, train, _ = small_run(None)  # it is as if that batch had not been there
    pairs = [pair for i, pair in enumerate(train.batches(0)) if i != 2]
    for images, labels in pairs:
        without.opt.lr = without.schedule(without.opt.steps)
        without.step(images, labels)
    again, train, _ = small_run(None, on_nan="skip")
    with pytest.raises(PowerCut):
        again.fit(Hooked(train, lambda count: nan_at(3)(count) if count <= BATCHES else fail_at(count)(count)))
    assert parameters_hash(again.model) == parameters_hash(without.model)


def test_too_many_bad_batches_in_a_row_stop_the_run(tmp_path):
    trainer, train, valid = small_run(tmp_path, on_nan="skip")
    before = parameters_hash(trainer.model)
    with pytest.raises(NonFiniteError):
        trainer.fit(Hooked(train, lambda count: nan_at(count)(count)), valid)
    assert parameters_hash(trainer.model) == before and trainer.opt.steps == 0


def test_a_nan_can_roll_the_run_back_to_its_last_checkpoint(tmp_path):
    trainer, train, valid = small_run(tmp_path, save_every=None, on_nan="rollback", ema=0.9)
    digests = {}

    def look(count):
        digests[count] = parameters_hash(trainer.model), trainer.opt.steps
        return nan_at(10)(count)

    trainer.fit(Hooked(train, look), valid)
    assert digests[11] == digests[BATCHES + 1] != digests[10]
    whole = parameters_hash(trainer.model)
    for cut in (9, 12):  # before the roll-back, and after
        trainer, train, valid = small_run(tmp_path / str(cut), on_nan="rollback", ema=0.9)
        with pytest.raises(PowerCut):
            trainer.fit(Hooked(train, lambda count, cut=cut: fail_at(cut)(count) or nan_at(10)(count)), valid)
        trainer, train, valid = small_run(tmp_path / str(cut), on_nan="rollback", ema=0.9)
        trainer.fit(Hooked(train, nan_at(10 - cut + 1)), valid)  # counted from where it goes on
        assert parameters_hash(trainer.model) == whole
    trainer, train, valid = small_run(tmp_path / "new", save_every=None, on_nan="rollback")
    digests = {}

    def look_again(count):
        digests[count] = parameters_hash(trainer.model)
        return nan_at(3)(count)

    trainer.fit(Hooked(train, look_again), valid)
    assert digests[4] == digests[1] != digests[3]  # also in the first epoch
    with pytest.raises(ConfigError, match="without a folder"):
        small_run(None, on_nan="rollback")


def test_it_stops_when_validation_gets_no_better(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer_module, "evaluate", lambda *args, **more: {"loss": 1.0, "accuracy": 0.5})
    trainer, train, valid = small_run(tmp_path, epochs=50, schedule=None, patience=2, observers=shown())
    history = trainer.fit(train, valid)
    assert len(history) == 3 and trainer.progress.best["epoch"] == 1
    assert "stopped after epoch 3: nothing better on the validation images in 2 epochs" in capsys.readouterr().err
    again, train, valid = small_run(tmp_path, epochs=50, schedule=None, patience=2)
    assert again.fit(train, valid) == history  # the run is over
    with pytest.raises(ConfigError, match="without validation images"):
        small_run(None, patience=2)[0].fit(train)


def test_among_epochs_of_one_accuracy_the_lowest_loss_is_the_best(tmp_path, monkeypatch):
    found = iter([(0.5, 1.0), (1.0, 0.9), (1.0, 0.4), (0.5, 0.1)])
    look = lambda *args, **more: dict(zip(("accuracy", "loss"), next(found), strict=True))
    monkeypatch.setattr(trainer_module, "evaluate", look)
    trainer, train, valid = small_run(tmp_path)
    trainer.fit(train, valid)
    assert trainer.progress.best["epoch"] == 3
    assert load_checkpoint(tmp_path / "checkpoints" / "best.npz").meta["train"]["epoch"] == 3


def test_its_time_can_be_limited(tmp_path):
    trainer, train, valid = small_run(tmp_path, max_seconds=1e-9)
    history = trainer.fit(train, valid)
    assert len(history) == 1 and history[0]["step"] == 1 and "valid_accuracy" in history[0]
    assert trainer.progress.stopped == "its time is up"
    assert load_checkpoint(tmp_path / "checkpoints" / "last.npz").meta["train"]["stopped"] == "its time is up"


def test_a_signal_after_the_time_is_up_loses_nothing(tmp_path, python_handlers):
    trainer, train, valid = small_run(tmp_path, max_seconds=1e-9)
    with pytest.raises(Stopped):
        trainer.fit(train, Hooked(valid, raise_at(2, signal.SIGINT)))  # the first batch is a look at the labels
    trainer, train, valid = small_run(tmp_path, max_seconds=1e-9)
    history = trainer.fit(train, valid)
    assert len(history) == 1 and history[0]["step"] == 2 and trainer.progress.stopped == "its time is up"


def test_the_average_is_what_is_evaluated_and_kept(tmp_path):
    trainer, train, valid = small_run(tmp_path, save_every=None, ema=0.5)
    history = trainer.fit(train, valid)
    with trainer.averaged():
        digest = parameters_hash(trainer.model)
        assert evaluate(trainer.model, valid)["accuracy"] == history[-1]["valid_accuracy"]
    assert parameters_hash(trainer.model) != digest
    model, _ = read_model(tmp_path / "checkpoints" / "last.npz")
    assert parameters_hash(model) == digest
    cut, train, valid = small_run(tmp_path / "cut", ema=0.5)
    with pytest.raises(PowerCut):
        cut.fit(Hooked(train, fail_at(10)), valid)
    cut, train, valid = small_run(tmp_path / "cut", ema=0.5)
    cut.fit(train, valid)
    with cut.averaged():
        assert parameters_hash(cut.model) == digest
    with pytest.raises(CheckpointError, match=r"ema: 0\.5 → None"):
        small_run(tmp_path)


def test_a_first_loss_far_above_a_guess_is_told(tmp_path, capsys):
    trainer, train, _ = small_run(None, observers=shown(), epochs=1)
    trainer.model.head.weight.data[...] = 100.0 * np.sign(np.arange(trainer.model.head.weight.size) % 3 - 1.0).reshape(
        trainer.model.head.weight.shape
    )
    trainer.fit(train)
    assert "a guess among 4 classes has 1.39: look at the labels" in capsys.readouterr().err
    trainer, train, _ = small_run(None, observers=shown(), epochs=1)
    trainer.fit(train)
    assert "warning" not in capsys.readouterr().err


def test_validation_labels_beyond_the_classes_are_refused_before_the_first_epoch():
    trainer, train, valid = small_run(None)

    class Shifted(Hooked):
        def batches(self, epoch, start=0):
            return ((images, labels + 1) for images, labels in self.loader.batches(epoch, start))

    with pytest.raises(DataError, match="label 4 at row"):
        trainer.fit(train, Shifted(valid, None))
    assert trainer.opt.steps == 0


def test_records_that_cannot_be_written_end_the_run_in_one_line(tmp_path):
    trainer, train, _ = small_run(tmp_path)

    def block(count):
        if count == 3:
            (tmp_path / "metrics.jsonl").unlink()
            (tmp_path / "metrics.jsonl").mkdir()

    with pytest.raises(CheckpointError, match=r"cannot write the records in .*: Is a directory") as caught:
        trainer.fit(Hooked(train, block))
    assert "\n" not in caught.value.what
    assert load_checkpoint(tmp_path / "checkpoints" / "last.npz").arrays["optimizer/steps"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot lock"):
        small_run(tmp_path / "file" / "run")[0].fit(train)


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"save_every": 0}, {"patience": 0}, {"max_seconds": 0.0}, {"on_nan": "weep"}, {"ema": 1.0}],
)
def test_settings_that_cannot_be_meant(settings):
    with pytest.raises(ConfigError):
        small_run(None, **settings)


def test_loaders_without_a_batch(tmp_path):
    trainer, train, valid = small_run(tmp_path)

    class Empty:
        def __len__(self):
            return 0

        def batches(self, epoch, start=0):
            return iter(())

    for loaders in ((Empty(), valid), (train, Empty())):
        with pytest.raises(DataError, match="without a batch"):
            trainer.fit(*loaders)
    with pytest.raises(DataError, match="nothing to evaluate on"):
        evaluate(trainer.model, Empty())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        *[(lambda named, lr=lr: AdamW(named, lr), f"lr={lr}") for lr in (float("nan"), float("inf"), -1.0)],
        (lambda named: SGD(named, float("nan")), "lr=nan"),
        (lambda named: AdamW(named, weight_decay=float("nan")), "weight_decay=nan"),
        *[(lambda named, m=m: SGD(named, 0.1, momentum=m), f"momentum={m}") for m in (1.0, -0.1, float("nan"))],
        *[(lambda named, m=m: Muon(named, 0.1, momentum=m), f"momentum={m}") for m in (1.0, -0.1, float("nan"))],
        *[(lambda named, eps=eps: AdamW(named, eps=eps), f"eps={eps}") for eps in (0.0, -1e-8, float("nan"))],
        (lambda named: AdamW(named, betas=(0.9, 1.0)), "betas="),
        (lambda named: AdamW([p for _, p in named]), r"got a Parameter, not a pair \(name, parameter\)"),
        (lambda named: AdamW([]), "got no parameter"),
    ],
)
def test_optimizer_settings_that_cannot_be_meant(make, said):
    with pytest.raises(ConfigError, match=said) as caught:
        make(list(mv.create_model("vit_digits", depth=1).named_parameters()))
    assert caught.value.remedy


# ---- what it shows ---------------------------------------------------------------------------------------------------


def test_without_a_terminal_it_prints_a_line_an_epoch(capsys):
    trainer, train, valid = small_run(None, observers=shown(), epochs=2)
    trainer.fit(train, valid)
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first.startswith("epoch 1/2  ") and "%, loss " in second and second.endswith("images/s")
    assert re.search(r"valid (accuracy )?\d", first)


def test_on_a_terminal_it_keeps_one_line_an_epoch(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    trainer, train, valid = small_run(None, observers=shown(), epochs=2)
    trainer.fit(train, valid)
    err = capsys.readouterr().err
    kept = [line.split("\r")[-1] for line in err.splitlines(keepends=True) if line.endswith("\n")]
    assert [line.split()[1] for line in kept] == ["1/2", "2/2"]
    assert all("100%" in line and "accuracy" in line and "images/s" in line for line in kept)
    assert all(len(line) <= 120 for line in kept)
    monkeypatch.setenv("COLUMNS", "80")
    trainer, train, valid = small_run(None, observers=shown(), epochs=1)
    trainer.fit(train, valid)
    last = capsys.readouterr().err.split("\r")[-1]
    assert "100%" in last and re.search(r"valid (accuracy )?\d", last) and len(last) <= 80
