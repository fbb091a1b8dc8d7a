"""A run's folder: made, named, found again, and the checkpoint in it that is meant."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from minivit.errors import CheckpointError, ConfigError, printable
from minivit.measure.machine import blas_text, cpu_text, system_text, versions

# ---- making one ------------------------------------------------------------------------------------------------------


def make_folder(parent: Path, name: str | None, stem: str) -> Path:
    """Make a folder for a run that was not there before, and return its path: a folder is never used twice."""
    parent.mkdir(parents=True, exist_ok=True)
    if name is not None:
        try:
            (parent / name).mkdir()
        except FileExistsError:
            raise ConfigError(
                f"{parent / name} is there already",
                f"choose another --name, or --resume {shlex.quote(str(parent / name))}",
            ) from None
        return parent / name
    for number in itertools.count(1):
        try:
            (parent / f"{stem}-{number}").mkdir()  # fails if another process was faster
        except FileExistsError:
            continue
        return parent / f"{stem}-{number}"
    raise AssertionError  # it does not end


def command_record(command: str, device: str) -> str:
    """Return what command.txt keeps: what was typed or called, and what it ran on."""
    record = {"command": command, "folder": str(Path.cwd()), "device": device}
    record |= versions() | {"system": system_text(), "cpu": cpu_text(), "blas": blas_text()}
    return "".join(f"{name:14}{printable(text)}\n" for name, text in record.items())


# ---- finding one -----------------------------------------------------------------------------------------------------


def run_of(checkpoint: str) -> Path | None:
    """Return the folder of the run that keeps a checkpoint, or None if it lies anywhere else."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.toml").is_file() else None


def checkpoint_to_resume(given: str) -> Path:
    """Return the checkpoint from which a run goes on: ``given`` itself, or of a run's folder the last one.

    Its run's folder is ``path.parent.parent``. Raises CheckpointError if there is no such run, or nothing to go on
    from.
    """
    path = Path(given)
    if path.is_dir():
        path = path / "checkpoints" / "last.npz"
    elif path.parent == Path():  # a file in the folder where the process runs
        path = path.absolute()
    config = path.parent.parent / "config.toml"
    if not path.exists() and config.is_file():
        if (best := path.with_name("best.npz")).is_file():
            again = f"continue from its best epoch: minivit train --resume {shlex.quote(str(best))}"
            raise CheckpointError(f"{given} has no {path.name}", again)
        again = f"start it again: minivit train --config {shlex.quote(str(config))}"
        raise CheckpointError(f"{given} has no checkpoint yet", again)
    if not path.is_file() or not config.is_file():
        raise CheckpointError(f"{given} is no run, nor a checkpoint of one", "give runs/NAME, or its last.npz")
    return path
