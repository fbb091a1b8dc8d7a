"""Mixing: a training image becomes part one image and part another, and so does its label."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minivit.backend import Array, array_module, packed_to
from minivit.errors import ConfigError


@dataclass(frozen=True)
class Mix:
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019): x = λ · image + (1 - λ) · partner, and so the label.

    Mixup takes λ for all pixels alike, λ ~ Beta(``mixup``, ``mixup``). CutMix takes 0 in a rectangle and 1 elsewhere:
    with λ ~ Beta(``cutmix``, ``cutmix``) its sides are √(1 - λ) of the image's, its centre lies anywhere in the image,
    what reaches beyond is cut off, and the label's λ is the share of the image that is left.

    An image is mixed with probability ``prob``, each with a λ of its own; ``switch`` is the share of CutMix where both
    are on. A strength of 0 turns one of them off. Raises ConfigError for a setting outside its range, or both off.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    prob: float = 1.0
    switch: float = 0.5

    draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if not all(alpha == 0 or 0.01 <= alpha <= 100 for alpha in (self.mixup, self.cutmix)):
            raise ConfigError(
                f"{self}: Beta(α, α) needs α from 0.01 to 100", "use 0 to turn one off; 0.2 to 1 is usual"
            )
        if self.mixup == self.cutmix == 0:
            raise ConfigError("neither mixup nor cutmix is on", "use no mixing at all, or give one of them a strength")
        if not (0 <= self.prob <= 1 and 0 <= self.switch <= 1):
            raise ConfigError(f"{self} has a probability outside [0, 1]", "use 0 to 1")

    def chosen(self, u: np.ndarray) -> np.ndarray:
        """Return the indices of the images that are mixed, given ``u``, float32 (B, draws) in [0, 1)."""
        return np.flatnonzero(u[:, 0] < self.prob)

    def __call__(self, images: Array, partners: Array, u: np.ndarray) -> tuple[Array, np.ndarray]:
        """Return (mixed, λ), float32 (B, C, H, W) and (B,), of the images that are chosen, with a partner each.

        An image and its λ depend on its partner and its own numbers in ``u`` only. λ is NumPy's, wherever images lie.
        """
        height, width = images.shape[2:]
        coin, uniform, center_y, center_x = np.ascontiguousarray(u.T)  # (B,) each
        switch = self.switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        cut = coin < self.prob * switch
        weight = np.where(cut, beta_quantile(self.cutmix, uniform), beta_quantile(self.mixup, uniform))
        side = np.sqrt(1 - weight)
        outside_y, outside_x = _outside(height, center_y, side), _outside(width, center_x, side)  # (B, H), (B, W)
        inside = (~outside_y).sum(1) * (~outside_x).sum(1)  # pixels, (B,)
        left = (height * width - inside).astype(np.float32) / np.float32(height * width)
        weight = np.where(cut, left, weight)
        there, outside_y, outside_x, cut = packed_to(images, weight, outside_y, outside_x, cut)
        outside = outside_y[:, :, None] | outside_x[:, None, :]  # (B, H, W)
        share = array_module(images).where(cut[:, None, None], outside, there[:, None, None])[:, None]  # (B, 1, H, W)
        return images * share + partners * (1 - share), weight


def _outside(size: int, center: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Tell which of ``size`` pixels, (B, size), lie outside intervals; ``center`` and ``side`` (B,) are shares."""
    first = np.rint((center - side / 2) * np.float32(size))[:, None]
    last = np.rint((center + side / 2) * np.float32(size))[:, None]
    pixel = np.arange(size)
    return (pixel < first) | (pixel >= last)


def beta_quantile(alpha: float, u: np.ndarray) -> np.ndarray:
    """Return the values, float32, below which Beta(``alpha``, ``alpha``) has probability ``u``, float32 in [0, 1).

    ``alpha`` is 0, for all of it at 0 and 1 alike, or between 0.01 and 100.

    So that one random number gives one value: Beta is usually drawn by rejection, which takes any number of them.
    """
    if alpha == 0:
        return (u >= 0.5).astype(np.float32)
    lower = np.minimum(u, 1 - u).astype(np.float64)  # Beta(α, α) is symmetric: half a table will do
    x = np.interp((2 * lower) ** (1 / alpha), *_beta_table(alpha))
    return np.where(u < 0.5, x, 1 - x).astype(np.float32)


@functools.cache
def _beta_table(alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return ((2 F(x))^(1/α), x) at points x from 0 to ½, F the distribution function of Beta(α, α).

    Near 0, F grows as x^α, infinitely steeply if α < 1: its power 1/α, linear there, is what can be interpolated. With
    s = t^α, F(x) = ∫₀ˣ t^(α-1) (1-t)^(α-1) dt / B is ∫ (1 - t)^(α-1) ds / (α B): no pole, and F(½) = ½ gives α B.
    """
    x = np.linspace(0.0, 0.5, 4097)
    s, f = x**alpha, (1 - x) ** (alpha - 1)
    integral = np.concatenate([[0.0], np.cumsum(np.diff(s) * (f[1:] + f[:-1]) / 2)])  # by trapezia
    return (integral / integral[-1]) ** (1 / alpha), x
