"""Whether a run that is resumed is the one that was begun: what a checkpoint says of it, held against what is now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minivit.data.loader import Loader
from minivit.errors import CheckpointError, ConfigError
from minivit.nn.module import Module
from minivit.train.evaluation import Batches
from minivit.train.identity import differences, plain, settings_of
from minivit.train.progress import Progress
from minivit.train.schedule import Schedule
from minivit.train.step import TrainStep
from minivit.weights.native import FIRST_KIND


@dataclass
class RunState:
    """What a checkpoint keeps of a run besides its arrays and its model's settings: ``meta["train"]``."""

    progress: Progress
    settings: dict[str, Any]  # what must be equal for a resumed run to be the same: see run_settings
    data: dict[str, Any]  # what is trained on, and validated with: see data_settings
    machine: dict[str, Any]  # what the last bits of the numbers depend on, besides the settings
    limits: dict[str, Any]  # what ends a run early

    @property
    def steps(self) -> int:
        """The updates of the whole run."""
        return int(self.settings["total steps"])

    def meta(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        known = {"settings": self.settings, "data": self.data, "machine": self.machine, "limits": self.limits}
        return known | asdict(self.progress)

    @classmethod
    def read(cls, meta: Mapping[str, Any], path: Path) -> RunState:
        """Return what the ``meta`` of the checkpoint at ``path`` says. Raises CheckpointError if that is no run."""
        try:
            state = dict(meta["train"])
            settings = dict(state.pop("settings"))
            # the first version kept only the settings
            data, machine, limits = (dict(state.pop(name, {})) for name in ("data", "machine", "limits"))
            if "right" not in state and state["images"]:
                state["right"] = None  # by a version that did not count them, in the middle of an epoch
            progress, steps = Progress(**state), settings["total steps"]
            if type(steps) is not int or not 0 < steps < 1 << 63:
                raise ValueError("a number of steps that is none")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} holds no training run", "resume from a run's last.npz") from error
        return cls(progress, settings, data, machine, limits)


# ---- what it is ------------------------------------------------------------------------------------------------------


def run_settings(step: TrainStep, schedule: Schedule | None, ema: float | None, total: int) -> dict[str, Any]:
    """Return what must be equal for a resumed run to be the same; the rates at some of its ``total`` steps."""
    opt, clip = step.opt, step.clip_norm
    loss = step.loss if isinstance(step.loss, partial) else partial(step.loss)
    keywords = dict(loss.keywords)
    smoothing = float(keywords.pop("smoothing", 0.0))
    return {
        "dtype": str(next(step.model.parameters()).dtype),
        "precision": step.precision.name,
        "seed": step.seed,
        "optimizer": type(opt).__name__,
        "optimizer settings": settings_of(opt, "named_parameters", "lr", "weight_decay", "lr_scales"),
        "factors on the learning rate": [[opt.store.learned_before(group.stop), group.scale] for group in opt.groups],
        "ema": ema,
        "weight decay": float(opt.weight_decay),
        "clip_norm": None if clip is None else float(clip),
        "loss": plain(partial(loss.func, *loss.args, **keywords)),
        "smoothing": smoothing,
        "learning rates": _rates(schedule, (0, total // 4, total // 2, total - 1)),
        "more learning rates": _rates(schedule, range(0, total, max(1, total // 32))),
        "total steps": total,
    }


def _rates(schedule: Callable[[int], float] | None, steps: Iterable[int]) -> list[str] | None:
    # rounded: the last bit of a cosine is not the same on every machine
    return None if schedule is None else [f"{schedule(t):.6g}" for t in steps]


def data_settings(train: Batches, valid: Batches | None) -> dict[str, Any]:
    """Return what is trained on and validated with, as a checkpoint keeps it.

    Of a :class:`~minivit.data.Loader` that is all its settings and the SHA-256 of its images and labels, as they are
    decoded; of other batches nothing is known.
    """
    known: dict[str, Any] = {"training": settings_of(train) if isinstance(train, Loader) else None}
    known["validation"] = plain(valid.dataset) if isinstance(valid, Loader) else None if valid is not None else "none"
    return known


def model_settings(model: Module) -> dict[str, Any]:
    """Return what the model says of itself, as a checkpoint's meta has it: ``model``, its settings, and ``kind``."""
    said = {"model": plain(getattr(model, "config", None)), "kind": getattr(model, "kind", None)}
    return {name: value for name, value in said.items() if value is not None}


# ---- whether it is the same ------------------------------------------------------------------------------------------


def check_settings(meta: Mapping[str, Any], before: RunState, now: RunState, model: Module, path: Path) -> None:
    """Raise CheckpointError, with each difference, if ``path``, of this ``meta``, is of another model or training."""
    settings = [name for name in now.settings if name in before.settings]
    found = [text for name in settings for text in differences(before.settings[name], now.settings[name], name)]
    own = model_settings(model)
    if "kind" in own and "model" in meta:
        found += differences(meta.get("kind", FIRST_KIND), own["kind"], "kind of model")
    found += differences(_but_seed(meta.get("model")), _but_seed(own.get("model")), "model")
    if found:
        remedy = "make model, optimizer, loss and Trainer as for the run's start"
        raise CheckpointError(f"{path} was trained with other settings: {'; '.join(found)}", remedy)


def _but_seed(config: Any) -> Any:
    """Return a model's settings but for the seed of its first parameters, which are not those of a checkpoint."""
    return {"kind": "model"} | {k: v for k, v in config.items() if k != "seed"} if isinstance(config, dict) else None


def check_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise CheckpointError, with each difference, if the data are not those that the run has had so far."""
    known = [name for name in now if None not in (before.get(name), now[name])]
    if found := [text for name in known for text in differences(before[name], now[name], name)]:
        remedy = "bring the data and the loaders' settings back, or start a new run from the parameters"
        raise CheckpointError(f"the run has had other data so far: {'; '.join(found)}", remedy)


def check_epochs(before: RunState, epochs: int, schedule: Schedule | None) -> str:
    """Check that the run can be one of ``epochs`` epochs; return a remark on the learning rate where they are more."""
    p = before.progress
    planned, begun = before.steps // max(p.batches, 1), p.epoch + (p.batch > 0)
    if epochs < begun:
        raise ConfigError(f"epochs={epochs}: the run is in epoch {begun} already", f"give {begun} or more")
    if epochs <= planned or schedule is None:
        return ""
    first, last = schedule(planned * p.batches), schedule(epochs * p.batches - 1)
    if first == last == 0.0:
        what = f"epochs={epochs}: the learning rate is 0 after epoch {planned}, more would change nothing"
        raise ConfigError(what, "start a new run, with that many epochs or from this one's parameters")
    rate = f"{first:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
    return f"{epochs} epochs instead of {planned}: the learning rate after epoch {planned} is {rate}"
