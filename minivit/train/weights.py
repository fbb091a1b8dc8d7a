"""Models out of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minivit.errors import CheckpointError
from minivit.models.vit import ViT
from minivit.nn.module import Module
from minivit.train.checkpoint import load_checkpoint


def load_weights(model: Module, path: str | Path) -> None:
    """Copy the parameters of a checkpoint into ``model``; nothing is changed if they do not fit.

    Raises CheckpointError if the file cannot be used, or names the parameters that differ.
    """
    model.load_state_dict(load_checkpoint(path).under("model"))


def load_model(path: str | Path) -> tuple[ViT, dict[str, Any]]:
    """Build the model that a checkpoint was saved from; return it, in eval mode, and the checkpoint's meta.

    It has the dtype of the stored parameters.
    """
    checkpoint = load_checkpoint(path)
    config = checkpoint.meta.get("model")
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not say which model it holds", "build it yourself and use load_weights")
    state = checkpoint.under("model")
    try:
        model = ViT(**config).to(np.result_type(*state.values()))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its model's settings cannot be used: {error}", "use another") from error
    model.load_state_dict(state)
    return model.eval(), checkpoint.meta
