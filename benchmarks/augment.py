"""How many images a second are augmented: what a loader yields, mixed and standardised, under each augmentation.

    python benchmarks/augment.py [--device cuda] [--size PIXELS] [--batch N] [--images N] [--repeats N]

Images are RGB, their bytes random. On the CPU one core works, and time is the process's own, so that a busy machine
counts little. On a GPU time is the clock's, from the first batch's order to the end of all work; ``--gpu-memory 0``
shows what a set too large for the GPU comes to. The best of the repeats is shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np

from minivit.backend import Key, keep_freed_memory, random_bits, resolve_device
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


def measure(loader: Loader, repeats: int, clock: Callable[[], float]) -> float:
    """Return images a second, by a clock in seconds."""
    times = []
    for epoch in range(repeats):
        start = clock()
        for _ in loader.batches(epoch):
            pass
        times.append(clock() - start)
    return len(loader.dataset) / max(min(times), 1e-9)


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """Return what is measured on, and the clock to measure with."""
    if device == "cpu":
        return f"one core, NumPy {np.__version__}", time.process_time
    import cupy

    gpu = cupy.cuda.Device(int(device.removeprefix("cuda:")))

    def clock() -> float:
        gpu.synchronize()
        return time.perf_counter()

    with gpu:
        name = cupy.cuda.runtime.getDeviceProperties(gpu.id)["name"].decode()
    return f"{name}, CuPy {cupy.__version__}", clock


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--size", type=int, default=32, help="height and width")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--images", type=int, help="in an epoch; as many numbers as 8,192 (on a GPU 65,536) images of 32 × 32 have"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu-memory", type=int, metavar="BYTES", help="for the images on the GPU")
    args = parser.parse_args(words)
    device = resolve_device(args.device)
    usual = 8192 if device == "cpu" else 65536
    count = args.images or max(args.batch, usual * 32**2 // args.size**2)
    pixels = (random_bits(Key(0), (count, 3, args.size, args.size)) >> 24).astype(np.uint8)
    dataset = Dataset(pixels, np.arange(count) % 10, tuple("abcdefghij"), "random")
    keep_freed_memory()
    where, clock = clock_of(device)
    print(f"RGB {args.size} × {args.size}, batches of {args.batch}, {where}\n")
    print("| augmentation | images/s |\n|---|---|")
    for name, (augment, mix) in KINDS.items():
        moments = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        loader = Loader(dataset, args.batch, Key(1), augment, mix, **moments, device=device, gpu_memory=args.gpu_memory)
        repeats = args.repeats + (device != "cpu")  # the first epoch compiles
        print(f"| {name} | {measure(loader, repeats, clock):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
