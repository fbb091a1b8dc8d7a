"""The command line, as a user meets it: what is printed, what is written, and with which code it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit import data
from minivit.backend import Key
from minivit.cli.main import COMMANDS, main
from minivit.data.catalog import NAMES
from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.measure.costs import layer_costs, layer_of
from minivit.measure.metrics import classification_metrics, wilson_interval
from minivit.models import MODELS, count_parameters
from minivit.models.registry import Configuration
from minivit.runs.options import MODEL_FLAGS, OPTIONS, RECIPE_NAMES
from minivit.runs.parts import augmentation
from minivit.runs.recipes import FOR_DATA, RECIPES, full_name
from minivit.runs.settings import fit_to_data, known_settings, parse_assignment, resolve, write_toml
from minivit.show.text import plural, text_table
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from minivit.weights.native import read_model

TINY = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "model.mlp_dim=16"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(mv.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}


def start(*args: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "minivit", *args], cwd=cwd, env=environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def minivit(*args: str, cwd: Path) -> tuple[int, str, str]:
    process = start(*args, cwd=cwd)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def finished(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of a tiny model. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["train", str(archive), *TINY, "--epochs", "2", "--val-fraction", "0", "-o", str(folder), "-q"]) == 0
    return folder / "few-1"


@pytest.fixture
def checkpoint(finished: Path) -> str:
    return str(finished / "checkpoints" / "last.npz")


# ---- help, errors, exit codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["tran"], *[[command, "--help"] for command in COMMANDS]])
def test_help_and_usage_errors_import_nothing_heavy(args: list[str], tmp_path: Path) -> None:
    tell = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    run = "from minivit.cli.main import main; main(sys.argv[1:]); "

    def modules(code: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}{tell}", *args],
            capture_output=True, text=True, cwd=tmp_path, env=environment(), check=True,
        )  # fmt: skip
        return set(done.stdout.splitlines()[-1].split())

    loaded = modules(run) - modules("")  # what the interpreter itself loads, an editable install's finder among it
    assert "minivit" in loaded
    assert not loaded & {"numpy", "PIL", "tqdm", "cupy", "threadpoolctl"}
    if args[0] in ("--help", "train"):
        assert not loaded & {"inspect", "dataclasses", "pathlib", "json", "tomllib", "typing"}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_within_the_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: minivit {command}")
    assert max(map(len, out.splitlines())) <= 100


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minivit {mv.__version__}\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "did you mean train?"),
        (["train", "--epoch", "3"], "unknown option --epoch; did you mean --epochs"),
        (["train", "--epohcs=3"], "unknown option --epohcs; did you mean --epochs or"),
        (["train", "--epochs", "many"], "--epochs/-e: takes a whole number, not 'many'"),
        (["train", "--lr", "abc"], "--lr: takes a number, not 'abc'"),
        (["train", "--dropout", "abc"], "--dropout: takes a number, not 'abc'"),
        (["summary", "-b", "1.5"], "--batch-size/-b: takes a whole number, not '1.5'"),
        (["summary", "-b", "0"], "--batch-size/-b: takes a number from 1 to 1,000,000, not '0'"),
        (["summary", "--image-size", "9"], "unknown option --image-size"),
        (["train", "digits", "more"], "'more' is one argument too many"),
        (["eval"], "required: CKPT"),
        (
            ["predict", "a.npz", "b.png", "--format", "jsn"],
            "unknown format 'jsn'; known: table, json, csv; did you mean",
        ),
        (["gradcheck", "--order", "0"], "--order: takes a number from 1 to 9, not '0'"),
        (["summary", "--batch-sizes", "3"], "did you mean --batch-size"),
    ],
)
def test_usage_errors_give_2_and_say_what_was_meant(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "--help" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--model", "vit_digit"], "unknown model 'vit_digit'\n  → did you mean 'vit_digits'"),
        (["train", "--data", "digit"], "unknown data set 'digit'\n  → did you mean 'digits'?"),
        (["train", "no.npz"], "no.npz: no such file"),
        (["train", "--recipe", "digit"], "unknown recipe 'digit'\n  → did you mean 'digits'?"),
        (
            ["train", "--set", "model.dept=3"],
            "unknown setting 'model.dept' (command line)\n  → did you mean model.depth",
        ),
        (["train", "--set", "depth=3"], "did you mean model.depth"),
        (["train", "--set", "model.lr=3"], "did you mean train.lr"),
        (["train", "--set", "model.depth"], "is not KEY=VALUE"),
        (["train", "--set", "model.depth=2.5"], "model.depth = 2.5 (command line) is not a whole number"),
        (["train", "--set", "model.pool=max"], "pool is 'max'"),
        (["train", "--set", "data.crops=4"], "did you mean data.crop"),
        (["train", "--on-nan", "skp"], "unknown train.on_nan 'skp'\n  → did you mean 'skip'"),
        (["train", "--patience", "2"], "patience needs validation images"),
        (["train", "--set", "model.heads=8192", "--set", "model.dim=65536"], "of memory, "),
        (["train", "--init-from", "no.npz"], "there is no checkpoint no.npz"),
        (["train", "--set", "model.image_size=16"], "model.image_size = 16 (command line), but the data have 8"),
        (["train", "--set", "model.num_classes=5"], "model.num_classes = 5 (command line), but the data have 10"),
        (
            ["train", "--epochs", "0"],
            "train.epochs = 0 (command line) is out of range\n  → it must be from 1 to 1,000,000",
        ),
        (["train", "--val-fraction", "1.5"], "it must be from 0 to 0.9"),
        (["train", "--dropout", "1"], "model.dropout is 1.0 (command line)\n  → it must be a rate in [0, 1)"),
        (["train", "--lr", "1e-4", "--min-lr", "1e-3"], "final_lr 0.001 is outside"),
        (["train", "--device", "gpu"], "unknown device 'gpu'"),
        (["train", "digits", "--data", "other.npz"], "two data sets"),
        (["train", "--config", "no.toml"], "cannot read no.toml: No such file"),
        (["train", "--resume", "no"], "no is no run, nor a checkpoint of one"),
        (["train", "--resume", "no", "--lr", "1"], "--resume continues a run with the settings"),
        (["eval", "no.npz"], "there is no checkpoint no.npz"),
        (["predict", "no.npz", "a.png"], "there is no checkpoint no.npz"),
        (["summary", "vit_tinny"], "unknown model 'vit_tinny'\n  → did you mean"),
        (["summary", "--list", "resnet5*"], "unknown model or pattern 'resnet5*'"),
        (
            ["train", "--set", "model.patch_size=3"],
            "model.patch_size = 3 (command line) does not divide the data's 8 × 8 pixels\n"
            "  → use one that does: --set model.patch_size=N with N one of 1, 2, 4, 8",
        ),
        (["train", "--set", "model.patch_size=0"], "model.patch_size = 0 (command line) does not divide"),
        (
            ["train", "--weight-decay", "inf"],
            "weight_decay = inf (command line) is out of range\n  → it must be finite",
        ),
        (["gradcheck", "vit_base_patch16_224"], "86,567,656 parameters"),
    ],
)
def test_failures_give_1_with_a_remedy_and_leave_no_folder(
    args: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("minivit: error: ")
    assert "\n  → " in err
    assert "Traceback" not in err
    assert not list(here.iterdir())


@pytest.fixture
def broken(checkpoint: str, here: Path) -> Path:
    """A folder of files that cannot be used."""
    whole = bytearray(Path(checkpoint).read_bytes())
    Path("cut.npz").write_bytes(whole[:-9])
    whole[len(whole) // 2] ^= 1
    Path("damaged.npz").write_bytes(whole)
    Path("text.npz").write_text("hello")
    run = here / "run" / "checkpoints"
    run.mkdir(parents=True)
    (run / "last.npz").write_bytes(whole)
    (here / "run" / "config.toml").write_text('recipe = "digits"\n')
    images, labels = np.ones((9, 8, 8), np.uint8), np.arange(9) % 3
    np.savez("soft.npz", images=images, labels=np.ones((9, 3)))
    np.savez("negative.npz", images=images, labels=labels - 1)
    np.savez("beyond.npz", images=images, labels=labels, classes=np.array(["a", "b"]))
    np.savez("fewer.npz", images=images, labels=labels[:5])
    np.savez("empty.npz", images=images[:0], labels=labels[:0], test_images=images[:0], test_labels=labels[:0])
    return here


@pytest.mark.parametrize(
    ("args", "said"),
    [
        *[([*command, "gone.npz", *more], "there is no checkpoint gone.npz")
          for command, more in ((["eval"], []), (["predict"], ["a.png"]), (["summary"], []), (["gradcheck"], []))],
        *[([*command, "cut.npz", *more], "cut.npz is not a usable checkpoint: it is cut short")
          for command, more in ((["eval"], []), (["predict"], ["a.png"]), (["summary"], []), (["gradcheck"], []))],
        *[([*command, "damaged.npz", *more], "damaged.npz is not a usable checkpoint: it is damaged, in ")
          for command, more in ((["eval"], []), (["predict"], ["a.png"]), (["summary"], []), (["gradcheck"], []))],
        (["eval", "text.npz"], "text.npz is not a usable checkpoint"),
        (["train", "-q", "--resume", "run"], "last.npz is not a usable checkpoint: it is damaged"),
        (["eval", "CKPT", "--data", "gone.npz"], "gone.npz: no such file"),
        (["eval", "CKPT", "--data", "digit"], "unknown data set 'digit'\n  → did you mean 'digits'?"),
        (["eval", "CKPT", "--data", "empty.npz"], "no images"),
        (["train", "text.npz"], "text.npz: not a NumPy archive"),
        (["train", "soft.npz"], "soft.npz: labels: row 0 is not one-hot"),
        (["train", "negative.npz"], "label -1 of image 0 is not a class"),
        (["train", "beyond.npz"], "label 2 of image 2 is not a class"),
        (["train", "fewer.npz"], "9 images but 5 labels"),
        (["train", "empty.npz"], "no images"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used_give_1_with_a_remedy(
    args: list[str], said: str, checkpoint: str, broken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([checkpoint if arg == "CKPT" else arg for arg in args]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("minivit: error: ")
    assert "\n  → " in err
    assert not (broken / "runs").exists()


def test_a_system_error_is_no_traceback(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs").write_text("a file where the folder should be")
    assert main(["train", *TINY]) == 1
    assert "minivit: error: [Errno 17] File exists: 'runs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(KeyboardInterrupt(), 130, "interrupted"), (MemoryError(), 1, "out of memory\n  → use a smaller")],
)
def test_interruptions(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr("minivit.cli.doctor.run", fail)
    assert main(["doctor"]) == code
    assert said in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise AssertionError("a bug")

    monkeypatch.setattr("minivit.cli.doctor.run", fail)
    with pytest.raises(AssertionError, match="a bug"):
        main(["doctor"])


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    process = start("summary", "--list", "vit_tiny*", cwd=tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head -0` would
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert errors == ""


def test_public_names_are_imported_when_used() -> None:
    assert all(getattr(mv, name) is not None for name in mv.__all__)
    assert set(dir(mv)) == set(mv.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Transformer'"):
        mv.Transformer  # noqa: B018


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_rise_from_default_to_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[model]\ndepth = 3\ndim = 32\n[train]\nbatch_size = 16\nlr = 1\n")
    s = resolve({"model.depth": 2, "train.epochs": 5}, file=file)
    recipe = RECIPES["digits@1"]
    found = {key: (s[key], s.origins[key]) for key in s.origins}
    assert found["model.qkv_bias"] == (True, "default")
    assert found["model.in_channels"] == (1, "model vit_digits")
    assert found["train.smoothing"] == (recipe["train"]["smoothing"], "recipe digits@1")
    assert found["model.dim"] == (32, f"file {file}")
    assert found["train.lr"] == (1.0, f"file {file}")
    assert isinstance(s["train.lr"], float)
    assert found["model.depth"] == (2, "command line")
    assert found["train.epochs"] == (5, "command line")


def test_a_config_round_trips(tmp_path: Path) -> None:
    typed = {"model.patch_size": [2, 4], "train.lr": 1e-5, "model.qkv_bias": False, "data.name": 'odd "näme"\x7f\n.npz'}
    s = resolve(typed | {"model.name": "vit_digits"}, recipe="digits")
    fit_to_data(s, (1, 8, 12), 7)
    text = write_toml(s)
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    again = resolve({}, file=tmp_path / "config.toml")
    assert dict(again) == dict(s)
    assert set(again.origins.values()) <= {f"file {tmp_path / 'config.toml'}", "default"}
    assert tomllib.loads(text)["model"]["image_size"] == [8, 12]
    lines = {line.split(" = ")[0]: line.split("  # ")[-1] for line in text.splitlines() if " = " in line}
    assert lines["lr"] == "command line"
    assert lines["num_classes"] == "data"
    assert lines["heads"] == "model vit_digits"


def test_another_model_leaves_the_recipe_model_behind() -> None:
    s = resolve({"model.name": "vit_mnist"})
    sizes = MODELS["vit_mnist"].settings
    assert {k: s[f"model.{k}"] for k in sizes} == sizes
    assert s["model.pool"] == "cls"
    assert s["train.smoothing"] == RECIPES["digits@1"]["train"]["smoothing"]


@pytest.mark.parametrize(("size", "model"), [(8, "vit_digits"), (28, "vit_mnist"), (32, "vit_cifar")])
def test_the_data_choose_what_nobody_named(size: int, model: str, archive: Path) -> None:
    s = resolve({"data.name": str(archive), "model.depth": 1})
    assert s["recipe"] == ""
    fit_to_data(s, (3, size, size), 4)
    chosen = [s[f"model.{k}"] for k in ("name", "image_size", "in_channels", "num_classes", "depth", "dim")]
    assert chosen == [model, size, 3, 4, 1, MODELS[model].settings["dim"]]


def test_a_bad_file_is_an_error(tmp_path: Path) -> None:
    for text, said in [("lr = = 1", "is not TOML"), ("[train]\nlearning = 1", "unknown setting 'train.learning'"),
                       ("[train]\nepochs = true", "not a whole number"), ('[train]\nlr = "high"', "not a number"),
                       ("[model]\nimage_size = [8]", r"not a whole number or \[height, width\]")]:  # fmt: skip
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            resolve({}, file=tmp_path / "bad.toml")


def test_assignments_are_toml_or_text() -> None:
    found = [parse_assignment(text) for text in ("a.b=1", "a.b = 0.5", "a=true", "a=[8, 4]", "a=mean", 'a="x=y"')]
    assert found == [("a.b", 1), ("a.b", 0.5), ("a", True), ("a", [8, 4]), ("a", "mean"), ("a", "x=y")]


def test_every_option_and_recipe_is_sound() -> None:
    kinds = known_settings()
    assert set(OPTIONS) | set(MODEL_FLAGS) <= set(kinds)
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert set(RECIPE_NAMES) == {name.partition("@")[0] for name in RECIPES}  # --help lists them
    assert set(FOR_DATA) <= {*NAMES, "npz", "folder", "shards"} and set(FOR_DATA.values()) <= set(RECIPE_NAMES)
    for name in RECIPES:
        s = resolve({}, recipe=name)
        own = name in ("imagefolder@2", "finetune@2")  # those of sets that have a name train on all images
        assert s["data.val_fraction"] == (0.1 if own else 0.0)
        assert s["recipe"] == name == full_name(name)
        augmentation(s.table("data"), 3)
    assert full_name("digits") == "digits@1"


# ---- train -----------------------------------------------------------------------------------------------------------


def test_a_run_folder_holds_the_run(finished: Path, archive: Path) -> None:
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    pictures = {f"{name}.png" for name in ("samples_train", "samples_valid", "attention", "predictions", "confusion")}
    texts = {"config.toml", "command.txt", "metrics.jsonl", "results.csv", "report.html"}
    assert names == pictures | texts | {"checkpoints/last.npz"}
    config = tomllib.loads((finished / "config.toml").read_text())
    assert config["model"]["dim"] == 8
    assert config["data"]["name"] == str(archive)
    assert config["train"]["device"] == "cpu"
    assert config["train"]["threads"] >= 1
    command = (finished / "command.txt").read_text()
    assert command.startswith(f"command       minivit train {archive} --set model.dim=8")
    assert all(word in command for word in ("numpy", "blas", "cpu"))
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    last = rows[-1]
    assert last["test_count"] == 60
    assert last["test_interval"][0] < last["test_accuracy"] < last["test_interval"][1]
    assert sum("test_accuracy" in row for row in rows) == 1
    assert len((finished / "results.csv").read_text().splitlines()) == 3
    for picture in pictures:
        with Image.open(finished / picture) as image:
            image.load()
            assert min(image.size) > 100


def test_the_checkpoint_says_what_prediction_needs(checkpoint: str, archive: Path) -> None:
    meta = load_checkpoint(checkpoint).meta
    train = data.load(archive)
    assert meta["model"]["dim"] == 8
    expected = {
        "name": str(archive),
        "classes": list("0123456789"),
        "fit": "stretch",
        "bad_images": "stop",
        "layout": 2,
    }
    expected |= {"mean": list(train.mean), "std": list(train.std)}
    expected["labels"] = hashlib.sha256(train.labels.tobytes()).hexdigest()
    assert meta["data"] == expected
    model, _ = read_model(checkpoint)
    other = mv.ViT(**{**model.config, "seed": 5})
    mv.load_weights(other, checkpoint)
    assert all(
        np.array_equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        mv.load_weights(mv.create_model("vit_digits"), checkpoint)


def test_what_a_run_prints(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(archive), *TINY, "-e", "1", "--val-fraction", "0"]) == 0
    out, err = capsys.readouterr()
    for said in (
        "device      cpu",
        "model       vit_digits: ",
        "200 to train on, 60 to test with; 8 × 8 pixels",
        "run folder  runs/few-1",
        "reproduce   minivit train --config runs/few-1/config.toml",
        "test        accuracy ",
        "% (95% interval ",
        "next        minivit eval runs/few-1\n            minivit predict runs/few-1 IMAGE…\n",
    ):
        assert said in out
    assert "epoch 1/1" in err
    assert max(len(line) for line in out.splitlines() if not line.startswith("device")) <= 100


def test_the_reproduce_command_gives_equal_bits_in_a_new_folder(finished: Path, here: Path) -> None:
    assert main(["train", "--config", str(finished / "config.toml"), "-q"]) == 0
    assert main(["train", "--config", str(finished / "config.toml"), "-q", "--seed", "1"]) == 0
    first, same, other = (
        load_checkpoint(folder / "checkpoints" / "last.npz").under("model")
        for folder in (finished, here / "runs" / "few-1", here / "runs" / "few-2")
    )
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_a_folder_is_never_used_twice(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", str(archive), *TINY, "-e", "1", "-q", "--name", "mine"]
    assert main(args) == 0
    before = (here / "runs" / "mine" / "metrics.jsonl").read_text()
    assert main(args) == 1
    assert "runs/mine is there already\n  → choose another --name, or --resume runs/mine" in capsys.readouterr().err
    assert (here / "runs" / "mine" / "metrics.jsonl").read_text() == before


def test_validation_chooses_the_weights_that_are_tested_once(
    archive: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(archive), *TINY, "-e", "2", "--val-fraction", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "150 to train on, 50 to validate with" in out
    assert "validation  best accuracy " in out
    run = here / "runs" / "few-1"
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "test_accuracy" in line]
    best = load_checkpoint(run / "checkpoints" / "best.npz").meta["train"]["best"]
    assert f"after epoch {best['epoch']}\ntest        accuracy {row['test_accuracy']:.2%}" in out
    assert f"with the weights of epoch {best['epoch']}" in out and row["epoch"] == best["epoch"]
    model, meta = read_model(run / "checkpoints" / "best.npz")
    test = data.load(archive, "test")
    images = data.standardize(test.images, meta["data"]["mean"], meta["data"]["std"])
    right = mv.predict_logits(model, images).argmax(axis=1) == test.labels
    assert row["test_accuracy"] == right.mean() and row["test_count"] == 60


def test_accumulation_is_a_larger_batch(archive: Path, here: Path) -> None:
    common = ["train", str(archive), *TINY, "-e", "1", "-q", "--threads", "1", "--val-fraction", "0"]
    assert main([*common, "-b", "10", "--grad-accum-steps", "4"]) == 0
    assert main([*common, "-b", "40", "--micro-batch", "10"]) == 0
    a, b = (load_checkpoint(here / "runs" / f"few-{n}" / "checkpoints" / "last.npz") for n in (1, 2))
    assert all(np.array_equal(a.arrays[name], b.arrays[name]) for name in a.arrays)
    assert int(a.arrays["optimizer/steps"]) == 5


def test_images_without_a_test_split_and_with_alpha_train(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.arange(24 * 4 * 4 * 6, dtype=np.uint32).reshape(24, 4, 4, 6) % 251
    np.savez("own.npz", images=images.astype(np.uint8), labels=np.arange(24) % 3, classes=np.array(["a", "b", "c"]))
    args = [
        "train",
        "own.npz",
        *TINY,
        "-e",
        "1",
        "-b",
        "8",
        "--set",
        "model.pool=mean",
        "--set",
        "model.patch_size=[2, 3]",
    ]
    assert main([*args, "--val-fraction", "0"]) == 0
    out = capsys.readouterr().out
    assert "4 × 6 pixels, 4 channels, 3 classes" in out
    assert "test " not in out
    assert (here / "runs" / "own-1" / "attention.png").exists()


def test_splits_that_differ_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("odd.npz", train_images=np.ones((9, 8, 8), np.uint8), train_labels=np.arange(9) % 2,
             test_images=np.ones((9, 8, 6), np.uint8), test_labels=np.arange(9) % 2)  # fmt: skip
    assert main(["train", "odd.npz", *TINY]) == 1
    assert "give all splits the same size and classes" in capsys.readouterr().err


def stop(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """Wait until a run has finished an epoch, send it a signal; return its exit code and what else it said."""
    assert process.stderr is not None
    assert "loss" in process.stderr.readline()
    process.send_signal(number)
    _, rest = process.communicate()
    return process.returncode, rest


def test_a_stopped_run_is_resumed_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    def last(name: str) -> dict[str, np.ndarray]:
        return load_checkpoint(tmp_path / name / "checkpoints" / "last.npz").arrays

    long = ["train", "--config", str(finished / "config.toml"), "--epochs", "30", "-o", str(tmp_path)]
    assert main([*long, "--name", "whole", "-q"]) == 0
    code, said = stop(start(*long, "--name", "was stopped", cwd=tmp_path), signal.SIGINT)
    assert code == 130
    command = shlex.split(said[said.index("minivit train --resume") :])
    assert command == ["minivit", "train", "--resume", str(tmp_path / "was stopped" / "checkpoints" / "last.npz")]
    code, out, err = minivit(*command[1:], cwd=tmp_path)
    assert code == 0, err
    assert "continuing at step " in out
    whole, stopped = last("whole"), last("was stopped")
    assert all(np.array_equal(whole[name], stopped[name]) for name in whole)
    code, out, _ = minivit("train", "--resume", "was stopped", cwd=tmp_path)
    assert code == 0
    assert out.endswith("the run was stopped is finished; to measure it: minivit eval 'was stopped'\n")


@pytest.mark.skipif(sys.platform == "win32", reason="it has no pseudo-terminals")
def test_a_closed_terminal_saves_the_run_and_gives_129(finished: Path, tmp_path: Path) -> None:
    master, terminal = os.openpty()
    command = ["train", "--config", str(finished / "config.toml"), "--epochs", "1000", "-o", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "minivit", *command], env=environment(), cwd=tmp_path,
                               stdin=terminal, stdout=terminal, stderr=terminal)  # fmt: skip
    os.close(terminal)
    said = b""
    while b"epoch    1/1000" not in said:
        said += os.read(master, 4096)
    os.close(master)  # what is written from here on fails
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 129
    (path,) = tmp_path.glob("*/checkpoints/last.npz")
    assert load_checkpoint(path).meta["train"]["epoch"] < 1000


def test_sigterm_gives_143(finished: Path, tmp_path: Path) -> None:
    args = ["train", "--config", str(finished / "config.toml"), "--epochs", "10000", "--name", "x"]
    code, said = stop(start(*args, cwd=tmp_path), signal.SIGTERM)
    assert code == 143
    assert "minivit train --resume runs/x/checkpoints/last.npz" in said


# ---- eval ------------------------------------------------------------------------------------------------------------


def test_eval_prints_figures_and_confusions(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", checkpoint]) == 0
    out = capsys.readouterr().out
    for said in ("60 images", "loss ", "accuracy ", "(95% interval", "top-5", "label  images", "most often mistaken"):
        assert said in out
    assert max(map(len, out.splitlines()[1:])) <= 120


def test_eval_agrees_with_the_run_and_gives_json(
    checkpoint: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", checkpoint, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["accuracy"] == run["test_accuracy"]
    assert found["loss"] == run["test_loss"]
    assert found["count"] == np.sum(found["confusion"]) == 60
    assert found["right"] == np.trace(found["confusion"])
    assert main(["eval", checkpoint, "--json", "--data", "digits", "--split", "train"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 3823


def test_eval_refuses_data_of_another_kind(checkpoint: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = np.array([f"kind {i}" for i in range(12)])
    np.savez("many.npz", test_images=np.ones((12, 8, 8), np.uint8), test_labels=np.arange(12), classes=names)
    assert main(["eval", checkpoint, "--data", "many.npz"]) == 1
    assert "many.npz and the model share no class" in capsys.readouterr().err
    np.savez("large.npz", test_images=np.ones((12, 9, 9), np.uint8), test_labels=np.arange(12) % 10)
    assert main(["eval", checkpoint, "--data", "large.npz"]) == 1
    assert "the model takes images of shape (B, 1, 8, 8)" in capsys.readouterr().err
    np.savez("colour.npz", test_images=np.ones((12, 3, 8, 8), np.uint8), test_labels=np.arange(12) % 10)
    assert main(["eval", checkpoint, "--data", "colour.npz"]) == 1
    assert "colour.npz has images of 3 channels, the model takes 1\n" in capsys.readouterr().err


def test_a_float64_checkpoint_is_measured_and_predicts_in_float64(
    checkpoint: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, meta = read_model(checkpoint)
    model.to(np.float64)
    for p in model.parameters():
        p.data += 1e-12  # lost in float32
    state = model.state_dict()
    save_checkpoint("double.npz", {f"model/{name}": array for name, array in state.items()}, meta)
    loaded = read_model("double.npz")[0].state_dict()
    assert all(a.dtype == np.float64 and np.array_equal(a, state[name]) for name, a in loaded.items())
    found = []
    for path in (checkpoint, "double.npz"):
        assert main(["eval", path, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
        assert main(["predict", path, "0.png", "--format", "json"]) == 0
        found.append(json.loads(capsys.readouterr().out)[0]["probability"])
    assert found[:2] == pytest.approx(found[2:], rel=1e-5)


def test_measures_by_hand() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]))
    found = classification_metrics(logits, np.array([0, 1, 2]))
    assert found["right"] == 2
    assert found["confusion"].tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert found["loss"] == pytest.approx(-np.log([0.7, 0.4, 0.6]).mean())
    assert "top5" not in found
    ten = classification_metrics(np.tile(np.arange(10.0), (10, 1)), np.arange(10))
    assert ten["top5"] == 0.5
    assert ten["accuracy"] == 0.1


def test_wilson_interval() -> None:
    # the interval's ends are where the score test is at its limit: |p - p0| = z √(p0 (1 - p0) / n)
    for right, total in [(0, 10), (10, 10), (97, 100), (1750, 1797)]:
        for end in wilson_interval(right, total):
            assert -1e-9 <= end <= 1 + 1e-9
            deviation = 1.959963984540054 * abs(end * (1 - end) / total) ** 0.5
            assert abs(right / total - end) == pytest.approx(deviation, abs=1e-7)


def test_one_is_singular() -> None:
    assert [plural(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_text_tables_align() -> None:
    table = text_table(["a", "number"], [["long", "1"], ["b", "1,000"]], right=[1])
    assert table == "a     number\nlong       1\nb      1,000"


# ---- predict ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(here: Path) -> Path:
    test = data.load("digits", "test")
    for i in range(3):
        Image.fromarray(test.images[i, 0]).save(here / f"{i}.png")
    np.save(here / "three.npy", test.images[:3, 0])
    np.savez(here / "two.npz", images=test.images[:2])
    (here / "bad.png").write_text("no picture")
    return here


def test_predict_agrees_with_the_model(checkpoint: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", checkpoint, "0.png", "1.png", "2.png", "three.npy", "two.npz", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in rows] == ["0.png", "1.png", "2.png", "three.npy[0]", "three.npy[1]", "three.npy[2]",
                                             "two.npz[0]", "two.npz[1]"]  # fmt: skip
    model, meta = read_model(checkpoint)
    loader = data.Loader(data.load("digits", "test").subset(range(3)), 3, Key(0),
                         mean=meta["data"]["mean"], std=meta["data"]["std"], shuffle=False)  # fmt: skip
    expected = mv.ops.softmax(mv.predict_logits(model, next(iter(loader.batches(0)))[0]))
    for i, row in enumerate(rows):
        p = expected[i % 3] if i < 6 else expected[i - 6]
        assert row["class"] == str(p.argmax())
        assert row["probability"] == pytest.approx(p.max(), abs=2e-6)
        assert [other["probability"] for other in row["runners_up"]] == pytest.approx(np.sort(p)[-2:-4:-1], abs=2e-6)


def test_a_bad_image_has_a_row_and_gives_3(checkpoint: str, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", checkpoint, "0.png", "bad.png", "gone.png"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "class", "probability", "runners-up"]
    assert len(lines) == 4
    assert "not an image" in lines[2]
    assert "no such file" in lines[3]
    assert main(["predict", checkpoint, "bad.png", "--format", "json"]) == 3
    assert "not an image" in json.loads(capsys.readouterr().out)[0]["error"]
    assert main(["predict", checkpoint, "0.png", "bad.png", "--format", "csv"]) == 3
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "file,class,probability,class_2,probability_2,class_3,probability_3,error"
    assert rows[2].startswith('bad.png,,,,,,,"not an image')


def test_predict_reads_standard_input(
    checkpoint: str, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((pictures / "0.png").read_bytes())))
    assert main(["predict", checkpoint, "-", "0.png", "--format", "json"]) == 0
    piped, read = json.loads(capsys.readouterr().out)
    assert piped["file"] == "-"
    assert piped["probability"] == read["probability"]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ones((3, 9, 9), np.uint8), "holds uint8 (3, 9, 9); the model takes 1 × 8 × 8 images"),
        (np.ones((3, 8, 8)), "holds float64 (3, 8, 8)"),
        (np.ones((0, 8, 8), np.uint8), "holds no images"),
        (np.ones((0, 1, 8, 8), np.uint8), "holds no images"),
        (np.array(None), "cannot be read"),
    ],
)
def test_arrays_that_do_not_fit(
    array: np.ndarray, said: str, checkpoint: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save("odd.npy", array, allow_pickle=True)
    assert main(["predict", checkpoint, "odd.npy"]) == 3
    assert said in capsys.readouterr().out


def test_arrays_with_channels_last(here: Path) -> None:
    from minivit.runs.classify import read_arrays

    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez("a.npz", x=images)
    assert np.array_equal(read_arrays(Path("a.npz"), (3, 4, 5)), images.transpose(0, 3, 1, 2))
    np.savez("b.npz", x=images, y=images)
    with pytest.raises(DataError, match="no array 'images', but x, y"):
        read_arrays(Path("b.npz"), (3, 4, 5))
    np.save("grey.npy", images[0, :, :, 0])
    assert read_arrays(Path("grey.npy"), (1, 4, 5)).shape == (1, 1, 4, 5)
    np.save("two.npy", images[..., :2])  # no usual number of channels, but the model's
    assert read_arrays(Path("two.npy"), (2, 4, 5)).shape == (2, 2, 4, 5)


# ---- summary ---------------------------------------------------------------------------------------------------------


def test_summary_of_the_base_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "vit_base_patch16_224", "-b", "8"]) == 0
    out = capsys.readouterr().out
    total = next(line for line in out.splitlines() if line.startswith("total")).split()
    assert total[1] == "86,567,656"
    # 11 blocks of (4 + 8) dim² per token and 2 T² dim for the attention; in the last, the projection of all
    # tokens and the rest of the class token only; patches and head; 2 for a multiplication and an addition
    tokens, dim = 197, 768
    whole, last = 12 * tokens * dim**2 + 2 * tokens**2 * dim, 3 * tokens * dim**2 + 9 * dim**2 + 2 * tokens * dim
    flops = 2 * (11 * whole + last + 196 * dim**2 + 1000 * dim)
    assert total[2] == f"{flops:,}"
    assert "training step of 8 images" in out
    assert max(map(len, out.splitlines())) <= 100


def test_summary_counts_the_bytes_that_the_graph_keeps() -> None:
    """Against the graph's own arrays, counted the other way round: what is freed with the output."""
    import gc
    import tracemalloc

    model = mv.ViT(image_size=32, patch_size=4, dim=64, depth=2, heads=4)
    images = np.ones((1, 3, 32, 32), np.float32)
    counted = sum(row.kept for row in layer_costs(model, images).values())
    model(images)  # what is made once is made
    gc.collect()
    tracemalloc.start()
    with mv.first_order():
        out = model(images)
    held = tracemalloc.get_traced_memory()[0]
    del out
    freed = held - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert counted == pytest.approx(freed, rel=0.05)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_summary_of_every_depth_adds_up(depth: int, capsys: pytest.CaptureFixture[str]) -> None:
    from minivit.cli.summary import costs_table
    from minivit.measure.costs import model_costs

    config = {**mv.create_model("vit_digits", drop_path=0.1).config, "depth": depth}
    model = mv.ViT(**config)
    rows = layer_costs(model, np.zeros((1, 1, 8, 8), np.float32))
    assert sum(row.parameters for row in rows.values()) == model.num_parameters() == count_parameters("vit", config)
    total = next(line for line in costs_table(model_costs(model)).splitlines() if line.startswith("total"))
    assert f"{model.num_parameters():,}" in total
    assert f"{sum(row.flops for row in rows.values()):,}" in total
    assert {layer_of(name.rpartition(".")[0]) for name, _ in model.named_parameters()} <= set(rows)


