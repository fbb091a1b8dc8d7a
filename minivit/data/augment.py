"""Augmentation: random changes of images that leave their class as it is. Here: where the pixels go.

An augmentation is a function of a batch and of random numbers that are handed to it, ``draws`` of them for each image.
So what happens to an image depends on its own numbers only, not on the batch it is in. Changes of colour are in
``colour.py``, RandAugment in ``randaugment.py``, and what mixes two images and their labels in ``mixing.py``.

Images may lie on a GPU. The random numbers do not: what they decide, by exponentials and logarithms that differ in
their last bit between libraries, is decided on the CPU, and the few numbers for each image that say what to do follow
the images. So every picture is the CPU's to 1e-5, with one exception: a mean brightness, for contrast, is summed in
another order there; where a later operation rounds to bytes, one picture in thousands differs by more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from minivit.backend import Array, Key, array_module, packed_to, uniform, uniform_at
from minivit.errors import ConfigError


class Augment(Protocol):
    """A random change of images."""

    @property
    def draws(self) -> int:
        """How many random numbers an image takes."""

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return changed ``images``, float32 (B, C, H, W) in [0, 1], given ``u``, float32 (B, draws) in [0, 1).

        The images handed in stay as they are. They lie on the CPU or the current GPU, and so do those
        returned; ``u`` is NumPy's.
        """


@dataclass(frozen=True)
class Chain:
    """One augmentation after the other, each with random numbers of its own."""

    steps: tuple[Augment, ...]

    @property
    def draws(self) -> int:
        """How many random numbers an image takes: the steps' together."""
        return sum(step.draws for step in self.steps)

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return ``images`` after every step: see :class:`Augment`."""
        for step in self.steps:
            images, u = step(images, u[:, : step.draws]), u[:, step.draws :]
        return images


@dataclass(frozen=True)
class Flip:
    """Left and right swapped, with probability ½ (Krizhevsky et al. 2012, section 4.1)."""

    draws: ClassVar[int] = 1

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return each of ``images`` as it is or mirrored: see :class:`Augment`."""
        changed, (mirrored,) = images.copy(), packed_to(images, np.flatnonzero(u[:, 0] < 0.5))
        changed[mirrored] = images[mirrored, :, :, ::-1]
        return changed


