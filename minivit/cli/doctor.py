"""``minivit doctor``: what minivit runs on, and whether it works here."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

PARTS = ("numpy", "pillow", "tqdm", "threadpoolctl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a test fails."""
    from minivit.backend import cuda_status, total_memory
    from minivit.cli.report import bytes_text, json_text

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
    from minivit.models.zoo import create_model
    from minivit.train.optim import AdamW
    from minivit.train.step import TrainStep

    images, labels = next(iter(Loader(data.load("digits"), 64, Key(0)).batches(0)))
    model = create_model("vit_digits")
    step = TrainStep(model, AdamW(model.named_parameters(), lr=1e-3))
    losses = [step(images, labels) for _ in range(2)]
    if not losses[1] < losses[0]:
        raise NonFiniteError(f"the loss rose from {losses[0]:.4f} to {losses[1]:.4f}", "report this")
    return f"loss {losses[0]:.4f} → {losses[1]:.4f}"


# ---- what there is ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions of minivit and of what it stands on."""
    from minivit import __version__

    found = {"minivit": __version__, "python": platform.python_version()}
    for part in PARTS:
        try:
            found[part] = importlib.metadata.version(part)
        except importlib.metadata.PackageNotFoundError:
            found[part] = "not installed"
    cupy = [d for d in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if _installed(d)]
    found["cupy"] = importlib.metadata.version(cupy[0]) if cupy else "not installed"
    return found


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def system_text() -> str:
    """Return the operating system, its version and the kind of processor; ``platform.platform()`` would start uname."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cpu_text() -> str:
    """Return the processor's name, and how many of its cores this process may use."""
    from minivit.backend import cpu_cores
    from minivit.cli.report import plural

    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # no /proc
        pass
    return f"{name}, {plural(os.cpu_count() or 1, 'core')}, {cpu_cores()} usable here"


def blas_text() -> str:
    """Return which BLAS NumPy uses, for which processors it was tuned, and on how many threads."""
    import numpy  # noqa: F401 - its BLAS is then loaded
    import threadpoolctl

    from minivit.cli.report import plural

    found = [
        f"{lib['internal_api']} {lib.get('version') or '?'}, {lib.get('architecture', 'unknown')} kernels, "
        f"{plural(lib['num_threads'], 'thread')}"
        for lib in threadpoolctl.threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return "; ".join(found) or "unknown to threadpoolctl"


def gpu_text() -> str:
    """Return the first GPU's memory."""
    from minivit.backend import total_memory
    from minivit.cli.report import bytes_text

    return f"cuda:0 with {bytes_text(total_memory('cuda:0'))}"
