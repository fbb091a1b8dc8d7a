"""Numbers as colours that colour-blind people can tell apart, too: by lightness, or of two signs by blue and orange."""

from __future__ import annotations

import numpy as np

HEAT = np.array([(13, 8, 50), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 245, 160)], np.float64)
"""Stops of a colour map whose lightness rises evenly from almost black over violet and orange to pale yellow."""

SIGNED = np.array(
    [(8, 48, 107), (33, 113, 181), (146, 197, 222), (247, 247, 247), (253, 190, 120), (217, 95, 14), (127, 39, 4)],
    np.float64,
)
"""Stops of a colour map from dark blue, for -1, over almost white, for 0, to dark orange, for 1."""


def heat(values: np.ndarray) -> np.ndarray:
    """Return the colours, uint8 (…, 3), of ``values`` (…) in [0, 1]."""
    return _between(HEAT, values)


def signed(values: np.ndarray) -> np.ndarray:
    """Return the colours, uint8 (…, 3), of ``values`` (…) in [-1, 1]."""
    return _between(SIGNED, (np.asarray(values) + 1) / 2)


def _between(stops: np.ndarray, values: np.ndarray) -> np.ndarray:
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(values, places, stops[:, i]) for i in range(3)], axis=-1).round().astype(np.uint8)
