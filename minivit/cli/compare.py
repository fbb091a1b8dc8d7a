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
    from minivit.runs.difference import difference, differing
    from minivit.runs.read import read_run
    from minivit.show.text import json_text

    runs = [read_run(Path(folder)) for folder in (args.first, *args.others)]
    keys = differing([run["settings"] for run in runs])
    if args.json:
        differences = [difference(runs[0], other) for other in runs[1:]]
        print(json_text({"runs": runs, "differ": keys, "differences": differences}))
    else:
        print(comparison(runs, keys))
    return 0


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


def comparison(runs: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
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
    from minivit.runs.difference import difference

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
