"""``minivit doctor``: what minivit runs on, and whether it works here; kernels compiled for a GPU that is elsewhere."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minivit.cli.main import one_of

if TYPE_CHECKING:
    from minivit.backend.compiling import Plan

PRECISIONS = ("bfloat16", "float16", "tf32", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "--build-kernels needs no GPU: copied to a machine that has one, the folder of compiled\n"
        "kernels works there without a compiler."
    )
    parser.add_argument("--build-kernels", nargs="+", metavar="ARCH",
                        help="compile the kernels of training for GPUs: sm_90 is the H100's and H200's")  # fmt: skip
    parser.add_argument("--for", dest="models", nargs="+", metavar="MODEL|RECIPE|CKPT|RUN",
                        help="whose kernels (those of all recipes)")  # fmt: skip
    parser.add_argument("--dtype", type=one_of("dtype", PRECISIONS), default="bfloat16",
                        help="what training computes in: bfloat16, float16, tf32 or float32 (bfloat16)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a test fails, or a kernel cannot be compiled."""
    if args.build_kernels:
        return build_kernels(args)
    if args.models:
        from minivit.errors import ConfigError

        raise ConfigError("--for without --build-kernels", "say for which GPUs: --build-kernels sm_90")
    from minivit.backend import cuda_status, total_memory
    from minivit.measure.machine import blas_text, cpu_text, gpu_text, kernels_text, system_text, versions
    from minivit.show.text import bytes_text, json_text

    memory = total_memory()
    found: dict[str, object] = {**versions(), "system": system_text(), "cpu": cpu_text()}
    found |= {"memory": bytes_text(memory), "blas": blas_text(), "gpu": cuda_status() or gpu_text()}
    found["kernels"] = kernels_text()
    if not args.json:
        print("".join(f"{name:14}{text}\n" for name, text in found.items()))
    tests = {
        "gradient of attention": attention_gradient,
        "one training step on the digits": training_step,
    }
    results = []
    for name, test in tests.items():  # all of them, whatever the first gives
        started = time.perf_counter()
        ok, said = _try(test)
        results.append({"test": name, "ok": ok, "said": said, "seconds": time.perf_counter() - started})
        if not args.json:
            print(f"ok    {name}: {said} ({results[-1]['seconds']:.2f} s)" if ok else f"FAIL  {name}: {said}")
    if args.json:
        print(json_text(found | {"memory": memory, "tests": results}))
    return 0 if all(result["ok"] for result in results) else 1


def _try(test: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, test()
    except Exception as error:  # whatever it is, the other tests should still run
        return False, f"{type(error).__name__}: {error}"


# ---- kernels ---------------------------------------------------------------------------------------------------------


def build_kernels(args: argparse.Namespace) -> int:
    """Fill the cache of compiled kernels, and print what became of them; 1 if one cannot be compiled."""
    from minivit.backend import compiling, cubins
    from minivit.cli.bars import compiling_bar
    from minivit.errors import KernelError, unknown_name
    from minivit.runs.recipes import recipes_with_models
    from minivit.show.text import json_text, plural

    for arch in args.build_kernels:
        if arch not in compiling.ARCHITECTURES:
            raise unknown_name("GPU architecture", arch, compiling.ARCHITECTURES)
    if not compiling.compiler()[1]:
        raise KernelError("the compiler of kernels is not installed", compiling.REMEDY)
    names = args.models or recipes_with_models()
    plans = planned_kernels(names, args.dtype)
    rows = []
    for arch in args.build_kernels:
        started = time.perf_counter()
        with compiling_bar(len(plans), f"for {arch}") as bar:
            built, cached, failed = cubins.build(plans, arch, lambda plan, how, error: bar.update())
        row = {"arch": arch, "built": built, "cached": cached, "failed": [str(error) for error in failed]}
        rows.append(row | {"seconds": time.perf_counter() - started, "folder": str(cubins.folder() / arch)})
        if not args.json:
            counts = f"{plural(built, 'kernel')} compiled, {cached:,} were there, {len(failed):,} failed"
            print(f"{arch}: {counts} ({rows[-1]['seconds']:.1f} s), in {rows[-1]['folder']}")
            for error in failed:
                print(f"minivit: error: {error}", file=sys.stderr)
    if args.json:
        print(json_text({"models": list(names), "dtype": args.dtype, "kernels": len(plans), "built": rows}))
    return 1 if any(row["failed"] for row in rows) else 0


def planned_kernels(names: Sequence[str], dtype: str) -> list[Plan]:
    """Return the kernels of training steps of models, recipes' models or checkpoints, for batches of any size."""
    from minivit.measure.costs import find_settings
    from minivit.measure.kernels import kernels_of
    from minivit.runs.recipes import is_recipe, recipe_model
    from minivit.runs.trained import find_model

    plans: dict[Any, int] = {}
    for name in names:
        if is_recipe(name):
            given = recipe_model(name)
        else:
            settings = find_settings(find_model(name))
            given = settings.kind, settings.config
        plans |= kernels_of(*given, dtype)
    return list(plans)


# ---- tests -----------------------------------------------------------------------------------------------------------


def attention_gradient() -> str:
    """Check the gradient of attention to the second order; return how well it fits."""
    from minivit import ops
    from minivit.autograd.check import check_grads
    from minivit.backend import Key, normal

    arrays = [normal(Key(0, i), (2, 2, 5, 4)) for i in range(3)]
    return f"relative error at most {check_grads(ops.attention, arrays).worst.error:.1e}"


def training_step() -> str:
    """Take two training steps on one batch of digits; return how the loss falls."""
    from minivit import data
    from minivit.backend import Key
    from minivit.data import Loader
    from minivit.errors import NonFiniteError
    from minivit.models import create_model
    from minivit.train.optim import AdamW
    from minivit.train.step import TrainStep

    images, labels = next(iter(Loader(data.load("digits"), 64, Key(0)).batches(0)))
    model = create_model("vit_digits")
    step = TrainStep(model, AdamW(model.named_parameters(), lr=1e-3))
    losses = [step(images, labels) for _ in range(2)]
    if not losses[1] < losses[0]:
        raise NonFiniteError(f"the loss rose from {losses[0]:.4f} to {losses[1]:.4f}", "report this")
    return f"loss {losses[0]:.4f} → {losses[1]:.4f}"
