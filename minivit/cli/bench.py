"""``minivit bench``: how fast a model is trained and run here, beside what the machine can do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minivit.cli.main import number
from minivit.cli.options import MANY

if TYPE_CHECKING:
    from minivit.study.profile import Profile

SECONDS, FEWEST, MOST = 5.0, 5, 100  # how long to measure, in how many steps at least and at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = "Images and labels are random. sgemm is the best rate of square matrix products, beside the step's."
    positive: Any = {"type": number(int, 1, MANY), "metavar": "N"}
    parser.add_argument("model", metavar="MODEL|CKPT", nargs="?", default="vit_cifar",
                        help="named model (default vit_cifar), or a checkpoint's path")  # fmt: skip
    parser.add_argument("--batch-size", "-b", **positive, default=64, help="images in a step (64)")
    parser.add_argument(
        "--steps", **positive, help=f"steps to measure (what takes {SECONDS:.0f} s, {FEWEST} to {MOST})"
    )
    parser.add_argument("--threads", type=number(int, 0, 1024), metavar="N", default=0,
                        help="CPU threads; 0: one for each core, if they pay (0)")  # fmt: skip
    parser.add_argument("--micro-batch", type=number(int, 0, MANY), metavar="N", default=0,
                        help="images at once; 0: what fits the cache (0)")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (auto)")
    parser.add_argument("--profile", action="store_true", help="show what a step's time goes to, by operation")


def run(args: argparse.Namespace) -> int:
    """Measure, and print what was found."""
    from minivit.backend import Key, auto_device, keep_freed_memory, peak_memory, random_bits, uniform
    from minivit.cli.doctor import cpu_text
    from minivit.cli.layers import image_shape, model_config
    from minivit.cli.report import bytes_text, plural
    from minivit.errors import ConfigError, printable
    from minivit.models.vit import ViT
    from minivit.study.profile import profile_step
    from minivit.study.speed import image_flops, sgemm_rate, time_steps
    from minivit.train.optim import AdamW
    from minivit.train.step import TrainStep, predict_logits

    device, batch = auto_device(args.device)[0], args.batch_size
    if args.profile and device != "cpu":
        raise ConfigError(f"--profile on {device}", "it times operations of the CPU: add --device cpu")
    keep_freed_memory()
    config = model_config(args.model)
    model, shape = ViT(**config).to(device), image_shape(config)
    images = uniform(Key(0), (batch, *shape)) * 2 - 1
    labels = (random_bits(Key(1), (batch,)) % config["num_classes"]).astype("int64")

    def new_step(threads: int | None, micro_batch: int | None) -> TrainStep:
        return TrainStep(model, AdamW(model.named_parameters(), lr=1e-4), threads=threads, micro_batch=micro_batch)

    step = new_step(*(given := (args.threads or None, args.micro_batch or None)))
    threads, micro_batch = step.team.threads_for(batch), max(stop - start for start, stop in step.team.pieces(batch))
    where = f"{cpu_text()}\n{plural(threads, 'thread')}" if device == "cpu" else device
    print(
        printable(args.model)
        + f", {model.num_parameters():,} parameters, float32, images of {' × '.join(map(str, shape))}"
    )
    print(f"{where}, batches of {plural(batch, 'image')}, at most {micro_batch} at once\n", flush=True)

    first = time_steps(step, images, labels, 3, warmup=0)
    steps = args.steps or min(max(round(SECONDS / min(first)), FEWEST), MOST)
    times = {"training step": time_steps(step, images, labels, steps, warmup=0)}
    peak = peak_memory()
    times["forward only"] = time_steps(lambda x, _: predict_logits(model, x, *given), images, labels, steps, warmup=1)
    forward, backward = image_flops(model)
    flops = {"training step": batch * (forward + backward), "forward only": batch * forward}
    print(speed_table(times, batch, flops, sgemm_rate(threads) if device == "cpu" else None))
    print(f"\nMedians of {plural(steps, 'step')}; each range holds the middle half of them.")
    work = figure(flops["training step"] / 1e9)
    print(f"A training step is {work} GFLOP in matrix products; the process took {bytes_text(peak)} at its peak.")
    if args.profile:
        print(f"\nA training step on 1 thread, where times add up, at most {micro_batch} images at once:\n", flush=True)
        print(profile_table(profile_step(new_step(1, micro_batch), images, labels)))
    return 0


def speed_table(times: dict[str, list[float]], batch: int, flops: dict[str, int], sgemm: float | None) -> str:
    """Return a row for each kind of work: median speed and time with their quartiles, and FLOP/s beside sgemm's."""
    import numpy as np

    from minivit.cli.report import text_table

    rows = []
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
        rate, share = flops[name] / middle, f"{flops[name] / middle / sgemm:.0%}" if sgemm else ""
        speeds = [figure(batch / middle), f"{figure(batch / high)} to {figure(batch / low)}"]
        ms = [figure(middle * 1e3), f"{figure(low * 1e3)} to {figure(high * 1e3)}"]
        rows.append([name, *speeds, *ms, figure(rate / 1e9), share])
    if sgemm:
        rows.append(["sgemm", "", "", "", "", figure(sgemm / 1e9), "100%"])
    return text_table(["", "images/s", "range", "ms", "range", "GFLOP/s", "of sgemm"], rows, right=range(1, 7))


def profile_table(profile: Profile) -> str:
    """Return a row for each operation, the slowest first, one for what is outside of them, and the sum."""
    from minivit.cli.report import text_table
    from minivit.study.profile import OpTimes

    def row(name: str, seconds: float, calls: str = "", forward: str = "", backward: str = "") -> list[str]:
        return [name, calls, forward, backward, f"{seconds * 1e3:.2f}", f"{seconds / profile.seconds:.1%}"]

    def op_row(name: str, times: OpTimes, seconds: float) -> list[str]:
        parts = [f"{sum(part) * 1e3:.2f}" for part in (times.forward, times.backward)]
        return row(name, seconds, f"{len(times.forward):,}", *parts)

    rows = [(times.total, op_row(name, times, times.total)) for name, times in profile.ops.items()]
    rows.append((profile.outside, row("outside operations", profile.outside)))
    rows.append((profile.update, row("optimizer's update", profile.update)))
    every = OpTimes(*[[x for t in profile.ops.values() for x in getattr(t, part)] for part in ("forward", "backward")])
    table = [cells for _, cells in sorted(rows, reverse=True)] + [op_row("total", every, profile.seconds)]
    return text_table(["operation", "calls", "forward ms", "backward ms", "ms", "share"], table, right=range(1, 6))


def figure(number: float) -> str:
    """Return a number with at least three digits: "0.120", "12.3", "1,234"."""
    return f"{number:,.0f}" if number >= 99.95 else f"{number:#.3g}"
