"""What can be set for a training run. Nothing is imported here but the table's row: ``--help`` must come at once."""

from __future__ import annotations

from collections import namedtuple

Option = namedtuple("Option", "default help flags low high choices", defaults=((), None, None, ()))
"""One setting: its default says its type; ``flags`` are what it is called on the command line."""

OPTIONS: dict[str, Option] = {
    "data.name": Option("digits", "data set: digits, or a NumPy archive FILE.npz", ("--data", "-d")),
    "data.val_fraction": Option(
        0.1, "share of the training images held out to choose the best epoch; 0: train on all", ("--val-fraction",),
        low=0.0, high=0.9,
    ),
    "data.augment": Option("none", "random changes of training images", choices=("none", "affine")),
    "data.degrees": Option(12.0, "affine: largest rotation, in degrees", low=0.0, high=180.0),
    "data.scale": Option(0.12, "affine: largest change of size, as a share of it", low=0.0, high=1.0),
    "data.shear": Option(0.12, "affine: largest slant", low=0.0, high=1.0),
    "data.shift": Option(0.5, "affine: largest shift, in pixels", low=0.0),
    "model.name": Option("", "named model (minivit summary --list); by default one for the images' size",
                          ("--model", "-m")),
    "train.epochs": Option(30, "passes over the training images", ("--epochs", "-e"), low=1),
    "train.batch_size": Option(64, "images in a batch", ("--batch-size", "-b"), low=1),
    "train.grad_accum_steps": Option(1, "batches whose gradients are averaged for one update",
                                      ("--grad-accum-steps",), low=1),
    "train.lr": Option(1e-3, "learning rate after the warm-up", ("--lr",), low=0.0),
    "train.schedule": Option("cosine", "how the learning rate falls", choices=("cosine", "linear")),
    "train.warmup_epochs": Option(1.0, "epochs over which the learning rate rises", ("--warmup-epochs",), low=0.0),
    "train.min_lr": Option(0.0, "learning rate of the last step", ("--min-lr",), low=0.0),
    "train.weight_decay": Option(0.05, "AdamW's decoupled weight decay", ("--weight-decay",), low=0.0),
    "train.clip_grad": Option(1.0, "largest norm of the gradient; 0: no limit", ("--clip-grad",), low=0.0),
    "train.smoothing": Option(0.0, "label smoothing", ("--smoothing",), low=0.0, high=1.0),
    "train.seed": Option(0, "seed of weights, shuffling, augmentation and dropout", ("--seed",), low=0),
    "train.device": Option("auto", "auto, cpu, cuda, cuda:1, …", ("--device",)),
    "train.threads": Option(0, "CPU threads; 0: one for each core", ("--threads",), low=0),
    "train.micro_batch": Option(0, "images worked on at once; 0: what fits the cache", ("--micro-batch",), low=0),
    "train.save_every": Option(0, "save every so many steps, besides after each epoch", ("--save-every",), low=0),
}  # fmt: skip
"""All settings but the model's, which are the arguments of :class:`minivit.ViT`."""

RECIPE_NAMES = ("digits",)
"""The names in :data:`minivit.train.recipes.RECIPES`, which ``--help`` cannot wait for."""

MODEL_FLAGS = {
    "model.dropout": ("--dropout", "dropout after attention and in the MLP"),
    "model.drop_path": ("--drop-path", "drop path of the last block; it rises linearly from 0"),
}
"""Settings of the model that have flags of their own."""
