"""What kernels share: reading and writing tiles, lengths cut into pieces, sums over the pieces of a row.

A tile's sides are powers of two. A length that is none is cut into pieces that are: 197 = 128 + 64 + 16 (the last one
reaches beyond the end: what it reads there is zero, what it writes there is dropped). A row is then a tuple of tiles,
one for each piece.
"""

import cuda.tile as ct

F32, I32 = ct.float32, ct.int32
LOG2E, LN2 = 1.4426950408889634, 0.6931471805599453  # e^x = 2^(x log2 e)


def pieces(n, least=1):
    """Cut a length into descending powers of two, at least ``least``: ((size, index in units of that size), …).

    pieces(192) = ((128, 0), (64, 2)); pieces(197, 16) = ((128, 0), (64, 2), (16, 12)).
    """
    cut, start = [], 0
    while start < n:
        size = max(least, 1 << ((n - start).bit_length() - 1))
        cut.append((size, start // size))
        start += size
    return tuple(cut)


def power(n):
    """Return the least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def load(x, index, shape, tma=None):
    """Return the tile of x at ``index``, counted in tiles of ``shape``; beyond the end of x it is zero.

    ``tma=False`` keeps the copy engine (Hopper's TMA) out of it: kernels that stream through memory are faster without.
    """
    return ct.load(x, index, shape, padding_mode=ct.PaddingMode.ZERO, allow_tma=tma)


def number(x):
    """Return the one number in an array (1,), as float32."""
    return load(x, (0,), (1,), tma=False).astype(F32)


def store(x, index, tile, tma=None):
    """Write a tile to x at ``index``, as x's dtype; what lies beyond the end of x is dropped."""
    ct.store(x, index, tile.astype(x.dtype), allow_tma=tma)


def load_rows(x, i, rows, cut, tma=None):
    """Return tile-row i of x (M, D) as float32: a tuple of (rows, piece of D), one for each piece."""
    return tuple(load(x, (i, j), (rows, n), tma).astype(F32) for n, j in ct.static_iter(cut))


def store_rows(x, i, tiles, cut, tma=None):
    """Write a tuple of (rows, piece of D) to tile-row i of x (M, D), as x's dtype."""
    for tile, (_, j) in ct.static_iter(zip(tiles, cut)):
        store(x, (i, j), tile, tma)


def load_vector(x, cut, tma=None):
    """Return a vector x (D,) as float32: a tuple of (1, piece of D)."""
    return tuple(load(x, (j,), (n,), tma).astype(F32).reshape((1, n)) for n, j in ct.static_iter(cut))


def row_sum(tiles):
    """Return the sums of rows that are cut into pieces: (rows, piece), … → (rows, 1)."""
    total = ct.sum(tiles[0], 1, keepdims=True)
    for tile in ct.static_iter(tiles[1:]):
        total = total + ct.sum(tile, 1, keepdims=True)
    return total


def row_max(tiles):
    """Return the largest of rows that are cut into pieces: (rows, piece), … → (rows, 1)."""
    top = ct.max(tiles[0], 1, keepdims=True)
    for tile in ct.static_iter(tiles[1:]):
        top = ct.maximum(top, ct.max(tile, 1, keepdims=True))
    return top


def over(a, b):
    """Return a / b by the fast reciprocal, to 2 ulp."""
    return ct.truediv(a, b, rounding_mode=ct.RoundingMode.APPROX, flush_to_zero=True)
