"""Kernels for the tests of tests/tile.py and of minivit.backend.tile."""

import cuda.tile as ct

from minivit.ops.cuda.kernels import tiles

F32, ZERO = ct.float32, ct.PaddingMode.ZERO


def scale(R, W, by):
    @ct.kernel
    def kernel(x, out, shift: float):
        """out = by x + shift, R rows and W columns at a time."""
        at = ct.bid(1), ct.bid(0)
        tile = ct.load(x, at, (R, W), padding_mode=ZERO).astype(F32)
        ct.store(out, at, (tile * by + shift).astype(out.dtype))

    return kernel


def row_sums(R, W):
    @ct.kernel
    def kernel(x, out):
        """out = sums of the rows of x, at most W long."""
        i = ct.bid(0)
        tile = ct.load(x, (i, 0), (R, W), padding_mode=ZERO).astype(F32)
        ct.store(out, (i,), ct.sum(tile, 1))

    return kernel


def shares(D, R):
    """Written with the helpers of minivit.ops.cuda.kernels.tiles."""
    cut = tiles.pieces(D)

    @ct.kernel
    def kernel(x, weight, out):
        """out = weight x / sum of x's row."""
        rows = tiles.load_rows(x, ct.bid(0), R, cut, tma=False)
        share = tiles.over(1.0, tiles.row_sum(rows))
        weights = tiles.load_vector(weight, cut)
        tiles.store_rows(out, ct.bid(0), tuple(w * r * share for r, w in ct.static_iter(zip(rows, weights))), cut)

    return kernel


# ---- what a kernel must not do: each is refused by tests/tile.py -----------------------------------------------------


def wrong(kind):
    """Return a kernel of (x (R, 8), out (R, 8)) with one mistake."""

    @ct.kernel
    def kernel(x, out):
        i = ct.bid(0)
        tile = ct.load(x, (i, 0), (4, 8), padding_mode=ZERO)
        if kind == "side":
            ct.load(x, (i, 0), (3, 8))
        if kind == "outside":
            ct.load(x, (i + ct.num_blocks(0), 0), (4, 8))
        if kind == "dtype":
            ct.store(out, (i, 0), tile.astype(ct.float16))
            return
        if kind == "half":
            tile = (tile.astype(ct.bfloat16) * 2.0).astype(F32)
        if kind == "mixed":
            tile = tile + tile.astype(ct.float16)
        if kind == "double":
            tile = tile + ct.arange(8, dtype=ct.int32)[None, :] * 0.5
        if kind == "padding":
            tile = ct.load(x, (i, 0), (4, 8))
        if kind == "element":
            tile = tile + tile[0]
        if kind == "changed":
            tile[:] = 0.0
        if kind == "half sum":
            tile = tile + ct.sum(tile.astype(ct.float16), 1, keepdims=True).astype(F32)
        if kind == "product":
            ct.mma(tile, tile.astype(ct.float16).transpose(), ct.zeros((4, 4), F32))
        if kind == "accumulator":
            half = tile.astype(ct.float16)
            ct.mma(half, half.transpose(), ct.zeros((4, 4), ct.float16))
        if kind == "both write":
            ct.store(out, (0, 0), tile)
            return
        if kind == "reads another's":
            ct.store(out, (i, 0), tile)
            tile = ct.load(out, (0, 0), (4, 8))
        if kind == "writes what another reads":
            ct.load(out, (1 - i, 0), (4, 8))
        if kind == "unchecked":
            ct.load(x, (i, 0), (4, 16), check_bounds=False)
        if kind == "scattered twice":
            ct.scatter(out, (ct.arange(2, dtype=ct.int32) * 0 + i * 4, ct.arange(2, dtype=ct.int32) * 0), 1.0)
        ct.store(out, (i, 0), tile)

    return kernel


def picked(n):
    @ct.kernel
    def kernel(x, index, out):
        """out = the rows of x that index names; x (M, n), index (B,), out (B, n)."""
        i = ct.bid(0)
        row = ct.load(index, (i,), (1,)).reshape((1, 1))
        tile = ct.gather(x, (row, ct.arange(n, dtype=ct.int32)[None, :]))
        ct.scatter(out, (i, ct.arange(n, dtype=ct.int32)[None, :]), tile)

    return kernel