@dataclass(frozen=True)
class Crop:
    """A shift by up to ``padding`` whole pixels along both axes, every one equally likely; what comes in is black.

    It is the crop at random, of the image's own size, out of the image with ``padding`` zeros on each side (He et al.
    2016, section 4.2, with 4 for CIFAR's 32 × 32). Raises ConfigError for a padding below 0.
    """

    padding: int

    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ConfigError(f"an image cannot be padded by {self.padding} pixels", "use 0 for no change")

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return each of ``images`` shifted by its two numbers in ``u``: see :class:`Augment`."""
        p = self.padding
        top, left = (u * np.float32(2 * p + 1)).astype(np.int64).T
        return _windows(_padded(images, p, p), top, left, *images.shape[2:])


def _padded(images: Array, before: int, after: int, value: float = 0.0) -> Array:
    """Return images with so many pixels of ``value`` before and after them, along both axes."""
    batch, channels, height, width = images.shape
    more = before + after
    padded = array_module(images).full((batch, channels, height + more, width + more), value, images.dtype)
    padded[:, :, before : before + height, before : before + width] = images
    return padded


def _windows(images: Array, top: np.ndarray, left: np.ndarray, height: int, width: int) -> Array:
    """Return of each image the pixels (B, C, height, width) from (``top``, ``left``) on, int64 (B,) each."""
    batch, channels, rows, columns = images.shape
    xp = array_module(images)
    if xp is np:  # copies whole rows of pixels
        windows = np.lib.stride_tricks.sliding_window_view(images, (height, width), (2, 3))  # (B, C, …, …, H, W)
        return np.ascontiguousarray(windows[np.arange(batch), :, top, left])  # (B, C, H, W)
    (corner,) = packed_to(images, top * columns + left)
    plane = xp.arange(batch * channels).reshape(batch, channels, 1, 1) * (rows * columns)
    pixel = xp.arange(height)[:, None] * columns + xp.arange(width)  # (H, W)
    return images.reshape(-1)[plane + corner[:, None, None, None] + pixel]  # (B, C, H, W)


@dataclass(frozen=True)
class RandomResizedCrop:
    """A rectangle of the image at random, enlarged to the image's size (Szegedy et al. 2015, section 6).

    Its area is uniform between ``min_area`` and 1, as a share of the image's; the logarithm of width / height, in
    pixels, is uniform between those of ``ratio``'s two numbers; a side longer than the image's is cut to it. It lies
    anywhere inside, not on whole pixels only. It never shrinks, so bilinear interpolation needs no filter before it.

    It gets images that have the model's size already: of photos, their middle, scaled to it (see
    :func:`~minivit.data.folder.load_folder`). Unlike crops from the whole photos, its own have less detail than that.

    Raises ConfigError for an area outside (0, 1], or ratios that are not positive, finite and in order.
    """

    min_area: float = 0.08
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:
            raise ConfigError(f"a crop of {self.min_area:g} of the image", "use a share above 0, of at most 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < np.inf:
            raise ConfigError(f"ratios {self.ratio} of width to height", "give the smallest and the largest, above 0")

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return of each of ``images`` the part that its four numbers in ``u`` choose: see :class:`Augment`."""
        batch, channels, height, width = images.shape
        u = np.ascontiguousarray(u.T)[:, :, None]  # (4, B, 1)
        area = np.float32(self.min_area) + np.float32(1 - self.min_area) * u[0]
        crop_h, crop_w = _sides(area * np.float32(height * width), u[1], self.ratio)  # (B, 1) each
        crop_h, crop_w = np.minimum(crop_h, np.float32(height)), np.minimum(crop_w, np.float32(width))
        y = (np.arange(height, dtype=np.float32) + np.float32(0.5)) * (crop_h / np.float32(height))  # (B, H)
        x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) * (crop_w / np.float32(width))  # (B, W)
        y = y + u[2] * (np.float32(height) - crop_h) - np.float32(0.5)
        x = x + u[3] * (np.float32(width) - crop_w) - np.float32(0.5)
        y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)  # half a pixel beyond the centres at the edge
        y, x = packed_to(images, y, x)
        xp = array_module(images)
        y, x = xp.repeat(y, width, 1), xp.tile(x, (1, height))  # (B, HW)
        return bilinear(images, y, x).reshape(batch, channels, height, width)


