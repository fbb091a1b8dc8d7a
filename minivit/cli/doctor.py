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
    """Add nothing: the command takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the report; 1 if a test fails."""
    from minivit.backend import cuda_status, total_memory
    from minivit.cli.report import bytes_text

    for name, version in versions().items():
        print(f"{name:14}{version}")
    print(f"{'system':14}{system_text()}")
    print(f"{'cpu':14}{cpu_text()}")
    print(f"{'memory':14}{bytes_text(total_memory())}")
    print(f"{'blas':14}{blas_text()}")
    print(f"{'gpu':14}{cuda_status() or gpu_text()}\n")
    tests = {
        "gradient of attention": attention_gradient,
        "one training step on the digits": training_step,
    }
    passed = [_passes(name, test) for name, test in tests.items()]  # all of them, whatever the first gives
    return 0 if all(passed) else 1


def _passes(name: str, test: Callable[[], str]) -> bool:
    started = time.perf_counter()
    try:
        found = test()
    except Exception as error:  # whatever it is, the other tests should still run
        print(f"FAIL  {name}: {type(error).__name__}: {error}")
        return False
    print(f"ok    {name}: {found} ({time.perf_counter() - started:.2f} s)")
    return True


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
