"""What attention in blocks comes to when the running maximum, the sums or a line of the backward are handled wrongly.

Closed formulas: a score that came in when the maximum was m stands as e^(s - m), and does so for good if not rescaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Array


def scores_of(q: Any, k: Any) -> Any:
    """Return the scores (Tq, Tk)."""
    return q @ ops.swapaxes(k, 0, 1) * q.shape[1] ** -0.5


def in_blocks(function: Callable[[Array], Array], x: Array, block: int) -> Array:
    """Return ``function`` of every block of columns of x (…, Tk), joined."""
    return np.concatenate([function(x[..., a : a + block]) for a in range(0, x.shape[-1], block)], axis=-1)


def own_top(s: Array, block: int) -> Array:
    """Return for every score the largest of its row in its block."""
    return in_blocks(lambda x: np.broadcast_to(x.max(-1, keepdims=True), x.shape), s, block)


def running_top(s: Array, block: int) -> Array:
    """Return for every score the largest of its row in its block and those before."""
    return np.maximum.accumulate(own_top(s, block), axis=-1)


def last_top(s: Array, block: int) -> Array:
    """Return the largest score of the row."""
    return s.max(-1, keepdims=True)


def newest_top(s: Array, block: int) -> Array:
    """Return the largest score of the row in the last block."""
    return own_top(s, block)[:, -1:]


def top_from_zero(s: Array, block: int) -> Array:
    """Return the largest score of the row, or 0 if that is more."""
    return np.maximum(last_top(s, block), 0.0)


def no_top(s: Array, block: int) -> Array:
    """Return 0."""
    return 0.0 * s


Tops = Callable[[Array, int], Array]


def shifted(of_values: Tops, of_sum: Tops, kept: Tops = last_top) -> Callable[..., Any]:
    """Return Σ e^(s - a)·v / Σ e^(s - b) and the logarithm of its denominator, where a and b differ from key to key.

    Where a block's terms are not rescaled the maximum that was known then stays in them; ``kept`` is that at the end.
    """

    def gives(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
        s = scores_of(q, k)
        total = ops.sum(np.exp(s - of_sum(s, block)), -1, True)
        out = (np.exp(s - of_values(s, block)) @ v) / total
        return out, (kept(s, block)[:, -1:] + np.log(total))[:, 0]

    return gives


# ---- and its backward pass -------------------------------------------------------------------------------------------


def from_lines(
    probabilities: Any = lambda s, lse, block: np.exp(s - lse[:, None]),
    inner: Any = lambda p, dp, block: ops.sum(p * dp, -1, True),
    scale: Any = lambda q: q.shape[1] ** -0.5,
    of_scores: Any = lambda q: q.shape[1] ** -0.5,
    keys: Any = lambda k, block: k,
) -> Callable[..., Any]:
    """Return attention's gradients with a line of its backward changed: P, D, 1/√d in two places, the keys in dQ."""

    def gives(g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: int) -> tuple[Any, ...]:
        p = probabilities(q @ k.T * of_scores(q), lse, block)
        dp = g @ v.T
        ds = p * (dp - inner(p, dp, block)) * scale(q)
        return ds @ keys(k, block), ds.T @ q, p.T @ g

    return gives


def inner_of_block(p: Array, dp: Array, block: int) -> Array:
    """Return for every key the sum over its block."""
    return in_blocks(lambda x: np.broadcast_to(x.sum(-1, keepdims=True), x.shape), p * dp, block)


def whole_blocks(x: Array, block: int) -> Array:
    """Return x (Tk, …) with zeros after the last whole block."""
    return x * (np.arange(len(x)) < len(x) // block * block)[:, None]


def last_block(x: Array, block: int) -> Array:
    """Return x (Tk, …) with zeros before the last block."""
    return x * (np.arange(len(x)) >= (len(x) - 1) // block * block)[:, None]


def last_dropped(*args: Any) -> tuple[Any, ...]:
    """Return the gradients of the keys of whole blocks, and what those give to dq."""
    dq, *of_keys = from_lines(keys=whole_blocks)(*args)
    return dq, *(whole_blocks(x, args[-1]) for x in of_keys)
