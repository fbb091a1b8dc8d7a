"""The speed and memory of minivit: ``python benchmarks/step.py CONFIG [train|infer]`` (digits, cifar or ti16).

``--device cuda`` measures on a GPU, where the memory is what the device holds for the step. ``--workers N`` has so many
processes share a training step; their memory is the sum of their proportional set sizes after the last one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from configs import arguments, report

import minivit as mv
from minivit.backend import keep_freed_memory, normal, peak_memory, random_bits, to_device
from minivit.measure.speed import time_steps


def main() -> None:
    config, name, args = arguments(__doc__)
    keep_freed_memory()
    batch, image, patch, dim, depth, heads, steps = config
    model = mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10).to(
        args.device
    )
    images = to_device(normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32), args.device)
    labels = (random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64)
    losses: list[float] = []
    step: Callable[[Any, Any], Any]
    if args.mode == "train":
        opt = mv.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.05)
        train = mv.TrainStep(model, opt, workers=args.workers)
        step = lambda images, labels: losses.append(train(images, labels))
    else:
        step = lambda images, labels: mv.predict_logits(model, images)
    times = time_steps(step, images, labels, steps)
    memory = peak_memory() if args.device == "cpu" else pool_size()
    if args.mode == "train" and args.workers > 1:
        assert train.crew.workers is not None
        memory = sum(map(share_of_memory, [os.getpid(), *(f.process.pid for f in train.crew.workers.followers)]))
        train.crew.close()
    report(f"minivit {name}", config, times, losses, memory)


def share_of_memory(pid: int) -> int:
    """Return a process's proportional set size in bytes: of what several share, each has its part."""
    (kibibytes,) = re.findall(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return 1024 * int(kibibytes)


def pool_size() -> int:
    """Return the bytes that CuPy's pool has taken from the GPU, and not given back since."""
    import cupy

    return int(cupy.get_default_memory_pool().total_bytes())


if __name__ == "__main__":
    main()
