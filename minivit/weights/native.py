"""Models into checkpoints and out of them: as they were saved, or as the start of another."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data import Dataset
from minivit.data.catalog import NAMES
from minivit.data.images import FITS
from minivit.errors import CheckpointError, ConfigError, DataError, MinivitError, unknown_name, value_text
from minivit.models.positions import Grid, resize_positions
from minivit.models.vit import ViT
from minivit.models.zoo import parameter_shapes
from minivit.nn.module import Module
from minivit.nn.rules import check_settings, pair
from minivit.weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_HEAD = ("head.", "pre_logits.")  # what fine-tuning replaces
_ENCODER = ("in_channels", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim", "qkv_bias", "position")


def save(model: ViT, path: str | Path, data: Dataset | None = None) -> None:
    """Write ``model`` to ``path``, just as that is spelled, as a checkpoint: :func:`load_model` brings it back.

    ``data``, the images that it was trained on, adds the names of its classes and the mean and standard deviation of
    its channels (:func:`data_meta`). ``minivit predict`` cannot do without; ``minivit eval`` measures on that data set
    if it has a name or is a file. The parameters keep their dtype. ::

        mv.save(model, "cats.npz", data=train_images)  # then: minivit predict cats.npz photo.jpg

    Raises ConfigError for a model that its settings do not describe: of another class than :class:`minivit.ViT`, or
    with layers that were replaced. DataError if ``data`` has other classes or channels than the model;
    CheckpointError if the file cannot be written.
    """
    if type(model) is not ViT:
        what = f"{type(model).__name__} is not a ViT: a checkpoint could not say how to build it again"
        remedy = "keep its parameters, save_checkpoint(path, {f'model/{n}': a for n, a in model.state_dict().items()}, "
        raise ConfigError(what, remedy + "{}), build it yourself and use load_weights")
    state, config = model.state_dict(), model.config
    if differ := _difference(config, state):
        remedy = "replace the head by model.reset_head(num_classes); build what else differs with mv.ViT(…)"
        raise ConfigError(f"the model has layers that are not those of its settings: {differ}", remedy)
    meta: dict[str, Any] = {"model": config}
    if data is not None:
        if not isinstance(data, Dataset):
            what = f"data is a {type(data).__name__}, not a data set"
            raise DataError(what, "give the images that the model was trained on: mv.data.load(…), or mv.data.Dataset")
        classes, channels = len(data.classes), data.images.shape[1]
        if (classes, channels) != (config["num_classes"], config["in_channels"]):
            raise DataError(
                f"{data.name} has {classes} classes and {channels} channels, the model {config['num_classes']} and "
                f"{config['in_channels']}",
                "give the data set that the model was trained on",
            )
        meta["data"] = data_meta(data)
    save_checkpoint(path, {f"model/{name}": array for name, array in state.items()}, meta)


def data_meta(data: Dataset) -> dict[str, Any]:
    """Return what a checkpoint keeps of the images that a model was trained on.

    ``name``; ``fit``, how other image files are brought to the model's size ("crop" or "stretch"), and ``bad_images``,
    what becomes of those that cannot be read; the names of the ``classes``; a hash of the ``labels``; ``mean`` and
    ``std`` of each channel of images / 255.
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


def load_weights(model: Module, path: str | Path) -> None:
    """Copy the parameters of a checkpoint into ``model``; nothing is changed if they do not fit.

    Of a run that kept an average of them (:class:`minivit.train.ema.EMA`) they are the averaged ones. Raises
    CheckpointError if the file cannot be used, or names the parameters that differ.
    """
    try:
        model.load_state_dict(_parameters(load_checkpoint(path)))
    except CheckpointError as error:
        if error.what.startswith("the state does not fit"):
            raise CheckpointError(f"{path}: {error.what}", f"{error.remedy}; or mv.load_model(path)") from error
        raise


def load_model(path: str | Path) -> ViT:
    """Build the model that a checkpoint was saved from, in eval mode, with the dtype of the stored parameters.

    Where a run kept an average of the parameters, that is what the model gets. Raises CheckpointError if the file
    cannot be used.
    """
    return _build(load_checkpoint(path), path)


