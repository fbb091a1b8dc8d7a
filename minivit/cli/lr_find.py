"""``minivit lr-find``: a learning rate to begin with, found by raising it until the loss rises too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minivit.cli.bars import reading_bar
from minivit.cli.train import add_setting_flags, settings_from

ROWS = 12  # of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments: the settings of a run, and where the curve goes."""
    parser.epilog = "Trains some 100 steps with a learning rate that rises from 1e-6 to 1; no weights are kept."
    add_setting_flags(parser)
    parser.add_argument(
        "--output", "-o", metavar="FILE", default="lr-find.svg", help="picture of the curve, or a folder for it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the test; print a table and suggestions, and draw the curve."""
    from itertools import count

    from minivit.errors import NonFiniteError, printable
    from minivit.runs.job import Job
    from minivit.show.curves import chart, write_svg
    from minivit.show.text import json_text
    from minivit.train.lr_find import lr_range_test, smoothed, suggest

    job = Job(settings_from(args), bar=reading_bar)
    if not args.json:
        print(job.about, flush=True)
    s, step = job.settings, job.make_trainer(None).step
    points = lr_range_test(step, (batch for epoch in count() for batch in job.loader.batches(epoch)))
    if not points:
        raise NonFiniteError("the first loss is not finite", "look at the data: minivit data DATA")
    smooth = smoothed([loss for _, loss in points])
    found = suggest(points)
    path = Path(args.output)
    if path.is_dir():
        path /= "lr-find.svg"
    marks = {} if found is None else {"falls fastest": found[0], "a tenth of the lowest": found[1]}
    means = [(lr, mean) for (lr, _), mean in zip(points, smooth, strict=True)]
    title = f"Smoothed loss of {s['model.name']} on {job.parts.title}"
    write_svg(path, chart(title, {"loss": means}, "learning rate", log_x=True, marks=marks))
    if args.json:
        rows = [{"lr": lr, "loss": loss, "smoothed": mean} for (lr, loss), mean in zip(points, smooth, strict=True)]
        suggestion, cautious = found or (None, None)
        about = {"suggestion": suggestion, "cautious": cautious, "so_far": s["train.lr"], "curve": str(path)}
        print(json_text(about | {"points": rows}))
        return 0
    print(f"\n{rates_table(points, smooth)}\n")
    if found is None:
        print("no suggestion: the loss never fell below its first value")
    else:
        print(f"suggestion  --lr {found[0]:.1e}, where the loss falls fastest")
        print(f"cautious    --lr {found[1]:.1e}, a tenth of where it is lowest")
    print(f"so far      --lr {s['train.lr']:.1e} ({s.origins['train.lr']})")
    print(printable(f"curve       {path}"))
    return 0


def rates_table(points: Sequence[tuple[float, float]], smooth: Sequence[float]) -> str:
    """Return some of the points, evenly spaced, the last among them."""
    from minivit.show.text import text_table

    last, every = len(points) - 1, max(1, len(points) // ROWS)
    rows = [
        [f"{lr:.1e}", f"{loss:.4f}", f"{mean:.4f}"]
        for i, ((lr, loss), mean) in enumerate(zip(points, smooth, strict=True))
        if (last - i) % every == 0
    ]
    return text_table(["learning rate", "loss", "smoothed"], rows, right=range(3))
