"""A run, from its settings to its results: lock, read once, build from what was read, train, finish, unlock.

Nothing is printed: ``tell`` is called with what came of it, ``say`` with everything else that a user may want to know.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from minivit.errors import Stopped, printable
from minivit.files import write_text
from minivit.models import Model
from minivit.runs.changes import (
    Config,
    compare_data,
    compare_settings,
    read_config,
    settings_of_run,
    write_changes,
)
from minivit.runs.finish import finish
from minivit.runs.folder import checkpoint_to_resume, command_record, make_folder
from minivit.runs.job import Job, make_absolute
from minivit.runs.read import read_test
from minivit.runs.results import draw_samples
from minivit.runs.settings import RunSettings, write_toml
from minivit.train.lock import RunLock
from minivit.train.observers import Observer, check_observers
from minivit.train.progress import Row
from minivit.train.signals import StopSignals
from minivit.train.trainer import Trainer
from minivit.weights.checkpoint import load_checkpoint
from minivit.weights.native import load_model
from minivit.weights.place import find_checkpoint

Tell = Callable[[str], object]
"""What is called with a line, or some lines, about a run."""


def nobody(text: str) -> None:
    """Tell nobody."""


class Run:
    """A run that has ended: its ``folder``, its ``settings`` by dotted key, and what came of it.

    ``history`` has a row for each epoch, as :meth:`minivit.Trainer.fit` returns them, ``test`` the loss, accuracy, 95%
    interval and count of the test images: None where there were none.
    """

    def __init__(
        self,
        folder: Path,
        settings: RunSettings,
        history: Sequence[Row],
        test: Mapping[str, Any] | None,
        model: Model | None = None,
    ) -> None:
        self.folder, self.settings = folder, settings
        self.history, self.test = list(history), None if test is None else dict(test)
        self._model = model

    @property
    def model(self) -> Model:
        """The model in eval mode, with the weights that were measured: the best epoch's, or else the last ones."""
        if self._model is None:  # the run was over already
            self._model = load_model(find_checkpoint(str(self.folder)))
        return self._model

    def __repr__(self) -> str:
        accuracy = "" if self.test is None else f", test accuracy {self.test['accuracy']:.2%}"
        return f"<Run {str(self.folder)!r}: epochs {len(self.history)}{accuracy}>"


def start_run(
    settings: RunSettings,
    *,
    output: str | Path,
    name: str | None,
    command: str,
    observers: Sequence[Observer] = (),
    say: Tell = nobody,
    tell: Tell = nobody,
    bar: Callable[..., Any] | None = None,
) -> Run:
    """Start a run in a new folder below ``output``, called ``name`` or after the data, and carry it to its end.

    ``command`` is what its command.txt keeps, ``bar`` as :func:`minivit.data.load` has it. Raises ConfigError or
    DataError, before there is a folder, for what cannot be; NonFiniteError where the training diverges; Stopped after a
    signal.
    """
    check_observers(observers)  # before there is a folder
    job = Job(settings, bar=bar)
    say(job.about)
    folder = make_folder(Path(output), name, stem=job.parts.title)
    with RunLock(folder) as lock:
        config = write_toml(settings)
        write_text(folder / "config.toml", config)
        write_text(folder / "command.txt", command_record(command, settings["train.device"]))
        say(printable(f"run folder  {folder}"))
        say(printable(f"reproduce   minivit train --config {quote(str(folder / 'config.toml'))}") + "\n")
        draw_samples(job, folder)
        trainer = job.make_trainer(folder, observers)
        trainer.lock = lock
        return _carry_out(job, trainer, folder, config, say, tell)


def continue_run(
    given: str,
    changes: Mapping[str, Any],
    *,
    origin: str,
    observers: Sequence[Observer] = (),
    say: Tell = nobody,
    tell: Tell = nobody,
    bar: Callable[..., Any] | None = None,
) -> Run:
    """Continue a run where its checkpoint stands, in its folder, and carry it to its end.

    ``given`` is the run's folder or one of its checkpoints; ``changes`` are settings that are others from now on, as
    far as they may change, and ``origin`` says where these are from. Raises CheckpointError or ConfigError for what is
    not as it was when the run began, and what :func:`start_run` raises.
    """
    path = checkpoint_to_resume(given)
    folder = path.parent.parent
    with RunLock(folder) as lock:  # before anything is read that another process may be changing
        job, trainer, config = _restored(path, changes, origin, observers, say, bar)
        trainer.lock = lock
        p = trainer.progress
        if (p.stopped or p.epoch >= trainer.epochs) and (folder / "report.html").exists():
            why = f" ({p.stopped})" if p.stopped else ""
            again = f"minivit eval {quote(str(folder))}"
            tell(printable(f"the run {folder} is finished{why}; to measure it: {again}"))
            if job.settings["train.min_lr"] > 0 and not p.stopped:
                longer = f"--resume {quote(str(folder))} --epochs {2 * trainer.epochs}"
                tell(printable(f"to go on longer: minivit train {longer}"))
            return Run(folder, job.settings, p.history, read_test(folder))
        say(f"continuing at step {trainer.opt.steps} of {trainer.epochs * len(job.loader)}")
        trainer.check_folder()
        return _carry_out(job, trainer, folder, write_changes(config, job.settings), say, tell)


def _restored(
    path: Path,
    changes: Mapping[str, Any],
    origin: str,
    observers: Sequence[Observer],
    say: Tell,
    bar: Callable[..., Any] | None,
) -> tuple[Job, Trainer, Config]:
    """Read a run's config.toml and its checkpoint at ``path``, once; return the run as it stood, and its config.toml.

    The checkpoint's arrays, which take as much memory as the trainer's own, are let go with this call.
    """
    checkpoint = load_checkpoint(path)
    config = read_config(path.parent.parent / "config.toml")
    settings = settings_of_run(config, checkpoint.meta, changes, origin)
    make_absolute(settings)
    remarks = compare_settings(settings, checkpoint.meta, config.path)
    job = Job(settings, resumed=True, held=sum(a.nbytes for a in checkpoint.arrays.values()), bar=bar)
    folder = config.path.parent
    say("\n".join([job.about, printable(f"run folder  {folder}"), *map(printable, remarks), ""]))
    trainer = job.make_trainer(folder, observers)
    compare_data(checkpoint.meta, trainer.meta, settings["data.name"])
    trainer.resume(path, checkpoint)
    return job, trainer, config


def _carry_out(job: Job, trainer: Trainer, folder: Path, config: str, say: Tell, tell: Tell) -> Run:
    """Train to the end, test and draw; ``config`` is what the folder's config.toml says."""
    (folder / "report.html").unlink(missing_ok=True)  # written last: a run that has it is finished
    device, held_out = job.settings["train.device"], job.parts.valid
    valid = None if held_out is None else job.parts.held_loader(held_out, device, job.room())
    try:
        history = trainer.fit(job.loader, valid)
    except Stopped as stop:
        again = f"continue with mv.runs.resume({stop.path!r})"
        raise Stopped(stop.signum, stop.what, again, stop.path) from None
    say(f"\ntime        {sum(row['seconds'] for row in history):.1f} s of training")
    try:
        with StopSignals() as signals:
            test = finish(job, trainer, folder, config, signals.raise_if_noted, say, tell)
    except KeyboardInterrupt as stop:
        signum = stop.signum if isinstance(stop, Stopped) else signal.SIGINT
        again = f"test it and draw its pictures with mv.runs.resume({str(folder)!r})"
        raise Stopped(signum, "stopped; the training is done and saved", again, str(folder)) from None
    return Run(folder, job.settings, history, test, job.model.eval())
