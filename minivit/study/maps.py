"""Maps of a trace over the image: attention, and the gradient that flows through it, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.errors import ShapeError
from minivit.models.trace import Trace
from minivit.study.asking import attention_of, check_trace, gradient_of, reads_class_token, token_weights, values


def patch_map(trace: Trace, matrix: Any) -> np.ndarray:
    """Return what the model reads of a matrix over tokens (…, T, T), as a map over the image: (…, rows, columns).

    Of a model that reads its class token that is the class token's row, of one that reads all patches the mean of
    their rows, of one that weighs its patches (a CCT, whose matrices are (B, …, T, T) then) their rows so weighed; in
    all the patches' columns. This is the one place that says so.
    """
    check_trace(trace)
    matrix, tokens = values(matrix, "a matrix over the tokens"), trace.tokens[0].shape[1]
    if matrix.shape[-2:] != (tokens, tokens):
        raise ShapeError(f"a matrix of shape {matrix.shape} over {tokens} tokens", f"give (…, {tokens}, {tokens})")
    first, weights = trace.prefix, token_weights(trace)
    if weights is not None:
        if matrix.ndim < 3 or matrix.shape[0] != len(weights):
            what = f"a matrix of shape {matrix.shape}, and tokens that each of {len(weights)} images weighs itself"
            raise ShapeError(what, f"give ({len(weights)}, …, {tokens}, {tokens})")
        weights = weights.reshape(len(weights), *[1] * (matrix.ndim - 2), -1)  # (B, 1, N) → (B, …, 1, N)
        return (weights @ matrix).reshape(*matrix.shape[:-2], *trace.grid)  # → (B, …, 1, N) → (B, …, rows, columns)
    rows = matrix[..., :1, first:] if reads_class_token(trace) else matrix[..., first:, first:]
    return rows.mean(axis=-2).reshape(*matrix.shape[:-2], *trace.grid)  # (…, N) → (…, rows, columns)


def class_attention(trace: Trace) -> list[np.ndarray]:
    """Return what is attended to in every block by every head, as the model reads it: (B, H, rows, columns) each.

    The class token's row of P without its own column, so that a map's sum is what goes to the patches; without a class
    token the mean over the patches' rows, as :func:`patch_map` says. (The figures 6 and 14 of Dosovitskiy et al. 2020,
    2010.11929, are no single layer's attention: by appendix D.8 they show :func:`rollout`.)
    """
    return [patch_map(trace, p) for p in attention_of(trace)]


def gradient_attention(trace: Trace, gradient: Sequence[Any]) -> list[np.ndarray]:
    """Return dP ∘ P of every block, signed, (B, H, T, T): what P contributes to s, to first order.

    Were P_ij 0, and nothing else of P another, s would be lower by about that much. ``gradient`` is dP, of
    :func:`attention_gradient`.
    """
    return [g * p for g, p in zip(gradient_of(trace, gradient), attention_of(trace), strict=True)]
