"""The twin of :mod:`minivit.ops.dropout`'s drop_path."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.backend import Key
from minivit.ops.dropout import drop_path, keep_scale


@drop_path.twin("cpu")
def _(x: np.ndarray, p: float, key: Key) -> Any:
    scale = keep_scale(x, (x.shape[0], *[1] * (x.ndim - 1)), p, key)
    return x * scale, scale  # a number a sample: cheaper to keep than to draw again


@drop_path.twin("cpu").vjp
def _(g: np.ndarray, kept: np.ndarray, needs: tuple[bool, ...]) -> Any:
    return (g * kept,)
