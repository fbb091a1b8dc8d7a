"""Training runs from the command line: what the settings make of data, model and optimizer, and how runs end."""

from __future__ import annotations

import csv
import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit import data
from minivit.cli import job
from minivit.cli.job import Job, augmentation
from minivit.cli.main import main
from minivit.cli.results import _label_text
from minivit.cli.settings import resolve
from minivit.data import Affine, Chain, ColorJitter, Crop, Flip, Mix, RandAugment, RandomErasing, RandomResizedCrop
from minivit.errors import ConfigError
from minivit.train.checkpoint import load_checkpoint, parameters_hash
from minivit.train.optim import SGD
from minivit.train.weights import read_model

TINY = [word for key in ("dim=8", "depth=2", "heads=2", "mlp_dim=16") for word in ("--set", f"model.{key}")]
EVERYTHING = ["--grad-accum-steps", "2", "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1", "--model-ema", "0.9",
              "--layer-decay", "0.8", "--smoothing", "0.1", "--set", "data.randaugment=9", "--set", "data.erasing=0.3",
              "--set", "data.crop=1", "--optimizer", "muon"]  # fmt: skip


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
    made = Job(resolve(typed), quiet=True)
    opt = made.make_optimizer()
    assert isinstance(opt, SGD) and opt.momentum == 0.8
    assert sorted({group.scale for group in opt.groups}) == [0.125, 0.25, 0.5, 1.0]
    assert made.loader.mix == Mix(0.3, 0.0)
    images, labels = next(iter(made.loader.batches(0)))
    assert labels.shape == (64, 10) and labels.dtype == np.float32 and images.dtype == np.float32
    shown = [_label_text(label, made.train_data.classes) for label in labels]
    assert any("%" in text for text in shown) and all(text.split()[0] in "0123456789" for text in shown)


