"""A training run: epochs of steps, evaluation, and checkpoints from which it continues bit by bit."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minivit import ops
from minivit.backend import Array
from minivit.errors import ConfigError, NonFiniteError, Stopped, WorkerError, unknown_name
from minivit.nn.module import Module
from minivit.train.ema import EMA
from minivit.train.evaluation import Batches, check_loaders, evaluate, first_loss_doubt
from minivit.train.identity import differences
from minivit.train.keeper import Keeper, stamp
from minivit.train.lock import RunLock
from minivit.train.observers import Observer, check_observers
from minivit.train.optimizer import Optimizer
from minivit.train.progress import Progress, Row
from minivit.train.resume import (
    RunState,
    check_data,
    check_epochs,
    check_settings,
    data_settings,
    model_settings,
    run_settings,
)
from minivit.train.schedule import Schedule
from minivit.train.signals import StopSignals
from minivit.train.step import TrainStep
from minivit.train.underway import HandedIn
from minivit.weights.checkpoint import Checkpoint, load_checkpoint

ON_NAN = ("stop", "skip", "rollback")
MOST_SKIPPED = 10  # batches in a row: more are no accident


class Trainer:
    """Trains ``model`` with ``opt`` for ``epochs`` epochs; ``loss``, ``threads``, … as :class:`TrainStep` takes them.

    ``schedule`` maps the number of updates made to the learning rate of the next one (default: ``opt.lr`` as it is).
    ``ema`` evaluates and keeps, beside the parameters, their :class:`~minivit.train.ema.EMA` of that decay. A run ends
    early after ``patience`` epochs that were not better on the validation images, or ``max_seconds`` of training.
    ``on_nan`` says what a loss or gradient does that is not finite: "stop" raises NonFiniteError, "skip" leaves the
    batch out, "rollback" takes parameters and optimizer back to the epoch's start (checkpoints/epoch.npz) and goes on
    with the next batch. The parameters are never touched by it, and ten in a row stop the run.

    With a ``folder`` the run keeps there

    - ``checkpoints/last.npz`` after every epoch, every ``save_every`` steps, and on Ctrl-C, SIGTERM or SIGHUP;
    - ``checkpoints/best.npz``, if there is a validation set: the epoch with the highest accuracy on it, and among
      equals, which few images make many of, that with the lowest loss;
    - ``metrics.jsonl``, a line for each step and each epoch, and ``results.csv``, a row for each epoch.

    ``meta`` is stored in the checkpoints, beside the model's ``config`` as ``meta["model"]`` and the run's state as
    ``meta["train"]``. Nothing is printed: what happens is told to the ``observers``, in their order: see
    :class:`~minivit.train.observers.Observer`.

    ``precision`` is what is computed in, as :class:`TrainStep` takes it; on a GPU what a step came to is read when the
    next is under way. ``trained`` is what a step runs if that is more than ``model``: a Student (train/distill.py).

    ``lock`` holds the folder while ``fit`` works. What is to be done with the folder before or after that, with no
    other process in between, is done in a block of its own: ``with trainer.lock: …``.
    """

    def __init__(
        self,
        model: Module,
        opt: Optimizer,
        *,
        loss: Callable[..., Any] = ops.cross_entropy,
        schedule: Schedule | None = None,
        epochs: int = 10,
        seed: int = 0,
        clip_norm: float | None = None,
        threads: int | None = None,
        micro_batch: int | None = None,
        folder: str | Path | None = None,
        save_every: int | None = None,
        ema: float | None = None,
        patience: int | None = None,
        max_seconds: float | None = None,
        on_nan: str = "stop",
        meta: Mapping[str, Any] | None = None,
        observers: Sequence[Observer] = (),
        precision: str = "float32",
        trained: Module | None = None,
        workers: int = 1,
    ) -> None:
        if epochs < 1 or (save_every is not None and save_every < 1):
            raise ConfigError(f"epochs={epochs}, save_every={save_every}", "each must be at least 1")
        if (patience is not None and patience < 1) or (max_seconds is not None and not max_seconds > 0):
            raise ConfigError(f"patience={patience}, max_seconds={max_seconds}", "each must be positive, or None")
        if on_nan not in ON_NAN:
            raise unknown_name("on_nan", on_nan, ON_NAN)
        if on_nan == "rollback" and folder is None:
            raise ConfigError("on_nan='rollback' without a folder", "give a folder: there is no checkpoint without one")
        check_observers(observers)
        self.model, self.opt, self.schedule, self.epochs = model, opt, schedule, epochs
        self.patience, self.max_seconds, self.on_nan, self.meta = patience, max_seconds, on_nan, dict(meta or {})
        self.ema = None if ema is None else EMA(opt.store, ema)
        self.step = TrainStep(
            trained or model, opt, loss, threads, micro_batch, clip_norm, seed, precision, self.ema, workers
        )
        self.keeper = None if folder is None else Keeper(Path(folder), save_every)
        self.observers = list(observers) if self.keeper is None else [self.keeper, *observers]
        self.progress = Progress()
        self.lock = RunLock(folder)
        self._told = ""  # what the step remarks on
        self._data: dict[str, Any] = {}  # what is trained on, and validated with: see data_settings

    def fit(self, train: Batches, valid: Batches | None = None) -> list[Row]:
        """Train from where the run stands to the end of the last epoch; return the rows of all its epochs.

        A row has epoch, step, lr, loss and accuracy (both over the epoch's images as they were trained on; no accuracy
        where labels are mixed), images_per_second, seconds, and with ``valid`` valid_loss and valid_accuracy, as
        :func:`evaluate` measures them. Raises NonFiniteError before an update that would spoil the parameters, unless
        ``on_nan`` says otherwise; CheckpointError for data that are not those of the run's start, or a folder that has
        gone on without this Trainer. In the main thread, with a folder, Ctrl-C, SIGTERM or SIGHUP ends the run after
        the step under way: it is saved, and :class:`~minivit.errors.Stopped` raised. A second one acts at once.
        """
        check_loaders(train, valid, self.progress.batches, self.patience is not None, self._classes())
        if self.keeper is not None or self._data:
            now = data_settings(train, valid)
            check_data(self._data, now)
            self._data = now
        active = self.keeper is not None  # signals are left alone where there is no folder to save in
        with self.lock, StopSignals(active) as signals, contextlib.ExitStack() as ends:
            self.check_folder()
            ends.callback(self.step.crew.close)
            self.progress.batches = len(train)
            for observer in self.observers:
                observer.begin(self)
                ends.callback(observer.end, self)
            try:
                signals.raise_if_noted()
                while self.progress.epoch < self.epochs and not self.progress.stopped:
                    self._train_epoch(train, valid, signals.raise_if_noted)
                    signals.raise_if_noted()
            except Stopped as stop:
                raise self._saved(stop) from None
            except WorkerError as error:  # parameters and optimizer are as they were after the last whole step
                for observer in self.observers:
                    observer.stopped(self, error.what)
                raise
        return self.progress.history

    def averaged(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model has the averaged parameters, if the run averages them."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped()

    def check_folder(self) -> None:
        """Check that the folder holds no more than this run, as far as it has come: `fit` does, under the lock.

        Raises ConfigError for another run's folder, CheckpointError where what is newer would be lost.
        """
        if self.keeper is not None:
            self.keeper.check(self.opt.steps)

    # ---- epochs and steps ----

    def _train_epoch(self, train: Batches, valid: Batches | None, stop_if_asked: Callable[[], None]) -> None:
        for observer in self.observers:
            observer.epoch_begins(self)
        stopped = self._train_batches(train, stop_if_asked)
        row = self.progress.row(self.opt.steps)
        if valid is not None:
            with self.averaged():
                result = evaluate(self.model, valid, stop_if_asked, self.step.team.threads)
            row |= {"valid_loss": result["loss"], "valid_accuracy": result["accuracy"]}
        p = self.progress.after(row)
        if self.patience is not None and p.best is not None and row["epoch"] - p.best["epoch"] >= self.patience:
            stopped = stopped or f"nothing better on the validation images in {self.patience} epochs"
        p.stopped = stopped
        self.progress = p
        for observer in self.observers:
            observer.epoch(self, row)
        if stopped:
            self._remark(f"stopped after epoch {row['epoch']}: {stopped}")

    def _train_batches(self, train: Batches, stop_if_asked: Callable[[], None]) -> str:
        """Train on what is left of the epoch; return why the run ends with it, "" if it does not."""
        p = self.progress
        started = time.perf_counter() - p.seconds
        before = sum(row["seconds"] for row in p.history)
        # batches handed in: on a GPU the next one is, before the last has been waited for
        waiting: deque[HandedIn] = deque()

        def finish(most: int) -> None:
            """Wait for batches until no more than ``most`` are under way, and tell of each."""
            while len(waiting) > most:
                self._finish(waiting, started)
                stop_if_asked()

        try:
            for images, labels in train.batches(p.epoch, start=p.batch):
                waiting.append(self._submitted(images, labels, len(waiting)))
                due = self.keeper is not None and self.keeper.is_due(self.opt.steps + len(waiting))
                finish(0 if due else self.step.ahead)  # what is saved is as it is after its step
                if self.max_seconds is not None and before + p.seconds >= self.max_seconds:
                    finish(0)
                    return "its time is up"
            finish(0)
        except BaseException:  # of the loader, or a signal: what is under way counts
            with contextlib.suppress(Exception):
                while waiting:
                    self._finish(waiting, started)
            raise
        return ""

    def _submitted(self, images: Array, labels: Array, under_way: int) -> HandedIn:
        """Hand a batch in, behind others that are under way."""
        steps = self.opt.steps + under_way
        if self.schedule is not None:
            self.opt.lr = self.schedule(steps)
        return HandedIn(images, labels, self.opt.lr, steps == 0, self.step.submit(images, labels))

    def _finish(self, waiting: deque[HandedIn], started: float) -> None:
        """Wait for the first of the batches that are under way, and tell what it came to."""
        p, batch, again = self.progress, waiting.popleft(), list[HandedIn]()
        row: Row
        if self.schedule is not None:
            self.opt.lr = batch.lr
        try:
            totals = batch.submitted.totals()
        except NonFiniteError as error:
            again = list(waiting)  # nothing was updated by them
            waiting.clear()
            self._leave_out(error)
            p.batch, p.lr, p.seconds = p.batch + 1, batch.lr, time.perf_counter() - started
            row = {"epoch": p.epoch + 1, "step": self.opt.steps, "batch": p.batch, "left_out": error.what}
        else:
            p.skipped = 0
            p.batch, p.lr, p.seconds = p.batch + 1, batch.lr, time.perf_counter() - started
            p.add(totals.loss, len(batch.labels), totals.right)
            of_batch = {"batch": p.batch, "batch_loss": totals.loss, "grad_norm": totals.grad_norm}
            row = p.row(self.opt.steps) | of_batch
            if batch.is_first and (doubt := first_loss_doubt(totals.loss, self._classes())):
                self._remark(doubt)
        remark = self.step.crew.remark
        if why := self.step.why_launched:
            remark = f"each operation of a step is launched by itself, which takes longer: {why}"
        if remark != self._told:
            self._told = remark
            self._remark(remark)
        for observer in self.observers:
            observer.step(self, row)
        for other in again:
            waiting.append(self._submitted(other.images, other.labels, len(waiting)))

    def _leave_out(self, error: NonFiniteError) -> None:
        """Leave a batch out that is not finite; raise the ``error`` if the run is to stop for it."""
        p = self.progress
        p.skipped += 1
        if self.on_nan == "stop" or p.skipped >= MOST_SKIPPED:
            raise error
        if self.on_nan == "rollback" and self.keeper is not None:
            self._take_over(load_checkpoint(self.keeper.checkpoint("epoch")))
        self._remark(f"batch {p.batch + 1} of epoch {p.epoch + 1} left out: {error.what}")

    def _classes(self) -> int | None:
        """Return the number of the model's classes, if it says so."""
        return getattr(self.model, "config", {}).get("num_classes")

    def _remark(self, text: str) -> None:
        for observer in self.observers:
            observer.remark(self, text)

    def _saved(self, stop: Stopped) -> Stopped:
        """Have the run saved because of a signal; return what says where."""
        for observer in self.observers:
            observer.stopped(self, signal.Signals(stop.signum).name)
        if self.keeper is None:  # raised by an observer: without a folder, signals are left alone here
            return stop
        path = str(self.keeper.checkpoint("last"))
        remedy = f"continue with Trainer.resume({path!r}), and fit"
        return Stopped(stop.signum, f"stopped and saved after step {self.opt.steps}", remedy, path)

    # ---- saving and resuming ----

    def checkpoint(self) -> Checkpoint:
        """Return a copy of all that continues the run from here to the same bits; ``resume`` takes it over."""
        arrays = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        if self.ema is not None:
            arrays |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()}
        arrays |= {f"optimizer/{k}": v for k, v in self.opt.state_dict().items()}
        arrays |= {f"step/{k}": v for k, v in self.step.state_dict().items()}
        state = self._state(self.epochs * self.progress.batches)
        return Checkpoint(arrays, model_settings(self.model) | self.meta | {"train": state.meta()})

    def resume(self, path: str | Path, checkpoint: Checkpoint | None = None) -> None:
        """Take over parameters, optimizer state and position of a run from its checkpoint; ``fit`` then continues it.

        Model, optimizer, loss, loaders and settings must be made as for the run's start; what differs is named. Only
        ``save_every``, ``on_nan``, ``patience`` and ``max_seconds`` may be others; ``epochs`` too, with the run's own
        ``schedule``: after its end the rate stays what it is there, or is ``opt.lr`` where there is none. Other
        threads, micro-batches or another device are remarked on: the numbers then agree but for rounding.

        ``checkpoint`` is what was read from ``path``, if it was: hold ``lock`` from before that to the end of ``fit``.

        In the run's own folder nothing is lost: where last.npz is further on than ``path``, ``fit`` refuses. Raises
        CheckpointError if the checkpoint does not fit, ConfigError for ``epochs`` that it cannot go on to.
        """
        path = Path(path)
        read_at = stamp(path)  # before it is read
        checkpoint = load_checkpoint(path) if checkpoint is None else checkpoint
        before = RunState.read(checkpoint.meta, path)
        now = self._state(before.steps)
        check_settings(checkpoint.meta, before, now, self.model, path)
        longer = check_epochs(before, self.epochs, self.schedule)
        self._take_over(checkpoint)
        self.progress, self._data = before.progress, before.data
        if self.keeper is not None:
            self.keeper.newest = path, read_at
        if before.limits and differences(before.limits, now.limits):
            self.progress.stopped = ""  # it may go on now
        if longer:
            self._remark(longer)
        if other := differences(before.machine, now.machine) if before.machine else []:
            self._remark(f"goes on with other {'; '.join(other)}: the numbers agree but for rounding")

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Take over parameters, their average, and the optimizer's state."""
        self.model.load_state_dict(checkpoint.under("model"))
        self.opt.load_state_dict(checkpoint.under("optimizer"))
        self.step.load_state_dict(checkpoint.under("step"))
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.under("ema"))

    def _state(self, total: int) -> RunState:
        """Return what a checkpoint keeps of the run as it stands, as one of ``total`` steps."""
        team = self.step.team
        return RunState(
            self.progress,
            run_settings(self.step, self.schedule, None if self.ema is None else self.ema.decay, total),
            self._data,
            machine={"device": team.device, "threads": team.threads, "micro-batches": team.micro_batch}
            | ({self.step.crew.called: self.step.crew.count} if self.step.crew.count > 1 else {}),
            limits={"patience": self.patience, "max_seconds": self.max_seconds},
        )
