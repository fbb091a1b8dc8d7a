"""One image explained: which run, which image, and the page that shows how the model reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivit import ops
from minivit.data import standardize
from minivit.data.dataset import class_names
from minivit.errors import CheckpointError, ConfigError, DataError, printable, shortened
from minivit.runs.assess import load_split, own_data
from minivit.runs.classify import read
from minivit.runs.matching import match_classes
from minivit.runs.trained import Trained
from minivit.show.explainer import write_explainer
from minivit.study.account import Account, account, check_model, tokens_beside
from minivit.weights.place import find_checkpoint

LONGEST = 100
"""Characters of a class's name on the page."""

TOP = 5
"""Classes whose probabilities are drawn."""


@dataclass(frozen=True)
class Chosen:
    """The image that is explained: its ``name``, uint8 ``pixels`` (C, H, W), class where known, and file."""

    name: str
    pixels: np.ndarray
    label: int | None = None
    path: str = ""


def newest_run(parent: Path) -> str:
    """Return the folder of the run below ``parent`` whose checkpoint is the newest.

    Raises ConfigError if there is none.
    """
    found: list[tuple[float, str]] = []
    for config in parent.glob("*/config.toml"):
        try:
            found.append((os.path.getmtime(find_checkpoint(str(config.parent))), str(config.parent)))
        except (CheckpointError, OSError):  # not trained so far
            continue
    if not found:
        remedy = "train one (minivit train), or name a checkpoint: minivit explain CKPT IMAGE"
        raise ConfigError(f"there is no trained run in {parent}", remedy)
    return max(found)[1]


def image_of_file(trained: Trained, source: str, index: int) -> Chosen:
    """Return an image file as the model takes it, or image number ``index`` of an .npy or .npz file.

    Raises DataError if it cannot be read or has no such image.
    """
    if not source or os.path.isdir(source):
        raise DataError(f"{source} is a folder" if source else "the image has no name", "name one image")
    count = 0
    for name, pixels in read(source, trained.image_shape, trained.preparation.fit):
        if count == index:
            shown = "standard input" if source == "-" else name.replace(source, Path(source).name, 1)
            return Chosen(shown, pixels, path=source)
        count += 1
    remedy = f"give --index 0 to {count - 1}" if count > 1 else "leave --index out"
    raise DataError(f"{source} has no image {index}: it has {count}", remedy)


def image_of_data(trained: Trained, index: int, bar: Callable[..., Any] | None = None) -> Chosen:
    """Return image number ``index`` of the test images that go with a model, or else of those held out, or of all.

    Raises DataError if its data are not known, not there, or have no such image.
    """
    name = own_data(trained, "name an image file after the checkpoint")
    split, dataset = "test", None
    for split in ("test", "val", "all"):
        try:
            dataset = load_split(trained, name, split, bar)[0]
            break
        except DataError:
            if split == "all":
                raise
    assert dataset is not None
    if not 0 <= index < len(dataset):
        raise DataError(f"{name} has no {split} image {index}: it has {len(dataset):,}", f"0 to {len(dataset) - 1}")
    count = trained.model.config["num_classes"]
    places = match_classes(trained.classes, dataset.classes, count, name, by_position=False).places
    place = int(places[dataset.labels[index]])  # count or more for a class that the model does not know
    pixels = np.asarray(dataset.images[index : index + 1])[0]
    return Chosen(f"{Path(dataset.name).name}: {split} image {index}", pixels, place if place < count else None)


