"""Pre-train on small images, then fine-tune on larger ones and, for comparison, on the small ones: equal epochs.

    python 12_fine_tune_at_a_higher_resolution.py [DATA] [--side 8] [--patch 2] [--seeds 1] [--keep-patch]

The small images are means of 2 × 2 pixels of the large ones: of the digits 4 × 4 pixels of 8 × 8. `model.resize` gives
the model larger images; here its patches grow with them, by the pseudo-inverse of a resizing (FlexiViT, Beyer et al.
2023, section 3.4), so that it says at first of an enlarged image what it said of the small one, and then learns to see
more in as many tokens. With --keep-patch patches stay as they are and become more (Dosovitskiy et al. 2020, section
3.2): there is more to learn, and on the digits it takes about 20 epochs (--epochs 6 20) to gain anything.
"""

import argparse
import copy
from statistics import median

import numpy as np

import minivit as mv

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data", nargs="?", default="digits", help="a name, folder of photos or .npz with test images")
parser.add_argument("--side", type=int, default=8, help="of the large images: of a folder any, of others their own")
parser.add_argument("--patch", type=int, default=2, help="of the small images")
parser.add_argument("--seeds", type=int, default=1)
parser.add_argument("--keep-patch", action="store_true")
parser.add_argument("--epochs", type=int, nargs=2, default=(6, 3), help="of pre-training, of fine-tuning")
args = parser.parse_args()


def small(data: mv.data.Dataset) -> mv.data.Dataset:
    """Return a data set of the means of 2 × 2 pixels."""
    n, c, h, w = data.images.shape
    means = data.images[np.arange(n)].reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)).round()
    return mv.data.Dataset(means.astype(np.uint8), data.labels, data.classes, "small")


def train(model: mv.ViT, data: mv.data.Dataset, epochs: int, lr: float, key: mv.Key) -> None:
    opt = mv.optim.AdamW(model.named_parameters(), lr=lr, weight_decay=0.05)
    step, loader = mv.TrainStep(model, opt, clip_norm=1.0), mv.data.Loader(data, 64, key=key)
    schedule = mv.optim.warmup_cosine(lr, total_steps=epochs * len(loader), warmup_steps=len(loader))
    for epoch in range(epochs):
        for images, labels in loader.batches(epoch):
            opt.lr = schedule(opt.steps)
            step(images, labels)


def accuracy(model: mv.ViT, data: mv.data.Dataset, of: mv.data.Dataset) -> float:
    images = mv.data.standardize(data.images[np.arange(len(data))], of.mean, of.std)
    return float((mv.predict_logits(model, images).argmax(axis=1) == data.labels).mean())


large, large_test = (mv.data.load(args.data, split, (args.side, args.side)) for split in ("train", "test"))
few, few_test = small(large), small(large_test)
_, channels, side, _ = few.images.shape
rows = []
print(f"test accuracy on {len(large_test):,} images of {args.data} that nothing was trained on\n")
print(f"seed   pre-trained at {side}   fine-tuned at {side}   fine-tuned at {2 * side}")
for seed in range(args.seeds):
    model = mv.ViT(side, args.patch, channels, len(few.classes), dim=48, depth=2, heads=3, seed=seed)
    train(model, few, args.epochs[0], 2e-3, mv.Key(seed))
    row, same = [accuracy(model, few_test, few)], copy.deepcopy(model)
    train(same, few, args.epochs[1], 1e-3, mv.Key(1000 + seed))
    model.resize(2 * side, None if args.keep_patch else 2 * args.patch)
    train(model, large, args.epochs[1], 1e-3, mv.Key(1000 + seed))
    rows.append([*row, accuracy(same, few_test, few), accuracy(model, large_test, large)])
    print(f"{seed:4}" + "".join(f"{x:18.2%}" for x in rows[-1]), flush=True)
gains = [high - old for _, old, high in rows]
points = [f"{100 * gain:+.2f}" for gain in (median(gains), min(gains), max(gains))]
print(
    "\nthe larger images gain {} points, the median of {} seeds ({} to {}),".format(points[0], len(rows), *points[1:])
)
print(f"in {args.epochs[1]} epochs, as many as the others had")
assert args.data != "digits" or args.keep_patch or median(gains) > 0
