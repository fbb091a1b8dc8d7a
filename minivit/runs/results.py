"""The pictures and the report in a run's folder: images as the model sees them, and what it takes them for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.backend import to_device, to_numpy
from minivit.data import Dataset, Loader
from minivit.errors import CheckpointError
from minivit.files import open_regular
from minivit.models import Model
from minivit.nn.module import mode
from minivit.runs.job import Job
from minivit.show.lettering import drawable_names
from minivit.show.page import write_report
from minivit.show.pictures import attention_overlay, confusion_picture, mosaic, predictions_picture
from minivit.study.asking import reads_class_token, token_weights
from minivit.train.inference import predict_logits

SHOWN = 50  # images in a picture


def draw_samples(job: Job, folder: Path) -> None:
    """Draw training images, and images held out, as the model will see them."""
    parts = job.parts
    title = f"Training images of {parts.title}, as the model sees them"
    draw_batch(job.loader, folder / "samples_train.png", title)
    held = None if job.settings["data.overfit"] else parts.valid or parts.test
    if held is not None:
        title = f"Images of {parts.title} held out, as the model sees them"
        draw_batch(parts.held_loader(spread_out(held)), folder / "samples_valid.png", title)


def draw_batch(loader: Loader, path: Path, title: str) -> None:
    """Draw the images of a loader's first batch as the model is given them, with their labels."""
    images, labels = (to_numpy(x) for x in next(loader.batches(0)))
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (loader.mean, loader.std))  # (C, 1, 1)
    pixels = ((images * std + mean) * 255).round().clip(0, 255).astype(np.uint8)[:SHOWN, :3]  # drawn without alpha
    names = drawable_names(loader.dataset.classes)
    mosaic(pixels, [_label_text(label, names) for label in labels[:SHOWN]], path, title=title)


def _label_text(label: Any, names: Sequence[str]) -> str:
    """Return a label's name; of mixed labels the two largest, with the share of the first."""
    if np.ndim(label) == 0:
        return names[label]
    first, second = np.argsort(label)[::-1][:2]
    return names[first] if label[first] > 0.995 else f"{names[first]} {label[first]:.0%} {names[second]}"


def spread_out(dataset: Dataset) -> Dataset:
    """Return images from all over a data set, because a folder's are in the order of their classes."""
    return dataset.subset(np.unique(np.linspace(0, len(dataset) - 1, SHOWN).astype(int)))


def draw_attention(model: Any, loader: Loader, path: Path) -> None:
    """Draw where the last block's class token looks (without one: what all patches look at), mean over the heads.

    ``model`` has a ``trace``; ``loader`` has one batch, in the data set's order.
    """
    images, labels = next(loader.batches(0))
    device = next(model.parameters()).device
    with mode(False), no_grad():
        trace = model.trace(to_device(images, device))
    weights = to_numpy(trace.attention[-1].data).mean(axis=1)  # (B, heads, T, T) → (B, T, T)
    of_class = reads_class_token(trace)
    rows = weights[:, 0] if of_class else weights[:, trace.prefix :].mean(axis=1)  # → (B, T)
    if (weighed := token_weights(trace)) is not None:
        rows = (weighed @ weights)[:, 0]  # (B, 1, T)·(B, T, T) → (B, T)
    weights = rows[:, trace.prefix :]  # → (B, patches)
    logits = predict_logits(model, images)
    names = drawable_names(loader.dataset.classes)
    attention_overlay(
        _drawable(loader.dataset),
        np.ascontiguousarray(weights).reshape(-1, *trace.grid),
        [names[i] for i in labels],
        [names[i] for i in logits.argmax(axis=1)],
        path,
        title="Where the class token looks" if of_class else "What the patches look at, on average",
    )


def _drawable(dataset: Dataset) -> np.ndarray:
    """Return all images, uint8 (N, C, H, W), without alpha."""
    return np.asarray(dataset.images[np.arange(len(dataset))])[:, :3]


def _command(path: Path) -> str:
    """Return what a run's command.txt says."""
    try:
        with open_regular(path) as f:
            return f.read().decode("utf-8", "replace")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}", "put a text in its place") from error


def write_results(
    model: Model,
    loader: Loader,
    logits: np.ndarray,
    result: dict[str, Any],
    folder: Path,
    *,
    title: str,
    about: str,
    config: str,
    rows: list[dict[str, Any]],
    split: str,
) -> None:
    """Write the pictures and, last, the report of what ``model`` makes of a loader's images.

    ``loader`` keeps the data set's order, in which ``logits`` (N, K) are; ``result`` is what
    :func:`~minivit.measure.metrics.classification_metrics` finds in them, and ``split`` says which images these are. Of
    images that were trained on, or by which the weights were chosen, the report shows single ones, not how good the
    model is. ``config`` is what the run's config.toml says.
    """
    shown = loader.dataset
    names, drawable = shown.classes, drawable_names(shown.classes)
    few = spread_out(shown)
    sample = Loader(few, len(few), loader.key, mean=loader.mean, std=loader.std, shuffle=False)
    if hasattr(model, "trace"):
        draw_attention(model, sample, folder / "attention.png")
    predicted = predict_logits(model, next(sample.batches(0))[0]).argmax(axis=1)
    predictions_picture(
        _drawable(few),
        [drawable[i] for i in few.labels],
        [drawable[i] for i in predicted],
        folder / "predictions.png",
        title=f"Predictions on {split} images",
    )
    confusion_picture(result["confusion"], names, folder / "confusion.png", title=f"Confusion on the {split} images")
    write_report(
        folder / "report.html",
        title=title,
        rows=rows,
        test=result if split == "test" else None,
        config=config,
        command=_command(folder / "command.txt"),
        images=shown.images,
        logits=logits,
        labels=shown.labels,
        classes=names,
        samples=folder / "samples_train.png",
        about=about,
        split=split,
        files=shown.files,
    )
