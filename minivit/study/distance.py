"""Mean attention distance: over how many pixels a head gathers what it mixes."""

from __future__ import annotations

import numpy as np

from minivit.models.trace import Trace
from minivit.study.asking import attention_of, patch_embed


def attention_distance(trace: Trace) -> np.ndarray:
    """Return the mean attention distance of every head, in pixels: (L, H), float64.

    For a query patch i it is Σ_j P_ij·dist(i, j) / Σ_j P_ij over the patches j, where dist is that of the patches'
    centres; then the mean over queries and images (Dosovitskiy et al. 2020, 2010.11929, figure 7 right and appendix
    D.7). The class token stands nowhere in the image: it is left out as a query and as a key, and a row's rest is
    divided by its sum. Without the division, as some have it, a head that looks at its class token would seem to look
    near. NaN for a head whose patches attend to no patch.
    """
    sums, counts = distance_sums(trace)
    return over_counts(sums, counts)


def distance_sums(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the distances over queries and images, and how many there are: both (L, H).

    Those of several batches add up. A query that attends to no patch does not count.
    """
    attention = attention_of(trace)
    away = patch_distances(trace.grid, patch_embed(trace.model).patch_size)  # (N, N)
    sums, counts = np.zeros((2, len(attention), attention[0].shape[1]))
    for layer, p in enumerate(attention):
        of_patches = p[..., trace.prefix :, trace.prefix :]  # (B, H, T, T) → (B, H, N, N)
        total = of_patches.sum(axis=-1, dtype=np.float64)  # → (B, H, N)
        distance = np.einsum("bhij,ij->bhi", of_patches, away, dtype=np.float64, casting="same_kind")
        counted = total > 0
        sums[layer] = np.divide(distance, total, out=np.zeros_like(total), where=counted).sum(axis=(0, 2))
        counts[layer] = counted.sum(axis=(0, 2))
    return sums, counts


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Return the distances between the centres of the patches of a grid, row by row, in pixels: (N, N), float64."""
    rows, columns = np.indices(grid, dtype=np.float64)
    at = np.stack([rows.ravel() * patch[0], columns.ravel() * patch[1]], axis=-1)  # (N, 2)
    return np.sqrt(np.square(at[:, None] - at).sum(axis=-1))


def over_counts(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return sums / counts, NaN where nothing was counted."""
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
