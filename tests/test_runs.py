"""Runs from Python: what ``minivit train`` does, as functions, to the same bits and without a word."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.cli.main import main
from minivit.errors import CheckpointError, ConfigError, Stopped
from minivit.runs.calls import SHORT
from minivit.runs.options import OPTIONS
from minivit.runs.settings import known_settings
from minivit.train import Observer
from minivit.train.records import Records
from minivit.weights.checkpoint import load_checkpoint

TINY = {"model.dim": 8, "model.depth": 1, "model.heads": 2, "model.mlp_dim": 16}
TYPED = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]


pytestmark = pytest.mark.usefixtures("small_pictures")


def arrays(folder: Path, name: str = "last") -> dict[str, bytes]:
    """Return all arrays of a run's checkpoint as bytes."""
    return {key: a.tobytes() for key, a in load_checkpoint(folder / "checkpoints" / f"{name}.npz").arrays.items()}


def records(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def values(folder: Path) -> list[str]:
    """Return the lines of config.toml without the comments that say where values are from."""
    return [line.partition("#")[0].rstrip() for line in (folder / "config.toml").read_text().splitlines()]


@pytest.fixture(scope="module")
def halfway(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs that was stopped in its second one, after four of six steps."""
    parent = tmp_path_factory.mktemp("halfway")
    with pytest.raises(Stopped):
        mv.runs.train(data=archive, epochs=2, settings=TINY, output=parent, name="run", observers=[StopAfter(4)])
    return parent / "run"


class StopAfter(Observer):
    """Sends this process a signal after so many steps."""

    def __init__(self, steps: int, number: int = signal.SIGTERM) -> None:
        self.steps, self.number = steps, number

    def step(self, trainer: Any, row: dict[str, Any]) -> None:
        if row["step"] == self.steps:
            signal.raise_signal(self.number)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0.0, 0.2])
def test_a_call_gives_what_the_command_gives(
    held: float, archive: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["train", str(archive), *TYPED, "-e", "2", "-b", "32", "--val-fraction", str(held), "--model-ema", "0.5"]
    assert main([*args, "--name", "typed", "-q"]) == 0
    capfd.readouterr()
    run = mv.runs.train(
        data=archive, epochs=2, batch_size=32, val_fraction=held, model_ema=0.5, settings=TINY, name="called"
    )
    assert capfd.readouterr() == ("", "")
    typed, called = Path("runs/typed"), Path("runs/called")
    assert run.folder == called
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (typed, called)]
    assert names[0] == names[1] and "report.html" in names[0] and ".lock" not in names[0]
    assert values(called) == values(typed) and records(called) == records(typed)
    for file in ("last", "best") if held else ("last",):
        assert arrays(called, file) == arrays(typed, file)
    for file in ("samples_train.png", "predictions.png", "attention.png", "confusion.png"):
        assert (called / file).read_bytes() == (typed / file).read_bytes()

    assert [row["epoch"] for row in run.history] == [1, 2] and ("valid_accuracy" in run.history[0]) == bool(held)
    assert run.test is not None and run.test["count"] == 60
    assert {f"test_{key}": run.test[key] for key in ("loss", "accuracy", "count")} == {
        key: value for key, value in records(called)[-1].items() if key in ("test_loss", "test_accuracy", "test_count")
    }
    measured = mv.load_model(mv.runs.find_checkpoint("runs/called"))
    state = measured.state_dict()
    assert not run.model.training and all(np.array_equal(a, state[k]) for k, a in run.model.state_dict().items())
    test = mv.data.load(archive, "test")
    images = mv.data.standardize(test.images, *(load_checkpoint(mv.runs.find_checkpoint("runs/called")).meta["data"][k]
                                                for k in ("mean", "std")))  # fmt: skip
    accuracy = float((mv.predict_logits(run.model, images).argmax(axis=1) == test.labels).mean())
    assert accuracy == run.test["accuracy"] and "test accuracy" in repr(run)


def test_what_was_called_is_kept(archive: Path, here: Path) -> None:
    run = mv.runs.train(data=archive, epochs=1, settings=TINY, output=here / "mine")
    assert run.folder == here / "mine" / "few-1"
    text = (run.folder / "command.txt").read_text()
    called = f"mv.runs.train(data={str(archive)!r}, epochs=1, settings={TINY!r}, output={str(here / 'mine')!r})"
    assert text.startswith(f"command       {called}\nfolder        {here}\n")
    config = (run.folder / "config.toml").read_text()
    assert "# argument" in config and "command line" not in config
    assert run.settings["train.epochs"] == 1 and run.settings.origins["train.epochs"] == "argument"


def test_a_run_tells_what_the_command_prints(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(archive), *TYPED, "-e", "1", "--name", "run"]) == 0
    printed = capsys.readouterr().out
    shutil.rmtree("runs")
    told: list[str] = []
    mv.runs.train(data=archive, epochs=1, settings=TINY, name="run", tell=told.append)
    said = "".join(f"{text}\n" for text in told)
    assert capsys.readouterr().out == ""

    def timeless(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("time ")]

    assert timeless(said) == timeless(printed) and len(timeless(said)) > 9


def test_observers_see_every_step_and_epoch(archive: Path, here: Path) -> None:
    class Seen(Observer):
        def __init__(self) -> None:
            self.calls: Counter[str] = Counter()

        def step(self, trainer: Any, row: dict[str, Any]) -> None:
            self.calls["step"] += 1

        def epoch(self, trainer: Any, row: dict[str, Any]) -> None:
            self.calls["epoch"] += 1

    seen = Seen()
    run = mv.runs.train(data=archive, epochs=2, val_fraction=0, batch_size=50, settings=TINY, observers=[seen])
    assert seen.calls == {"step": 8, "epoch": 2}
    more = mv.runs.resume(run.folder, observers=[seen])
    assert seen.calls == {"step": 8, "epoch": 2} and more.history == run.history


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epohcs": 3}, r"unknown argument 'epohcs'\n  → did you mean 'epochs'"),
        ({"depth": 3}, r"unknown argument 'depth'\n  → give it by its key: settings=\{'model.depth': …\}"),
        ({"settings": {"model.depht": 3}}, r"unknown setting 'model.depht' \(argument\)\n  → did you mean model.depth"),
        (
            {"data": "digits", "settings": {"data.name": "mnist"}},
            "data='digits', but settings has 'data.name': 'mnist'",
        ),
        ({"lr": np.array([0.1, 0.2])}, r"train.lr = \[0.1, 0.2\] \(argument\) is not a number"),
        ({"lr": 0.1, "settings": {"train.lr": np.array([0.1, 0.2])}}, "lr=0.1, but settings has"),
        ({"lr": "fast"}, r"train.lr = 'fast' \(argument\) is not a number"),
        ({"epochs": 0}, r"train.epochs = 0 \(argument\) is out of range"),
        ({"recipe": "digit"}, "unknown recipe 'digit'"),
        ({"settings": ["train.lr"]}, r"settings=\['train.lr'\]\n  → give a dict of values by dotted key"),
        ({"settings": {3: 4}}, r"settings=\{3: 4\}"),
        ({"data": "digits", "observers": [print]}, "observers=<built-in function print>"),
        ({"data": "digits", "settings": {"model.image_size": 9}}, r"model.image_size = 9 \(argument\), but the data"),
    ],
)
def test_what_cannot_be_is_named_and_leaves_no_folder(given: dict[str, Any], said: str, here: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        mv.runs.train(**given)
    assert not list(here.iterdir())


def test_the_same_given_twice_is_no_contradiction(here: Path, archive: Path) -> None:
    twice = TINY | {"data.name": str(archive), "model.image_size": (8, 8), "train.epochs": 1}
    assert mv.runs.train(data=archive, epochs=1, settings=twice).folder == Path("runs/few-1")


def test_numbers_of_numpy_are_numbers(archive: Path, here: Path) -> None:
    found = {"train.lr": np.float64(0.002), "data.flip": np.bool_(True), "train.epochs": np.int64(1)}
    run = mv.runs.train(data=archive, epochs=np.int32(1), settings=TINY | found)
    assert [type(run.settings[key]) for key in found] == [float, bool, int]
    assert "epochs=1," in (run.folder / "command.txt").read_text()  # a call that may be written again
    assert mv.runs.resume(run.folder, epochs=np.int64(1)).history == run.history


def test_every_flag_of_a_setting_has_its_short_name() -> None:
    assert SHORT["data"] == "data.name" and SHORT["model"] == "model.name" and SHORT["batch_size"] == "train.batch_size"
    flagged = {key for key, option in OPTIONS.items() if option.flags}
    assert flagged <= set(SHORT.values()) <= set(known_settings()) and len(set(SHORT.values())) == len(SHORT)
    assert not set(SHORT) & {"settings", "recipe", "config", "output", "name", "observers", "tell", "run"}


def test_a_config_of_another_run_is_a_start(halfway: Path, here: Path) -> None:
    run = mv.runs.train(config=halfway / "config.toml", epochs=1, name="again")
    assert run.settings["model.dim"] == 8 and len(run.history) == 1


def test_calls_at_once_get_folders_of_their_own(archive: Path, here: Path) -> None:
    found: list[Path] = []

    def train() -> None:
        found.append(mv.runs.train(data=archive, epochs=1, threads=1, settings=TINY).folder)

    both = [threading.Thread(target=train) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(map(str, found)) == ["runs/few-1", "runs/few-2"]
    assert arrays(found[0]) == arrays(found[1])


# ---- resuming --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_to_the_same_bits(
    halfway: Path, archive: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = mv.runs.train(data=archive, epochs=2, settings=TINY, name="whole")
    shutil.copytree(halfway, "runs/run")
    run = mv.runs.resume("runs/run")
    assert capfd.readouterr() == ("", "")
    assert arrays(run.folder) == arrays(whole.folder) and records(run.folder) == records(whole.folder)
    assert run.test == whole.test and len(run.history) == 2
    state = whole.model.state_dict()
    assert all(np.array_equal(a, state[name]) for name, a in run.model.state_dict().items())


def test_a_finished_run_is_given_as_it_is(archive: Path, here: Path) -> None:
    run = mv.runs.train(data=archive, epochs=2, min_lr=1e-4, settings=TINY)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    told: list[str] = []
    again = mv.runs.resume(run.folder, tell=told.append)
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    assert "is finished" in told[-2] and again.history == run.history and again.test == run.test is not None
    state = run.model.state_dict()
    assert not again.model.training
    assert all(np.array_equal(a, state[name]) for name, a in again.model.state_dict().items())
    longer = mv.runs.resume(run.folder / "checkpoints" / "last.npz", epochs=3)
    assert [row["epoch"] for row in longer.history] == [1, 2, 3]


def test_a_run_that_only_lacks_its_report_is_measured_as_it_was(archive: Path, here: Path) -> None:
    run = mv.runs.train(data=archive, epochs=2, val_fraction=0, model_ema=0.9, settings=TINY)
    before = records(run.folder)
    (run.folder / "report.html").unlink()
    again = mv.runs.resume(run.folder)
    assert again.test == run.test and records(run.folder) == before and (run.folder / "report.html").exists()
    averaged = mv.load_model(run.folder / "checkpoints" / "last.npz").state_dict()
    assert all(np.array_equal(a, averaged[name]) for name, a in again.model.state_dict().items())


def test_a_run_under_way_is_not_resumed(archive: Path, here: Path) -> None:
    refused: list[str] = []

    class Second(Observer):
        def step(self, trainer: Any, row: dict[str, Any]) -> None:
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}") as caught:
                mv.runs.resume("runs/run/checkpoints/last.npz", threads=1)
            refused.append(str(caught.value))

    mv.runs.train(data=archive, epochs=2, settings=TINY | {"train.save_every": 1}, name="run", observers=[Second()])
    assert len(refused) == 6


def test_a_stopped_run_says_how_to_go_on(halfway: Path, here: Path) -> None:
    shutil.copytree(halfway, "runs/run")
    with pytest.raises(Stopped) as caught:
        mv.runs.resume("runs/run", observers=[StopAfter(5, signal.SIGINT)], settings={"train.save_every": 1})
    last = "runs/run/checkpoints/last.npz"
    assert (caught.value.code, caught.value.path) == (130, last)
    assert str(caught.value) == f"stopped and saved after step 5\n  → continue with mv.runs.resume({last!r})"
    assert not Path("runs/run/.lock").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lr": 1.0}, "resume continues a run with the settings it was started with: train.lr cannot be set"),
        ({"settings": {"model.dim": 16}}, "model.dim cannot be set"),
        ({"recipe": "digits"}, "unknown argument 'recipe'"),
        ({"epoch": 9}, "did you mean 'epochs'"),
        ({"epochs": 9}, "the learning rate comes down to 0 in epoch 2"),
    ],
)
def test_what_cannot_change_is_refused(given: dict[str, Any], said: str, halfway: Path) -> None:
    before = arrays(halfway)
    with pytest.raises(ConfigError, match=said):
        mv.runs.resume(halfway, **given)
    assert arrays(halfway) == before


def test_what_is_no_run_is_refused(here: Path, archive: Path) -> None:
    for path in ("runs/none", archive):
        with pytest.raises(CheckpointError, match="is no run, nor a checkpoint of one"):
            mv.runs.resume(path)


def test_each_file_of_a_run_is_read_once(halfway: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is held: from the lock to the report. Its records are cut to the checkpoint, its best epoch measured."""
    shutil.copytree(halfway, "runs/run")
    opened: list[str] = []
    folder = os.path.abspath("runs/run")
    real_open, real_os_open = builtins.open, os.open

    def note(path: Any, reading: bool) -> None:
        if not isinstance(path, int) and reading and os.path.abspath(path).startswith(folder):
            assert Path(folder, ".lock").exists(), path
            opened.append(os.path.relpath(path, folder))

    def open_(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        note(file, not set(mode) & set("wax+"))
        return real_open(file, mode, *args, **more)

    def os_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        note(path, not flags & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(path))
        return real_os_open(path, flags, *args, **more)

    monkeypatch.setattr(builtins, "open", open_)
    monkeypatch.setattr(io, "open", open_)
    monkeypatch.setattr(os, "open", os_open)
    mv.runs.resume("runs/run", patience=9)
    read = Counter(opened)
    names = ("config.toml", "checkpoints/last.npz", "checkpoints/best.npz", "command.txt", "metrics.jsonl")
    assert {name: read[name] for name in names} == dict.fromkeys(names, 1)
    assert set(read.values()) == {1}


# ---- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.csv"])
def test_records_that_are_pipes_are_refused(name: str, halfway: Path, here: Path) -> None:
    shutil.copytree(halfway, "runs/run")
    Path("runs/run", name).unlink(missing_ok=True)
    os.mkfifo(Path("runs/run", name))  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match="cannot write the records in runs/run: not a regular file"):
        Records(Path("runs/run")).begin(0, [])


def test_a_record_of_the_command_that_is_a_pipe_is_refused(halfway: Path, here: Path) -> None:
    shutil.copytree(halfway, "runs/run")
    Path("runs/run/command.txt").unlink()
    os.mkfifo("runs/run/command.txt")
    with pytest.raises(CheckpointError, match=r"cannot read runs/run/command\.txt: not a regular file"):
        mv.runs.resume("runs/run")
