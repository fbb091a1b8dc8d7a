"""``minivit bench`` on a GPU: a captured step and a launched one beside the GPU's ceilings, and a step by kernel."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from minivit.cli.speeds import FEWEST, MOST, SECONDS, figure, random_batch, speed_table, speeds

if TYPE_CHECKING:
    from minivit.measure.gpu_profile import GpuProfile
    from minivit.measure.gpu_speed import Ceilings
    from minivit.train.step import TrainStep


SMALL = 0.002  # share of a step below which a kernel has no row of its own


def run_on_gpu(args: argparse.Namespace, device: str) -> int:
    """Measure a training step on ``device``, and print what was found."""
    from minivit.backend import to_device
    from minivit.errors import printable
    from minivit.measure.costs import find_settings
    from minivit.measure.gpu_costs import gpu_memory
    from minivit.measure.gpu_profile import profile_on_gpu
    from minivit.measure.gpu_speed import gpu_ceilings
    from minivit.measure.speed import step_flops
    from minivit.models import build, model_outline
    from minivit.runs.job import dtype_on
    from minivit.runs.trained import find_model
    from minivit.show.text import json_text, plural
    from minivit.train.optim import AdamW
    from minivit.train.step import TrainStep

    say: Any = (lambda text: None) if args.json else partial(print, flush=True)
    (dtype, why), batch, name = dtype_on(device, args.dtype), args.batch_size, find_model(args.model)
    settings = find_settings(name)
    outlined, size = model_outline(settings.kind, settings.config), " × ".join(map(str, settings.image_shape))
    say(printable(name) + f", {outlined.num_parameters():,} parameters, images of {size}")
    say(f"{device}, {dtype}" + (f" ({why})" if why else "") + f", batches of {plural(batch, 'image')}\n")

    model = build(settings.kind, settings.config).to(device)
    images, labels = (to_device(x, device) for x in random_batch(model, batch))
    opt = AdamW(model.named_parameters(), lr=1e-4)
    step = TrainStep(model, opt, micro_batch=args.micro_batch or None, precision=dtype)
    times, about = step_times(step, images, labels, args.steps)
    about |= {"predicted_memory": gpu_memory(outlined, min(batch, args.micro_batch or batch), dtype)}
    work, ceilings = dict.fromkeys(times, step_flops(outlined, batch)), gpu_ceilings(device, dtype)
    say(speed_table(times, batch, work, ceilings.product, "products"))
    say("\n" + notes(times, about, ceilings, dtype))
    profile = None
    if args.profile:
        captured = next(iter(times.values()))
        profile = profile_on_gpu(step, images, labels, ceilings.copy)
        say(f"\n{kernel_table(profile, ceilings)}\n\n{gap_text(profile, sorted(captured)[len(captured) // 2])}")
    if args.json:
        found = {"model": name, "parameters": model.num_parameters(), "image": settings.image_shape, "device": device}
        found |= {"dtype": dtype, "batch_size": batch, "speed": speeds(times, batch, work), **about}
        found |= {"copy_bytes_per_second": ceilings.copy, "product_flops_per_second": ceilings.product}
        print(json_text(found | ({"profile": kernel_rows(profile, ceilings)} if profile else {})))
    return 0


def step_times(step: TrainStep, images: Any, labels: Any, given: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the seconds of steps, captured and launched, and what there is to say of them."""
    from minivit.backend import available_memory, total_memory
    from minivit.measure.gpu_speed import time_launched, time_submitted

    assert step.underway is not None
    first = min(time_submitted(step, images, labels, 2))
    steps = given or min(max(round(SECONDS / max(first, 1e-6)), FEWEST), MOST)
    times = {"captured step": time_submitted(step, images, labels, steps, warmup=1)}
    times["launched step"] = time_launched(step, images, labels, min(steps, 2 * FEWEST))
    device = step.team.device
    return times, {
        "nodes": next(iter(step.underway.capture.nodes().values()), None),
        "not_captured": step.why_launched,
        "memory": total_memory(device) - available_memory(device),
    }


