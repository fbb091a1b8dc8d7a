"""``minivit data``: what is in a data set, what is damaged or in it twice; a picture of it; or a download."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivit.cli.bars import reading_bar
from minivit.cli.main import BAD_INPUTS, OK, number

if TYPE_CHECKING:
    from minivit.data.audit import Audit, Same

LISTED = 8
"""So many files of a kind are named; all of them are in the JSON."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = "minivit data DATA [--size N] [--output FILE] [--json]\n       minivit data get NAME"
    parser.add_argument(
        "data", metavar="DATA", nargs="+",
        help="data set: a name, a folder, FILE.npz or FILE.tar; or: get NAME, to download one that has a name",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=number(int, 1, 1 << 15), metavar="N", help="height and width to bring image files to (64)"
    )
    parser.add_argument("--output", "-o", metavar="FILE", help="write a picture of a few images of each class")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report, and draw a picture if asked to; 3 if there are files that cannot be read."""
    from minivit.data.audit import audit
    from minivit.errors import ConfigError
    from minivit.show.text import json_text

    if args.data[0] == "get":  # a folder of that name is ./get
        return get(args.data[1:])
    if len(args.data) > 1:
        raise ConfigError(
            f"one data set at a time, not {len(args.data)}", "minivit data DATA, or minivit data get NAME"
        )
    found = audit(args.data[0], (args.size, args.size) if args.size else None, reading_bar)
    picture = draw(found, args.output) if args.output else None
    print(json_text(as_json(found) | {"mosaic": picture}) if args.json else audit_text(found, picture))
    return BAD_INPUTS if found.corrupt else OK


def get(names: list[str]) -> int:
    """Download a data set; print where it is."""
    from minivit.data.catalog import NAMES
    from minivit.data.download import fetch
    from minivit.errors import ConfigError, printable

    if len(names) != 1:
        raise ConfigError("which data set?" if not names else "one data set at a time", f"known: {', '.join(NAMES)}")
    name = names[0]
    print(printable(f"{name} is in {fetch(name, sys.stderr.isatty())}"))
    return OK


def draw(found: Audit, path: str) -> str | None:
    """Draw a few images of each class; return the file's name, or None where no image can be drawn."""
    import numpy as np

    from minivit.show.pictures import mosaic

    if not found.samples:
        return None
    images = np.stack(found.samples)  # (N, C, H, W)
    mosaic(images if images.shape[1] == 1 else images[:, :3], found.sample_labels, path, title=Path(found.name).name)
    return path


def as_json(found: Audit) -> dict[str, Any]:
    """Return all that was found, as what JSON can hold."""
    import dataclasses

    whole = dataclasses.asdict(found)
    for name in ("samples", "sample_labels", "same"):
        del whole[name]
    groups = {"duplicates": found.duplicates, "leaked": found.leaked, "contradictions": found.contradictions}
    return whole | {name: [dataclasses.asdict(same) for same in group] for name, group in groups.items()}


# ---- the report ------------------------------------------------------------------------------------------------------


def audit_text(found: Audit, picture: str | None) -> str:
    """Return the report as text."""
    from minivit.errors import printable

    images = sum(map(sum, found.counts.values()))
    many = f"{len(found.classes)} classes" if len(found.classes) > 1 else "no classes"
    at = f"  (training images at {' × '.join(map(str, found.measured_at))})" if found.formats and found.mean else ""
    facts = {
        "split": found.how,
        "sizes": sizes_text(found.sizes),
        "formats": counts_text(found.formats),
        "modes": counts_text(found.modes),
        "mean": " ".join(f"{value:.3f}" for value in found.mean),
        "std": " ".join(f"{value:.3f}" for value in found.std) + at,
        "picture": picture or "",
        "note": found.note,
    }
    blocks = [printable(f"{found.name}: {images:,} images, {many}"), counts_table(found)]
    blocks.append("\n".join(f"{name:9}{printable(text)}" for name, text in facts.items() if text))
    findings = {
        "files that cannot be read": (len(found.corrupt), found.corrupt),
        "files of several pictures (the first is used)": (len(found.several), found.several),
        "copies within a split": (
            sum(len(s.names) - len(set(s.splits)) for s in found.duplicates),
            same(found.duplicates),
        ),
        "images in more than one split": (len(found.leaked), same(found.leaked)),
        "images in more than one class": (len(found.contradictions), same(found.contradictions)),
    }
    width = max(map(len, findings))
    blocks.append("\n".join(f"{name:{width}}  {count:>5,}" for name, (count, _) in findings.items()))
    blocks += [f"{name}:\n{first_lines(lines)}" for name, (_, lines) in findings.items() if lines]
    if found.corrupt:
        blocks.append(
            "→ repair, convert or remove the files that cannot be read, or train without them: --bad-images skip"
        )
    if found.formats and picture is None:
        blocks.append("To look at a few images of each class: -o FILE.png")
    return "\n\n".join(block for block in blocks if block)


def counts_table(found: Audit) -> str:
    """Return the number of images by class and split; of many classes, the range."""
    from minivit.errors import shortened
    from minivit.show.text import text_table

    if len(found.classes) == 1:
        return ""
    splits = [split for split, counts in found.counts.items() if any(counts)]
    columns = [found.counts[split] for split in splits]
    if len(found.classes) > 20:
        return "\n".join(
            f"{split}: {min(n):,} to {max(n):,} images a class" for split, n in zip(splits, columns, strict=True)
        )
    rows = [[shortened(name, 40), *map("{:,}".format, row)] for name, *row in zip(found.classes, *columns, strict=True)]
    rows.append(["all", *(f"{sum(column):,}" for column in columns)])
    return text_table(["class", *splits], rows, right=range(1, len(splits) + 1))


def sizes_text(sizes: dict[str, tuple[int, int]]) -> str:
    """Return sizes as height × width, one where all are the same."""
    words = {name: f"{height:,} × {width:,}" for name, (height, width) in sizes.items()}
    if len(set(words.values())) < 2:
        return next(iter(words.values()), "")
    return f"{words['smallest']} to {words['largest']}, median {words['median']} (height × width)"


def counts_text(counts: dict[str, int]) -> str:
    """Return "JPEG 12, PNG 3"."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def same(groups: list[Same]) -> list[str]:
    """Return a line for each group of images that are the same, with their classes where these differ."""
    lines = []
    for group in groups:
        differ = len(set(group.classes)) > 1
        pairs = zip(group.names, group.classes, strict=True)
        lines.append(" = ".join(f"{name} ({word})" if differ else name for name, word in pairs))
    return lines


def first_lines(lines: list[str]) -> str:
    """Return the first lines, indented, and how many more there are."""
    from minivit.errors import printable

    rest = [f"… and {len(lines) - LISTED:,} more: see --json"] if len(lines) > LISTED else []
    return "\n".join(f"  {printable(line)}" for line in [*lines[:LISTED], *rest])
