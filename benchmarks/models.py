"""How well models of different kinds learn in equal time from few images and from many.

    python benchmarks/models.py CIFAR-10 FASHION-MNIST [--minutes 4] [--jobs CORES] [--save NAME]

A ViT, a Compact Convolutional Transformer, a Tokens-to-Token ViT, a hybrid and a ResNet are trained on 1, 10 and 100%
of each data set's training images, with the same settings, each for the same time on a core of its own: figures 3 and 4
of Dosovitskiy et al. 2020 in small. How many steps a model makes in that time is measured first, with as many processes
at once as will train; then those steps are made, so that what else the machine does changes no accuracy. Prints a table
in Markdown, accuracies on all test images with their 95% intervals; ``--save`` writes NAME.md and draws NAME.svg.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chart

BATCH = 128
TIMED = 1.0
SHARES = (0.01, 0.1, 1.0)
NARROW = {"dim": 96, "depth": 4, "heads": 3, "mlp_dim": 192, "pool": "mean", "patch_size": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_cifar", {**NARROW, "weight_init": "mimetic"}),
    "CCT": ("cct_4_3x2_32", {}),
    "T2T-ViT": ("vit_cifar", {**NARROW, "tokenizer": "t2t", "weight_init": "mimetic"}),
    "hybrid": ("hybrid_cifar", {**NARROW, "width": 32, "weight_init": "mimetic"}),
    "ResNet": ("resnet_cifar", {"depths": (1, 1, 1), "width": 32}),
}
"""The named model that each is, and its settings: small ones, of 0.3 to 0.5 million parameters."""


class Cell(NamedTuple):
    """A training run: a data set, a share of its training images, a model, and its steps; 0: for TIMED seconds."""

    path: str
    share: float
    model: str
    steps: int = 0


class Trained(NamedTuple):
    """What came of a cell."""

    seconds: float  # a step's, the median
    right: int  # test images, of
    count: int
    parameters: int


def batches(cell: Cell, images: Any) -> Iterator[tuple[Any, Any]]:
    """Yield augmented batches, without an end, of a share of the images, which is the same for all models."""
    import minivit as mv

    key = mv.Key(0)
    if cell.share < 1:
        _, images = images.split_off(cell.share, key.child(0))
    pixels = 4 if images.images.shape[1] == 3 else 1  # clothes fill their pictures: a larger shift does harm
    augment = mv.data.Chain((mv.data.Crop(pixels), mv.data.Flip()))
    loader = mv.data.Loader(images, min(BATCH, len(images)), key.child(1), augment, drop_last=True)
    for epoch in itertools.count():
        yield from loader.batches(epoch)


def train(cell: Cell) -> Trained:
    """Train a model on one core, and test it."""
    import numpy as np

    import minivit as mv
    from minivit.backend import keep_freed_memory

    keep_freed_memory()
    data = mv.data.load(cell.path, split="train")
    channels, side, _ = data.images.shape[1:]
    name, settings = MODELS[cell.model]
    model = mv.create_model(name, image_size=side, in_channels=channels, num_classes=len(data.classes), **settings)
    opt = mv.optim.Muon(model.named_parameters(), lr=2e-3, weight_decay=0.05)
    loss = lambda logits, labels: mv.ops.cross_entropy(logits, labels, smoothing=0.1)
    step = mv.TrainStep(model, opt, loss, threads=1, clip_norm=1.0)
    total = cell.steps or 100_000
    rate = mv.optim.warmup_cosine(2e-3, total, total // 20, 2e-5)
    times: list[float] = []
    for images, labels in itertools.islice(batches(cell, data), total):
        start = time.perf_counter()
        opt.lr = rate(opt.steps)
        step(images, labels)
        times.append(time.perf_counter() - start)
        if not cell.steps and sum(times) > TIMED:
            break
    test = mv.data.load(cell.path, split="test")
    right = 0
    if cell.steps:
        logits = mv.predict_logits(model, mv.data.standardize(test.images, data.mean, data.std))
        right = int((np.argmax(logits, axis=1) == test.labels).sum())
    return Trained(statistics.median(times), right, len(test), sum(p.size for p in model.parameters()))


def steps_of(pool: Any, cell: Cell, jobs: int, minutes: float) -> int:
    """Return how many steps a model makes in so many minutes with as many side by side as will train."""
    beside = pool.map(train, [cell] * jobs, chunksize=1)
    return max(1, round(minutes * 60 / statistics.median(trained.seconds for trained in beside)))


def row(name: str, cells: list[Cell], results: list[Trained], minutes: float) -> str:
    """Return a model's line in the table of a data set."""
    from minivit.measure.metrics import wilson_interval

    milliseconds = 60e3 * minutes / cells[0].steps  # as measured first, and not beside what else ran in the hour
    words = [name, f"{results[0].parameters:,}", f"{cells[0].steps * BATCH:,}", f"{milliseconds:.0f}"]
    for _, right, count, _ in results:
        low, high = wilson_interval(right, count)
        words.append(f"{right / count:.2%} ({100 * low:.2f} to {100 * high:.2f}%)")
    return f"| {' | '.join(words)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="DATA", help="a data set's name, folder or .npz file")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, a run (4)")
    parser.add_argument("--jobs", type=int, help="runs at a time (as many as there are cores)")
    parser.add_argument("--save", metavar="NAME", help="write NAME.md and NAME.svg")
    args = parser.parse_args()

    from minivit.backend import cpu_cores

    jobs, lines = args.jobs or cpu_cores(), []
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    columns = ["", "parameters", "images seen", "ms a step", *(f"{share:.0%} of the images" for share in SHARES)]
    # a process a run: what one leaves in memory does not slow the next
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        kinds = list(itertools.product(args.data, MODELS))
        steps = {(path, model): steps_of(pool, Cell(path, 1.0, model), jobs, args.minutes) for path, model in kinds}
        for path in args.data:
            cells = [Cell(path, share, model, steps[path, model]) for model in MODELS for share in SHARES]
            results = pool.imap(train, cells)
            title = Path(path).name
            head = f"\n{title}, {args.minutes:g} minutes a run:\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
            print(head, flush=True)
            lines.append(head)
            for model in MODELS:
                mine = [cell for cell in cells if cell.model == model]
                found = list(itertools.islice(results, len(mine)))
                lines.append(row(model, mine, found, args.minutes))
                print(lines[-1], flush=True)
                points = [(cell.share, result.right / result.count) for cell, result in zip(mine, found, strict=True)]
                panels.setdefault(title, {})[model] = points
    if args.save:
        Path(f"{args.save}.md").write_text("\n".join([*lines, ""]), encoding="utf-8")
        chart.accuracies(f"{args.save}.svg", "share of the training images", panels)


if __name__ == "__main__":
    main()
