"""A run on a GPU is a step ahead of what it has waited for: its records, checkpoints and errors are the CPU's."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import tile
from minivit.errors import NonFiniteError, Stopped
from minivit.train import AdamW, Trainer, load_checkpoint, parameters_hash, warmup_cosine
from minivit.train.observers import Observer
from tests import strict
from tests.test_kill import BATCHES, EPOCHS, small_run
from tests.test_trainer import Hooked, PowerCut, fail_at, metrics, nan_at, results, timeless

any_cupy = strict.any_cupy


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Let the plain operations run: the stand-in for kernels takes a hundred times as long."""
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)


class Told(Observer):
    """Keeps what it is told, and the number of updates at the time."""

    def __init__(self):
        self.told = []

    def remark(self, trainer, text):
        self.told.append(("remark", text))

    def step(self, trainer, row):
        self.told.append(("step", row["step"], trainer.opt.steps, trainer.opt.lr, "left_out" in row))

    def epoch(self, trainer, row):
        self.told.append(("epoch", row["step"], trainer.opt.steps))

    def saved(self, trainer, path):
        self.told.append(("saved", path.name, trainer.opt.steps))


def a_run(device, folder, model=mv.ViT, **settings):
    """Return (trainer, train, valid) of a run in float64, so that a GPU's rounding changes nothing; maybe resumed."""
    _, train, valid = small_run(None)
    net = model(8, 2, 1, 4, dim=8, depth=1, heads=2, dropout=0.1, drop_path=0.2).to(np.float64).to(device)
    defaults = {"schedule": warmup_cosine(1e-2, EPOCHS * BATCHES, BATCHES), "epochs": EPOCHS, "seed": 3}
    defaults |= {"clip_norm": 1.0, "ema": 0.9, "observers": [Told()], "save_every": 5, "micro_batch": 9}
    trainer = Trainer(net, AdamW(net.named_parameters()), folder=folder, **{**defaults, **settings})
    if folder is not None and (last := Path(folder) / "checkpoints" / "last.npz").exists():
        trainer.resume(last)
    return trainer, train, valid


