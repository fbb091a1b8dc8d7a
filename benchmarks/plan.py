"""What ``minivit plan`` predicts: the page of 1 to 1,024 GPUs, or beside what is measured here.

    python benchmarks/plan.py [--save FILE.svg]      tables as benchmarks/results/plan.md has them; nothing is measured
    python benchmarks/plan.py --here [ROUNDS]        one and two workers at three sizes, measured beside predicted

The second wants a quiet machine of at least two cores.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence

import chart
import numpy as np
from configs import CONFIGS, Config

import minivit as mv
from minivit.backend import keep_freed_memory, normal, random_bits
from minivit.measure.forecast import H200, MEASURED, Run, Step, cpu_step, gpu_step, on_gpu, work_of
from minivit.measure.gpu_costs import gpu_memory
from minivit.measure.here import measured_core, measured_machine
from minivit.measure.speed import time_steps
from minivit.models import MODELS, Model, model_outline
from minivit.train.sharing import team_for

GPUS = [2**i for i in range(11)]
CURVES = {  # and the images in a step: 4 on each of 1,024 GPUs
    "ViT-S/16": "vit_small_patch16_224",
    "ViT-B/16": "vit_base_patch16_224",
    "ViT-L/16": "vit_large_patch16_224",
    "ViT-H/14": "vit_huge_patch14_224",
}
BATCH, IMAGES, EPOCHS = 4096, 1_281_167, 300
AT_ONCE = 256  # images that a GPU works on, at the most
STEPS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", metavar="ROUNDS", type=int, nargs="?", const=5, help="measure (5)")
    parser.add_argument("--save", metavar="FILE.svg")
    args = parser.parse_args()
    if args.here is not None:
        beside_measured(max(1, args.here))
    else:
        curves(args.save)


# ---- one to many GPUs ------------------------------------------------------------------------------------------------


def curves(path: str | None) -> None:
    """Print the tables, and draw the picture."""
    print("| captured step | images | measured, ms | predicted, ms | ratio |\n|---|---|---|---|---|")
    for name, settings, rows, seconds in MEASURED:
        found = on_gpu(work_of(model_outline("vit", settings)), rows, "bfloat16", H200).seconds
        print(f"| {name} | {rows:,} | {1e3 * seconds:.2f} | {1e3 * found:.2f} | {found / seconds:.2f} |")
    head = ["GPUs", "images on each", "step, ms", "exchange, ms", "images/s", "efficiency", "hours", "GB on each"]
    panels: dict[str, list[tuple[float, float]]] = {}
    for title, name in CURVES.items():
        model = model_outline(*MODELS[name])
        print(f"\n{title}, {model.num_parameters():,} parameters\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        panels[title] = []
        for step, memory in points(model):
            hours = Run(step, IMAGES, EPOCHS).hours
            cells = [f"{step.devices:,}", f"{BATCH // step.devices:,}", f"{1e3 * step.seconds:,.1f}"]
            cells += [f"{1e3 * step.exchange:.1f}", f"{step.rate:,.0f}", f"{step.efficiency:.0%}", f"{hours:,.2f}"]
            print(f"| {' | '.join([*cells, f'{memory / 1e9:,.0f}'])} |")
            panels[title].append((step.devices, step.rate))
    if path:
        chart.rates(path, "images a second, predicted", "GPUs", panels)


def points(model: Model) -> Iterator[tuple[Step, int]]:
    """Yield a step of each number of GPUs, and the bytes on each; a share of too many images goes in pieces."""
    work = work_of(model)
    for devices in GPUS:
        yield (
            gpu_step(work, devices, BATCH, micro_batch=AT_ONCE),
            gpu_memory(model, min(AT_ONCE, BATCH // devices), "bfloat16"),
        )


# ---- beside what is measured -----------------------------------------------------------------------------------------


def beside_measured(rounds: int) -> None:
    """Print a table of steps of one and two workers, measured and predicted in turns: medians over the rounds."""
    keep_freed_memory()
    print("| | workers | measured, ms | predicted, ms | ratio (min to max) |\n|---|---|---|---|---|", flush=True)
    for name, config in CONFIGS.items():
        for workers in (1, 2):
            times = [one_round(config, workers) for _ in range(rounds)]
            measured, predicted = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            ratios = sorted(p / m for m, p in times)
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {workers} | {measured:.1f} | {predicted:.1f} | {spread} |", flush=True)


def one_round(config: Config, workers: int) -> Sequence[float]:
    """Return the seconds of a step, measured and then predicted; one worker is one thread."""
    batch, image, patch, dim, depth, heads, _ = config
    model = mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10)
    step = mv.TrainStep(
        model, mv.optim.AdamW(model.named_parameters(), lr=1e-3), threads=1 if workers == 1 else None, workers=workers
    )
    images = normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32)
    labels = (random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64)
    try:
        measured = statistics.median(time_steps(step, images, labels, STEPS))
    finally:
        step.crew.close()
    team = team_for(model, threads=1)
    at_once = [max(stop - start for start, stop in team.pieces(-(-batch // n))) for n in (workers, 1)]
    core, alone = (measured_core(model, rows) for rows in at_once)
    machine = measured_machine(model.num_parameters(), images[: -(-batch // workers)].nbytes, workers)
    return measured, cpu_step(model, workers, batch, core, alone, machine).seconds


if __name__ == "__main__":
    main()
