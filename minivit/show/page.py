"""A run on one page: ``report.html``, a single file that runs nothing and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minivit import ops
from minivit.data.datasets import class_names
from minivit.errors import shortened
from minivit.files import replacing
from minivit.show.curves import COLOURS, STYLE, chart, escape
from minivit.show.pictures import MOST_NAMED, enlarged

if TYPE_CHECKING:
    from PIL import Image

MISTAKES, RIGHT, PAIRS = 24, 12, 20  # how many are shown
SHARP = 64  # pixels: larger images are photos, and are kept small
LARGE = 400_000  # bytes of a picture that is made smaller to be part of the page
SHADES = 9  # of a cell of the confusion matrix

_DARK = "".join(f"--{name}: {dark}; " for name, (_, dark) in COLOURS.items())
_LIGHT = "".join(f"--{name}: {light}; " for name, (light, _) in COLOURS.items())
_CELLS = "".join(
    f".hit{n} {{ background: rgb(9 105 218 / {0.065 * n:.3f}); }}\n"
    f".miss{n} {{ background: rgb(207 34 46 / {0.065 * n:.3f}); }}\n"
    for n in range(1, SHADES + 1)
)
PAGE_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT}}}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK}}} }}
* {{ box-sizing: border-box; }}
body {{ max-width: 1000px; margin: 0 auto; padding: 16px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 26px; margin: 8px 0 0; }}
h2 {{ font-size: 18px; margin: 40px 0 8px; border-bottom: 1px solid var(--faint); }}
p {{ margin: 4px 0 12px; color: var(--quiet); }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 20px 0; }}
.figures div {{ border: 1px solid var(--faint); border-radius: 6px; padding: 8px 12px; }}
.figures b {{ display: block; font-size: 22px; line-height: 1.3; }}
.figures span, .figures small {{ display: block; color: var(--quiet); font-size: 13px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px 28px; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th {{ font-weight: 500; text-align: left; }}
td, th {{ padding: 2px 10px 2px 0; overflow-wrap: normal; }}
td.number {{ text-align: right; }}
.confusion td {{ width: 40px; min-width: 30px; height: 30px; padding: 0 2px; text-align: center;
  border: 1px solid var(--faint); }}
.confusion th {{ white-space: nowrap; }}
.confusion thead th {{ writing-mode: vertical-rl; transform: rotate(180deg); padding: 6px 0 2px; }}
.confusion thead td {{ border: none; }}
.none {{ color: var(--quiet); }}
{_CELLS}
.bar {{ width: 120px; height: 10px; vertical-align: middle; }}
.bar rect {{ fill: var(--faint); }}
.bar .full {{ fill: var(--blue); }}
.images {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 14px 10px; }}
figure {{ margin: 0; text-align: center; font-size: 13px; line-height: 1.3; }}
figure img {{ width: 88px; height: 88px; object-fit: contain; }}
figcaption span {{ display: block; color: var(--quiet); }}
figcaption .wrong {{ color: var(--red); }}
.sharp {{ image-rendering: pixelated; }}
.samples {{ max-width: 100%; }}
pre {{ padding: 12px; overflow-x: auto; border: 1px solid var(--faint); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; overflow-wrap: normal; }}
pre i {{ color: var(--quiet); font-style: normal; }}
summary {{ cursor: pointer; color: var(--blue); }}
{STYLE}"""


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
    """Write the report of a run to ``path``: figures, curves, samples, confusions, mistakes and configuration.

    ``rows`` are the epochs', as :meth:`minivit.train.Trainer.fit` returns them. ``images`` uint8 (N, C, H, W), an array
    or what is indexed like one, of which at most three channels are drawn, ``logits`` (N, K) and ``labels`` (N,) are
    what the model was tried on; ``split`` is what to call them. ``test`` has the figures of these (loss, accuracy,
    interval, count and perhaps top5), or is None if they are no measure of the model; ``files``, () or N paths, are
    where they came from. ``config`` and ``command`` are
    the texts of config.toml and command.txt, ``samples`` is a picture of training images, ``about`` a line under the
    title.

    The page is whole or not there. Its Content-Security-Policy lets it load nothing and run nothing: only the pictures
    and the style within it count.
    """
    count = logits.shape[1]
    names = class_names(classes, count)
    log_p = np.asarray(ops.log_softmax(logits))  # (N, K)
    flat = np.bincount(labels * count + log_p.argmax(axis=1), minlength=count * count)
    confusion = flat.reshape(count, count)  # label by row, prediction by column
    wrong, right = _mistakes(log_p, labels), _right_ones(log_p, labels)
    sections = {
        "Curves": _curves(rows),
        "Training images, as the model saw them": _samples(samples),
        f"Confusion on the {split} images": _confusion(confusion, names),
        f"Accuracy of each class on the {split} images": _by_class(confusion, names),
        f"The worst mistakes on the {split} images": _gallery(wrong, images, log_p, labels, names, files),
        "Some that are right": _gallery(right, images, log_p, labels, names, files),
        "Configuration": _config(config),
        "Command and machine": _pre(map(escape, command.rstrip("\n").split("\n"))) if command else "",
    }
    body = "".join(
        f"<section>\n<h2>{escape(name)}</h2>\n{html}\n</section>\n" for name, html in sections.items() if html
    )
    digest = base64.b64encode(hashlib.sha256(PAGE_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{PAGE_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
{_figures(rows, test, split)}
{body}</body>
</html>
"""
    with replacing(Path(path)) as f:
        f.write(page.encode())


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


# ---- classes ---------------------------------------------------------------------------------------------------------


def _confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return the confusion matrix, or of very many classes the pairs that are confused most often."""
    totals = np.maximum(counts.sum(axis=1), 1)  # (K,)
    if len(names) <= MOST_NAMED:
        head = "".join(f'<th scope="col">{_short(name, 16)}</th>' for name in names)
        rows = [
            f'<tr><th scope="row">{_short(names[i], 16)}</th>'
            + "".join(_cell(n, n / totals[i], i == j, f"{names[i]} read as {names[j]}") for j, n in enumerate(row))
            + "</tr>\n"
            for i, row in enumerate(counts.tolist())
        ]
        remark = "Label by row, prediction by column. Colour: the share of the row, for mistakes by its square root."
        table = f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
        return f'<p>{remark}</p>\n<div class="wide"><table class="confusion">{table}</table></div>'
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))  # (K, K)
    worst = [divmod(int(k), len(names)) for k in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]]
    pairs = [
        [_short(names[i]), _short(names[j]), f"{wrong[i, j]:,}", f"{wrong[i, j] / totals[i]:.1%}"]
        for i, j in worst
        if wrong[i, j]
    ]
    remark = f"The most frequent mistakes among {len(names):,} classes."
    return f"<p>{remark}</p>" + _table(["label", "read as", "times", "share of its images"], pairs, numbers=(2, 3))


