"""Initial values, float32, drawn from the thread's random key (:mod:`minivit.nn.random`)."""

from __future__ import annotations

import numpy as np

from minivit import backend
from minivit.nn.random import next_key


def zeros(*shape: int) -> np.ndarray:
    """Return zeros."""
    return np.zeros(shape, np.float32)


def ones(*shape: int) -> np.ndarray:
    """Return ones."""
    return np.ones(shape, np.float32)


def normal(*shape: int, std: float) -> np.ndarray:
    """Return normal numbers of mean 0 and standard deviation ``std``."""
    return (backend.normal(next_key(), shape) * std).astype(np.float32)


def xavier_uniform(fan_out: int, fan_in: int) -> np.ndarray:
    """Return a (fan_out, fan_in) matrix, uniform in ±√(6/(fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16)."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return (backend.uniform(next_key(), (fan_out, fan_in)) * 2.0 - 1.0) * np.float32(bound)


def xavier_uniform_qkv(fan_out: int, fan_in: int) -> np.ndarray:
    """Return three Xavier-uniform matrices under each other: queries, keys and values are projections of their own."""
    return np.concatenate([xavier_uniform(fan_out // 3, fan_in) for _ in range(3)])


def lecun_normal(fan_out: int, fan_in: int) -> np.ndarray:
    """Return a (fan_out, fan_in) matrix of normal numbers cut off at two deviations, of variance 1/fan_in."""
    key = next_key()
    x = backend.normal(key.child(0), (fan_out, fan_in))
    attempt = 1
    while (outside := np.abs(x) > 2.0).any():  # draw those outside again
        x = np.where(outside, backend.normal(key.child(attempt), x.shape), x)
        attempt += 1
    return (x * (fan_in**-0.5 / 0.87962566103423978)).astype(np.float32)  # the deviation that cutting leaves
