"""Dropout and drop path. Masks are made from a key, in the forward pass and again in the gradient: nothing is kept.

Row i of a batch takes the numbers that belong to row ``key.row + i``, so that a batch worked off in pieces gets the
very masks that it has as a whole.
"""

from __future__ import annotations

import math

from minivit.autograd.op import op
from minivit.backend import Array, Key, device_of, uniform
from minivit.errors import ConfigError


def keep_scale(x: Array, shape: tuple[int, ...], p: float, key: Key) -> Array:
    """Return an array of ``shape``, x's dtype and device: 0 with probability ``p``, else 1/(1 - p)."""
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"a drop probability of {p} is outside [0, 1)", "use 0 to drop nothing")
    keep = uniform(key, shape, start=key.row * math.prod(shape[1:]), device=device_of(x)) >= p
    return keep.astype(x.dtype) * (1.0 / (1.0 - p))


@op()
def dropout(x: Array, p: float, key: Key) -> Array:
    """Return x (B, …) with each element zeroed with probability p, else scaled by 1/(1 - p).

    Srivastava et al. 2014, "Dropout", section 10 (the inverted form). Equal keys give equal masks.
    Twins: ops/cuda/dropout.py.
    """
    return x * keep_scale(x, x.shape, p, key)


dropout.vjps(lambda g, out, x, p, key: dropout(g, p, key))


@op()
def drop_path(x: Array, p: float, key: Key) -> Array:
    """Return x (B, …) with each sample's whole branch zeroed with probability p, else scaled by 1/(1 - p).

    Huang et al. 2016, "Deep networks with stochastic depth", arXiv 1603.09382, section 3.
    Twins: ops/cpu/dropout.py, ops/cuda/dropout.py.
    """
    return x * keep_scale(x, (x.shape[0], *[1] * (x.ndim - 1)), p, key)


drop_path.vjps(lambda g, out, x, p, key: drop_path(g, p, key))
