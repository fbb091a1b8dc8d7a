"""Settings of layers and models: what each may be, by its name."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from minivit.errors import ConfigError

Size = int | tuple[int, int]
"""A length for both axes, or (height, width)."""

_COUNTS = (
    "in_channels", "num_classes", "dim", "depth", "heads", "mlp_dim", "dim_head", "hidden", "in_features",
    "out_features",
)  # fmt: skip
_RATES = ("p", "dropout", "attention_dropout", "embed_dropout", "drop_path")
_CHOICES = {"pool": ("cls", "mean", "none"), "position": ("learned", "none"), "head": ("linear", "mlp"),
            "weight_init": ("paper", "mimetic")}  # fmt: skip


def check_settings(**settings: Any) -> dict[str, Any]:
    """Return the settings, numbers as Python's own; raise ConfigError for one that cannot be used.

    None, where a signature allows it, stands for a default. Names without a rule pass as they are.
    """
    return {name: value if value is None else _checked(name, value) for name, value in settings.items()}


def _checked(name: str, value: Any) -> Any:
    if name in _COUNTS:
        if not isinstance(value, Integral) or value < 1:
            raise ConfigError(f"{name} is {value!r}", "it must be a whole number, at least 1")
        return int(value)
    if name in _RATES:
        if not isinstance(value, Real) or not 0 <= float(value) < 1:
            raise ConfigError(f"{name} is {value!r}", "it must be a rate in [0, 1)")
        return float(value)
    if name.endswith("eps"):
        if not isinstance(value, Real) or not float(value) > 0:
            raise ConfigError(f"{name} is {value!r}", "it must be above 0: 1e-6 is usual")
        return float(value)
    if name.endswith("_size"):
        height, width = pair(name, value)
        return height if isinstance(value, Integral) else (height, width)
    if name == "seed" and not isinstance(value, Integral):
        raise ConfigError(f"seed is {value!r}", "it must be a whole number")
    if value not in _CHOICES.get(name, (value,)):
        raise ConfigError(f"{name} is {value!r}", f"use one of {', '.join(map(repr, _CHOICES[name]))}")
    return int(value) if name == "seed" else value


def pair(name: str, size: Any) -> tuple[int, int]:
    """Return (height, width) of a size; raise ConfigError if it is none."""
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2 or not all(isinstance(n, Integral) for n in sizes):
        raise ConfigError(f"{name} is {size!r}", "it must be a whole number or (height, width)")
    return int(sizes[0]), int(sizes[1])
