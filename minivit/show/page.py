"""A run on one page: ``report.html``, a single file that runs nothing and asks no network for anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit.errors import ShapeError
from minivit.files import write_text
from minivit.show.curves import chart
from minivit.show.document import all_sections, document
from minivit.show.gallery import gallery, mistakes, right_ones, samples_picture
from minivit.show.markup import escape
from minivit.show.tables import class_table, confusion_table


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    test: Mapping[str, Any] | None,
    config: str,
    command: str,
    images: Any,
    logits: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    samples: str | Path | None = None,
    about: str = "",
    split: str = "test",
    files: Sequence[str] = (),
) -> None:
    """Write the report of a training run to ``path``: figures, curves, samples, confusions, mistakes and settings.

    ``rows`` are the epochs', each with epoch, step, lr, loss, images_per_second and seconds, and where they are known
    accuracy, valid_loss and valid_accuracy. ``images`` uint8 (N, C, H, W), an array or what is indexed like one, of
    which at most three channels are drawn, ``logits`` (N, K) and ``labels`` (N,) are what the model was tried on;
    ``classes`` are K names, and ``split`` is what to call the images. ``test`` has the figures of these (loss,
    accuracy, interval, count and perhaps top5), or is None if they are no measure of the model; ``files``, () or N
    paths, are where they came from. ``config``, TOML, and ``command`` are texts to show, ``samples`` is a picture of
    training images, ``about`` a line under the title.

    The page is whole or not there. It loads nothing and runs nothing. Raises ShapeError for other than K names.
    """
    count = logits.shape[1]
    if len(classes) != count:
        raise ShapeError(f"logits of shape {logits.shape} for {len(classes)} classes", "give a name for each column")
    log_p = _log_softmax(logits)  # (N, K)
    flat = np.bincount(labels * count + log_p.argmax(axis=1), minlength=count * count)
    confusion = flat.reshape(count, count)  # label by row, prediction by column
    wrong, right = mistakes(log_p, labels), right_ones(log_p, labels)
    sections = {
        "Curves": _curves(rows),
        "Training images, as the model saw them": samples_picture(samples),
        f"Confusion on the {split} images": confusion_table(confusion, classes),
        f"Accuracy of each class on the {split} images": class_table(confusion, classes),
        f"The worst mistakes on the {split} images": gallery(wrong, images, log_p, labels, classes, files),
        "Some that are right": gallery(right, images, log_p, labels, classes, files),
        "Configuration": _config(config),
        "Command and machine": _pre(map(escape, command.rstrip("\n").split("\n"))) if command else "",
    }
    body = f"<p>{escape(about)}</p>\n{_figures(rows, test, split)}\n{all_sections(sections)}"
    write_text(Path(path), document(title, body))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return x - log Σ e^x over the last axis."""
    x = logits - logits.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


# ---- figures and curves ----------------------------------------------------------------------------------------------


def _figures(rows: Sequence[Mapping[str, Any]], test: Mapping[str, Any] | None, split: str) -> str:
    figures: list[tuple[str, str, str]] = []  # what, value, remark
    if test is not None:
        low, high = test["interval"]
        interval = f"95% interval {100 * low:.2f} to {high:.2%}"
        figures.append((f"{split} accuracy", f"{test['accuracy']:.2%}", f"{interval}; {test['count']:,} images"))
        if "top5" in test:
            figures.append((f"{split} top-5 accuracy", f"{test['top5']:.2%}", "label among the five likeliest"))
        figures.append((f"{split} loss", f"{abs(test['loss']):.4f}", "mean cross-entropy"))
    if tried := [row for row in rows if "valid_accuracy" in row]:
        best = max(tried, key=lambda row: (row["valid_accuracy"], -row["valid_loss"]))
        figures.append(("best validation accuracy", f"{best['valid_accuracy']:.2%}", f"after epoch {best['epoch']}"))
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        speed = sum(row["images_per_second"] * row["seconds"] for row in rows) / max(seconds, 1e-9)
        figures.append(("last training loss", f"{rows[-1]['loss']:.4f}", "mean over the epoch"))
        figures.append(("epochs", f"{rows[-1]['epoch']:,}", f"{rows[-1]['step']:,} updates"))
        figures.append(("time to train", _duration(seconds), f"{speed:,.0f} images/s"))
    tiles = [
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>"
        for what, value, remark in figures
    ]
    return f'<div class="figures">{"".join(tiles)}</div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the charts: a column of ``rows`` that is not there has no line."""

    def line(key: str) -> list[tuple[float, float]]:
        return [(row["epoch"], float(row[key])) for row in rows if row.get(key) is not None]

    def percent(y: float) -> str:
        return f"{100 * y:.4g}%"

    def titled(name: str, key: str) -> str:
        """Say of which images, if it is of one kind only."""
        kinds = [kind for kind, column in (("Training", key), ("Validation", f"valid_{key}")) if line(column)]
        return f"{kinds[0]} {name}" if len(kinds) == 1 else name.capitalize()

    charts = [
        chart(titled("loss", "loss"), {"training": line("loss"), "validation": line("valid_loss")}, "epoch"),
        chart(
            titled("accuracy", "accuracy"),
            {"training": line("accuracy"), "validation": line("valid_accuracy")},
            "epoch",
            percent,
        ),
        chart("Learning rate", {"learning rate of the epoch's last step": line("lr")}, "epoch"),
        chart("Images per second", {"images per second": line("images_per_second")}, "epoch", "{:,.0f}".format),
    ]
    if not any(charts):
        return ""
    remark = "Training loss and accuracy are of images as they were trained on, with all that makes training harder: "
    remark += "augmentation, dropout, label smoothing. A validation loss is the plain one."
    return f'<div class="charts">{"".join(charts)}</div>\n<p>{remark}</p>'


# ---- settings --------------------------------------------------------------------------------------------------------


def _config(text: str) -> str:
    """Return config.toml with its comments, each value's origin, stepping back."""
    lines = []
    for line in text.rstrip("\n").split("\n"):
        value, hash_sign, origin = line.rpartition("  # ")
        lines.append(f"{escape(value)}<i>{hash_sign}{escape(origin)}</i>" if hash_sign else escape(line))
    return _pre(lines) if text else ""


def _pre(lines: Iterable[str]) -> str:
    return "<pre>" + "\n".join(lines) + "</pre>"
