"""Augmentation: random changes of images that leave their class as it is.

An augmentation is a function of a batch and of random numbers that are handed to it, ``draws`` of them for each image.
So what happens to an image depends on its own numbers only, not on the batch it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from minivit.errors import ConfigError


class Augment(Protocol):
    """A random change of images."""

    @property
    def draws(self) -> int:
        """How many random numbers an image takes."""

    def __call__(self, images: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return changed ``images``, float32 (B, C, H, W) in [0, 1], given ``u``, float32 (B, draws) in [0, 1)."""


@dataclass(frozen=True)
class Affine:
    """A small random rotation, scaling, shear and shift about the image's centre, interpolated bilinearly.

    With s uniform in [-1, 1) for each of them, the output's pixel at (y, x) from the centre shows the input's point

        A (y, x) + shift (s₄, s₅),   A = R(degrees s₀) · [[1, 0], [shear s₃, 1]] · diag(exp(scale s₁), exp(scale s₂))

    R turns by an angle in degrees; ``shift`` is in pixels, ``scale`` and ``shear`` are ratios. Outside the image is 0,
    the background of light strokes on black. At the default strengths it is fit for 8 × 8 digits, where a stroke is a
    pixel wide: shifts by a whole pixel hurt there. Raises ConfigError for a strength below 0 or not finite.
    """

    degrees: float = 12.0
    scale: float = 0.12
    shear: float = 0.12
    shift: float = 0.5

    draws: ClassVar[int] = 6

    def __post_init__(self) -> None:
        if not all(0 <= strength < np.inf for strength in (self.degrees, self.scale, self.shear, self.shift)):
            raise ConfigError(f"{self} has a strength that is negative or not finite", "use 0 for no change")

    def __call__(self, images: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return each of ``images`` changed by its six numbers in ``u``: see :class:`Augment`."""
        batch, channels, height, width = images.shape
        s = 2 * np.ascontiguousarray(u.T)[:, :, None] - 1  # (6, B, 1)
        angle, shear = s[0] * np.float32(np.deg2rad(self.degrees)), s[3] * np.float32(self.shear)
        scale_y, scale_x = np.exp(s[1] * np.float32(self.scale)), np.exp(s[2] * np.float32(self.scale))
        cos, sin = np.cos(angle), np.sin(angle)
        y, x = np.indices((height, width), np.float32).reshape(2, 1, -1)  # (1, HW) each
        center_y, center_x = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
        y, x = y - center_y, x - center_x
        source_y = (cos - sin * shear) * scale_y * y - sin * scale_x * x + (s[4] * np.float32(self.shift) + center_y)
        source_x = (sin + cos * shear) * scale_y * y + cos * scale_x * x + (s[5] * np.float32(self.shift) + center_x)
        return bilinear(images, source_y, source_x).reshape(batch, channels, height, width)


def bilinear(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return ``images``, float32 (B, C, H, W), at the points (``y``, ``x``), each (B, P): float32 (B, C, P).

    Points are in pixels, (0, 0) the centre of the first pixel; between the pixels' centres it interpolates linearly
    along both axes, and outside the image is 0.
    """
    batch, channels, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 2), (1, 2))).reshape(-1)  # zeros around: no special case at an edge
    row = width + 3
    y, x = np.clip(y + 1, 0, height + 1), np.clip(x + 1, 0, width + 1)  # in the padded image, hence
    top, left = np.floor(y), np.floor(x)
    fy, fx = (y - top)[:, None], (x - left)[:, None]  # (B, 1, P)
    plane = np.arange(batch * channels).reshape(batch, channels, 1) * ((height + 3) * row)
    i = plane + (top.astype(np.int64) * row + left.astype(np.int64))[:, None]  # (B, C, P) into padded
    upper = padded[i] * (1 - fx) + padded[i + 1] * fx
    lower = padded[i + row] * (1 - fx) + padded[i + row + 1] * fx
    return upper * (1 - fy) + lower * fy
