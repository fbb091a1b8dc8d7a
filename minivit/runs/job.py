"""What a run is made of, from its settings: data, model, batches, optimizer, learning rates, trainer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from minivit import data, ops
from minivit.backend import auto_device, available_memory, keep_freed_memory, on_device_of, tile
from minivit.data.dataset import class_names
from minivit.errors import CheckpointError, ConfigError, DataError, DeviceError, MinivitError, MisfitError, printable
from minivit.measure.costs import training_memory
from minivit.measure.gpu_costs import gpu_memory
from minivit.measure.teamwork import workers_that_pay
from minivit.models import Model, build, described_settings, model_outline
from minivit.nn.rules import rate
from minivit.runs.parts import UNCHANGED, divide, load_parts
from minivit.runs.products import ProductsRecord
from minivit.runs.settings import RunSettings, assignments, fit_to_data
from minivit.runs.teacher import open_teacher, state_digest, taught
from minivit.show.text import bytes_text, plural
from minivit.train import schedule
from minivit.train.distill import Student, distillation
from minivit.train.observers import Observer
from minivit.train.optim import SGD, AdamW, Muon, Optimizer, layer_scales
from minivit.train.precision import check_precision
from minivit.train.ranks import world
from minivit.train.schedule import Schedule
from minivit.train.sharing import team_for
from minivit.train.trainer import Trainer
from minivit.weights.native import data_meta
from minivit.weights.place import find_checkpoint
from minivit.weights.transfer import init_from

PROCESS_BYTES = 40 << 20  # of Python and NumPy in a worker


class Job:
    """What a run needs, made from its ``settings``, which then say what "auto" and 0 come to.

    ``resumed`` says that the weights will be those of a checkpoint, ``held`` how many bytes of it will be free again
    when the training begins; ``bar`` shows how far the reading is, as :func:`minivit.data.load` has it. ``about`` tells
    of the job in some lines, ``memory`` is the bytes that a step takes. Raises ConfigError or DataError for what cannot
    be, a run too large for the memory among it, before anything large is made.
    """

    def __init__(
        self, settings: RunSettings, resumed: bool = False, held: int = 0, bar: Callable[..., Any] | None = None
    ) -> None:
        self.settings = settings
        keep_freed_memory()
        try:
            device, why = auto_device(settings["train.device"])
            dtype, why_this = dtype_on(device, settings["train.dtype"])
        except DeviceError as error:
            if not resumed or settings["train.dtype"] == "float32":
                raise
            what = f"this run computes in {settings['train.dtype']}, and cannot go on here: {error.what}"
            again = "minivit train --config RUN/config.toml --init-from RUN --device cpu --dtype float32"
            raise DeviceError(what, f"continue it on a GPU; or start a new run from its weights: {again}") from error
        make_absolute(settings)
        found = load_parts(settings, bar)
        classes = found.train.classes
        if len(classes) == 1 and not resumed:
            what = f"{settings['data.name']}: there is only one class, {classes[0]!r}"
            raise DataError(what, "give images of two, at least")
        values = model_values(settings, found.train.images.shape[1:], len(classes))
        # float32 weights, gradients and moments, on one thread; and the report's tables of all pairs of classes
        outlined = model_outline(settings.kind, values)
        _check_memory(max(20 * outlined.num_parameters(), 40 * values["num_classes"] ** 2), device, held)
        # a model may have room for more classes than the data name
        self.parts = divide(found, tuple(class_names(classes, values["num_classes"])), settings)
        if settings["train.patience"] and self.parts.valid is None:
            raise ConfigError("patience needs validation images", "hold some out: --val-fraction 0.1")
        self.model: Model = build(settings.kind, values).to(device)
        self.teacher = open_teacher(settings["train.teacher"], classes) if settings["train.teacher"] else None
        self.trained: Student | None = None  # what a step runs, where a teacher stands beside the model
        if self.teacher is not None:
            self.trained = taught(self.model, self.teacher, self.parts.train.mean, self.parts.train.std)
        fresh = settings["train.init_from"] and not resumed
        changed = start_from(self.model, settings["train.init_from"]) if fresh else []
        self._settle(device, dtype)
        self.memory = self._memory_needed(outlined)
        _check_memory(self.memory, device, held)
        self.loader = self.parts.training_loader(settings, device, self.room())
        self.schedule = self.make_schedule()
        self.about = self._text(why or why_this, changed, len(classes))

    def _settle(self, device: str, dtype: str) -> None:
        """Keep what "auto" and 0 come to on this machine, because equal bits need the same again."""
        s = self.settings
        team, batch_size = team_for(self.model, None, s["train.micro_batch"] or None), s["train.batch_size"]
        rows = batch_size * s["train.grad_accum_steps"]
        workers, ranks = s["train.workers"], world()
        if ranks is not None:
            if s.origins.get("train.workers") == "command line" and workers != ranks.count:
                what = f"--workers {workers}, and mpiexec has started {ranks.count} processes"
                raise ConfigError(what, "leave --workers out: the processes of mpiexec are the workers")
            if device != "cpu":
                what = f"mpiexec with {ranks.count} processes, and --device {device}"
                raise ConfigError(what, "use one process on a GPU, or --device cpu")
            workers = ranks.count
        if not workers:  # whoever sets the threads means this process
            is_plain = device == "cpu" and not s["train.threads"] and self.trained is None
            steps = s["train.epochs"] * -(-len(self.parts.train) // rows)
            workers = workers_that_pay(self.model, rows, steps) if is_plain else 1
        found = {
            "train.device": device,
            "train.dtype": dtype,
            "train.threads": s["train.threads"] or team.threads_for(rows),
            "train.workers": workers,
            "train.micro_batch": min(team.micro_batch or batch_size, batch_size),
        }
        s.take({key: value for key, value in found.items() if s[key] != value}, "this machine")

    def _memory_needed(self, outlined: Model) -> int:
        s = self.settings
        rows = min(s["train.batch_size"] * s["train.grad_accum_steps"], len(self.parts.train))
        if s["train.device"] == "cpu":
            step = training_memory(outlined, team_for(self.model, s["train.threads"], s["train.micro_batch"]), rows)
            step += (s["train.workers"] - 1) * PROCESS_BYTES
        else:
            step = gpu_memory(outlined, min(rows, s["train.micro_batch"]), s["train.dtype"])
        beside = self.model.num_parameters() * bool(s["train.model_ema"])
        return step + 4 * (beside + (0 if self.teacher is None else self.teacher.model.num_parameters()))

    def room(self) -> int | None:
        """Return the bytes of a GPU that images may have: what a step, which takes its memory later, leaves of it."""
        device = self.settings["train.device"]
        return None if device == "cpu" else max(0, available_memory(device) - self.memory)

    def _text(self, why: str, changed: list[str], classes: int) -> str:
        s = self.settings
        with on_device_of(next(self.model.parameters()).data):
            no_kernels = None if s["train.device"] == "cpu" else tile.why_not()
        cores = plural(s["train.threads"], "thread") if s["train.device"] == "cpu" else s["train.dtype"]
        if s["train.device"] == "cpu" and s["train.workers"] > 1:
            ranks = world()
            cores = plural(s["train.workers"], "worker" if ranks is None else "rank")
        lines = [
            f"device      {s['train.device']}, {cores}" + (f" ({why})" if why else ""),
            *([f"kernels     plain operations only, which takes longer: {no_kernels}"] if no_kernels else []),
            f"model       {s['model.name']}: {self.model.num_parameters():,} parameters",
        ]
        if self.teacher is not None:
            lines.append(
                printable(f"teacher     {self.teacher.path}: {self.teacher.model.num_parameters():,} parameters")
            )
        if s["train.init_from"]:
            lines += [printable(f"started     from {s['train.init_from']}"), *(f"            {one}" for one in changed)]
        lines.append(f"data        {self.parts.text(classes)}")
        lines += [printable(f"            {remark}") for remark in (self.parts.remark, self.loader.remark) if remark]
        recipe = f"recipe {s['recipe']}: " if s["recipe"] else ""
        epochs, steps = plural(s["train.epochs"], "epoch"), plural(len(self.loader), "step")
        optimizer = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD with momentum"}[s["train.optimizer"]]
        lines.append(f"training    {recipe}{epochs} of {steps}, {optimizer}, learning rate {s['train.lr']:g}")
        return "\n".join(lines)

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
            scales = layer_scales(self.model.named_parameters(), s["train.layer_decay"])
        settings: dict[str, Any] = {"lr": s["train.lr"], "weight_decay": s["train.weight_decay"], "lr_scales": scales}
        if s["train.optimizer"] == "sgd":
            return SGD(self.model.named_parameters(), momentum=s["train.momentum"], **settings)
        kind = {"adamw": AdamW, "muon": Muon}[s["train.optimizer"]]
        return kind(self.model.named_parameters(), **settings)

    @property
    def loss(self) -> Callable[..., Any]:
        """What is made small: cross-entropy, with the run's smoothing; with a teacher, what it says as well."""
        s = self.settings
        if self.teacher is None:
            return partial(ops.cross_entropy, smoothing=s["train.smoothing"])
        return partial(
            distillation,
            kind=s["train.distill"],
            share=s["train.distill_share"],
            temperature=s["train.distill_temperature"],
            smoothing=s["train.smoothing"],
        )

    def make_trainer(self, folder: Path | None, observers: Sequence[Observer] = ()) -> Trainer:
        """Return the Trainer, with a fresh optimizer."""
        s = self.settings
        digests = self.parts.digests() if folder is not None else {}
        if self.teacher is not None:
            digests["teacher"] = state_digest(self.teacher.model)
        meta = {
            "name": s["model.name"],
            "data": self.data_meta(),
            "run": {"settings": dict(s), "origins": s.origins, "data": digests},
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
            workers=s["train.workers"],
            micro_batch=s["train.micro_batch"],
            folder=folder,
            save_every=s["train.save_every"] or None,
            ema=s["train.model_ema"] or None,
            patience=s["train.patience"] or None,
            max_seconds=60 * s["train.max_time"] or None,
            on_nan=s["train.on_nan"] if folder is not None else "stop",
            meta=meta,
            observers=observers
            if folder is None or s["train.device"] == "cpu"
            else [ProductsRecord(folder), *observers],
            precision=s["train.dtype"],
            trained=self.trained,
        )

    def data_meta(self) -> dict[str, Any]:
        """Return what a checkpoint of the run keeps of the images that it trains on."""
        s = self.settings
        return data_meta(self.parts.train) | {"bad_images": s["data.bad_images"], "layout": s["data.layout"]}

    def try_out(self) -> Trial:
        """Make a few steps; nothing is written or kept but the model, which has changed."""
        step = self.make_trainer(None).step
        found, times = [], []
        for images, labels in itertools.islice(self.loader.batches(0), 4):
            step.opt.lr = self.schedule(step.opt.steps)
            started = time.perf_counter()
            found.append((step(images, labels), step.grad_norm))
            times.append(time.perf_counter() - started)
        minutes = min(times) * self.settings["train.epochs"] * len(self.loader) / 60
        return Trial(*found[0], minutes)


