"""``minivit eval``: which class is which, which images are measured, and what of it is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivit import data
from minivit.cli.main import main
from minivit.errors import CheckpointError, DataError
from minivit.measure.metrics import classification_metrics
from minivit.runs.folder import run_of
from minivit.runs.matching import match_classes, meant_by
from minivit.runs.trained import open_trained
from minivit.show.text import json_text
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from minivit.weights.place import find_checkpoint

COLOURS = {"cat": (230, 20, 20), "dog": (20, 230, 20), "fox": (20, 20, 230)}
TINY = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "model.mlp_dim=16"]


def pictures(labels: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """Return uint8 (N, 3, 8, 8): each in the colour of its class, no two the same."""
    images = np.array([COLOURS[names[label]] for label in labels], np.uint8)[:, :, None, None].repeat(8, 2).repeat(8, 3)
    return images + np.arange(len(labels), dtype=np.uint8)[:, None, None, None] % 20


def archive(path: str, names: tuple[str, ...], calls: dict[str, str] | None = None, count: int = 12) -> str:
    """Write an archive of pictures of these classes; ``calls`` are other names for some, "" for none at all."""
    labels = np.arange(count) % len(names)
    arrays: dict[str, Any] = {"test_images": pictures(labels, names), "test_labels": labels}
    if calls != {"": ""}:
        arrays["classes"] = np.array([(calls or {}).get(name, name) for name in names])
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that held images out, of a model that knows cat, dog and fox without a fault."""
    folder = tmp_path_factory.mktemp("run")
    names, labels = tuple(COLOURS), np.arange(60) % 3
    np.savez(folder / "own.npz", train_images=pictures(labels, names), train_labels=labels,
             test_images=pictures(labels[:12], names), test_labels=labels[:12], classes=np.array(names))  # fmt: skip
    args = ["train", str(folder / "own.npz"), *TINY, "-e", "12", "-b", "8", "--lr", "0.01", "--val-fraction", "0.25"]
    assert main([*args, "-o", str(folder), "-q"]) == 0
    return folder / "own-1"


