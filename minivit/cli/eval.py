"""``minivit eval``: loss, accuracy, accuracy of each class and confusions of a checkpoint on a data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minivit.cli.bars import reading_bar
from minivit.cli.main import add_like, one_of

if TYPE_CHECKING:
    from minivit.runs.matching import Matching


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "A class of the data is the model's class of the same name. Images of a class that the model does\n"
        "not know count as wrong."
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument(
        "--data", "-d", help="data set: a name, folder, FILE.npz or FILE.tar (by default the one it was trained on)"
    )
    parser.add_argument(
        "--split", type=one_of("split", ("train", "val", "test", "all")), default="test",
        help="test (default); train, without the images that the run held out; val, those; or all there are",
    )  # fmt: skip
    parser.add_argument(
        "--by-position", action="store_true", help="the n-th class of the data is the model's n-th, whatever its name"
    )
    add_like(parser)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from minivit.backend import auto_device, keep_freed_memory
    from minivit.data.catalog import listing
    from minivit.errors import DataError, printable
    from minivit.runs.assess import assess, load_split
    from minivit.runs.matching import match_classes
    from minivit.runs.trained import open_trained
    from minivit.show.text import json_text

    keep_freed_memory()
    trained = open_trained(args.checkpoint, args.like)
    name = trained.data.get("name") if args.data is None else args.data
    if not isinstance(name, str):
        raise DataError(f"{trained.path} does not say what it was trained on", "name the data: --data NAME")
    parts = load_split(trained, name, args.split, reading_bar)
    count = trained.model.config["num_classes"]
    matching = match_classes(trained.classes, parts[0].classes, count, name, args.by_position)
    trained.model.to(auto_device(args.device)[0])
    result = assess(trained, parts, matching, name)
    about = {"checkpoint": trained.path, "data": name, "split": args.split, "classes": matching.rows[:count]}
    if args.json:
        print(json_text(result | about | {"labels": matching.rows, "remark": matching.remark}))
    else:
        print(printable(f"{trained.path} on {parts[0].name}, {args.split}: {result['count']:,} images"))
        if trained.from_elsewhere:
            print(f"prepared: {trained.preparation.text(*trained.image_shape[1:])}")
        if args.data is not None and args.split != "all" and (found := listing(name)) is not None:
            print(printable(f"splits: {found.how}; --split all takes them together"))
        print(f"\n{figures(result, matching)}")
    return 0


# ---- the report ------------------------------------------------------------------------------------------------------


def figures(result: dict[str, Any], matching: Matching) -> str:
    """Return the figures of :func:`minivit.runs.assess.assess` as text."""
    from minivit.errors import printable, shortened
    from minivit.show.text import percent_interval, plural, text_table

    confusion, rows = result["confusion"], [*map(printable, matching.rows)]  # (K + U, K): label, prediction
    classes = rows[: confusion.shape[1]]
    totals = confusion.sum(axis=1).tolist()
    rights = [*confusion.diagonal().tolist(), *[0] * len(matching.unknown)]
    lines = [f"loss      {result['loss']:.4f}", f"accuracy  {percent_interval(result)}"]
    if "top5" in result:
        lines.append(f"top-5     {result['top5']:.2%}")
    lines += remarks(result, matching)
    names = [shortened(name, 12) + " (unknown)" * (i >= len(classes)) for i, name in enumerate(rows)]
    if len(classes) <= 20:  # as wide as a page
        head = ["label", "images", "right", *[shortened(name, 5) for name in classes]]
        cells = [["·" if n == 0 else str(n) for n in row] for row in confusion.tolist()]
        lines.append("\nlabel by row, prediction by column:")
    else:
        head, cells = ["label", "images", "right"], [[] for _ in rows]
        lines.append("")
    table = [
        [name, str(total), f"{right / total:.1%}" if total else "", *row]
        for name, total, right, row in zip(names, totals, rights, cells, strict=True)
    ]
    lines.append(text_table(head, table, right=range(1, len(head))))
    wrong = [(n, i, j) for i, row in enumerate(confusion.tolist()) for j, n in enumerate(row) if n and i != j]
    if wrong:
        worst = sorted(wrong, key=lambda w: -w[0])[:5]
        pairs = [f"{rows[i]} as {classes[j]} ({plural(n, 'time')})" for n, i, j in worst]
        lines.append(f"\nmost often mistaken: {', '.join(pairs)}")
    if found := result["worst"]:
        listed = [[one["file"], one["label"], one["class"], f"{one['probability']:.1%}"] for one in found]
        worst_table = text_table(["worst mistakes", "label", "prediction", "probability"], listed, right=[3])
        lines.append(f"\n{worst_table}\n\nLook at these: a label may be wrong.")
    return "\n".join(lines)


def remarks(result: dict[str, Any], matching: Matching) -> list[str]:
    """Return a line on each thing about the classes that makes the accuracy mean something else."""
    from minivit.runs.matching import listed, meant_by
    from minivit.show.text import percent_interval, plural

    lines = [f"remark    {matching.remark}"] if matching.remark else []
    if unknown := result["unknown"]:
        meant = {name: meant_by(name, matching.rows[: result["confusion"].shape[1]]) for name in unknown}
        asked = "".join(f"; {name!r}: did you mean {near!r}?" for name, near in meant.items() if near)
        images, others = plural(sum(unknown.values()), "image"), plural(result["matched"]["count"], "other image")
        lines += [
            f"unknown   {images} of classes that the model does not know: {listed([*unknown])}{asked}",
            f"          they count as wrong, not in the loss; of the {others} {percent_interval(result['matched'])}",
        ]
    if absent := result["absent"]:
        lines.append(f"absent    no image is of {listed(absent)}")
    return lines
