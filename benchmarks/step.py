"""One training step's speed and memory: ``python benchmarks/step.py CONFIG [STEPS]`` prints img/s and rss_mb.

CONFIG is digits, cifar or ti16, as in the other steps that it is compared with (benchmarks/compare.py): AdamW, batches
of random images, the median of STEPS steps after three.
"""

import sys
import time

import numpy as np

import minivit as mv
from minivit.backend import normal, peak_memory, random_bits

CONFIGS = {  # batch, image, patch, dim, depth, heads
    "digits": (64, 8, 2, 64, 4, 4),
    "cifar": (128, 32, 4, 192, 6, 3),
    "ti16": (8, 224, 16, 192, 12, 3),
}
STEPS = {"digits": 60, "cifar": 7, "ti16": 7}


def main() -> None:
    name = sys.argv[1]
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS[name]
    batch, image, patch, dim, depth, heads = CONFIGS[name]
    model = mv.ViT(image_size=image, patch_size=patch, dim=dim, depth=depth, heads=heads, num_classes=10)
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.05))
    images = normal(mv.Key(0), (batch, 3, image, image)).astype(np.float32)
    labels = (random_bits(mv.Key(1), (batch,)) % 10).astype(np.int64)
    times = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        loss = step(images, labels)
        times.append(time.perf_counter() - start)
    median = sorted(times[3:])[steps // 2]
    print(f"minivit {name}: img/s {batch / median:.1f}  rss_mb {peak_memory() / 2**20:.0f}  loss {loss:.4f}")


if __name__ == "__main__":
    main()
