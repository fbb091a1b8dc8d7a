"""``minivit eval``: loss, accuracy, accuracy of each class and confusions of a checkpoint on a data set."""

from __future__ import annotations

import argparse
from typing import Any

from minivit.cli.main import one_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, such as runs/digits-1/checkpoints/last.npz")
    parser.add_argument(
        "--data", "-d", help="data set: a name, folder or FILE.npz (by default the one it was trained on)"
    )
    parser.add_argument(
        "--split", type=one_of("split", ("test", "train")), default="test", help="test (default) or train"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    import json

    from minivit import data
    from minivit.backend import Key, auto_device
    from minivit.cli.report import measure, plural
    from minivit.data.datasets import LAYOUT
    from minivit.errors import DataError
    from minivit.train.trainer import evaluate
    from minivit.train.weights import read_model

    model, meta = read_model(args.checkpoint)
    trained_on = meta.get("data", {})
    name = args.data or trained_on.get("name")
    if name is None:
        raise DataError(f"{args.checkpoint} does not say what it was trained on", "name the data: --data NAME")
    bad = trained_on.get("bad_images", "stop")
    layout = trained_on.get("layout", 1) if "name" in trained_on else LAYOUT  # a run is tested as it was before
    dataset = data.load(name, args.split, model.patch_embed.image_size, model.config["in_channels"], bad, layout)
    if len(dataset.classes) > model.config["num_classes"]:
        raise DataError(
            f"{name} has {len(dataset.classes)} classes, the model knows {model.config['num_classes']}",
            "evaluate on data of the kind that it was trained on",
        )
    channels, takes = dataset.images.shape[1], model.config["in_channels"]
    if channels != takes:
        raise DataError(
            f"{name} has images of {plural(channels, 'channel')}, the model takes {takes}",
            "evaluate on data of the kind that it was trained on",
        )
    model.to(auto_device(args.device)[0])
    loader = data.Loader(dataset, 512, Key(0), mean=trained_on.get("mean"), std=trained_on.get("std"), shuffle=False)
    found = evaluate(model, loader)
    result = measure(found["logits"], found["labels"])
    classes = list(trained_on.get("classes") or dataset.classes)
    if args.json:
        result |= {"checkpoint": args.checkpoint, "data": name, "split": args.split, "classes": classes}
        print(json.dumps({k: v.tolist() if k == "confusion" else v for k, v in result.items()}))
    else:
        print(f"{args.checkpoint} on {dataset.name}, {args.split}: {result['count']:,} images\n")
        print(report(result, classes))
    return 0


def report(result: dict[str, Any], classes: list[str]) -> str:
    """Return the figures of :func:`minivit.cli.report.measure` as text."""
    from minivit.cli.report import percent_interval, text_table

    confusion = result["confusion"]  # (K, K): label, prediction
    totals, rights = confusion.sum(axis=1).tolist(), confusion.diagonal().tolist()
    lines = [f"loss      {result['loss']:.4f}", f"accuracy  {percent_interval(result)}"]
    if "top5" in result:
        lines.append(f"top-5     {result['top5']:.2%}")
    names = [short(name, 12) for name in classes]
    if len(classes) <= 20:  # as wide as a page
        head = ["label", "images", "right", *[short(name, 5) for name in classes]]
        cells = [["·" if n == 0 else str(n) for n in row] for row in confusion.tolist()]
        lines.append("\nlabel by row, prediction by column:")
    else:
        head, cells = ["label", "images", "right"], [[] for _ in classes]
        lines.append("")
    rows = [
        [name, str(total), f"{right / total:.1%}" if total else "", *row]
        for name, total, right, row in zip(names, totals, rights, cells, strict=True)
    ]
    lines.append(text_table(head, rows, right=range(1, len(head))))
    wrong = [(n, i, j) for i, row in enumerate(confusion.tolist()) for j, n in enumerate(row) if n and i != j]
    if wrong:
        worst = sorted(wrong, key=lambda w: -w[0])[:5]
        pairs = [f"{classes[i]} as {classes[j]} ({n} time{'s' * (n > 1)})" for n, i, j in worst]
        lines.append(f"\nmost often mistaken: {', '.join(pairs)}")
    return "\n".join(lines)


def short(name: str, width: int) -> str:
    """Return a name cut to ``width`` characters."""
    return name if len(name) <= width else name[: width - 1] + "…"
