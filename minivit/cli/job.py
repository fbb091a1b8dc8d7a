"""A training run: made from its settings, kept in a folder, carried to its test accuracy and its pictures."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minivit import data, ops
from minivit.autograd.graph import no_grad
from minivit.backend import Key, auto_device, to_device, to_numpy
from minivit.cli.doctor import blas_text, cpu_text, versions
from minivit.cli.report import measure, percent_interval, plural
from minivit.cli.settings import Settings, fit_to_data, parse_assignment, resolve, write_toml
from minivit.data import Affine, Dataset, Loader
from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.models.vit import ViT
from minivit.study.pictures import attention_overlay, mosaic
from minivit.train import schedule
from minivit.train.optim import AdamW
from minivit.train.schedule import Schedule
from minivit.train.step import Team, predict_logits
from minivit.train.trainer import Trainer, evaluate

TRAIN_STREAM, HOLD_OUT_STREAM = 0x7A1, 0x0FF  # streams of random numbers under the run's seed


def start(args: argparse.Namespace) -> int:
    """Start a run in a folder of its own."""
    job = Job(resolve(_typed(args), args.recipe, args.config), args.quiet)
    folder = make_folder(Path(args.output), args.name, stem=job.title)
    config = folder / "config.toml"
    config.write_text(write_toml(job.settings), encoding="utf-8")
    (folder / "command.txt").write_text(_command_record(args.argv, job.settings["train.device"]), encoding="utf-8")
    job.say(f"run folder  {folder}")
    job.say(f"reproduce   minivit train --config {shlex.quote(str(config))}\n")
    job.draw_samples(folder / "samples.png")
    return job.run(folder)


def resume(args: argparse.Namespace) -> int:
    """Continue a run where its checkpoint stands, in its folder, with its settings."""
    given = {**_typed(args), "--recipe": args.recipe, "--config": args.config, "--name": args.name}
    if refused := [key for key, value in given.items() if value is not None]:
        raise ConfigError(
            f"--resume continues a run with the settings it was started with: {refused[0]} cannot be set",
            "leave it out, or start a new run: minivit train --config RUN/config.toml …",
        )
    path = Path(args.resume)
    if path.is_dir():
        path = path / "checkpoints" / "last.npz"
    folder = path.parent.parent
    if not path.is_file() or not (folder / "config.toml").is_file():
        raise CheckpointError(f"{args.resume} is no run, nor a checkpoint of one", "give runs/NAME, or its last.npz")
    job = Job(resolve({}, file=folder / "config.toml"), args.quiet)
    job.say(f"run folder  {folder}\n")
    return job.run(folder, resume=path)


def _typed(args: argparse.Namespace) -> dict[str, Any]:
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

    def __init__(self, settings: Settings, quiet: bool) -> None:
        self.settings, self.quiet = settings, quiet
        device, why = auto_device(settings["train.device"])
        if (path := Path(settings["data.name"])).is_file():
            settings["data.name"] = str(path.resolve())  # the run can then be resumed from any folder
        self.title = path.stem if path.is_file() else settings["data.name"]
        whole = data.load(settings["data.name"], "train")
        self.test_data = _test_images(whole, settings["data.name"])
        fit_to_data(settings, whole.images.shape[1:], len(whole.classes))
        self.train_data: Dataset = whole
        self.valid_data: Dataset | None = None
        if settings["data.val_fraction"] > 0:
            key = Key(settings["train.seed"], HOLD_OUT_STREAM)
            self.train_data, self.valid_data = whole.split_off(settings["data.val_fraction"], key)
        config: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in settings.table("model").items() if k != "name"
        }
        self.model: ViT = ViT(**config, seed=settings["train.seed"]).to(device)
        self.loader = self.make_loader()
        # as they turned out: equal bits need the same device, threads and micro-batches
        team, batch_size = Team(self.model, None, settings["train.micro_batch"] or None), settings["train.batch_size"]
        threads = settings["train.threads"] or team.threads_for(self.loader.batch_size)
        micro_batch = min(team.micro_batch or batch_size, batch_size)
        found = {"train.device": device, "train.threads": threads, "train.micro_batch": micro_batch}
        settings.take({key: value for key, value in found.items() if settings[key] != value}, "this machine")
        self.schedule = self.make_schedule()
        cores = f", {plural(threads, 'thread')}" if device == "cpu" else ""
        self.say(f"device      {device}{cores}" + (f" ({why})" if why else ""))
        self.say(f"model       {settings['model.name']}: {self.model.num_parameters():,} parameters")
        self.say(f"data        {self._data_text(whole)}")
        self.say(f"training    {self._training_text()}")

    def say(self, text: str) -> None:
        """Print, unless the run is quiet."""
        if not self.quiet:
            print(text, flush=True)

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
        return f"{recipe}{epochs} of {steps}, AdamW, learning rate {s['train.lr']:g}"

    def make_loader(self) -> Loader:
        """Return the training batches: the batch size times the batches that make up an update."""
        s = self.settings
        strengths = {name: s[f"data.{name}"] for name in ("degrees", "scale", "shear", "shift")}
        augment = Affine(**strengths) if s["data.augment"] == "affine" else None
        size = s["train.batch_size"] * s["train.grad_accum_steps"]
        return Loader(self.train_data, size, Key(s["train.seed"], TRAIN_STREAM), augment)

    def held_loader(self, dataset: Dataset) -> Loader:
        """Return batches of other images, standardised like the training images."""
        mean, std = self.train_data.mean, self.train_data.std
        return Loader(dataset, 512, Key(0), mean=mean, std=std, shuffle=False)

    def make_schedule(self) -> Schedule:
        """Return the learning rates of the run."""
        s = self.settings
        total = s["train.epochs"] * len(self.loader)
        warmup = min(round(s["train.warmup_epochs"] * len(self.loader)), total // 2)  # a short run must come down, too
        falls = {"cosine": schedule.warmup_cosine, "linear": schedule.warmup_linear}[s["train.schedule"]]
        return falls(s["train.lr"], total, warmup, s["train.min_lr"])

    def make_trainer(self, folder: Path) -> Trainer:
        """Return the Trainer, with a fresh optimizer."""
        s = self.settings
        meta = {
            "name": s["model.name"],
            "data": {
                "name": s["data.name"],
                "classes": list(self.train_data.classes),
                "mean": list(self.train_data.mean),
                "std": list(self.train_data.std),
            },
        }
        return Trainer(
            self.model,
            AdamW(self.model.named_parameters(), lr=s["train.lr"], weight_decay=s["train.weight_decay"]),
            loss=partial(ops.cross_entropy, smoothing=s["train.smoothing"]),
            schedule=self.schedule,
            epochs=s["train.epochs"],
            seed=s["train.seed"],
            clip_norm=s["train.clip_grad"] or None,
            threads=s["train.threads"],
            micro_batch=s["train.micro_batch"],
            folder=folder,
            save_every=s["train.save_every"] or None,
            meta=meta,
            quiet=self.quiet,
        )

    def run(self, folder: Path, resume: Path | None = None) -> int:
        """Train to the end, test and draw."""
        trainer = self.make_trainer(folder)
        if resume is not None:
            trainer.resume(resume)
            if trainer.progress.epoch == trainer.epochs and (folder / "attention.png").exists():  # drawn last
                print(f"the run {folder} is finished; to measure it: minivit eval {shlex.quote(str(resume))}")
                return 0
            self.say(f"continuing at step {trainer.opt.steps} of {self.settings['train.epochs'] * len(self.loader)}")
        rows = trainer.fit(self.loader, self.held_loader(self.valid_data) if self.valid_data is not None else None)
        seconds = sum(row["seconds"] for row in rows)
        self.say(f"\ntime        {seconds:.1f} s of training")
        self._finish(folder, trainer)
        return 0

    def _finish(self, folder: Path, trainer: Trainer) -> None:
        """Report the last weights on the test set; a run that still chooses among epochs leaves the test set alone."""
        checkpoint = folder / "checkpoints" / "last.npz"
        best = trainer.progress.best
        if self.valid_data is not None and best is not None:
            checkpoint = folder / "checkpoints" / "best.npz"
            print(f"validation  best accuracy {best['valid_accuracy']:.2%}, after epoch {best['epoch']}")
        elif self.test_data is not None:
            self._test(self.test_data, folder, trainer)
        shown = self.test_data or self.valid_data or self.train_data
        draw_attention(self.model, self.held_loader(shown.subset(range(min(40, len(shown))))), folder)
        self.say(f"pictures    {folder / 'samples.png'}, {folder / 'attention.png'}")
        next_steps = [f"minivit predict {shlex.quote(str(checkpoint))} IMAGE…"]
        if self.test_data is not None:
            next_steps.insert(0, f"minivit eval {shlex.quote(str(checkpoint))}")
        self.say("next        " + "\n            ".join(next_steps))

    def _test(self, test: Dataset, folder: Path, trainer: Trainer) -> None:
        found = evaluate(self.model, self.held_loader(test))
        result = measure(found["logits"], found["labels"])
        print(
            f"test        accuracy {percent_interval(result)} on {result['count']:,} images, loss {result['loss']:.4f}"
        )
        row = {"step": trainer.opt.steps, "epoch": trainer.progress.epoch}
        row |= {f"test_{name}": result[name] for name in ("loss", "accuracy", "interval", "count")}
        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def draw_samples(self, path: Path) -> None:
        """Draw the first training images as the model will see them, with their labels."""
        images, labels = next(iter(self.loader.batches(0)))
        names = self.train_data.classes
        mean, std = (np.array(x, np.float32)[:, None, None] for x in (self.loader.mean, self.loader.std))  # (C, 1, 1)
        pixels = ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)[:50, :3]  # drawn without alpha
        mosaic(pixels, [names[i] for i in labels[:50]], path, title=f"Training images of {self.title}")


def _test_images(whole: Dataset, name: str) -> Dataset | None:
    """Return the test images that belong to the training images, or None if an archive has none."""
    if Path(name).is_file():
        with np.load(name, allow_pickle=False) as archive:
            if "test_images" not in archive:
                return None
    test = data.load(name, "test")
    if test.images.shape[1:] != whole.images.shape[1:] or test.classes != whole.classes:
        raise DataError(
            f"{name}: {whole.images.shape[1:]} images of {len(whole.classes)} classes to train on, "
            f"{test.images.shape[1:]} of {len(test.classes)} to test with",
            "give both splits the same size and classes",
        )
    return test


def draw_attention(model: ViT, loader: Loader, folder: Path) -> None:
    """Draw where the last block's class token looks (without one: what all patches look at), mean over the heads.

    ``loader`` has one batch, in the data set's order.
    """
    images, labels = next(iter(loader.batches(0)))
    device = next(model.parameters()).device
    model.eval()
    with no_grad():
        maps = model.attention_maps(to_device(images, device))[-1]
    weights = to_numpy(maps.data).mean(axis=1)  # (B, heads, T, T) → (B, T, T)
    weights = weights[:, 0, 1:] if model.pool == "cls" else weights.mean(axis=1)  # → (B, patches)
    (height, width), (p, q) = model.patch_embed.image_size, model.patch_embed.patch_size
    names = loader.dataset.classes
    predicted = predict_logits(model, images).argmax(axis=1)
    attention_overlay(
        loader.dataset.images[:, :3],
        np.ascontiguousarray(weights).reshape(-1, height // p, width // q),
        [names[i] for i in labels],
        [names[i] for i in predicted],
        folder / "attention.png",
        title="Where the class token looks" if model.pool == "cls" else "What the patches look at, on average",
    )


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
    for number in count(1):
        try:
            (parent / f"{stem}-{number}").mkdir()  # fails if another process was faster
        except FileExistsError:
            continue
        return parent / f"{stem}-{number}"
    raise AssertionError  # count() does not end


def _command_record(argv: list[str], device: str) -> str:
    """Return what was typed and what it ran on."""
    record = {"command": f"minivit {shlex.join(argv)}", "folder": str(Path.cwd()), "device": device}
    record |= versions() | {"system": platform.platform(), "cpu": cpu_text(), "blas": blas_text()}
    return "".join(f"{name:14}{text}\n" for name, text in record.items())
