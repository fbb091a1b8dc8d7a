"""Training runs from the command line: what the settings make of data, model and optimizer, and how runs end."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit import data
from minivit.cli.main import main
from minivit.data import (
    Affine,
    Chain,
    ColorJitter,
    Crop,
    Flip,
    Loader,
    Mix,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
)
from minivit.errors import ConfigError
from minivit.runs import finish, job
from minivit.runs import run as running
from minivit.runs.changes import MAY_CHANGE, read_config, settings_of_run
from minivit.runs.job import Job
from minivit.runs.parts import augmentation
from minivit.runs.results import _label_text
from minivit.runs.settings import known_settings, resolve
from minivit.train.evaluation import evaluate
from minivit.train.optim import SGD
from minivit.train.progress import Row
from minivit.train.records import Records
from minivit.weights.checkpoint import load_checkpoint, parameters_hash, save_checkpoint
from minivit.weights.native import read_model
from minivit.weights.place import find_checkpoint

TINY = [word for key in ("dim=8", "depth=2", "heads=2", "mlp_dim=16") for word in ("--set", f"model.{key}")]
EVERYTHING = ["--grad-accum-steps", "2", "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1", "--model-ema", "0.9",
              "--layer-decay", "0.8", "--smoothing", "0.1", "--set", "data.randaugment=9", "--set", "data.erasing=0.3",
              "--set", "data.crop=1", "--optimizer", "muon"]  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_pictures")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of little pictures of two classes, in the two splits of an image folder."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 8)):
        for label, name in enumerate(("bright", "dark")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (20, 30, 3), np.uint8) + np.uint8(120 * (1 - label))
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def epochs(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_a_dry_run_makes_a_step_and_writes_nothing(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(archive), *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "a step works (loss 2.30" in said and "minutes of training, by a few steps" in said and "at the peak" in said
    assert list(here.iterdir()) == []


def test_overfitting_uses_few_images_as_they_are(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", str(archive), "--overfit", "8", *TINY, *EVERYTHING, "--epochs", "60", "--lr", "0.02", "-q"]
    assert main([*args, "--name", "few"]) == 0
    assert "overfit     of the training images 100.00%" in capsys.readouterr().out
    config = tomllib.loads(Path("runs/few/config.toml").read_text())
    assert config["data"]["overfit"] == 8
    assert not any(config["data"][key] for key in ("mixup", "cutmix", "randaugment", "erasing", "crop"))
    assert config["model"]["drop_path"] == config["train"]["smoothing"] == 0.0
    assert int(epochs(Path("runs/few"))[0]["step"]) == 1


def test_every_augmentation_can_be_set() -> None:
    s = resolve({}, recipe="mnist").table("data")
    assert augmentation(s, 1) == Affine(12.0, 0.12, 0.12, 2.0)
    off = dict.fromkeys(s, 0.0)
    assert augmentation(off, 1) is None
    assert augmentation(off | {"randaugment": 9.0}, 1) == RandAugment(magnitude=9.0, fill=0.0)
    every = {
        "resized_crop": 0.5,
        "crop": 2,
        "flip": True,
        "degrees": 3.0,
        "randaugment": 7.0,
        "jitter": 0.2,
        "erasing": 0.1,
    }
    assert augmentation(off | every, 3) == Chain(
        (RandomResizedCrop(0.5), Crop(2), Flip(), Affine(3.0, 0.0, 0.0, 0.0), RandAugment(magnitude=7.0),
         ColorJitter(0.2, 0.2, 0.2), RandomErasing(0.1))
    )  # fmt: skip


def test_mixing_and_optimizer_are_made_as_set(archive: Path) -> None:
    typed = {"data.name": str(archive), "model.dim": 8, "model.depth": 2, "model.heads": 2, "data.mixup": 0.3}
    typed |= {"train.optimizer": "sgd", "train.momentum": 0.8, "train.layer_decay": 0.5}
    made = Job(resolve(typed))
    opt = made.make_optimizer()
    assert isinstance(opt, SGD) and opt.momentum == 0.8
    assert sorted({group.scale for group in opt.groups}) == [0.125, 0.25, 0.5, 1.0]
    assert made.loader.mix == Mix(0.3, 0.0)
    images, labels = next(iter(made.loader.batches(0)))
    assert labels.shape == (64, 10) and labels.dtype == np.float32 and images.dtype == np.float32
    shown = [_label_text(label, made.parts.train.classes) for label in labels]
    assert any("%" in text for text in shown) and all(text.split()[0] in "0123456789" for text in shown)


def test_a_run_with_everything_on_is_resumed_to_the_same_bits(archive: Path, here: Path) -> None:
    args = ["train", str(archive), *TINY, *EVERYTHING, "-q", "--epochs", "3", "--save-every", "1"]
    assert main([*args, "--name", "whole"]) == 0
    steps = 0

    class Cut(Exception):
        pass

    class CutStep(mv.TrainStep):
        def submit(self, images: np.ndarray, labels: np.ndarray) -> Any:
            nonlocal steps
            steps += 1
            if steps == 4:
                raise Cut
            return super().submit(images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivit.train.trainer.TrainStep", CutStep)
        with pytest.raises(Cut):
            main([*args, "--name", "cut"])
    assert load_checkpoint("runs/cut/checkpoints/last.npz").arrays["optimizer/steps"] == 3
    assert main(["train", "--resume", "runs/cut", "-q"]) == 0
    whole, cut = (load_checkpoint(f"runs/{name}/checkpoints/last.npz") for name in ("whole", "cut"))
    assert whole.arrays.keys() == cut.arrays.keys() and any(name.startswith("ema/") for name in whole.arrays)
    assert all(np.array_equal(whole.arrays[name], cut.arrays[name]) for name in whole.arrays)


def test_patience_ends_a_run_early(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["train", str(archive), *TINY, "--lr", "1e-9", "--epochs", "9", "--patience", "1", "--val-fraction", "0.2"]
    monkeypatch.setattr("minivit.train.trainer.evaluate", lambda *args, **more: {"loss": 1.0, "accuracy": 0.5})
    assert main([*args, "--name", "early"]) == 0
    assert len(epochs(Path("runs/early"))) == 2
    assert "nothing better on the validation images in 1 epoch" in capsys.readouterr().err
    assert main(["train", "--resume", "runs/early"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_finished_run_says_how_to_go_on_longer_where_that_changes_anything(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rate, longer in (("on", "1e-4", True), ("over", "0", False)):
        args = ["train", str(archive), *TINY, "--epochs", "1", "--min-lr", rate, "--val-fraction", "0", "-q"]
        assert main([*args, "--name", name]) == 0
        capsys.readouterr()
        assert main(["train", "--resume", f"runs/{name}"]) == 0
        said = f"to go on longer: minivit train --resume runs/{name} --epochs 2\n"
        assert (said in capsys.readouterr().out) == longer
    assert main(["train", "--resume", "runs/on", "--epochs", "2", "-q"]) == 0
    assert len(epochs(Path("runs/on"))) == 2


def test_a_run_ends_when_its_time_is_up(archive: Path, here: Path) -> None:
    assert main(["train", str(archive), *TINY, "--max-time", "1e-9", "--name", "short", "-q"]) == 0
    assert [row["step"] for row in epochs(Path("runs/short"))] == ["1"]
    assert Path("runs/short/report.html").exists()


def test_too_little_memory_is_told_before_the_start(
    archive: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "available_memory", lambda: 1000)
    assert main(["train", str(archive), *TINY]) == 1
    said = capsys.readouterr().err
    assert "of memory, 1.0 kB are free" in said and "--micro-batch" in said
    assert list(here.iterdir()) == []


def test_a_checkpoint_that_was_read_takes_no_memory_from_its_run(
    halfway: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(halfway / "checkpoints" / "last.npz")
    s = settings_of_run(read_config(halfway / "config.toml"), checkpoint.meta)
    read = sum(a.nbytes for a in checkpoint.arrays.values())
    free = Job(s, resumed=True).memory - read  # as much as is left while it is in memory
    monkeypatch.setattr(job, "available_memory", lambda: free)
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    assert main(["train", "--resume", str(run), "-q"]) == 0
    monkeypatch.setattr(job, "available_memory", lambda: free - 1)
    (run / "report.html").unlink()
    assert main(["train", "--resume", str(run), "-q"]) == 1


def test_a_smaller_memory_is_enough_with_recompute(archive: Path) -> None:
    typed = {"data.name": str(archive), "model.patch_size": 1, "model.depth": 4, "train.threads": 1}
    plain, again = (Job(resolve(typed | {"model.recompute": on})).memory for on in (False, True))
    assert again < 0.7 * plain


def test_a_model_may_have_room_for_more_classes(archive: Path, here: Path) -> None:
    args = ["train", str(archive), *TINY, "--epochs", "1", "--set", "model.num_classes=12", "--mixup", "0.5", "-q"]
    assert main([*args, "--name", "more"]) == 0
    meta = load_checkpoint("runs/more/checkpoints/last.npz").meta
    assert meta["data"]["classes"][-2:] == ["class 10", "class 11"]


def test_changed_data_are_noticed_on_resume(here: Path, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load(archive) as arrays:
        held = dict(arrays)
    np.savez("mine.npz", **held)
    args = ["train", "mine.npz", *TINY, "--epochs", "2", "-q", "--val-fraction", "0", "--name", "run"]
    assert main(args) == 0
    report = Path("runs/run/report.html").read_bytes()
    for name, said in (
        ("train_labels", "training labels"),
        ("train_images", "training images"),
        ("test_images", "test images"),
        ("test_labels", "test labels"),
    ):
        np.savez("mine.npz", **held | {name: held[name][::-1]})  # of the same mean and standard deviation
        assert main(["train", "--resume", "runs/run"]) == 1
        assert f"is not as it was when the run began: other {said}\n" in capsys.readouterr().err
    assert Path("runs/run/report.html").read_bytes() == report
    Path("elsewhere").mkdir()
    np.savez("elsewhere/moved.npz", **held)  # the same images may be in another place
    Path("mine.npz").unlink()
    Path("runs/run/report.html").unlink()
    assert main(["train", "--resume", "runs/run", "--data", "elsewhere/moved.npz", "-q"]) == 0
    assert main(["train", "--resume", "runs/run", "-q"]) == 0


CHANGES = [
    ("model", "heads = 2", "heads = 4", "model.heads: 2 → 4"),
    ("model", 'activation = "gelu"', 'activation = "relu"', "model.activation: gelu → relu"),
    ("model", "norm_eps = 1e-06", "norm_eps = 1e-05", "model.norm_eps: 1e-06 → 1e-05"),
    ("model", "dropout = 0.0", "dropout = 0.2", "model.dropout: 0.0 → 0.2"),
    ("data", "mixup = 0.0", "mixup = 0.4", "data.mixup: 0.0 → 0.4"),
    ("data", "crop = 0", "crop = 1", "data.crop: 0 → 1"),
    ("data", "val_fraction = 0.1", "val_fraction = 0.2", "data.val_fraction: 0.1 → 0.2"),
    ("train", "layer_decay = 1.0", "layer_decay = 0.8", "train.layer_decay: 1.0 → 0.8"),
    ("train", "momentum = 0.9", "momentum = 0.8", "train.momentum: 0.9 → 0.8"),
    ("train", "lr = 0.001", "lr = 0.002", "train.lr: 0.001 → 0.002"),
    ("train", "seed = 0", "seed = 1", "train.seed: 0 → 1"),
    ("train", 'optimizer = "adamw"', 'optimizer = "muon"', "train.optimizer: adamw → muon"),
]


@pytest.fixture(scope="module")
def halfway(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its second epoch of two."""
    parent = tmp_path_factory.mktemp("halfway")
    cut(2, ["train", str(archive), *TINY, "-q", "--epochs", "2", "-o", str(parent), "--name", "run"])
    return parent / "run"


