"""A photo and anybody's weights: the five likeliest classes, and where the model looks, in one picture.

    python 11_a_photo_read.py PHOTO WEIGHTS [--like NAME] [--labels FILE] [-o PICTURE.png]

WEIGHTS: a .safetensors file of timm's or Hugging Face's, best with its config.json beside it, which says sizes,
preparation and the names of the classes; Google's .npz; or a checkpoint of minivit's. What a file does not say, the
name of a model that it is like does (--like vit_base_patch16_224), and FILE names the classes, one a line. Without
arguments a small model learns the digits for seconds, is written as Hugging Face has it, and reads a digit by another
writer.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import minivit as mv
from minivit.data.dataset import class_names
from minivit.runs.explaining import image_of_file
from minivit.runs.trained import open_trained
from minivit.show.lettering import drawable_names
from minivit.show.pictures import BLUE, FAINT, INK, PAPER, enlarged, lettered, under_heat, write

SIDE, GAP, TOP = 336, 20, 64  # pixels: of an image about, between things, and above them


def make_weights(digit: int = 11) -> tuple[str, str, str]:
    """Train a small ViT on the digits; return a photo, weights, and what they are."""
    train, test = mv.data.load("digits", split="train"), mv.data.load("digits", split="test")
    model = mv.create_model("vit_digits", patch_size=2, depth=2)
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=3e-3), clip_norm=1.0)
    loader = mv.data.Loader(train, 64, key=mv.Key(0))
    for epoch in range(2):
        for images, labels in loader.batches(epoch):
            step(images, labels)
    mv.export(model, "digits-huggingface", "huggingface", data=train, overwrite=True)
    Image.fromarray(test.images[digit, 0]).save("digit.png")
    return (
        "digit.png",
        "digits-huggingface/model.safetensors",
        f"trained for 2 epochs; the digit is a {test.labels[digit]}",
    )


def draw(pixels: np.ndarray, seen: np.ndarray, title: str, about: str, bars: list[tuple[str, float]]) -> Image.Image:
    """Return the picture: the image, the image under its map ``seen`` (rows, columns), and a bar for each class."""
    image = enlarged(pixels, max(1, SIDE // max(pixels.shape[1:])))  # (C, H, W)
    wide, high = image.size
    room = 360  # for the bars
    sheet = Image.new("RGB", (2 * wide + room + 4 * GAP, max(high, 5 * 56) + TOP + 2 * GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for text, y, colour, size in ((title, 14, INK, 20), (about, 40, FAINT, 14)):
        words, font = lettered(text, size, sheet.width - 2 * GAP)
        pen.text((GAP, y), words, colour, font)
    sheet.paste(image, (GAP, TOP))
    sheet.paste(under_heat(image, seen), (wide + 2 * GAP, TOP))
    write(pen, (GAP, TOP + high + 4), "as the model gets it", FAINT, 14)
    write(pen, (wide + 2 * GAP, TOP + high + 4), "attention rollout, dark: none", FAINT, 14)
    left = 2 * wide + 3 * GAP
    for i, (name, p) in enumerate(bars):
        y = TOP + 56 * i
        words, font = lettered(name, 16, room - 64)
        pen.text((left, y), words, INK, font)
        write(pen, (left + room, y), f"{p:.1%}", INK, 16, anchor="ra")
        pen.rectangle((left, y + 24, left + room, y + 40), fill=(234, 238, 242))
        pen.rectangle((left, y + 24, left + round(room * p), y + 40), fill=BLUE)
    return sheet


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("photo", nargs="?")
parser.add_argument("weights", nargs="?")
parser.add_argument("--like")
parser.add_argument("--labels", type=Path)
parser.add_argument("-o", "--output", type=Path, default=Path("read.png"))
args = parser.parse_args()
if args.photo and not args.weights:
    parser.error("name the weights, too")
photo, weights, about = (args.photo, args.weights, "") if args.photo else make_weights()
if args.output.suffix.lower() != ".png" or args.output.resolve() == Path(photo).resolve():
    parser.error(f"{args.output}: name another file, which ends in .png")

try:
    trained = open_trained(weights, args.like)  # a file, or its folder
    pixels = image_of_file(trained, photo, 0).pixels  # uint8 (C, H, W), cut and sized as these weights take images
    trace = mv.study.trace_model(trained.model, mv.data.standardize(pixels[None], trained.mean, trained.std))
    seen = mv.study.patch_map(trace, mv.study.rollout(trace))[0]  # (rows, columns)
except mv.MinivitError as error:
    raise SystemExit(f"{error}") from None
if trace.logits.ndim != 2:
    raise SystemExit(f"{weights} has a class for every patch, and none for the image")
p = mv.ops.softmax(trace.logits.data[0].astype(np.float64))  # (K,)
names = args.labels.read_text(encoding="utf-8").splitlines() if args.labels else trained.classes
if args.labels and len(names) != len(p):  # most likely another model's
    raise SystemExit(f"{args.labels} has {len(names)} names, the model {len(p)} classes")
names = drawable_names(class_names(names, len(p)))
best = np.argsort(-p)[:5]

for k in best:
    print(f"{p[k]:6.1%}  {'█' * round(40 * p[k]):40}  {names[k]}")
kind = f"{type(trained.model).__name__}, {trained.model.num_parameters():,} parameters, from {weights}"
title = f"{Path(photo).name}: {names[best[0]]}, {p[best[0]]:.1%}"
draw(pixels, seen, title, f"{kind}; {about}".strip("; "), [(names[k], p[k]) for k in best]).save(args.output)
print(f"{args.output}: {kind}" + (f" ({about})" if about else ""))
