"""``minivit predict``: the class of each image, how sure the model is, and what else it could have been."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from minivit.cli.main import BAD_INPUTS, OK, add_like, one_of

LISTED = 8
"""So many files are named in a warning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+",
        help="image file, folder of them, .npy or .npz of images as bytes, or - for an image on standard input",
    )  # fmt: skip
    parser.add_argument("--invert", action="store_true",
                        help="turn dark into light: for black on white, where it learned white on black")  # fmt: skip
    parser.add_argument("--format", type=one_of("format", ("table", "json", "csv")), default="table",
                        help="table (default), json or csv")  # fmt: skip
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="print JSON: --format json")
    add_like(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Print a row for each image; 3 if some could not be read."""
    from functools import partial

    from minivit.backend import auto_device, keep_freed_memory
    from minivit.errors import printable
    from minivit.runs.classify import answer_all
    from minivit.runs.trained import open_trained

    keep_freed_memory()
    trained = open_trained(args.checkpoint, args.like)
    tell = partial(print, file=sys.stderr)
    if trained.path != args.checkpoint:
        tell(printable(f"checkpoint  {trained.path}"))
    if trained.from_elsewhere:
        tell(f"prepared    {trained.preparation.text(*trained.image_shape[1:])}")
    trained.model.to(auto_device(args.device)[0])
    rows, inverted = answer_all(args.images, trained, args.invert, tell)
    if inverted:
        warnings.warn(_inverted_text(inverted, len(rows), args.invert), stacklevel=2)
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[args.format](rows)
    return BAD_INPUTS if any("error" in row for row in rows) else OK


def _inverted_text(names: Sequence[str], count: int, turned: bool) -> str:
    from minivit.errors import printable
    from minivit.show.text import plural

    some = ", ".join(map(printable, names[:LISTED])) + (
        f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    )
    alike = "looks like a negative" if len(names) == 1 else "look like negatives"
    remedy = "leave --invert out" if turned else "add --invert"
    return (
        f"{len(names):,} of {plural(count, 'image')} {alike} of what the model learned from, such as "
        f"black on white instead of white on black: {some}; the classes are then wrong: {remedy}"
    )


def _print_table(rows: list[dict[str, Any]]) -> None:
    from minivit.show.text import text_table

    cells = []
    for row in rows:
        others = ", ".join(f"{other['class']} {other['probability']:.1%}" for other in row.get("runners_up", []))
        answer = [row.get("class", "–"), f"{row['probability']:.1%}" if "class" in row else "–"]
        cells.append([row["file"], *answer, others or row.get("error", "")])
    print(text_table(["file", "class", "probability", "runners-up"], cells, right=[2]))


def _print_json(rows: list[dict[str, Any]]) -> None:
    from minivit.show.text import json_text

    print(json_text(rows))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    from minivit.errors import printable
    from minivit.runs.classify import RUNNERS_UP

    others = [f"{word}_{n}" for n in range(2, RUNNERS_UP + 2) for word in ("class", "probability")]
    writer = csv.DictWriter(sys.stdout, ["file", "class", "probability", *others, "error"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {key: value for key, value in row.items() if key != "runners_up"}
        for n, other in enumerate(row.get("runners_up", []), start=2):
            flat |= {f"class_{n}": other["class"], f"probability_{n}": other["probability"]}
        writer.writerow({key: printable(str(value)) for key, value in flat.items()})
