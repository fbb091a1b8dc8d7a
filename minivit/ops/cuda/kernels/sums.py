"""Kernels that sum over columns: see ops/cuda/sums.py."""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, load, store


def columns(rows, R, W):
    """partials (rows, N): sums of the columns of x (M, N), each row those of one program. Grid: (N / W, rows)."""

    @ct.kernel
    def kernel(x, partials):
        j, total = ct.bid(0), ct.zeros((R, W), F32)
        for i in range(ct.bid(1), ct.num_tiles(x, 0, (R, W)), rows):
            total = total + load(x, (i, j), (R, W), tma=False).astype(F32)
        store(partials, (ct.bid(1), j), ct.sum(total, 0, keepdims=True), tma=False)  # (R, W) → (1, W)

    return kernel


def settle(rows, R, W):
    """flat[index[0]] = flat[index[1]] + Σ partials, for each column of partials (rows, N). Grid: (N / W,).

    An index of -1 is outside: nothing is written there, and 0 is read.
    """

    @ct.kernel
    def kernel(partials, index, flat):
        j, total = ct.bid(0), ct.zeros((R, W), F32)
        for i in range(rows // R):
            total = total + load(partials, (i, j), (R, W), tma=False)
        place = load(index, (0, j), (1, W), tma=False).reshape((W,))
        added = load(index, (1, j), (1, W), tma=False).reshape((W,))
        ct.scatter(flat, place, ct.sum(total, 0) + ct.gather(flat, added))  # (R, W) → (W,)

    return kernel
