"""``minivit compare``: what differs between runs, and what of it is more than chance."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from minivit.cli.main import main
from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.measure.metrics import wilson_interval
from minivit.runs.difference import difference, differing, other_data
from minivit.runs.read import read_run
from minivit.weights.checkpoint import save_checkpoint


def make_run(folder, right=None, count=1000, valid=(), data="digits", **settings):
    """Make a run folder with ``right`` of ``count`` test images read correctly and these validation accuracies."""
    folder.mkdir()
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    (folder / "config.toml").write_text("\n".join([f'[data]\nname = "{data}"', "[train]", *lines]))
    rows = [
        {"epoch": e, "step": 10 * e, "lr": 0.1, "loss": 2.0 / e, "images_per_second": 100.0 * e, "seconds": 2.0}
        | ({"valid_loss": 1.0, "valid_accuracy": valid[e - 1]} if valid else {})
        for e in range(1, 4)
    ]
    with open(folder / "results.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [{"step": 1, "epoch": 1, "batch_loss": 2.0}]
    for share in () if right is None else (0, right):  # measured twice: the last one counts
        found = {"loss": 0.5, "accuracy": share / count, "interval": wilson_interval(share, count), "count": count}
        lines.append({"step": 30, "epoch": 3} | {f"test_{key}": value for key, value in found.items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_checkpoint(folder / "checkpoints" / "last.npz", {"model/w": np.zeros((3, 5)), "optimizer/m": np.ones(9)}, {})
    return folder


def test_what_a_run_folder_says(tmp_path):
    run = read_run(make_run(tmp_path / "a", right=900, valid=(0.5, 0.7, 0.6), lr=0.1))
    expected = {"epochs": 3, "seconds": 6.0, "images_per_second": 200.0, "parameters": 15, "best_epoch": 2}
    expected |= {"best_accuracy": 0.7, "valid_accuracy": 0.6, "test_accuracy": 0.9, "test_count": 1000}
    assert {key: run[key] for key in expected} == expected
    assert run["settings"] == {
        "data.name": "digits",
        "train.lr": 0.1,
        "train.dtype": "float32",
    }  # as ever before it was set
    assert run["loss"] == pytest.approx(2 / 3)


def test_a_run_that_was_ended_early_has_what_it_has(tmp_path):
    folder = make_run(tmp_path / "a", right=900)
    for name in ("results.csv", "metrics.jsonl", "checkpoints/last.npz"):
        (folder / name).unlink()
    run = read_run(folder)
    assert run["epochs"] == 0
    assert all(run[key] is None for key in ("parameters", "images_per_second", "loss", "best_epoch", "test_accuracy"))
    assert main(["compare", str(folder), str(folder)]) == 0


def test_a_line_cut_short_is_passed_over(tmp_path):
    folder = make_run(tmp_path / "a", right=900)
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 30, "test_accuracy": 0.1')
    assert read_run(folder)["test_accuracy"] == 0.9


def test_settings_that_differ():
    a, b = {"x": 1, "y": 2, "gone": 3}, {"x": 1, "y": 2.5, "new": None}
    assert differing([a, b]) == ["y", "gone", "new"]
    assert differing([a, dict(a)]) == []
    assert differing([a, a, a | {"x": 9}]) == ["x"]


def test_the_interval_is_newcombes(tmp_path):
    """The example of Newcombe 1998, table II: 56 of 70 against 48 of 80, method 10: 0.0524 to 0.3339."""
    first, other = (
        {"folder": "", "settings": {}, "test_accuracy": right / n, "test_interval": wilson_interval(right, n)}
        for right, n in ((48, 80), (56, 70))
    )
    found = difference(first, other)
    assert found["difference"] == pytest.approx(0.2)
    assert found["interval"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert found["beyond_chance"]
    turned = difference(other, first)
    assert turned["interval"] == pytest.approx([-0.3339, -0.0524], abs=5e-5)
    assert turned["beyond_chance"]


@pytest.mark.parametrize(("right", "beyond"), [(900, False), (910, False), (940, True), (850, True)])
def test_only_a_difference_that_is_large_enough_is_beyond_chance(tmp_path, right, beyond, capsys):
    folders = [make_run(tmp_path / "a", right=900), make_run(tmp_path / "b", right=right)]
    assert difference(*map(read_run, folders))["beyond_chance"] == beyond
    assert main(["compare", *map(str, folders)]) == 0
    assert ("beyond chance" if beyond else "can be chance") in capsys.readouterr().out


def test_the_table_has_a_column_for_each_run(tmp_path, capsys):
    folders = [
        make_run(tmp_path / "one", right=900, lr=0.1, epochs=3),
        make_run(tmp_path / "two", right=800, lr=0.2, epochs=3),
        make_run(tmp_path / "three", valid=(0.1, 0.8, 0.3), lr=0.1, epochs=3),
    ]
    assert main(["compare", *map(str, folders)]) == 0
    out = capsys.readouterr().out
    rows = {line.split("  ")[1].strip(): line.split() for line in out.splitlines() if line.startswith("  ")}
    assert out.split()[:3] == ["one", "two", "three"]
    assert rows["train.lr"] == ["train.lr", "0.1", "0.2", "0.1"]
    assert "train.epochs" not in rows
    assert rows["test accuracy"][-3:] == ["90.00%", "80.00%", "–"]
    assert rows["validation accuracy, best"][-3:] == ["–", "–", "80.00%"]
    assert "two: 10.00 points below one's" in out
    assert "no test accuracy in three" in out


def test_runs_on_other_data_are_not_compared(tmp_path, capsys):
    folders = [make_run(tmp_path / "a", right=900), make_run(tmp_path / "b", right=100, data="mnist")]
    assert difference(*map(read_run, folders))["beyond_chance"] is None
    assert main(["compare", *map(str, folders)]) == 0
    assert "other data" in capsys.readouterr().out


def recording(folder, right, count=1000, data="digits", settings=(), test=None, **recorded):
    """Make a run whose checkpoint records this of its data, and ``test`` as the hash of its test images."""
    make_run(folder, right=right, count=count, data=data, **dict(settings))
    digests = {} if test is None else {"test images": test, "training images": "0"}
    meta = {"data": recorded, "run": {"data": digests}}
    save_checkpoint(folder / "checkpoints" / "last.npz", {"model/w": np.zeros((3, 5))}, meta)
    return folder


@pytest.mark.parametrize(
    ("one", "two", "why"),
    [
        ({"classes": ["a", "b"]}, {"classes": ["a", "c"]}, "their classes are not the same"),
        ({"classes": ["a", "b"]}, {"classes": ["b", "a"]}, ""),
        ({"labels": "1"}, {"labels": "2"}, "the labels of their data are not the same"),
        ({"labels": "1"}, {"labels": "2", "settings": {"seed": 1}}, ""),  # other images held out of the same data
        ({"count": 1000}, {"count": 900}, "they were tested on 1,000 and 900 images"),
        ({"test": "1"}, {"test": "2"}, "their test images are not the same"),
        ({"test": "1"}, {"test": "1", "data": "elsewhere/digits"}, ""),
        ({"test": "1"}, {"data": "mnist"}, "they were tested on other data"),
    ],
)
def test_only_runs_with_the_same_test_images_are_compared(tmp_path, one, two, why, capsys):
    folders = [recording(tmp_path / name, 800, **recorded) for name, recorded in (("a", one), ("b", two))]
    found = difference(*map(read_run, folders))
    assert found["why"] == why
    assert (found["difference"] is None) == bool(why)
    assert main(["compare", *map(str, folders)]) == 0
    assert (f"b and a: {why}: their accuracies cannot be compared" in capsys.readouterr().out) == bool(why)


def test_other_labels_of_the_first_version_are_no_proof_of_other_data():
    runs = [
        {"settings": {"data.name": "a.npz"} | layout, "data": {"labels": labels}}
        for layout, labels in (({}, "1"), ({"data.layout": 2}, "2"), ({"data.layout": 2}, "3"))
    ]
    assert other_data(runs[0], runs[1]).startswith("version 0.1.0 held out other images")
    assert other_data(runs[1], runs[2]) == "the labels of their data are not the same"


@pytest.mark.parametrize("meta", [{"data": 5}, {"data": {"classes": 3}}, {"run": []}, {"run": {"data": 1}}])
def test_records_that_make_no_sense_are_refused(tmp_path, meta):
    folder = make_run(tmp_path / "a", right=900)
    save_checkpoint(folder / "checkpoints" / "last.npz", {"model/w": np.zeros((3, 5))}, meta)
    with pytest.raises(CheckpointError, match=r"last\.npz: what it records of its data cannot be read"):
        read_run(folder)


def test_a_loss_that_is_nan_is_null_in_json(tmp_path, capsys):
    folder = make_run(tmp_path / "a", right=900)
    table = folder / "results.csv"
    table.write_text(table.read_text().replace("0.6666666666666666", "nan"))
    assert main(["compare", "--json", str(folder), str(folder)]) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out)["runs"][0]["loss"] is None


def test_json(tmp_path, capsys):
    folders = [make_run(tmp_path / "a", right=900, lr=0.1), make_run(tmp_path / "b", right=800, lr=0.2)]
    assert main(["compare", "--json", *map(str, folders)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [run["test_accuracy"] for run in found["runs"]] == [0.9, 0.8]
    assert found["differ"] == ["train.lr"]
    assert found["differences"][0]["beyond_chance"] is True


def test_what_is_no_run_is_refused(tmp_path, capsys):
    folder = make_run(tmp_path / "a", right=900)
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no run folder"):
        read_run(tmp_path / "nothing")
    assert main(["compare", str(folder), str(tmp_path)]) == 1
    assert main(["compare", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("text", ["epoch,seconds\nx,y\n", "epoch\n1\n", "epoch,seconds\n1,2,3\n"])
def test_a_damaged_table_is_refused(tmp_path, text):
    folder = make_run(tmp_path / "a")
    (folder / "results.csv").write_text(text)
    with pytest.raises(DataError, match=r"results\.csv"):
        read_run(folder)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "checkpoints" / "last.npz").write_bytes(b"PK")
    with pytest.raises(CheckpointError):
        read_run(folder)
