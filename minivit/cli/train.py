"""``minivit train``: a run from its settings to its test accuracy, in a folder of its own."""

from __future__ import annotations

import argparse

from minivit.cli.bars import compiling_shown, reading_bar
from minivit.cli.main import number
from minivit.runs.options import MODEL_FLAGS, OPTIONS, RECIPE_NAMES

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without the import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from minivit.errors import Stopped
    from minivit.runs.settings import RunSettings

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


@compiling_shown()
def run(args: argparse.Namespace) -> int:
    """Train, test, and leave a run folder."""
    import shlex
    import sys
    from functools import partial

    from minivit.cli.epochs import shown
    from minivit.errors import Stopped
    from minivit.runs.run import continue_run, nobody, start_run
    from minivit.train.ranks import place_among_ranks

    if (place := place_among_ranks()) is not None:
        from minivit.train.mpi import take_part

        aside = partial(print, file=sys.stderr, flush=True)
        return take_part(*place, [sys.executable, "-P", "-m", "minivit", *args.argv], aside)
    tell = partial(print, flush=True)
    say = nobody if args.quiet else tell
    observers = [] if args.quiet else shown()
    try:
        if args.resume is not None:
            changes = _changes(args)
            continue_run(
                args.resume, changes, origin="command line", observers=observers, say=say, tell=tell, bar=reading_bar
            )
        elif args.dry_run:
            _try_out(settings_from(args), say)
        else:
            command = f"minivit {shlex.join(args.argv)}"
            start_run(settings_from(args), output=args.output, name=args.name, command=command,
                      observers=observers, say=say, tell=tell, bar=reading_bar)  # fmt: skip
    except Stopped as stop:
        return _stopped(stop)
    return 0


def typed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives, by dotted key."""
    from minivit.errors import ConfigError
    from minivit.runs.settings import parse_assignment

    typed = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    if args.source is not None:
        if typed.get("data.name", args.source) != args.source:
            raise ConfigError(f"two data sets: {args.source} and --data {typed['data.name']}", "give one")
        typed["data.name"] = args.source
    return typed | dict(parse_assignment(text) for text in args.set)


def settings_from(args: argparse.Namespace) -> RunSettings:
    """Return the settings of a run that the command line asks for."""
    from minivit.runs.settings import resolve

    return resolve(typed_settings(args), args.recipe, args.config)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that are typed for a run that goes on; raise ConfigError for what cannot change then."""
    from minivit.runs.changes import refuse_other_changes

    typed = typed_settings(args)
    others = {"--recipe": args.recipe, "--config": args.config, "--name": args.name}
    others["--dry-run"] = args.dry_run or None
    refuse_other_changes([*typed, *(flag for flag, value in others.items() if value is not None)], "--resume")
    return typed


def _try_out(settings: RunSettings, say: Callable[[str], object]) -> None:
    """Make a few steps, and say how long the run would take; nothing is written or kept."""
    from minivit.runs.job import Job
    from minivit.show.text import bytes_text

    job = Job(settings, bar=reading_bar)
    say(job.about)
    trial = job.try_out()
    where = "" if settings["train.device"] == "cpu" else f" on {settings['train.device']}"
    say(f"memory      about {bytes_text(job.memory)}{where} at the peak")
    say(f"time        about {trial.minutes:,.1f} minutes of training, by a few steps")
    figures = f"loss {trial.loss:.4f}, gradient norm {trial.grad_norm:.3g}"
    print(f"dry run     a step works ({figures}); nothing was written")


def _stopped(stop: Stopped) -> int:
    """Say how a run that a signal has ended is continued; return the exit code that reports the signal."""
    import os
    import shlex
    import sys

    # a checkpoint while it trains, the run's folder at its end
    how = ": test it and draw its pictures with" if os.path.isdir(str(stop.path)) else "; continue with"
    print(f"{stop.what}{how}\n  minivit train --resume {shlex.quote(str(stop.path))}", file=sys.stderr)
    return stop.code
