"""Kernel of dropout and drop path: see ops/dropout.py, and backend/random.py for the numbers."""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, I32, load, store

U64 = ct.uint64
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def wide(x):
    """Return a number, int32 from 0 up, as uint64: (1, 1)."""
    return ct.full((1, 1), x, I32).astype(U64)


def mixed(z):
    """Finalise 64 bits as SplitMix64 does."""
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return z ^ (z >> 31)


def places(row, column, first, N, T, each):
    """Return which number of the key's is whose: one for each element, (R, W), or one for each sample, (R, 1)."""
    if each:
        return (row.astype(U64) + wide(first) * T) * N + column
    return (row // T).astype(U64) + wide(first)


def drop(N, T, each, summed, rows, R, W):
    """y = x·scale where a number in [0, 1) of the key is at least p, 0 elsewhere, of x (M, N), T rows for each sample.

    There is a number for each element, or one for each sample. Its key is ``low + mid 2²² + high 2⁴⁴``, and ``step``
    (1,); ``first`` is the number of the first sample. partials (rows, N), if ``summed``: sums of y's columns.
    Grid: (N / W, rows).
    """

    @ct.kernel
    def kernel(x, step, y, partials, low: int, mid: int, high: int, first: int, p: float, scale: float):
        j, total = ct.bid(0), ct.zeros((R, W), F32)
        seed = mixed(load(step, (0,), (1,), False).reshape((1, 1)) + wide(low) + (wide(mid) << 22) + (wide(high) << 44))
        column = (j * W + ct.arange(W, dtype=I32)[None, :]).astype(U64)
        for i in range(ct.bid(1), ct.num_tiles(x, 0, (R, W)), rows):
            row = i * R + ct.arange(R, dtype=I32)[:, None]
            place = places(row, column, first, N, T, each)
            number = (mixed((place + 1) * GOLDEN + seed) >> 40).astype(I32).astype(F32) * 2.0**-24
            value = load(x, (i, j), (R, W), False).astype(F32) * ct.where(number >= p, scale, 0.0)
            store(y, (i, j), value, False)
            total = total + value
        if summed:
            store(partials, (ct.bid(1), j), ct.sum(total, 0, keepdims=True), False)  # (R, W) → (1, W)

    return kernel
