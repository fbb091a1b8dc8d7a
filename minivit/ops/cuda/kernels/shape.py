"""Kernels of patchify and embed_tokens: see ops/shape.py for what they do."""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, load, power, store


def patchify(R, P, Q, across):
    """Images (B, C, H/P, P, across, Q), a row of patches of R images at a time. Grid: (B / R, H / P, C)."""
    shape = (R, 1, 1, power(P), power(across), power(Q))

    @ct.kernel
    def kernel(images, patches):
        b, i, c = ct.bid(0), ct.bid(1), ct.bid(2)
        x = load(images, (b, c, i, 0, 0, 0), shape, False)  # (R, 1, 1, P, across, Q)
        store(patches, (b, i, 0, c, 0, 0), x.permute((0, 2, 4, 1, 3, 5)), False)  # → (R, 1, across, 1, P, Q)

    return kernel


def embed_forward(R, W, has_cls, has_positions):
    """tokens (B, T, D) = [cls, patches] + positions, W numbers of a token of R images. Grid: (B / R, T, D / W)."""

    @ct.kernel
    def kernel(patches, cls, positions, tokens):
        i, t, j = ct.bid(0), ct.bid(1), ct.bid(2)
        at = load(positions, (t, j), (1, W), False).astype(F32) if has_positions else ct.zeros((1, W), F32)
        if has_cls:
            if t == 0:
                first = load(cls, (0, j), (1, W), False).astype(F32) + at + ct.zeros((R, W), F32)
                store(tokens, (i, t, j), first.reshape((R, 1, W)), False)
            else:
                x = load(patches, (i, t - 1, j), (R, 1, W), False).astype(F32).reshape((R, W))
                store(tokens, (i, t, j), (x + at).reshape((R, 1, W)), False)
        else:
            x = load(patches, (i, t, j), (R, 1, W), False).astype(F32).reshape((R, W))
            store(tokens, (i, t, j), (x + at).reshape((R, 1, W)), False)

    return kernel


def embed_backward(R, W, has_cls, copies, adds):
    """From g (B, T, D): that of the patches (B, N, D), of cls (1, D), of positions (T, D); a batch's sums in order.

    Program (j, r) has W numbers of the tokens r, r + ROWS, …; sums (ROWS, D), row r: what its patches' add up to.
    ``copies``: there is a class token, so the patches' are not g itself. ``adds``: whether the sum is added to what cls
    and positions hold. Grid: (D / W, ROWS).
    """

    @ct.kernel
    def kernel(g, of_patches, of_cls, of_positions, sums):
        j, r = ct.bid(0), ct.bid(1)
        in_all = ct.zeros((1, W), F32)
        for t in range(r, g.shape[1], ct.num_blocks(1)):
            total = ct.zeros((R, W), F32)
            for i in range(ct.num_tiles(g, 0, (R, 1, W))):
                x = load(g, (i, t, j), (R, 1, W), False)
                total = total + x.astype(F32).reshape((R, W))
                if copies and t > 0:
                    store(of_patches, (i, t - 1, j), x, False)
            row = ct.sum(total, 0, keepdims=True)  # (R, W) → (1, W)
            before = load(of_positions, (t, j), (1, W), False).astype(F32) if adds[1] else ct.zeros((1, W), F32)
            store(of_positions, (t, j), before + row, False)
            if has_cls:
                if t == 0:
                    before = load(of_cls, (0, j), (1, W), False).astype(F32) if adds[0] else ct.zeros((1, W), F32)
                    store(of_cls, (0, j), before + row, False)
                else:
                    in_all = in_all + row
            else:
                in_all = in_all + row
        store(sums, (r, j), in_all, False)

    return kernel
