"""``minivit explain``: one page that shows how a model reads one image, and the gradient that flows back."""

from __future__ import annotations

import argparse
import sys
import warnings

from minivit.cli.bars import reading_bar
from minivit.cli.main import OK, add_like, number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "The page is one file that needs no network: the seven steps from the image to its class; every\n"
        "head's attention with its gradient, rollout, relevance and LeGrad; and numbers to check by hand."
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN", nargs="?",
        help="checkpoint, or a run's folder, such as runs/digits-1 (default: the newest run in runs/)",
    )  # fmt: skip
    parser.add_argument(
        "image", metavar="IMAGE", nargs="?",
        help="image file, .npy or .npz of images as bytes, or - for standard input (default: a test image of the run)",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="FILE", default="explain.html",
                        help="the page, written over if it is there (default: explain.html)")  # fmt: skip
    parser.add_argument("--index", type=number(int, 0, 1 << 31), default=0,
                        help="which of the test images, or of an .npz (default: 0)")  # fmt: skip
    parser.add_argument("--invert", action="store_true",
                        help="turn dark into light: for black on white, where it learned white on black")  # fmt: skip
    add_like(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Write the page, and say what it shows."""
    import os
    from dataclasses import replace
    from functools import partial
    from pathlib import Path

    from minivit.backend import auto_device, keep_freed_memory
    from minivit.errors import printable
    from minivit.runs.classify import negative, seems_negative
    from minivit.runs.explaining import image_of_data, image_of_file, newest_run, write_page
    from minivit.runs.trained import open_trained
    from minivit.show.text import bytes_text

    keep_freed_memory()
    given = args.checkpoint if args.checkpoint is not None else newest_run(Path("runs"))
    trained = open_trained(given, args.like)
    tell = partial(print, file=sys.stderr)
    if trained.path != args.checkpoint:
        tell(printable(f"checkpoint  {trained.path}"))
    if trained.from_elsewhere:
        tell(f"prepared    {trained.preparation.text(*trained.image_shape[1:])}")
    if args.image is None:
        chosen = image_of_data(trained, args.index, reading_bar)
    else:
        chosen = image_of_file(trained, args.image, args.index)
    if args.invert:
        chosen = replace(chosen, pixels=negative(chosen.pixels))
    if seems_negative(chosen.pixels, trained):
        remedy = "leave --invert out" if args.invert else "add --invert"
        warnings.warn(
            f"{printable(chosen.name)} looks like a negative of what the model learned from, such as black on white "
            f"instead of white on black; the class is then wrong: {remedy}",
            stacklevel=2,
        )
    trained.model.to(auto_device(args.device)[0])
    title = write_page(trained, chosen, args.output, given)
    print(printable(f"image       {title}"))
    print(printable(f"page        {args.output} ({bytes_text(os.path.getsize(args.output))}): open it in a browser"))
    return OK
