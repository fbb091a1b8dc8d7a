"""A training step of minivit on a GPU: ``python benchmarks/gpu_step.py CONFIG DTYPE [--dry]``; a child of gpu.py.

``--dry`` runs a tiny step on the tests' stand-in for CuPy: it shows that the script works, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from configs import DTYPES, GPU_CONFIGS, TINY
from turns import ready, result, time_blocks

import minivit as mv
from minivit.backend import normal, random_bits, to_device
from minivit.backend.clock import wait_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", choices=GPU_CONFIGS)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.dry:
            from tests import strict

            stack.enter_context(strict.installed(kernels=False))
        measure = prepared(args.config, args.dtype, args.dry)
        ready()
        result(**measure())


def prepared(name: str, dtype: str, dry: bool = False) -> Callable[[], dict[str, Any]]:
    """Make a step and let it compile what it needs; return what measures it."""
    batch, image, patch, dim, depth, heads, steps = TINY if dry else GPU_CONFIGS[name]
    model = mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10).to("cuda")
    images = to_device(normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32), "cuda")
    labels = to_device((random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64), "cuda")
    opt = mv.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.05)
    step = mv.TrainStep(model, opt, precision=dtype)
    first = step(images, labels)
    for _ in range(3):
        step(images, labels)

    def measure() -> dict[str, Any]:
        for _ in range(4):  # what another process has done to the GPU's clock and caches meanwhile
            step(images, labels)
        # as PyTorch's: what a step came to is not asked for, so the GPU is waited for at a block's end alone
        times = time_blocks(lambda: step.submit(images, labels), lambda: wait_for("cuda"), steps)
        found: dict[str, Any] = {"seconds": times, "batch": batch, "losses": [first, step(images, labels)]}
        found |= {"nodes": next(iter(step.underway.capture.nodes().values()), None)}
        found |= {"why_launched": step.why_launched, "parameters": model.num_parameters()}
        return found | {"memory": pool_bytes() + step.underway.capture.memory()}

    return measure


def pool_bytes() -> int:
    """Return the bytes that CuPy's own pool has taken from the GPU, and not given back since."""
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


if __name__ == "__main__":
    main()
