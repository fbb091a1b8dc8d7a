"""What a command is given as CKPT: a checkpoint or a run's folder; its model, and what it records of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minivit.data import Preparation
from minivit.data.dataset import class_names
from minivit.data.file_array import FIT
from minivit.data.fit import OWN_FITS
from minivit.data.preparation import recorded
from minivit.errors import CheckpointError, NonFiniteError
from minivit.models import MODELS, Model, names_alike, preparation
from minivit.show.text import plural
from minivit.weights.foreign import open_foreign
from minivit.weights.load import create_model
from minivit.weights.native import read_model
from minivit.weights.place import find_checkpoint


def find_model(given: str) -> str:
    """Return the name of a named model, or the checkpoint that is meant: see :func:`find_checkpoint`."""
    return given if given in MODELS else find_checkpoint(given)


@dataclass(frozen=True)
class Trained:
    """A model from the checkpoint ``path``, in eval mode, and the checkpoint's ``meta``.

    ``classes`` are the names of the model's classes, () where none are recorded. ``preparation`` is how images are
    prepared for it: its ``mean`` and ``std`` standardise them.
    """

    path: str
    model: Model
    meta: dict[str, Any]
    classes: tuple[str, ...]
    preparation: Preparation

    @property
    def data(self) -> dict[str, Any]:
        """What is recorded of the data that it was trained on."""
        found: dict[str, Any] = self.meta.get("data", {})
        return found

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel."""
        return self.preparation.mean

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel."""
        return self.preparation.std

    @property
    def from_elsewhere(self) -> bool:
        """Whether the weights are of no data set that is recorded: of another system, most likely."""
        return "name" not in self.data

    @property
    def folder_fit(self) -> str:
        """How a folder's pictures are brought to the model's size: as folders always are, or as other systems do."""
        return FIT if self.preparation.fit in OWN_FITS else self.preparation.fit

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of the images that the model takes."""
        shape: tuple[int, int, int] = self.model.settings.image_shape
        return shape


def _read(path: str, like: str | None) -> tuple[Model, dict[str, Any]]:
    """Read the model in a file, and its meta. A bare state dict does not always say all: the name says the rest."""
    foreign = None if like is None else open_foreign(path)
    if like is None or foreign is None or not foreign.layout.named or foreign.config:
        return read_model(path)
    return create_model(like, weights=path).eval(), {}


def open_trained(given: str, like: str | None = None) -> Trained:
    """Read the model of a checkpoint or a run's folder.

    Images are prepared for it as the checkpoint says, or as for the named model that it is ``like``; what a file of
    timm's without its config.json does not say of the model, that name says, too. Raises CheckpointError if it cannot
    be used or does not say how, ConfigError for a name that is known for no weights, and NonFiniteError, naming the
    first, if a parameter is not finite.
    """
    path = find_checkpoint(given)
    model, meta = _read(path, like)
    for name, p in model.named_parameters():
        if not math.isfinite(p.data.min()) or not math.isfinite(p.data.max()):  # both are NaN if any element is
            remedy = "use a checkpoint from before the training diverged, or train again with a lower learning rate"
            raise NonFiniteError(f"{path}: the parameter {name} holds NaN or infinity", remedy)
    data = meta.get("data", {})
    prepared = recorded(data) if like is None else preparation(like)
    if prepared is None:  # with others its answers would be wrong
        missing = ", ".join(key for key in ("classes", "mean", "std") if key not in data)
        what = f"{path} holds no {missing} of the images that the model was trained on"
        remedy = "save it with them, mv.save(model, path, data=dataset), or put another system's config.json beside it"
        if alike := names_alike(model.settings):
            remedy += f"; or, of weights from elsewhere, say whose images they take: --like {' or '.join(alike)}"
        raise CheckpointError(what, remedy)
    channels = model.settings.in_channels
    if len(prepared.mean) != channels:  # of a named model
        what = f"{like} takes images of {plural(len(prepared.mean), 'channel')}, the model in {path} of {channels}"
        raise CheckpointError(what, "name another")
    names = data.get("classes")
    classes = tuple(class_names(names, model.config["num_classes"])) if names else ()
    return Trained(path, model, meta, classes, prepared)
