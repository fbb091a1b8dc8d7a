"""The images of a run: loaded, divided into those to train on and those held out, changed at random, put in batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minivit import data
from minivit.backend import Key, permutation
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
from minivit.errors import DataError, printable
from minivit.nn.rules import pair
from minivit.runs.settings import GIVEN, RunSettings
from minivit.show.text import plural

TRAIN_STREAM, HOLD_OUT_STREAM = 0x7A1, 0x0FF  # streams of random numbers under the run's seed


@dataclass(frozen=True)
class Parts:
    """What a run trains on, validates with and is tested with: None where there is nothing of the kind.

    ``title`` is what the data are called, ``remark`` what a user ought to know of them.
    """

    title: str
    train: Dataset
    valid: Dataset | None
    test: Dataset | None
    remark: str = ""

    def text(self, classes: int) -> str:
        """Return how many images there are for what, of what size and of how many ``classes``."""
        channels, height, width = self.train.images.shape[1:]
        parts = {"to train on": self.train, "to validate with": self.valid, "to test with": self.test}
        counts = ", ".join(f"{len(part):,} {use}" for use, part in parts.items() if part is not None)
        return f"{self.title}: {counts}; {height} × {width} pixels, {plural(channels, 'channel')}, {classes} classes"

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the images and the labels of each part."""
        parts = {"training": self.train, "validation": self.valid, "test": self.test}
        prints = {name: part.fingerprint for name, part in parts.items() if part is not None}
        return {f"{name} {what}": digest for name, found in prints.items() for what, digest in found.items()}

    def training_loader(self, s: RunSettings, device: str, gpu_memory: int | None = None) -> Loader:
        """Return the training batches, made on ``device``: the batch size times the batches that make up an update.

        ``gpu_memory`` as :class:`Loader` has it.
        """
        mix = Mix(s["data.mixup"], s["data.cutmix"]) if s["data.mixup"] or s["data.cutmix"] else None
        size = s["train.batch_size"] * s["train.grad_accum_steps"]
        augment = augmentation(s.table("data"), self.train.images.shape[1])
        key = Key(s["train.seed"], TRAIN_STREAM)
        window = s["data.window"]
        return Loader(self.train, size, key, augment, mix, device=device, gpu_memory=gpu_memory, window=window)

    def held_loader(self, dataset: Dataset, device: str = "cpu", gpu_memory: int | None = None) -> Loader:
        """Return batches of other images, in their order, standardised like the training images, on ``device``."""
        mean, std = self.train.mean, self.train.std
        return Loader(dataset, 512, Key(0), None, None, mean, std, shuffle=False, device=device, gpu_memory=gpu_memory)


# ---- loading and dividing --------------------------------------------------------------------------------------------


def load_parts(settings: RunSettings, bar: Callable[..., Any] | None = None) -> Parts:
    """Load the data that ``settings`` name, as they are divided on disk; ``bar`` as :func:`minivit.data.load` has it.

    Raises DataError if they cannot be used, or if their splits do not belong together.
    """
    name, kind = settings["data.name"], data.kind_of(settings["data.name"])
    title = printable(Path(name).stem if kind in ("npz", "folder", "shards") else kind)
    whole = _load(settings, "train", bar)
    test, valid = (_load_beside(settings, whole, split, bar) for split in ("test", "val"))
    return Parts(title, whole, valid, test)


def _load(s: RunSettings, split: str, bar: Callable[..., Any] | None) -> Dataset:
    """Return a split of the data; image files as the model takes them."""
    size = pair("model.image_size", s["model.image_size"]) if s.origins["model.image_size"] != "default" else None
    name, bad, layout, stream = (s[f"data.{key}"] for key in ("name", "bad_images", "layout", "stream"))
    return data.load(name, split, size, s["model.in_channels"], bad, layout, bar, stream=stream)


def _load_beside(s: RunSettings, whole: Dataset, split: str, bar: Callable[..., Any] | None) -> Dataset | None:
    """Return a split that belongs to the training images, or None if there is no such split."""
    name = s["data.name"]
    if split not in data.splits_of(name, s["data.layout"]):
        return None
    part = _load(s, split, bar)
    if part.images.shape[1:] != whole.images.shape[1:] or part.classes != whole.classes:
        raise DataError(
            f"{name}: {whole.images.shape[1:]} images of {len(whole.classes)} classes to train on, "
            f"{part.images.shape[1:]} of {len(part.classes)} to {'test' if split == 'test' else 'validate'} with",
            "give all splits the same size and classes",
        )
    return part


def divide(found: Parts, classes: tuple[str, ...], s: RunSettings) -> Parts:
    """Return the parts of a run, of what :func:`load_parts` has ``found``; their classes are then called ``classes``.

    It validates with the data's own validation images, or with some that are held out of the training images.
    """
    test, valid = (part and replace(part, classes=classes) for part in (found.test, found.valid))
    whole, key = replace(found.train, classes=classes), Key(s["train.seed"], HOLD_OUT_STREAM)
    if s["data.overfit"]:
        few = whole.subset(np.sort(permutation(key, len(whole))[: s["data.overfit"]]))
        return Parts(found.title, few, few, test)
    if valid is None and s["data.val_fraction"] > 0:
        try:
            train, valid = whole.split_off(s["data.val_fraction"], key, stratified=s["data.layout"] > 1)
            return Parts(found.title, train, valid, test)
        except DataError as error:  # there are too few images
            if s.origins["data.val_fraction"] in GIVEN:
                raise
            remark = f"{error.what}; none are held out to validate with"
            return Parts(found.title, whole, None, test, remark)
    return Parts(found.title, whole, valid, test)


# ---- random changes --------------------------------------------------------------------------------------------------

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
