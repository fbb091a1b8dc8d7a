"""What each layer of a model costs: parameters, FLOPs, and bytes kept for the backward pass."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.graph import Node, first_order
from minivit.backend import Team, available_memory
from minivit.errors import ConfigError, unknown_name
from minivit.measure.speed import flops
from minivit.models.vit import ViT
from minivit.models.zoo import MODELS, create_model
from minivit.nn.module import Module, watching
from minivit.nn.rules import pair
from minivit.show.text import bytes_text, plural, text_table
from minivit.train.sharing import team_for
from minivit.weights import native as weights


def model_config(name: str) -> dict[str, Any]:
    """Return all settings of a named model, or of the model in a checkpoint.

    A name of a model is that model; a file that is called so is ``./name``. A checkpoint is known by what is in it.
    """
    if name in MODELS:
        defaults = {p.name: p.default for p in inspect.signature(ViT).parameters.values()}
        return defaults | MODELS[name]
    config = weights.model_config(_path(name))
    _check_image_fits(name, config)
    return config


def open_model(name: str) -> ViT:
    """Return a named model, freshly initialised, or the model in a checkpoint: the one of :func:`model_config`."""
    return create_model(name) if name in MODELS else weights.load_model(_path(name))


def _check_image_fits(name: str, config: dict[str, Any]) -> None:
    """Raise ConfigError if one image does not fit: where positions are not learned, no array bounds its size."""
    (height, width), (p, q) = pair("image_size", config["image_size"]), pair("patch_size", config["patch_size"])
    tokens = (height // p) * (width // q)
    needed = 4 * (config["heads"] * tokens**2 + tokens * config["dim"] + config["in_channels"] * height * width)
    if needed > (free := available_memory()):
        raise ConfigError(
            f"{name}: an image of {height:,} × {width:,} pixels makes {tokens:,} patches, whose attention takes about "
            f"{bytes_text(needed)} of memory; {bytes_text(free)} are free",
            "use a model of larger patches, or of smaller images",
        )


def _path(name: str) -> str:
    """Return the path of a checkpoint; what is neither a file nor written like one was to be a model's name."""
    if not (os.path.exists(name) or os.path.dirname(name) or name.endswith(".npz")):
        raise unknown_name("model", name, MODELS)
    return name


def image_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a model takes."""
    return config["in_channels"], *pair("image_size", config["image_size"])


# ---- measuring -------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One layer: what comes out of it, and what it costs for one image."""

    shape: tuple[int, ...] = ()
    parameters: int = 0
    flops: int = 0
    kept: int = 0

    def add(self, other: Row) -> None:
        """Add another layer's costs."""
        self.parameters += other.parameters
        self.flops += other.flops
        self.kept += other.kept


def outline(config: dict[str, Any]) -> ViT:
    """Return the model with three blocks at most, the first, second and last: the others are like the second."""
    return ViT(**config | {"depth": min(config["depth"], 3)})


def layer_of(path: str) -> str:
    """Return the layer, a row of the table, that a parameter or module belongs to."""
    parts = path.split(".")
    if parts[0] == "blocks":
        return ".".join(parts[:3])
    return "embedding" if parts[0] in ("", "cls_token", "pos_embed", "embed_drop") else parts[0]


def measure(model: Module, images: Any) -> dict[str, Row]:
    """Run ``model`` on one image, recorded as in training, and return each layer's costs, in the order they run.

    FLOPs are those of the matrix products, 2 for a multiplication and an addition. ``kept`` are the bytes of the arrays
    that the graph holds for the backward pass, each counted once, at the first operation that holds it.
    """
    rows: dict[str, Row] = {}
    seen: set[Node] = set()
    counted = {id(_owner(p.data)) for p in model.parameters()} | {id(_owner(images))}
    alive = []  # what was counted must live on, or another array could get its id

    def begin(path: str) -> None:
        if path:
            rows.setdefault(layer_of(path), Row())

    def count(path: str, out: Any) -> None:
        row = rows.setdefault(layer_of(path), Row())
        if layer_of(path) == path or path == "embed_drop":
            row.shape = out.shape
        stack = [out.node] if getattr(out, "node", None) is not None else []
        while stack:
            node = stack.pop()
            if node is None or node in seen or node.op is None:
                continue
            seen.add(node)
            stack.extend(node.parents)
            row.flops += flops(node)
            for array in _arrays((node.args, node.out)):
                owner = _owner(array)
                if id(owner) not in counted:
                    counted.add(id(owner))
                    alive.append(owner)
                    row.kept += owner.nbytes

    with watching(model, count, before=begin), first_order():
        model.train()(images)
    for path, p in model.named_parameters():
        rows[layer_of(path)].parameters += p.size
    return rows


def _arrays(value: Any) -> list[Any]:
    """Return the arrays in nested tuples, lists and single values."""
    if isinstance(value, (tuple, list)):
        return [array for item in value for array in _arrays(item)]
    return [value] if isinstance(value, np.ndarray) else []


