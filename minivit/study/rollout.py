"""Attention followed through all layers: rollout, relevance, LeGrad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.errors import unknown_name
from minivit.models.trace import Trace
from minivit.study.asking import attention_of, gradient_of
from minivit.study.maps import gradient_attention

FUSES: dict[str, Any] = {"mean": np.mean, "max": np.max, "min": np.min}
"""How heads become one."""


def rollout(trace: Trace, fuse: str = "mean") -> np.ndarray:
    """Return how much of every token's attention goes to which input, through all layers: (B, T, T), float64.

    R starts as I, and from the first layer to the last R ← A·R, where A is the mean (``fuse``: or max, or min) of P
    over the heads, plus I for the residual connection, with each row divided by its sum (Abnar and Zuidema 2020,
    2005.00928, section 3; max and min are variants of others). Rows of R sum to 1. With the mean, figures 6 and
    14 of Dosovitskiy et al. 2020, 2010.11929, show its class token's row (appendix D.8).
    """
    if fuse not in list(FUSES):
        raise unknown_name("way to fuse heads", fuse, FUSES)
    rolled: Any = None
    for p in attention_of(trace):
        a = FUSES[fuse](p.astype(np.float64), axis=1) + np.eye(p.shape[-1])  # (B, H, T, T) → (B, T, T)
        a /= a.sum(axis=-1, keepdims=True)  # each row by its own sum
        rolled = a if rolled is None else a @ rolled
    return rolled


def relevance(trace: Trace, gradient: Sequence[Any]) -> np.ndarray:
    """Return the relevance of every input token to every output token for s: (B, T, T), float64.

    R starts as I, and from the first layer to the last R ← R + mean_h((dP ∘ P)⁺)·R (Chefer, Gur, Wolf 2021,
    2103.15679, eq. 5 and 6). ``gradient`` is dP, of :func:`attention_gradient`.
    """
    rolled: Any = None
    for product in gradient_attention(trace, gradient):
        a = np.maximum(product, 0).mean(axis=1, dtype=np.float64)  # (B, H, T, T) → (B, T, T)
        rolled = np.eye(a.shape[-1]) + a if rolled is None else rolled + a @ rolled
    return rolled


def legrad(trace: Trace, gradient: Sequence[Any]) -> np.ndarray:
    """Return the mean over layers, heads and queries of (dP)⁺, over the image: (B, rows, columns), float64.

    LeGrad (Bousselham et al. 2024, 2404.03214, section 3) follows in every layer the logit that the head would give to
    that layer's own tokens: ``gradient`` is :func:`lens_gradient`'s then. With :func:`attention_gradient`'s it follows
    the model's logit.
    """
    parts = [np.maximum(g, 0).mean(axis=(1, 2), dtype=np.float64) for g in gradient_of(trace, gradient)]  # → (B, T)
    over = np.mean(parts, axis=0)[:, trace.prefix :]  # (B, T) → (B, N)
    return over.reshape(-1, *trace.grid)  # → (B, rows, columns)