class PowerCut(Exception):
    pass


def cut(epoch: int, args: list[str]) -> None:
    """Run a command that fails as that epoch has ended."""

    def fail(self: Records, history: list[Row]) -> None:
        if len(history) == epoch:
            raise PowerCut
        real(self, history)

    real = Records.write_results
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Records, "write_results", fail)
        main(args)


def rows_of(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_edited_setting_that_changes_the_numbers_is_named(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    text = (halfway / "config.toml").read_text()
    everything = text
    for table, old, new, said in CHANGES:
        edited, count = re.subn(rf"(\[{table}\](?:\n[^\[]+?)*?\n){re.escape(old)}(?=\s)", rf"\g<1>{new}", text)
        assert count == 1, old
        (run / "config.toml").write_text(edited)
        before = (run / "checkpoints" / "last.npz").read_bytes()
        assert main(["train", "--resume", str(run)]) == 1, old
        assert f"is not as it was when the run began: {said}\n" in capsys.readouterr().err
        assert (run / "checkpoints" / "last.npz").read_bytes() == before
        everything = re.sub(rf"(\[{table}\](?:\n[^\[]+?)*?\n){re.escape(old)}(?=\s)", rf"\g<1>{new}", everything)
    (run / "config.toml").write_text(everything)
    assert main(["train", "--resume", str(run)]) == 1
    err = capsys.readouterr().err
    assert all(said in err for *_, said in CHANGES)


def test_every_setting_is_either_compared_or_on_the_short_list() -> None:
    """What a checkpoint keeps of a run are all of its settings."""
    assert set(MAY_CHANGE) <= set(known_settings()) and len(MAY_CHANGE) == 15
    s = resolve({"data.name": "digits"})
    made = Job(s)
    kept = made.make_trainer(None).meta["run"]["settings"]
    follow = ("mlp_dim", "dim_head", "class_token", "position_at", "layer_scale", "transformer")
    optional = {f"model.{name}" for name in follow}  # which follow from others, or are none, where they are not set
    assert set(kept) - {"recipe"} | optional == set(known_settings(s.kind))


def test_what_may_change_is_told_and_kept(halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(halfway, run)
    assert main(["train", "--resume", str(run), "--save-every", "2", "--patience", "9"]) == 0
    said = capsys.readouterr().out
    assert "changed     train.save_every: 0 → 2" in said and "changed     train.patience: 0 → 9" in said
    config = (run / "config.toml").read_text()
    assert re.search(r"save_every = 2 +# command line", config) and re.search(r"heads = 2 +# command line", config)
    assert re.search(r"val_fraction = 0.1 +# default", config)  # where values came from is not forgotten
    assert main(["train", "--resume", str(run), "--lr", "1"]) == 1
    assert "train.lr cannot be set" in capsys.readouterr().err


def as_by_version_0_1(path: Path) -> None:
    """Save a checkpoint again as the first version of minivit wrote it, which kept less."""
    checkpoint = load_checkpoint(path)
    meta = {key: value for key, value in checkpoint.meta.items() if key not in ("run", "format")}
    for name in ("data", "machine", "limits", "right"):
        del meta["train"][name]
    for name in ("optimizer settings", "factors on the learning rate", "loss", "more learning rates"):
        del meta["train"]["settings"][name]
    save_checkpoint(path, checkpoint.arrays, meta)


def test_a_run_of_the_first_version_goes_on_with_its_own_split_to_the_same_bits(archive: Path, here: Path) -> None:
    layout = ["--set", "data.layout=1"]
    args = ["train", str(archive), *TINY, "-q", "--epochs", "3"]
    assert main([*args, *layout, "--name", "whole"]) == 0
    cut(2, [*args, *layout, "--name", "cut"])
    config = Path("runs/cut/config.toml")
    lines = [line for line in config.read_text().splitlines() if not line.startswith(("layout", "schedule_epochs"))]
    config.write_text("\n".join(lines) + "\n")
    as_by_version_0_1(Path("runs/cut/checkpoints/last.npz"))
    assert main(["train", "--resume", "runs/cut", "-q"]) == 0
    assert main(["train", "--resume", "runs/cut", "-q"]) == 0  # by now it keeps more than its config.toml says
    config_now = read_config(config)
    assert settings_of_run(config_now, load_checkpoint("runs/cut/checkpoints/last.npz").meta)["data.layout"] == 1
    whole, again = (load_checkpoint(f"runs/{name}/checkpoints/last.npz") for name in ("whole", "cut"))
    assert all(np.array_equal(whole.arrays[name], again.arrays[name]) for name in whole.arrays)


def test_more_epochs_go_on_at_the_last_rate(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", str(archive), *TINY, "-q", "--epochs", "2", "--min-lr", "1e-4", "--val-fraction", "0"]
    assert main([*args, "--name", "run"]) == 0
    first = [row["lr"] for row in rows_of(Path("runs/run")) if "batch_loss" in row]
    assert main(["train", "--resume", "runs/run", "--epochs", "4"]) == 0
    assert "4 epochs instead of 2: the learning rate after epoch 2 is 0.0001" in capsys.readouterr().err
    rates = [row["lr"] for row in rows_of(Path("runs/run")) if "batch_loss" in row]
    assert rates == first + [1e-4] * len(first)
    assert sum("test_accuracy" in row for row in rows_of(Path("runs/run"))) == 1
    assert main(["train", "--resume", "runs/run", "-q"]) == 0  # config.toml has the four, too …
    assert main(["train", "--config", "runs/run/config.toml", "-q", "--name", "again"]) == 0  # … and gives the same
    run, again = (load_checkpoint(f"runs/{name}/checkpoints/last.npz").under("model") for name in ("run", "again"))
    assert all(np.array_equal(run[name], again[name]) for name in run)
    assert main(["train", "--resume", "runs/run", "--epochs", "3"]) == 1
    assert "epochs=3: the run is in epoch 4 already" in capsys.readouterr().err


def test_more_epochs_at_a_rate_of_0_are_refused(halfway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(halfway), "--epochs", "4"]) == 1
    said = capsys.readouterr().err
    assert "the learning rate comes down to 0 in epoch 2: more epochs would change nothing" in said
    assert f"minivit train --config {halfway}/config.toml --epochs 4" in said


# ---- ends ------------------------------------------------------------------------------------------------------------


def test_a_run_cut_anywhere_while_it_finishes_is_tested_once(archive: Path, here: Path) -> None:
    args = ["train", str(archive), *TINY, "-q", "--epochs", "1"]
    assert main([*args, "--name", "whole"]) == 0
    for name in ("evaluate", "write_results"):  # before the test row, and after it
        with pytest.MonkeyPatch.context() as patch:

            def power_cut(*args: object, **more: object) -> None:
                raise PowerCut

            patch.setattr(finish, name, power_cut)
            with pytest.raises(PowerCut):
                main([*args, "--name", name])
        run = Path("runs") / name
        assert not (run / "report.html").exists()
        assert main(["train", "--resume", str(run), "-q"]) == 0
        assert (run / "report.html").exists()
        tests = [[row for row in rows_of(Path("runs") / n) if "test_accuracy" in row] for n in ("whole", name)]
        assert len(tests[1]) == 1 and tests[0] == tests[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_it_finishes_leaves_a_run_that_can_be_finished(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def interrupted(model: mv.ViT, loader: Loader, *args: Any) -> dict[str, Any]:
        signal.raise_signal(number)
        return evaluate(model, loader, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "evaluate", interrupted)
        assert main(["train", str(archive), *TINY, "-q", "--epochs", "1", "--name", "my run"]) == code
    assert "the training is done and saved" in (said := capsys.readouterr().err)
    assert said.endswith("minivit train --resume 'runs/my run'\n")
    assert not Path("runs/my run/.lock").exists() and not Path("runs/my run/report.html").exists()
    assert main(["train", "--resume", "runs/my run", "-q"]) == 0
    assert Path("runs/my run/report.html").exists()


def test_a_run_is_held_from_before_it_is_read_to_after_its_report(
    halfway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, held = tmp_path / "run", []
    shutil.copytree(halfway, run)

    def holding(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            assert (run / ".lock").exists()
            assert main(["train", "--resume", str(run)]) == 1
            held.append(function.__name__)
            return function(*args, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((running, "load_checkpoint"), (finish, "load_checkpoint"), (finish, "write_results")):
            patch.setattr(place, name, holding(getattr(place, name)))
        assert main(["train", "--resume", str(run), "-q"]) == 0
    assert held == ["load_checkpoint", "load_checkpoint", "write_results"]  # last.npz, then best.npz
    assert capsys.readouterr().err.count("is in use by process") == 3
    assert not (run / ".lock").exists()


def test_what_is_newer_than_the_best_epoch_is_not_lost(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", str(archive), *TINY, "-q", "--epochs", "3", "--name", "run"]
    with pytest.MonkeyPatch.context() as patch:  # no epoch is better than the first
        patch.setattr("minivit.train.trainer.evaluate", lambda *args, **more: {"loss": 1.0, "accuracy": 0.5})
        assert main(args) == 0
    best = Path("runs/run/checkpoints/best.npz")
    assert load_checkpoint(best).meta["train"]["epoch"] == 1
    before = {path: path.read_bytes() for path in Path("runs/run").rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(best)]) == 1
    said = capsys.readouterr().err
    assert "best.npz is at step 3, last.npz at step 9: what is newer would be lost" in said
    assert before == {path: path.read_bytes() for path in Path("runs/run").rglob("*") if path.is_file()}
    Path("runs/run/checkpoints/last.npz").write_bytes(b"damaged")
    Path("runs/run/report.html").unlink()
    assert main(["train", "--resume", str(best), "-q"]) == 0  # which that message's remedy names
    assert len(epochs(Path("runs/run"))) == 3


def test_too_few_images_to_hold_any_out_are_all_trained_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = data.load("digits").subset(range(4))
    np.savez("four.npz", images=few.images, labels=np.arange(4))
    assert main(["train", "four.npz", *TINY, "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 to train on; 8" in said and "none are held out to validate with" in said
    assert main(["train", "four.npz", *TINY, "--epochs", "1", "--val-fraction", "0.1"]) == 1


def test_a_run_without_a_checkpoint_can_be_started_again(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_carry_out", lambda *args: None)  # as if killed in its first epoch
        main(["train", str(archive), *TINY, "--name", "early", "-q"])
    assert main(["train", "--resume", "runs/early"]) == 1
    said = capsys.readouterr().err
    assert "runs/early has no checkpoint yet" in said and "minivit train --config runs/early/config.toml" in said
    assert main(["train", "--config", "runs/early/config.toml", "--epochs", "1", "-q"]) == 0


def test_the_best_epochs_weights_are_those_that_are_measured(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, epochs in (("one", "1"), ("two", "2")):
        assert main(["train", str(archive), *TINY, "-q", "--epochs", epochs, "--name", name]) == 0
    run, best = Path("runs/one"), Path("runs/one/checkpoints/best.npz")
    own, others = best.read_bytes(), Path("runs/two/checkpoints/best.npz").read_bytes()
    (run / "report.html").unlink()
    before = (run / "metrics.jsonl").read_text()
    for content, says in ((others, "does not hold the weights of epoch 1"), (b"", "not a usable"), (None, "no check")):
        best.unlink() if content is None else best.write_bytes(content)
        capsys.readouterr()
        assert main(["train", "--resume", "runs/one", "-q"]) == 1
        said = capsys.readouterr().err
        assert says in said and "put it back; or measure the last weights: minivit eval runs/one" in said
    best.write_bytes(own)
    assert main(["train", "--resume", "runs/one", "-q"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(before.splitlines())
    (run / "checkpoints" / "last.npz").unlink()
    assert main(["train", "--resume", "runs/one"]) == 1
    said = capsys.readouterr().err
    assert "has no last.npz" in said and "minivit train --resume runs/one/checkpoints/best.npz" in said


def test_the_same_data_by_another_path_are_no_change(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(archive, "own.npz")
    assert main(["train", "own.npz", *TINY, "-q", "--epochs", "1", "--name", "run"]) == 0
    assert main(["train", "--resume", "runs/run", "own.npz"]) == 0
    assert "changed" not in capsys.readouterr().out


def test_a_run_begins_with_the_weights_of_a_runs_folder(archive: Path, here: Path) -> None:
    assert main(["train", str(archive), *TINY, "-q", "--epochs", "1", "--name", "run"]) == 0
    start = resolve({"data.name": str(archive), "train.init_from": "runs/run", "model.dim": 8, "model.depth": 2,
                     "model.heads": 2, "model.mlp_dim": 16})  # fmt: skip
    made = Job(start)
    assert made.settings["train.init_from"] == str(Path("runs/run/checkpoints/best.npz").resolve())
    kept = read_model("runs/run/checkpoints/best.npz")[0].state_dict()
    assert np.array_equal(made.model.state_dict()["cls_token"], kept["cls_token"])


def test_one_class_is_no_task(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("one.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.zeros(20, int))
    assert main(["train", "one.npz", *TINY, "--epochs", "1"]) == 1
    assert "there is only one class, '0'" in capsys.readouterr().err


def test_a_model_or_recipe_typed_beside_a_file_counts_whole(archive: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "digits@1"\n[model]\nname = "vit_digits"\ndim = 8\nheads = 2\n[train]\nepochs = 7\n')
    s = resolve({"model.name": "vit_mnist", "data.name": str(archive)}, file=file)
    assert (s["model.dim"], s["model.heads"], s["train.epochs"]) == (64, 4, 7)
    with pytest.raises(ConfigError, match=r"recipe mnist, but .* has the values of digits@1"):
        resolve({}, recipe="mnist", file=file)
    assert resolve({}, recipe="digits", file=file)["model.dim"] == 8


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("model.heads=0", "heads is 0"), ("train.init_from=3", "is not text"), ("data.name=[1, 2]", "is not text")],
)
def test_settings_of_the_wrong_kind_are_errors_of_one_line(
    wrong: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--set", wrong]) == 1
    assert said in capsys.readouterr().err


# ---- folders of images -----------------------------------------------------------------------------------------------


def test_an_image_folder_trains_evaluates_and_predicts(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--set", "model.image_size=16", "--set", "model.patch_size=8", *TINY]
    assert main(["train", str(photos), *small, "--epochs", "8", "--lr", "0.01", "--name", "run"]) == 0
    said = capsys.readouterr().out
    assert "43 to train on, 5 to validate with, 16 to test with; 16 × 16 pixels, 3 channels, 2 classes" in said
    assert "recipe imagefolder@2" in said
    assert main(["eval", "runs/run/checkpoints/last.npz", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["bright", "dark"] and found["accuracy"] == 1.0 and found["count"] == 16
    assert main(["predict", "runs/run/checkpoints/last.npz", str(photos / "test" / "dark" / "3.png")]) == 0
    assert "dark" in capsys.readouterr().out


def test_bad_images_stop_a_run_or_are_left_out(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    for split in ("train", "test"):
        for name in ("bright", "dark"):
            (here / "mine" / split / name).mkdir(parents=True)
            for file in sorted((photos / split / name).iterdir())[:5]:
                (here / "mine" / split / name / file.name).write_bytes(file.read_bytes())
    whole = (photos / "train" / "dark" / "1.png").read_bytes()
    (here / "mine" / "train" / "dark" / "bad.png").write_bytes(whole[: len(whole) // 2])
    args = ["train", "mine", "--set", "model.image_size=16", "--set", "model.patch_size=8", *TINY, "--epochs", "1"]
    assert main(args) == 1
    assert "bad.png" in (said := capsys.readouterr().err) and "--bad-images skip" in said
    assert not Path("runs").exists()
    with pytest.warns(UserWarning, match=r"bad\.png"):
        assert main([*args, "--bad-images", "skip"]) == 0
    assert "9 to train on, 1 to validate with, 10 to test with" in capsys.readouterr().out
    (here / "mine" / "test" / "dark" / "bad.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"bad\.png"):  # an evaluation does as the run did
        assert main(["eval", "runs/mine-1/checkpoints/last.npz"]) == 0


# ---- from a checkpoint -----------------------------------------------------------------------------------------------


def test_a_model_is_fine_tuned_on_other_images_of_another_size(
    archive: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(archive), *TINY, "--epochs", "1", "-q", "--name", "first", "--model-ema", "0.5"]) == 0
    first = Path(find_checkpoint("runs/first")).resolve()
    args = ["train", str(photos), "--init-from", "runs/first", "--set", "model.image_size=[16, 8]", "--epochs", "2"]
    args += ["--set", "model.head=mlp"]  # which fine-tuning drops
    assert main([*args, "--name", "second"]) == 0
    said = capsys.readouterr().out
    assert "recipe finetune@2" in said and "SGD with momentum" in said and "head: new, for 2 classes" in said
    config = tomllib.loads(Path("runs/second/config.toml").read_text())
    assert (
        config["model"]["dim"] == 8 and config["model"]["image_size"] == [16, 8] and config["model"]["num_classes"] == 2
    )
    assert config["model"]["patch_size"] == 4 and config["model"]["in_channels"] == 1
    assert config["train"]["init_from"] == str(first)
    first.unlink()  # a run can be resumed without what it has started from
    assert main(["train", "--resume", "runs/second"]) == 0


def test_the_start_is_the_checkpoints_average_with_a_new_head(archive: Path, here: Path) -> None:
    assert main(["train", str(archive), *TINY, "--epochs", "1", "-q", "--name", "first", "--model-ema", "0.5"]) == 0
    first = "runs/first/checkpoints/last.npz"
    made = Job(resolve({"data.name": str(archive), "train.init_from": first}))
    averaged, _ = read_model(first)
    assert parameters_hash(averaged) != parameters_hash(made.model)
    assert not made.model.head.weight.data.any()
    averaged.reset_head(10)
    assert parameters_hash(averaged) == parameters_hash(made.model)
    with pytest.raises(ConfigError, match="does not divide"):
        Job(resolve({"data.name": str(archive), "train.init_from": first, "model.patch_size": 3}))


def test_data_of_a_fixed_size_ignore_the_model_size(archive: Path) -> None:
    assert data.load(archive, "train", (32, 32), 3).images.shape == (200, 1, 8, 8)


def test_a_folder_s_val_validates_and_what_was_trained_before_keeps_its_split(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minivit.weights.checkpoint import load_checkpoint, save_checkpoint

    shutil.copytree(photos, here / "mine")
    (here / "mine" / "test").rename(here / "mine" / "val")
    small = ["--set", "model.image_size=16", "--set", "model.patch_size=8", *TINY, "--epochs", "1"]
    assert main(["train", "mine", *small, "--name", "run"]) == 0
    said = capsys.readouterr().out
    assert "48 to train on, 16 to validate with; 16 × 16" in said
    assert "validation  best accuracy" in said
    assert "\ntest " not in said
    assert main(["eval", "runs/run/checkpoints/last.npz"]) == 1
    assert "no test images of its own" in capsys.readouterr().err
    old = load_checkpoint("runs/run/checkpoints/last.npz")
    assert old.meta["data"].pop("layout") == 2  # as version 0.1.0 left it
    save_checkpoint("old.npz", old.arrays, old.meta)
    assert main(["eval", "old.npz"]) == 0
    assert "16 images" in capsys.readouterr().out
