"""Recipes: settings of training runs that were tried and found good.

Those of the data sets that have a name were chosen on held-out training images, as benchmarks/results tells; those for
folders of photos and for fine-tuning start from the literature's and were tried on ten classes of photos. The one for a
GPU starts from the literature's, too, and has not been tried at its length yet.

A recipe has the tables and keys of a run's config.toml (see :mod:`minivit.runs.settings`); what it does not name keeps
its default. Its name carries a version, because a run says which recipe it was made with: a recipe that changes gets
the next one, and the old one stays.
"""

from __future__ import annotations

from typing import Any

from minivit.errors import ConfigError, unknown_name
from minivit.models import configuration

_USUAL = {"batch_size": 128, "weight_decay": 0.05, "clip_grad": 1.0, "smoothing": 0.1}
# small enough for many passes over the images in minutes on a CPU; mimetic weights learned faster in each trial
_NARROW = {"dim": 64, "depth": 4, "heads": 4, "mlp_dim": 128, "pool": "mean", "weight_init": "mimetic"}
_VIT_MNIST = {"name": "vit_mnist", "patch_size": 7, **_NARROW}
_VIT_CIFAR = {"name": "vit_cifar", **_NARROW, "dim": 96, "heads": 3, "mlp_dim": 192}
_CCT = {"name": "cct_4_3x2_32", "convs": 3}
_CROPS = {"resized_crop": 0.35, "flip": True}
_PHOTOS = {**_CROPS, "jitter": 0.3}
_FROM_PHOTOS: dict[str, dict[str, Any]] = {
    "model": {"name": "vit_cifar", "image_size": 64, "patch_size": 8},
    "train": {**_USUAL, "batch_size": 64, "epochs": 60, "lr": 1e-3, "min_lr": 1e-5, "warmup_epochs": 5.0},
}
# as Dosovitskiy et al. 2020, table 4 and appendix B.1.1: momentum, cosine, no weight decay, clipping
_TUNING = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "epochs": 30,
    "batch_size": 64,
    "lr": 1e-2,
    "warmup_epochs": 2.0,
    "weight_decay": 0.0,
    "clip_grad": 1.0,
}

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The main job: the UCI digits, 8 × 8, in well under a minute. Patches of a quarter of the image did better on
    # held-out images than smaller ones, and cost less; so did a small random affine change than none or a strong one.
    "digits@1": {
        "data": {"val_fraction": 0.0, "degrees": 12.0, "scale": 0.12, "shear": 0.12, "shift": 0.7},
        "model": {"name": "vit_digits", "drop_path": 0.1},
        "train": {
            "epochs": 30,
            "batch_size": 64,
            "lr": 4e-3,
            "min_lr": 4e-5,
            "warmup_epochs": 3.0,
            "weight_decay": 0.05,
            "clip_grad": 1.0,
            "smoothing": 0.1,
        },
    },
    # Patches of a quarter of the width: four times as many epochs in a given time as patches of 4 × 4.
    "mnist@1": {
        "data": {"val_fraction": 0.0, "degrees": 12.0, "scale": 0.12, "shear": 0.12, "shift": 2.0},
        "model": _VIT_MNIST,
        "train": {**_USUAL, "epochs": 12, "lr": 3e-3, "min_lr": 3e-5, "warmup_epochs": 1.0},
    },
    # As for MNIST. Erasing held the gap between training and other images small; shifting them, by any crop, did harm:
    # each piece of clothing fills its image.
    "fashion@1": {
        "data": {"val_fraction": 0.0, "flip": True, "erasing": 0.5},
        "model": _VIT_MNIST,
        "train": {**_USUAL, "epochs": 34, "lr": 2e-3, "min_lr": 2e-5, "warmup_epochs": 1.0},
    },
    # Muon instead of AdamW gave one point more in the same number of epochs; nothing else that was tried gave as much.
    # With it the larger batch cost nothing and is faster, and the shift by a pixel did no more harm.
    "fashion@2": {
        "data": {"val_fraction": 0.0, "crop": 1, "flip": True, "erasing": 0.25},
        "model": _VIT_MNIST,
        "train": {
            **_USUAL,
            "optimizer": "muon",
            "epochs": 32,
            "batch_size": 256,
            "lr": 2.5e-3,
            "min_lr": 2.5e-5,
            "warmup_epochs": 1.0,
        },
    },
    # Tokens by convolutions as for CIFAR-10 below, and its learning rate; changed as in @2.
    "fashion@3": {
        "data": {"val_fraction": 0.0, "crop": 1, "flip": True, "erasing": 0.25},
        "model": _CCT,
        "train": {**_USUAL, "optimizer": "muon", "epochs": 14, "lr": 5e-3, "min_lr": 5e-5, "warmup_epochs": 1.0},
    },
    "cifar10@1": {
        "data": {"val_fraction": 0.0, "crop": 4, "flip": True},
        "model": _VIT_CIFAR,
        "train": {**_USUAL, "epochs": 24, "lr": 2e-3, "min_lr": 2e-5, "warmup_epochs": 2.0},
    },
    # Muon instead of AdamW: 74.2% instead of 67.6% of the images held out after 6 epochs. Twice the rate did no better.
    "cifar10@2": {
        "data": {"val_fraction": 0.0, "crop": 4, "flip": True},
        "model": _VIT_CIFAR,
        "train": {**_USUAL, "optimizer": "muon", "epochs": 24, "lr": 2e-3, "min_lr": 2e-5, "warmup_epochs": 2.0},
    },
    # Twice the epochs: 86.7% of the test images instead of 85.4%. At the end 97.7% of the training images were right.
    "cifar10@3": {
        "data": {"val_fraction": 0.0, "crop": 4, "flip": True},
        "model": _VIT_CIFAR,
        "train": {**_USUAL, "optimizer": "muon", "epochs": 48, "lr": 2e-3, "min_lr": 2e-5, "warmup_epochs": 2.0},
    },
    # Convolutions make the tokens, a third one more of them 16 instead of 64: 76.0% of the images held out after 3
    # epochs, twice of which took the ViT above to 74.2%. Of learning rates 2e-3, 4e-3 and 8e-3 they gave 76.0, 77.1 and
    # 77.9%; the one here is for more epochs.
    "cifar10-cct@1": {
        "data": {"val_fraction": 0.0, "crop": 4, "flip": True},
        "model": _CCT,
        "train": {
            **_USUAL,
            "optimizer": "muon",
            "epochs": 40,
            "lr": 5e-3,
            "min_lr": 5e-5,
            "warmup_epochs": 1.0,
        },
    },
    # For a GPU: ViT-Ti with patches of 4 × 4, no class token; images changed as Lee et al. 2021, arXiv 2112.13492,
    # do for small sets, but by RandAugment instead of AutoAugment; optimizer and start of cifar10@2; a batch that keeps
    # the card busy. What it reaches, and whether other rates and strengths are better, has not been measured yet.
    "cifar10-gpu@1": {
        "data": {
            "val_fraction": 0.0,
            "crop": 4,
            "flip": True,
            "randaugment": 9.0,
            "erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
        },
        "model": {"name": "vit_cifar", "depth": 12, "pool": "mean", "weight_init": "mimetic", "drop_path": 0.1},
        "train": {
            **_USUAL,
            "optimizer": "muon",
            "epochs": 100,
            "batch_size": 1024,
            "lr": 3e-3,
            "min_lr": 3e-5,
            "warmup_epochs": 5.0,
        },
    },
    "imagefolder@1": {"data": {"val_fraction": 0.0, **_PHOTOS}, **_FROM_PHOTOS},
    # Own photos are few: which epoch does best on others is worth a tenth of them.
    "imagefolder@2": {"data": {"val_fraction": 0.1, **_PHOTOS}, **_FROM_PHOTOS},
    "finetune@1": {"data": {"val_fraction": 0.0, **_CROPS}, "train": _TUNING},
    "finetune@2": {"data": {"val_fraction": 0.1, **_CROPS}, "train": _TUNING},
}

