"""What can be set for a training run. Nothing is imported here but the table's row: ``--help`` must come at once."""

from __future__ import annotations

from collections import namedtuple

Option = namedtuple("Option", "default help flags low high choices", defaults=((), None, None, ()))
"""One setting: its default says its type; ``flags`` are what it is called on the command line.

A number has a ``low`` and a ``high``. Where nothing in the mathematics says how high, it is beyond all that is of use
and below where numbers overflow, memory runs out or a run has no end.
"""

MANY = 1_000_000  # images in a batch, epochs: more is a slip of the hand

OPTIONS: dict[str, Option] = {
    "data.name": Option("digits", "data set: digits, mnist, cifar-10, …, a folder, FILE.npz or FILE.tar",
                        ("--data", "-d")),
    "data.val_fraction": Option(
        0.1, "share of the training images held out to choose the best epoch; 0: train on all", ("--val-fraction",),
        low=0.0, high=0.9,
    ),
    "data.layout": Option(2, "how folders are read and images held out; 1: as version 0.1.0 did", low=1, high=2),
    "data.bad_images": Option("stop", "what an image file that cannot be read does: stop, or skip it",
                              ("--bad-images",), choices=("stop", "skip")),
    "data.stream": Option(False, "decode image files whenever they are wanted, even if all would fit into the memory"),
    "data.window": Option(0, "shuffle within so many images that lie near each other, for slow disks; 0: all", low=0,
                          high=1_000_000_000),
    "data.overfit": Option(0, "train on so many images only, unchanged, to see whether the model can learn them",
                           ("--overfit",), low=0, high=1_000_000_000),
    "data.crop": Option(0, "pad by so many pixels and crop at random; this and what follows: 0 is off", low=0,
                        high=1024),
    "data.resized_crop": Option(0.0, "random resized crops of at least this share of the image", low=0.0, high=1.0),
    "data.flip": Option(False, "mirror half of the images"),
    "data.degrees": Option(0.0, "affine: largest rotation, in degrees", low=0.0, high=180.0),
    "data.scale": Option(0.0, "affine: largest change of size, as a share of it", low=0.0, high=1.0),
    "data.shear": Option(0.0, "affine: largest slant", low=0.0, high=1.0),
    "data.shift": Option(0.0, "affine: largest shift, in pixels", low=0.0, high=1024.0),
    "data.jitter": Option(0.0, "largest change of brightness, contrast and saturation", low=0.0, high=1.0),
    "data.randaugment": Option(0.0, "magnitude of RandAugment, two operations an image", low=0.0, high=10.0),
    "data.erasing": Option(0.0, "share of images that lose a rectangle", low=0.0, high=1.0),
    "data.mixup": Option(0.0, "mix pairs of images, by Beta(X, X)", ("--mixup",), low=0.0, high=100.0),
    "data.cutmix": Option(0.0, "paste a rectangle of another image, by Beta(X, X)", ("--cutmix",), low=0.0, high=100.0),
    "model.name": Option("", "named model (minivit summary --list); by default one for the images' size",
                          ("--model", "-m")),
    "train.epochs": Option(30, "passes over the training images", ("--epochs", "-e"), low=1, high=MANY),
    "train.batch_size": Option(64, "images in a batch", ("--batch-size", "-b"), low=1, high=MANY),
    "train.grad_accum_steps": Option(1, "batches whose gradients are averaged for one update",
                                      ("--grad-accum-steps",), low=1, high=MANY),
    "train.init_from": Option("", "start from the weights of a checkpoint or run, with a new head", ("--init-from",)),
    "train.teacher": Option("", "learn from a trained model, a checkpoint or run, besides the labels", ("--teacher",)),
    "train.distill": Option("hard", "what is learnt from the teacher: hard, its decision, or soft, its probabilities",
                            ("--distill",), choices=("hard", "soft")),
    "train.distill_share": Option(0.5, "share of the loss that the teacher has", low=0.0, high=1.0),
    "train.distill_temperature": Option(1.0, "of soft probabilities, the teacher's and the model's", low=0.01,
                                        high=1000.0),
    "train.optimizer": Option("adamw", "adamw, muon, or sgd with momentum", ("--optimizer",),
                              choices=("adamw", "muon", "sgd")),
    "train.momentum": Option(0.9, "of sgd", low=0.0, high=0.999),
    "train.layer_decay": Option(1.0, "learning rate of a block, as a share of the next one's", ("--layer-decay",),
                                low=0.0, high=1.0),
    "train.lr": Option(1e-3, "learning rate after the warm-up", ("--lr",), low=0.0, high=1e6),
    "train.schedule": Option("cosine", "how the learning rate falls", choices=("cosine", "linear")),
    "train.schedule_epochs": Option(0, "epochs in which the learning rate comes down to min_lr; 0: all", low=0,
                                    high=MANY),
    "train.warmup_epochs": Option(1.0, "epochs over which the learning rate rises", ("--warmup-epochs",), low=0.0,
                                  high=float(MANY)),
    "train.min_lr": Option(0.0, "learning rate of the last step", ("--min-lr",), low=0.0, high=1e6),
    "train.weight_decay": Option(0.05, "weight decay: decoupled, but for sgd", ("--weight-decay",), low=0.0,
                                 high=1e6),
    "train.clip_grad": Option(1.0, "largest norm of the gradient; 0: no limit", ("--clip-grad",), low=0.0,
                              high=1e30),
    "train.smoothing": Option(0.0, "label smoothing", ("--smoothing",), low=0.0, high=1.0),
    "train.model_ema": Option(0.0, "evaluate and keep a moving average of the weights that decays by X a step; 0: none",
                              ("--model-ema",), low=0.0, high=0.999999),
    "train.patience": Option(0, "stop after so many epochs that were not better on the validation images; 0: never",
                             ("--patience",), low=0, high=MANY),
    "train.max_time": Option(0.0, "stop after so many minutes of training; 0: no limit", ("--max-time",), low=0.0,
                             high=1e9),
    "train.on_nan": Option("stop", "what a loss that is not finite does: stop, skip the batch, or rollback to the last "
                           "checkpoint", ("--on-nan",), choices=("stop", "skip", "rollback")),
    "train.seed": Option(0, "seed of weights, shuffling, augmentation and dropout", ("--seed",), low=0,
                         high=(1 << 63) - 1),
    "train.device": Option("auto", "auto, cpu, cuda, cuda:1, …", ("--device",)),
    "train.dtype": Option("auto", "numbers of a step: float32, tf32, bfloat16 or float16; auto: bfloat16 on a GPU that "
                          "has it (sm_80 on), else float32", ("--dtype",),
                          choices=("auto", "float32", "tf32", "bfloat16", "float16")),
    "train.threads": Option(0, "CPU threads; 0: one for each core", ("--threads",), low=0, high=1024),
    "train.workers": Option(0, "processes that share the images of a batch on a CPU; 0: as many as are fastest, by a "
                            "measurement; 1: this one, with its threads", ("--workers",), low=0, high=256),
    "train.micro_batch": Option(0, "images worked on at once; 0: what fits the cache", ("--micro-batch",), low=0,
                                high=MANY),
    "train.save_every": Option(0, "save every so many steps, besides after each epoch", ("--save-every",), low=0,
                               high=1_000_000_000),
}  # fmt: skip
"""All settings but the model's, which are the arguments of :class:`minivit.ViT`."""

RECIPE_NAMES = ("digits", "mnist", "fashion", "cifar10", "cifar10-cct", "cifar10-gpu", "imagefolder", "finetune")
"""The names in :data:`minivit.runs.recipes.RECIPES`, which ``--help`` cannot wait for."""

MODEL_FLAGS = {
    "model.dropout": ("--dropout", "dropout after attention and in the MLP"),
    "model.drop_path": ("--drop-path", "drop path of the last block; it rises linearly from 0"),
}
"""Settings of the model that have flags of their own."""
