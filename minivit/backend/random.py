"""Random numbers by counting: a :class:`Key` and a position give a number, with no hidden state.

They are made in integer arithmetic, which has the same bits on both backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from minivit.backend.devices import Array, array_module, gpu, is_array, on_device_of, resolve_device
from minivit.errors import ConfigError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """Finalise 64 bits as SplitMix64 does (Steele, Lea, Flood 2014, "Fast splittable … generators")."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Key:
    """Names one stream of random numbers, and where in it to begin. Equal keys give equal numbers, on every backend.

    ``stream`` tells independent users apart (initialisation, shuffling, one dropout layer and the next); ``step`` is
    the training step. Nothing advances by itself: to get fresh numbers, use another step or another stream.

    ``row`` says that row 0 of the batches worked on under this key is that row of a larger batch. Operations that drop
    (:func:`minivit.ops.dropout`, ``drop_path``, ``attention``) give row i the numbers of row ``row + i``, so that a
    batch in pieces gets the masks that it has as a whole. It is no part of the stream: :func:`random_bits` and its
    like, whose numbers belong to no batch, do not look at it.

    ``step`` may be a 0-d uint64 array on a GPU, for work that is recorded once and run in many steps: then so are the
    :meth:`bits`.
    """

    seed: int
    stream: int = 0
    step: Any = 0
    row: int = 0

    def child(self, stream: int) -> Key:
        """Return the key of the ``stream``-th user under this one, at the same step and row."""
        return Key(self.seed, _mix((self.stream * _GOLDEN + stream + 1) & _MASK), self.step, self.row)

    def at(self, step: Any) -> Key:
        """Return the same stream's key at another step, and the same row."""
        return Key(self.seed, self.stream, step, self.row)

    def at_row(self, row: int) -> Key:
        """Return the same stream's key for a batch that begins at another row; ConfigError for one that cannot be."""
        if not (isinstance(row, Integral) and 0 <= row < 1 << 40):
            raise ConfigError(f"a batch begins at row {row!r}", "rows are whole numbers from 0 up, below 2⁴⁰")
        return Key(self.seed, self.stream, self.step, row)

    def base(self) -> int:
        """Return the 64 bits of seed and stream: the step is added to them."""
        z = 0
        for part in (self.seed, self.stream):
            z = _mix((z + (part & _MASK) + _GOLDEN) & _MASK)
        return (z + _GOLDEN) & _MASK

    def bits(self) -> Any:
        """Return the 64 bits that start the counter: of seed, stream and step."""
        z = self.base()
        if is_array(self.step):
            xp = array_module(self.step)
            return _mixed(xp, self.step + xp.uint64(z))
        return _mix((z + (self.step & _MASK)) & _MASK)


def random_bits(key: Key, shape: tuple[int, ...], *, start: int = 0, device: str = "cpu") -> Array:
    """Return uint32 random bits of ``shape``; element i (in C order) depends on ``key`` and ``start + i`` only.

    So rows can be made apart: ``start=row * row_size`` gives the very numbers that the whole array has there.
    """
    return _generate(key, shape, start, device, "uint32", lambda bits: bits)


def uniform(key: Key, shape: tuple[int, ...], *, start: int = 0, device: str = "cpu") -> Array:
    """Return float32 uniform numbers in [0, 1), multiples of 2⁻²⁴."""
    return _generate(key, shape, start, device, "float32", _unit_interval)


def uniform_rows(key: Key, rows: Array, width: int) -> Array:
    """Return ``uniform(key, (n, width))[rows]``, float32 (len(rows), width), without making the other rows.

    It is made where ``rows``, integers (n,), lie.
    """
    xp = array_module(rows)
    with on_device_of(rows):
        places = xp.uint64(width) * rows.astype(xp.uint64)[:, None] + xp.arange(1, width + 1, dtype=xp.uint64)
        return _unit_interval(_splitmix_at(xp, key.bits(), places))  # (rows, width)


def uniform_at(key: Key, places: Array) -> Array:
    """Return the numbers, float32, that ``uniform(key, (n,))`` has at ``places``, integers of any shape.

    ``key.step`` may be an array of steps, uint64, beside ``places`` and broadcast with them: a stream for each.
    """
    xp = array_module(places)
    with on_device_of(places):
        z = places.astype(xp.uint64)
        z += xp.uint64(1)
        return _unit_interval(_splitmix_at(xp, key.bits(), z))


def _unit_interval(bits: Array) -> Array:
    return (bits >> 8).astype("float32") * 2.0**-24


def _generate(
    key: Key, shape: tuple[int, ...], start: int, device: str, dtype: str, finish: Callable[[Array], Array]
) -> Array:
    size, device = math.prod(shape), resolve_device(device)
    if device == "cpu":
        out = np.empty(size, dtype)
        for a in range(0, size, 1 << 14):  # in pieces that stay in the cache: eight times faster for large arrays
            b = min(a + (1 << 14), size)
            out[a:b] = finish(_splitmix(np, key.bits(), start + a, b - a))
        return out.reshape(shape)
    import cupy

    with gpu(device):
        return finish(_splitmix(cupy, key.bits(), start, size)).reshape(shape)


def _splitmix(xp: Any, seed: Any, start: int, size: int) -> Array:
    return _splitmix_at(xp, seed, xp.arange(start + 1, start + size + 1, dtype=xp.uint64))


def _splitmix_at(xp: Any, seed: Any, z: Array) -> Array:
    """Return the uint32 bits at the places ``z``, uint64 from 1, which is written over."""
    z *= xp.uint64(_GOLDEN)
    z += xp.uint64(seed) if isinstance(seed, int) else seed
    return (_mixed(xp, z) >> xp.uint64(32)).astype(xp.uint32)


def _mixed(xp: Any, z: Array) -> Array:
    """Finalise uint64 numbers as :func:`_mix` does one, in place."""
    z ^= z >> xp.uint64(30)
    z *= xp.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> xp.uint64(27)
    z *= xp.uint64(0x94D049BB133111EB)
    z ^= z >> xp.uint64(31)
    return z


def normal(key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Return float64 standard normal numbers (Box and Muller 1958).

    Always made on the CPU, because log and cos differ in their last bit between libraries; the caller moves them.
    """
    u1 = (random_bits(key.child(0), shape) + 1.0) * 2.0**-32  # in (0, 1]: its logarithm is finite
    u2 = random_bits(key.child(1), shape) * 2.0**-32
    return np.asarray(np.sqrt(-2.0 * np.log(u1)) * np.cos(2.0 * np.pi * u2))


def permutation(key: Key, n: int) -> np.ndarray:
    """Return a random order of 0 … n-1 as int64 (on the CPU: it indexes data that lies there)."""
    high = random_bits(key.child(0), (n,)).astype(np.uint64) << np.uint64(32)
    return np.argsort(high | random_bits(key.child(1), (n,)), kind="stable")
