"""``minivit summary``: a model's layers, output shapes, parameters, FLOPs, and the memory that training it takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minivit.autograd.graph import Node, first_order
from minivit.cli.report import bytes_text, text_table

if TYPE_CHECKING:
    from minivit.models.vit import ViT
    from minivit.nn.module import Module


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL|CKPT", nargs="?", default="vit_digits",
                        help="named model (default vit_digits), or a checkpoint's path")  # fmt: skip
    parser.add_argument("--list", metavar="PATTERN", nargs="?", const="*", help="list the named models: vit_tiny_*")
    parser.add_argument("--batch-size", "-b", type=int, default=64, help="images in a training step (64)")
    parser.add_argument("--image-size", type=int, help="height and width of the images, for another size")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.list is not None:
        return list_models(args.list)
    from minivit.errors import ConfigError

    if args.batch_size < 1 or (args.image_size is not None and args.image_size < 1):
        raise ConfigError(f"batch size {args.batch_size}, image size {args.image_size}", "each must be at least 1")
    config = model_config(args.model)
    if args.image_size is not None:
        config["image_size"] = args.image_size
    print(f"{args.model}, one image of {' × '.join(map(str, image_shape(config)))}\n")
    print(report(config, args.batch_size))
    return 0


def list_models(pattern: str) -> int:
    """Print the named models that match a shell pattern, with their sizes."""
    from minivit.errors import unknown_name
    from minivit.models.zoo import MODELS
    from minivit.models.zoo import list_models as names

    found = names(pattern)
    if not found:
        raise unknown_name("model or pattern", pattern, MODELS)
    rows = []
    for name in found:
        model = outline(model_config(name))
        settings = model.config
        sizes = [str(settings[key]) for key in ("image_size", "patch_size", "dim", "heads")]
        depth = model_config(name)["depth"]
        rows.append([name, *sizes, str(depth), f"{parameters(model, depth):,}"])
    print(text_table(["model", "image", "patch", "dim", "heads", "depth", "parameters"], rows, right=range(1, 7)))
    return 0


def model_config(name: str) -> dict[str, Any]:
    """Return all settings of a named model, or of the model in a checkpoint."""
    import inspect
    from pathlib import Path

    from minivit.errors import CheckpointError, unknown_name
    from minivit.models.vit import ViT
    from minivit.models.zoo import MODELS
    from minivit.train.checkpoint import load_checkpoint

    defaults = {p.name: p.default for p in inspect.signature(ViT).parameters.values()}
    if name in MODELS:
        return defaults | MODELS[name]
    if Path(name).suffix != ".npz" and not Path(name).is_file():
        raise unknown_name("model", name, MODELS)
    config = load_checkpoint(name).meta.get("model")
    if not isinstance(config, dict):
        raise CheckpointError(f"{name} does not say which model it holds", "name the model instead")
    return defaults | config


def image_shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a model takes."""
    size = config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


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
        self.parameters, self.flops, self.kept = (
            self.parameters + other.parameters, self.flops + other.flops, self.kept + other.kept
        )  # fmt: skip


def outline(config: dict[str, Any]) -> ViT:
    """Return the model with two blocks at most: all blocks but the first are alike, and a large model takes gigabytes."""
    from minivit.models.vit import ViT

    return ViT(**config | {"depth": min(config["depth"], 2)})


def parameters(model: ViT, depth: int) -> int:
    """Return the number of parameters that the outlined model has with all its blocks."""
    return model.num_parameters() + (depth - len(model.blocks)) * model.blocks[-1].num_parameters()


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

    def watch(path: str, module: Module) -> None:
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            if path:
                rows.setdefault(layer_of(path), Row())
            out = forward(*args, **kwargs)
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
                for array in _arrays((node.args, node.out, node.kept)):
                    owner = _owner(array)
                    if id(owner) not in counted:
                        counted.add(id(owner))
                        alive.append(owner)
                        row.kept += owner.nbytes
            return out

        module.forward = watched  # type: ignore[method-assign]

    modules = list(model.named_modules())
    try:
        for path, module in modules:
            watch(path, module)
        with first_order():
            model.train()(images)
    finally:
        for _, module in modules:
            vars(module).pop("forward", None)
    for path, p in model.named_parameters():
        rows[layer_of(path)].parameters += p.size
    return rows


def flops(node: Node) -> int:
    """Return the floating-point operations of a recorded matrix product; 0 for other operations."""
    import math

    name, out, shapes = node.op.name, math.prod(node.shape), [p.shape if p else () for p in node.parents]
    if name == "linear":
        return 2 * out * shapes[1][-1]  # (…, in) · (out, in)ᵀ
    if name == "self_attention":
        _, *lead, tokens, width = shapes[0]  # (3, B, heads, T, d): QKᵀ and PV
        return 4 * math.prod(lead) * tokens * tokens * width
    return 0


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
    model = outline(config)
    rows = measure(model, np.zeros((1, *image_shape(config)), np.float32))
    repeats = config["depth"] - len(model.blocks)
    table, total = [], Row()
    for name, row in rows.items():
        total.add(row)
        if row.parameters or row.flops or row.kept:  # not drop path where there is none
            table.append(_cells(name, row))
        if name == f"blocks.{len(model.blocks) - 1}.mlp" and repeats > 0:  # the blocks that were left out
            block = Row()
            for other, costs in rows.items():
                if other.startswith("blocks.1."):
                    block.add(costs)
            all_of_them = Row(row.shape, repeats * block.parameters, repeats * block.flops, repeats * block.kept)
            total.add(all_of_them)
            last = config["depth"] - 1
            table.append(_cells("blocks.2" if last == 2 else f"blocks.2 … {last}", all_of_them))
    table.append(_cells("total", Row((), total.parameters, total.flops, total.kept)))
    head = ["layer", "output", "parameters", "FLOPs", "kept for backward"]
    return text_table(head, table, right=(2, 3, 4)) + "\n\n" + _memory(total, model, batch_size)


def _cells(name: str, row: Row) -> list[str]:
    shape = " × ".join(map(str, row.shape[1:]))  # without the batch axis
    return [name, shape, f"{row.parameters:,}", f"{row.flops:,}" if row.flops else "", bytes_text(row.kept)]


def _memory(total: Row, model: ViT, batch_size: int) -> str:
    """Return what a training step takes: on the CPU in micro-batches, on a GPU in one piece."""
    from minivit.train.step import Team

    weights = 4 * total.parameters
    team = Team(model, None, None)
    start, stop = team.pieces(batch_size)[0]
    at_once = min(team.threads * (stop - start), batch_size)
    buffers = team.threads * weights
    sizes = {
        "parameters": weights,
        "gradient": weights,
        "AdamW's state": 2 * weights,
        f"buffers of {team.threads} threads": buffers,
        f"kept for backward, {at_once} images at once": at_once * total.kept,
    }
    lines = [f"training step of {batch_size} images, float32:"]
    lines += [f"  {name:44}{bytes_text(size):>8}" for name, size in sizes.items()]
    lines.append(f"  {'peak on the CPU, about':44}{bytes_text(sum(sizes.values())):>8}")
    one_piece = 5 * weights + batch_size * total.kept
    lines.append(f"  {'peak on a GPU, in one piece, about':44}{bytes_text(one_piece):>8}")
    return "\n".join(lines)
