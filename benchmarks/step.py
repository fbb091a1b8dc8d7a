"""The speed and memory of minivit's training step: ``python benchmarks/step.py CONFIG`` (digits, cifar or ti16)."""

import sys
import time

import numpy as np
from configs import CONFIGS, STEPS, report

import minivit as mv
from minivit.backend import normal, peak_memory, random_bits


def main() -> None:
    config = sys.argv[1]
    batch, image, patch, dim, depth, heads = CONFIGS[config]
    model = mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10)
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.05))
    images = normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32)
    labels = (random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64)
    times = []
    for _ in range(3 + STEPS[config]):
        start = time.perf_counter()
        step(images, labels)
        times.append(time.perf_counter() - start)
    report("minivit", config, times, peak_memory())


if __name__ == "__main__":
    main()
