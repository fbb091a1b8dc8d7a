"""``minivit train``: a run from its settings to its test accuracy, in a folder of its own."""

from __future__ import annotations

import argparse

from minivit.cli.main import number
from minivit.errors import Stopped, printable
from minivit.runs.options import MODEL_FLAGS, OPTIONS, RECIPE_NAMES

METAVARS = {int: "N", float: "X", str: "NAME"}
TITLES = {"data": "data", "model": "model", "train": "training"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: the settings, and what is about the run as a whole."""
    parser.epilog = "Defaults are in parentheses; a recipe has its own. A run's config.toml says where values are from."
    add_setting_flags(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--resume", metavar="PATH", help="continue a run: its folder, or one of its checkpoints")
    run.add_argument("--output", "-o", metavar="DIR", default="runs", help="folder for run folders (runs)")
    run.add_argument("--name", metavar="NAME", help="name of the run folder (by default the data's, numbered)")
    run.add_argument("--dry-run", action="store_true", help="make everything ready, show it, and train nothing")
    run.add_argument("--quiet", "-q", action="store_true", help="print the result only")


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that make up a run's settings: the data, a flag for each setting that has one, files."""
    parser.add_argument("source", metavar="DATA", nargs="?", help="the same as --data")
    groups = {table: parser.add_argument_group(title) for table, title in TITLES.items()}
    for key, option in OPTIONS.items():
        if option.flags:
            kind, group = type(option.default), groups[key.partition(".")[0]]
            text = f"{option.help} ({option.default})" if option.default else option.help
            convert = str if kind is str else number(kind)
            group.add_argument(*option.flags, dest=key, type=convert, metavar=METAVARS[kind], help=text)
    for key, (flag, text) in MODEL_FLAGS.items():
        groups["model"].add_argument(flag, dest=key, type=number(float), metavar="X", help=text)
    files = parser.add_argument_group("settings together")
    recipes = f"settings found good: {', '.join(RECIPE_NAMES)} (by default the one for the data)"
    files.add_argument("--recipe", metavar="NAME", help=recipes)
    files.add_argument("--config", metavar="FILE.toml", help="settings from a file, such as a run's config.toml")
    files.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting: model.depth=6")


def run(args: argparse.Namespace) -> int:
    """Train, test, and leave a run folder."""
    import shlex
    import sys

    from minivit.cli.progress import shown
    from minivit.runs import job

    observers = [] if args.quiet else shown()
    try:
        return job.resume(args, observers) if args.resume is not None else job.start(args, observers)
    except Stopped as stop:
        again = f"minivit train --resume {printable(shlex.quote(str(stop.path)))}"
        print(f"{stop.what}; continue with\n  {again}", file=sys.stderr)
        return stop.code
