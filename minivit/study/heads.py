"""What kind of heads there are: how sharply each looks, and how much the logit needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import to_numpy
from minivit.models.trace import Trace
from minivit.study.asking import attention_of, gradient_of
from minivit.study.distance import over_counts


class Entropy(NamedTuple):
    """How sharply heads look: ``bits`` (L, H), float64, and the ``largest`` that there can be."""

    bits: np.ndarray
    largest: float


def entropy(trace: Trace) -> Entropy:
    """Return -Σ_j P_ij·log₂ P_ij of every head, the mean over queries i and images, in bits.

    0: every token looks at one only; log₂ T, the largest: at all alike. With a mask the largest is the mean of log₂ of
    how many tokens each may attend to; one that attends to none does not count. NaN for a head where none does.
    """
    return Entropy(over_counts(*entropy_sums(trace)), largest_entropy(trace))


def entropy_sums(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the entropies over queries and images, and how many there are: both (L, H)."""
    attention = attention_of(trace)
    sums, counts = np.zeros((2, len(attention), attention[0].shape[1]))
    for layer, p in enumerate(attention):
        p = p.astype(np.float64)
        bits = p * np.log2(p, out=np.zeros_like(p), where=p > 0)  # 0·log 0 is 0
        sums[layer] = 0.0 - bits.sum(axis=(0, 2, 3))  # (B, H, T, T) → (H,)
        counts[layer] = (p.sum(axis=-1) > 0).sum(axis=(0, 2))
    return sums, counts


def largest_entropy(trace: Trace) -> float:
    """Return the entropy of heads that look at all tokens alike, in bits."""
    tokens = trace.tokens[0].shape[1]
    if trace.mask is None:
        return float(np.log2(tokens))
    allowed = tokens - to_numpy(trace.mask).sum(axis=-1)
    return float(np.log2(allowed[allowed > 0]).mean()) if allowed.any() else 0.0


def head_importance(trace: Trace, gradient: Sequence[Any]) -> np.ndarray:
    """Return |Σ_ij dP_ij·P_ij| of every head, the mean over images: (L, H), float64.

    It estimates how much s would change without the head (Michel, Levy, Neubig 2019, 1905.10650, eq. 2: the sum equals
    that of dO ∘ O, O = P·V). They take the loss for s, the mean over many images, and divide each layer by its norm,
    which is left to the reader here. ``gradient`` is dP, of :func:`attention_gradient`.
    """
    return importance_sums(trace, gradient) / trace.logits.shape[0]


def importance_sums(trace: Trace, gradient: Sequence[Any]) -> np.ndarray:
    """Return the sum of the importances over the images, (L, H): those of several batches add up."""
    pairs = zip(gradient_of(trace, gradient), attention_of(trace), strict=True)
    each = [np.einsum("bhij,bhij->bh", g, p, dtype=np.float64, casting="same_kind") for g, p in pairs]
    return np.abs(each).sum(axis=1)  # (L, B, H) → (L, H)
