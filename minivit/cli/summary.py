"""``minivit summary``: a model's layers, output shapes, parameters, FLOPs, and the memory that training it takes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minivit.cli.main import number
from minivit.runs.options import MANY

if TYPE_CHECKING:
    from minivit.backend import Team
    from minivit.measure.costs import Costs, LayerCosts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", nargs="?", default="vit_digits",
                        help="named model (default vit_digits), checkpoint, or a run's folder")  # fmt: skip
    parser.add_argument("--list", metavar="PATTERN", nargs="?", const="*", help="list the named models: vit_tiny_*")
    parser.add_argument(
        "--batch-size", "-b", type=number(int, 1, MANY), default=64, help="images in a training step (64)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.list is not None:
        return print_models(args.list, args.json)
    from minivit.errors import printable
    from minivit.measure.costs import find_settings, model_costs
    from minivit.measure.gpu_costs import gpu_memory
    from minivit.models import model_outline
    from minivit.models.preparations import PREPARATIONS
    from minivit.runs.trained import find_model
    from minivit.show.text import json_text
    from minivit.train.sharing import team_for

    name = find_model(args.model)
    settings = find_settings(name)
    model = model_outline(settings.kind, settings.config)
    costs, team = model_costs(model), team_for(model)
    on_gpu = {dtype: gpu_memory(model, args.batch_size, dtype) for dtype in ("float32", "bfloat16")}
    prepared = PREPARATIONS.get(name)
    if args.json:
        about = {"model": name, "image": settings.image_shape, "batch_size": args.batch_size}
        about |= {"preparation": prepared.meta()} if prepared else {}
        print(json_text(about | costs_json(costs, team, args.batch_size, on_gpu)))
        return 0
    print(printable(name) + f", one image of {' × '.join(map(str, settings.image_shape))}")
    print(f"prepared: {prepared.text(*settings.image_shape[1:])}\n" if prepared else "")
    print(costs_table(costs) + "\n\n" + memory_table(costs.total, team, args.batch_size, on_gpu))
    return 0


def print_models(pattern: str, as_json: bool) -> int:
    """Print the named models that match a shell pattern, with their sizes."""
    from minivit.errors import unknown_name
    from minivit.models import MODELS, count_parameters, list_models, read_settings
    from minivit.show.text import json_text, text_table

    found = list_models(pattern)
    if not found:
        raise unknown_name("model or pattern", pattern, MODELS)
    models = []
    for name in found:
        config = read_settings(*MODELS[name]).config
        sizes = {key: config.get(key) for key in ("image_size", "patch_size", "dim", "heads", "depth")}
        models.append({"model": name, **sizes, "parameters": count_parameters(*MODELS[name])})
    if as_json:
        print(json_text(models))
        return 0
    rows = [["" if x is None else str(x) for x in [*model.values()][:-1]] for model in models]
    rows = [[*row, f"{model['parameters']:,}"] for row, model in zip(rows, models, strict=True)]
    print(text_table(["model", "image", "patch", "dim", "heads", "depth", "parameters"], rows, right=range(1, 7)))
    return 0


# ---- what is printed -------------------------------------------------------------------------------------------------


def costs_table(costs: Costs) -> str:
    """Return the table of layers, and their sum."""
    from minivit.measure.costs import LayerCosts
    from minivit.show.text import bytes_text, text_table

    total = LayerCosts((), costs.total.parameters, costs.total.flops, costs.total.kept)
    table = []
    for name, row in [*_costly(costs), ("total", total)]:
        shape = " × ".join(map(str, row.shape[1:]))  # without the batch axis
        table.append([name, shape, f"{row.parameters:,}", f"{row.flops:,}" if row.flops else "", bytes_text(row.kept)])
    return text_table(["layer", "output", "parameters", "FLOPs", "kept for backward"], table, right=(2, 3, 4))


def _costly(costs: Costs) -> list[tuple[str, LayerCosts]]:
    return [(n, row) for n, row in costs.rows if row.parameters or row.flops or row.kept]  # drop path at 0 does not


def memory_table(total: LayerCosts, team: Team, batch_size: int, on_gpu: dict[str, int]) -> str:
    """Return what a training step takes: on the CPU in micro-batches; ``on_gpu``, in one piece, by dtype."""
    from minivit.measure.costs import images_at_once, step_memory
    from minivit.show.text import bytes_text, plural

    sizes = step_memory(total, team, batch_size)
    titles = {
        "optimizer": "AdamW's state",
        "buffers": f"buffers of {plural(team.threads, 'thread')}",
        "kept": f"kept for backward, {plural(images_at_once(team, batch_size), 'image')} at once",
    }
    lines = [f"training step of {plural(batch_size, 'image')}, float32:"]
    lines += [f"  {titles.get(name, name):44}{bytes_text(size):>8}" for name, size in sizes.items()]
    lines.append(f"  {'peak on the CPU, about':44}{bytes_text(sum(sizes.values())):>8}")
    for dtype, size in on_gpu.items():
        lines.append(f"  {f'peak on a GPU, in one piece, {dtype}, about':44}{bytes_text(size):>8}")
    return "\n".join(lines)


def costs_json(costs: Costs, team: Team, batch_size: int, on_gpu: dict[str, int]) -> dict[str, Any]:
    """Return what the tables show, as what JSON can hold: sizes in bytes, shapes without the batch axis."""
    from minivit.measure.costs import step_memory

    total, sizes = costs.total, step_memory(costs.total, team, batch_size)
    return {
        "layers": [
            {"layer": name, "output": row.shape[1:], "parameters": row.parameters, "flops": row.flops, "kept": row.kept}
            for name, row in _costly(costs)
        ],
        "total": {"parameters": total.parameters, "flops": total.flops, "kept": total.kept},
        "memory": sizes | {"peak_cpu": sum(sizes.values()), "peak_gpu": on_gpu},
    }
