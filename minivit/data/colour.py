"""Changes of colour: of what the pixels are, not where.

Functions take float32 (B, C, H, W) in [0, 1] and return the same, with a strength for each image, (B, 1, 1, 1). They do
what Pillow's ImageOps and ImageEnhance do to bytes, without rounding to bytes where that is not their purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minivit.backend import Array, array_module, packed_to
from minivit.errors import ConfigError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601: how bright red, green and blue look


@dataclass(frozen=True)
class ColorJitter:
    """Random brightness, contrast and saturation, in this order (Howard 2013).

    Each is multiplied by a factor uniform in [1 - s, 1 + s), s its strength: see :func:`brightness`, :func:`contrast`
    and :func:`saturation`. A fourth channel stays as it is. Raises ConfigError for a strength outside [0, 1].
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4

    draws: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not all(0 <= strength <= 1 for strength in (self.brightness, self.contrast, self.saturation)):
            raise ConfigError(f"{self} has a strength outside [0, 1]", "use 0 for no change, 1 for black to double")

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return each of ``images`` changed by its numbers in ``u``: see :class:`minivit.data.augment.Augment`."""
        changed = images.copy()
        factor = 1 + (2 * u - 1) * np.array([self.brightness, self.contrast, self.saturation], np.float32)  # (B, 3)
        bright, apart, vivid = packed_to(images, *factor.T[:, :, None, None, None])  # (B, 1, 1, 1) each
        changed[:, :3] = saturation(contrast(brightness(images[:, :3], bright), apart), vivid)
        return changed


# ---- between an image and what it would be without a property, or beyond ---------------------------------------------


def brightness(images: Array, factor: Array) -> Array:
    """Return ``factor`` · images, cut to [0, 1]."""
    return array_module(images).clip(images * factor, 0, 1)


def contrast(images: Array, factor: Array) -> Array:
    """Return images whose differences from their mean brightness are multiplied by ``factor``."""
    return _blend(luma(images).mean((1, 2, 3), keepdims=True), images, factor)


def saturation(images: Array, factor: Array) -> Array:
    """Return images whose differences from grey are multiplied by ``factor``: 0 is black and white."""
    return _blend(luma(images), images, factor)


def sharpness(images: Array, factor: Array) -> Array:
    """Return images whose differences from smoothed ones are multiplied by ``factor``.

    A smoothed pixel is the mean of 3 × 3, itself counted five times; those at the edge are left as they are.
    """
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]  # (B, C, H-2, W)
    around = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]  # (B, C, H-2, W-2)
    smooth = images.copy()
    smooth[:, :, 1:-1, 1:-1] = (around + 4 * images[:, :, 1:-1, 1:-1]) / np.float32(13)
    return _blend(smooth, images, factor)


def luma(images: Array) -> Array:
    """Return the brightness (B, 1, H, W) of the pixels: the one channel itself, or 0.299 R + 0.587 G + 0.114 B."""
    if images.shape[1] != 3:
        return images.mean(1, keepdims=True)
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _blend(without: Array, images: Array, factor: Array) -> Array:
    return array_module(images).clip(without + factor * (images - without), 0, 1)


# ---- another value for each value ------------------------------------------------------------------------------------


def invert(images: Array) -> Array:
    """Return 1 - images."""
    return 1 - images


def solarize(images: Array, threshold: Array) -> Array:
    """Return images with the values from ``threshold`` on inverted."""
    return array_module(images).where(images >= threshold, 1 - images, images)


def solarize_add(images: Array, amount: Array) -> Array:
    """Return images with ``amount`` added to the values of the darker half, up to 1."""
    xp = array_module(images)
    return xp.where(images < np.float32(128 / 255), xp.minimum(images + amount, 1), images)


def posterize(images: Array, bits: Array) -> Array:
    """Return images of which only the first ``bits``, integers from 0 to 8, of their eight are kept."""
    mask = (256 - (1 << (8 - bits))).astype(np.uint8)
    return (_bytes(images) & mask).astype(np.float32) / np.float32(255)


def auto_contrast(images: Array) -> Array:
    """Return images stretched so that each channel runs from 0 to 1, but for those of one value."""
    low, high = images.min((2, 3), keepdims=True), images.max((2, 3), keepdims=True)  # (B, C, 1, 1)
    flat, xp = high <= low, array_module(images)
    return (images - xp.where(flat, 0, low)) / xp.where(flat, 1, high - low)


def equalize(images: Array) -> Array:
    """Return images with each channel's bytes spread so that all values are about equally frequent.

    With counts h of a channel's 256 values and a step s = ⌊(Σ h - h of the largest value that occurs) / 255⌋, a value v
    becomes ⌊(⌊s / 2⌋ + Σ_{w < v} h_w) / s⌋. Images so small or of so few values that s is 0 stay as they are.
    """
    xp = array_module(images)
    planes = _bytes(images).reshape(images.shape[0] * images.shape[1], -1).astype(np.int64)  # (BC, HW)
    first = 256 * xp.arange(len(planes))[:, None]  # each plane's place in one long histogram, (BC, 1)
    places = first + planes
    counts = _counts(places.reshape(-1), 256 * len(planes)).reshape(-1, 256)  # (BC, 256)
    largest = planes.max(1, keepdims=True)
    step = (planes.shape[1] - xp.take_along_axis(counts, largest, 1)) // 255  # (BC, 1)
    below = xp.cumsum(counts, 1) - counts
    spread = xp.where(step > 0, (step // 2 + below) // xp.maximum(step, 1), xp.arange(256))  # (BC, 256)
    table = spread.clip(0, 255).astype(np.float32) / np.float32(255)
    changed = table.reshape(-1)[places].reshape(images.shape)
    return xp.where(step.reshape(*images.shape[:2], 1, 1) > 0, changed, images)


def _counts(values: Array, size: int) -> Array:
    """Return how often each number below ``size`` is among ``values``, integers (n,): (size,)."""
    xp = array_module(values)
    if xp is np:
        return np.bincount(values, minlength=size)
    counts = xp.zeros(size, np.int32)  # CuPy's bincount waits for the GPU to learn the largest value
    xp.add.at(counts, values, xp.ones(1, np.int32))  # integers: the same sums in any order
    return counts


def _bytes(images: Array) -> Array:
    return array_module(images).rint(images * np.float32(255)).astype(np.uint8)
