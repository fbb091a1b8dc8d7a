"""The checkpoint that is meant where a folder is given."""

from __future__ import annotations

import os
from pathlib import Path

from minivit.errors import CheckpointError


def find_checkpoint(given: str | os.PathLike[str]) -> str:
    """Return the checkpoint that is meant: ``given`` itself, or of a run's folder the best one.

    That is ``checkpoints/best.npz`` where the run chose among its epochs by images held out, else ``last.npz``; of a
    folder from Hugging Face's hub, ``model.safetensors``. Raises CheckpointError for a folder that has none.
    """
    given = os.fspath(given)
    folder = Path(given)
    if not given or not os.path.isdir(given):  # which, unlike Path's, raises nothing for a name that is too long
        return given
    for name in ("best.npz", "last.npz"):
        if (path := folder / "checkpoints" / name).is_file():
            return str(path)
    if (path := folder / "model.safetensors").is_file():  # a folder as Hugging Face's hub has them
        return str(path)
    if (folder / "config.toml").is_file():
        raise CheckpointError(f"the run {given} has no checkpoint yet", "wait for its first epoch, or train it again")
    raise CheckpointError(
        f"{given} is no run folder: it has no checkpoints/last.npz",
        "give runs/NAME, as minivit train made it, or a checkpoint",
    )
