"""``minivit summary``: a model's layers, output shapes, parameters, FLOPs, and the memory that training it takes."""

from __future__ import annotations

import argparse

from minivit.cli.main import number
from minivit.runs.options import MANY


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
        return list_models(args.list, args.json)
    from minivit.errors import printable
    from minivit.measure.costs import figures, image_shape, model_config, report
    from minivit.runs.trained import find_model
    from minivit.show.text import json_text

    model = find_model(args.model)
    config = model_config(model)
    if args.json:
        about = {"model": model, "image": image_shape(config), "batch_size": args.batch_size}
        print(json_text(about | figures(config, args.batch_size)))
        return 0
    print(printable(model) + f", one image of {' × '.join(map(str, image_shape(config)))}\n")
    print(report(config, args.batch_size))
    return 0


def list_models(pattern: str, as_json: bool) -> int:
    """Print the named models that match a shell pattern, with their sizes."""
    from minivit.errors import unknown_name
    from minivit.measure.costs import model_config
    from minivit.models.zoo import MODELS, count_parameters
    from minivit.models.zoo import list_models as names
    from minivit.show.text import json_text, text_table

    found = names(pattern)
    if not found:
        raise unknown_name("model or pattern", pattern, MODELS)
    models = []
    for name in found:
        config = model_config(name)
        sizes = {key: config[key] for key in ("image_size", "patch_size", "dim", "heads", "depth")}
        models.append({"model": name, **sizes, "parameters": count_parameters(config)})
    if as_json:
        print(json_text(models))
        return 0
    rows = [[*map(str, [*model.values()][:-1]), f"{model['parameters']:,}"] for model in models]
    print(text_table(["model", "image", "patch", "dim", "heads", "depth", "parameters"], rows, right=range(1, 7)))
    return 0
