"""``minivit gradcheck``: prove the gradients of every operation, and that wrong ones are found, or those of a model."""

from __future__ import annotations

import argparse
import time
from typing import Any

from minivit.cli.bars import compiling_shown
from minivit.cli.main import number, one_of
from minivit.runs.options import OPTIONS

MOST_PARAMETERS = 20_000_000
DTYPES = OPTIONS["train.dtype"].choices[1:]  # all but auto


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", metavar="MODEL|CKPT|RUN", nargs="?",
                        help="named model, checkpoint or a run's folder (by default all operations)")  # fmt: skip
    parser.epilog = "What is a model's name is that model; a checkpoint of the same name is ./NAME."
    parser.add_argument(
        "--order", type=number(int, 1, 9), default=2, help="2 (default): also second derivatives; 3: third, too; …"
    )
    parser.add_argument(
        "--seed", type=number(int, 0, (1 << 63) - 1), default=0, help="seed of the random inputs and directions (0)"
    )
    parser.add_argument("--device", help="measure the twins there: cpu, cuda, cuda:1, …")
    parser.add_argument("--dtype", type=one_of("dtype", DTYPES), metavar="NAME",
                        help="measure the twins' errors in ulps of float32, tf32, bfloat16 or float16")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


@compiling_shown()
def run(args: argparse.Namespace) -> int:
    """Print a table, or JSON; 1 if a gradient is wrong, or a wrong one was not found."""
    if args.device is not None or args.dtype is not None:
        return check_twins(args.model, args.device or "auto", args.dtype, args.seed, args.json)
    if args.model is None:
        return check_operations(args.order, args.seed, args.json)
    from minivit.runs.trained import find_model

    return check_model(find_model(args.model), args.order, args.seed, args.json)


def check_operations(order: int, seed: int, as_json: bool = False) -> int:
    """Check every operation on its samples, and whether the check refuses its mutants."""
    from minivit.ops.samples import SAMPLES
    from minivit.show.text import json_text, row_format

    started = time.perf_counter()
    names = list(dict.fromkeys(sample.op for sample in SAMPLES))
    right = (1, *range(2, 2 + order), 3 + order)
    line = row_format([max(map(len, names)), 7, *[7] * order, 16, 14, 1], right)  # printed as they are found
    heads = [f"order {o}" for o in range(1, order + 1)]
    if not as_json:
        print(line.format("operation", "samples", *heads, "method", "mutants killed", ""))
    rows = []
    for name in names:
        row = check_operation(name, [sample for sample in SAMPLES if sample.op == name], order, seed)
        rows.append(row)
        if not as_json:
            cells = [*map(_error, row["errors"]), ", ".join(row["methods"]), f"{row['killed']}/{row['mutants']}"]
            print(line.format(name, row["samples"], *cells, "FAIL" if row["faults"] else "ok"), flush=True)
    faults = [fault for row in rows for fault in row["faults"]]
    worst = max((error for row in rows for error in row["errors"] if error is not None), default=0.0)
    if as_json:
        print(json_text({"operations": rows, "worst_error": worst}))
        return 1 if faults else 0
    for fault in faults:
        print(f"\nFAIL  {fault}")
    killed, mutants = (sum(row[key] for row in rows) for key in ("killed", "mutants"))
    print(
        f"\n{len(names)} ops, worst relative error {worst:.1e}, "
        f"mutants killed {killed:,}/{mutants:,} ({time.perf_counter() - started:.0f} s)"
    )
    return 1 if faults else 0


