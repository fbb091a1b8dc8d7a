"""What a run's folder says: what was set, and what came of it."""

from __future__ import annotations

import csv
import json
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.files import open_regular
from minivit.runs.changes import FIRST
from minivit.runs.settings import read_toml
from minivit.weights.checkpoint import load_checkpoint


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder says: ``settings`` by dotted key, and the results that there are, else None.

    These are epochs, seconds, images_per_second, parameters; loss and valid_accuracy of the last epoch, best_accuracy
    of validation with its best_epoch; test_accuracy with its 95% test_interval, test_loss and test_count; and in
    ``data``, as far as the checkpoint records them, the classes' names and what labels and test images hash to.
    """
    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.toml", "give runs/NAME, as minivit train made")
    rows = _epochs(folder / "results.csv")
    last = rows[-1] if rows else {}
    tried = [row for row in rows if "valid_accuracy" in row and "valid_loss" in row]
    best = max(tried, key=lambda row: (row["valid_accuracy"], -row["valid_loss"]), default={})
    seconds = sum(row["seconds"] for row in rows)
    images = sum(row["images_per_second"] * row["seconds"] for row in rows)
    test = _test_row(folder / "metrics.jsonl")
    settings = read_toml(folder / "config.toml")
    settings.setdefault("train.dtype", FIRST["train.dtype"])
    parameters, data = _recorded(folder / "checkpoints" / "last.npz")
    return {
        "folder": str(folder),
        "settings": settings,
        "parameters": parameters,
        "data": data,
        "epochs": len(rows),
        "seconds": seconds,
        "images_per_second": images / seconds if seconds else None,
        "loss": last.get("loss"),
        "valid_accuracy": last.get("valid_accuracy"),
        "best_accuracy": best.get("valid_accuracy"),
        "best_epoch": int(best["epoch"]) if best else None,
        **{key: test.get(key) for key in ("test_accuracy", "test_interval", "test_loss", "test_count")},
    }


def _epochs(path: Path) -> list[dict[str, float]]:
    """Return the rows of results.csv; a run that was ended in its first epoch has none."""
    if not path.is_file():
        return []
    try:
        with open_regular(path) as f, TextIOWrapper(f, "utf-8", newline="") as text:
            rows = [{key: float(word) for key, word in row.items() if word} for row in csv.DictReader(text)]
        _ = [(row["seconds"], row["images_per_second"], row["epoch"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {error!r}", "resume the run, which writes it again") from error
    return rows


def _test_row(path: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl that is about the test set."""
    found: dict[str, Any] = {}
    if path.is_file():
        with open_regular(path) as f, TextIOWrapper(f, "utf-8", "replace") as text:
            for line in text:
                if '"test_accuracy"' in line:
                    with suppress(ValueError, TypeError):  # cut short where the process was killed
                        found = dict(json.loads(line))
    return found


def _recorded(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Return the number of parameters in a checkpoint, and what it records of the data."""
    if not path.is_file():
        return None, {}
    checkpoint = load_checkpoint(path)
    kept: dict[str, Any] = {}
    try:
        data, digests = checkpoint.meta.get("data", {}), checkpoint.meta.get("run", {}).get("data", {})
        if "classes" in data:
            kept["classes"] = [*map(str, data["classes"])]
        if "labels" in data:
            kept["labels"] = str(data["labels"])
        if test := {name: str(digest) for name, digest in digests.items() if name.startswith("test ")}:
            kept["test"] = test
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: what it records of its data cannot be read", "use another") from error
    return sum(a.size for a in checkpoint.under("model").values()), kept


def read_test(folder: Path) -> dict[str, Any] | None:
    """Return loss, accuracy, its interval and count of a run's test images; None if it was not tested."""
    row = _test_row(folder / "metrics.jsonl")
    return {key.removeprefix("test_"): x for key, x in row.items() if key.startswith("test_")} or None


def read_test_of(folder: Path, epoch: int | None) -> dict[str, Any] | None:
    """Return :func:`read_test`'s figures if the weights of this epoch are what was tested, not others of the run."""
    tested = _test_row(folder / "metrics.jsonl").get("epoch")
    return read_test(folder) if epoch is not None and tested == epoch else None
