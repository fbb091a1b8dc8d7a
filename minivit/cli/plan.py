"""``minivit plan``: time, memory, exchange and cost of a training run on many devices, predicted before it begins."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from minivit.cli.main import number, one_of
from minivit.runs.options import MANY

if TYPE_CHECKING:
    from minivit.measure.forecast import Run, Step
    from minivit.models import Model

DTYPES = ("bfloat16", "float16", "tf32", "float32")
MOST = 100_000  # devices
QUIET = 0.9  # of a core, with less of which what is measured is not what the machine can do


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "All of it is a prediction. Rates of a GPU are those of one H200, unless given; those of a core\n"
        "are measured here, in a few seconds. benchmarks/results/plan.md says how it was held against\n"
        "measurements, and shows 1 to 1,024 GPUs."
    )
    up_to: Any = lambda high: {"metavar": "X", "type": number(float, 1e-3, high)}  # more is a slip of the hand
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", help="named model, checkpoint, or a run's folder")
    parser.add_argument("--images", metavar="N", type=number(float, 1, 1e12), required=True,
                        help="training images: 1.2e6")  # fmt: skip
    parser.add_argument("--epochs", "-e", metavar="N", type=number(int, 1, MANY), required=True,
                        help="passes over them")  # fmt: skip
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--gpus", metavar="N", type=number(int, 1, MOST), help="on so many GPUs")
    kinds.add_argument("--workers", metavar="N", type=number(int, 1, MOST), help="on so many cores of one machine")
    kinds.add_argument("--ranks", metavar="N", type=number(int, 1, MOST),
                       help="on so many processes with a core each, on several machines")  # fmt: skip
    parser.add_argument("--batch-size", "-b", metavar="N", type=number(int, 1, 1 << 30),
                        help="images in a step, on all devices together (1,024; on CPUs 64)")  # fmt: skip
    parser.add_argument("--micro-batch", metavar="N", type=number(int, 1, 1 << 30),
                        help="images at once (all of a GPU's share; on CPUs what fits the cache)")  # fmt: skip
    parser.add_argument("--image-size", metavar="N", type=number(int, 1, 1 << 14), help="side of the images in pixels")
    parser.add_argument("--dtype", type=one_of("dtype", DTYPES), metavar="NAME", default="bfloat16",
                        help="numbers of a step on a GPU (bfloat16)")  # fmt: skip
    parser.add_argument("--price", **up_to(1e5), help="of one device for an hour")
    parser.add_argument("--rate-tflops", **up_to(1e6), help="TFLOP/s of a GPU's large matrix products (788)")
    parser.add_argument("--copy-gbps", **up_to(1e6), help="GB/s that a GPU's copy reads and writes (4,240)")
    parser.add_argument("--memory-gb", **up_to(1e5), help="GB of memory of a GPU (141)")
    parser.add_argument("--link-gbps", **up_to(1e6), help="Gbit/s out of each device (400; between ranks as here)")
    parser.add_argument("--latency-us", metavar="X", type=number(float, 0, 1e6),
                        help="microseconds of a message (10; between ranks as here)")  # fmt: skip
    parser.add_argument("--overlap", metavar="SHARE", type=number(float, 0, 1), default=0.0,
                        help="of the exchange, beside the backward pass, on GPUs (0)")  # fmt: skip
    parser.add_argument("--decode-rate", **up_to(1e7), help="images a second that come in for each device (no limit)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Predict, and print what was found."""
    from minivit.errors import ConfigError, printable
    from minivit.measure.costs import check_image, find_settings
    from minivit.measure.forecast import Run
    from minivit.models import model_outline, read_settings
    from minivit.runs.trained import find_model
    from minivit.show.text import json_text

    if args.images != int(args.images):
        raise ConfigError(f"--images {args.images:g} is no whole number", "images are counted")
    check_given(args)
    name = find_model(args.model)
    settings = find_settings(name)
    config = settings.config | ({} if args.image_size is None else {"image_size": args.image_size})
    check_image(name, read_settings(settings.kind, config))
    model = model_outline(settings.kind, config)
    step, memory, said = gpus(args, model) if args.gpus else processes(args, model)
    planned = Run(step, int(args.images), args.epochs, args.price)
    if args.json:
        about = {"model": name, "image": model.settings.image_shape, "parameters": model.num_parameters()}
        print(json_text(about | plan_json(planned, memory) | {"assumptions": said}))
        return 0
    size = " × ".join(map(str, model.settings.image_shape))
    print(printable(name) + f", {model.num_parameters():,} parameters, images of {size}\n")
    print(plan_table(planned, memory, "GPU" if args.gpus else "process") + "\n")
    print("A prediction, not a measurement. It takes for granted:")
    print("\n".join(f"- {line}" for line in said))
    return 0


