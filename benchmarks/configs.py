"""What is compared, and what every measuring script prints; it is imported by Pythons that do not have minivit."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple


class Config(NamedTuple):
    """A batch of square RGB images, the ViT with ten classes that they are given to, and how many steps are timed."""

    batch: int
    image: int
    patch: int
    dim: int
    depth: int
    heads: int
    steps: int


CONFIGS = {
    "digits": Config(batch=64, image=8, patch=2, dim=64, depth=4, heads=4, steps=60),
    "cifar": Config(batch=128, image=32, patch=4, dim=192, depth=6, heads=3, steps=7),
    "ti16": Config(batch=8, image=224, patch=16, dim=192, depth=12, heads=3, steps=7),
}

GPU_CONFIGS = {
    "ti4-1024": Config(batch=1024, image=32, patch=4, dim=192, depth=12, heads=3, steps=20),
    "s16-256": Config(batch=256, image=224, patch=16, dim=384, depth=12, heads=6, steps=20),
    "ti4-128": Config(batch=128, image=32, patch=4, dim=192, depth=12, heads=3, steps=40),
    "digits": CONFIGS["digits"],
    "cifar": CONFIGS["cifar"]._replace(steps=40),
}
"""What is compared on a GPU, the most important first."""

TINY = Config(batch=4, image=8, patch=4, dim=32, depth=1, heads=2, steps=2)
"""What runs dry."""

DTYPES = ("bfloat16", "tf32", "float32")


def arguments(description: str, **choices: list[str]) -> tuple[Config, str, argparse.Namespace]:
    """Read the command line CONFIG [train|infer] and a word of each of ``choices``, whose first is the default.

    Return the configuration, its name for the report, and all that was read. Inference has twice the batch.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", choices=CONFIGS)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes of a training step of minivit's")
    for name, words in {"mode": ["train", "infer"], **choices}.items():
        parser.add_argument(name, nargs="?", choices=words, default=words[0])
    args = parser.parse_args()
    config = CONFIGS[args.config]
    return config._replace(batch=config.batch * (1 + (args.mode == "infer"))), f"{args.config} {args.mode}", args


def time_steps(step: Callable[..., Any], images: Any, labels: Any, steps: int, warmup: int = 3) -> list[float]:
    """Time steps as minivit.measure.speed.time_steps does, which the peers' Python may not have."""
    times = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
    return times[warmup:]


def report(name: str, config: Config, times: list[float], losses: list[float], peak_bytes: int) -> None:
    """Print the median speed and the peak memory in the form that is compared; that a step trains, its losses show."""
    trained = f"  loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    speed = config.batch / statistics.median(times)
    print(f"{name}: img/s {speed:.1f}  rss_mb {peak_bytes / 2**20:.0f}{trained}")
