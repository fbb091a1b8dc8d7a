"""Weights into a model: minivit's own and other systems', recognised by what a file contains."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minivit.backend import to_numpy
from minivit.backend.outline import stretched
from minivit.errors import CheckpointError, MisfitError, printable
from minivit.models import Model, configuration
from minivit.models import create_model as new_model
from minivit.models.adapt import first_weight, fit_channels, fit_positions
from minivit.models.preparations import PREPARATIONS
from minivit.nn.module import Module
from minivit.weights.checkpoint import Checkpoint, load_checkpoint
from minivit.weights.foreign import Foreign, open_foreign
from minivit.weights.native import FIRST_KIND, checked_settings, keep_preparation, parameters_of, undrawn
from minivit.weights.place import find_checkpoint

Tell = Callable[[str], object]

_NOT_SHAPES = ("activation", "norm_eps", "stem_eps")
_SIZES = (
    "image_size", "patch_size", "in_channels", "dim", "depth", "mlp_dim", "heads", "dim_head", "stages", "width",
    "kernel", "convs", "seed",
)  # fmt: skip
"""The settings that a named model has of its name; the others are as the file has them, unless they are given."""


def load_weights(model: Module, path: str | Path, *, new_head: bool = False, tell: Tell | None = None) -> None:
    """Copy the weights in a file into ``model``; nothing is changed if they do not fit.

    The file is recognised by what it contains, whatever it is called:

    - minivit's own checkpoint; of a run that kept an average of the parameters (:class:`minivit.train.ema.EMA`), that;
    - Google's .npz: vit_jax's (old numbering or linen's, with or without ``opt/target/``), big_vision's (also of a
      scan, or with a MAP head);
    - timm's, Hugging Face's and DeiT's .safetensors;
    - lucidrains' ViT and SimpleViT, their state dicts saved as .npz or .safetensors; where a file does not say it, as
      before version 1.26, ViT's is of ``pool="cls"``;
    - CCT's, of SHI Labs' Compact-Transformers and vit-pytorch, and Yitu's T2T-ViT's, likewise saved.

    Of a model and its moving average (``state_dict_ema``) it is that. A folder is a run's, of which its best checkpoint
    is read if there is one, else the last; or one with a model.safetensors. Arrays of 16, 32 or 64 bits, bfloat16 among
    them, become the model's dtype. Positions of another grid of patches are resized, "bicubic" of
    :meth:`minivit.ViT.resize`; of other images that have as many patches they stay as they are, unless a config.json
    beside the file says their size; fixed ones are the model's. A model of images of other channels gets the weight
    that sees them as timm makes it: for one channel the sum of its filters, for more those there in turn, scaled. (Not
    where tokens are made of tokens or patches are normalised: that is an error.) With ``new_head`` the model gets a
    head of zeros, as for fine-tuning, in the place of the file's. ``tell`` is called with a line for each thing that is
    not as in the file; without it, they are one warning.

    Raises CheckpointError if the file cannot be used, with every name that is missing, unexpected or of another shape
    and the nearest name to it. Nothing in a file is ever run: a pickle (.pth, .bin) is refused.
    """
    path = find_checkpoint(path)
    foreign = open_foreign(path)
    source = load_checkpoint(path) if foreign is None else foreign
    _say(_load(model, source, path, new_head), path, tell)


def create_model(name: str, *, weights: str | Path | None = None, tell: Tell | None = None, **settings: Any) -> Model:
    """Return a model by name; ``settings`` override its configuration. ::

        mv.create_model("vit_tiny_patch16_224", num_classes=10)
        mv.create_model("vit_tiny_patch16_224", weights="model.safetensors", num_classes=9, image_size=(64, 96))

    Without ``weights`` it is freshly initialised. With a file, one that :func:`load_weights` reads, it has the file's
    weights: its sizes are those of its name, and the number of classes, the kind of GELU, the eps of its norms and the
    like are the file's unless they are given. Another ``num_classes`` than the file's gives a new head of zeros,
    another grid of patches resized positions, and other ``in_channels`` filters for these; ``tell`` is called with a
    line that says so, or a warning does. ``model.preparation``, how images are prepared, is what the file or the
    config.json beside it says; or, of weights that are known by a model's name, as timm's are, what that name is known
    for. Raises ConfigError for an unknown name or setting, and CheckpointError as load_weights does.
    """
    if weights is None:
        return new_model(name, **settings)
    kind, usual = configuration(name)
    weights = find_checkpoint(weights)
    foreign = open_foreign(weights)
    source = load_checkpoint(weights) if foreign is None else foreign
    if isinstance(source, Foreign):
        held, said, dtype = source.kind, source.settings(), source.dtype
    else:
        found, dtype = checked_settings(source, weights), np.result_type(*parameters_of(source).values())
        held, said = found.kind, found.config
    if held != kind:
        what = f"{weights} holds a model of the kind {held}, {name} is a {kind}"
        raise CheckpointError(what, "mv.load_model(path) builds the file's")
    if (usual.get("pool"), said.get("pool")) == ("map_all", "map"):  # which the file, without its config, cannot tell
        said = {**said, "pool": "map_all"}
    values = {**usual, **{key: value for key, value in said.items() if key not in _SIZES}, **settings}
    new_head = "num_classes" in settings and settings["num_classes"] != said.get("num_classes")
    if new_head and "head" in values:
        values["head"] = "linear"
    model = undrawn(kind, values, dtype)
    _say(_load(model, source, weights, new_head, fresh=True), weights, tell)
    known = PREPARATIONS.get(name)
    untold = isinstance(source, Foreign) and source.layout.named and not source.config
    if untold and not new_head and known is not None:
        model.preparation = known.of_channels(model.settings.in_channels)
    return model


def _load(model: Any, source: Foreign | Checkpoint, path: str | Path, new_head: bool, fresh: bool = False) -> list[str]:
    """Copy what ``source`` holds into ``model``; return a line for each thing that is not as in the file."""
    replaced = model.replaced if new_head and isinstance(model, Model) else ()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    settings: Any = getattr(model, "settings", None)
    grid = old_grid = getattr(settings, "grid", None)
    notes: list[str] = []
    if isinstance(source, Foreign):
        said = source.layout.settings_of(source.entries, source.config)
        learned = source.without_fixed(settings)
        tokens = getattr(getattr(model, "pos_embed", None), "shape", (1, 0))[1]
        if learned is not source and source.positions() != tokens:
            notes.append(f"pos_embed: fixed ones of {source.positions()} tokens → {tokens}")
        try:
            state = learned.read(shapes, getattr(settings, "heads", 1), replaced)
        except MisfitError as error:
            raise MisfitError(error.what, *_remedy(source, settings)) from error
        if grid is not None and "pos_embed" in state:
            old_grid = source.grid(grid, _beside_patches(settings))
    else:
        state, said = parameters_of(source), {}
        if grid is not None and "model" in source.meta and source.meta.get("kind", FIRST_KIND) == model.kind:
            stored: Any = checked_settings(source, path)
            old_grid, said = stored.grid, stored.config
        source.arrays.clear()  # so that none is in memory twice
        state = {name: a for name, a in state.items() if not name.startswith(replaced or (" ",))}
    more, channels = _fit_first(state, shapes, getattr(settings, "in_channels", 0))
    notes += more
    if grid and old_grid and grid != old_grid:
        height, width = model.patch_embed.patch_size
        old = replace(settings, image_size=(old_grid[0] * height, old_grid[1] * width))
        own = {name: stretched(shape) for name, shape in shapes.items()}  # of a table whose tokens differ nothing fits
        if fit_positions(state, own, old, settings):
            notes.append("pos_embed: {} × {} patches → {} × {}".format(*old_grid, *grid))
    for key in ("activation", "norm_eps", "stem_eps", "pool", "position"):
        if key in said and said[key] != (here := getattr(settings, key, said[key])):
            notes.append(f"{key}: {said[key]} in the file, {here} here")
    kept = {name: to_numpy(p.data) for name, p in model.named_parameters() if name.startswith(replaced or (" ",))}
    state |= kept
    try:
        model.check_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.what}", f"{error.remedy}; or mv.load_model(path)") from error
    if (heads := said.get("heads")) is not None and heads != (here := getattr(settings, "heads", heads)):
        what = f"{path}: heads is {heads} in the file, {here} here: of equal shapes, but cut in other places"
        raise MisfitError(what, f"make the model with the file's heads={heads}", {"heads": heads})
    (model.take_state_dict if fresh else model.load_state_dict)(state)
    if replaced:
        classes = model.settings.num_classes
        model.reset_head(classes)
        notes.append(f"head: new, for {classes} classes")
    elif isinstance(model, Model):
        about = source.about(model.settings.num_classes, channels) if isinstance(source, Foreign) else source.meta
        keep_preparation(model, about, path, channels)
    return notes


def _beside_patches(settings: Any) -> int:
    """Return how many positions of a ViT with these settings belong to no patch."""
    return 0 if settings.no_embed_class else sum(settings.prefix.values())


def _fit_first(state: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], own: int) -> tuple[list[str], int]:
    """Fit the weight that sees the image to the channels of a model of these ``shapes``; note it.

    Return the channels of images in the file, too: ``own`` where they are the model's.
    """
    first = first_weight(state)
    if len(shapes.get(first, ())) != 4:
        return [], own
    before = state[first].shape[1:2]
    notes = fit_channels(state, shapes[first][1])
    return notes, before[0] if notes else own


def _remedy(source: Foreign, settings: Any) -> tuple[str, dict[str, Any]]:
    """Return what to make a model with that the file fits, in words and as settings."""
    here = settings.written_out() if settings is not None else {}
    try:
        said = source.settings()
    except CheckpointError as error:
        return error.what, {}
    there = {key: value for key, value in said.items() if key in here and key != "image_size"}
    differ = {k: v for k, v in there.items() if v != here[k] and here[k] is not None and k not in _NOT_SHAPES}
    if not differ:
        return "mv.load_model(path) builds the file's model, if it is one that minivit has", {}
    told = ", ".join(f"{key}={value!r}" for key, value in differ.items())
    more = "; for other classes than the file's: new_head=True" if differ.keys() == {"num_classes"} else ""
    return f"make the model with the file's {told}{more}; or mv.load_model(path)", differ


def _say(notes: list[str], path: str | Path, tell: Tell | None) -> None:
    if tell is not None:
        for note in notes:
            tell(note)
    elif notes:
        warnings.warn(f"{printable(str(path))}, not as in the file: {'; '.join(notes)}", stacklevel=3)
