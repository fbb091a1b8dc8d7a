"""A training run: epochs of steps, evaluation, a run folder, and checkpoints from which it continues bit by bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minivit import ops
from minivit.backend import Array
from minivit.errors import CheckpointError, ConfigError, DataError, NonFiniteError, unknown_name
from minivit.nn.module import Module
from minivit.ops.loss import check_labels
from minivit.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sweep
from minivit.train.ema import EMA
from minivit.train.lock import RunLock
from minivit.train.optim import Optimizer
from minivit.train.records import Records, Row
from minivit.train.schedule import Schedule
from minivit.train.signals import Stop, StopSignals
from minivit.train.step import TrainStep, predict_logits


class Batches(Protocol):
    """What is trained on: a :class:`minivit.data.Loader`, or whatever yields the same batches for the same epoch."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """Yield (images, labels) of an epoch (from 0) from its batch ``start`` on."""
        ...


@dataclass
class Progress:
    """Where a run stands: what continues it exactly, besides parameters, optimizer state and seed."""

    epoch: int = 0  # epochs finished
    batches: int = 0  # batches in an epoch; 0 before training has begun
    batch: int = 0  # batches done of the epoch under way, and over these:
    images: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    lr: float = 0.0  # of the last step
    skipped: int = 0  # batches in a row that were left out, because their loss was not finite
    stopped: str = ""  # why the run is over before its last epoch
    best: Row | None = None  # the row of the epoch with the highest validation accuracy
    history: list[Row] = field(default_factory=list)  # a row for each finished epoch

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be, because a checkpoint may say anything."""
        counts = [self.epoch, self.batches, self.batch, self.images, self.skipped]
        rows = self.history if self.best is None else [*self.history, self.best]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in counts) or not isinstance(self.stopped, str):
            raise ValueError("counts that are none")
        numbers = [self.loss_sum, self.seconds, self.lr]
        for row in rows:
            numbers += [row["epoch"], row["step"], row["lr"], row["loss"], row["seconds"], row["images_per_second"]]
            numbers += [row[key] for key in ("valid_loss", "valid_accuracy") if key in row]
        if not all(type(x) in (int, float) for x in numbers) or len(self.history) != self.epoch:
            raise ValueError("figures that are none")


ON_NAN = ("stop", "skip", "rollback")
MOST_SKIPPED = 10  # batches in a row: more are no accident