def check_given(args: argparse.Namespace) -> None:
    """Raise ConfigError for rates that belong to other devices than those of the plan."""
    from minivit.errors import ConfigError

    on_gpus = ("rate_tflops", "copy_gbps", "memory_gb")
    if not args.gpus and (found := [flag(key) for key in on_gpus if vars(args)[key] is not None]):
        raise ConfigError(f"{', '.join(found)}: of GPUs, and the plan is for cores", "leave it out, or use --gpus")
    if not args.gpus and args.overlap:
        raise ConfigError("--overlap: processes exchange when all have ended their share", "leave it out")
    if args.workers and (args.link_gbps is not None or args.latency_us is not None):
        raise ConfigError("--link-gbps, --latency-us: workers of one machine share memory", "use --ranks for several")
    if args.gpus and args.dtype != "bfloat16" and args.rate_tflops is None:
        raise ConfigError(
            f"what a GPU reaches in {args.dtype} was not measured",
            f"give --rate-tflops, which minivit bench MODEL --device cuda --dtype {args.dtype} shows, or use bfloat16",
        )


def flag(key: str) -> str:
    """Return the flag of an argument."""
    return "--" + key.replace("_", "-")


# ---- on GPUs ---------------------------------------------------------------------------------------------------------


def gpus(args: argparse.Namespace, model: Model) -> tuple[Step, dict[str, int], list[str]]:
    """Return a step, the memory of a GPU, and what was taken for granted."""
    import math
    from dataclasses import replace

    from minivit.measure.forecast import FABRIC, H200, gpu_step, shares, work_of
    from minivit.measure.gpu_costs import gpu_step_memory

    batch = args.batch_size or 1024
    rates, link = H200, FABRIC
    if args.rate_tflops is not None:  # attention in proportion
        faster = args.rate_tflops * 1e12 / H200.product
        rates = replace(rates, product=args.rate_tflops * 1e12, attention=H200.attention * faster)
    if args.copy_gbps is not None:
        rates = replace(rates, copy=args.copy_gbps * 1e9)
    if args.link_gbps is not None:
        link = replace(link, bandwidth=args.link_gbps * 1e9 / 8)
    if args.latency_us is not None:
        link = replace(link, latency=args.latency_us * 1e-6)
    most = min(batch, args.micro_batch or batch)
    rows = min(shares(args.gpus, batch), most)
    fitting, data_rate = check_memory(args, model, rows, most), args.decode_rate or math.inf
    step = gpu_step(work_of(model), args.gpus, batch, args.dtype, rates, link, args.overlap, data_rate, fitting)
    memory = gpu_step_memory(model, rows, args.dtype)
    return step, memory, gpu_assumptions(args, model, step)


def check_memory(args: argparse.Namespace, model: Model, rows: int, most: int) -> int:
    """Return how many images, up to ``most``, fit on a GPU at once; raise ConfigError where ``rows`` do not."""
    from minivit.errors import ConfigError
    from minivit.measure.forecast import H200_MEMORY, largest_share
    from minivit.measure.gpu_costs import gpu_step_memory, kept_on_gpu
    from minivit.show.text import bytes_text, plural

    room = H200_MEMORY if args.memory_gb is None else args.memory_gb * 1e9
    kept = kept_on_gpu(model)
    needs = lambda images: sum(gpu_step_memory(model, images, args.dtype, kept).values())
    fitting = largest_share(needs, room, most)
    if fitting < rows:
        what = f"{plural(rows, 'image')} on a GPU take about {bytes_text(needs(rows))}, and it has {bytes_text(room)}"
        if not fitting:
            raise ConfigError(f"{what}; one takes {bytes_text(needs(1))}", "use a smaller model or smaller images")
        fits = f"--batch-size {fitting * args.gpus} would fit, or --micro-batch {fitting}: so many at once"
        raise ConfigError(what, fits)
    return fitting


