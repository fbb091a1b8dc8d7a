"""A model like another one, with random weights: the comparison that every picture of a trained model needs."""

from __future__ import annotations

from typing import Any

from minivit.backend import Key, normal
from minivit.errors import ConfigError
from minivit.models.registry import Model
from minivit.nn.layers import Linear


def untrained_like(model: Any, seed: int = 0) -> Any:
    """Return a model with the settings of ``model``, weights drawn from ``seed``, on its device and in its dtype.

    A picture that looks the same of an untrained model says nothing about what was learnt (Adebayo et al. 2018,
    "Sanity checks for saliency maps", 1810.03292, section 3.1). A head of zeros, as a ViT begins with, would let no
    gradient through: it is drawn, too, of a standard deviation of 1/√dim. Raises ConfigError for what is no Model.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"a {type(model).__name__} has no settings to make another from", "give a registered model")
    model.check_portable()
    made = type(model)(**model.config | {"seed": seed})
    for i, name in enumerate(("head", "head_dist")):
        head = getattr(made, name, None)
        if isinstance(head, Linear) and not head.weight.data.any():
            head.weight.data[...] = normal(Key(seed, 1 + i), head.weight.shape) / head.weight.shape[1] ** 0.5
    first = next(model.parameters())
    return made.to(first.dtype).to(first.device)
