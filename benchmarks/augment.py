"""How many images a second one core augments: what a loader yields, mixed and standardised, under each augmentation.

    python benchmarks/augment.py [--size PIXELS] [--batch N] [--images N] [--repeats N]

Images are RGB, their bytes random. Time is the process's own, on one thread, so that a busy machine counts little; the
best of the repeats is shown.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from minivit.backend import Key, keep_freed_memory, random_bits
from minivit.data.augment import Affine, Augment, Chain, Crop, Flip, RandomErasing, RandomResizedCrop
from minivit.data.colour import ColorJitter
from minivit.data.dataset import Dataset
from minivit.data.loader import Loader
from minivit.data.mixing import Mix
from minivit.data.randaugment import RandAugment

CROP_AND_FLIP = (Crop(4), Flip())
KINDS: dict[str, tuple[Augment | None, Mix | None]] = {
    "none": (None, None),
    "crop + flip": (Chain(CROP_AND_FLIP), None),
    "random resized crop": (RandomResizedCrop(), None),
    "affine": (Affine(), None),
    "colour jitter": (ColorJitter(), None),
    "RandAugment": (RandAugment(), None),
    "random erasing": (RandomErasing(), None),
    "mixup, cutmix": (None, Mix()),
    "crop + flip + RandAugment + erasing + mixup, cutmix": (
        Chain((*CROP_AND_FLIP, RandAugment(), RandomErasing())),
        Mix(),
    ),
}


def measure(dataset: Dataset, batch: int, augment: Augment | None, mix: Mix | None, repeats: int) -> float:
    """Return images a second of CPU time."""
    loader = Loader(dataset, batch, Key(1), augment, mix, mean=(0.5,) * 3, std=(0.25,) * 3)
    times = []
    for epoch in range(repeats):
        start = time.process_time()
        for _ in loader.batches(epoch):
            pass
        times.append(time.process_time() - start)
    return len(dataset) / max(min(times), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, help="in an epoch; as many numbers as 8,192 images of 32 × 32 have")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    count = args.images or max(args.batch, 8192 * 32**2 // args.size**2)
    pixels = (random_bits(Key(0), (count, 3, args.size, args.size)) >> 24).astype(np.uint8)
    dataset = Dataset(pixels, np.arange(count) % 10, tuple("abcdefghij"), "random")
    keep_freed_memory()
    print(f"RGB {args.size} × {args.size}, batches of {args.batch}, one core, NumPy {np.__version__}\n")
    print("| augmentation | images/s |\n|---|---|")
    for name, (augment, mix) in KINDS.items():
        print(f"| {name} | {measure(dataset, args.batch, augment, mix, args.repeats):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
