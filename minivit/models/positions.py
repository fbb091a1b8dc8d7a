"""Position embeddings on another grid of patches, for images of another size."""

from __future__ import annotations

import numpy as np

from minivit.errors import ShapeError
from minivit.nn.rules import choice

Grid = tuple[int, int]
"""Rows and columns of patches."""


METHODS = ("bicubic", "bicubic-hf", "bilinear", "zoom")
"""How positions can be resized: see :func:`resize_matrix`."""


def resize_positions(
    pos: np.ndarray, old_grid: Grid, new_grid: Grid, prefix: int = 0, method: str = "bicubic"
) -> np.ndarray:
    """Return learned positions (1, T, D) as (1, T', D) for another grid: any rectangle to any rectangle.

    The first ``prefix`` of them belong to no patch (the class token's) and are copied; the others are resized as a
    picture of D channels (Dosovitskiy et al. 2020, section 3.2), along either axis by :func:`resize_matrix`. The same
    grid gives the same bits. Computed in float64, returned in the dtype of ``pos``. Raises ShapeError if ``pos`` is not
    (1, prefix + rows · columns, D).
    """
    (h, w), (new_h, new_w) = old_grid, new_grid
    if pos.ndim != 3 or pos.shape[:2] != (1, prefix + h * w):
        raise ShapeError(
            f"positions of shape {pos.shape} are not those of {h} × {w} patches and {prefix} tokens beside",
            f"give (1, {prefix + h * w}, dim), the tokens beside first, then the patches row by row",
        )
    rows, columns = resize_matrix(h, new_h, method), resize_matrix(w, new_w, method)  # (h', h), (w', w)
    if old_grid == new_grid:
        return pos.copy()
    beside, patches = pos[:, :prefix], pos[0, prefix:].astype(np.float64).reshape(h, w, -1)  # (h·w, D) → (h, w, D)
    # (h', h) and (w', w) on (h, w, D) → (h', w', D)
    patches = np.einsum("ah,bw,hwd->abd", rows, columns, patches, optimize=True)
    patches = patches.reshape(1, new_h * new_w, -1).astype(pos.dtype)  # (h', w', D) → (1, h'·w', D)
    return np.concatenate([beside, patches], axis=1)


def resize_matrix(old: int, new: int, method: str = "bicubic") -> np.ndarray:
    """Return the (new, old) float64 weights that resize a line of ``old`` samples to ``new``; each row sums to 1.

    ``method`` is what one of the systems does that Vision Transformers are trained with:

    - "bicubic": timm's, ``interpolate(mode="bicubic", antialias=True)`` of PyTorch and Pillow's ``BICUBIC``. Sample i
      stands at i + 1/2 ("half-pixel centres"). Keys' cubic with a = -1/2 (Keys 1981, "Cubic convolution interpolation
      for digital image processing", eq. 15), widened by old/new where there are fewer samples than before so that fine
      detail does not alias, cut off at the ends and scaled to sum to 1 there.
    - "bicubic-hf": Hugging Face's, ``interpolate(mode="bicubic")``: Keys' cubic with a = -3/4, never widened; what lies
      beyond an end is the end's sample.
    - "bilinear": timm's for Google's files, ``interpolate(mode="bilinear")``: a triangle in the place of the cubic.
    - "zoom": Google's, ``scipy.ndimage.zoom(order=1)``: a triangle, the first sample on the first, the last on the
      last.

    Raises ConfigError for another method.
    """
    choice(*METHODS)("method", method)
    if method == "bicubic":
        scale = old / new
        centres = (np.arange(new) + 0.5) * scale
        t = np.abs(np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0)  # (new, old)
        weights = _keys(t, -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    if method == "zoom":
        at = np.arange(new) * ((old - 1) / max(new - 1, 1))  # (new,)
    else:
        at = (np.arange(new) + 0.5) * (old / new) - 0.5
    reach = np.floor(at)[:, None] + np.arange(-1, 3)  # (new, 4) samples around each place
    t = np.abs(at[:, None] - reach)
    weights = _keys(t, -0.75) if method == "bicubic-hf" else np.maximum(1.0 - t, 0.0)
    out = np.zeros((new, old))
    np.add.at(out, (np.arange(new)[:, None], np.clip(reach, 0, old - 1).astype(int)), weights)
    return out


def resize_patches(weight: np.ndarray, patch: Grid) -> np.ndarray:
    """Return a patch projection (D, C, P, Q) for patches of another size, (D, C, P', Q').

    The new weights give a patch that was resized by :func:`resize_matrix`, "bicubic", the token that the old ones gave
    it before, exactly if it grew and else as nearly as can be: they are the old ones times the pseudo-inverse of that
    resizing (Beyer et al. 2023, "FlexiViT: one model for all patch sizes", arXiv 2212.08013, section 3.4). Computed in
    float64.
    """
    (p, q), (new_p, new_q) = weight.shape[2:], patch
    rows, columns = (np.linalg.pinv(resize_matrix(*sizes).T) for sizes in ((p, new_p), (q, new_q)))  # (P', P), (Q', Q)
    resized = np.einsum("ap,bq,dcpq->dcab", rows, columns, weight.astype(np.float64), optimize=True)
    return resized.astype(weight.dtype)


def _keys(t: np.ndarray, a: float) -> np.ndarray:
    """Return Keys' cubic, of parameter ``a``, at distances t ≥ 0."""
    near, far = ((a + 2.0) * t - (a + 3.0)) * t * t + 1.0, ((a * t - 5.0 * a) * t + 8.0 * a) * t - 4.0 * a
    return np.where(t < 1.0, near, np.where(t < 2.0, far, 0.0))
