"""One batch to look at a model with: of the images that it was trained on, or where those are not there, of noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.backend import Key, normal
from minivit.backend.outline import outline
from minivit.data import Loader
from minivit.errors import CheckpointError, DataError, MinivitError
from minivit.models import Model
from minivit.runs.assess import load_split
from minivit.runs.trained import Trained, open_trained
from minivit.show.text import plural
from minivit.weights.native import load_model


@dataclass(frozen=True)
class Batch:
    """``images`` (B, C, H, W), standardised, ``labels`` int64 (B,) or None for all 0, and ``about``, what they are.

    ``why`` says why they are none of the model's own, where one might expect those.
    """

    images: np.ndarray
    labels: np.ndarray | None
    about: str
    why: str = ""


def image_outline(model: Model) -> Batch:
    """Return the outline of one image for ``model``, labelled 0: shapes without numbers."""
    return Batch(outline((1, *model.settings.image_shape), _dtype(model)), None, "one image")


def model_and_batch(path: str, most: Callable[[Model], int], bar: Callable[..., Any] | None) -> tuple[Model, Batch]:
    """Return the model of a checkpoint and a batch for it, of ``most(model)`` images at the most, the same every time.

    ``bar`` as :func:`minivit.data.load` has it. Raises CheckpointError for a checkpoint that cannot be used, and
    NonFiniteError for one whose parameters are not finite.
    """
    try:
        trained = open_trained(path)
    except CheckpointError as error:  # it may hold a model all the same
        model = load_model(path)
        return model, _noise(model, error.what)
    try:
        return trained.model, _own(trained, most(trained.model), bar)
    except MinivitError as error:
        return trained.model, _noise(trained.model, error.what)


def _own(trained: Trained, most: int, bar: Callable[..., Any] | None) -> Batch:
    """Return training images drawn at random; raise DataError, or what else loading them raises, if there are none."""
    name = trained.data.get("name")
    if not isinstance(name, str):
        raise DataError("the checkpoint does not say what it was trained on")
    [part] = load_split(trained, name, "train", bar)
    if trained.classes and part.classes != trained.classes:
        raise DataError(f"{name} has other classes than the model")
    count = min(most, len(part))
    images, labels = next(Loader(part, count, Key(0), mean=trained.mean, std=trained.std).batches(0))
    return Batch(
        images.astype(_dtype(trained.model), copy=False), labels, f"{plural(count, 'training image')} of {part.name}"
    )


def _noise(model: Model, why: str) -> Batch:
    """Return one image of standard-normal numbers, labelled 0."""
    shape = (1, *model.settings.image_shape)
    noise = normal(Key(0), shape).astype(_dtype(model), copy=False)
    return Batch(noise, None, "one image of standard-normal noise, labelled 0", why)


def _dtype(model: Model) -> np.dtype:
    """Return the dtype of a model's parameters, which its images share."""
    dtype: np.dtype = next(model.parameters()).dtype
    return dtype