def _owner(array: Any) -> Any:
    """Return the array that owns the memory that a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


# ---- the report ------------------------------------------------------------------------------------------------------


def report(config: dict[str, Any], batch_size: int) -> str:
    """Return the table of layers and the totals for training."""
    rows, total = _all_rows(config)
    table = [_cells(name, row) for name, row in rows if _costs(row)]
    table.append(_cells("total", Row((), total.parameters, total.flops, total.kept)))
    head = ["layer", "output", "parameters", "FLOPs", "kept for backward"]
    return text_table(head, table, right=(2, 3, 4)) + "\n\n" + _memory(config, total, batch_size)


def figures(config: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Return what :func:`report` shows, as what JSON can hold: sizes in bytes, shapes without the batch axis."""
    rows, total = _all_rows(config)
    sizes = _sizes(total, _team(config), batch_size)
    totals = {"parameters": total.parameters, "flops": total.flops, "kept": total.kept}
    return {
        "layers": [
            {"layer": name, "output": row.shape[1:], "parameters": row.parameters, "flops": row.flops, "kept": row.kept}
            for name, row in rows
            if _costs(row)
        ],
        "total": totals,
        "memory": sizes | {"peak_cpu": sum(sizes.values()), "peak_gpu": _on_a_gpu(total, batch_size)},
    }


def _costs(row: Row) -> bool:
    return bool(row.parameters or row.flops or row.kept)  # drop path at 0 does not


def _all_rows(config: dict[str, Any]) -> tuple[list[tuple[str, Row]], Row]:
    """Return the table's rows, from one image's pass through an outline of the model, and their sum."""
    model = outline(config)
    rows = measure(model, np.zeros((1, *image_shape(config)), np.float32))
    repeats = config["depth"] - len(model.blocks)
    table, total = [], Row()
    for name, row in rows.items():
        total.add(row)
        table.append((name.replace("blocks.2.", f"blocks.{config['depth'] - 1}."), row))
        if name == "blocks.1.mlp" and repeats > 0:  # the blocks that were left out
            left_out = Row(row.shape)
            for _ in range(repeats):
                for other, costs in rows.items():
                    if other.startswith("blocks.1."):
                        left_out.add(costs)
            total.add(left_out)
            table.append(("blocks.2" + (f" … {config['depth'] - 2}" if repeats > 1 else ""), left_out))
    return table, total


def _cells(name: str, row: Row) -> list[str]:
    shape = " × ".join(map(str, row.shape[1:]))  # without the batch axis
    return [name, shape, f"{row.parameters:,}", f"{row.flops:,}" if row.flops else "", bytes_text(row.kept)]


def _sizes(total: Row, team: Team, batch_size: int) -> dict[str, int]:
    """Return the bytes that a training step takes on the CPU, in micro-batches."""
    weights = 4 * total.parameters
    return {
        "parameters": weights,
        "gradient": weights,
        "optimizer": 2 * weights,  # AdamW's state
        "buffers": team.threads * weights,
        "kept": _at_once(team, batch_size) * total.kept,
    }


def _at_once(team: Team, batch_size: int) -> int:
    """Return how many images are worked on at once, all threads together."""
    start, stop = team.pieces(batch_size)[0]
    return min(team.threads * (stop - start), batch_size)


def peak_memory(config: dict[str, Any], team: Team, batch_size: int) -> int:
    """Return about how many bytes training a model by ``team`` takes at the most, on the CPU, besides the data."""
    return sum(_sizes(_all_rows(config)[1], team, batch_size).values())


def _team(config: dict[str, Any]) -> Team:
    model = outline(config)
    model.blocks = model.blocks[:1] * config["depth"]  # micro-batches depend on how many there are
    return team_for(model)


def _on_a_gpu(total: Row, batch_size: int) -> int:
    """Return the bytes that a training step takes on a GPU, in one piece."""
    return 5 * 4 * total.parameters + batch_size * total.kept


def _memory(config: dict[str, Any], total: Row, batch_size: int) -> str:
    """Return what a training step takes: on the CPU in micro-batches, on a GPU in one piece."""
    team = _team(config)
    sizes = _sizes(total, team, batch_size)
    titles = {
        "optimizer": "AdamW's state",
        "buffers": f"buffers of {plural(team.threads, 'thread')}",
        "kept": f"kept for backward, {plural(_at_once(team, batch_size), 'image')} at once",
    }
    lines = [f"training step of {plural(batch_size, 'image')}, float32:"]
    lines += [f"  {titles.get(name, name):44}{bytes_text(size):>8}" for name, size in sizes.items()]
    lines.append(f"  {'peak on the CPU, about':44}{bytes_text(sum(sizes.values())):>8}")
    lines.append(f"  {'peak on a GPU, in one piece, about':44}{bytes_text(_on_a_gpu(total, batch_size)):>8}")
    return "\n".join(lines)
