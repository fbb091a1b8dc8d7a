"""A run that goes on: its config.toml and its data are held against what its checkpoint keeps of them.

There are two truths, because a user may edit the one and cannot edit the other. Each difference is named: some are
allowed, any other ends the attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from minivit.errors import CheckpointError, ConfigError
from minivit.files import write_text
from minivit.runs.settings import RunSettings, parse_toml, read_bytes, resolve, write_toml

MAY_CHANGE = (
    "data.name", "data.bad_images", "data.stream",  # where the images are; that they are the same is checked
    "train.teacher",  # likewise: that it is the same model is checked
    "train.init_from", "model.recompute",  # what a run in progress does not depend on
    "train.epochs", "train.patience", "train.max_time", "train.on_nan", "train.save_every",
    # which the run tells: the numbers agree but for rounding
    "train.device", "train.threads", "train.workers", "train.micro_batch",
)  # fmt: skip
"""The settings that need not be the same when a run is resumed."""


FIRST: dict[str, Any] = {"train.dtype": "float32", "train.workers": 1}
"""How every run was trained before these could be set."""


class Config(NamedTuple):
    """A run's config.toml as it was read: where it is, what it says, and its values by dotted key."""

    path: Path
    text: str
    values: dict[str, Any]


def read_config(path: Path) -> Config:
    """Read a run's config.toml. Raises ConfigError if it cannot be read."""
    text = read_bytes(path)
    values = parse_toml(text, path)  # which says so if the text is no UTF-8
    return Config(path, text.decode(), values)


def write_changes(config: Config, settings: RunSettings) -> str:
    """Write a run's config.toml again if it has other values than ``settings``; return what it now says.

    Without need it is left as its user may have put it.
    """
    longer = settings["train.schedule_epochs"] and "train.schedule_epochs" not in config.values
    if not longer and all(settings.get(key) == value for key, value in config.values.items()):
        return config.text
    text = write_toml(settings)
    write_text(config.path, text)
    return text


# ---- settings --------------------------------------------------------------------------------------------------------


def refuse_other_changes(given: Iterable[str], who: str) -> None:
    """Raise ConfigError, in the name of ``who`` resumes a run, if more is ``given`` than may change."""
    if refused := [key for key in given if key not in MAY_CHANGE]:
        raise ConfigError(
            f"{who} continues a run with the settings it was started with: {refused[0]} cannot be set",
            "leave it out, or start a new run: minivit train --config RUN/config.toml …",
        )


def settings_of_run(
    config: Config, meta: Mapping[str, Any], given: Mapping[str, Any] | None = None, origin: str = "command line"
) -> RunSettings:
    """Return the settings of a run, one of whose checkpoints has ``meta``, but for those ``given`` now.

    What its config.toml does not name is as the checkpoint has it. ``origin`` says where ``given`` is from.
    """
    given = given or {}
    settings = resolve(given, file=config.path, origin=origin, read=config.values)
    kept: dict[str, Any] = dict(FIRST)
    kept |= kept_settings(meta) or {"data.layout": 1}  # version 0.1.0 kept none, and knew no other layout
    named = config.values.keys() | given.keys()
    settings.take({key: value for key, value in kept.items() if "." in key and key not in named}, "the run's start")
    return settings


def kept_settings(meta: Mapping[str, Any]) -> RunSettings:
    """Return the settings that a checkpoint keeps, with their origins: none, if it is of the first version."""
    kept = RunSettings()
    run = meta.get("run", {})
    try:
        values, origins = dict(run.get("settings", {})), dict(run.get("origins", {}))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError("the checkpoint's settings make no sense", "use last.npz of a run") from error
    recipe = values.pop("recipe", None)
    kept.take(values, "checkpoint")
    if recipe is not None:
        kept["recipe"] = recipe
    kept.origins = {key: str(origin) for key, origin in origins.items()}
    return kept


def compare_settings(settings: RunSettings, meta: Mapping[str, Any], config: Path) -> list[str]:
    """Hold ``settings`` against those that a checkpoint of the run keeps; return remarks on what changes.

    What is as it was gets the origin that it had. Raises CheckpointError, with each difference, for what may not
    change; ConfigError for epochs in which nothing would change. ``config`` is the path of the run's config.toml.
    """
    before = kept_settings(meta)
    for key, first in FIRST.items():
        before.setdefault(key, first)
    try:
        train = meta["train"]
        epochs = int(before.get("train.epochs") or train["settings"]["total steps"] // train["batches"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        what = f"{config.parent}: its checkpoint holds no training run"
        raise CheckpointError(what, "use last.npz of a run") from error
    scheduled = before.get("train.schedule_epochs") or epochs
    if settings["train.epochs"] != epochs and not settings["train.schedule_epochs"]:
        settings.take({"train.schedule_epochs": scheduled}, "train.epochs when the run began")
    remarks, found = [], []
    for key, old in before.items():
        new = settings.get(key)
        if old == new:
            settings.origins[key] = before.origins.get(key, settings.origins.get(key, ""))
        elif key == "train.schedule_epochs" and scheduled == (new or settings["train.epochs"]):
            continue
        elif key in MAY_CHANGE:
            remarks.append(f"changed     {key}: {old} → {new}")
        else:
            found.append(f"{key}: {old} → {new}")
    if found:
        what = f"{config} is not as it was when the run began: {'; '.join(found)}"
        raise CheckpointError(what, "put the values back, or start a new run: minivit train --config RUN/config.toml")
    if settings["train.epochs"] > max(scheduled, epochs) and settings["train.min_lr"] == 0.0:
        what = f"the learning rate comes down to 0 in epoch {scheduled}: more epochs would change nothing"
        again = f"minivit train --config {quote(str(config))} --epochs {settings['train.epochs']}"
        raise ConfigError(what, f"start anew, for all of them: {again}")
    return remarks


# ---- data ------------------------------------------------------------------------------------------------------------


def compare_data(meta: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """Raise CheckpointError if the data called ``name``, of which a run keeps ``now``, are not those of ``meta``."""
    before, digests = meta.get("data"), meta.get("run", {}).get("data", {})
    if not (isinstance(before, dict) and isinstance(digests, dict)):
        raise CheckpointError("the checkpoint does not say what it was trained on", "use last.npz of a run")
    changed = [key for key in ("classes", "mean", "std") if before.get(key) != now["data"][key]]
    own = now["run"]["data"] if digests else {}
    changed += [part for part in {**digests, **own} if digests.get(part) != own.get(part)]
    if not digests and before.get("labels") != now["data"]["labels"]:  # the first version kept these only
        changed.append("training labels")
    if changed:
        raise CheckpointError(
            f"{name} is not as it was when the run began: other {', '.join(changed)}",
            "bring the data back, or start a new run from these weights: --init-from",
        )