def read_model(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Return :func:`load_model`'s model, and the checkpoint's meta, its ``data`` as :func:`data_of` returns them."""
    checkpoint = load_checkpoint(path)
    model = _build(checkpoint, path)
    return model, checkpoint.meta | {"data": data_of(checkpoint, model.config, path)}


def model_config(path: str | Path) -> dict[str, Any]:
    """Return all settings of the model in a checkpoint: ``ViT(**model_config(path))`` is one like it, untrained."""
    return config_of(load_checkpoint(path), path)


def _build(checkpoint: Checkpoint, path: str | Path) -> ViT:
    config, state = config_of(checkpoint, path), _parameters(checkpoint)
    try:
        model = ViT(**config).to(np.result_type(*state.values()))
    except (TypeError, ValueError) as error:
        raise _unusable_settings(path, error) from error
    model.load_state_dict(state)
    return model.eval()


def init_from(model: ViT, path: str | Path) -> list[str]:
    """Start ``model`` from a checkpoint's parameters, to go on with other images or classes; return what changed.

    As Dosovitskiy et al. 2020, section 3.2: the model gets a new head, one linear layer of zeros (neither its own nor
    the checkpoint's is kept, nor a hidden layer), and positions are resized to its grid of patches. Grey images may
    follow coloured ones or the other way round: the sum of the patch weights over the channels stays. A class token
    that only one of the two has is left out, or stays new. Make the optimizer afterwards.

    The encoders must have equal sizes. Raises CheckpointError otherwise, with the parameters that differ and the
    settings to make the model with; nothing is changed then. ::

        model = mv.ViT(**model_config(path) | {"image_size": 64, "num_classes": 5})
        print("\\n".join(init_from(model, path)))  # a line for each thing that is not as in the checkpoint
    """
    checkpoint = load_checkpoint(path)
    old, new = config_of(checkpoint, path), model.config
    state = {name: a for name, a in _parameters(checkpoint).items() if not name.startswith(_HEAD)}
    own = model.state_dict()
    try:
        _check_encoder(old, new, state, own)
        notes = _fit_channels(state, new["in_channels"]) + _fit_tokens(state, own, _grid(old), _grid(new))
        model.load_state_dict(state | {name: a for name, a in own.items() if name.startswith(_HEAD)})
    except MinivitError as error:
        raise CheckpointError(f"{path} cannot start this model: {error.what}", error.remedy) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _unusable_settings(path, error) from error
    model.reset_head(new["num_classes"])
    notes += [f"{key}: {old[key]} → {new[key]}" for key in ("activation", "norm_eps") if old[key] != new[key]]
    return [*notes, f"head: new, for {new['num_classes']} classes"]


def _parameters(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return checkpoint.under("model") | checkpoint.under("ema")  # parameters that were frozen have no average


def config_of(checkpoint: Checkpoint, path: str | Path) -> dict[str, Any]:
    """Return all settings of a checkpoint's model, each one that can be and all such as its arrays ask for.

    So a model of these settings takes no more memory than the file. Raises CheckpointError, with ``path``, otherwise.
    """
    config = checkpoint.meta.get("model")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not say which model it holds", "build it yourself and use load_weights")
    defaults = {p.name: p.default for p in inspect.signature(ViT).parameters.values() if p.name != "recompute"}
    config = defaults | config
    try:
        for name, value in check_settings(**config).items():
            if name not in defaults:
                raise unknown_name("setting", name, defaults)
            if value is None and defaults[name] is not None:
                raise ConfigError(f"{name} is null", "it must have a value")
        differ = _difference(config, _parameters(checkpoint))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise _unusable_settings(path, error) from error
    if differ:
        what = f"{path}: its model's settings are not those of its arrays: {differ}"
        raise CheckpointError(what, "use another: this file's settings, or its arrays, were changed")
    return config


def _difference(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> str:
    """Return the first difference of the arrays that settings ask for and those of ``state``, or "".

    Compares no more arrays than there are, whatever the settings are: nothing is made of their size.
    """
    seen = set()
    for name, shape, settings in parameter_shapes(config):
        asked = ", ".join(f"{key} {config[key]}" for key in settings.split(", "))
        if name not in state:
            return f"{asked} asks for {name} {shape}, which is missing"
        if state[name].shape != shape:
            return f"{asked} asks for {name} {shape}, which is {state[name].shape}"
        seen.add(name)
    if beyond := sorted(state.keys() - seen):
        asked = ", ".join(f"{key} {config[key]}" for key in ("depth", "pool", "position", "head", "qkv_bias"))
        return f"{asked} has no use for {beyond[0]} {state[beyond[0]].shape}"
    return ""


def data_of(checkpoint: Checkpoint, config: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint says of its data: what :func:`data_meta` returns, or a part of it.

    ``config`` holds the settings of its model. Raises CheckpointError if an entry is not what it should be.
    """
    found = checkpoint.meta.get("data", {})
    classes, channels = config["num_classes"], config["in_channels"]

    def numbers(value: Any, least: float) -> bool:
        fine = isinstance(value, list) and len(value) == channels and all(type(x) in (int, float) for x in value)
        return fine and all(abs(x) < 1e30 and x > least for x in value)

    rules = {
        "name": (lambda v: isinstance(v, str) and v, "text"),
        "fit": (lambda v: v in FITS, " or ".join(map(repr, FITS))),
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


def _unusable_settings(path: str | Path, error: Exception) -> CheckpointError:
    what = error.what if isinstance(error, MinivitError) else f"{type(error).__name__}: {error}"
    return CheckpointError(f"{path}: its model's settings cannot be used: {what}", "use another")


def _grid(config: Mapping[str, Any]) -> Grid:
    (h, w), (p, q) = pair("image_size", config["image_size"]), pair("patch_size", config["patch_size"])
    return h // p, w // q


def _check_encoder(
    old: Mapping[str, Any], new: Mapping[str, Any], state: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]
) -> None:
    """Raise CheckpointError if settings say that the parameters differ, or (``heads``) are used in another way."""

    def value(config: Mapping[str, Any], key: str) -> Any:
        if key == "patch_size":
            p, q = pair(key, config[key])
            return p if p == q else [p, q]
        defaults = {"dim_head": config["dim"] // config["heads"], "mlp_dim": 4 * config["dim"]}
        return config[key] or defaults.get(key, config[key])

    keys = [k for k in _ENCODER if value(old, k) != value(new, k) and (old[k], new[k]) != (None, None)]
    if 1 in (old["in_channels"], new["in_channels"]):  # which can be made to fit
        keys = [k for k in keys if k != "in_channels"]
    if not keys:
        return
    lines = ["; ".join(f"{k} is {value(old, k)} there, {value(new, k)} here" for k in keys)]
    shapes = {name: (a.shape, own[name].shape) for name, a in state.items() if name in own}
    differ = [f"{name}: {there} there, {here} here" for name, (there, here) in shapes.items() if there != here]
    lines += differ[:3] + ([f"… and {len(differ) - 3} more parameters"] if len(differ) > 3 else [])
    texts = {k: v if isinstance(v := value(old, k), str) else json.dumps(v) for k in keys}
    sets = " ".join(f"--set {shlex.quote(f'model.{k}={text}')}" for k, text in texts.items())
    raise CheckpointError("\n  ".join(lines), f"make the model with the checkpoint's: {sets}")


def _fit_channels(state: dict[str, np.ndarray], channels: int) -> list[str]:
    name = "patch_embed.proj.weight"
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] == channels:
        return []
    mean = weight.sum(axis=1, keepdims=True) / channels  # (D, C, P, Q) → (D, 1, P, Q)
    state[name] = mean.repeat(channels, axis=1)  # → (D, C', P, Q)
    return [f"{name}: {weight.shape[1]} image channels → {channels}"]


def _fit_tokens(
    state: dict[str, np.ndarray], own: Mapping[str, np.ndarray], old_grid: Grid, new_grid: Grid
) -> list[str]:
    """Make class token and positions fit; return notes."""
    notes = []
    had, has = int("cls_token" in state), int("cls_token" in own)
    if "pos_embed" in state and "pos_embed" in own:
        pos = resize_positions(state["pos_embed"], old_grid, new_grid, prefix=had)
        first = (pos if had else own["pos_embed"])[:, :has]  # the class token's, if the model has one
        state["pos_embed"] = np.concatenate([first, pos[:, had:]], axis=1)  # (1, had + N, D) → (1, has + N, D)
        if old_grid != new_grid:
            notes.append("pos_embed: {} × {} patches → {} × {}".format(*old_grid, *new_grid))
    if had and not has:
        del state["cls_token"]
        notes.append("cls_token: left out")
    if has and not had:
        state["cls_token"] = own["cls_token"]
        notes.append("cls_token: new")
    return notes