def test_a_run_with_everything_on_is_resumed_to_the_same_bits(archive: Path, here: Path) -> None:
    args = ["train", str(archive), *TINY, *EVERYTHING, "-q", "--epochs", "3", "--save-every", "1"]
    assert main([*args, "--name", "whole"]) == 0
    steps = 0

    class Cut(Exception):
        pass

    class CutStep(mv.TrainStep):
        def __call__(self, images: np.ndarray, labels: np.ndarray) -> float:
            nonlocal steps
            steps += 1
            if steps == 4:
                raise Cut
            return super().__call__(images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivit.train.trainer.TrainStep", CutStep)
        with pytest.raises(Cut):
            main([*args, "--name", "cut"])
    assert load_checkpoint("runs/cut/checkpoints/last.npz").arrays["optimizer/steps"] == 3
    assert main(["train", "--resume", "runs/cut", "-q"]) == 0
    whole, cut = (load_checkpoint(f"runs/{name}/checkpoints/last.npz") for name in ("whole", "cut"))
    assert whole.arrays.keys() == cut.arrays.keys() and any(name.startswith("ema/") for name in whole.arrays)
    assert all(np.array_equal(whole.arrays[name], cut.arrays[name]) for name in whole.arrays)


def test_patience_ends_a_run_early(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", str(archive), *TINY, "--lr", "1e-9", "--epochs", "9", "--patience", "1", "--val-fraction", "0.2"]
    assert main([*args, "--name", "early"]) == 0
    assert len(epochs(Path("runs/early"))) == 2
    assert "no better validation accuracy in 1 epoch" in capsys.readouterr().err
    assert main(["train", "--resume", "runs/early"]) == 0
    assert "is finished" in capsys.readouterr().out


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


def test_a_smaller_memory_is_enough_with_recompute(archive: Path) -> None:
    typed = {"data.name": str(archive), "model.patch_size": 1, "model.depth": 4, "train.threads": 1}
    plain, again = (Job(resolve(typed | {"model.recompute": on}), quiet=True).memory for on in (False, True))
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
    held["train_labels"] = held["train_labels"][::-1]
    np.savez("mine.npz", **held)
    Path("runs/run/report.html").unlink()
    assert main(["train", "--resume", "runs/run"]) == 1
    assert "is not as it was when the run began: other labels" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_can_be_started_again(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "run", lambda self, folder: 1)  # as if killed in its first epoch
        main(["train", str(archive), *TINY, "--name", "early", "-q"])
    assert main(["train", "--resume", "runs/early"]) == 1
    said = capsys.readouterr().err
    assert "runs/early has no checkpoint yet" in said and "minivit train --config runs/early/config.toml" in said
    assert main(["train", "--config", "runs/early/config.toml", "--epochs", "1", "-q"]) == 0


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
    assert "48 to train on, 16 to test with; 16 × 16 pixels, 3 channels, 2 classes" in said
    assert "recipe imagefolder@1" in said
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
    assert "10 to train on, 10 to test with" in capsys.readouterr().out
    (here / "mine" / "test" / "dark" / "bad.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"bad\.png"):  # an evaluation does as the run did
        assert main(["eval", "runs/mine-1/checkpoints/last.npz"]) == 0


# ---- from a checkpoint -----------------------------------------------------------------------------------------------


def test_a_model_is_fine_tuned_on_other_images_of_another_size(
    archive: Path, photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(archive), *TINY, "--epochs", "1", "-q", "--name", "first", "--model-ema", "0.5"]) == 0
    first = "runs/first/checkpoints/last.npz"
    args = ["train", str(photos), "--init-from", first, "--set", "model.image_size=[16, 8]", "--epochs", "2"]
    args += ["--set", "model.head=mlp"]  # which fine-tuning drops
    assert main([*args, "--name", "second"]) == 0
    said = capsys.readouterr().out
    assert "recipe finetune@1" in said and "SGD with momentum" in said and "head: new, for 2 classes" in said
    config = tomllib.loads(Path("runs/second/config.toml").read_text())
    assert (
        config["model"]["dim"] == 8 and config["model"]["image_size"] == [16, 8] and config["model"]["num_classes"] == 2
    )
    assert config["model"]["patch_size"] == 4 and config["model"]["in_channels"] == 1
    assert Path(config["train"]["init_from"]).is_absolute()
    Path(first).unlink()  # a run can be resumed without what it has started from
    assert main(["train", "--resume", "runs/second"]) == 0


def test_the_start_is_the_checkpoints_average_with_a_new_head(archive: Path, here: Path) -> None:
    assert main(["train", str(archive), *TINY, "--epochs", "1", "-q", "--name", "first", "--model-ema", "0.5"]) == 0
    first = "runs/first/checkpoints/last.npz"
    made = Job(resolve({"data.name": str(archive), "train.init_from": first}), quiet=True)
    averaged, _ = read_model(first)
    assert parameters_hash(averaged) != parameters_hash(made.model)
    assert not made.model.head.weight.data.any()
    averaged.reset_head(10)
    assert parameters_hash(averaged) == parameters_hash(made.model)
    with pytest.raises(ConfigError, match="does not divide"):
        Job(resolve({"data.name": str(archive), "train.init_from": first, "model.patch_size": 3}), quiet=True)


def test_data_of_a_fixed_size_ignore_the_model_size(archive: Path) -> None:
    assert data.load(archive, "train", (32, 32), 3).images.shape == (200, 1, 8, 8)


def test_a_folder_s_val_validates_and_what_was_trained_before_keeps_its_split(
    photos: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minivit.train.checkpoint import load_checkpoint, save_checkpoint

    shutil.copytree(photos, here / "mine")
    (here / "mine" / "test").rename(here / "mine" / "val")
    small = ["--set", "model.image_size=16", "--set", "model.patch_size=8", *TINY, "--epochs", "1"]
    assert main(["train", "mine", *small, "--name", "run"]) == 0
    said = capsys.readouterr().out
    assert "48 to train on, 16 to validate with; 16 × 16" in said
    assert "validation  best accuracy" in said
    assert "\ntest " not in said
    assert main(["eval", "runs/run/checkpoints/last.npz"]) == 1
    assert "no split 'test'" in capsys.readouterr().err
    old = load_checkpoint("runs/run/checkpoints/last.npz")
    assert old.meta["data"].pop("layout") == 2  # as version 0.1.0 left it
    save_checkpoint("old.npz", old.arrays, old.meta)
    assert main(["eval", "old.npz"]) == 0
    assert "16 images" in capsys.readouterr().out
