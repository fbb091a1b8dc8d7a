"""How images are prepared for the weights that named configurations are known for."""

from __future__ import annotations

from collections.abc import Mapping

from minivit.data import Preparation
from minivit.errors import ConfigError
from minivit.models.registry import MODELS, Settings, configuration, read_settings

PREPARATIONS: dict[str, Preparation] = {}
"""By the configuration's name; others have none, as their weights are always one's own."""


def prepare(preparations: Mapping[str, Preparation]) -> None:
    """Say of named configurations how images are prepared for their weights. Raises ConfigError for an unknown name."""
    for name in preparations:
        configuration(name)
    PREPARATIONS.update(preparations)


def preparation(name: str) -> Preparation:
    """Return how images are prepared for the weights that a name is known for: mean, std, interpolation and crop. ::

        mv.preparation("deit_tiny_patch16_224")
        # Preparation(fit='centre bicubic 0.9', mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    Raises ConfigError for an unknown name, and for a configuration that is known for none.
    """
    configuration(name)
    if name not in PREPARATIONS:
        what = f"{name} is known for no weights that others have trained"
        raise ConfigError(what, "a data set has mean and std of its own: mv.data.load(…).mean")
    return PREPARATIONS[name]


def names_alike(settings: Settings) -> list[str]:
    """Return the names that are known for weights and configured as these settings, but for classes and seed."""
    own = {key: value for key, value in settings.written_out().items() if key not in ("num_classes", "seed")}
    alike = [name for name in PREPARATIONS if MODELS[name].kind == settings.kind]
    return [name for name in alike if own.items() <= read_settings(*MODELS[name]).written_out().items()]
