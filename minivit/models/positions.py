"""Position embeddings on another grid of patches, for images of another size."""

from __future__ import annotations

import numpy as np

from minivit.errors import ShapeError

Grid = tuple[int, int]
"""Rows and columns of patches."""


def resize_positions(pos: np.ndarray, old_grid: Grid, new_grid: Grid, prefix: int = 0) -> np.ndarray:
    """Return learned positions (1, T, D) as (1, T', D) for another grid: any rectangle to any rectangle.

    The first ``prefix`` of them belong to no patch (the class token's) and are copied; the others are resized as a
    picture of D channels (Dosovitskiy et al. 2020, section 3.2), bicubic and antialiased as timm does. The same grid
    gives the same bits. Computed in float64, returned in the dtype of ``pos``. Raises ShapeError if ``pos`` is not
    (1, prefix + rows · columns, D).
    """
    (h, w), (new_h, new_w) = old_grid, new_grid
    if pos.ndim != 3 or pos.shape[:2] != (1, prefix + h * w):
        raise ShapeError(
            f"positions of shape {pos.shape} are not those of {h} × {w} patches and {prefix} tokens beside",
            f"give (1, {prefix + h * w}, dim), the tokens beside first, then the patches row by row",
        )
    if old_grid == new_grid:
        return pos.copy()
    beside, patches = pos[:, :prefix], pos[0, prefix:].astype(np.float64).reshape(h, w, -1)  # (h·w, D) → (h, w, D)
    # (h', h) and (w', w) on (h, w, D) → (h', w', D)
    patches = np.einsum("ah,bw,hwd->abd", resize_matrix(h, new_h), resize_matrix(w, new_w), patches, optimize=True)
    patches = patches.reshape(1, new_h * new_w, -1).astype(pos.dtype)  # (h', w', D) → (1, h'·w', D)
    return np.concatenate([beside, patches], axis=1)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Return the (new, old) float64 weights that resize a line of ``old`` samples to ``new``; each row sums to 1.

    Sample i stands at i + 1/2 ("half-pixel centres"). The filter is Keys' cubic with a = -1/2 (Keys 1981, "Cubic
    convolution interpolation for digital image processing", eq. 15), widened by old/new where there are fewer samples
    than before so that fine detail does not alias, cut off at the ends and scaled to sum to 1 there: PyTorch's
    ``interpolate(mode="bicubic", antialias=True)`` and Pillow's ``BICUBIC``.
    """
    scale = old / new
    centres = (np.arange(new) + 0.5) * scale
    t = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)  # (new, old)
    near, far = (1.5 * t - 2.5) * t * t + 1.0, ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    weights = np.where(t < 1.0, near, np.where(t < 2.0, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)
