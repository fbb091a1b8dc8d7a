"""``minivit gradcheck``: prove the gradients of every operation, and that wrong ones are found, or those of a model."""

from __future__ import annotations

import argparse
import time
from typing import Any

from minivit.cli.main import number

MOST_PARAMETERS = 20_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", nargs="?",
                        help="named model, checkpoint or a run's folder (by default all operations)")  # fmt: skip
    parser.add_argument(
        "--order", type=number(int), choices=(1, 2), default=2, help="2 (default): also second derivatives"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, (1 << 63) - 1), default=0, help="seed of the random inputs and directions (0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print a table; 1 if a gradient is wrong, or a wrong one was not found."""
    if args.model is None:
        return check_operations(args.order, args.seed)
    from minivit.cli.checkpoints import find_model

    return check_model(find_model(args.model), args.order, args.seed)


def check_operations(order: int, seed: int) -> int:
    """Check every operation on its samples, and whether the check refuses its mutants."""
    import numpy as np

    from minivit.autograd.check import Check
    from minivit.autograd.mutate import SCALES, check_mutants, check_op
    from minivit.backend import Key
    from minivit.cli.report import row_format
    from minivit.errors import MinivitError
    from minivit.ops.samples import SAMPLES

    started = time.perf_counter()
    names = list(dict.fromkeys(sample.op for sample in SAMPLES))
    orders = range(1, order + 1)
    right = (1, *range(2, 2 + order), 3 + order)
    line = row_format([max(map(len, names)), 7, *[7] * order, 16, 14, 1], right)  # printed as they are found
    print(line.format("operation", "samples", *[f"order {o}" for o in orders], "method", "mutants killed", ""))
    worst_of_all, killed_of_all, mutants_of_all = 0.0, 0, 0
    faults: list[str] = []
    for name in names:
        samples = [sample for sample in SAMPLES if sample.op == name]
        known_faults, killed, total = len(faults), 0, 0
        checks: list[Check] = []
        for sample in samples:
            arguments = sample.build(Key(seed))
            try:
                for scale in SCALES:
                    checks += check_op(sample.function, arguments, order, seed, scale).checks
            except MinivitError as error:
                faults.append(f"{sample}: {error}")
                continue  # the true gradient is not known: neither are its mutants
            with np.errstate(all="ignore"):  # a wrong gradient may well divide by zero
                scales = SCALES if sample is samples[0] else SCALES[:1]
                verdict = check_mutants(sample.function, arguments, seed, scales)
            killed, total = killed + verdict.killed, total + verdict.total
            faults += [f"{sample}: this wrong gradient was not found: {survivor}" for survivor in verdict.survivors]
        errors = [max((c.error for c in checks if c.order == o), default=None) for o in orders]
        methods = ", ".join(sorted({c.method for c in checks}, reverse=True))
        state = "ok" if len(faults) == known_faults else "FAIL"
        print(line.format(name, len(samples), *map(_error, errors), methods, f"{killed}/{total}", state), flush=True)
        worst_of_all = max([worst_of_all, *[c.error for c in checks]])
        killed_of_all, mutants_of_all = killed_of_all + killed, mutants_of_all + total
    for fault in faults:
        print(f"\nFAIL  {fault}")
    print(
        f"\n{len(names)} ops, worst relative error {worst_of_all:.1e}, "
        f"mutants killed {killed_of_all:,}/{mutants_of_all:,} ({time.perf_counter() - started:.0f} s)"
    )
    return 1 if faults else 0


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def check_model(name: str, order: int, seed: int) -> int:
    """Check the gradient of a model in each of its parameters, in float64, on two random images."""
    import numpy as np

    from minivit.autograd.check import check_module
    from minivit.backend import Key, normal
    from minivit.cli.layers import image_shape, model_config, open_model
    from minivit.errors import ConfigError, printable
    from minivit.models.zoo import count_parameters

    config = model_config(name)
    size = count_parameters(config)
    if size > MOST_PARAMETERS:
        raise ConfigError(
            f"{name} has {size:,} parameters: checking it would take hours",
            "the same layers are in small models: check vit_digits, vit_mnist or vit_cifar",
        )
    model = open_model(name).to(np.float64).eval()
    for i, p in enumerate(model.parameters()):
        if not p.data.any():  # a fresh head of zeros would hide all that lies before it
            p.data[...] = 0.1 * normal(Key(seed, 1).child(i), p.shape)
    images = normal(Key(seed, 2), (2, *image_shape(config)))
    shape = " × ".join(map(str, image_shape(config)))
    print(printable(f"{name}: {size:,} parameters, float64, two random images {shape}") + "\n")
    started = time.perf_counter()
    report = check_module(model, images, order=order, seed=seed)
    print(report_table(report, dict(model.named_parameters()), order))
    seconds = time.perf_counter() - started
    worst = max(report.checks, key=lambda c: c.error)
    arrays = len(list(model.parameters()))
    print(f"\n{arrays} arrays of parameters, worst relative error {worst.error:.1e} ({worst.name}) ({seconds:.0f} s)")
    return 0


def report_table(report: Any, named: dict[str, Any], order: int) -> str:
    """Return a table with a row for each parameter: its shape and its errors by order."""
    from minivit.cli.report import text_table

    rows = []
    for name in dict.fromkeys(check.name for check in report.checks):
        checks = {check.order: check for check in report.checks if check.name == name}
        shape = " × ".join(map(str, named[name].shape)) if name in named else ""
        errors = [_error(checks[o].error if o in checks else None) for o in range(1, order + 1)]
        rows.append([name, shape, *errors, ", ".join(dict.fromkeys(c.method for c in checks.values())), "ok"])
    head = ["parameter", "shape", *[f"order {o}" for o in range(1, order + 1)], "method", ""]
    return text_table(head, rows, right=range(2, 2 + order))
