"""``minivit graph``: the tape of a training step as a picture that unfolds, and for Graphviz."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from minivit.cli.bars import reading_bar

if TYPE_CHECKING:
    from minivit.models import Model
    from minivit.runs.one_batch import Batch
    from minivit.show.operations import Operation

FORMS = (".svg", ".dot", ".html")
MOST_IMAGES, MOST_KEPT = 64, 1e9  # of a checkpoint's batch: so many, and fewer if they would keep more bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "A named model is drawn for one image, without numbers. A checkpoint takes a step on a batch of the\n"
        "images that it was trained on, or, where they are not there, on noise; nothing is updated.\n"
        "In a browser a click, or Enter, unfolds a part."
    )
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", nargs="?", default="vit_digits",
                        help="named model (default vit_digits), checkpoint, or a run's folder")  # fmt: skip
    parser.add_argument(
        "--output", "-o", metavar="FILE",
        help="file.svg, file.html or file.dot, written over if it is there; or a folder. Without it, graph.svg and "
        "graph.dot here, if there are none",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the tape as JSON")


def run(args: argparse.Namespace) -> int:
    """Read the tape; write the pictures, and say what is in them."""
    from minivit.errors import printable
    from minivit.files import write_text
    from minivit.measure.costs import find_settings
    from minivit.measure.tape import read_tape
    from minivit.models import MODELS, model_outline
    from minivit.runs.one_batch import image_outline, model_and_batch
    from minivit.runs.trained import find_model
    from minivit.show.diagram import write_tape
    from minivit.show.dot import tape_dot
    from minivit.show.text import json_text

    files = outputs(args.output)
    name = find_model(args.model)
    settings = find_settings(name)  # raises for a model whose one image does not fit into memory
    trained = name not in MODELS
    if trained:
        model, batch = model_and_batch(name, most_images, reading_bar)
    else:
        model = model_outline(settings.kind, settings.config)
        batch = image_outline(model)
    tape = read_tape(model, batch.images, batch.labels, gradients=trained)
    title = f"{title_of(name) if trained else name}: the tape of a training step"
    about = lines_about(tape, batch, model)
    for file in files:
        if file.suffix.lower() == ".dot":
            write_text(file, tape_dot(tape, title, about))
        else:
            write_tape(file, tape, title, about)
    if args.json:
        about_it = {"model": name, "images": batch.about, "why": batch.why, "files": [*map(str, files)]}
        print(json_text(about_it | {"tape": [*map(asdict, tape)]}))
        return 0
    print("\n".join(map(printable, [title, *about])))
    print("\n".join(printable(f"written  {file}") for file in files))
    return 0


def outputs(given: str | None) -> list[Path]:
    """Return the files to write; raise ConfigError for one of another kind, or that is there and was not named."""
    from minivit.errors import ConfigError

    path = Path(given or "")
    if given is None or path.is_dir():
        files = [path / "graph.svg", path / "graph.dot"]
        if there := next((file for file in files if os.path.lexists(file)), None):
            raise ConfigError(f"{there} is there already", f"to write over it, name it: -o {shlex.quote(str(there))}")
        return files
    if path.suffix.lower() not in FORMS:
        raise ConfigError(f"a tape is not drawn as {path.name!r}", f"end the name in {', '.join(FORMS)}")
    return [path]


def title_of(checkpoint: str) -> str:
    """Return what a checkpoint is called: as its run, or as its file."""
    from minivit.runs.folder import run_of

    run = run_of(checkpoint)
    return Path(checkpoint).name if run is None else run.name


def most_images(model: Model) -> int:
    """Return of how many images a batch is at the most: as many as keep no more than :data:`MOST_KEPT` bytes."""
    from minivit.measure.costs import model_costs

    return max(1, min(MOST_IMAGES, int(MOST_KEPT // max(model_costs(model).total.kept, 1))))


def lines_about(tape: Sequence[Operation], batch: Batch, model: Model) -> list[str]:
    """Return what stands under the title: of what step it is the tape, and its sums."""
    from minivit.show.operations import shape_text
    from minivit.show.text import bytes_text, plural

    kept, count = sum(one.kept for one in tape), len(batch.images)
    each = f", {bytes_text(kept / count)} an image" if count > 1 else ""
    sums = f"{plural(len(tape), 'operation')}, {plural(model.num_parameters(), 'parameter')}"
    return [
        f"{sums[0].upper()}{sums[1:]}; kept for backward: {bytes_text(kept)}{each}.",
        f"In comes {batch.about}: {shape_text(batch.images.shape)} {batch.images.dtype}.",
        *([f"Images that it was trained on are not to be had: {batch.why}."] if batch.why else []),
    ]
