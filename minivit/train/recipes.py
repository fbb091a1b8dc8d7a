"""Recipes: settings of training runs that were tried and found good. They were chosen on held-out training images.

A recipe has the tables and keys of a run's config.toml (see :mod:`minivit.cli.settings`); what it does not name keeps
its default.
"""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    # The main job: the UCI digits, 8 × 8, in about a minute on two cores.
    "digits": {
        "data": {"name": "digits", "augment": "affine", "val_fraction": 0.0},
        "model": {"name": "vit_digits"},
        "train": {
            "epochs": 28,
            "batch_size": 64,
            "lr": 2e-3,
            "weight_decay": 0.05,
            "warmup_epochs": 3.0,
            "clip_grad": 1.0,
            "smoothing": 0.1,
        },
    },
}
