"""What each layer of a model costs: parameters, FLOPs, and bytes kept for the backward pass.

Nothing is computed for it: the model's own forward pass runs on outlines (:mod:`minivit.backend.outline`).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, first_order
from minivit.backend import Team, available_memory
from minivit.backend.outline import Outline, outline
from minivit.errors import ConfigError
from minivit.measure.speed import flops
from minivit.models import MODELS, Model, Settings, create_model, read_settings
from minivit.models.registry import unknown_model
from minivit.nn.module import Module, mode, watching
from minivit.show.text import bytes_text
from minivit.weights.native import load_model, stored_settings

# ---- which model -----------------------------------------------------------------------------------------------------


def find_settings(name: str) -> Settings:
    """Return the settings of a named model, or of the model in a checkpoint.

    A name of a model is that model; a file that is called so is ``./name``. A checkpoint is known by what is in it.
    Raises ConfigError if one image does not fit into memory: not every image size is bounded by an array.
    """
    if name in MODELS:
        return read_settings(*MODELS[name])
    settings = stored_settings(_path(name))
    check_image(name, settings)
    return settings


def check_image(name: str, settings: Settings) -> None:
    """Raise ConfigError if one image of a model's settings does not fit into memory."""
    numbers, what = settings.largest_array()
    if 4 * numbers > (free := available_memory()):
        _, height, width = settings.image_shape
        raise ConfigError(
            f"{name}: an image of {height:,} × {width:,} pixels makes {what} takes about {bytes_text(4 * numbers)} of "
            f"memory; {bytes_text(free)} are free",
            "use a model of larger patches, or of smaller images",
        )


def open_model(name: str) -> Model:
    """Return a named model, freshly initialised, or the model in a checkpoint: that of :func:`find_settings`."""
    return create_model(name) if name in MODELS else load_model(_path(name))


def _path(name: str) -> str:
    """Return the path of a checkpoint; what is neither a file nor written like one was to be a model's name."""
    if not (os.path.exists(name) or os.path.dirname(name) or name.endswith(".npz")):
        raise unknown_model(name)
    return name


# ---- by layer --------------------------------------------------------------------------------------------------------


@dataclass
class LayerCosts:
    """One layer: what comes out of it, and what it costs for one image."""

    shape: tuple[int, ...] = ()
    parameters: int = 0
    flops: int = 0
    kept: int = 0

    def add(self, other: LayerCosts) -> None:
        """Add another layer's costs."""
        self.parameters += other.parameters
        self.flops += other.flops
        self.kept += other.kept


def layer_of(path: str) -> str:
    """Return the layer, a row of the table, that the module at ``path`` belongs to.

    A layer is one of the model's parts; of a list of blocks, it is each part of each block. The model itself, whose
    path is "", is the layer "embedding": what it does outside of its parts is mostly that.
    """
    parts = path.split(".")
    if len(parts) > 1 and parts[1].isdecimal():
        return ".".join(parts[:3])
    return parts[0] or "embedding"


def layer_costs(model: Module, images: Any) -> dict[str, LayerCosts]:
    """Run ``model`` on one image, recorded as in training, and return each layer's costs, in the order they run.

    FLOPs are those of the matrix products, 2 for a multiplication and an addition. ``kept`` are the bytes of the arrays
    that the graph holds for the backward pass, each counted once, at the first operation that holds it. The model, or
    the image, may be an outline.
    """
    rows: dict[str, LayerCosts] = {}
    seen: set[Node] = set()
    kept = Kept([*(p.data for p in model.parameters()), images])
    # what learns nothing and is in no block, such as a dropout, belongs to the model itself
    idle = {
        path for path, module in model.named_modules() if "." not in path and next(module.parameters(), None) is None
    }

    def begin(path: str) -> None:
        if path:
            rows.setdefault(layer_of("" if path in idle else path), LayerCosts())

    def count(path: str, out: Any) -> None:
        name = layer_of("" if path in idle else path)
        row = rows.setdefault(name, LayerCosts())
        if name == path or path in idle:
            row.shape = out.shape
        stack = [out.node] if getattr(out, "node", None) is not None else []
        while stack:
            node = stack.pop()
            if node is None or node in seen or node.op is None:
                continue
            seen.add(node)
            stack.extend(node.parents)
            row.flops += flops(node)
            row.kept += kept.by(node)

    with watching(model, count, before=begin), first_order(), mode(True):
        model(images)
    for path, p in model.named_parameters():
        rows[layer_of(path.rpartition(".")[0])].parameters += p.size
    return rows


