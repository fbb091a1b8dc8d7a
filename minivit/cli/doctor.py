"""``minivit doctor``: what minivit runs on, and whether it works here."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a test fails."""
    from minivit.backend import cuda_status, total_memory
    from minivit.measure.machine import blas_text, cpu_text, gpu_text, system_text, versions
    from minivit.show.text import bytes_text, json_text

    memory = total_memory()
    found: dict[str, object] = {**versions(), "system": system_text(), "cpu": cpu_text()}
    found |= {"memory": bytes_text(memory), "blas": blas_text(), "gpu": cuda_status() or gpu_text()}
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
