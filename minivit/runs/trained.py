"""What a command is given as CKPT: a checkpoint or a run's folder; its model, and what it records of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minivit.data.dataset import class_names
from minivit.errors import CheckpointError, NonFiniteError
from minivit.models import MODELS, Model
from minivit.runs.folder import find_checkpoint
from minivit.weights.native import read_model


def find_model(given: str) -> str:
    """Return the name of a named model, or the checkpoint that is meant: see :func:`find_checkpoint`."""
    return given if given in MODELS else find_checkpoint(given)


@dataclass(frozen=True)
class Trained:
    """A model from the checkpoint ``path``, in eval mode, and the checkpoint's ``meta``.

    ``classes`` are the names of the model's classes, () where none are recorded. ``mean`` and ``std`` standardise its
    images.
    """

    path: str
    model: Model
    meta: dict[str, Any]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def data(self) -> dict[str, Any]:
        """What is recorded of the data that it was trained on."""
        found: dict[str, Any] = self.meta.get("data", {})
        return found

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of the images that the model takes."""
        shape: tuple[int, int, int] = self.model.settings.image_shape
        return shape


def open_trained(given: str) -> Trained:
    """Read the model of a checkpoint or a run's folder.

    Raises CheckpointError if it cannot be used or does not say how images are standardised for it, and NonFiniteError,
    naming the first, if a parameter is not finite.
    """
    path = find_checkpoint(given)
    model, meta = read_model(path)
    for name, p in model.named_parameters():
        if not math.isfinite(p.data.min()) or not math.isfinite(p.data.max()):  # both are NaN if any element is
            remedy = "use a checkpoint from before the training diverged, or train again with a lower learning rate"
            raise NonFiniteError(f"{path}: the parameter {name} holds NaN or infinity", remedy)
    data = meta.get("data", {})
    if "mean" not in data or "std" not in data:  # with others its answers would be wrong
        missing = ", ".join(key for key in ("classes", "mean", "std") if key not in data)
        what = f"{path} holds no {missing} of the images that the model was trained on"
        raise CheckpointError(
            what, "save it with them, mv.save(model, path, data=dataset), or put another system's config.json beside it"
        )
    names = data.get("classes")
    classes = tuple(class_names(names, model.config["num_classes"])) if names else ()
    return Trained(path, model, meta, classes, tuple(data["mean"]), tuple(data["std"]))
