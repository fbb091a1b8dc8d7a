"""A model started from another one's arrays: which settings must agree, and how a ViT's arrays are made to fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from minivit.backend import device_of, to_device, to_numpy
from minivit.errors import ConfigError, MisfitError
from minivit.models.positions import METHODS, resize_matrix, resize_patches, resize_positions
from minivit.nn import init
from minivit.nn.module import Module, Parameter
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


def first_weight(names: Iterable[str]) -> str:
    """Return which of a model's parameters is the weight that sees the image, "" if none of the known ones is there."""
    return next((name for name in _FIRST if name in names), "")


def fit_channels(state: dict[str, np.ndarray], channels: int) -> list[str]:
    """Make the weight that sees the image one for images of other channels, so that grey ones give the same; note it.

    Its filters for one channel are the sum of those there; for more, those there in turn, all scaled by the channels
    before over those after, as in timm. A standardised weight (:class:`minivit.nn.StdConv2d`) gives features of grey
    images in proportion.
    """
    weight = state.get(name := first_weight(state))
    if weight is None or weight.ndim != 4 or weight.shape[1] in (channels, 0):
        return []
    before = weight.shape[1]
    if channels == 1:
        state[name] = weight.sum(axis=1, keepdims=True)  # (D, C, P, Q) → (D, 1, P, Q)
    else:
        turns = np.tile(weight, (1, -(-channels // before), 1, 1))
        state[name] = turns[:, :channels] * before / channels  # → (D, C', P, Q)
    return [f"{name}: {before} image channels → {channels}"]


_FIRST = (
    "patch_embed.backbone.stem.conv.weight", "patch_embed.backbone.conv.weight", "patch_embed.convs.0.conv.weight",
    "patch_embed.proj.weight", "conv.weight",
)  # fmt: skip
"""The weights that see the image, by where they may be: before the patches, or theirs; a ResNet's without patches."""


def fit_tokens(state: dict[str, np.ndarray], own: Mapping[str, np.ndarray], old: Any, new: Any) -> list[str]:
    """Make tokens beside the patches, and positions, fit those of ``own``, a model of other settings; return notes.

    ``old`` are the settings of the model that ``state`` is of, ``new`` those of the one that it is to fit.
    """
    notes = []
    if fit_positions(state, own, old, new) and old.grid != new.grid:
        notes.append("pos_embed: {} × {} patches → {} × {}".format(*old.grid, *new.grid))
    for name in old.prefix | new.prefix:
        if name not in own:
            del state[name]
            notes.append(f"{name}: left out")
        elif name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
            notes.append(f"{name}: new")
    return notes


def fit_positions(
    state: dict[str, np.ndarray], own: Mapping[str, np.ndarray], old: Any, new: Any, method: str = "bicubic"
) -> bool:
    """Make positions fit those of ``own``, by one of :data:`~minivit.models.positions.METHODS`; tell if there are any.

    Arguments as of :func:`fit_tokens`.
    """
    placed = False
    for name in [name for name in state if name in own]:
        fit = next((fit for end, fit in _POSITIONS.items() if name.endswith(end)), None)
        if fit is not None:
            state[name] = fit(state[name], own[name], old, new, method)
            placed = True
    return placed


def _beside(there: np.ndarray, here: np.ndarray, old: Any, new: Any, method: str = "") -> np.ndarray:
    """Return positions of the tokens beside the patches, (1, P, D): those ``there`` of tokens that both have."""
    if not here.shape[1]:
        return here
    starts = {name: sum(list(old.prefix.values())[:i]) for i, name in enumerate(old.prefix)}
    parts, start = [], 0
    for name, count in new.prefix.items():
        known = there.shape[1] > 0 and old.prefix.get(name) == count
        parts.append(there[:, starts[name] :][:, :count] if known else here[:, start : start + count])
        start += count
    return np.concatenate(parts, axis=1)


def _fit_table(there: np.ndarray, here: np.ndarray, old: Any, new: Any, method: str) -> np.ndarray:
    """Return positions (1, T, D) on the new grid of patches."""
    had, has = there.shape[1] - math.prod(old.grid), here.shape[1] - math.prod(new.grid)
    pos = resize_positions(there, old.grid, new.grid, had, method)
    return np.concatenate([_beside(pos[:, :had], here[:, :has], old, new), pos[:, had:]], axis=1)


def _fit_line(there: np.ndarray, here: np.ndarray, old: Any, new: Any, method: str) -> np.ndarray:
    """Return the positions (n, D/2) of rows or columns, for another number of them."""
    if there.shape == here.shape:
        return there
    return (resize_matrix(len(there), len(here), method) @ there.astype(np.float64)).astype(there.dtype)


def _fit_ways(there: np.ndarray, here: np.ndarray, old: Any, new: Any, method: str) -> np.ndarray:
    """Return the table of relative positions on the new grid: the ways between patches, resized as a picture."""
    (h, w), (new_h, new_w) = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old.grid, new.grid))
    ways = resize_positions(there[None, : h * w], (h, w), (new_h, new_w), method=method)[0]
    beside = there[h * w :] if len(there) > h * w else here[new_h * new_w :]
    return np.concatenate([ways, beside[: len(here) - new_h * new_w]])


_POSITIONS: dict[str, Any] = {
    "pos_embed": _fit_table,
    "pos_embed.rows": _fit_line,
    "pos_embed.columns": _fit_line,
    "pos_embed.prefix": _beside,
    "relative_position_bias_table": _fit_ways,
}
"""How positions are made to fit, by the end of their parameter's name."""


def adapt_tokens(model: Any, state: dict[str, np.ndarray], old: Any) -> list[str]:
    """Make the arrays of one encoder of patches fit another, as :meth:`minivit.models.registry.Model.adapt` says."""
    new = model.settings
    keys = model.encoder
    plain = new.tokenizer == "patch"
    if plain and 1 in (old.in_channels, new.in_channels):  # which can be made to fit
        keys = tuple(k for k in keys if k != "in_channels")
    check_encoder(model, state, old, keys)
    notes = fit_channels(state, new.in_channels) if plain else []
    notes += fit_tokens(state, model.state_dict(), old, new)
    return notes + [
        f"{key}: {getattr(old, key)} → {getattr(new, key)}"
        for key in ("activation", "norm_eps")
        if getattr(old, key) != getattr(new, key)
    ]


def resize(model: Any, image_size: Size, patch_size: Size | None = None, method: str = "bicubic") -> Any:
    """Let ``model`` take images of another size, (height, width) or a side, in place; return the model.

    Positions are resized as a picture, any rectangle of patches to any other, those of class tokens and the like apart
    (Dosovitskiy et al. 2020, section 3.2); fixed ones are computed anew. ``method`` is what one of these systems does:

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
    if patch_size is not None and model.patch_embed.says:
        what = f"patches of a {type(model.patch_embed).__name__} are no pictures that could be resized"
        raise ConfigError(what, "leave patch_size out: the number of tokens changes with the image's size")
    old, sizes = model.settings, {"image_size": image_size} | ({} if patch_size is None else {"patch_size": patch_size})
    settings = replace(old, **sizes)
    weight = model.patch_embed.filters
    with init.undrawn():
        other = type(model)(**{f.name: getattr(settings, f.name) for f in fields(settings)})
    other.to(weight.dtype).to(weight.device)
    before, modules = dict(model.named_parameters()), dict(model.named_modules())
    state = {name: to_numpy(p.data) for name, p in before.items() if name.endswith((*_POSITIONS, ".proj.weight"))}
    own = {name: to_numpy(p.data) for name, p in other.named_parameters() if name in state}
    fit_positions(state, own, old, settings, method)
    patches = "patch_embed.proj.weight"
    if patches in own and own[patches].shape != state[patches].shape:
        state[patches] = resize_patches(state[patches], own[patches].shape[2:])
    for path, module in other.named_modules():
        for name in _SIZED & vars(module).keys() if path in modules else ():
            was, new = getattr(modules[path], name), getattr(module, name)
            if isinstance(was, Module):
                new.train(was.training)
            setattr(modules[path], name, new)
    model.settings = settings
    for name, p in model.named_parameters():
        if p is not before[name]:
            _take_place(p, before[name], state.get(name))
    return model


def _take_place(new: Parameter, old: Parameter, value: np.ndarray | None) -> None:
    """Let a parameter be what another one was, with another value or its own."""
    new.data = to_device(np.array(to_numpy(old.data) if value is None else value), device_of(old.data))
    new.requires_grad, new.decays, new.layer, new.matrices = old.requires_grad, old.decays, old.layer, old.matrices


_SIZED = {"patch_embed", "pos_embed", "shared_rel_pos", "rel_pos"}
"""The attributes, of a model or a part of one, that depend on the size of the images."""