def write_page(trained: Trained, chosen: Chosen, path: str | Path, given: str) -> str:
    """Write the page of an image to ``path``, and return its title; ``given`` is how the model was named.

    Raises ConfigError for a model that cannot be shown (:func:`minivit.study.account.account`), and for a name that is
    no page's: what else is there, a photograph, stays.
    """
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"a page is not written as {str(path)!r}", "end its name in .html")
    model: Any = trained.model  # with blocks, as check_model has seen
    check_model(model)
    for kept in (trained.path, chosen.path):
        if os.path.exists(path) and os.path.exists(kept) and os.path.samefile(path, kept):
            raise ConfigError(f"the page would take the place of {kept}", "name another file")
    told = account(model, standardize(chosen.pixels[None], trained.mean, trained.std)[0], chosen.label)
    names = [shortened(printable(n), LONGEST) for n in class_names(trained.classes, len(told.numbers["logits"]))]
    probabilities = np.asarray(ops.softmax(told.numbers["logits"].astype(np.float64)))
    layers, heads, _, d = told.numbers["q"].shape
    channels, height, width = chosen.pixels.shape
    first = int(told.follow[0])
    tokens = told.maps["P"].shape[-1]
    about = {
        "layers": layers, "heads": heads, "tokens": tokens, "prefix": told.prefix, "grid": told.grid,
        "reads": told.reads, "beside": tokens_beside(model), "block": getattr(model.settings, "block", "pre"),
        "fixed": not any("pos_embed" in name for name, _ in model.named_parameters()),
        **{name: bool(getattr(model.settings, key, False)) for name, key in _OF_SCORES.items()},
        "kept": told.numbers["kept"].shape[-1], "head_dim": d, "dim": told.numbers["embedded"].shape[-1],
        "mlp": model.blocks[0].mlp.fc2.weight.shape[1], "patch": model.patch_embed.patch_size,
        "tokenizer": model.patch_embed.says,
        "places": getattr(model.patch_embed, "places", None),
        "mean": trained.mean, "std": trained.std,
        "image": {"width": width, "height": height, "channels": channels, "remark": _drawn(channels)},
        "classes": names, "label": chosen.label, "probabilities": [float(f"{p:.6g}") for p in probabilities],
        "top": np.argsort(-probabilities, kind="stable")[:TOP].tolist(),
        "follow": _roles(told.follow.tolist(), chosen.label),
        "terms": told.terms, "opened": _most_important_head(told), "made": _made(told),
    }  # fmt: skip
    parts = [
        f"{type(model).__name__}: {layers} layers of {heads} heads",
        f"{tokens:,} tokens of {about['dim']} numbers",
        f"{model.num_parameters():,} parameters",
        given,
    ]
    if chosen.label is not None:
        parts.append(f"label: {names[chosen.label]}")
    title = f"{printable(chosen.name)} is read as “{names[first]}”, {probabilities[first]:.1%}"
    write_explainer(
        path,
        title=title,
        lead=" · ".join(parts),
        about=about,
        maps=told.maps,
        numbers=told.numbers | {"raw": chosen.pixels},
    )
    return title


_OF_SCORES = {"diagonal": "lsa", "qk_norm": "qk_norm"}
"""What the page is told of how scores are made, by the setting that says it."""


def _drawn(channels: int) -> str:
    """Say what is drawn of an image that has not one channel or three."""
    if channels in (1, 3):
        return ""
    return f" Of its {channels} channels {'the first three are' if channels > 3 else 'the first is'} drawn."


def _roles(follow: list[int], label: int | None) -> list[dict[str, Any]]:
    """Return each class that is followed with what it is: predicted, label, runner-up, or only likely."""
    others = iter(["runner-up", "third", "fourth", "fifth"])
    roles = []
    for place, index in enumerate(follow):
        known = ["predicted"] if place == 0 else []
        known += ["label"] if index == label else []
        roles.append({"index": index, "role": ", ".join(known) or next(others)})
    return roles


def _most_important_head(told: Account) -> int:
    """Return the head of the last layer through which most flows to the likeliest class: |Σ dP ∘ P|."""
    worth = np.abs((told.maps["dP"][0, -1] * told.maps["P"][-1]).sum(axis=(-1, -2)))  # (H, T, T) → (H,)
    return int(worth.argmax())


def _made(told: Account) -> str:
    """Say how exact the numbers of the page are."""
    return (
        f"Made by minivit. Maps have one byte a number, (byte/255)² of the largest of their row, or with a sign "
        f"(byte/127)²; the numbers of {told.numbers['kept'].shape[-1]} tokens of each head are float32, as computed. "
        "This file asks no network for anything."
    )
