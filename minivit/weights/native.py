"""Models into checkpoints and out of them."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data import Dataset
from minivit.data.catalog import NAMES
from minivit.data.fit import is_fit
from minivit.data.preparation import recorded
from minivit.errors import CheckpointError, ConfigError, DataError, MinivitError, value_text
from minivit.models import KINDS, Model, Settings, build, model_outline, read_settings
from minivit.nn import init
from minivit.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from minivit.weights.foreign import converted, open_foreign
from minivit.weights.place import find_checkpoint

FIRST_KIND = "vit"
"""What a checkpoint holds that does not say its kind: there was one only."""


def save(model: Model, path: str | Path, data: Dataset | None = None) -> None:
    """Write ``model`` to ``path``, just as that is spelled, as a checkpoint: :func:`load_model` brings it back.

    ``data``, the images that it was trained on, adds the names of its classes and the mean and standard deviation of
    its channels (:func:`data_meta`). ``minivit predict`` cannot do without; ``minivit eval`` measures on that data set
    if it has a name or is a file. Without it, a model whose weights came from elsewhere keeps its ``preparation`` and
    ``class_names``. The parameters keep their dtype. ::

        mv.save(model, "cats.npz", data=train_images)  # then: minivit predict cats.npz photo.jpg

    Raises ConfigError for a model that its settings do not describe: of a class that is not registered
    (:mod:`minivit.models.registry`), or with layers that were replaced. DataError if ``data`` has other classes or
    channels than the model; CheckpointError if the file cannot be written.
    """
    if not isinstance(model, Model) or KINDS.get(model.kind) is not type(model):
        what = f"{type(model).__name__} is not a registered model: a checkpoint could not say how to build it again"
        remedy = "register its class (minivit.models.registry); or keep its parameters, save_checkpoint(path, "
        remedy += "{f'model/{n}': a for n, a in model.state_dict().items()}, {}), and use load_weights"
        raise ConfigError(what, remedy)
    model.check_portable()
    state, config = model.state_dict(), model.config
    check_described(model, state)
    meta: dict[str, Any] = {"kind": model.kind, "model": config}
    if data is not None:
        check_data(model, data)
        meta["data"] = data_meta(data)
    elif model.preparation is not None:
        names = {"classes": list(model.class_names)} if model.class_names else {}
        meta["data"] = model.preparation.meta() | names
    save_checkpoint(path, {f"model/{name}": array for name, array in state.items()}, meta)


def check_described(model: Model, state: Mapping[str, np.ndarray]) -> None:
    """Raise ConfigError if a model's arrays, its ``state``, are not those that its settings ask for."""
    if differ := _difference(model.settings, state):
        remedy = (
            f"replace the head by model.reset_head(num_classes); build what else differs by {type(model).__name__}(…)"
        )
        raise ConfigError(f"the model has layers that are not those of its settings: {differ}", remedy)


def check_data(model: Model, data: Any) -> None:
    """Raise DataError if ``data`` is no data set, or has not the model's number of classes and channels."""
    if not isinstance(data, Dataset):
        what = f"data is a {type(data).__name__}, not a data set"
        raise DataError(what, "give the images that the model was trained on: mv.data.load(…), or mv.data.Dataset")
    config, classes, channels = model.config, len(data.classes), data.images.shape[1]
    if (classes, channels) != (config["num_classes"], config["in_channels"]):
        raise DataError(
            f"{data.name} has {classes} classes and {channels} channels, the model {config['num_classes']} and "
            f"{config['in_channels']}",
            "give the data set that the model was trained on",
        )


def data_meta(data: Dataset) -> dict[str, Any]:
    """Return what a checkpoint keeps of the images that a model was trained on.

    ``name``; ``fit``, how other image files are brought to the model's size (:func:`minivit.data.fit.fitted`), and
    ``bad_images``, what becomes of those that cannot be read; the names of the ``classes``; a hash of the ``labels``;
    ``mean`` and ``std`` of each channel of images / 255.
    """
    known = data.name in NAMES or not os.path.exists(data.name)
    return {
        "name": data.name if known else os.path.abspath(data.name),  # found again from any folder
        "fit": data.fit,
        "bad_images": "stop",
        "classes": list(data.classes),
        "labels": hashlib.sha256(data.labels.tobytes()).hexdigest(),
        "mean": list(data.mean),
        "std": list(data.std),
    }


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or another system's file as the one that minivit would have written of its model.

    Of a folder it is the one that :func:`~minivit.weights.place.find_checkpoint` finds. Raises CheckpointError, with
    what to do, if it cannot be used.
    """
    path = find_checkpoint(path)
    foreign = open_foreign(path)
    return load_checkpoint(path) if foreign is None else converted(foreign)


def load_model(path: str | Path) -> Model:
    """Build the model that a checkpoint was saved from, in eval mode, with the dtype of the stored parameters.

    Where a run kept an average of the parameters, that is what the model gets. A folder may be a run's, or one with a
    model.safetensors. Other systems' files, as
    :func:`minivit.load_weights` reads them, say all that is needed where a config.json lies beside them, or where they
    are of the usual sizes. Raises CheckpointError if the file cannot be used.
    """
    return _build(read_checkpoint(path), path)


def read_model(path: str | Path) -> tuple[Model, dict[str, Any]]:
    """Return :func:`load_model`'s model, and the checkpoint's meta, its ``data`` as :func:`data_of` returns them."""
    checkpoint = read_checkpoint(path)
    model = _build(checkpoint, path)
    return model, checkpoint.meta | {"data": data_of(checkpoint.meta, model.config, path)}


def stored_settings(path: str | Path) -> Settings:
    """Return the settings of the model in a checkpoint; their class is their ``kind``'s."""
    return checked_settings(read_checkpoint(path), path)