def gpu_assumptions(args: argparse.Namespace, model: Model, step: Step) -> list[str]:
    """Return what a plan for GPUs takes for granted, in sentences."""
    given = args.rate_tflops is not None or args.copy_gbps is not None
    said = [
        f"Rates: {'as given; what was not is' if given else 'those'} of one NVIDIA H200, from captured steps of a "
        "prototype (see benchmarks/results/plan.md). minivit's own captured step has not been measured."
    ]
    width = model.config.get("dim")
    if not (isinstance(width, int) and 192 <= width <= 384 and args.dtype == "bfloat16" and not given):
        said.append(
            "Extrapolated: only ViTs of width 192 and 384, in bfloat16, were measured; of wider ones products are "
            "taken to reach the fastest rate that was seen, and the plan is rather too fast than too slow."
        )
    if step.devices > 1:
        source = lambda given: "assumed" if given is None else "given"
        said.append(
            f"Extrapolated: nothing was measured on more than one GPU. {args.link_gbps or 400:g} Gbit/s out of each "
            f"({source(args.link_gbps)}; NVLink in one machine does more), "
            f"{10 if args.latency_us is None else args.latency_us:g} µs a message ({source(args.latency_us)})."
        )
        hidden = "nothing of it passes during the backward pass"
        if args.overlap:
            hidden = f"{args.overlap:.0%} of it may pass during the backward pass"
        said.append(f"Gradients are exchanged in float32, once a step; {hidden}. All GPUs are equally fast.")
    return [*said, data_text(args, model, step), COUNTED]


COUNTED = "Only steps are counted: no evaluation, no checkpoints, no start, no time when devices are paid for and idle."


def data_text(args: argparse.Namespace, model: Model, step: Step) -> str:
    """Return what data a device takes in, and what a core of this machine decodes."""
    from minivit.cli.speeds import figure
    from minivit.measure.here import decoded_a_second

    channels, *size = model.settings.image_shape
    needed = figure(step.rate / step.devices)
    text = f"Data come in fast enough: {needed} images a second for each device."
    if args.decode_rate is not None:
        text = f"Data come in at {figure(args.decode_rate)} images a second for each device, as given."
    decoded = figure(decoded_a_second((size[0], size[1]), channels))
    return f"{text} One core here decodes {decoded} JPEG photos of 500 × 375 pixels a second."


# ---- on cores --------------------------------------------------------------------------------------------------------


def processes(args: argparse.Namespace, model: Model) -> tuple[Step, dict[str, int], list[str]]:
    """Return a step of workers or ranks, the memory of the first process, and what was taken for granted."""
    import math
    import time

    from minivit.backend import Team, cpu_cores, keep_freed_memory, total_memory
    from minivit.cli.speeds import figure
    from minivit.errors import ConfigError
    from minivit.measure.costs import model_costs, step_memory
    from minivit.measure.forecast import Link, cpu_step, shares
    from minivit.measure.here import measured_core, measured_machine
    from minivit.show.text import bytes_text
    from minivit.train.sharing import team_for

    count, batch, cores = args.workers or args.ranks, args.batch_size or 64, cpu_cores()
    rows = shares(count, batch)
    team = team_for(model, 1, args.micro_batch)
    at_once = lambda images: max(stop - start for start, stop in team.pieces(images))
    total = model_costs(model).total
    memory = step_memory(total, Team(1, at_once(rows)), rows)
    memory["buffers"] = 0  # with one thread the sum is the gradient
    all_of_it = sum(memory.values()) + (count - 1) * (memory["gradient"] + memory["kept"])
    here = count <= cores
    if (needed := all_of_it if here else sum(memory.values())) > (room := total_memory()):
        what = f"{'all together' if here else 'the first'} of {count:,} processes: about {bytes_text(needed)}"
        raise ConfigError(f"{what}, and this machine has {bytes_text(room)}", "use a smaller model or smaller images")
    kept = keep_freed_memory()
    try:
        began = time.perf_counter(), time.process_time()
        alone = measured_core(model, at_once(batch))
        core = alone if at_once(rows) == alone.rows else measured_core(model, at_once(rows))
        had = (time.process_time() - began[1]) / (
            time.perf_counter() - began[0]
        )  # of a core: all of it, if it is quiet
        image = 4 * math.prod(model.settings.image_shape)
        machine = measured_machine(model.num_parameters(), rows * image, min(count, cores))
    finally:
        if kept:
            keep_freed_memory(False)
    link = None
    if args.ranks:
        bandwidth = 1 / machine.sent if args.link_gbps is None else args.link_gbps * 1e9 / 8
        latency = machine.message / 2 if args.latency_us is None else args.latency_us * 1e-6
        link = Link(bandwidth, latency)
    step = cpu_step(model, count, batch, core, alone, machine, link, args.decode_rate or math.inf)
    about = [
        "Rates: measured here just now, each operation by itself: one core makes "
        f"{figure(core.flops / core.seconds / 1e9)} GFLOP/s of such a step."
    ]
    if had < QUIET:
        about.append(
            f"The machine is busy: only {had:.0%} of a core was left to measure with; the plan may be too slow."
        )
    return step, memory, about + core_assumptions(args, model, step, machine.shared)


