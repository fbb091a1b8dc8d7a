"""RandAugment: a few operations at random on each image, all at about one strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minivit.backend import Array, packed_to
from minivit.data import colour
from minivit.data.augment import bilinear
from minivit.errors import ConfigError

# A change of colour is given images and the level of each, (B, 1, 1, 1), in [-1, 1]: its sign says which way to go,
# where there are two. The ranges are those of AutoAugment (Cubuk et al. 2019), from its weaker end to its stronger.
_COLOURS: dict[str, Callable[[Array, Array], Array]] = {
    "auto contrast": lambda images, level: colour.auto_contrast(images),
    "equalize": lambda images, level: colour.equalize(images),
    "invert": lambda images, level: colour.invert(images),
    "posterize": lambda images, level: colour.posterize(images, (4 - (4 * abs(level)).astype(np.int64)).clip(1, 4)),
    "solarize": lambda images, level: colour.solarize(images, (1 - abs(level)) * np.float32(256 / 255)),
    "solarize add": lambda images, level: colour.solarize_add(images, abs(level) * np.float32(110 / 255)),
    "color": lambda images, level: colour.saturation(images, 1 + np.float32(0.9) * level),
    "contrast": lambda images, level: colour.contrast(images, 1 + np.float32(0.9) * level),
    "brightness": lambda images, level: colour.brightness(images, 1 + np.float32(0.9) * level),
    "sharpness": lambda images, level: colour.sharpness(images, 1 + np.float32(0.9) * level),
}
# What an image is moved by at level 1: radians, pixels a pixel, and shares of its height or width.
_MOVES = {"rotate": np.pi / 6, "shear y": 0.3, "shear x": 0.3, "translate y": 0.45, "translate x": 0.45}

OPERATIONS = (*_COLOURS, *_MOVES)


@dataclass(frozen=True)
class RandAugment:
    """``layers`` times one of fifteen operations at random, applied with probability ½ (Cubuk et al. 2020, section 3).

    The operations are auto contrast, equalize, invert, posterize, solarize, solarize add, color, contrast, brightness,
    sharpness, rotate, shear and translate along either axis. An operation's level is ``magnitude`` / 10 plus normal
    noise of standard deviation ``noise`` / 10, cut to [0, 1]. At level 1 it rotates by 30°, shears by 0.3, translates
    by 0.45 of the image, multiplies saturation, contrast, brightness or sharpness by 0.1 or 1.9, either way equally
    likely; keeps one bit, inverts all values, or adds 110 / 255. The defaults are what ViT recipes write as
    "rand-m9-mstd0.5-inc1".

    What is moved in has the value ``fill``: mid-grey unless given; use 0 for light strokes on black.
    Operations on colours leave a fourth channel as it is. Raises ConfigError for a setting outside its range.
    """

    layers: int = 2
    magnitude: float = 9.0
    noise: float = 0.5
    fill: float = 0.5

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise ConfigError(f"{self.layers} operations on an image", "use at least 0: 2 is usual")
        if not 0 <= self.magnitude <= 10:
            raise ConfigError(f"magnitude {self.magnitude} is outside [0, 10]", "9 is usual")
        if not 0 <= self.noise < np.inf:
            raise ConfigError(f"noise {self.noise} of the magnitude", "use 0 or more: 0.5 is usual")
        if not 0 <= self.fill <= 1:
            raise ConfigError(f"fill {self.fill} is outside [0, 1]", "0 is black, 0.5 is grey")

    @property
    def draws(self) -> int:
        """How many random numbers an image takes: for each operation which, whether and which way, and how strong."""
        return 4 * self.layers

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return each of ``images`` after its operations: see :class:`minivit.data.augment.Augment`."""
        changed = images.copy()
        for layer in range(self.layers):
            chosen, level = self._drawn(u[:, 4 * layer : 4 * layer + 4])
            order = np.argsort(chosen, kind="stable")  # the images of an operation stand side by side, hence
            chosen, level = chosen[order], level[order]
            starts = np.searchsorted(chosen, np.arange(len(_COLOURS) + 1)).tolist()
            rows, levels = packed_to(images, order, level[:, None, None, None])
            for change, a, b in zip(_COLOURS.values(), starts, starts[1:], strict=False):
                if a < b:
                    changed[rows[a:b], :3] = change(changed[rows[a:b], :3], levels[a:b])
            if (a := starts[-1]) < len(order):
                changed[rows[a:]] = _move(changed[rows[a:]], chosen[a:] - len(_COLOURS), level[a:], self.fill)
        return changed

    def _drawn(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which operation each image gets, int64 (B,), -1 for none, and its level, float32 (B,) in [-1, 1]."""
        which, way, u1, u2 = np.ascontiguousarray(u.T)  # (B,) each
        chosen = np.where(way < 0.5, (which * np.float32(len(OPERATIONS))).astype(np.int64), -1)
        normal = np.sqrt(-2 * np.log1p(-u1)) * np.cos(np.float32(2 * np.pi) * u2)  # Box and Muller 1958
        level = np.clip((np.float32(self.magnitude) + np.float32(self.noise) * normal) / 10, 0, 1)
        return chosen, np.where(way < 0.25, -level, level)


def _move(images: Array, move: np.ndarray, level: np.ndarray, fill: float) -> Array:
    """Return each of ``images`` rotated, sheared or translated: ``move`` (B,) indexes _MOVES, ``level`` (B,)."""
    height, width = images.shape[2:]
    amounts = np.zeros((len(_MOVES), len(move), 1), np.float32)
    amounts[move, np.arange(len(move)), 0] = level * np.array(list(_MOVES.values()), np.float32)[move]
    angle, shear_y, shear_x, shift_y, shift_x = amounts  # (B, 1) each: all but one of an image's are 0
    shift_y, shift_x = shift_y * np.float32(height), shift_x * np.float32(width)
    y, x = np.indices((height, width), np.float32).reshape(2, 1, -1) + np.float32(0.5)  # (1, HW), from the corner
    center_y, center_x = np.float32(height / 2), np.float32(width / 2)
    y, x, cos, sin, shear_y, shear_x, shift_y, shift_x = packed_to(
        images, y, x, np.cos(angle), np.sin(angle), shear_y, shear_x, shift_y, shift_x
    )
    source_y = center_y + cos * (y - center_y) + sin * (x - center_x) + shear_y * x + shift_y
    source_x = center_x + cos * (x - center_x) - sin * (y - center_y) + shear_x * y + shift_x
    return bilinear(images, source_y - np.float32(0.5), source_x - np.float32(0.5), fill).reshape(images.shape)