class Kept:
    """Counts the bytes of the arrays that recorded nodes hold for the backward pass, each array once.

    Those in ``given``, parameters and images, are there without the graph, and count nothing.
    """

    def __init__(self, given: Iterable[Any]) -> None:
        self._counted = {id(owner): owner for owner in map(_owner, given)}  # alive, so that no other gets an id of them

    def by(self, node: Node) -> int:
        """Return the bytes that ``node`` holds and none before it did."""
        size = 0
        for owner in map(_owner, _arrays((node.args, node.out))):
            if id(owner) not in self._counted:
                self._counted[id(owner)] = owner
                size += owner.nbytes
        return size


def _arrays(value: Any) -> list[Any]:
    """Return the arrays in nested tuples, lists and single values."""
    if isinstance(value, (tuple, list)):
        return [array for item in value for array in _arrays(item)]
    return [value] if isinstance(value, np.ndarray) else []


def _owner(array: Any) -> Any:
    """Return what owns the memory that a view looks at."""
    if isinstance(array, Outline):
        return array.memory
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


# ---- of a whole model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What a model costs, by its layers as a table shows them, and in all."""

    rows: list[tuple[str, LayerCosts]]
    total: LayerCosts


def model_costs(model: Model) -> Costs:
    """Return what ``model``, or its outline, costs for one image; alike blocks in the middle of many are one row."""
    image = outline((1, *model.settings.image_shape), next(model.parameters()).dtype)
    rows, total = layer_costs(model, image), LayerCosts()
    for row in rows.values():
        total.add(row)
    return Costs(list(_merged(rows)), total)


def _merged(rows: dict[str, LayerCosts]) -> Iterator[tuple[str, LayerCosts]]:
    """Yield the rows; from a list's third block on, those that cost what its second does are one, but for its last."""
    groups = [(block, list(group)) for block, group in itertools.groupby(rows.items(), lambda row: _block(row[0]))]
    costs = {block: [row for _, row in group] for block, group in groups}

    def alike(block: tuple[str, int] | None) -> bool:
        if block is None or block[1] < 2 or (block[0], block[1] + 1) not in costs:
            return False
        return costs[block] == costs[block[0], 1]

    for same, run in itertools.groupby(groups, lambda group: alike(group[0])):
        blocks = list(run)
        if not same:
            yield from itertools.chain.from_iterable(group for _, group in blocks)
            continue
        (first, group), (last, _) = blocks[0], blocks[-1]
        assert first is not None and last is not None
        together = LayerCosts(group[-1][1].shape)
        for _, others in blocks:
            for _, row in others:
                together.add(row)
        yield f"{first[0]}.{first[1]}" + (f" … {last[1]}" if last != first else ""), together


def _block(name: str) -> tuple[str, int] | None:
    """Return the list and the number of the block that a row is of, or None."""
    found = re.match(r"([^.]+)\.(\d+)(\.|$)", name)
    return (found[1], int(found[2])) if found else None


# ---- the memory of a training step -----------------------------------------------------------------------------------


def step_memory(total: LayerCosts, team: Team, batch_size: int) -> dict[str, int]:
    """Return the bytes that a training step takes on the CPU, in micro-batches, by what they are for."""
    weights = 4 * total.parameters
    return {
        "parameters": weights,
        "gradient": weights,
        "optimizer": 2 * weights,  # AdamW's state
        "buffers": team.threads * weights,
        "kept": images_at_once(team, batch_size) * total.kept,
    }


def images_at_once(team: Team, batch_size: int) -> int:
    """Return how many images are worked on at once, all threads together."""
    start, stop = team.pieces(batch_size)[0]
    return min(team.threads * (stop - start), batch_size)


def training_memory(model: Model, team: Team, batch_size: int) -> int:
    """Return about how many bytes training a model by ``team`` takes at the most, on the CPU, besides the data.

    Its outline will do for ``model``.
    """
    return sum(step_memory(model_costs(model).total, team, batch_size).values())