def alike(ours, theirs):
    """Check that two values are the same but for rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            alike(a, b)
    elif isinstance(ours, str):  # numbers in a text
        number = r"\d+\.\d+"
        assert re.sub(number, "#", ours) == re.sub(number, "#", theirs)
    elif ours is not None:
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-9, nan_ok=True)


def left_behind(folder):
    """Return all that a run leaves in its folder, but for times and the machine."""
    found = [timeless(metrics(folder)), [{k: v for k, v in r.items() if "second" not in k} for r in results(folder)]]
    for path in sorted((folder / "checkpoints").iterdir()):
        checkpoint = load_checkpoint(path)
        state = {k: v for k, v in checkpoint.meta["train"].items() if k not in ("machine", "seconds")}
        state["history"] = timeless(state["history"])
        state["best"] = state["best"] and timeless([state["best"]])
        found += [path.name, state, {k: v for k, v in sorted(checkpoint.arrays.items()) if not k.endswith("qkv.bias")}]
    return found


def check_folders(ours, theirs):
    """Check that two runs have left the same behind."""
    ours, theirs = left_behind(ours), left_behind(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, dict) and a and isinstance(next(iter(a.values())), np.ndarray):
            assert list(a) == list(b)
            for name, value in a.items():
                np.testing.assert_allclose(value, b[name], rtol=1e-5, atol=1e-8, err_msg=name)
        else:
            alike(a, b)


@pytest.mark.parametrize("settings", [{}, {"save_every": 1}, {"save_every": None}], ids=str)
def test_a_run_leaves_what_the_cpus_leaves(any_cupy, tmp_path, settings):
    told = []
    for device in ("cpu", "cuda"):
        trainer, train, valid = a_run(device, tmp_path / device, **settings)
        trainer.fit(train, valid)
        told.append(trainer.observers[-1].told)
    check_folders(tmp_path / "cuda", tmp_path / "cpu")
    alike(told[1], told[0])
    assert len(trainer.step.underway.capture.nodes()) == 2 and not trainer.step.underway.waiting


BAD = {
    "one": (3,),
    "two in a row": (3, 4),
    "at a save": (5, 6),
    "the last": (7,),
    "the first": (1,),
    "many": (2, 4, 8, 9),
}


@pytest.mark.parametrize("batches", BAD.values(), ids=BAD)
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_what_is_not_finite_is_dealt_with_as_on_the_cpu(any_cupy, tmp_path, policy, batches):
    told, errors = [], []
    for device in ("cpu", "cuda"):
        trainer, train, valid = a_run(device, tmp_path / device, on_nan=policy, epochs=2)
        try:
            trainer.fit(Hooked(train, nan_at(*batches)), valid)
        except NonFiniteError as error:
            errors.append((str(error), trainer.opt.steps, trainer.opt.lr, trainer.progress.batch))
        told.append(trainer.observers[-1].told)
        assert not trainer.step.underway or not trainer.step.underway.waiting
    assert len(errors) == (2 if policy == "stop" else 0)
    if policy != "stop" or min(batches) > BATCHES:
        check_folders(tmp_path / "cuda", tmp_path / "cpu")
    alike(told[1], told[0])
    if errors:
        assert errors[0] == errors[1]
        alike(timeless(metrics(tmp_path / "cuda")), timeless(metrics(tmp_path / "cpu")))


def test_too_many_in_a_row_stop_a_run_as_on_the_cpu(strict_cupy, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        trainer, train, valid = a_run(device, tmp_path / device, on_nan="skip")
        with pytest.raises(NonFiniteError) as caught:
            trainer.fit(Hooked(train, lambda count: nan_at(count)(count)), valid)
        found.append((str(caught.value), trainer.opt.steps, trainer.observers[-1].told, trainer.progress.skipped))
    assert found[0] == found[1]


@pytest.mark.parametrize("cut", [3, 8, 13])
def test_a_run_that_is_cut_and_resumed_has_the_bits_of_one_that_is_not(any_cupy, tmp_path, cut):
    trainer, train, valid = a_run("cuda", tmp_path / "whole", save_every=2)
    trainer.fit(train, valid)
    whole = parameters_hash(trainer.model)
    trainer, train, valid = a_run("cuda", tmp_path / "cut", save_every=2)
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, fail_at(cut)), valid)
    assert trainer.opt.steps == cut - 1 and trainer.progress.epoch * BATCHES + trainer.progress.batch == cut - 1
    trainer, train, valid = a_run("cuda", tmp_path / "cut", save_every=2)
    trainer.fit(train, valid)
    assert parameters_hash(trainer.model) == whole
    assert timeless(metrics(tmp_path / "cut")) == timeless(metrics(tmp_path / "whole"))


def test_a_signal_saves_every_step_that_was_begun(strict_cupy, tmp_path, monkeypatch):
    found = []
    for device in ("cpu", "cuda"):
        trainer, train, valid = a_run(device, tmp_path / device, save_every=None)

        def signal_at_step_4(trainer=trainer):
            if trainer.opt.steps >= 4:
                raise Stopped(15)

        monkeypatch.setattr("minivit.train.signals.StopSignals.raise_if_noted", lambda _, act=signal_at_step_4: act())
        with pytest.raises(Stopped, match="stopped and saved after step"):
            trainer.fit(train, valid)
        monkeypatch.undo()
        monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)
        last = load_checkpoint(tmp_path / device / "checkpoints" / "last.npz")
        steps = int(last.arrays["optimizer/steps"])
        assert steps == trainer.opt.steps == last.meta["train"]["batch"] and not trainer.step.ahead * (steps < 5)
        assert len(metrics(tmp_path / device)) == steps
        trainer, train, valid = a_run(device, tmp_path / device, save_every=None)
        found.append(trainer.fit(train, valid))
    alike(timeless(found[0]), timeless(found[1]))


def test_no_step_but_the_last_is_waited_for(strict_cupy, tmp_path):
    trainer, train, _ = a_run("cuda", None, save_every=None, epochs=4)
    waits = []
    real = trainer.step.submit

    def submit(images, labels):
        waits.append((strict_cupy.counters.syncs, strict_cupy.counters.transfers))
        strict_cupy.counters.reset()
        return real(images, labels)

    trainer.step.submit = submit
    trainer.fit(train)
    assert set(waits[2 * BATCHES + 2 : 3 * BATCHES]) == {(1, 3)}  # the late read; images, labels, what they came to


def test_a_model_that_cannot_be_recorded_is_remarked_on_once(strict_cupy, tmp_path):
    class Looking(mv.ViT):
        def forward(self, images):
            out = super().forward(images)
            return out * (1.0 if float(ops.mean(out)) > 1e9 else 0.5)

    found = []
    for device in ("cpu", "cuda"):
        trainer, train, valid = a_run(device, tmp_path / device, model=Looking)
        trainer.fit(train, valid)
        found.append(trainer.observers[-1].told)
    remarks = [entry for entry in found[1] if entry[0] == "remark"]
    assert len(remarks) == 1 and "the current stream is capturing" in remarks[0][1]
    alike([entry for entry in found[1] if entry[0] != "remark"], found[0])
    check_folders(tmp_path / "cuda", tmp_path / "cpu")
