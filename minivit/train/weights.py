"""Models out of checkpoints: as they were saved, or as the start of another."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minivit.errors import CheckpointError, MinivitError
from minivit.models.positions import Grid, resize_positions
from minivit.models.vit import ViT
from minivit.nn.module import Module
from minivit.nn.settings import pair
from minivit.train.checkpoint import Checkpoint, load_checkpoint

_HEAD = ("head.", "pre_logits.")  # what fine-tuning replaces
_ENCODER = ("in_channels", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim", "qkv_bias", "position")


def load_weights(model: Module, path: str | Path) -> None:
    """Copy the parameters of a checkpoint into ``model``; nothing is changed if they do not fit.

    Of a run that kept an average of them (:class:`minivit.train.ema.EMA`) they are the averaged ones. Raises
    CheckpointError if the file cannot be used, or names the parameters that differ.
    """
    model.load_state_dict(_parameters(load_checkpoint(path)))


def load_model(path: str | Path) -> ViT:
    """Build the model that a checkpoint was saved from, in eval mode, with the dtype of the stored parameters.

    Of these :func:`load_weights` says which they are. Raises CheckpointError if the file cannot be used.
    """
    return read_model(path)[0]


def read_model(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Return :func:`load_model`'s model, and the checkpoint's meta."""
    checkpoint = load_checkpoint(path)
    config, state = _config(checkpoint, path), _parameters(checkpoint)
    try:
        model = ViT(**config).to(np.result_type(*state.values()))
    except (TypeError, ValueError) as error:
        raise _unusable_settings(path, error) from error
    model.load_state_dict(state)
    return model.eval(), checkpoint.meta


def model_config(path: str | Path) -> dict[str, Any]:
    """Return all settings of the model in a checkpoint: ``ViT(**model_config(path))`` is one like it, untrained."""
    return _config(load_checkpoint(path), path)


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
    old, new = _config(checkpoint, path), model.config
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


def _config(checkpoint: Checkpoint, path: str | Path) -> dict[str, Any]:
    config = checkpoint.meta.get("model")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not say which model it holds", "build it yourself and use load_weights")
    settings = inspect.signature(ViT).parameters.values()
    return {p.name: p.default for p in settings if p.name != "recompute"} | config


def _unusable_settings(path: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: its model's settings cannot be used: {error}", "use another")


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