def check_operation(name: str, samples: list[Any], order: int, seed: int) -> dict[str, Any]:
    """Return what the checks of one operation found: worst error of each order, mutants, and ``faults`` as text."""
    import numpy as np

    from minivit.autograd.check import Check
    from minivit.autograd.mutate import SCALES, check_mutants, check_op
    from minivit.backend import Key
    from minivit.errors import MinivitError

    checks: list[Check] = []
    faults: list[str] = []
    killed = total = 0
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
    return {
        "operation": name,
        "samples": len(samples),
        "errors": [max((c.error for c in checks if c.order == o), default=None) for o in range(1, order + 1)],
        "methods": sorted({c.method for c in checks}, reverse=True),
        "killed": killed,
        "mutants": total,
        "faults": faults,
    }


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def check_twins(model: str | None, device: str, dtype: str | None, seed: int, as_json: bool = False) -> int:
    """Measure every twin on ``device`` against the plain operation in float64; 1 if one is farther off than allowed."""
    from minivit.backend import auto_device
    from minivit.errors import ConfigError
    from minivit.measure.ulps import measure_ulps, twins_on
    from minivit.runs.job import dtype_on
    from minivit.show.text import json_text, text_table

    if model is not None:
        what = f"--device and --dtype measure operations, not the model {model}"
        raise ConfigError(what, "leave the model out, or both of these: a model is checked in float64 on the CPU")
    where = auto_device(device)[0]
    dtype = dtype_on(where, dtype or "auto")[0]
    found = [measure_ulps(name, where, dtype, seed) for name in twins_on(where)]
    wrong = [one for one in found if not one.passed]
    if as_json:
        rows = [{**vars(one), "passed": one.passed} for one in found]
        print(json_text({"device": where, "dtype": dtype, "operations": rows}))
        return 1 if wrong else 0
    table = []
    for one in found:
        gradients = ", ".join(f"{name} {error:.2f}" for name, error in one.gradients.items())
        verdict = "ok" if one.passed else "FAIL"
        table.append([one.operation, one.ran, f"{one.output:.2f}", gradients, f"{one.allowed:g}", verdict])
    print(f"{where}, {dtype}: largest errors against float64 on the same rounded inputs, in ulps of {dtype} at the")
    print('largest value in a row; "plain": the twin has no kernel here, and the plain operation ran\n')
    print(text_table(["operation", "ran", "output", "gradients", "allowed", ""], table, right=(2, 4)))
    print(f"\n{len(found)} operations, {len(wrong)} farther off than allowed")
    return 1 if wrong else 0


def check_model(name: str, order: int, seed: int, as_json: bool = False) -> int:
    """Check the gradient of a model in each of its parameters, in float64, on two random images."""
    import numpy as np

    from minivit.autograd.check import check_module
    from minivit.backend import Key, normal
    from minivit.errors import ConfigError, printable
    from minivit.measure.costs import find_settings, open_model
    from minivit.models import count_parameters
    from minivit.show.text import json_text

    settings = find_settings(name)
    size = count_parameters(settings.kind, settings.config)
    if size > MOST_PARAMETERS:
        raise ConfigError(
            f"{name} has {size:,} parameters: checking it would take hours",
            "the same layers are in small models: check vit_digits, vit_mnist or vit_cifar",
        )
    model = open_model(name).to(np.float64).eval()
    for i, p in enumerate(model.parameters()):
        if not p.data.any():  # a fresh head of zeros would hide all that lies before it
            p.data[...] = 0.1 * normal(Key(seed, 1).child(i), p.shape)
    images = normal(Key(seed, 2), (2, *settings.image_shape))
    shape = " × ".join(map(str, settings.image_shape))
    if not as_json:
        print(printable(f"{name}: {size:,} parameters, float64, two random images {shape}") + "\n")
    started = time.perf_counter()
    report = check_module(model, images, order=order, seed=seed)
    seconds = time.perf_counter() - started
    worst = max(report.checks, key=lambda c: c.error)
    if as_json:
        checks = [{"parameter": c.name, "order": c.order, "error": c.error, "method": c.method} for c in report.checks]
        print(json_text({"model": name, "parameters": size, "worst_error": worst.error, "checks": checks}))
        return 0
    print(report_table(report, dict(model.named_parameters()), order))
    arrays = len(list(model.parameters()))
    print(f"\n{arrays} arrays of parameters, worst relative error {worst.error:.1e} ({worst.name}) ({seconds:.0f} s)")
    return 0


def report_table(report: Any, named: dict[str, Any], order: int) -> str:
    """Return a table with a row for each parameter: its shape and its errors by order."""
    from minivit.show.text import text_table

    rows = []
    for name in dict.fromkeys(check.name for check in report.checks):
        checks = {check.order: check for check in report.checks if check.name == name}
        shape = " × ".join(map(str, named[name].shape)) if name in named else ""
        errors = [_error(checks[o].error if o in checks else None) for o in range(1, order + 1)]
        rows.append([name, shape, *errors, ", ".join(dict.fromkeys(c.method for c in checks.values())), "ok"])
    head = ["parameter", "shape", *[f"order {o}" for o in range(1, order + 1)], "method", ""]
    return text_table(head, rows, right=range(2, 2 + order))
