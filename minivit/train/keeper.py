"""What a run keeps in its folder, when it is written there, and what may be written over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivit.errors import CheckpointError, ConfigError
from minivit.models import Model
from minivit.train.observers import Observer
from minivit.train.progress import Row
from minivit.train.records import Records
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint, sweep

Stamp = tuple[int, int, int] | None
"""What changes when a file is replaced; None if there is none."""


class Keeper(Observer):
    """Keeps a run in its folder: the records, a line for each step, and the checkpoints.

    Lines are written before the checkpoint that they must not lag behind, and best.npz before last.npz, which says that
    it is there.
    """

    def __init__(self, folder: Path, save_every: int | None) -> None:
        self.folder, self.save_every = folder, save_every
        self.records = Records(folder)
        self.newest: tuple[Path, Stamp] | None = None  # the checkpoint that was read or saved last, as it was then

    def checkpoint(self, name: str) -> Path:
        """Return the path of the checkpoint called ``name``: last, best or epoch."""
        return self.folder / "checkpoints" / f"{name}.npz"

    # ---- what it does when it is told ----

    def begin(self, trainer: Any) -> None:
        """Make the folder ready: no half-written files, and no records but of what has been trained.

        Raises ConfigError for a model that no checkpoint can hold.
        """
        if isinstance(trainer.model, Model):
            trainer.model.check_portable()
        sweep(self.folder)
        self.records.begin(trainer.progress.batch, trainer.progress.history)

    def epoch_begins(self, trainer: Any) -> None:
        """Save what the epoch can be rolled back to."""
        if trainer.on_nan == "rollback" and trainer.progress.batch == 0:
            self.save(trainer, "epoch")

    def step(self, trainer: Any, row: Row) -> None:
        """Record the step; save every ``save_every`` updates."""
        self.records.log(row)
        if self.is_due(trainer.opt.steps):
            self.save(trainer, "last")

    def is_due(self, steps: int) -> bool:
        """Tell whether the run is to be saved after so many updates."""
        return bool(self.save_every and steps % self.save_every == 0)

    def epoch(self, trainer: Any, row: Row) -> None:
        """Record and save the epoch, also as the best one if it is."""
        self.records.log(row)
        self.save(trainer, *(("best", "last") if trainer.progress.best is row else ("last",)))
        self.records.write_results(trainer.progress.history)

    def stopped(self, trainer: Any, why: str) -> None:
        """Save where the run stands."""
        self.save(trainer, "last")

    def end(self, trainer: Any) -> None:
        """Write out the lines that wait."""
        self.records.flush()

    def save(self, trainer: Any, *names: str) -> None:
        """Write the checkpoints of these names, one after the other, and then let the run's observers know."""
        self.records.flush()
        checkpoint, paths = trainer.checkpoint(), [self.checkpoint(name) for name in names]
        for name, path in zip(names, paths, strict=True):
            save_checkpoint(path, checkpoint.arrays, checkpoint.meta)
            if name == "last":
                self.newest = path, stamp(path)
        for path in paths:
            for observer in trainer.observers:
                observer.saved(trainer, path)

    # ---- what it does not write over ----

    def check(self, steps: int) -> None:
        """Check that the folder holds no more than the run, as far as it has come: ``steps`` updates.

        Raises ConfigError for another run's folder, CheckpointError where what is newer would be lost.
        """
        last = self.checkpoint("last")
        path, before = self.newest or (None, None)
        if path is None or path.resolve().parent != last.resolve().parent:
            if last.exists():
                remedy = f"resume it from {last}, or name another folder"
                raise ConfigError(f"{self.folder} already holds a run", remedy)
        elif stamp(path) != before:
            what = f"{path} has changed since then: another process has gone on with the run"
            raise CheckpointError(what, f"resume it again, from {last}")
        elif path.name != last.name and (newer := _steps_in(last)) > steps:
            what = f"{path} is at step {steps:,}, {last.name} at step {newer:,}: what is newer would be lost"
            remedy = f"resume from the newest, {last}; or copy the run's folder without {last.name}"
            raise CheckpointError(what, remedy)


def stamp(path: Path) -> Stamp:
    """Return what tells a file from the one that replaces it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _steps_in(path: Path) -> int:
    """Return the updates made at a checkpoint; -1 for one that is missing or damaged, which can be replaced."""
    try:
        return int(load_checkpoint(path).arrays["optimizer/steps"])
    except (CheckpointError, KeyError, TypeError):
        return -1