def _cell(count: int, share: float, right: bool, what: str) -> str:
    if not count:
        return '<td class="none">·</td>'
    shade = max(1, round(SHADES * (share if right else share**0.5)))
    return f'<td class="{"hit" if right else "miss"}{shade}" title="{escape(what)}: {share:.1%}">{count}</td>'


def _by_class(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return a table of the classes that there are images of; of very many, the worst first and most of it folded."""
    totals, rights = counts.sum(axis=1), counts.diagonal()  # (K,)
    shares = rights / np.maximum(totals, 1)
    order = [i for i in range(len(names)) if totals[i]]
    if len(names) > MOST_NAMED:
        order.sort(key=lambda i: shares[i])
    rows = [
        [_short(names[i]), f"{totals[i]:,}", f"{shares[i]:.1%}", _bar(shares[i]), _mistaken(counts[i], i, names)]
        for i in order
    ]
    head = ["class", "images", "right", "", "most often mistaken for"]
    found = _table(head, rows[:MOST_NAMED], numbers=(1, 2))
    if rest := rows[MOST_NAMED:]:
        found += f"<details><summary>{len(rest):,} more classes</summary>{_table(head, rest, numbers=(1, 2))}</details>"
    return found


def _bar(share: float) -> str:
    rect = '<rect width="100" height="10"/>'
    full = f'<rect class="full" width="{100 * share:.1f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{rect}{full}</svg>'


def _mistaken(row: np.ndarray, own: int, names: Sequence[str]) -> str:
    others = np.where(np.arange(len(row)) == own, 0, row)  # (K,)
    other = int(others.argmax())
    return f"{_short(names[other])} ({others[other]:,})" if others[other] else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """Return a table of cells that are HTML already; the columns in ``numbers`` stand to the right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>\n" for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _short(name: str, width: int = 40) -> str:
    """Return a name as HTML, cut to ``width`` characters."""
    return escape(shortened(name, width))


# ---- images ----------------------------------------------------------------------------------------------------------


def _mistakes(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the wrongly read images with the highest loss, worst first."""
    wrong = np.flatnonzero(log_p.argmax(axis=1) != labels)
    return wrong[np.argsort(log_p[wrong, labels[wrong]], kind="stable")[:MISTAKES]]


def _right_ones(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return some rightly read images, evenly spread over all: data sets are often in the order of their classes."""
    right = np.flatnonzero(log_p.argmax(axis=1) == labels)
    return right[np.unique(np.linspace(0, len(right) - 1, RIGHT).astype(int))] if len(right) else right


def _gallery(
    chosen: np.ndarray, images: Any, log_p: np.ndarray, labels: np.ndarray, names: Sequence[str], files: Sequence[str]
) -> str:
    """Return the ``chosen`` images with label, prediction and its probability, and file where ``files`` has them."""
    figures = []
    for i, image in zip(chosen.tolist(), images[chosen], strict=True):
        label, prediction = int(labels[i]), int(log_p[i].argmax())
        verdict = f"{_short(names[prediction])}, {np.exp(log_p[i, prediction]):.0%}"
        kind = ' class="wrong"' if prediction != label else ""
        file = f"<span>{_short(Path(files[i]).name)}</span>" if files else ""
        where = files[i] if files else f"image {i}"
        figures.append(
            f'<figure title="{escape(where)}, loss {-log_p[i, label]:.2f}">{_picture(image)}'
            f"<figcaption>{_short(names[label])}<span{kind}>{verdict}</span>{file}</figcaption></figure>\n"
        )
    remark = "Under each image its label, then the prediction and its probability"
    remark += ", then its file." if files else "."
    return f'<p>{remark}</p>\n<div class="images">{"".join(figures)}</div>' if figures else ""


def _picture(image: np.ndarray) -> str:
    picture = enlarged(image[:3] if len(image) >= 3 else image[:1], scale=1)  # (C, H, W), drawn without alpha
    small = max(picture.size) <= SHARP
    return f'<img alt=""{" class=sharp" if small else ""} src="{_embedded(picture, 0 if small else 2 * SHARP)}">'


def _samples(path: str | Path | None) -> str:
    from PIL import Image

    if path is None or not Path(path).is_file():
        return ""
    with Image.open(path) as picture:
        large = Path(path).stat().st_size > LARGE
        return f'<img class="samples" alt="training images" src="{_embedded(picture, 1000 if large else 0)}">'


def _embedded(picture: Image.Image, shrink: int) -> str:
    """Return a picture as a data URL: a PNG, or with ``shrink`` a JPEG of at most so many pixels a side."""
    buffer = io.BytesIO()
    if shrink:
        picture.thumbnail((shrink, shrink))
        picture.save(buffer, "JPEG", quality=85)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if shrink else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


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
