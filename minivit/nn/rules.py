"""Settings of layers and models: what each may be, by its name."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from minivit.errors import ConfigError, value_text

Size = int | tuple[int, int]
"""A length for both axes, or (height, width)."""

_COUNTS = (
    "in_channels", "num_classes", "dim", "depth", "heads", "mlp_dim", "dim_head", "hidden", "in_features",
    "out_features",
)  # fmt: skip
_FLAGS = ("qkv_bias", "bias", "recompute")
_MOST = {"depth": 10_000}
"""Most of each count, by default 2²⁴. More is a slip: such a layer fills a machine, so many blocks take hours."""

_LARGEST_SIZE = 1 << 15  # pixels a side: more is no picture that is read (50 megapixels at most)
_RATES = ("p", "dropout", "attention_dropout", "embed_dropout", "drop_path")
_CHOICES = {"pool": ("cls", "mean", "none"), "position": ("learned", "none"), "head": ("linear", "mlp"),
            "weight_init": ("paper", "mimetic")}  # fmt: skip


def check_settings(**settings: Any) -> dict[str, Any]:
    """Return the settings, numbers as Python's own; raise ConfigError for one that cannot be used.

    None, where a signature allows it, stands for a default. Names without a rule pass as they are.
    """
    return {name: value if value is None else _checked(name, value) for name, value in settings.items()}


def _checked(name: str, value: Any) -> Any:
    number = isinstance(value, Real) and not isinstance(value, bool)
    whole = number and isinstance(value, Integral)
    if name in _COUNTS:
        if not whole or value < 1:
            raise ConfigError(f"{name} is {value_text(value)}", "it must be a whole number, at least 1")
        if value > (most := _MOST.get(name, 1 << 24)):
            raise ConfigError(f"{name} is {value_text(value)}", f"it must be at most {most:,}")
        return int(value)
    if name in _RATES:
        if not number or not 0 <= value < 1:
            raise ConfigError(f"{name} is {value_text(value)}", "it must be a rate in [0, 1)")
        return float(value)
    if name.endswith("eps"):
        if not number or not 0 < value <= 1:
            raise ConfigError(f"{name} is {value_text(value)}", "it must be above 0, and 1 at most: 1e-6 is usual")
        return float(value)
    if name in _FLAGS and not isinstance(value, bool):
        raise ConfigError(f"{name} is {value_text(value)}", "it must be True or False")
    if name.endswith("_size"):
        height, width = pair(name, value)
        return height if isinstance(value, Integral) else (height, width)
    if name == "seed":
        if not whole or not -(1 << 63) <= value < 1 << 63:
            raise ConfigError(f"seed is {value_text(value)}", "it must be a whole number of at most 64 bits")
        return int(value)
    if name == "activation" and not isinstance(value, str):
        raise ConfigError(f"activation is {value_text(value)}", "it must be a name, such as 'gelu'")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ConfigError(f"{name} is {value_text(value)}", f"use one of {', '.join(map(repr, _CHOICES[name]))}")
    return value


def pair(name: str, size: Any) -> tuple[int, int]:
    """Return (height, width) of a size; raise ConfigError if it is none."""
    sizes = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if len(sizes) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in sizes):
        raise ConfigError(f"{name} is {value_text(size)}", "it must be a whole number or (height, width)")
    if max(sizes) > _LARGEST_SIZE:
        raise ConfigError(f"{name} is {value_text(size)}", f"it must be at most {_LARGEST_SIZE:,} a side")
    return int(sizes[0]), int(sizes[1])
