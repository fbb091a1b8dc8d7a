"""``minivit compare``: runs side by side: what was set otherwise, what came of it, and whether that can be chance."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = "The test accuracies are compared with that of the first run."
    parser.add_argument("first", metavar="RUN", help="run folder, such as runs/digits-1")
    parser.add_argument("others", metavar="RUN", nargs="+", help="run folders to compare with it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the comparison."""
    from minivit.show.text import json_text

    runs = [read_run(Path(folder)) for folder in (args.first, *args.others)]
    keys = differing([run["settings"] for run in runs])
    if args.json:
        differences = [difference(runs[0], other) for other in runs[1:]]
        print(json_text({"runs": runs, "differ": keys, "differences": differences}))
    else:
        print(report(runs, keys))
    return 0


# ---- a run folder ----------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run folder says: ``settings`` by dotted key, and the results that there are, else None.

    These are epochs, seconds, images_per_second, parameters; loss and valid_accuracy of the last epoch, best_accuracy
    of validation with its best_epoch; test_accuracy with its 95% test_interval, test_loss and test_count; and in
    ``data``, as far as the checkpoint records them, the classes' names and what labels and test images hash to.
    """
    from minivit.errors import ConfigError
    from minivit.runs.settings import read_toml

    if not (folder / "config.toml").is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.toml", "give runs/NAME, as minivit train made")
    rows = _epochs(folder / "results.csv")
    last = rows[-1] if rows else {}
    tried = [row for row in rows if "valid_accuracy" in row and "valid_loss" in row]
    best = max(tried, key=lambda row: (row["valid_accuracy"], -row["valid_loss"]), default={})
    seconds = sum(row["seconds"] for row in rows)
    images = sum(row["images_per_second"] * row["seconds"] for row in rows)
    test = _test(folder / "metrics.jsonl")
    parameters, data = _recorded(folder / "checkpoints" / "last.npz")
    return {
        "folder": str(folder),
        "settings": read_toml(folder / "config.toml"),
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
    import csv

    from minivit.errors import DataError

    if not path.is_file():
        return []
    try:
        with open(path, encoding="utf-8", newline="") as f:
            rows = [{key: float(text) for key, text in row.items() if text} for row in csv.DictReader(f)]
        _ = [(row["seconds"], row["images_per_second"], row["epoch"]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path} is damaged: {error!r}", "resume the run, which writes it again") from error
    return rows


def _test(path: Path) -> dict[str, Any]:
    """Return the last line of metrics.jsonl that is about the test set."""
    import json
    from contextlib import suppress

    found: dict[str, Any] = {}
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                if '"test_accuracy"' in line:
                    with suppress(ValueError, TypeError):  # cut short where the process was killed
                        found = dict(json.loads(line))
    return found


def _recorded(path: Path) -> tuple[int | None, dict[str, Any]]:
    """Return the number of parameters in a checkpoint, and what it records of the data."""
    from minivit.errors import CheckpointError
    from minivit.weights.checkpoint import load_checkpoint

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


# ---- comparing -------------------------------------------------------------------------------------------------------


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that have not the same value in all, in their order; what one does not have, differs."""
    keys = dict.fromkeys(key for s in settings for key in s)
    return [key for key in keys if any(key not in s or s[key] != settings[0].get(key) for s in settings)]


def difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``difference`` of ``other``'s test accuracy to ``first``'s, its 95% interval, and what it means.

    The interval is Newcombe's hybrid of the two runs' Wilson intervals (Newcombe 1998, "Interval estimation for the
    difference between independent proportions", Statistics in Medicine 17, method 10): with shares p in (l, u) it runs
    from p₂ - p₁ - √((p₂ - l₂)² + (u₁ - p₁)²) to p₂ - p₁ + √((u₂ - p₂)² + (p₁ - l₁)²). It takes the test images of the
    two for different ones; where they are the same, as they mostly are, it is wider than need be. ``beyond_chance`` is
    None where there is nothing to compare: a run without a test accuracy, or tested on other data, as ``why`` says.
    """
    from math import hypot

    found: dict[str, Any] = {"first": first["folder"], "other": other["folder"], "why": other_data(first, other)}
    if None in (first["test_interval"], other["test_interval"]) or found["why"]:
        return found | {"difference": None, "interval": None, "beyond_chance": None}
    p, (low, high) = first["test_accuracy"], first["test_interval"]
    q, (other_low, other_high) = other["test_accuracy"], other["test_interval"]
    interval = [q - p - hypot(q - other_low, high - p), q - p + hypot(other_high - q, p - low)]
    return found | {"difference": q - p, "interval": interval, "beyond_chance": interval[0] > 0 or interval[1] < 0}


def other_data(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return why the test images of two runs are not the same ones with the same classes, or "".

    A hash of the test images decides where both checkpoints record one. Else it is the data's name, the number of test
    images and, where both runs part the training images in the same way, the hash of the training labels: two data
    sets that agree in all of these pass for one.
    """
    one, two = first.get("data", {}), other.get("data", {})
    both = one.keys() & two.keys()
    if "classes" in both and sorted(one["classes"]) != sorted(two["classes"]):
        return "their classes are not the same"
    if "test" in both:
        return "" if one["test"] == two["test"] else "their test images are not the same"
    if first["settings"].get("data.name") != other["settings"].get("data.name"):
        return "they were tested on other data"
    if (a := first.get("test_count")) and (b := other.get("test_count")) and a != b:
        return f"they were tested on {a:,} and {b:,} images"
    alike = all(first["settings"].get(key) == other["settings"].get(key) for key in PARTING)
    if alike and "labels" in both and one["labels"] != two["labels"]:
        if first["settings"].get("data.layout", 1) != other["settings"].get("data.layout", 1):
            return "version 0.1.0 held out other images, and did not record which it tested on"
        return "the labels of their data are not the same"
    return ""


PARTING = ("data.val_fraction", "data.overfit", "data.bad_images", "train.seed")
"""Settings that decide which of the training images are held out, and so which labels are hashed."""


# ---- showing ---------------------------------------------------------------------------------------------------------

RESULTS = {
    "epochs": ("epochs", "{:,}"),
    "parameters": ("parameters", "{:,}"),
    "seconds": ("time", "{:,.1f} s"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "loss": ("training loss", "{:.4f}"),
    "valid_accuracy": ("validation accuracy, last", "{:.2%}"),
    "best_accuracy": ("validation accuracy, best", "{:.2%}"),
    "best_epoch": ("… after epoch", "{:,}"),
    "test_loss": ("test loss", "{:.4f}"),
    "test_accuracy": ("test accuracy", "{:.2%}"),
    "test_interval": ("… 95% interval", "{0[0]:.2%} to {0[1]:.2%}"),
    "test_count": ("test images", "{:,}"),
}
"""What a run came to: title and form of each row."""


def report(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Return the comparison as text: a column for each run."""
    from minivit.errors import printable
    from minivit.show.text import text_table

    names = [printable(Path(run["folder"]).resolve().name) for run in runs]
    if len(set(names)) < len(names):
        names = [printable(run["folder"]) for run in runs]
    settings = [[f"  {key}", *(_value(run["settings"].get(key)) for run in runs)] for key in keys]
    results = [
        [f"  {title}", *("–" if run[key] is None else form.format(run[key]) for run in runs)]
        for key, (title, form) in RESULTS.items()
        if any(run[key] is not None for run in runs)
    ]
    blank = [""] * len(runs)
    heads = ["settings that differ" if keys else "settings: all the same", *blank], ["results", *blank]
    table = text_table(["", *names], [heads[0], *settings, ["", *blank], heads[1], *results], range(1, len(runs) + 1))
    verdicts = [verdict(runs[0], other, names[0], name) for other, name in zip(runs[1:], names[1:], strict=True)]
    note = "Chance is that of the test images (Newcombe 1998, method 10); another seed makes a difference, too."
    return "\n".join([table, "", *verdicts, *([note] if any("points" in v for v in verdicts) else [])])


def _value(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def verdict(first: Mapping[str, Any], other: Mapping[str, Any], first_name: str, name: str) -> str:
    """Return whether the test accuracies of two runs differ, as a sentence."""
    found = difference(first, other)
    if found["difference"] is None:
        if found["why"]:
            return f"{name} and {first_name}: {found['why']}: their accuracies cannot be compared"
        untested = [n for run, n in ((first, first_name), (other, name)) if run["test_accuracy"] is None]
        return f"{name} and {first_name}: no test accuracy in {' and '.join(untested)}"
    points, (low, high) = 100 * found["difference"], found["interval"]
    way = "above" if points >= 0 else "below"
    chance = "beyond chance" if found["beyond_chance"] else "this can be chance"
    interval = f"95% interval of the difference {100 * low:+.2f} to {100 * high:+.2f}"
    return f"test accuracy of {name}: {abs(points):.2f} points {way} {first_name}'s ({interval}): {chance}"
