"""What a setting of a layer or model may be: a rule takes its name and value, and returns the value or raises.

A rule returns numbers as Python's own and raises :class:`~minivit.errors.ConfigError` for what cannot be used.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from minivit.errors import ConfigError, unknown_name, value_text

Size = int | tuple[int, int]
"""A length for both axes, or (height, width)."""

Rule = Callable[[str, Any], Any]

MOST = 1 << 24  # of a count: more is a slip, such a layer fills a machine
LARGEST_SIZE = 1 << 15  # pixels a side: more is no picture that is read (50 megapixels at most)


def count(name: str, value: Any, most: int = MOST) -> int:
    """A whole number from 1 to ``most``."""
    if not _whole(value) or value < 1:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a whole number, at least 1")
    if value > most:
        raise ConfigError(f"{name} is {value_text(value)}", f"it must be at most {most:,}")
    return int(value)


def depth(name: str, value: Any) -> int:
    """A number of blocks: more than 10,000 take hours."""
    return count(name, value, 10_000)


def depths(name: str, value: Any) -> tuple[int, ...]:
    """A whole number from 1 to 1,000 for each of at most 8 stages."""
    if not isinstance(value, tuple | list) or len(value) > 8:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a list of whole numbers, at most 8, as [2, 2]")
    return tuple(count(name, n, 1000) for n in value)


def rate(name: str, value: Any) -> float:
    """A probability below 1."""
    if not _number(value) or not 0 <= value < 1:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a rate in [0, 1)")
    return float(value)


def epsilon(name: str, value: Any) -> float:
    """What is added to a variance."""
    if not _number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be above 0, and 1 at most: 1e-6 is usual")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A number above 0, of which 1,000 is far too much."""
    if not _number(value) or not 0 < value <= 1000:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a number above 0, and 1000 at most")
    return float(value)


def few(name: str, value: Any) -> int:
    """A whole number from 0 to 1,000."""
    if not _whole(value) or not 0 <= value <= 1000:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a whole number from 0 to 1000")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value_text(value)}", "it must be True or False")
    return value


def seed(name: str, value: Any) -> int:
    """A whole number of 64 bits."""
    if not _whole(value) or not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a whole number of at most 64 bits")
    return int(value)


def size(name: str, value: Any) -> Size:
    """A length for both axes, or (height, width); kept as it is given."""
    height, width = pair(name, value)
    return height if isinstance(value, Integral) else (height, width)


def choice(*known: str) -> Rule:
    """Return the rule that a value is one of these."""

    def rule(name: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in known:
            raise ConfigError(f"{name} is {value_text(value)}", f"use one of {', '.join(map(repr, known))}")
        return value

    return rule


def named(known: Any) -> Rule:
    """Return the rule that a value is a name in ``known``, of which there are too many to list."""

    def rule(name: str, value: Any) -> Any:
        if not isinstance(value, str):
            raise ConfigError(f"{name} is {value_text(value)}", f"it must be a name, such as {next(iter(known))!r}")
        if value not in known:
            raise unknown_name(name, value, known)
        return value

    return rule


def optional(rule: Rule) -> Rule:
    """Return the rule that a value is None, for what follows from others, or as ``rule`` has it."""
    return lambda name, value: None if value is None else rule(name, value)


def pair(name: str, value: Any) -> tuple[int, int]:
    """Return (height, width) of a size; raise ConfigError if it is none."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in sizes):
        raise ConfigError(f"{name} is {value_text(value)}", "it must be a whole number or (height, width)")
    if max(sizes) > LARGEST_SIZE:
        raise ConfigError(f"{name} is {value_text(value)}", f"it must be at most {LARGEST_SIZE:,} a side")
    return int(sizes[0]), int(sizes[1])


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
