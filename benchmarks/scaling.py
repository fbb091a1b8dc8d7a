"""How minivit's training step scales: one thing varied at a time around one centre.

    python benchmarks/scaling.py [--sweep batch|image|dim|depth|threads] [--save FILE.svg]

Each point is a process of its own, so that its peak memory is its own. FLOPs are those of the matrix products, and
their rate is set against that of bare float32 products, measured in the same process after the steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from typing import NamedTuple

import chart  # nothing heavy: Linux counts the memory of the process that starts another into the other's peak

BUDGET = 3.0  # seconds for the timed steps of a point after its first two


class Point(NamedTuple):
    """The sizes of a training step on square RGB images in 4² patches, with heads of 64 numbers; 0 threads: all."""

    batch: int = 32
    image: int = 32
    dim: int = 192
    depth: int = 6
    threads: int = 0

    @property
    def tokens(self) -> int:
        return (self.image // 4) ** 2 + 1


class Measured(NamedTuple):
    """What one point took."""

    seconds: float  # the median step
    peak_bytes: int
    flops: int  # of a step
    sgemm: float  # FLOP/s


CENTRE = Point()
SWEEPS = {  # what is varied, its name in the table, its values
    "batch": ("batch", (8, 16, 32, 64, 128, 256, 512)),
    "image": ("tokens", (16, 32, 56, 80, 112)),
    "dim": ("dim", (64, 128, 192, 384, 768)),
    "depth": ("depth", (1, 3, 6, 12, 24)),
    "threads": ("threads", (1, 2)),
}


def measure(point: Point) -> Measured:
    """Measure a point, in the process that calls this."""
    import numpy as np

    import minivit as mv
    from minivit.backend import cpu_cores, keep_freed_memory, normal, peak_memory, random_bits
    from minivit.measure.speed import sgemm_rate, step_flops, time_steps

    batch, image, dim, depth, threads = point
    keep_freed_memory()
    model = mv.ViT(image_size=image, patch_size=4, dim=dim, depth=depth, heads=max(1, dim // 64), num_classes=10)
    opt = mv.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.05)
    step = mv.TrainStep(model, opt, threads=threads or None)
    images = normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32)
    labels = (random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64)
    times = time_steps(step, images, labels, 2, warmup=1)
    times += time_steps(step, images, labels, min(20, int(BUDGET / times[-1])), warmup=0)
    peak = peak_memory()  # before anything else is computed here
    return Measured(statistics.median(times), peak, step_flops(model, batch), sgemm_rate(threads or cpu_cores()))


def sweep(name: str) -> list[tuple[float, float]]:
    """Print the table of a sweep; return its points (what is varied, milliseconds an image)."""
    label, values = SWEEPS[name]
    points = [CENTRE._replace(**{name: value}) for value in values]
    print(f"\n| {label} | ms a step | images/s | peak MB | GFLOP/s | of sgemm |\n|---|---|---|---|---|---|")
    curve = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for point, (seconds, peak, flops, sgemm) in zip(points, pool.imap(measure, points), strict=True):
            x, rate = getattr(point, label), flops / seconds
            print(f"| {x} | {seconds * 1e3:,.1f} | {point.batch / seconds:,.1f} | {peak / 2**20:,.0f} "
                  f"| {rate / 1e9:.1f} | {rate / sgemm:.0%} |", flush=True)  # fmt: skip
            curve.append((x, seconds * 1e3 / point.batch))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", choices=SWEEPS, help="this one only")
    parser.add_argument("--save", metavar="FILE.svg")
    args = parser.parse_args()
    size = f"{CENTRE.image}² images (T {CENTRE.tokens}), dim {CENTRE.dim}, depth {CENTRE.depth}"
    print(f"The centre: batch {CENTRE.batch}, {size}, all cores.")
    panels = {SWEEPS[name][0]: sweep(name) for name in ([args.sweep] if args.sweep else SWEEPS)}
    if args.save:
        chart.curves(args.save, "training step, milliseconds an image", panels)


if __name__ == "__main__":
    main()