def _sides(area: np.ndarray, u: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Return (height, width) of rectangles of ``area``, log(width / height) uniform between the logs of ``ratio``."""
    low, high = np.log(np.array(ratio, np.float32))
    root = np.exp((low + (high - low) * u) / 2)  # of width / height
    side = np.sqrt(area)
    return side / root, side * root


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

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return each of ``images`` changed by its six numbers in ``u``: see :class:`Augment`."""
        height, width = images.shape[2:]
        s = 2 * np.ascontiguousarray(u.T)[:, :, None] - 1  # (6, B, 1)
        angle, shear = s[0] * np.float32(np.deg2rad(self.degrees)), s[3] * np.float32(self.shear)
        scale_y, scale_x = np.exp(s[1] * np.float32(self.scale)), np.exp(s[2] * np.float32(self.scale))
        cos, sin = np.cos(angle), np.sin(angle)
        center_y, center_x = np.float32((height - 1) / 2), np.float32((width - 1) / 2)
        shift_y, shift_x = s[4] * np.float32(self.shift) + center_y, s[5] * np.float32(self.shift) + center_x
        yy, yx = (cos - sin * shear) * scale_y, sin * scale_x
        xy, xx = (sin + cos * shear) * scale_y, cos * scale_x
        y, x = np.indices((height, width), np.float32).reshape(2, 1, -1)  # (1, HW) each
        y, x = y - center_y, x - center_x
        y, x, yy, yx, xy, xx, shift_y, shift_x = packed_to(images, y, x, yy, yx, xy, xx, shift_y, shift_x)
        return bilinear(images, yy * y - yx * x + shift_y, xy * y + xx * x + shift_x).reshape(images.shape)


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle of noise over the image, with probability ``p`` (Zhong et al. 2020, algorithm 1).

    Its area is uniform between the two shares ``area`` of the image's; the logarithm of width / height is uniform
    between those of ``ratio``'s two numbers; sides are whole pixels, and cut to the image's. It lies anywhere inside.

    The noise is uniform in [0, 1], a number for each pixel and channel: the paper's "random values". It comes from one
    of the image's own numbers. Raises ConfigError for a share outside [0, 1], or numbers that are not in order.
    """

    p: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    draws: ClassVar[int] = 6

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ConfigError(f"erasing with probability {self.p}", "use 0 to 1")
        if not 0 <= self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"erasing {self.area} of the image", "give the smallest and the largest share of it")
        if not 0 < self.ratio[0] <= self.ratio[1] < np.inf:
            raise ConfigError(f"ratios {self.ratio} of width to height", "give the smallest and the largest, above 0")

    def __call__(self, images: Array, u: np.ndarray) -> Array:
        """Return ``images``, some with a rectangle erased: see :class:`Augment`."""
        changed, rows = images.copy(), np.flatnonzero(u[:, 0] < self.p)
        height, width = images.shape[2:]
        u = u[rows].T  # (6, n)
        area = np.float32(self.area[0]) + np.float32(self.area[1] - self.area[0]) * u[1]
        box_h, box_w = _sides(area * np.float32(height * width), u[2], self.ratio)
        box_h = np.clip(np.rint(box_h), 1, height).astype(np.int64)
        box_w = np.clip(np.rint(box_w), 1, width).astype(np.int64)
        top, left = (u[3] * (height - box_h + 1)).astype(np.int64), (u[4] * (width - box_w + 1)).astype(np.int64)
        number = (u[5] * np.float32(1 << 24)).astype(np.int64)
        _erase(changed, np.stack([rows, top, left, box_h, box_w, number]))
        return changed


def _erase(images: Array, boxes: np.ndarray) -> None:
    """Put noise in ``boxes``, int64 (6, n): the images' rows, top, left, height, width and number of each."""
    channels, height, width = images.shape[1:]
    if array_module(images) is np:  # makes no more noise than is needed
        for row, y, x, h, w, number in boxes.T.tolist():
            images[row, :, y : y + h, x : x + w] = uniform(_NOISE.at(number), (channels, h, w))
        return
    axes = np.ogrid[:channels, :height, :width]
    rows, *numbers, c, y, x = packed_to(images, *boxes, *axes)
    top, left, h, w, number = (a[:, None, None, None] for a in numbers)  # (n, 1, 1, 1)
    y, x = y - top, x - left  # in the box: (n, 1, H, 1), (n, 1, 1, W)
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)  # (n, 1, H, W)
    noise = uniform_at(_NOISE.at(number.astype(np.uint64)), (c * h + y) * w + x)  # (n, C, H, W)
    images[rows] = array_module(images).where(inside, noise, images[rows])


_NOISE = Key(0, stream=0xE2A5E)  # at a step for each of the 2²⁴ numbers that an image can have drawn


def bilinear(images: Array, y: Array, x: Array, outside: float = 0.0) -> Array:
    """Return ``images``, float32 (B, C, H, W), at the points (``y``, ``x``), each (B, P): float32 (B, C, P).

    Points are in pixels, (0, 0) the centre of the first pixel; between the pixels' centres it interpolates linearly
    along both axes, and what lies ``outside`` has that value.
    """
    xp = array_module(images)
    batch, channels, height, width = images.shape
    padded = _padded(images, 1, 2, outside).reshape(-1)  # no special case at an edge
    row = width + 3
    y, x = xp.clip(y + 1, 0, height + 1), xp.clip(x + 1, 0, width + 1)  # in the padded image, hence
    top, left = xp.floor(y), xp.floor(x)
    fy, fx = (y - top)[:, None], (x - left)[:, None]  # (B, 1, P)
    plane = xp.arange(batch * channels).reshape(batch, channels, 1) * ((height + 3) * row)
    i = plane + (top.astype(np.int64) * row + left.astype(np.int64))[:, None]  # (B, C, P) into padded
    upper = padded[i] * (1 - fx) + padded[i + 1] * fx
    lower = padded[i + row] * (1 - fx) + padded[i + row + 1] * fx
    return upper * (1 - fy) + lower * fy
