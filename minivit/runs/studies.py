"""A study of a trained model: its figures, beside those of an untrained one, as a folder with one page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data import Dataset
from minivit.errors import ConfigError, DataError
from minivit.files import write_text
from minivit.runs.assess import load_split
from minivit.runs.figures import DRAWN, SINGLY, Found, observe, spread, untrained_twin
from minivit.runs.folder import make_folder, run_of
from minivit.runs.matching import match_classes
from minivit.runs.trained import Trained
from minivit.show.captions import CAPTIONS
from minivit.show.study_figures import Shown
from minivit.show.study_page import PAGE, write_study
from minivit.show.text import json_text, plural
from minivit.study import trace_model

NUMBERS = "figures.json"
PICTURES = ("maps", "components", "similarity", "colours")
"""Arrays that are pictures, and not among the numbers."""

Bar = Callable[..., Any]
"""(total=, desc=) → a bar with update(n) and close()."""


def make_study(
    trained: Trained,
    name: str | None,
    split: str,
    by_position: bool,
    only: Collection[str],
    most: int,
    output: str | None,
    bar: Bar,
) -> dict[str, Any]:
    """Study a model on at most ``most`` images, evenly spaced, of a split of the data set ``name``; write a folder.

    ``name`` None is what it was trained on; ``split`` and ``by_position`` are as for :func:`load_split` and
    :func:`match_classes`. ``only`` names the figures, of :data:`CAPTIONS`; none are all. The folder is ``output``, or a
    new one in the run's folder or beside the checkpoint. Returns what ``figures.json`` holds, ``said``, what can be
    read off each figure, and the ``folder``.

    Raises ConfigError for a model that cannot be traced and for a folder that is there already, and what finding the
    data raises.
    """
    model, (channels, height, width) = trained.model, trained.image_shape
    first = trace_model(model, np.zeros((1, channels, height, width), np.float32))  # or it cannot be studied at all
    name = trained.data.get("name") if name is None else name
    if not isinstance(name, str):
        raise DataError(f"{trained.path} does not say what it was trained on", "name the data after the checkpoint")
    parts = load_split(trained, name, split, bar)
    matching = match_classes(trained.classes, parts[0].classes, model.config["num_classes"], name, by_position)
    total = sum(map(len, parts))
    chosen = spread_over(parts, most)
    labels = np.concatenate([matching.places[part.labels] for part in chosen])  # (N,)
    wanted = [figure for figure in CAPTIONS if not only or figure in only]
    folder = study_folder(trained.path, output)
    try:
        found, predictions = observe_both(trained, chosen, labels, wanted, bar)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # nothing is in it yet
        raise

    drawn = spread(len(labels), DRAWN)
    shown = Shown(
        images=np.concatenate([part.images[np.arange(len(part))] for part in spread_over(chosen, DRAWN)]),
        labels=labels[drawn].tolist(),
        predictions=predictions[drawn].tolist(),
        classes=matching.rows,
        singly=spread(len(drawn), SINGLY).tolist(),
        reader="the class token" if first.prefix else "the patches on average",
        tokens=int(first.tokens[0].shape[1]),
    )
    right = int((predictions == labels).sum())
    of = "" if split == "all" else f"{split} "
    what = f"{len(labels):,} of the {total:,} {of}images" if len(labels) < total else f"All {total:,} {of}images"
    about = f"{what} of {name}, evenly spaced; {trained.path}" + (f"; {matching.remark}" if matching.remark else "")
    layers, heads = len(first.heads), int(first.attention[0].shape[1])
    facts = [
        ("images", f"{len(labels):,}", f"{shown.tokens} tokens each, {first.grid[0]} × {first.grid[1]} patches"),
        ("right", f"{right / len(labels):.1%}", f"{right:,} of {len(labels):,}; eval measures all"),
        ("layers", f"{layers}", f"of {plural(heads, 'head')}"),
        ("parameters", f"{model.num_parameters():,}", f"model {model.kind}"),
    ]
    called = (run_of(trained.path) or Path(trained.path)).name
    said = write_study(folder, f"What {called} does", about, facts, shown, found)
    numbers = {
        "checkpoint": trained.path, "data": name, "split": split, "images": len(labels), "right": right,
        "kind": model.kind, "settings": model.config, "figures": as_numbers(found),
    }  # fmt: skip
    write_text(folder / NUMBERS, json_text(numbers) + "\n")
    return numbers | {"said": said, "folder": str(folder), "page": str(folder / PAGE)}


def spread_over(parts: list[Dataset], most: int) -> list[Dataset]:
    """Return at most ``most`` images, evenly spaced over all ``parts``, of which some may be left with none."""
    places, start, found = spread(sum(map(len, parts)), most), 0, []
    for part in parts:
        own = places[(places >= start) & (places < start + len(part))] - start
        start += len(part)
        if len(own):
            found.append(part.subset(own))
    return found


def study_folder(checkpoint: str, output: str | None) -> Path:
    """Make the folder of a study, which was not there before: ``output``, or study-1, study-2, … in the run's."""
    if output is not None:
        try:
            Path(output).mkdir(parents=True)
        except FileExistsError:
            what = f"{output or 'a folder without a name'} is there already"
            raise ConfigError(what, "name a new folder: nothing is written over") from None
        return Path(output)
    path = Path(checkpoint)
    if (run := run_of(checkpoint)) is None:
        return make_folder(path.parent, None, f"{path.stem}-study")
    parent = path.parent.parent  # as it was given
    return make_folder(parent if parent.resolve() == run else run, None, "study")


def observe_both(
    trained: Trained, chosen: list[Dataset], labels: np.ndarray, wanted: Collection[str], bar: Bar
) -> tuple[dict[str, tuple[Found, Found]], np.ndarray]:
    """Return what was found of the model and of an untrained one, and what the trained one takes each image for."""
    standard = trained.mean, trained.std
    progress = bar(total=2 * len(labels), desc="images")
    try:
        found, predictions = observe(trained.model, chosen, labels, standard, wanted, progress.update)
        twin = untrained_twin(trained.model)
        other, _ = observe(twin, chosen, labels, standard, wanted, progress.update)
    finally:
        progress.close()
    return {figure: (found[figure], other[figure]) for figure in wanted}, predictions


def as_numbers(found: dict[str, tuple[Found, Found]]) -> dict[str, Any]:
    """Return the arrays that are no pictures, figure by figure, of both models, to six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, str) or value is None:
            return value
        return np.array([float(f"{x:.6g}") for x in np.ravel(value)]).reshape(np.shape(value))

    return {
        figure: {
            model: {key: plain(value) for key, value in arrays.items() if key not in PICTURES}
            for model, arrays in zip(("trained", "untrained"), pair, strict=True)
        }
        for figure, pair in found.items()
    }
