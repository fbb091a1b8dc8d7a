"""What a model makes of images with labels, batch by batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from minivit import ops
from minivit.backend import Array, to_numpy
from minivit.data.loader import Loader
from minivit.errors import ConfigError, DataError
from minivit.nn.module import Module
from minivit.ops.loss import check_labels
from minivit.train.inference import predict_logits


class Batches(Protocol):
    """What is trained on: a :class:`minivit.data.Loader`, or whatever yields the same batches for the same epoch."""

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """Yield (images, labels) of an epoch (from 0) from its batch ``start`` on."""
        ...


def evaluate(
    model: Module, loader: Batches, after_batch: Callable[[], None] | None = None, threads: int | None = None
) -> dict[str, Any]:
    """Return loss (mean cross-entropy), accuracy, count, logits (N, K) and labels (N,) over a loader's epoch 0.

    The loss is the plain one, whatever was trained with, so that runs can be compared. ``after_batch`` is called after
    each batch; what it raises ends the evaluation. Raises DataError for no images or labels that are not integers.
    """
    logits, labels = [], []
    for images, targets in loader.batches(0):
        check_classes(targets := to_numpy(targets))
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


def check_classes(labels: Array, classes: int | None = None) -> None:
    """Raise DataError unless labels to validate with are numbers of classes; of a model's ``classes``, if given."""
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"evaluation needs a class for each image, not {labels.dtype} labels of shape {labels.shape}",
            "give the validation images integer labels (N,): soft ones are for training",
        )
    if classes is not None:
        check_labels(labels, classes)


def first_loss_doubt(loss: float, classes: int | None) -> str:
    """Return a warning if a run's first loss is much worse than a guess among the model's ``classes``; "" if not."""
    if classes is None or loss <= 1.5 * math.log(classes) + 0.5:
        return ""
    guess = f"a guess among {classes} classes has {math.log(classes):.2f}"
    return f"warning: the first loss is {loss:.2f}, {guess}: look at the labels and the first weights"


def check_loaders(train: Batches, valid: Batches | None, batches: int, is_patient: bool, classes: int | None) -> None:
    """Raise DataError or ConfigError for what cannot be trained on, in a run of so many ``batches``, or validated with.

    A run that has not begun has 0; one ``is_patient`` that waits for better validations.
    """
    if len(train) < 1 or (valid is not None and len(valid) < 1):
        raise DataError("a loader without a batch", "give at least one image to train on, and to validate with")
    if batches not in (0, len(train)):
        raise ConfigError(
            f"the run had {batches} batches in an epoch, now there are {len(train)}",
            "continue it with the data and the batch size that it was started with",
        )
    if is_patient and valid is None:
        raise ConfigError("patience without validation images", "give some, or no patience")
    for _, labels in itertools.islice(valid.batches(0), 1) if valid is not None else ():
        check_classes(to_numpy(labels), classes)  # here, not after an epoch
    check_labels_there(train, classes)


def check_labels_there(loader: Batches, classes: int | None) -> None:
    """Raise DataError for a label outside a model's ``classes``, if known, in a loader whose batches are on a GPU.

    There no step looks at labels, because it would wait for them.
    """
    if isinstance(loader, Loader) and loader.on_gpu and classes is not None:
        check_labels(loader.dataset.labels, classes)
