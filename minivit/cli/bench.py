"""``minivit bench``: how fast a model is trained and run here, beside what the machine can do."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from minivit.cli.bars import compiling_shown
from minivit.cli.main import number, one_of
from minivit.cli.speeds import FEWEST, MOST, SECONDS, figure, random_batch, speed_table, speeds
from minivit.runs.options import MANY, OPTIONS

if TYPE_CHECKING:
    from minivit.measure.profile import Profile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = "Images and labels are random. sgemm is the best rate of square matrix products, beside the step's."
    positive: Any = {"type": number(int, 1, MANY), "metavar": "N"}
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", nargs="?", default="vit_cifar",
                        help="named model (default vit_cifar), checkpoint, or a run's folder")  # fmt: skip
    parser.add_argument("--batch-size", "-b", **positive, default=64, help="images in a step (64)")
    parser.add_argument(
        "--steps", **positive, help=f"steps to measure (what takes {SECONDS:.0f} s, {FEWEST} to {MOST})"
    )
    parser.add_argument("--threads", type=number(int, 0, 1024), metavar="N", default=0,
                        help="CPU threads; 0: one for each core, if they pay (0)")  # fmt: skip
    parser.add_argument("--micro-batch", type=number(int, 0, MANY), metavar="N", default=0,
                        help="images at once; 0: what fits the cache (0)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    parser.add_argument("--dtype", type=one_of("dtype", OPTIONS["train.dtype"].choices), metavar="NAME", default="auto",
                        help="numbers of a step on a GPU: float32, tf32, bfloat16 or float16 (auto)")  # fmt: skip
    parser.add_argument("--profile", action="store_true",
                        help="show what a step's time goes to, by operation, on a GPU by kernel")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


@compiling_shown()
def run(args: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    from minivit.backend import auto_device, keep_freed_memory, peak_memory
    from minivit.cli.gpu_bench import run_on_gpu
    from minivit.errors import printable
    from minivit.measure.costs import find_settings
    from minivit.measure.machine import cpu_text
    from minivit.measure.profile import profile_step
    from minivit.measure.speed import image_flops, sgemm_rate, time_steps
    from minivit.models import build
    from minivit.runs.job import dtype_on
    from minivit.runs.trained import find_model
    from minivit.show.text import bytes_text, json_text, plural
    from minivit.train.inference import predict_logits
    from minivit.train.optim import AdamW
    from minivit.train.step import TrainStep

    device, batch = auto_device(args.device)[0], args.batch_size
    dtype_on(device, args.dtype)
    if device != "cpu":
        return run_on_gpu(args, device)
    keep_freed_memory()
    name = find_model(args.model)
    settings = find_settings(name)
    model, shape = build(settings.kind, settings.config), settings.image_shape
    images, labels = random_batch(model, batch)

    def new_step(threads: int | None, micro_batch: int | None) -> TrainStep:
        return TrainStep(model, AdamW(model.named_parameters(), lr=1e-4), threads=threads, micro_batch=micro_batch)

    say: Any = (lambda text: None) if args.json else partial(print, flush=True)
    step = new_step(*(given := (args.threads or None, args.micro_batch or None)))
    threads, micro_batch = step.team.threads_for(batch), max(stop - start for start, stop in step.team.pieces(batch))
    where = f"{cpu_text()}\n{plural(threads, 'thread')}"
    say(printable(name) + f", {model.num_parameters():,} parameters, float32, images of {' × '.join(map(str, shape))}")
    say(f"{where}, batches of {plural(batch, 'image')}, at most {micro_batch} at once\n")

    first = time_steps(step, images, labels, 3, warmup=0)
    steps = args.steps or min(max(round(SECONDS / min(first)), FEWEST), MOST)
    times = {"training step": time_steps(step, images, labels, steps, warmup=0)}
    peak = peak_memory()
    times["forward only"] = time_steps(lambda x, _: predict_logits(model, x, *given), images, labels, steps, warmup=1)
    forward, backward = image_flops(model)
    flops = {"training step": batch * (forward + backward), "forward only": batch * forward}
    sgemm = sgemm_rate(threads)
    say(speed_table(times, batch, flops, sgemm))
    say(f"\nMedians of {plural(steps, 'step')}; each range holds the middle half of them.")
    work = figure(flops["training step"] / 1e9)
    say(f"A training step is {work} GFLOP in matrix products; the process took {bytes_text(peak)} at its peak.")
    profile = None
    if args.profile:
        say(f"\nA training step on 1 thread, where times add up, at most {micro_batch} images at once:\n")
        profile = profile_step(new_step(1, micro_batch), images, labels)
        say(profile_table(profile))
    if args.json:
        found = {"model": name, "parameters": model.num_parameters(), "image": shape, "device": device}
        found |= {"threads": threads, "batch_size": batch, "micro_batch": micro_batch, "steps": steps}
        found |= {"speed": speeds(times, batch, flops), "sgemm_flops_per_second": sgemm, "peak_memory": peak}
        print(json_text(found | ({"profile": profile_rows(profile)} if profile else {})))
    return 0


def profile_table(profile: Profile) -> str:
    """Return a row for each operation, the slowest first, one for what is outside of them, and the sum."""
    from minivit.show.text import text_table

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.2f}"

    table = []
    for row in profile_rows(profile):
        calls = "" if row["calls"] is None else f"{row['calls']:,}"
        parts = [ms(row["forward"]), ms(row["backward"]), ms(row["seconds"])]
        table.append([row["operation"], calls, *parts, f"{row['share']:.1%}"])
    return text_table(["operation", "calls", "forward ms", "backward ms", "ms", "share"], table, right=range(1, 6))


def profile_rows(profile: Profile) -> list[dict[str, Any]]:
    """Return the rows of :func:`profile_table`, times in seconds; None where a row has no such figure."""
    from minivit.measure.profile import OpTimes

    def row(
        name: str, seconds: float, calls: int | None = None, forward: float | None = None, backward: float | None = None
    ) -> dict[str, Any]:
        found = {"operation": name, "calls": calls, "forward": forward, "backward": backward}
        return found | {"seconds": seconds, "share": seconds / profile.seconds}

    def op_row(name: str, times: OpTimes, seconds: float) -> dict[str, Any]:
        return row(name, seconds, len(times.forward), sum(times.forward), sum(times.backward))

    rows = [op_row(name, times, times.total) for name, times in profile.ops.items()]
    rows += [row("outside operations", profile.outside), row("optimizer's update", profile.update)]
    every = OpTimes(*[[x for t in profile.ops.values() for x in getattr(t, part)] for part in ("forward", "backward")])
    return [*sorted(rows, key=lambda row: -row["seconds"]), op_row("total", every, profile.seconds)]
