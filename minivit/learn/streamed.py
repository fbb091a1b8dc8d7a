"""What a softmax that is computed in blocks comes to when its running maximum or its sums are handled wrongly.

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