def evaluated(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *args, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# ---- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "absent"), [(("fox", "cat", "dog"), []), (("dog", "fox"), ["cat"])])
def test_classes_are_matched_by_name(
    names: tuple[str, ...], absent: list[str], run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(capsys, str(run), "--data", archive("other.npz", names))
    assert found["accuracy"] == 1.0
    assert found["absent"] == absent
    assert found["unknown"] == {}
    assert found["classes"] == found["labels"] == ["cat", "dog", "fox"]
    rows = dict(zip(found["labels"], found["confusion"], strict=True))
    assert rows["fox"] == [0, 0, 12 // len(names)]
    assert main(["eval", str(run), "--data", "other.npz"]) == 0
    assert ("no image is of 'cat'" in capsys.readouterr().out) == bool(absent)


def test_images_of_unknown_classes_count_as_wrong_and_are_said(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive("other.npz", ("cat", "dog", "fox"), {"fox": "Fox"})
    found = evaluated(capsys, str(run), "--data", path)
    assert found["unknown"] == {"Fox": 4}
    assert found["absent"] == ["fox"]
    assert (found["accuracy"], found["count"], found["right"]) == (pytest.approx(8 / 12), 12, 8)
    assert (found["matched"]["accuracy"], found["matched"]["count"]) == (1.0, 8)
    assert found["labels"] == ["cat", "dog", "fox", "Fox"]
    assert found["confusion"][3] == [0, 0, 4]
    alone = evaluated(capsys, str(run), "--data", archive("two.npz", ("cat", "dog"), count=8))
    assert found["loss"] == pytest.approx(alone["loss"], rel=0.5)  # that of the known ones
    assert main(["eval", str(run), "--data", path]) == 0
    out = capsys.readouterr().out
    assert "unknown   4 images of classes that the model does not know: 'Fox'; 'Fox': did you mean 'fox'?" in out
    assert "count as wrong, not in the loss; of the 8 other images 100.00% (95% interval" in out
    assert next(line for line in out.splitlines() if line.startswith("Fox (unknown)")).split()[2:4] == ["4", "0.0%"]
    assert "Fox as fox (4 times)" in out


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ({"cat": "Cat", "dog": "dog ", "fox": "FOX"}, "rename 'Cat' for 'cat', 'dog ' for 'dog', 'FOX' for 'fox'; or,"),
        ({"cat": "Katze", "dog": "Hund", "fox": "Fuchs"}, "--by-position"),
        ({"": ""}, "share no class: the data have '0', '1', '2'; the model knows 'cat', 'dog', 'fox'"),
    ],
)
def test_data_that_share_no_name_are_refused_unless_matched_by_position(
    calls: dict[str, str], said: str, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = archive("other.npz", tuple(COLOURS), calls)
    assert main(["eval", str(run), "--data", path]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "if the n-th class of the data is the model's n-th: --by-position" in err
    assert evaluated(capsys, str(run), "--data", path, "--by-position")["accuracy"] == 1.0
    assert main(["eval", str(run), "--data", path, "--by-position"]) == 0
    assert "remark    classes matched by position, as asked" in capsys.readouterr().out


def test_by_position_takes_no_more_classes_than_there_are(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez("many.npz", test_images=np.ones((5, 3, 8, 8), np.uint8), test_labels=np.arange(5))
    assert main(["eval", str(run), "--data", "many.npz", "--by-position"]) == 1
    assert "many.npz has 5 classes, the model knows 3" in capsys.readouterr().err


def test_a_name_that_occurs_twice_is_refused(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = archive("other.npz", tuple(COLOURS), {"fox": "cat"})
    assert main(["eval", str(run), "--data", path]) == 1
    assert "other.npz has more than one class called 'cat'" in capsys.readouterr().err
    with pytest.raises(DataError, match="the model has more than one class called 'a'"):
        match_classes(["a", "a"], ["a"], 2, "x", by_position=False)


def test_images_of_unknown_classes_only_are_refused(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = np.array(["cat", "wolf"])
    np.savez("other.npz", test_images=np.ones((2, 3, 8, 8), np.uint8), test_labels=np.array([1, 1]), classes=names)
    assert main(["eval", str(run), "--data", "other.npz"]) == 1
    assert "knows the class of none of the images of other.npz" in capsys.readouterr().err


def test_a_checkpoint_without_names_is_matched_by_position_and_says_so(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(find_checkpoint(str(run)))
    del saved.meta["data"]["classes"]
    save_checkpoint("plain.npz", saved.arrays, saved.meta)
    found = evaluated(capsys, "plain.npz", "--data", archive("three.npz", tuple(COLOURS)))
    assert found["accuracy"] == 1.0
    assert found["classes"] == list(COLOURS)
    assert found["remark"] == "classes matched by position: the checkpoint has no names for them"
    path = archive("two.npz", ("cat", "dog"))
    assert main(["eval", "plain.npz", "--data", path]) == 1
    assert "two.npz has 2 classes, the model 3, and the checkpoint has no names for them" in capsys.readouterr().err
    assert evaluated(capsys, "plain.npz", "--data", path, "--by-position")["accuracy"] == 1.0


def test_a_checkpoint_without_mean_and_std_is_refused(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = load_checkpoint(find_checkpoint(str(run)))
    del saved.meta["data"]["mean"]
    save_checkpoint("plain.npz", saved.arrays, saved.meta)
    Image.new("RGB", (8, 8)).save("a.png")
    for args in (["eval", "plain.npz"], ["predict", "plain.npz", "a.png"]):
        assert main(args) == 1
        assert "plain.npz holds no mean of the images that the model was trained on" in capsys.readouterr().err


def test_all_of_an_archive(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels, names = np.arange(6) % 3, tuple(COLOURS)
    images = pictures(labels, names)
    np.savez("bare.npz", images=images, labels=labels, test_images=images, test_labels=labels, classes=np.array(names))
    assert evaluated(capsys, str(run), "--data", "bare.npz", "--split", "all")["count"] == 12
    np.savez("one.npz", images=images, labels=labels, classes=np.array(names))
    assert evaluated(capsys, str(run), "--data", "one.npz", "--split", "all")["count"] == 6
    assert evaluated(capsys, str(run), "--data", archive("two.npz", names), "--split", "all")["count"] == 12


def test_near_names() -> None:
    known = ["cat", "German shepherd", "1"]
    found = [meant_by(name, known) for name in ("CAT", "german_shepherd", "German shepard", "wolf", "11", " 1 ", "+")]
    assert found == ["cat", "German shepherd", "German shepherd", None, None, "1", None]


def test_unknown_labels_in_the_measures() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.2, 0.2, 0.6]]))
    found = classification_metrics(logits, np.array([0, 3, 4]), unknown=2)
    assert (found["right"], found["count"]) == (1, 3)
    assert found["confusion"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert found["loss"] == pytest.approx(-np.log(0.7))
    assert classification_metrics(np.eye(10), np.array([*range(9), 10]), unknown=1)["top5"] == 0.9


# ---- which checkpoint, which images ----------------------------------------------------------------------------------


def test_a_run_folder_stands_for_its_best_checkpoint_or_its_last(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_checkpoint(str(run)) == str(run / "checkpoints" / "best.npz")
    assert run_of(find_checkpoint(str(run))) == run.resolve()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "best.npz").unlink()
    assert find_checkpoint(str(copy)) == str(copy / "checkpoints" / "last.npz")
    for command in (["eval"], ["summary"], ["gradcheck", "--order", "1"], ["bench", "--steps", "1", "-b", "2"]):
        assert main([command[0], str(copy), *command[1:]]) == 0
        assert str(copy / "checkpoints" / "last.npz") in capsys.readouterr().out
    (copy / "checkpoints" / "last.npz").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        find_checkpoint(str(copy))
    with pytest.raises(CheckpointError, match="no run folder"):
        find_checkpoint(str(tmp_path))
    assert run_of(str(tmp_path / "checkpoints" / "last.npz")) is None


def test_gradcheck_of_a_run_folder_proves_its_own_weights(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = []
    for path in (str(run), str(run / "checkpoints" / "best.npz")):
        assert main(["gradcheck", path, "--order", "1"]) == 0
        whole.append(capsys.readouterr().out.splitlines()[2:-2])
    assert whole[0] == whole[1]


def test_the_splits_of_the_run(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {
        split: evaluated(capsys, str(run), "--split", split)["count"] for split in ("train", "val", "test", "all")
    }
    assert counts == {"train": 45, "val": 15, "test": 12, "all": 72}
    best = load_checkpoint(find_checkpoint(str(run))).meta["train"]["best"]
    found = evaluated(capsys, str(run), "--split", "val")
    assert found["accuracy"] == best["valid_accuracy"]
    assert found["loss"] == pytest.approx(best["valid_loss"], rel=1e-5)
    shutil.copy(find_checkpoint(str(run)), "alone.npz")
    assert evaluated(capsys, "alone.npz", "--split", "train")["count"] == 60  # nothing tells which were held out
    assert main(["eval", "alone.npz", "--split", "val"]) == 1
    assert "alone.npz is in no run's folder\n  → " in capsys.readouterr().err
    assert main(["eval", str(run), "--split", "val", "--data", archive("other.npz", tuple(COLOURS))]) == 1
    assert "other.npz has no such split of its own" in capsys.readouterr().err


def test_held_out_images_of_changed_data_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.parent / "own.npz"
    before = path.read_bytes()
    with np.load(path) as held:
        arrays = dict(held)
    arrays["train_labels"] = arrays["train_labels"][::-1]
    try:
        np.savez(path, **arrays)
        assert main(["eval", str(run), "--split", "val"]) == 1
    finally:
        path.write_bytes(before)
    assert "own.npz is not as it was when" in capsys.readouterr().err


def test_a_run_that_held_nothing_out(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["train", "--config", str(run / "config.toml"), "--val-fraction", "0", "-e", "1", "-q", "--name", "whole"]
    assert main(args) == 0
    assert main(["eval", "runs/whole", "--split", "val"]) == 1
    assert "held no images out to validate with" in capsys.readouterr().err
    assert evaluated(capsys, "runs/whole", "--split", "train")["count"] == 60


def test_a_name_left_empty_is_not_the_runs_own_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--data", ""]) == 1
    assert "the data set has no name" in capsys.readouterr().err


def test_data_without_test_images_name_a_split_that_there_is(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = pictures(np.arange(12) % 3, tuple(COLOURS))
    arrays = {"train_images": images, "train_labels": np.arange(12) % 3, "classes": np.array([*COLOURS])}
    for more, split in (({}, "all"), ({"val_images": images, "val_labels": np.arange(12) % 3}, "val")):
        np.savez("some.npz", **arrays, **more)
        assert main(["eval", str(run), "--data", "some.npz"]) == 1
        said = capsys.readouterr().err
        assert "some.npz has no test images of its own" in said and f"--split {split}" in said
        assert main(["eval", str(run), "--data", "some.npz", "--split", split]) == 0


def test_all_images_of_a_folder(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("fox", "dog")
    for i, image in enumerate(pictures(np.arange(20) % 2, names)):
        (here / "mine" / names[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(here / "mine" / names[i % 2] / f"{i}.png")
    found = evaluated(capsys, str(run), "--data", "mine", "--split", "all")
    assert (found["count"], found["accuracy"], found["absent"]) == (20, 1.0, ["cat"])
    tested = evaluated(capsys, str(run), "--data", "mine")
    assert tested["count"] == len(data.load("mine", "test", (8, 8)))
    assert main(["eval", str(run), "--data", "mine"]) == 0
    assert "splits: test: 20% of each class" in capsys.readouterr().out


def test_the_worst_mistakes_of_a_folder_name_the_wrong_label(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("cat", "dog", "fox")
    for i, image in enumerate(pictures(np.arange(30) % 3, names)):
        name = "dog" if i == 3 else names[i % 3]  # a cat in the wrong folder
        (here / "mine" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(here / "mine" / name / f"{i}.png")
    (worst,) = evaluated(capsys, str(run), "--data", "mine", "--split", "all")["worst"]
    assert (worst["file"], worst["label"], worst["class"]) == ("dog/3.png", "dog", "cat")
    assert 1 / 3 < worst["probability"] <= 1
    assert main(["eval", str(run), "--data", "mine", "--split", "all"]) == 0
    assert "\ndog/3.png       dog    cat  " in capsys.readouterr().out
    assert evaluated(capsys, str(run))["worst"] == []  # an archive has no files to name


def test_a_split_that_is_not_there_is_said_with_those_that_are(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(30) % 3
    np.savez("bare.npz", images=pictures(labels, tuple(COLOURS)), labels=labels, classes=np.array([*COLOURS]))
    assert main(["train", "bare.npz", *TINY, "-e", "1", "-b", "8", "--val-fraction", "0.2"]) == 0
    out = capsys.readouterr().out
    assert "next        minivit eval runs/bare-1 --split val\n" in out
    assert main(["eval", "runs/bare-1"]) == 1
    assert "has no test images of its own\n  → measure it on others: --split val, " in capsys.readouterr().err
    assert main(["eval", str(run), "--data", "bare.npz"]) == 1
    assert "→ measure it on others: --split all\n" in capsys.readouterr().err


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(run: Path, here: Path) -> str:
    saved = load_checkpoint(find_checkpoint(str(run)))
    saved.arrays["model/blocks.0.mlp.fc1.weight"][0, 0] = np.nan
    save_checkpoint("nan.npz", saved.arrays, saved.meta)
    return "nan.npz"


def test_weights_that_are_not_finite_end_in_an_error(spoiled: str, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("a.png")
    for args in (["eval", spoiled], ["predict", spoiled, "a.png", "--json"]):
        assert main(args) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "nan.npz: the parameter blocks.0.mlp.fc1.weight holds NaN or infinity\n  → " in err


def test_logits_that_are_not_finite_end_in_an_error(run: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = load_checkpoint(find_checkpoint(str(run)))
    saved.arrays["model/head.weight"][:] = 3e38  # finite, but its products are not
    save_checkpoint("large.npz", saved.arrays, saved.meta)
    Image.new("RGB", (8, 8)).save("a.png")
    with np.errstate(all="ignore"):
        assert main(["eval", "large.npz"]) == 1
        assert "gives NaN or infinity, first in the output of head\n  → " in capsys.readouterr().err
        assert main(["predict", "large.npz", "a.png", "--json"]) == 3
    (row,) = json.loads(capsys.readouterr().out)
    assert row == {
        "file": "a.png",
        "error": "the model gives NaN or infinity → train it again with a lower learning rate",
    }


def test_json_has_no_nan() -> None:
    value = {"a": [1.0, float("nan")], 2: (np.float32("inf"), np.arange(2)), "c": {"d": -float("inf"), "e": "ü"}}
    assert json.loads(json_text(value)) == {"a": [1.0, None], "2": [None, [0, 1]], "c": {"d": None, "e": "ü"}}


def test_what_a_checkpoint_says_of_its_data(run: Path) -> None:
    trained = open_trained(str(run))
    assert trained.classes == ("cat", "dog", "fox")
    assert len(trained.mean) == len(trained.std) == 3
