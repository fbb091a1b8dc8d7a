"""What ``minivit plan`` predicts: the page of 1 to 1,024 GPUs, or beside what is measured here.

    python benchmarks/plan.py [--save FILE.svg]      tables as benchmarks/results/plan.md has them; nothing is measured
    python benchmarks/plan.py --here [ROUNDS]        one process, two workers and two ranks of MPI, at several sizes,
                                                     measured beside predicted

The second wants a quiet machine of at least two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence

import chart
from configs import CONFIGS, Config

import minivit as mv
from minivit.backend import keep_freed_memory
from minivit.measure.forecast import H200, MEASURED, Link, Run, Step, cpu_step, gpu_step, on_gpu, work_of
from minivit.measure.gpu_costs import gpu_memory
from minivit.measure.here import measured_core, measured_machine
from minivit.measure.teamwork import seconds_a_step
from minivit.models import MODELS, Model, model_outline
from minivit.train.mpi import take_part
from minivit.train.ranks import place_among_ranks
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
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--here", metavar="ROUNDS", type=int, nargs="?", const=5, help="measure (5)")
    parser.add_argument("--save", metavar="FILE.svg")
    parser.add_argument("--ranks", metavar="NAME", help=argparse.SUPPRESS)  # what --here starts
    args = parser.parse_args()
    if args.ranks is not None:
        sys.exit(as_ranks(args.ranks))
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
    """Print a table of steps of one process and of two, measured and predicted in turns: medians over the rounds."""
    keep_freed_memory()
    print("| | processes | measured, ms | predicted, ms | ratio (min to max) |\n|---|---|---|---|---|", flush=True)
    for name, config in CONFIGS.items():
        for kind in ("one", "two workers", *(("two ranks",) if MPIEXEC else ())):
            times = [one_round(name, config, kind) for _ in range(rounds)]
            measured, predicted = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
            ratios = sorted(p / m for m, p in times)
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {name} | {kind} | {measured:.1f} | {predicted:.1f} | {spread} |", flush=True)
    if not MPIEXEC:
        print("\nNo ranks: there is no mpiexec here (pip install mpi4py mpich).")


def one_round(name: str, config: Config, kind: str) -> Sequence[float]:
    """Return the seconds of a step, measured and then predicted; one process has one thread."""
    count, model = 1 if kind == "one" else 2, new_model(config)
    if kind == "two ranks":
        command = [str(MPIEXEC), "-n", "2", sys.executable, __file__, "--ranks", name]
        measured = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    else:
        measured = seconds_a_step(model, config.batch, count, threads=1 if count == 1 else None)
    team = team_for(model, threads=1)
    at_once = [max(stop - start for start, stop in team.pieces(-(-config.batch // n))) for n in (count, 1)]
    core, alone = (measured_core(model, rows) for rows in at_once)
    bytes_of_rows = -(-config.batch // count) * 3 * config.image**2 * 4
    machine = measured_machine(model.num_parameters(), bytes_of_rows, count)
    link = Link(1 / machine.sent, machine.message / 2) if kind == "two ranks" else None
    return measured, cpu_step(model, count, config.batch, core, alone, machine, link).seconds


def new_model(config: Config) -> mv.ViT:
    """Return a model of a configuration."""
    _, image, patch, dim, depth, heads, _ = config
    return mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10)


def as_ranks(name: str) -> int:
    """Be one of the ranks that mpiexec has started, or the process that has them: that one prints the seconds."""
    if (place := place_among_ranks()) is not None:
        return take_part(*place, [sys.executable, *sys.argv], print)
    print(seconds_a_step(new_model(CONFIGS[name]), CONFIGS[name].batch, 2))
    return 0


if __name__ == "__main__":
    main()
