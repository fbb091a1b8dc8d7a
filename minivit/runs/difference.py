"""What differs between runs, and what of it is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from typing import Any

PARTING = ("data.val_fraction", "data.overfit", "data.bad_images", "train.seed")
"""Settings that decide which of the training images are held out, and so which labels are hashed."""


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that have not the same value in all, in their order; what one does not have, differs."""
    keys = dict.fromkeys(key for s in settings for key in s)
    return [key for key in keys if any(key not in s or s[key] != settings[0].get(key) for s in settings)]


def difference(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``difference`` of ``other``'s test accuracy to ``first``'s, its 95% interval, and what it means.

    The interval is Newcombe's hybrid of the two runs' Wilson intervals (Newcombe 1998, "Interval estimation for the
    difference between independent proportions", Statistics in Medicine 17, method 10): with shares p in (l, u) it runs
    from p₂ - p₁ - √((p₂ - l₂)² + (u₁ - p₁)²) to p₂ - p₁ + √((u₂ - p₂)² + (p₁ - l₁)²). It takes the test images of the
    two for different ones; where they are the same, as they mostly are, it is wider than need be. ``beyond_chance`` is
    None where there is nothing to compare: a run without a test accuracy, or tested on other data, as ``why`` says.
    """
    found: dict[str, Any] = {"first": first["folder"], "other": other["folder"], "why": other_data(first, other)}
    if None in (first["test_interval"], other["test_interval"]) or found["why"]:
        return found | {"difference": None, "interval": None, "beyond_chance": None}
    p, (low, high) = first["test_accuracy"], first["test_interval"]
    q, (other_low, other_high) = other["test_accuracy"], other["test_interval"]
    interval = [q - p - hypot(q - other_low, high - p), q - p + hypot(other_high - q, p - low)]
    return found | {"difference": q - p, "interval": interval, "beyond_chance": interval[0] > 0 or interval[1] < 0}


def other_data(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return why the test images of two runs are not the same ones with the same classes, or "".

    A hash of the test images decides where both checkpoints record one. Else it is the data's name, the number of test
    images and, where both runs part the training images in the same way, the hash of the training labels: two data
    sets that agree in all of these pass for one.
    """
    one, two = first.get("data", {}), other.get("data", {})
    both = one.keys() & two.keys()
    if "classes" in both and sorted(one["classes"]) != sorted(two["classes"]):
        return "their classes are not the same"
    if "test" in both:
        return "" if one["test"] == two["test"] else "their test images are not the same"
    if first["settings"].get("data.name") != other["settings"].get("data.name"):
        return "they were tested on other data"
    if (a := first.get("test_count")) and (b := other.get("test_count")) and a != b:
        return f"they were tested on {a:,} and {b:,} images"
    alike = all(first["settings"].get(key) == other["settings"].get(key) for key in PARTING)
    if alike and "labels" in both and one["labels"] != two["labels"]:
        if first["settings"].get("data.layout", 1) != other["settings"].get("data.layout", 1):
            return "version 0.1.0 held out other images, and did not record which it tested on"
        return "the labels of their data are not the same"
    return ""