def notes(times: dict[str, Any], about: dict[str, Any], ceilings: Ceilings, dtype: str) -> str:
    """Return what the table of speeds does not say."""
    from minivit.show.text import bytes_text, plural

    count, few = (len(seconds) for seconds in times.values())
    nodes = f"It has {about['nodes']} nodes"
    if about["not_captured"]:
        nodes = f"It is not captured after all: {about['not_captured']}"
    used, predicted = bytes_text(about["memory"]), bytes_text(about["predicted_memory"])
    return "\n".join([
        f"Medians of {plural(count, 'captured step')} and {few} launched; each range holds the middle half of them.",
        "A captured step is handed in before the last one has ended, as in training; a launched one is waited for.",
        f"{nodes}; {used} of the GPU's memory are in use, {predicted} were predicted.",
        f"products: square ones in {dtype}, the best of several; a copy moves {figure(ceilings.copy / 1e9)} GB/s.",
    ])  # fmt: skip


def kernel_rows(profile: GpuProfile, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Return the rows of :func:`kernel_table`, times in seconds; None where a figure is not known."""
    rows = []
    for name, spent in profile.kernels.items():
        rate = lambda amount, seconds=spent.seconds: amount / seconds if amount and seconds else None
        moved, made = rate(spent.bytes), rate(spent.flops)
        row: dict[str, Any] = {"kernel": name, "launches": spent.launches, "seconds": spent.seconds}
        row |= {"share": spent.seconds / profile.seconds if profile.seconds else 0.0}
        row |= {"bytes_per_second": moved, "of_copy": moved and moved / ceilings.copy}
        rows.append(row | {"flops_per_second": made, "of_products": made and made / ceilings.product})
    return rows


def kernel_table(profile: GpuProfile, ceilings: Ceilings) -> str:
    """Return a row for each kernel, the slowest first, and their sum."""
    from minivit.show.text import text_table

    def shown(value: float | None, unit: float) -> str:
        return "" if value is None else figure(value / unit)

    def percent(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    table, small = [], []
    for row in kernel_rows(profile, ceilings):
        if row["share"] < SMALL:
            small.append(row)
            continue
        cells = [row["kernel"], f"{row['launches']:,}", f"{1e3 * row['seconds']:.3f}", f"{row['share']:.1%}"]
        cells += [shown(row["bytes_per_second"], 1e9), percent(row["of_copy"])]
        table.append([*cells, shown(row["flops_per_second"], 1e12), percent(row["of_products"])])
    if small:
        launches, seconds, share = (sum(row[key] for row in small) for key in ("launches", "seconds", "share"))
        name = f"{len(small)} others"
        table.append([name, f"{launches:,}", f"{1e3 * seconds:.3f}", f"{share:.1%}", *[""] * 4])
    heads = ["kernel", "launches", "ms", "share", "GB/s", "of copy", "TFLOP/s", "of products"]
    return text_table(heads, table, right=range(1, 8))


def gap_text(profile: GpuProfile, captured: float) -> str:
    """Return what is left between the kernels, and how all this was measured; ``captured`` are seconds of a step."""
    kernels = profile.seconds - profile.outside
    all_kernels, launched, outside, whole, gaps = (
        f"{1e3 * x:.3f} ms" for x in (kernels, profile.seconds, profile.outside, captured, captured - kernels)
    )
    return "\n".join([
        f"All kernels: {all_kernels}. The launched step: {launched} on the GPU, of which {outside} in none of them.",
        f"The captured step: {whole}, so {gaps} between its kernels.",
        "Measured by events around each launch of a step from Python, queued behind copies, so that the GPU never",
        "waits for it. An event takes about a microsecond, which counts to its kernel: gaps may come out below 0.",
        "Bytes are those of a kernel's arguments, each read or written once.",
        "What is called CuPy's kernels is what an operation launches besides those that have a row.",
    ])  # fmt: skip
