"""Initial values, float32, drawn from the thread's random key (:mod:`minivit.nn.random`).

Inside ``with outlining():`` they are outlines: a model made there has all its layers, and no numbers. Inside ``with
undrawn():`` those that would be drawn are zeros, for a model that gets its numbers from a file.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minivit import backend
from minivit.backend.outline import stretched
from minivit.errors import ConfigError
from minivit.nn.random import next_key


class _Outlining(NamedTuple):
    most: int | None
    drawn: list[tuple[int, ...]]


class _Now(threading.local):
    outlining: _Outlining | None = None
    undrawn: bool = False


_now = _Now()


@contextlib.contextmanager
def outlining(most: int | None = None) -> Iterator[None]:
    """Give outlines (:mod:`minivit.backend.outline`) for initial values in this block, in this thread.

    Raises ConfigError where more than ``most`` are drawn.
    """
    before, _now.outlining = _now.outlining, _Outlining(most, [])
    try:
        yield
    finally:
        _now.outlining = before


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Give zeros for random initial values in this block, in this thread: no time, and no memory until they are set."""
    before, _now.undrawn = _now.undrawn, True
    try:
        yield
    finally:
        _now.undrawn = before


def is_undrawn() -> bool:
    """Tell whether random initial values are zeros here and now."""
    return _now.undrawn


def outlined() -> bool:
    """Tell whether initial values are outlines here and now."""
    return _now.outlining is not None


def _drawn(
    shape_of: Callable[..., tuple[int, ...]],
) -> Callable[[Callable[..., np.ndarray]], Callable[..., np.ndarray]]:
    """Make a function of initial values give outlines, of the shape ``shape_of(*arguments)``, while outlining."""

    def decorate(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        @functools.wraps(make)
        def draw(*args: Any, **settings: Any) -> np.ndarray:
            if (now := _now.outlining) is None:
                return make(*args, **settings)
            now.drawn.append(shape_of(*args))
            if now.most is not None and len(now.drawn) > now.most:
                raise ConfigError(f"the model has more than {now.most} arrays", "use a smaller one")
            return stretched(now.drawn[-1])

        return draw

    return decorate


_of_shape = _drawn(lambda *shape: shape)


def _random(make: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Make a function of random initial values give zeros inside :func:`undrawn`."""

    @functools.wraps(make)
    def draw(*shape: int, **settings: Any) -> np.ndarray:
        return np.zeros(shape, np.float32) if _now.undrawn else make(*shape, **settings)

    return _of_shape(draw)


@_of_shape
def zeros(*shape: int) -> np.ndarray:
    """Return zeros."""
    return np.zeros(shape, np.float32)


@_of_shape
def ones(*shape: int) -> np.ndarray:
    """Return ones."""
    return np.ones(shape, np.float32)


@_random
def normal(*shape: int, std: float) -> np.ndarray:
    """Return normal numbers of mean 0 and standard deviation ``std``."""
    return (backend.normal(next_key(), shape) * std).astype(np.float32)


@_random
def xavier_uniform(fan_out: int, fan_in: int) -> np.ndarray:
    """Return a (fan_out, fan_in) matrix, uniform in ±√(6/(fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16)."""
    bound = (6.0 / (fan_in + fan_out)) ** 0.5
    return (backend.uniform(next_key(), (fan_out, fan_in)) * 2.0 - 1.0) * np.float32(bound)


@_random
def xavier_uniform_qkv(fan_out: int, fan_in: int) -> np.ndarray:
    """Return three Xavier-uniform matrices under each other: queries, keys and values are projections of their own."""
    return np.concatenate([xavier_uniform(fan_out // 3, fan_in) for _ in range(3)])


@_of_shape
def xavier_uniform_pair(fan_out: int, fan_in: int) -> np.ndarray:
    """Return two Xavier-uniform matrices under each other: a gate and what it lets through, or keys and values."""
    return np.concatenate([xavier_uniform(fan_out // 2, fan_in) for _ in range(2)])


def mimetic_pair(dim: int, rank: int, identity: float) -> tuple[np.ndarray, np.ndarray]:
    """Return A (dim, rank) and B (rank, dim), whose product is like |c|·Z + c·I, with Z normal of variance 1/dim.

    Trained attention looks so: queries and keys multiply to about a positive identity, values and projection to about
    a negative one (Trockman and Kolter 2023, "Mimetic initialization of self-attention layers", arXiv 2305.09828,
    section 4). ``identity`` is c. A and B share the largest ``rank`` singular values evenly; ConfigError if rank > dim.
    """
    if rank > dim:
        raise ConfigError(f"heads of {rank} numbers in all, more than dim {dim}", "use fewer, or the paper's weights")
    product = abs(identity) * backend.normal(next_key(), (dim, dim)) * dim**-0.5 + identity * np.eye(dim)
    u, s, vt = np.linalg.svd(product)
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * vt[:rank]).astype(np.float32)


@_drawn(lambda grid, dim: (grid[0] * grid[1], dim))
def sincos_2d(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Return positions (h·w, dim): sines and cosines of a patch's column and row, at dim/4 wavelengths of 2π to 2π·10⁴.

    Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", section 2. Raises ConfigError unless 4 divides dim.
    """
    if dim % 4 or dim < 8:
        raise ConfigError(f"dim {dim} cannot hold sines and cosines of two axes", "choose a multiple of 4, at least 8")
    waves = 10_000.0 ** -np.linspace(0.0, 1.0, dim // 4)  # (dim/4,)
    y, x = np.indices(grid).reshape(2, -1, 1)  # (h·w, 1) each
    return np.concatenate([f(axis * waves) for axis in (x, y) for f in (np.sin, np.cos)], axis=1).astype(np.float32)


@_drawn(lambda positions, dim: (positions, dim))
def sincos_1d(positions: int, dim: int) -> np.ndarray:
    """Return (positions, dim): sin(t/10⁴^(2i/dim)) of place t at number 2i, and its cosine at 2i + 1.

    Vaswani et al. 2017, arXiv 1706.03762, section 3.5. Raises ConfigError unless dim is even.
    """
    if dim % 2:
        raise ConfigError(f"dim {dim} cannot hold a cosine for every sine", "choose an even one")
    angles = np.arange(positions)[:, None] * 10_000.0 ** -(np.arange(0, dim, 2) / dim)  # (positions, dim/2)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(positions, dim).astype(np.float32)


@_random
def lecun_normal(fan_out: int, fan_in: int) -> np.ndarray:
    """Return a (fan_out, fan_in) matrix of normal numbers cut off at two deviations, of variance 1/fan_in."""
    key = next_key()
    x = backend.normal(key.child(0), (fan_out, fan_in))
    attempt = 1
    while (outside := np.abs(x) > 2.0).any():  # draw those outside again
        x = np.where(outside, backend.normal(key.child(attempt), x.shape), x)
        attempt += 1
    return (x * (fan_in**-0.5 / 0.87962566103423978)).astype(np.float32)  # the deviation that cutting leaves


@_of_shape
def he_normal(fan_out: int, fan_in: int) -> np.ndarray:
    """Return a (fan_out, fan_in) matrix of normal numbers of variance 2/fan_in (He et al. 2015, section 2.2).

    For a layer before a ReLU, which halves the variance. Source: arXiv 1502.01852.
    """
    return (backend.normal(next_key(), (fan_out, fan_in)) * (2.0 / fan_in) ** 0.5).astype(np.float32)