class Trial(NamedTuple):
    """What a few steps show: loss and gradient norm of the first, and how many minutes all epochs would take."""

    loss: float
    grad_norm: float
    minutes: float


def model_values(settings: RunSettings, shape: tuple[int, int, int], classes: int) -> dict[str, Any]:
    """Settle what the data and the kind of run decide about the model; return the settings to make it with.

    ``shape`` is an image's (C, H, W). Raises ConfigError for what cannot be.
    """
    fit_to_data(settings, shape, classes)
    if settings["data.overfit"]:
        rates = {f"model.{name}": 0.0 for name, s in described_settings(settings.kind).items() if s.rule is rate}
        settings.take(UNCHANGED | rates, "overfit")
    if settings["train.init_from"] and "model.head" in settings:
        settings.take({"model.head": "linear"}, "init_from")
    return settings.model_values()


def start_from(model: Model, path: str) -> list[str]:
    """Start ``model`` from a checkpoint's parameters; return what changed, as :func:`init_from` says it."""
    try:
        return init_from(model, path)
    except MisfitError as error:
        remedy = f"make the model with the checkpoint's: {assignments(error.settings)}"
        raise CheckpointError(error.what, remedy) from error


def make_absolute(settings: RunSettings) -> None:
    """Make paths absolute, so that the run can be resumed from any folder; a run's folder becomes its checkpoint."""
    paths = {}
    if settings["data.name"] != data.kind_of(settings["data.name"]):
        paths["data.name"] = settings["data.name"]
    if settings["train.init_from"]:
        paths["train.init_from"] = find_checkpoint(settings["train.init_from"])
    if settings["train.teacher"]:
        paths["train.teacher"] = find_checkpoint(settings["train.teacher"])
    for key, path in paths.items():
        settings.take({key: str(Path(path).resolve())}, settings.origins[key])