FOR_DATA = {
    "digits": "digits",
    "mnist": "mnist",
    "fashion-mnist": "fashion",
    "cifar-10": "cifar10",
    "cifar-100": "cifar10",
    "folder": "imagefolder",
    "shards": "imagefolder",
}
"""The recipe for each kind of data set (:func:`minivit.data.kind_of`) that has one."""


def is_recipe(name: str) -> bool:
    """Tell whether there is a recipe of this name, with or without its version."""
    return any(name in (full, full.partition("@")[0]) for full in RECIPES)


def full_name(name: str) -> str:
    """Return a recipe's name with its version, by default the newest; raise ConfigError for one that is not known."""
    newest = {full.partition("@")[0]: full for full in RECIPES}  # in the order of their versions
    full = newest.get(name, name)
    if full not in RECIPES:
        raise unknown_name("recipe", name, newest)
    return full


def recipes_with_models() -> list[str]:
    """Return the full names of the recipes that name a model, each in its newest version."""
    newest = dict.fromkeys(full_name(full.partition("@")[0]) for full in RECIPES)
    return [name for name in newest if "model" in RECIPES[name]]


def recipe_model(name: str) -> tuple[str, dict[str, Any]]:
    """Return the kind and the settings of a recipe's model as they stand there: data may ask for other sizes."""
    sizes = dict(RECIPES[full_name(name)].get("model", {}))
    if not sizes:
        raise ConfigError(f"the recipe {name} has no model of its own", f"known: {', '.join(recipes_with_models())}")
    kind, usual = configuration(sizes.pop("name"))
    return kind, {**usual, **sizes}
