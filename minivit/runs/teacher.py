"""The teacher of a run: a trained model, of the same classes and images, that is asked what it makes of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from minivit.errors import CheckpointError
from minivit.models import Model
from minivit.runs.trained import Trained, open_trained
from minivit.train.distill import Student, check_alike


def open_teacher(given: str, classes: Sequence[str]) -> Trained:
    """Return the model of a checkpoint or a run's folder, to learn images of ``classes`` from.

    Raises CheckpointError for one that has learnt other classes, or the same ones in another order: what it says of an
    image would be taken for something else.
    """
    teacher = open_trained(given)
    if teacher.classes[: len(classes)] != tuple(classes):
        there = ", ".join(teacher.classes[:5]) or "no names"
        what = (
            f"the teacher {teacher.path} has other classes ({there}, …) than the images ({', '.join(classes[:5])}, …)"
        )
        raise CheckpointError(what, "choose a model that was trained on these images' classes")
    return teacher


def taught(model: Model, teacher: Trained, mean: Sequence[float], std: Sequence[float]) -> Student:
    """Return what a step runs: ``model``, whose images are standardised by ``mean`` and ``std``, and its teacher.

    The teacher moves to the model's device, and is given images standardised as it has learnt them. Raises ConfigError
    for one of other images or classes.
    """
    check_alike(model, teacher.model)
    first = next(model.parameters())
    asked = teacher.model.to(first.dtype).to(first.device)
    pairs = list(zip(mean, std, teacher.mean, teacher.std, strict=True))
    if all((m, s) == (its_m, its_s) for m, s, its_m, its_s in pairs):
        return Student(model, asked)
    # x = (pixel - m)/s, and the teacher wants (pixel - m')/s' = x·s/s' + (m - m')/s'
    scale, shift = [s / its for _, s, _, its in pairs], [(m - its_m) / its_s for m, _, its_m, its_s in pairs]
    return Student(model, asked, scale, shift)


def state_digest(model: Model) -> str:
    """Return a digest of a model's settings and parameters: a run that goes on asks the same teacher."""
    found = hashlib.sha256(repr((model.kind, sorted(model.config.items()))).encode())
    for name, array in model.state_dict().items():
        found.update(name.encode() + array.tobytes())
    return found.hexdigest()
