"""Recipes: settings of training runs that were tried and found good. They were chosen on held-out training images.

A recipe has the tables and keys of a run's config.toml (see :mod:`minivit.cli.settings`); what it does not name keeps
its default.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The main job: the UCI digits, 8 × 8, in well under a minute. Patches of a quarter of the image did better on
    # held-out images than smaller ones, and cost less; so did a small random affine change than none or a strong one.
    "digits": {
        "data": {"name": "digits", "augment": "affine", "shift": 0.7, "val_fraction": 0.0},
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
}