def core_assumptions(args: argparse.Namespace, model: Model, step: Step, shared: float) -> list[str]:
    """Return what a plan for cores takes for granted, in sentences; ``shared`` is as measured."""
    from minivit.backend import cpu_cores
    from minivit.show.text import plural

    said = []
    if (cores := cpu_cores()) < step.devices:
        said.append(
            f"Extrapolated: this process may use {plural(cores, 'core')}; the others are like that, and do not wait "
            "for memory more than these."
        )
    if step.devices > 1:
        said.append(f"Cores that work side by side each have {shared:.0%} of the rate of one alone.")
        said.append("The first process hands out rows, adds up the gradients in float32 and updates; nothing overlaps.")
    if args.ranks and step.devices > 1 and (args.link_gbps is None or args.latency_us is None):
        said.append("Extrapolated: messages between ranks are as fast as between two processes here.")
    return [*said, data_text(args, model, step), COUNTED]


# ---- what is printed -------------------------------------------------------------------------------------------------


def plan_table(run: Run, memory: dict[str, int], device: str) -> str:
    """Return the plan's figures, one a line."""
    from minivit.cli.speeds import figure
    from minivit.show.text import bytes_text, plural

    step, ms = run.step, lambda seconds: f"{figure(1e3 * seconds)} ms"
    hidden = f", of which {ms(step.hidden)} beside the backward pass" if step.hidden else ""
    exchange = f"{ms(step.exchange)}{hidden}, {bytes_text(step.exchanged)}" if step.devices > 1 else "none"
    many = {"GPU": "GPUs", "process": "processes"}[device] if step.devices > 1 else device
    each = f", {-(-step.batch // step.devices):,} on each" if step.devices > 1 else ""
    lines = [
        (f"{step.devices:,} {many}, batch", plural(step.batch, "image") + each),
        ("steps", f"{run.steps:,}: {plural(run.images, 'image')}, {plural(run.epochs, 'epoch')}"),
        ("a step", ms(step.seconds)),
        ("  compute", f"{ms(step.compute.forward)} forward, {ms(step.compute.backward)} backward"),
        ("  update", ms(step.compute.update)),
        ("  exchange", exchange),
        ("  data", ms(step.data) + ", behind the step before" if step.data else "not counted"),
        ("images a second", figure(step.rate)),
        ("efficiency", f"{step.efficiency:.1%} of {step.devices:,} × {figure(step.best)}, the rate of one alone"),
        (f"memory of a {device}", "about " + bytes_text(sum(memory.values()))),
        ("time", hours_text(run.hours)),
        ("device hours", figure(run.hours * step.devices)),
    ]  # fmt: skip
    if run.cost is not None:
        lines.append(("cost", f"{run.cost:,.2f}, at {run.price:g} for each device and hour"))
    return "\n".join(f"{name:20}{text}" for name, text in lines)


def hours_text(hours: float) -> str:
    """Return a time for people: "35 s", "12 min", "3.4 h", "12.1 days"."""
    for unit, size, most in (("s", 3600, 1 / 30), ("min", 60, 2), ("h", 1, 72)):
        if hours < most:
            return f"{hours * size:.3g} {unit}"
    return f"{hours / 24:,.1f} days"


def plan_json(run: Run, memory: dict[str, int]) -> dict[str, Any]:
    """Return the plan as what JSON can hold: seconds, bytes, images a second."""
    step = run.step
    return {
        "devices": step.devices, "batch_size": step.batch, "images": run.images, "epochs": run.epochs,
        "steps": run.steps,
        "step": {
            "seconds": step.seconds, "forward": step.compute.forward, "backward": step.compute.backward,
            "update": step.compute.update, "exchange": step.exchange, "hidden": step.hidden, "data": step.data,
            "bytes_exchanged": step.exchanged,
        },
        "images_per_second": step.rate, "efficiency": step.efficiency, "memory": memory | {"all": sum(memory.values())},
        "hours": run.hours, "device_hours": run.hours * step.devices, "cost": run.cost,
    }  # fmt: skip
