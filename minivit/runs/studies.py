"""A study of a trained model: its figures, beside those of an untrained one, as a folder with one page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minivit.data import Dataset
from minivit.errors import ConfigError
from minivit.files import replacing, write_text
from minivit.runs.assess import load_split, own_data
from minivit.runs.figures import DRAWN, SINGLY, Found, observe, spread
from minivit.runs.folder import make_folder, run_of
from minivit.runs.matching import Matching, match_classes
from minivit.runs.trained import Trained
from minivit.show.captions import CAPTIONS
from minivit.show.study_figures import Shown, both
from minivit.show.study_page import PAGE, write_study
from minivit.show.text import json_text, plural
from minivit.study import trace_model, untrained_like
from minivit.study.asking import reads_class_token, token_weights

PICTURES = ("maps", "components", "similarity", "colours")
"""Arrays that are pictures, and not among the numbers."""

Bar = Callable[..., Any]
"""(total=, desc=) → a bar with update(n) and close()."""


class Chosen(NamedTuple):
    """The images that are looked at: ``parts`` of a ``split`` of the data set ``name``, which has ``total`` of them.

    ``labels`` (N,) are places in ``matching.rows``.
    """

    name: str
    split: str
    parts: list[Dataset]
    total: int
    labels: np.ndarray
    matching: Matching


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
    new one in the run's folder or beside the checkpoint. In it are ``study.html``, the figures as files,
    ``figures.json`` with their numbers, and ``figures.npz`` with all arrays that they are drawn from, as
    FIGURE/MODEL/NAME.

    Returns what figures.json holds, and ``folder``, ``page`` and ``said``, what can be read off each figure. Raises
    ConfigError for a model that cannot be traced and for a folder that is there already, and what finding the data
    raises.
    """
    shape = shape_of(trained)
    chosen = choose(trained, name, split, by_position, most, bar)
    wanted = [figure for figure in CAPTIONS if not only or figure in only]
    folder = study_folder(trained.path, output)
    try:
        found, predictions = observe_both(trained, chosen, wanted, bar)
        return write_folder(folder, trained, chosen, shape, found, predictions)
    except BaseException:  # Ctrl-C, or a full disk: nothing half written stays
        shutil.rmtree(folder, ignore_errors=True)  # it was made here
        raise


