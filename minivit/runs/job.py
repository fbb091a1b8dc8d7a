"""A training run: made from its settings, kept in a folder, carried to its test accuracy and its pictures."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minivit import data, ops
from minivit.backend import Key, auto_device, available_memory, keep_freed_memory, permutation
from minivit.data import (
    Affine,
    Augment,
    Chain,
    ColorJitter,
    Crop,
    Dataset,
    Flip,
    Loader,
    Mix,
    RandAugment,
    RandomErasing,
    RandomResizedCrop,
)
from minivit.data.datasets import class_names, splits_of
from minivit.errors import CheckpointError, ConfigError, DataError, MisfitError, printable
from minivit.files import replacing
from minivit.measure.costs import peak_memory
from minivit.measure.machine import blas_text, cpu_text, system_text, versions
from minivit.measure.metrics import classification_metrics
from minivit.models import Model, build, count_parameters, described_settings
from minivit.nn.rules import pair, rate
from minivit.runs.results import draw_batch, spread_out, write_results
from minivit.runs.settings import Settings, assignments, fit_to_data, parse_assignment, read_toml, resolve, write_toml
from minivit.runs.trained import find_checkpoint
from minivit.show.text import bytes_text, percent_interval, plural
from minivit.train import schedule
from minivit.train.lock import RunLock
from minivit.train.optim import SGD, AdamW, Muon, Optimizer, layer_scales
from minivit.train.schedule import Schedule
from minivit.train.signals import Stop, StopSignals
from minivit.train.step import Team
from minivit.train.trainer import Trainer, evaluate
from minivit.weights.checkpoint import load_checkpoint
from minivit.weights.native import data_meta, load_weights
from minivit.weights.transfer import init_from

TRAIN_STREAM, HOLD_OUT_STREAM = 0x7A1, 0x0FF  # streams of random numbers under the run's seed


def start(args: argparse.Namespace) -> int:
    """Start a run in a folder of its own."""
    job = Job(resolve(typed_settings(args), args.recipe, args.config), args.quiet)
    if args.dry_run:
        return job.try_out()
    folder = make_folder(Path(args.output), args.name, stem=job.title)
    with RunLock(folder) as lock:
        _write_text(folder / "config.toml", write_toml(job.settings))
        _write_text(folder / "command.txt", _command_record(args.argv, job.settings["train.device"]))
        job.say(printable(f"run folder  {folder}"))
        job.say(printable(f"reproduce   minivit train --config {shlex.quote(str(folder / 'config.toml'))}") + "\n")
        job.draw_samples(folder)
        return job.run(folder, lock)


MAY_CHANGE = (
    "data.name", "data.bad_images",  # where the images are; that they are the same is checked by their content
    "train.init_from", "model.recompute",  # what a run in progress does not depend on
    "train.epochs", "train.patience", "train.max_time", "train.on_nan", "train.save_every",
    "train.device", "train.threads", "train.micro_batch",  # which the run tells: the numbers agree but for rounding
)  # fmt: skip
"""The settings that need not be the same when a run is resumed."""


def resume(args: argparse.Namespace) -> int:
    """Continue a run where its checkpoint stands, in its folder, with its settings but for those in MAY_CHANGE."""
    typed = typed_settings(args)
    given = {**typed, "--recipe": args.recipe, "--config": args.config, "--name": args.name}
    given["--dry-run"] = args.dry_run or None
    if refused := [key for key, value in given.items() if value is not None and key not in MAY_CHANGE]:
        raise ConfigError(
            f"--resume continues a run with the settings it was started with: {refused[0]} cannot be set",
            "leave it out, or start a new run: minivit train --config RUN/config.toml …",
        )
    path = Path(args.resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.npz"
    elif path.parent == Path():  # a file in the folder where the command runs
        path = path.absolute()
    folder = path.parent.parent
    config = folder / "config.toml"
    if not path.exists() and config.is_file():
        if (best := path.with_name("best.npz")).is_file():
            again = f"continue from its best epoch: minivit train --resume {shlex.quote(str(best))}"
            raise CheckpointError(f"{args.resume} has no {path.name}", again)
        again = f"start it again: minivit train --config {shlex.quote(str(config))}"
        raise CheckpointError(f"{args.resume} has no checkpoint yet", again)
    if not path.is_file() or not config.is_file():
        raise CheckpointError(f"{args.resume} is no run, nor a checkpoint of one", "give runs/NAME, or its last.npz")
    with RunLock(folder) as lock:  # before anything is read that another process may be changing
        meta = load_checkpoint(path).meta
        settings = settings_of_run(folder, meta, typed)
        _make_absolute(settings)
        remarks = _compare_settings(settings, meta, folder)
        job = Job(settings, args.quiet, resumed=True)
        job.say(printable(f"run folder  {folder}"))
        for remark in remarks:
            job.say(printable(remark))
        job.say("")
        return job.run(folder, lock, path, meta)


def settings_of_run(folder: Path, meta: Mapping[str, Any], typed: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of the run in ``folder``, of which a checkpoint has ``meta``, but for those ``typed``.

    What its config.toml does not name is as the checkpoint has it.
    """
    file = folder / "config.toml"
    settings = resolve(typed or {}, file=file)
    named = read_toml(file).keys() | (typed or {}).keys()
    kept = _kept(meta) or {"data.layout": 1}  # version 0.1.0 kept none, and knew no other layout
    settings.take({key: value for key, value in kept.items() if "." in key and key not in named}, "the run's start")
    return settings


