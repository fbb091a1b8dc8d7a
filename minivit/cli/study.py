"""``minivit study``: what a trained model does, in pictures, beside an untrained one: a folder with one page."""

from __future__ import annotations

import argparse

from minivit.cli.bars import reading_bar
from minivit.cli.main import add_like, number, one_of
from minivit.show.captions import CAPTIONS

MOST_IMAGES = 1_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    width = max(map(len, CAPTIONS))
    figures = "\n".join(f"  {name:{width}}  {caption.title}" for name, caption in CAPTIONS.items())
    parser.epilog = f"figures:\n{figures}"
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument(
        "data", metavar="DATA", nargs="?",
        help="data set: a name, folder, FILE.npz or FILE.tar (by default the one it was trained on)",
    )  # fmt: skip
    parser.add_argument(
        "--split", type=one_of("split", ("train", "val", "test", "all")), default="test",
        help="test (default); train, without the images that the run held out; val, those; or all there are",
    )  # fmt: skip
    parser.add_argument(
        "--images", "-n", type=number(int, 1, MOST_IMAGES), default=128, metavar="N",
        help="so many images, evenly spaced over the split (128); at most 128 of them are drawn",
    )  # fmt: skip
    parser.add_argument("--only", type=figure_names, default=(), metavar="NAME[,NAME]", help="only these figures")
    parser.add_argument(
        "--output", "-o", metavar="FOLDER", help="a new folder (by default RUN/study-1, or CKPT-study-1)"
    )
    parser.add_argument(
        "--by-position", action="store_true", help="the n-th class of the data is the model's n-th, whatever its name"
    )
    add_like(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--json", action="store_true", help="print the numbers of the figures as JSON")


def figure_names(words: str) -> tuple[str, ...]:
    """Return the names of figures, which stand between commas."""
    check = one_of("figure", [*CAPTIONS])
    return tuple(check(word.strip()) for word in words.split(","))


def run(args: argparse.Namespace) -> int:
    """Print what can be read off the figures, and where they are."""
    from minivit.backend import auto_device, keep_freed_memory
    from minivit.errors import printable
    from minivit.runs.studies import make_study
    from minivit.runs.trained import open_trained
    from minivit.show.text import json_text, plural

    keep_freed_memory()
    trained = open_trained(args.checkpoint, args.like)
    trained.model.to(auto_device(args.device)[0])
    found = make_study(
        trained, args.data, args.split, args.by_position, args.only, args.images, args.output, reading_bar
    )
    if args.json:
        print(json_text(found))
        return 0
    width = max(map(len, CAPTIONS)) + 2
    print(printable(f"{trained.path} on {found['data']}, {found['split']}: {plural(found['images'], 'image')}"))
    if trained.from_elsewhere:
        print(f"prepared: {trained.preparation.text(*trained.image_shape[1:])}")
    print()
    for name, said in found["said"].items():
        print(printable(f"{name:{width}}{said}"))
    print("\n" + printable(f"{'page':{width}}{found['page']}"))
    return 0