def model_config(path: str | Path) -> dict[str, Any]:
    """Return all settings of the model in a checkpoint as a dict: ``ViT(**model_config(path))`` is one like it."""
    return stored_settings(path).config


def _build(checkpoint: Checkpoint, path: str | Path) -> Model:
    settings, state = checked_settings(checkpoint, path), parameters_of(checkpoint)
    checkpoint.arrays.clear()  # so that none is in memory twice
    try:
        model = undrawn(settings.kind, settings.config, np.result_type(*state.values()))
    except (TypeError, ValueError) as error:
        raise unusable_settings(path, error) from error
    model.take_state_dict(state)
    keep_preparation(model, checkpoint.meta, path)
    return model.eval()


def keep_preparation(model: Model, meta: Mapping[str, Any], path: str | Path, channels: int | None = None) -> None:
    """Let a model know how images are prepared for weights that came from elsewhere, as a checkpoint's meta says it.

    Of weights that were trained here it knows nothing: whoever goes on training has data of his own. ``channels`` are
    those of the images that the meta is of, if they are not the model's.
    """
    own = model.config["in_channels"]
    data = data_of(meta, model.config | {"in_channels": channels or own}, path)
    elsewhere = "name" not in data
    known = recorded(data) if elsewhere else None
    model.preparation = known if known is None else known.of_channels(own)
    model.class_names = tuple(data.get("classes", ())) if elsewhere else ()


def undrawn(kind: str, config: Mapping[str, Any], dtype: Any) -> Model:
    """Return a model whose parameters are still to come."""
    with init.undrawn():
        return build(kind, config).to(dtype)


def parameters_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Return a checkpoint's parameters by name: their average, where a run kept one."""
    return checkpoint.under("model") | checkpoint.under("ema")  # parameters that were frozen have no average


def checked_settings(checkpoint: Checkpoint, path: str | Path) -> Settings:
    """Return the settings of a checkpoint's model, each one that can be and all such as its arrays ask for.

    So a model of these settings takes no more memory than the file. Raises CheckpointError, with ``path``, otherwise.
    """
    config, kind = checkpoint.meta.get("model"), checkpoint.meta.get("kind", FIRST_KIND)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not say which model it holds", "build it yourself and use load_weights")
    if not isinstance(kind, str) or kind not in KINDS:
        remedy = f"registered are {', '.join(sorted(KINDS))}: import the file that registers it"
        raise CheckpointError(f"{path}: unknown kind of model {value_text(kind)}", remedy)
    try:
        settings = read_settings(kind, config)
        differ = _difference(settings, parameters_of(checkpoint))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise unusable_settings(path, error) from error
    if differ:
        what = f"{path}: its model's settings are not those of its arrays: {differ}"
        raise CheckpointError(what, "use another: this file's settings, or its arrays, were changed")
    return settings


def _difference(settings: Settings, state: Mapping[str, np.ndarray]) -> str:
    """Return the first difference of the arrays that settings ask for and those of ``state``, or "".

    The model is made of outlines, and no further than there are arrays to compare: nothing is made of its size.
    """
    most = 8 * len(state) + 64  # arrays drawn, some of which are replaced by others
    try:
        model = model_outline(settings.kind, settings.config, most)
    except (TypeError, ValueError, ArithmeticError) as error:
        what = error.what if isinstance(error, MinivitError) else str(error)
        return f"{settings.sizes} cannot be: {what}"
    seen = set()
    for name, p in model.named_parameters():
        if name not in state:
            return f"{settings.sizes} asks for {name} {p.shape}, which is missing"
        if state[name].shape != p.shape:
            return f"{settings.sizes} asks for {name} {p.shape}, which is {state[name].shape}"
        seen.add(name)
    if beyond := sorted(state.keys() - seen):
        return f"{settings.sizes} has no use for {beyond[0]} {state[beyond[0]].shape}"
    return ""


def data_of(meta: Mapping[str, Any], config: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint's ``meta`` says of its data: what :func:`data_meta` returns, or a part of it.

    ``config`` holds the settings of its model. Raises CheckpointError if an entry is not what it should be.
    """
    found = meta.get("data", {})
    classes, channels = config["num_classes"], config["in_channels"]

    def numbers(value: Any, least: float) -> bool:
        fine = isinstance(value, list) and len(value) == channels and all(type(x) in (int, float) for x in value)
        return fine and all(abs(x) < 1e30 and x > least for x in value)

    rules = {
        "name": (lambda v: isinstance(v, str) and v, "text"),
        "fit": (is_fit, "'stretch', 'crop' or as 'centre bicubic 0.9'"),
        "bad_images": (lambda v: v in ("stop", "skip"), "'stop' or 'skip'"),
        "classes": (
            lambda v: isinstance(v, list) and len(v) <= classes and all(isinstance(name, str) for name in v),
            f"a list of at most {classes} names",
        ),
        "layout": (lambda v: type(v) is int and v in (1, 2), "1 or 2"),
        "mean": (lambda v: numbers(v, -math.inf), f"a list of {channels} numbers"),
        "std": (lambda v: numbers(v, 0.0), f"a list of {channels} numbers above 0"),
    }
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: what it says of its data is no table", "use another")
    for key, (rule, expected) in rules.items():
        if key in found and not rule(found[key]):
            raise CheckpointError(f"{path}: data.{key} is {value_text(found[key])}, not {expected}", "use another")
    return found


def unusable_settings(path: str | Path, error: Exception) -> CheckpointError:
    """Return the error for a checkpoint whose model cannot be made, or made to fit."""
    what = error.what if isinstance(error, MinivitError) else f"{type(error).__name__}: {error}"
    return CheckpointError(f"{path}: its model's settings cannot be used: {what}", "use another")