def _kept(meta: Mapping[str, Any]) -> Settings:
    """Return the settings that a checkpoint keeps, with their origins: none, if it is of the first version."""
    kept = Settings()
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


def _compare_settings(settings: Settings, meta: Mapping[str, Any], folder: Path) -> list[str]:
    """Hold ``settings`` against those that a checkpoint of the run in ``folder`` keeps; return remarks on what changes.

    What is as it was gets the origin that it had. Raises CheckpointError, with each difference, for what may not
    change; ConfigError for epochs in which nothing would change.
    """
    before = _kept(meta)
    try:
        train = meta["train"]
        epochs = int(before.get("train.epochs") or train["settings"]["total steps"] // train["batches"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its checkpoint holds no training run", "use last.npz of a run") from error
    scheduled = before.get("train.schedule_epochs") or epochs
    if settings["train.epochs"] != epochs and not settings["train.schedule_epochs"]:
        settings.take({"train.schedule_epochs": scheduled}, "train.epochs when the run began")
    remarks, found = [], []
    for key, old in before.items():
        new = settings.get(key)
        if old == new:
            settings.origins[key] = before.origins.get(key, "")
        elif key == "train.schedule_epochs" and scheduled == (new or settings["train.epochs"]):
            continue
        elif key in MAY_CHANGE:
            remarks.append(f"changed     {key}: {old} → {new}")
        else:
            found.append(f"{key}: {old} → {new}")
    if found:
        what = f"{folder / 'config.toml'} is not as it was when the run began: {'; '.join(found)}"
        remedy = "put the values back, or start a new run: minivit train --config RUN/config.toml"
        raise CheckpointError(what, remedy)
    if settings["train.epochs"] > max(scheduled, epochs) and settings["train.min_lr"] == 0.0:
        what = f"the learning rate comes down to 0 in epoch {scheduled}: more epochs would change nothing"
        again = f"minivit train --config {shlex.quote(str(folder / 'config.toml'))}"
        raise ConfigError(what, f"start anew, for all of them: {again} --epochs {settings['train.epochs']}")
    return remarks


def _make_absolute(settings: Settings) -> None:
    """Make paths absolute, so that the run can be resumed from any folder; a run's folder becomes its checkpoint."""
    paths = {}
    if settings["data.name"] != data.kind_of(settings["data.name"]):
        paths["data.name"] = settings["data.name"]
    if settings["train.init_from"]:
        paths["train.init_from"] = find_checkpoint(settings["train.init_from"])
    for key, path in paths.items():
        settings.take({key: str(Path(path).resolve())}, settings.origins[key])


def typed_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the command line gives, by dotted key."""
    typed = {key: value for key, value in vars(args).items() if "." in key and value is not None}
    if args.source is not None:
        if typed.get("data.name", args.source) != args.source:
            raise ConfigError(f"two data sets: {args.source} and --data {typed['data.name']}", "give one")
        typed["data.name"] = args.source
    return typed | dict(parse_assignment(text) for text in args.set)


# ---- the run ---------------------------------------------------------------------------------------------------------


class Job:
    """What a run needs, made from its settings: data, model and how it is trained."""

    def __init__(self, settings: Settings, quiet: bool, resumed: bool = False) -> None:
        self.settings, self.quiet = settings, quiet
        keep_freed_memory()
        device, why = auto_device(settings["train.device"])
        _make_absolute(settings)
        name, kind = settings["data.name"], data.kind_of(settings["data.name"])
        self.title = printable(Path(name).stem if kind in ("npz", "folder") else kind)
        self.remark = ""
        whole = self._load("train")
        if len(whole.classes) == 1 and not resumed:
            raise DataError(f"{name}: there is only one class, {whole.classes[0]!r}", "give images of two, at least")
        test, valid = (self._load_beside(whole, split) for split in ("test", "val"))
        fit_to_data(settings, whole.images.shape[1:], len(whole.classes))
        if settings["data.overfit"]:
            rates = {f"model.{name}": 0.0 for name, s in described_settings(settings.kind).items() if s.rule is rate}
            settings.take(UNCHANGED | rates, "overfit")
        if settings["train.init_from"] and "model.head" in settings:
            settings.take({"model.head": "linear"}, "init_from")
        kind, values = settings.kind, settings.model_values()
        # float32 weights, gradients and moments, on one thread; and the report's tables of all pairs of classes
        _check_memory(max(20 * count_parameters(kind, values), 40 * values["num_classes"] ** 2), device)
        # a model may have room for more classes than the data name
        names = tuple(class_names(whole.classes, settings["model.num_classes"]))
        self.test_data, own_valid = (part and replace(part, classes=names) for part in (test, valid))
        self.train_data, self.valid_data = self._divide(replace(whole, classes=names), own_valid)
        if settings["train.patience"] and self.valid_data is None:
            raise ConfigError("patience needs validation images", "hold some out: --val-fraction 0.1")
        self.model: Model = build(kind, values).to(device)
        changed: list[str] = []
        if settings["train.init_from"] and not resumed:
            try:
                changed = init_from(self.model, settings["train.init_from"])
            except MisfitError as error:
                raise CheckpointError(
                    error.what, f"make the model with the checkpoint's: {assignments(error.settings)}"
                ) from error
        self.loader = self.make_loader()
        # what "auto" and 0 come to on this machine is kept, because equal bits need the same again
        team, batch_size = Team(self.model, None, settings["train.micro_batch"] or None), settings["train.batch_size"]
        threads = settings["train.threads"] or team.threads_for(self.loader.batch_size)
        micro_batch = min(team.micro_batch or batch_size, batch_size)
        found = {"train.device": device, "train.threads": threads, "train.micro_batch": micro_batch}
        settings.take({key: value for key, value in found.items() if settings[key] != value}, "this machine")
        rows = min(self.loader.batch_size, len(self.train_data))
        self.memory = peak_memory(self.model, Team(self.model, threads, micro_batch), rows)
        self.memory += 4 * self.model.num_parameters() * bool(settings["train.model_ema"])
        _check_memory(self.memory, device)
        self.schedule = self.make_schedule()
        cores = f", {plural(threads, 'thread')}" if device == "cpu" else ""
        self.say(f"device      {device}{cores}" + (f" ({why})" if why else ""))
        self.say(f"model       {settings['model.name']}: {self.model.num_parameters():,} parameters")
        if settings["train.init_from"]:
            self.say(printable(f"started     from {settings['train.init_from']}"))
            for remark in changed:
                self.say(f"            {remark}")
        self.say(f"data        {self._data_text(whole)}")
        if self.remark:
            self.say(f"            {self.remark}")
        self.say(f"training    {self._training_text()}")

    def say(self, text: str) -> None:
        """Print, unless the run is quiet."""
        if not self.quiet:
            print(text, flush=True)

    def _load(self, split: str) -> Dataset:
        """Return a split of the data; image files as the model takes them."""
        s = self.settings
        size = pair("model.image_size", s["model.image_size"]) if s.origins["model.image_size"] != "default" else None
        return data.load(s["data.name"], split, size, s["model.in_channels"], s["data.bad_images"], s["data.layout"])

    def _load_beside(self, whole: Dataset, split: str) -> Dataset | None:
        """Return a split that belongs to the training images, or None if there is no such split."""
        name = self.settings["data.name"]
        if split not in splits_of(name, self.settings["data.layout"]):
            return None
        part = self._load(split)
        if part.images.shape[1:] != whole.images.shape[1:] or part.classes != whole.classes:
            raise DataError(
                f"{name}: {whole.images.shape[1:]} images of {len(whole.classes)} classes to train on, "
                f"{part.images.shape[1:]} of {len(part.classes)} to {'test' if split == 'test' else 'validate'} with",
                "give all splits the same size and classes",
            )
        return part

    def _divide(self, whole: Dataset, valid: Dataset | None) -> tuple[Dataset, Dataset | None]:
        """Return the images to train on, and those to validate with: the data set's own, or some that are held out."""
        s = self.settings
        key = Key(s["train.seed"], HOLD_OUT_STREAM)
        if s["data.overfit"]:
            few = whole.subset(np.sort(permutation(key, len(whole))[: s["data.overfit"]]))
            return few, few
        if valid is not None:
            return whole, valid
        if s["data.val_fraction"] > 0:
            try:
                return whole.split_off(s["data.val_fraction"], key, stratified=s["data.layout"] > 1)
            except DataError as error:  # there are too few images
                if s.origins["data.val_fraction"] == "command line":
                    raise
                self.remark = f"{error.what}; none are held out to validate with"
        return whole, None

    def _data_text(self, whole: Dataset) -> str:
        channels, height, width = whole.images.shape[1:]
        parts = {"to train on": self.train_data, "to validate with": self.valid_data, "to test with": self.test_data}
        counts = ", ".join(f"{len(part):,} {use}" for use, part in parts.items() if part is not None)
        return (
            f"{self.title}: {counts}; "
            f"{height} × {width} pixels, {plural(channels, 'channel')}, {len(whole.classes)} classes"
        )

    def _training_text(self) -> str:
        s = self.settings
        recipe = f"recipe {s['recipe']}: " if s["recipe"] else ""
        epochs, steps = plural(s["train.epochs"], "epoch"), plural(len(self.loader), "step")
        optimizer = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD with momentum"}[s["train.optimizer"]]
        return f"{recipe}{epochs} of {steps}, {optimizer}, learning rate {s['train.lr']:g}"

    def make_loader(self) -> Loader:
        """Return the training batches: the batch size times the batches that make up an update."""
        s = self.settings
        mix = Mix(s["data.mixup"], s["data.cutmix"]) if s["data.mixup"] or s["data.cutmix"] else None
        size = s["train.batch_size"] * s["train.grad_accum_steps"]
        augment = augmentation(s.table("data"), self.train_data.images.shape[1])
        return Loader(self.train_data, size, Key(s["train.seed"], TRAIN_STREAM), augment, mix)

    def held_loader(self, dataset: Dataset) -> Loader:
        """Return batches of other images, standardised like the training images."""
        mean, std = self.train_data.mean, self.train_data.std
        return Loader(dataset, 512, Key(0), mean=mean, std=std, shuffle=False)

    def make_schedule(self) -> Schedule:
        """Return the learning rates of the run."""
        s = self.settings
        total = (s["train.schedule_epochs"] or s["train.epochs"]) * len(self.loader)
        warmup = min(round(s["train.warmup_epochs"] * len(self.loader)), total // 2)  # a short run must come down, too
        falls = {"cosine": schedule.warmup_cosine, "linear": schedule.warmup_linear}[s["train.schedule"]]
        return falls(s["train.lr"], total, warmup, s["train.min_lr"])

    def make_optimizer(self) -> Optimizer:
        """Return a fresh optimizer of the model."""
        s = self.settings
        scales = None
        if s["train.layer_decay"] != 1.0:
            names = [name for name, _ in self.model.named_parameters()]
            scales = layer_scales(names, s["model.depth"], s["train.layer_decay"])
        settings: dict[str, Any] = {"lr": s["train.lr"], "weight_decay": s["train.weight_decay"], "lr_scales": scales}
        if s["train.optimizer"] == "sgd":
            return SGD(self.model.named_parameters(), momentum=s["train.momentum"], **settings)
        kind = {"adamw": AdamW, "muon": Muon}[s["train.optimizer"]]
        return kind(self.model.named_parameters(), **settings)

    @property
    def loss(self) -> Callable[..., Any]:
        """What is made small: cross-entropy, with the run's smoothing."""
        return partial(ops.cross_entropy, smoothing=self.settings["train.smoothing"])

    def make_trainer(self, folder: Path | None) -> Trainer:
        """Return the Trainer, with a fresh optimizer."""
        s = self.settings
        meta = {
            "name": s["model.name"],
            "data": self.data_meta(),
            "run": {"settings": dict(s), "origins": s.origins, "data": self._digests() if folder is not None else {}},
        }
        return Trainer(
            self.model,
            self.make_optimizer(),
            loss=self.loss,
            schedule=self.schedule,
            epochs=s["train.epochs"],
            seed=s["train.seed"],
            clip_norm=s["train.clip_grad"] or None,
            threads=s["train.threads"],
            micro_batch=s["train.micro_batch"],
            folder=folder,
            save_every=s["train.save_every"] or None,
            ema=s["train.model_ema"] or None,
            patience=s["train.patience"] or None,
            max_seconds=60 * s["train.max_time"] or None,
            on_nan=s["train.on_nan"] if folder is not None else "stop",
            meta=meta,
            quiet=self.quiet,
        )

    def data_meta(self) -> dict[str, Any]:
        """Return what a checkpoint of the run keeps of the images that it trains on."""
        s = self.settings
        return data_meta(self.train_data) | {"bad_images": s["data.bad_images"], "layout": s["data.layout"]}

    def _digests(self) -> dict[str, str]:
        """Return the SHA-256 of the images and the labels of each part of the data."""
        parts = {"training": self.train_data, "validation": self.valid_data, "test": self.test_data}
        prints = {name: part.fingerprint for name, part in parts.items() if part is not None}
        return {f"{name} {what}": digest for name, found in prints.items() for what, digest in found.items()}

    def try_out(self) -> int:
        """Make a few steps, and say how long the run would take; nothing is written or kept."""
        step = self.make_trainer(None).step
        found, times = [], []
        for images, labels in itertools.islice(self.loader.batches(0), 4):
            step.opt.lr = self.schedule(step.opt.steps)
            started = time.perf_counter()
            found.append((step(images, labels), step.grad_norm))
            times.append(time.perf_counter() - started)
        minutes = min(times) * self.settings["train.epochs"] * len(self.loader) / 60
        if self.settings["train.device"] == "cpu":
            self.say(f"memory      about {bytes_text(self.memory)} at the peak")
        self.say(f"time        about {minutes:,.1f} minutes of training, by a few steps")
        loss, norm = found[0]
        print(f"dry run     a step works (loss {loss:.4f}, gradient norm {norm:.3g}); nothing was written")
        return 0

    def run(
        self, folder: Path, lock: RunLock, resume: Path | None = None, meta: Mapping[str, Any] | None = None
    ) -> int:
        """Train to the end, test and draw, in a folder that ``lock`` holds.

        A run that is resumed has its checkpoint at ``resume``, with this ``meta``.
        """
        trainer = self.make_trainer(folder)
        trainer.lock = lock
        report = folder / "report.html"  # written last
        if resume is not None and meta is not None:
            self._compare_data(meta, trainer.meta)
            trainer.resume(resume)
            if (trainer.progress.stopped or trainer.progress.epoch >= trainer.epochs) and report.exists():
                why = f" ({trainer.progress.stopped})" if trainer.progress.stopped else ""
                again = f"minivit eval {shlex.quote(str(folder))}"
                print(printable(f"the run {folder} is finished{why}; to measure it: {again}"))
                if self.settings["train.min_lr"] > 0 and not trainer.progress.stopped:
                    longer = f"--resume {shlex.quote(str(folder))} --epochs {2 * trainer.epochs}"
                    print(printable(f"to go on longer: minivit train {longer}"))
                return 0
            self.say(f"continuing at step {trainer.opt.steps} of {trainer.epochs * len(self.loader)}")
        valid = self.held_loader(self.valid_data) if self.valid_data is not None else None
        trainer.check_folder()
        report.unlink(missing_ok=True)
        if resume is not None:
            _write_changes(folder / "config.toml", self.settings)
        rows = trainer.fit(self.loader, valid)
        seconds = sum(row["seconds"] for row in rows)
        self.say(f"\ntime        {seconds:.1f} s of training")
        try:
            with StopSignals() as signals:
                self._finish(folder, trainer, signals.raise_if_noted)
        except (Stop, KeyboardInterrupt) as stop:
            print("stopped; the training is done and saved: test it and draw its pictures with\n"
                  f"  minivit train --resume {printable(shlex.quote(str(folder)))}", file=sys.stderr)  # fmt: skip
            raise SystemExit(stop.code if isinstance(stop, Stop) else 130) from None
        return 0

    def _compare_data(self, meta: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raise CheckpointError if the data are not those that a checkpoint's ``meta`` tells of."""
        before, digests = meta.get("data"), meta.get("run", {}).get("data", {})
        if not (isinstance(before, dict) and isinstance(digests, dict)):
            raise CheckpointError("the checkpoint does not say what it was trained on", "use last.npz of a run")
        changed = [key for key in ("classes", "mean", "std") if before.get(key) != now["data"][key]]
        own = now["run"]["data"] if digests else {}
        changed += [name for name in {**digests, **own} if digests.get(name) != own.get(name)]
        if not digests and before.get("labels") != now["data"]["labels"]:  # the first version kept these only
            changed.append("training labels")
        if changed:
            raise CheckpointError(
                f"{self.settings['data.name']} is not as it was when the run began: other {', '.join(changed)}",
                "bring the data back, or start a new run from these weights: --init-from",
            )

    def _finish(self, folder: Path, trainer: Trainer, stop_if_asked: Callable[[], None]) -> None:
        """Measure the best weights where there are validation images, else the last ones, once, on the test images.

        They are drawn in the report. Without test images it shows validation or training images; of a run that overfits
        it always shows these.
        """
        checkpoint, best = folder / "checkpoints" / "last.npz", trainer.progress.best
        overfit = self.settings["data.overfit"] > 0
        shown, split = self.train_data, "training"
        if self.valid_data is not None and best is not None:
            checkpoint = _best_checkpoint(folder, best)
            shown, split = self.valid_data, "training" if overfit else "validation"
            what = "overfit     of the training images" if overfit else "validation  best accuracy"
            print(f"{what} {best['valid_accuracy']:.2%}, after epoch {best['epoch']}")
        if self.test_data is not None and not overfit:
            shown, split = self.test_data, "test"
        load_weights(self.model, checkpoint)  # their average, if the run keeps one
        loader = self.held_loader(shown)
        logits = evaluate(self.model, loader, stop_if_asked, self.settings["train.threads"])["logits"]
        result = classification_metrics(logits, shown.labels)
        if split == "test":
            of = f", with the weights of epoch {best['epoch']}" if best is not None else ""
            figures = f"accuracy {percent_interval(result)} on {result['count']:,} images, loss {result['loss']:.4f}"
            print(f"test        {figures}{of}")
            tested = {f"test_{name}": result[name] for name in ("loss", "accuracy", "interval", "count")}
            at = best if best is not None else trainer.progress.history[-1]
            trainer.records.log({"epoch": at["epoch"], "step": at["step"], **tested})
            trainer.records.flush()
        write_results(
            self.model,
            loader,
            logits,
            result,
            folder,
            title=f"{folder.resolve().name}: {self.settings['model.name']} on {self.title}",
            about=f"{self.model.num_parameters():,} parameters; {self._data_text(self.train_data)}",
            rows=trainer.progress.history,
            split=split,
        )
        self.say(printable(f"report      {folder / 'report.html'}"))
        run = printable(shlex.quote(str(folder)))
        next_steps = [f"minivit predict {run} IMAGE…"]
        if self.test_data is not None:
            next_steps.insert(0, f"minivit eval {run}")
        elif self.valid_data is not None and not self.settings["data.overfit"]:
            next_steps.insert(0, f"minivit eval {run} --split val")
        if self.train_data.files:
            next_steps.append(f"minivit eval {run} --split all    (lists the worst mistakes: a label may be wrong)")
        self.say("next        " + "\n            ".join(next_steps))

    def draw_samples(self, folder: Path) -> None:
        """Draw training images, and images held out, as the model will see them."""
        title = f"Training images of {self.title}, as the model sees them"
        draw_batch(self.loader, folder / "samples_train.png", title)
        held = None if self.settings["data.overfit"] else self.valid_data or self.test_data
        if held is not None:
            title = f"Images of {self.title} held out, as the model sees them"
            draw_batch(self.held_loader(spread_out(held)), folder / "samples_valid.png", title)


def _best_checkpoint(folder: Path, best: Mapping[str, Any]) -> Path:
    """Return the checkpoint that holds the weights of the epoch whose row is ``best``.

    Raises CheckpointError if it is missing or damaged, or of another epoch, as after a mix of two runs' files.
    """
    path = folder / "checkpoints" / "best.npz"
    instead = f"put it back; or measure the last weights: minivit eval {shlex.quote(str(path.with_name('last.npz')))}"
    try:
        kept = load_checkpoint(path).meta["train"]["best"]
        same = all(kept.get(key) == best[key] for key in ("epoch", "step", "valid_accuracy", "valid_loss"))
    except CheckpointError as error:
        raise CheckpointError(error.what, instead) from error
    except (KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise CheckpointError(f"{path} does not hold the weights of epoch {best['epoch']}, the best one", instead)
    return path


def _check_memory(needed: int, device: str) -> None:
    if device == "cpu" and needed > (free := available_memory()):
        raise ConfigError(
            f"this run needs about {bytes_text(needed)} of memory, {bytes_text(free)} are free",
            "use a smaller model or image, --threads 1, a smaller --micro-batch, or --set model.recompute=true",
        )


_STRENGTHS = (
    "resized_crop", "degrees", "scale", "shear", "shift", "jitter", "randaugment", "erasing", "mixup", "cutmix",
)  # fmt: skip
UNCHANGED = {"data.crop": 0, "data.flip": False, "train.smoothing": 0.0} | {f"data.{key}": 0.0 for key in _STRENGTHS}
"""Settings under which a model sees the training images as they are; it sees each of them whole if its rates are 0."""


def augmentation(s: Mapping[str, Any], channels: int) -> Augment | None:
    """Return the random changes of training images that the data settings ``s`` ask for, in the order they are made."""
    steps: list[Augment] = []
    if s["resized_crop"]:
        steps.append(RandomResizedCrop(s["resized_crop"]))
    if s["crop"]:
        steps.append(Crop(s["crop"]))
    if s["flip"]:
        steps.append(Flip())
    affine = {name: s[name] for name in ("degrees", "scale", "shear", "shift")}
    if any(affine.values()):
        steps.append(Affine(**affine))
    if s["randaugment"]:
        fill = 0.0 if channels == 1 else 0.5  # grey images are mostly light strokes on black
        steps.append(RandAugment(magnitude=s["randaugment"], fill=fill))
    if s["jitter"]:
        steps.append(ColorJitter(s["jitter"], s["jitter"], s["jitter"]))
    if s["erasing"]:
        steps.append(RandomErasing(s["erasing"]))
    return Chain(tuple(steps)) if len(steps) > 1 else steps[0] if steps else None


# ---- the run folder --------------------------------------------------------------------------------------------------


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


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode())


def _write_changes(config: Path, settings: Settings) -> None:
    """Write a run's config.toml again if it has other values: without need it is left as its user may have put it."""
    before = read_toml(config)
    longer = settings["train.schedule_epochs"] and "train.schedule_epochs" not in before
    if longer or any(settings.get(key) != value for key, value in before.items()):
        _write_text(config, write_toml(settings))


def _command_record(argv: list[str], device: str) -> str:
    """Return what was typed and what it ran on."""
    record = {"command": f"minivit {shlex.join(argv)}", "folder": str(Path.cwd()), "device": device}
    record |= versions() | {"system": system_text(), "cpu": cpu_text(), "blas": blas_text()}
    return "".join(f"{name:14}{printable(text)}\n" for name, text in record.items())