@pytest.mark.parametrize("name", ["vit_digits", "vit_mnist", "vit_cifar", "vit_lite_7_4"])
@pytest.mark.parametrize("settings", [{}, {"pool": "mean", "position": "none"}, {"head": "mlp", "dim_head": 5},
                                      {"image_size": (12, 24), "patch_size": (3, 2), "in_channels": 2}])  # fmt: skip
def test_parameters_are_counted_without_making_the_model(name: str, settings: dict[str, Any]) -> None:
    model = mv.create_model(name, **settings)
    assert count_parameters("vit", {**MODELS[name].settings, **settings}) == model.num_parameters()


def test_summary_of_a_checkpoint_and_the_list(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", checkpoint]) == 0
    assert f"{read_model(checkpoint)[0].num_tokens} × 8" in capsys.readouterr().out
    assert main(["summary", "--list", "vit_[tsb]*_patch16_224"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["86,567,656", "22,050,664", "5,717,416"]


def test_summary_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "vit_digits", "-b", "16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["image"], found["batch_size"]) == ("vit_digits", [1, 8, 8], 16)
    for key in ("parameters", "flops", "kept"):
        assert sum(layer[key] for layer in found["layers"]) == found["total"][key] > 0
    assert found["layers"][-1] | {"flops": 0, "kept": 0} == {
        "layer": "head", "output": [10], "parameters": 650, "flops": 0, "kept": 0,
    }  # fmt: skip
    memory = found["memory"]
    peaks = {name: memory.pop(name) for name in ("peak_cpu", "peak_gpu")}
    assert peaks["peak_cpu"] == sum(memory.values())
    assert memory["parameters"] == 4 * found["total"]["parameters"]
    assert main(["summary", "--list", "vit_tiny_patch16_224", "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)
    assert (model["model"], model["parameters"], model["depth"]) == ("vit_tiny_patch16_224", 5717416, 12)


# ---- gradcheck and doctor --------------------------------------------------------------------------------------------


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    from minivit.ops import samples

    few = [sample for sample in samples.SAMPLES if sample.op in ("mul", "relu")]
    monkeypatch.setattr(samples, "SAMPLES", few)


@pytest.mark.usefixtures("few_samples")
def test_gradcheck_of_operations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["operation", "mul", "relu"]
    assert lines[-1].startswith("2 ops, worst relative error ")
    killed, total = lines[-1].split("killed ")[1].split()[0].split("/")
    assert killed == total
    assert int(total) > 50


@pytest.mark.usefixtures("few_samples")
def test_gradcheck_to_the_third_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", "--order", "3"]) == 0
    head, mul, relu = capsys.readouterr().out.splitlines()[:3]
    assert "order 2  order 3" in head
    assert len([float(cell) for cell in mul.split()[2:5]]) == 3 and len(relu.split()) == 8


@pytest.mark.usefixtures("few_samples")
def test_gradcheck_finds_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mv.ops.mul, "_vjps", (lambda g, out, a, b: g * b, lambda g, out, a, b: g * b))
    assert main(["gradcheck"]) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[1].endswith("FAIL")
    assert "wrong gradient of order 1 for argument 1" in out


@pytest.mark.usefixtures("few_samples")
def test_gradcheck_tells_of_survivors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from minivit.autograd import mutate

    monkeypatch.setattr(mutate, "check_mutants", lambda *_: mutate.Verdict(2, 3, ["mul: gradient 0 zero"]))
    assert main(["gradcheck"]) == 1
    assert "this wrong gradient was not found: mul: gradient 0 zero" in capsys.readouterr().out


def test_gradcheck_of_a_model(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", checkpoint, "--order", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [name for name, _ in read_model(checkpoint)[0].named_parameters()]
    assert [line.split()[0] for line in lines[3 : 3 + len(names)]] == names
    assert all(line.endswith("complex  ok") for line in lines[3 : 3 + len(names)])
    worst = float(lines[-1].split("worst relative error ")[1].split()[0])
    assert 0 < worst <= 1e-12


def test_gradcheck_of_a_fresh_model_to_the_second_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, sizes = MODELS["vit_digits"]
    monkeypatch.setitem(MODELS, "vit_digits", Configuration(kind, {**sizes, "depth": 1, "dim": 8, "heads": 2}))
    assert main(["gradcheck", "vit_digits"]) == 0
    out = capsys.readouterr().out
    assert "order 2" in out
    assert "cotangent" in out
    gradient_of_first_layer = next(line for line in out.splitlines() if line.startswith("patch_embed.proj.weight"))
    assert float(gradient_of_first_layer.split()[-4]) > 0  # the zero head, perturbed, hides nothing


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.perf_counter()
    assert main(["doctor"]) == 0
    assert time.perf_counter() - started < 60
    out = capsys.readouterr().out
    for said in (
        "numpy",
        "blas",
        " thread",
        " core",
        "memory",
        "gpu",
        "ok    gradient of attention",
        "ok    one training",
    ):
        assert said in out


def test_doctor_in_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise ValueError("nothing works")

    monkeypatch.setattr("minivit.cli.doctor.attention_gradient", broken)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["minivit"] == mv.__version__
    assert found["memory"] > 1e6
    assert {"python", "numpy", "system", "cpu", "blas", "gpu"} <= set(found)
    first, second = found["tests"]
    assert (first["test"], first["ok"], first["said"]) == ("gradient of attention", False, "ValueError: nothing works")
    assert second["ok"] and "loss" in second["said"]


def test_doctor_tells_of_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> str:
        raise ValueError("nothing works")

    monkeypatch.setattr("minivit.cli.doctor.attention_gradient", broken)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  gradient of attention: ValueError: nothing works" in out
    assert "ok    one training" in out
