"""A model started from another one's arrays: which settings must agree, and how a ViT's arrays are made to fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from minivit.backend import device_of, to_device, to_numpy
from minivit.errors import MisfitError
from minivit.models.positions import METHODS, Grid, resize_patches, resize_positions
from minivit.nn import init
from minivit.nn.layers import PatchEmbed
from minivit.nn.module import Parameter
from minivit.nn.rules import Size, choice


def check_encoder(model: Any, state: Mapping[str, np.ndarray], old: Any, keys: tuple[str, ...]) -> None:
    """Raise MisfitError if one of the settings ``keys`` says that parameters differ, or are used in another way.

    ``state`` are the arrays that ``model`` is to start from, ``old`` their model's settings.
    """
    there, here = old.written_out(), model.settings.written_out()
    given = {k for k in keys if (getattr(old, k), getattr(model.settings, k)) != (None, None)}  # else they follow
    differ = [k for k in keys if k in given and there[k] != here[k]]
    if not differ:
        return
    lines = ["; ".join(f"{k} is {_text(there[k])} there, {_text(here[k])} here" for k in differ)]
    own = dict(model.named_parameters())
    shapes = {name: (a.shape, own[name].shape) for name, a in state.items() if name in own}
    others = [f"{name}: {a} there, {b} here" for name, (a, b) in shapes.items() if a != b]
    lines += others[:3] + ([f"… and {len(others) - 3} more parameters"] if len(others) > 3 else [])
    needed = {k: there[k] for k in differ}
    told = ", ".join(f"{k}={value!r}" for k, value in needed.items())
    raise MisfitError("\n  ".join(lines), f"make the model with the checkpoint's {told}", needed)


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def fit_channels(state: dict[str, np.ndarray], channels: int) -> list[str]:
    """Spread the patch weights evenly over other channels, so that grey images give the same tokens; return notes."""
    name = "patch_embed.proj.weight"
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] == channels:
        return []
    mean = weight.sum(axis=1, keepdims=True) / channels  # (D, C, P, Q) → (D, 1, P, Q)
    state[name] = mean.repeat(channels, axis=1)  # → (D, C', P, Q)
    return [f"{name}: {weight.shape[1]} image channels → {channels}"]


def fit_tokens(
    state: dict[str, np.ndarray], own: Mapping[str, np.ndarray], old_grid: Grid, new_grid: Grid
) -> list[str]:
    """Make class token and positions fit those of ``own``, a model on another grid of patches; return notes."""
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


def adapt_tokens(model: Any, state: dict[str, np.ndarray], old: Any) -> list[str]:
    """Make the arrays of one encoder of patches fit another, as :meth:`minivit.models.registry.Model.adapt` says."""
    new = model.settings
    keys = model.encoder
    if 1 in (old.in_channels, new.in_channels):  # which can be made to fit
        keys = tuple(k for k in keys if k != "in_channels")
    check_encoder(model, state, old, keys)
    notes = fit_channels(state, new.in_channels) + fit_tokens(state, model.state_dict(), old.grid, new.grid)
    return notes + [
        f"{key}: {getattr(old, key)} → {getattr(new, key)}"
        for key in ("activation", "norm_eps")
        if getattr(old, key) != getattr(new, key)
    ]


def resize(model: Any, image_size: Size, patch_size: Size | None = None, method: str = "bicubic") -> Any:
    """Let ``model`` take images of another size, (height, width) or a side, in place; return the model.

    Learned positions are resized as a picture, any rectangle of patches to any other, those of class tokens and the
    like apart (Dosovitskiy et al. 2020, section 3.2). ``method`` is what one of these systems does:

    - "bicubic": timm, antialiased; as :func:`minivit.weights.transfer.init_from` does;
    - "bicubic-hf": Hugging Face's ``interpolate_pos_encoding``;
    - "bilinear": timm with Google's files;
    - "zoom": Google's vit_jax, ``scipy.ndimage.zoom`` of order 1.

    With ``patch_size`` the patch projection is resized too, by the pseudo-inverse of a bicubic resizing of the patches
    (Beyer et al. 2023, FlexiViT, section 3.4). Make the optimizer afterwards: what is resized is a new parameter.
    Raises ConfigError for a method or size that cannot be, ShapeError if the patch size does not divide the image's;
    the model is unchanged then. ::

        model.resize((64, 96)).eval()
    """
    choice(*METHODS)("method", method)
    old, embed = model.settings, model.patch_embed
    sizes = {"image_size": image_size} | ({} if patch_size is None else {"patch_size": patch_size})
    settings = replace(old, **sizes)
    weight, bias = embed.proj.weight, embed.proj.bias
    with init.outlining():
        new = PatchEmbed(settings.image_size, settings.patch_size, settings.in_channels, settings.dim)
    new.proj.weight, new.proj.bias = weight, bias
    if new.patch_size != embed.patch_size:
        new.proj.weight = _changed(weight, resize_patches(to_numpy(weight.data), new.patch_size))
    if getattr(model, "pos_embed", None) is not None and new.grid != embed.grid:
        pos = to_numpy(model.pos_embed.data)
        beside = pos.shape[1] - embed.num_patches
        model.pos_embed = _changed(model.pos_embed, resize_positions(pos, embed.grid, new.grid, beside, method))
    model.settings, model.patch_embed = settings, new.train(embed.training)
    return model


def _changed(p: Parameter, array: np.ndarray) -> Parameter:
    """Return a parameter like ``p`` with another array."""
    new = Parameter(to_device(array, device_of(p.data)), p.decays, p.layer, p.matrices)
    new.requires_grad = p.requires_grad
    return new