def write_folder(
    folder: Path,
    trained: Trained,
    chosen: Chosen,
    shape: dict[str, Any],
    found: dict[str, tuple[Found, Found]],
    predictions: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:
    """Write the folder of a study, and return what :func:`make_study` does."""
    drawn = spread(len(chosen.labels), DRAWN)
    shown = Shown(
        images=np.concatenate([part.images[np.arange(len(part))] for part in spread_over(chosen.parts, DRAWN)]),
        labels=chosen.labels[drawn].tolist(),
        predictions=(predictions[0][drawn].tolist(), predictions[1][drawn].tolist()),
        classes=chosen.matching.rows,
        singly=spread(len(drawn), SINGLY).tolist(),
        reader=shape["reader"],
    )
    called = (run_of(trained.path) or Path(trained.path)).name
    right = int((predictions[0] == chosen.labels).sum())
    title, facts = f"What {called} does", facts_of(trained, chosen, right, shape)
    said = write_study(folder, title, about_text(trained, chosen), facts, shown, found)
    numbers = {
        "checkpoint": trained.path, "data": chosen.name, "split": chosen.split, "images": len(chosen.labels),
        "right": right, "kind": trained.model.kind, "settings": trained.model.config, "figures": as_numbers(found),
    }  # fmt: skip
    write_text(folder / "figures.json", json_text(numbers) + "\n")
    with replacing(folder / "figures.npz") as f:
        np.savez_compressed(f, **all_arrays(found))  # type: ignore[arg-type]
    return numbers | {"said": said, "folder": str(folder), "page": str(folder / PAGE)}


def shape_of(trained: Trained) -> dict[str, Any]:
    """Return layers, heads, tokens, grid and reader, the tokens that the answer is read from, of a model.

    Raises ConfigError for one that cannot be traced.
    """
    one = trace_model(trained.model, np.zeros((1, *trained.image_shape), np.float32))
    heads, tokens = int(one.attention[0].shape[1]), int(one.tokens[0].shape[1])
    reader = "the class token" if reads_class_token(one) else "the patches on average"
    reader = reader if token_weights(one) is None else "the patches, each with its weight"
    return {"layers": len(one.heads), "heads": heads, "tokens": tokens, "grid": one.grid, "reader": reader}


def choose(trained: Trained, name: str | None, split: str, by_position: bool, most: int, bar: Bar) -> Chosen:
    """Return the images that :func:`make_study` looks at."""
    name = own_data(trained, "name the data after the checkpoint") if name is None else name
    parts = load_split(trained, name, split, bar)
    count = trained.model.config["num_classes"]
    matching = match_classes(trained.classes, parts[0].classes, count, name, by_position)
    some = spread_over(parts, most)
    labels = np.concatenate([matching.places[part.labels] for part in some])  # (N,)
    return Chosen(name, split, some, sum(map(len, parts)), labels, matching)


def about_text(trained: Trained, chosen: Chosen) -> str:
    """Return the line under the title: which images these are, and whose model."""
    count, of = len(chosen.labels), "" if chosen.split == "all" else f"{chosen.split} "
    all_of = f"All {count:,} {of}images" if count > 1 else f"The one {of}image"
    what = f"{count:,} of the {chosen.total:,} {of}images" if count < chosen.total else all_of
    spaced = ", evenly spaced" if count < chosen.total else ""
    remark = f"; {chosen.matching.remark}" if chosen.matching.remark else ""
    return f"{what} of {chosen.name}{spaced}; {trained.path}{remark}"


def facts_of(trained: Trained, chosen: Chosen, right: int, shape: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return the figures at the top of the page: what, value, remark."""
    count, (rows, columns) = len(chosen.labels), shape["grid"]
    return [
        ("images", f"{count:,}", f"{plural(shape['tokens'], 'token')} each, {rows} × {columns} patches"),
        ("right", f"{right / count:.1%}", f"{right:,} of {count:,}; minivit eval measures all"),
        ("layers", f"{shape['layers']}", f"of {plural(shape['heads'], 'head')}"),
        ("parameters", f"{trained.model.num_parameters():,}", f"model {trained.model.kind}"),
    ]


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
    trained: Trained, chosen: Chosen, wanted: Collection[str], bar: Bar
) -> tuple[dict[str, tuple[Found, Found]], tuple[np.ndarray, np.ndarray]]:
    """Return what was found of the model and of an untrained one, and what each of them takes each image for, (N,)."""
    parts, labels = chosen.parts, chosen.labels
    standard = trained.mean, trained.std
    progress = bar(total=2 * len(labels), desc="images")
    try:
        found, predictions = observe(trained.model, parts, labels, standard, wanted, progress.update)
        twin = untrained_like(trained.model, trained.model.settings.seed)
        other, others = observe(twin, parts, labels, standard, wanted, progress.update)
    finally:
        progress.close()
    return {figure: (found[figure], other[figure]) for figure in wanted}, (predictions, others)


def as_numbers(found: dict[str, tuple[Found, Found]]) -> dict[str, Any]:
    """Return the arrays that are no pictures, figure by figure, of both models, to six digits."""

    def plain(value: Any) -> Any:
        if isinstance(value, str) or value is None:
            return value
        return np.array([float(f"{x:.6g}") for x in np.ravel(value)]).reshape(np.shape(value))

    return {
        figure: {
            model: {key: plain(value) for key, value in arrays.items() if key not in PICTURES}
            for model, arrays in both(*pair)
        }
        for figure, pair in found.items()
    }


def all_arrays(found: dict[str, tuple[Found, Found]]) -> dict[str, np.ndarray]:
    """Return all arrays by FIGURE/MODEL/NAME; those of the gallery are the same as of the attention."""
    return {
        f"{figure}/{model}/{key}": np.asarray(value)
        for figure, pair in found.items()
        for model, arrays in both(*pair)
        for key, value in arrays.items()
        if not isinstance(value, str) and value is not None and not (figure == "gallery" and "attention" in found)
    }
