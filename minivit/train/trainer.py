"""A training run: epochs of steps, evaluation, a run folder, and checkpoints from which it continues bit by bit."""

from __future__ import annotations

import contextlib
import itertools
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minivit import ops
from minivit.backend import Array
from minivit.data.loader import Loader
from minivit.errors import CheckpointError, ConfigError, DataError, NonFiniteError, unknown_name
from minivit.models import Model
from minivit.nn.module import Module
from minivit.ops.loss import check_labels
from minivit.train.ema import EMA
from minivit.train.identity import differences, plain, settings_of
from minivit.train.lock import RunLock
from minivit.train.optim import Optimizer
from minivit.train.records import Records, Row
from minivit.train.schedule import Schedule
from minivit.train.signals import Stop, StopSignals
from minivit.train.step import TrainStep, predict_logits
from minivit.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sweep


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
    right: int | None = 0  # whose largest logit was their label's; None where labels are mixed
    seconds: float = 0.0
    lr: float = 0.0  # of the last step
    skipped: int = 0  # batches in a row that were left out, because their loss was not finite
    stopped: str = ""  # why the run is over before its last epoch
    best: Row | None = None  # the row of the best epoch: see Trainer
    history: list[Row] = field(default_factory=list)  # a row for each finished epoch

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be, because a checkpoint may say anything."""
        counts = [self.epoch, self.batches, self.batch, self.images, self.skipped, self.right or 0]
        rows = self.history if self.best is None else [*self.history, self.best]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in counts) or not isinstance(self.stopped, str):
            raise ValueError("counts that are none")
        numbers = [self.loss_sum, self.seconds, self.lr]
        for row in rows:
            numbers += [row["epoch"], row["step"], row["lr"], row["loss"], row["seconds"], row["images_per_second"]]
            numbers += [row[key] for key in ("accuracy", "valid_loss", "valid_accuracy") if key in row]
        if not all(type(x) in (int, float) for x in numbers) or len(self.history) != self.epoch:
            raise ValueError("figures that are none")


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
    ``meta["train"]``. ``quiet`` shows no progress.

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
        self.lock = RunLock(self.folder)
        self._newest: tuple[Path, Stamp] | None = None  # the checkpoint that was read or saved last, as it was then
        self._data: dict[str, Any] = {}  # what is trained on, and validated with: see check_data

    def fit(self, train: Batches, valid: Batches | None = None) -> list[Row]:
        """Train from where the run stands to the end of the last epoch; return the rows of all its epochs.

        A row has epoch, step, lr, loss and accuracy (both over the epoch's images as they were trained on; no accuracy
        where labels are mixed), images_per_second, seconds, and with ``valid`` valid_loss and valid_accuracy, as
        :func:`evaluate` measures them. Raises NonFiniteError before an update that would spoil the parameters, unless
        ``on_nan`` says otherwise; CheckpointError for data that are not those of the run's start, or a folder that has
        gone on without this Trainer. In the main thread, with a folder, Ctrl-C, SIGTERM or SIGHUP ends the run after
        the step under way: it is saved, and SystemExit raised with code 130, 143 or 129. A second one acts at once.
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
        if self.folder is not None or self._data:
            self._data = self.check_data(train, valid)
        with self._prepared_folder(), StopSignals(self.folder is not None) as signals:  # where there is one to save in
            p.batches = len(train)
            for _, labels in itertools.islice(valid.batches(0), 1) if valid is not None else ():
                _check_classes(labels, self._classes())  # here, not after an epoch
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
                    right = self.step.right
                    p.right = None if p.right is None or right is None else p.right + right
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
        is_best = valid is not None and (p.best is None or _worth(row) > _worth(p.best))
        best = row if is_best else p.best
        if self.patience is not None and best is not None and row["epoch"] - best["epoch"] >= self.patience:
            stopped = stopped or f"nothing better on the validation images in {self.patience} epochs"
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

    def _tell(self, text: str) -> None:
        """Print a remark about the run, unless it is quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _row(self) -> Row:
        p = self.progress
        row = {"epoch": p.epoch + 1, "step": self.opt.steps, "lr": p.lr, "loss": p.loss_sum / max(p.images, 1)}
        if p.right is not None:
            row["accuracy"] = p.right / max(p.images, 1)
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

        Model, optimizer, loss, loaders and settings must be made as for the run's start; what differs is named. Only
        ``save_every``, ``on_nan``, ``patience``, ``max_seconds`` and ``quiet`` may be others; ``epochs`` too, with the
        run's own ``schedule``: after its end the rate stays what it is there, or is ``opt.lr`` where there is none.
        Other threads, micro-batches or another device are told: the numbers then agree but for rounding.

        In the run's own folder nothing is lost: where last.npz is further on than ``path``, ``fit`` refuses. Raises
        CheckpointError if the checkpoint does not fit, ConfigError for ``epochs`` that it cannot go on to.
        """
        path = Path(path)
        stamp = _stamp(path)
        checkpoint = load_checkpoint(path)
        try:
            state = dict(checkpoint.meta["train"])
            settings = dict(state.pop("settings"))
            data, machine, limits = (dict(state.pop(name, {})) for name in ("data", "machine", "limits"))
            if "right" not in state and state["images"]:
                state["right"] = None  # by a version that did not count them, in the middle of an epoch
            progress = Progress(**state)
            total = settings["total steps"]
            own = self._settings(total)
            epochs = total // max(progress.batches, 1)
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise CheckpointError(f"{path} holds no training run", "resume from a run's last.npz") from error
        found = [text for name in own if name in settings for text in differences(settings[name], own[name], name)]
        found += differences(_but_seed(checkpoint.meta.get("model")), _but_seed(self._config()), "model")
        if found:
            remedy = "make model, optimizer, loss and Trainer as for the run's start"
            raise CheckpointError(f"{path} was trained with other settings: {'; '.join(found)}", remedy)
        self._check_epochs(progress, epochs)
        self._take_over(checkpoint)
        self.progress, self._data, self._newest = progress, data, (path, stamp)
        if progress.stopped and limits and differences(limits, self._limits()):
            self.progress.stopped = ""  # it may go on now
        if other := differences(machine, self._machine()) if machine else []:
            self._tell(f"goes on with other {'; '.join(other)}: the numbers agree but for rounding")

    def _check_epochs(self, progress: Progress, before: int) -> None:
        """Check that a run for ``before`` epochs can be one for ``self.epochs``, and say at what learning rate."""
        begun = progress.epoch + (progress.batch > 0)
        if self.epochs < begun:
            raise ConfigError(f"epochs={self.epochs}: the run is in epoch {begun} already", f"give {begun} or more")
        if self.epochs > before and self.schedule is not None:
            first, last = self.schedule(before * progress.batches), self.schedule(self.epochs * progress.batches - 1)
            if first == last == 0.0:
                what = f"epochs={self.epochs}: the learning rate is 0 after epoch {before}, more would change nothing"
                raise ConfigError(what, "start a new run, with that many epochs or from this one's parameters")
            rate = f"{first:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
            self._tell(f"{self.epochs} epochs instead of {before}: the learning rate after epoch {before} is {rate}")

    def check_data(self, train: Batches, valid: Batches | None) -> dict[str, Any]:
        """Return what is trained on and validated with, as a checkpoint keeps it.

        Of a :class:`~minivit.data.Loader` that is all its settings and the SHA-256 of its images and labels, as they
        are decoded; of other batches nothing is known. Raises CheckpointError if it is not what the run has had so far.
        """
        own: dict[str, Any] = {"training": settings_of(train) if isinstance(train, Loader) else None}
        own["validation"] = plain(valid.dataset) if isinstance(valid, Loader) else None if valid is not None else "none"
        known = [name for name in own if None not in (self._data.get(name), own[name])]
        if found := [text for name in known for text in differences(self._data[name], own[name], name)]:
            remedy = "bring the data and the loaders' settings back, or start a new run from the parameters"
            raise CheckpointError(f"the run has had other data so far: {'; '.join(found)}", remedy)
        return own

    def _take_over(self, checkpoint: Checkpoint) -> None:
        """Take over parameters, their average, and the optimizer's state."""
        self.model.load_state_dict(checkpoint.under("model"))
        self.opt.load_state_dict(checkpoint.under("optimizer"))
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint.under("ema"))

    def _settings(self, total: int) -> dict[str, Any]:
        """Return what must be equal for a resumed run to be the same; the rates at some of its ``total`` steps."""
        clip, rate = self.step.clip_norm, self.schedule
        loss = self.step.loss if isinstance(self.step.loss, partial) else partial(self.step.loss)
        keywords = dict(loss.keywords)
        smoothing = float(keywords.pop("smoothing", 0.0))

        def rates(steps: Iterable[int]) -> list[str] | None:
            # rounded: the last bit of a cosine is not the same on every machine
            return None if rate is None else [f"{rate(t):.6g}" for t in steps]

        return {
            "dtype": str(next(self.model.parameters()).dtype),
            "seed": self.seed,
            "optimizer": type(self.opt).__name__,
            "optimizer settings": settings_of(self.opt, "named_parameters", "lr", "weight_decay", "lr_scales"),
            "factors on the learning rate": [[group.stop, group.scale] for group in self.opt.groups],
            "ema": None if self.ema is None else self.ema.decay,
            "weight decay": float(self.opt.weight_decay),
            "clip_norm": None if clip is None else float(clip),
            "loss": plain(partial(loss.func, *loss.args, **keywords)),
            "smoothing": smoothing,
            "learning rates": rates((0, total // 4, total // 2, total - 1)),
            "more learning rates": rates(range(0, total, max(1, total // 32))),
            "total steps": total,
        }

    def _config(self) -> Any:
        """Return the model's settings, if it has them."""
        return plain(getattr(self.model, "config", None))

    def _machine(self) -> dict[str, Any]:
        """Return what the last bits of the numbers depend on, besides the settings."""
        team = self.step.team
        return {"device": team.device, "threads": team.threads, "micro-batches": team.micro_batch}

    def _limits(self) -> dict[str, Any]:
        """Return what ends a run early."""
        return {"patience": self.patience, "max_seconds": self.max_seconds}

    def _save(self, name: str) -> None:
        if self.folder is not None:
            self.records.flush()
            arrays = {f"model/{k}": v for k, v in self.model.state_dict().items()}
            if self.ema is not None:
                arrays |= {f"ema/{k}": v for k, v in self.ema.state_dict().items()}
            arrays |= {f"optimizer/{k}": v for k, v in self.opt.state_dict().items()}
            config = {} if self._config() is None else {"model": self._config()}
            if isinstance(self.model, Model):
                config["kind"] = self.model.kind
            settings = self._settings(self.epochs * self.progress.batches)
            known = {"data": self._data, "machine": self._machine(), "limits": self._limits()}
            train = {"settings": settings, **known, **asdict(self.progress)}
            path = self._checkpoint(name)
            save_checkpoint(path, arrays, config | self.meta | {"train": train})
            if name == "last":
                self._newest = path, _stamp(path)

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
        with self.lock:
            self.check_folder()
            sweep(self.folder)
            self.records.begin(self.progress.batch, self.progress.history)
            yield

    def check_folder(self) -> None:
        """Check that the folder holds no more than this run, as far as it has come: `fit` does, under the lock.

        Raises ConfigError for another run's folder, CheckpointError where what is newer would be lost.
        """
        if self.folder is None:
            return
        last = self._checkpoint("last")
        path, stamp = self._newest or (None, None)
        if path is None or path.resolve().parent != last.resolve().parent:
            if last.exists():
                remedy = f"continue it: {self._how_to_resume()}, or name another folder"
                raise ConfigError(f"{self.folder} already holds a run", remedy)
        elif _stamp(path) != stamp:
            what = f"{path} has changed since then: another process has gone on with the run"
            raise CheckpointError(what, f"resume it again: {self._how_to_resume()}")
        elif path.name != last.name and (steps := _steps_in(last)) > self.opt.steps:
            what = f"{path} is at step {self.opt.steps:,}, {last.name} at step {steps:,}: what is newer would be lost"
            remedy = f"continue from the newest: {self._how_to_resume()}; or copy the run's folder without {last.name}"
            raise CheckpointError(what, remedy)


def _but_seed(config: Any) -> Any:
    """Return a model's settings but for the seed of its first parameters, which are not those of a checkpoint."""
    return {"kind": "model"} | {k: v for k, v in config.items() if k != "seed"} if isinstance(config, dict) else None


Stamp = tuple[int, int, int] | None
"""What changes when a file is replaced; None if there is none."""


def _stamp(path: Path) -> Stamp:
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


def evaluate(
    model: Module, loader: Batches, after_batch: Callable[[], None] | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Return loss (mean cross-entropy), accuracy, count, logits (N, K) and labels (N,) over a loader's epoch 0.

    The loss is the plain one, whatever was trained with, so that runs can be compared. ``after_batch`` is called after
    each batch; what it raises ends the evaluation. Raises DataError for no images or labels that are not integers.
    """
    logits, labels = [], []
    for images, targets in loader.batches(0):
        _check_classes(targets)
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


def _check_classes(labels: Array, classes: int | None = None) -> None:
    """Raise DataError unless labels to validate with are numbers of classes; of a model's ``classes``, if given."""
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"evaluation needs a class for each image, not {labels.dtype} labels of shape {labels.shape}",
            "give the validation images integer labels (N,): soft ones are for training",
        )
    if classes is not None:
        check_labels(labels, classes)


def _worth(row: Row) -> tuple[float, float]:
    """Return what is larger for a better epoch."""
    return row["valid_accuracy"], -row["valid_loss"]


def _describe(row: Row) -> str:
    """Return a row as text; what matters most comes first, because a narrow terminal cuts the rest."""
    parts = []
    for name, form in (("accuracy", ".2%"), ("loss", ".4f")):
        if name in row:
            parts.append(f"{name} {row[name]:{form}}")
        if f"valid_{name}" in row:
            parts.append(f"valid{'' if name in row else f' {name}'} {row[f'valid_{name}']:{form}}")
    return f"{', '.join(parts)}, lr {row['lr']:.2e}, {row['images_per_second']:,.0f} images/s"