def dtype_on(device: str, asked: str) -> tuple[str, str]:
    """Return the numbers of a training step on ``device``, and for "auto" why they are not bfloat16 on a GPU, or "".

    Raises DeviceError for numbers that the device does not have.
    """
    if asked != "auto":
        return check_precision(asked, device).name, ""
    if device == "cpu":
        return "float32", ""
    try:
        return check_precision("bfloat16", device).name, ""
    except MinivitError as error:  # an older GPU, or no ml_dtypes
        return "float32", f"{error.what}: {error.remedy}"


def _check_memory(needed: int, device: str, held: int) -> None:
    """Raise ConfigError if more is ``needed`` than is free, with what is ``held`` until the training begins.

    That is held in the machine's own memory, whatever the device.
    """
    if device == "cpu" and needed > (free := available_memory() + held):
        raise ConfigError(
            f"this run needs about {bytes_text(needed)} of memory, {bytes_text(free)} are free",
            "use a smaller model or image, --threads 1, a smaller --micro-batch, or --set model.recompute=true",
        )
    if device != "cpu" and needed > (free := available_memory(device)):
        raise ConfigError(
            f"this run needs about {bytes_text(needed)} of the memory of {device}, {bytes_text(free)} are free",
            "use a smaller --batch-size with more --grad-accum-steps, which learns the same, --dtype bfloat16, a "
            "smaller model or image, or --set model.recompute=true",
        )