class Trainer:
    """Trains ``model`` with ``opt`` for ``epochs`` epochs; ``loss``, ``threads``, … as :class:`TrainStep` takes them.

    ``schedule`` maps the number of updates made to the learning rate of the next one (default: ``opt.lr`` as it is).
    ``ema`` evaluates and keeps, beside the parameters, their :class:`~minivit.train.ema.EMA` of that decay. A run ends
    early after ``patience`` epochs without a better validation accuracy, or ``max_seconds`` of training. ``on_nan``
    says what a loss or gradient does that is not finite: "stop" raises NonFiniteError, "skip" leaves the batch out,
    "rollback" takes parameters and optimizer back to the epoch's start (checkpoints/epoch.npz) and goes on with the
    next batch. The parameters are never touched by it, and ten in a row stop the run.

    With a ``folder`` the run keeps there

    - ``checkpoints/last.npz`` after every epoch, every ``save_every`` steps, and on Ctrl-C or SIGTERM;
    - ``checkpoints/best.npz``, the epoch with the highest validation accuracy, if there is a validation set;
    - ``metrics.jsonl``, a line for each step and each epoch, and ``results.csv``, a row for each epoch.

    ``meta`` is stored in the checkpoints, beside the model's ``config`` as ``meta["model"]`` and the run's state as
    ``meta["train"]``. ``quiet`` shows no progress.
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
        quiet: bool = False,
    ) -> None:
        if epochs < 1 or (save_every is not None and save_every < 1):
            raise ConfigError(f"epochs={epochs}, save_every={save_every}", "each must be at least 1")
        if (patience is not None and patience < 1) or (max_seconds is not None and not max_seconds > 0):
            raise ConfigError(f"patience={patience}, max_seconds={max_seconds}", "each must be positive, or None")
        if on_nan not in ON_NAN:
            raise unknown_name("on_nan", on_nan, ON_NAN)
        if on_nan == "rollback" and folder is None:
            raise ConfigError("on_nan='rollback' without a folder", "give a folder: there is no checkpoint without one")
        self.model, self.opt, self.schedule, self.epochs, self.seed = model, opt, schedule, epochs, seed
        self.folder = None if folder is None else Path(folder)
        self.save_every, self.meta, self.quiet = save_every, dict(meta or {}), quiet
        self.patience, self.max_seconds, self.on_nan = patience, max_seconds, on_nan
        self.ema = None if ema is None else EMA(opt, ema)
        self.step = TrainStep(model, opt, loss, threads, micro_batch, clip_norm, seed)
        self.records = Records(self.folder)
        self.progress = Progress()

    def fit(self, train: Batches, valid: Batches | None = None) -> list[Row]:
        """Train from where the run stands to the end of the last epoch; return the rows of all its epochs.

        A row has epoch, step, lr, loss (the mean over the epoch's images as they were trained on), images_per_second,
        seconds, and with ``valid`` valid_loss and valid_accuracy, as :func:`evaluate` measures them. Raises
        NonFiniteError before an update that would spoil the parameters, unless ``on_nan`` says otherwise. In the main
        thread, with a folder, Ctrl-C or SIGTERM ends the run after the step under way: it is saved, and SystemExit
        raised with code 130 or 143. A second one acts at once.
        """
        p = self.progress
        if len(train) < 1 or (valid is not None and len(valid) < 1):
            raise DataError("a loader without a batch", "give at least one image to train on, and to validate with")
        if p.batches not in (0, len(train)):
            raise ConfigError(
                f"the run had {p.batches} batches in an epoch, now there are {len(train)}",
                "continue it with the data and the batch size that it was started with",
            )
        if self.patience is not None and valid is None:
            raise ConfigError(f"patience={self.patience} without validation images", "give some, or no patience")
        with self._prepared_folder(), StopSignals(self.folder is not None) as signals:  # where there is one to save in
            p.batches = len(train)
            for _, labels in itertools.islice(valid.batches(0), 1) if valid is not None else ():
                self._check_labels(labels)  # here, not after an epoch
            try:
                while self.progress.epoch < self.epochs and not self.progress.stopped:
                    self._train_epoch(train, valid, signals.raise_if_noted)
            except Stop as stop:
                self._save("last")
                print(
                    f"stopped and saved after step {self.opt.steps}; continue with\n  {self._how_to_resume()}",
                    file=sys.stderr,
                )
                raise SystemExit(stop.code) from None
            finally:
                self.records.flush()
        return self.progress.history

    def averaged(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model has the averaged parameters, if the run averages them."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped()

    def _train_epoch(self, train: Batches, valid: Batches | None, stop_if_asked: Callable[[], None]) -> None:
        p, stopped = self.progress, ""
        if self.on_nan == "rollback" and p.batch == 0:
            self._save("epoch")
        with self._bar() as bar:
            started = time.perf_counter() - p.seconds
            before = sum(row["seconds"] for row in p.history)
            for images, labels in train.batches(p.epoch, start=p.batch):
                if self.schedule is not None:
                    self.opt.lr = self.schedule(self.opt.steps)
                loss = self._step(images, labels)
                p.batch, p.lr, p.seconds = p.batch + 1, self.opt.lr, time.perf_counter() - started
                if loss is not None:
                    p.images, p.loss_sum = p.images + len(labels), p.loss_sum + loss * len(labels)
                    row = self._row()
                    self.records.log(row | {"batch": p.batch, "batch_loss": loss, "grad_norm": self.step.grad_norm})
                    bar.set_postfix_str(_describe(row), refresh=False)
                bar.update()
                if self.save_every and self.opt.steps % self.save_every == 0:
                    self._save("last")
                stop_if_asked()
                if self.max_seconds is not None and before + p.seconds >= self.max_seconds:
                    stopped = "its time is up"
                    break
            row = self._row()
            if valid is not None:
                with self.averaged():
                    result = evaluate(self.model, valid, stop_if_asked, self.step.team.threads)
                row |= {"valid_loss": result["loss"], "valid_accuracy": result["accuracy"]}
            bar.set_postfix_str(_describe(row))
        if not (self.quiet or sys.stderr.isatty()):
            print(f"{self._title()}{_describe(row)}", file=sys.stderr, flush=True)
        is_best = valid is not None and (p.best is None or row["valid_accuracy"] > p.best["valid_accuracy"])
        best = row if is_best else p.best
        if self.patience is not None and best is not None and row["epoch"] - best["epoch"] >= self.patience:
            stopped = stopped or f"no better validation accuracy in {self.patience} epochs"
        history = [*p.history, row]
        self.progress = Progress(p.epoch + 1, p.batches, skipped=p.skipped, best=best, stopped=stopped, history=history)
        self.records.log(row)
        if is_best:  # before last.npz, which says that it is there
            self._save("best")
        self._save("last")
        self.records.write_results(self.progress.history)
        if stopped:
            self._tell(f"stopped after epoch {row['epoch']}: {stopped}")
        stop_if_asked()

    def _step(self, images: Array, labels: Array) -> float | None:
        """Make a step and return its loss; None if the batch had to be left out."""
        p, first = self.progress, self.opt.steps == 0
        try:
            loss = self.step(images, labels)
        except NonFiniteError as error:
            p.skipped += 1
            if self.on_nan == "stop" or p.skipped >= MOST_SKIPPED:
                raise
            if self.on_nan == "rollback":
                self._take_over(load_checkpoint(self._checkpoint("epoch")))
            self._tell(f"batch {p.batch + 1} of epoch {p.epoch + 1} left out: {error.what}")
            row = {"epoch": p.epoch + 1, "step": self.opt.steps, "batch": p.batch + 1, "left_out": error.what}
            self.records.log(row)
            return None
        p.skipped = 0
        if self.ema is not None:
            average = self.ema.update_spans
            self.step.team.spread(lambda start, stop: average([(start, stop)]), self.opt.flat.size)
        if first and (classes := self._classes()) is not None and loss > 1.5 * math.log(classes) + 0.5:
            guess = f"a guess among {classes} classes has {math.log(classes):.2f}"
            self._tell(f"warning: the first loss is {loss:.2f}, {guess}: look at the labels and the first weights")
        return loss

    def _classes(self) -> int | None:
        """Return the number of the model's classes, if it says so."""
        return getattr(self.model, "config", {}).get("num_classes")

    def _check_labels(self, labels: Array) -> None:
        _check_labels(labels)
        if (classes := self._classes()) is not None:
            check_labels(labels, classes)

    def _tell(self, text: str) -> None:
        """Print a remark about the run, unless it is quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _row(self) -> Row:
        p = self.progress
        row = {"epoch": p.epoch + 1, "step": self.opt.steps, "lr": p.lr, "loss": p.loss_sum / max(p.images, 1)}
        return row | {"images_per_second": p.images / max(p.seconds, 1e-9), "seconds": p.seconds}

    def _title(self) -> str:
        return f"epoch {self.progress.epoch + 1:{len(str(self.epochs))}}/{self.epochs}  "

    def _bar(self) -> Any:
        from tqdm import tqdm  # late: to import it takes a while

        columns, rows = shutil.get_terminal_size()  # unlike tqdm's own guess never 0
        return tqdm(
            total=self.progress.batches,
            initial=self.progress.batch,
            desc=self._title(),
            bar_format="{desc}{bar} {percentage:3.0f}% {elapsed}<{remaining}{postfix}",
            ncols=min(columns - 1, 120),  # what is last in the postfix is cut first
            nrows=rows,
            disable=self.quiet or not sys.stderr.isatty(),
        )

    # ---- saving and resuming ----

    def resume(self, path: str | Path) -> None:
        """Take over parameters, optimizer state and position of a run from its checkpoint; ``fit`` then continues it.

        Model, optimizer, loaders and settings must be made as for the run's start; only ``epochs`` may be another,
        where the learning rates do not follow from it. Without a schedule the rate is ``opt.lr``. In the run's own
        folder, records of what came after the checkpoint are dropped. Raises CheckpointError if the checkpoint does not
        fit.
        """
        checkpoint = load_checkpoint(path)
        try:
            state = dict(checkpoint.meta["train"])
            settings = dict(state.pop("settings"))
            progress = Progress(**state)
            own = self._settings(settings["total steps"])
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise CheckpointError(f"{path} holds no training run", "resume from a run's last.npz") from error
        if differ := [
            f"{name} {settings.get(name)}, not {own[name]}" for name in own if settings.get(name) != own[name]
        ]:
            remedy = "make model, optimizer and Trainer as for the run's start"
            raise CheckpointError(f"{path} was trained with {'; '.join(differ)}", remedy)
        self._take_over(checkpoint)
        self.progress = progress

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Take over parameters, their average, and the optimizer's state."""
        self.model.load_state_dict(checkpoint.under("model"))
        self.opt.load_state_dict(checkpoint.under("optimizer"))
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.under("ema"))

    def _settings(self, total: int) -> dict[str, Any]:
        """Return what must be equal for a resumed run to be the same; the rates at some of its ``total`` steps."""
        loss, clip, rate = self.step.loss, self.step.clip_norm, self.schedule
        steps = (0, total // 4, total // 2, total - 1)
        return {
            "dtype": str(next(self.model.parameters()).dtype),
            "seed": self.seed,
            "optimizer": type(self.opt).__name__,
            "ema": None if self.ema is None else self.ema.decay,
            "weight decay": float(self.opt.weight_decay),
            "clip_norm": None if clip is None else float(clip),
            "smoothing": float(loss.keywords.get("smoothing", 0.0)) if isinstance(loss, partial) else 0.0,
            # rounded: the last bit of a cosine is not the same on every machine
            "learning rates": None if rate is None else [f"{rate(t):.6g}" for t in steps],
            "total steps": total,
        }

    def _save(self, name: str) -> None:
        if self.folder is not None:
            self.records.flush()
            arrays = {f"model/{k}": v for k, v in self.model.state_dict().items()}
            if self.ema is not None:
                arrays |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()}
            arrays |= {f"optimizer/{k}": v for k, v in self.opt.state_dict().items()}
            config = {"model": self.model.config} if hasattr(self.model, "config") else {}
            settings = self._settings(self.epochs * self.progress.batches)
            train = {"settings": settings, **asdict(self.progress)}
            save_checkpoint(self._checkpoint(name), arrays, config | self.meta | {"train": train})

    def _checkpoint(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "checkpoints" / f"{name}.npz"

    def _how_to_resume(self) -> str:
        """Return what continues the run: a command only if the command line has made it."""
        last = self._checkpoint("last")
        by_command = (last.parents[1] / "config.toml").exists()
        return f"minivit train --resume {shlex.quote(str(last))}" if by_command else f"Trainer.resume({str(last)!r})"

    @contextlib.contextmanager
    def _prepared_folder(self) -> Iterator[None]:
        """Make the run's folder ready, and hold it against other processes."""
        if self.folder is None:
            yield
            return
        with RunLock(self.folder):
            if not self.progress.batches and self._checkpoint("last").exists():
                remedy = f"continue it: {self._how_to_resume()}, or name another folder"
                raise ConfigError(f"{self.folder} already holds a run", remedy)
            sweep(self.folder)
            self.records.begin(self.progress.batch, self.progress.history)
            yield


def evaluate(
    model: Module, loader: Batches, after_batch: Callable[[], None] | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Return loss (mean cross-entropy), accuracy, count, logits (N, K) and labels (N,) over a loader's epoch 0.

    The loss is the plain one, whatever was trained with, so that runs can be compared. ``after_batch`` is called after
    each batch; what it raises ends the evaluation. Raises DataError for no images or labels that are not integers.
    """
    logits, labels = [], []
    for images, targets in loader.batches(0):
        _check_labels(targets)
        logits.append(predict_logits(model, images, threads))
        labels.append(targets)
        if after_batch is not None:
            after_batch()
    if not logits:
        raise DataError("there is nothing to evaluate on", "give at least one image")
    x, y = np.concatenate(logits), np.concatenate(labels)  # (N, K), (N,)
    loss = float(ops.cross_entropy(x, y))  # before the accuracy, because it checks that the shapes fit
    accuracy = float((x.argmax(axis=-1) == y).mean())
    return {"loss": loss, "accuracy": accuracy, "count": len(y), "logits": x, "labels": y}


def _check_labels(labels: Array) -> None:
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"evaluation needs a class for each image, not {labels.dtype} labels of shape {labels.shape}",
            "give the validation images integer labels (N,): soft ones are for training",
        )


def _describe(row: Row) -> str:
    valid = f", valid loss {row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}" if "valid_loss" in row else ""
    return f"loss {row['loss']:.4f}{valid}, lr {row['lr']:.2e}, {row['images_per_second']:,.0f} images/s"
