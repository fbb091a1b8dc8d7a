"""Runs for Python users: what ``minivit train`` does, as functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit.errors import ConfigError, unknown_name, value_text
from minivit.runs.changes import refuse_other_changes
from minivit.runs.options import MODEL_FLAGS, OPTIONS
from minivit.runs.run import Run, continue_run, nobody, start_run
from minivit.runs.settings import known_settings, resolve
from minivit.train.observers import Observer

SHORT = {
    flag.removeprefix("--").replace("-", "_"): key
    for key, flag in [
        *((key, option.flags[0]) for key, option in OPTIONS.items() if option.flags),
        *((key, flag) for key, (flag, _) in MODEL_FLAGS.items()),
    ]
}
"""The dotted keys of the settings that have a short name, by that name: the command line's flag without its dashes."""


def train(
    *,
    settings: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: str | Path | None = None,
    output: str | Path = "runs",
    name: str | None = None,
    observers: Sequence[Observer] = (),
    tell: Callable[[str], object] | None = None,
    **short: Any,
) -> Run:
    """Train a model in a folder of its own, as ``minivit train`` does, and return the :class:`Run`. ::

        run = mv.runs.train(data="digits", epochs=3, settings={"model.depth": 2})
        run.folder    # Path("runs/digits-1"): checkpoints, metrics.jsonl, results.csv, report.html
        run.history   # a row for each epoch
        run.test      # {"loss": …, "accuracy": …, "interval": […, …], "count": …}
        run.model     # in eval mode, with the weights of the best epoch, or else the last ones

    Settings are keyword arguments, called as the command's flags without their dashes: ``data`` (a name, a folder or an
    .npz file), ``model``, ``epochs``, ``batch_size``, ``lr``, ``seed``, …; ``settings`` takes any of them by the dotted
    key that it has in a run's config.toml. What is not given is the ``recipe``'s, the file's ``config``, or a default.
    The folder is made below ``output``, called ``name``, or after the data, with a number.

    ``observers`` (:class:`minivit.train.Observer`) are told of each step and epoch; ``tell`` is called with the lines
    that the command prints: ``tell=print``. Without them nothing is printed.

    Raises ConfigError for a setting that is unknown or cannot be, DataError for data that cannot be used, both before
    there is a folder; NonFiniteError where the training diverges; Stopped, once the run is saved, after Ctrl-C, SIGTERM
    or SIGHUP in the main thread: :func:`resume` continues it.
    """
    given = _by_key(settings, short)
    others = {"settings": settings, "recipe": recipe, "config": config, "name": name}
    others["output"] = None if output == "runs" else output
    return start_run(
        resolve(given, recipe, config, origin="argument"),
        output=output,
        name=name,
        command=_call("train", short | {key: value for key, value in others.items() if value is not None}),
        observers=observers,
        say=tell or nobody,
        tell=tell or nobody,
    )


def resume(
    run: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    observers: Sequence[Observer] = (),
    tell: Callable[[str], object] | None = None,
    **short: Any,
) -> Run:
    """Continue a run where its checkpoint stands, and return the :class:`Run`: of one that is over, as it is. ::

        mv.runs.resume("runs/digits-1", epochs=6)

    ``run`` is the run's folder, or one of its checkpoints. Its settings are those of its start; only what leaves the
    numbers as they are may be given again, as for :func:`train`: epochs, patience, max_time, threads, …. Raises
    ConfigError for another setting, and CheckpointError where the checkpoint is missing or damaged, or where settings
    or data are not as they were when the run began.
    """
    given = _by_key(settings, short)
    refuse_other_changes(given, "resume")
    heard = tell or nobody
    return continue_run(os.fspath(run), given, origin="argument", observers=observers, say=heard, tell=heard)


def _by_key(settings: Mapping[str, Any] | None, short: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings that were given, by dotted key; raise ConfigError for an unknown name, or for two values."""
    if not isinstance(settings, Mapping | None) or not all(isinstance(key, str) for key in settings or {}):
        raise ConfigError(f"settings={value_text(settings)}", "give a dict of values by dotted key: {'model.depth': 2}")
    given = {key: _plain(value) for key, value in (settings or {}).items()}
    for name, value in short.items():
        if name not in SHORT:
            raise _unknown(name)
        key = SHORT[name]
        if key in given and given[key] != _plain(value):
            raise ConfigError(f"{name}={value!r}, but settings has {key!r}: {given[key]!r}", "give one of them")
        given[key] = _plain(value)
    return given


def _unknown(name: str) -> Exception:
    """Return the error for an unknown keyword argument."""
    if keys := [key for key in known_settings() if key.partition(".")[2] == name]:
        return ConfigError(f"unknown argument {name!r}", f"give it by its key: settings={{{keys[0]!r}: …}}")
    return unknown_name("argument", name, SHORT)


def _plain(value: Any) -> Any:
    """Return a value as a run's config.toml can hold it: a path as text, a NumPy number as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _call(function: str, given: Mapping[str, Any]) -> str:
    """Return a call as it may be written again."""
    return f"mv.runs.{function}({', '.join(f'{name}={_plain(value)!r}' for name, value in given.items())})"
