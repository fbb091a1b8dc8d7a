"""Kernels of self-attention from the packed projection; a program works through one head of an image, or a part of it.

qkv is seen as (B, T, 3, H, d), the output o and its gradient g as (B, queries, H, d), q as the first ``queries`` rows
of qkv; lse (B, H, queries) has log₂ Σ 2^s of each row of scores s = scale·log₂e·Q·Kᵀ, so that P = 2^(s - lse). The
sides of a tile are powers of two, so T and d are cut into pieces that are: 197 = 128 + 64 + 16, 80 = 64 + 16. What a
tile has beyond an array is read as zero and never written; keys beyond T have the score -∞. Scores, P and sums are
float32; P and dS are rounded to the data's dtype for the products, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691,
section 3.1).
"""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, I32, LOG2E, load, pieces, row_max, row_sum, store

BLOCK = 128  # keys at a time
LEAST = 16  # the shortest side of a product


def blocks(T):
    """Return how many whole blocks T keys have, and the pieces of what is left, (size, index in units of that size)."""
    whole = T // BLOCK
    return whole, tuple((n, whole * (BLOCK // n) + j) for n, j in pieces(T % BLOCK, LEAST))


def all_pieces(T):
    """Return all pieces of T keys, none larger than a block."""
    whole, rest = blocks(T)
    return tuple((BLOCK, j) for j in range(whole)) + rest


# ---- a head's rows, as a tuple of tiles: one for each piece of d -----------------------------------------------------


def head(x, b, i, part, h, n, cut):
    """Return n rows of a head's queries, keys or values (part 0, 1, 2): (n, d)."""
    return tuple(load(x, (b, i, part, h, j), (1, n, 1, 1, w)).reshape((n, w)) for w, j in ct.static_iter(cut))


def put_head(x, b, i, part, h, rows, cut):
    """Write rows (n, d) of the gradient of a head's queries, keys or values, or of their sums."""
    for tile, (w, j) in ct.static_iter(zip(rows, cut)):
        store(x, (b, i, part, h, j), tile.reshape((1, tile.shape[0], 1, 1, w)))


def merged(x, b, i, h, n, cut):
    """Return n rows of a head of o or g: (n, d)."""
    return tuple(load(x, (b, i, h, j), (1, n, 1, w)).reshape((n, w)) for w, j in ct.static_iter(cut))


def put_merged(x, b, i, h, rows, cut):
    """Write rows (n, d) of a head of o."""
    for tile, (w, j) in ct.static_iter(zip(rows, cut)):
        store(x, (b, i, h, j), tile.reshape((1, tile.shape[0], 1, w)))


def zeros(n, cut):
    """Return zeros (n, d)."""
    return tuple(ct.zeros((n, w), F32) for w, j in ct.static_iter(cut))


def inner(x, y):
    """Return x·yᵀ: (n, d), (m, d) → (n, m)."""
    total = ct.zeros((x[0].shape[0], y[0].shape[0]), F32)
    for u, v in ct.static_iter(zip(x, y)):
        total = ct.mma(u, v.transpose(), total)
    return total


def add_product(total, p, y):
    """Return total + p·y, p rounded to y's dtype: (n, d), (n, m), (m, d) → (n, d)."""
    return tuple(ct.mma(p.astype(v.dtype), v, t) for t, v in ct.static_iter(zip(total, y)))


def row_dot(x, y):
    """Return the inner products of the rows of x and y: (n, d), (n, d) → (n, 1)."""
    return row_sum(tuple(u.astype(F32) * v.astype(F32) for u, v in ct.static_iter(zip(x, y))))


def add_columns(total, x):
    """Return total + the sums of the columns of x: (1, d), (n, d) → (1, d)."""
    return tuple(t + ct.sum(u.astype(F32), 0, keepdims=True) for t, u in ct.static_iter(zip(total, x)))


def scores(q, k, j, T):
    """Return Q·Kᵀ of a piece of keys, (n, d), (m, d) → (n, m); j is its index, a constant."""
    s, m = inner(q, k), k[0].shape[0]
    if (j + 1) * m > T:
        s = ct.where(j * m + ct.arange(m, dtype=I32)[None, :] < T, s, -float("inf"))
    return s


def exp2(x):
    """Return 2^x."""
    return ct.exp2(x, flush_to_zero=True)


# ---- forward ---------------------------------------------------------------------------------------------------------


def attention_forward(T, d, n):
    """O = softmax(scale·Q·Kᵀ)·V, and lse; a program has n queries and all keys. Grid: (queries / n, H, B)."""
    cut, along = pieces(d, LEAST), all_pieces(T)

    @ct.kernel
    def kernel(q, qkv, o, lse, scale: float):
        i, h, b, c = ct.bid(0), ct.bid(1), ct.bid(2), scale * LOG2E
        rows = head(q, b, i, 0, h, n, cut)  # (n, d)
        s = tuple(scores(rows, head(qkv, b, j, 1, h, m, cut), j, T) for m, j in ct.static_iter(along))  # (n, T)
        top = row_max(s) * c  # (n, 1)
        e = tuple(exp2(x * c - top) for x in ct.static_iter(s))
        total, acc = row_sum(e), zeros(n, cut)
        for x, (m, j) in ct.static_iter(zip(e, along)):
            acc = add_product(acc, x, head(qkv, b, j, 2, h, m, cut))  # (n, T)·(T, d) → (n, d)
        put_merged(o, b, i, h, tuple(x / total for x in ct.static_iter(acc)), cut)
        store(lse, (b, h, i), (top + ct.log2(total)).reshape((1, 1, n)))

    return kernel


def add_block(acc, top, total, s, v):
    """Return Σ 2^(s - top)·V, top and Σ 2^(s - top) with a block of keys more, top the largest score so far."""
    above = ct.maximum(top, ct.max(s, 1, keepdims=True))
    e, less = exp2(s - above), exp2(top - above)  # (n, m), (n, 1)
    acc = add_product(tuple(x * less for x in ct.static_iter(acc)), e, v)
    return acc, above, total * less + ct.sum(e, 1, keepdims=True)


def attention_forward_long(T, d, n):
    """The same, a block of keys at a time (Milakov and Gimelshein 2018, arXiv 1805.02867, section 3)."""
    cut, (whole, rest) = pieces(d, LEAST), blocks(T)

    @ct.kernel
    def kernel(q, qkv, o, lse, scale: float):
        i, h, b, c = ct.bid(0), ct.bid(1), ct.bid(2), scale * LOG2E
        rows, acc = head(q, b, i, 0, h, n, cut), zeros(n, cut)  # (n, d)
        top, total = ct.full((n, 1), -float("inf"), F32), ct.zeros((n, 1), F32)
        for j in range(whole):
            k, v = head(qkv, b, j, 1, h, BLOCK, cut), head(qkv, b, j, 2, h, BLOCK, cut)  # (BLOCK, d)
            acc, top, total = add_block(acc, top, total, inner(rows, k) * c, v)
        for m, j in ct.static_iter(rest):
            k, v = head(qkv, b, j, 1, h, m, cut), head(qkv, b, j, 2, h, m, cut)  # (m, d)
            acc, top, total = add_block(acc, top, total, scores(rows, k, j, T) * c, v)
        put_merged(o, b, i, h, tuple(x / total for x in ct.static_iter(acc)), cut)
        store(lse, (b, h, i), (top + ct.log2(total)).reshape((1, 1, n)))

    return kernel


# ---- backward --------------------------------------------------------------------------------------------------------
# sums (1, ROWS, 3, H, d), row r: the sums over tokens and images of what program (h, r) has written, for the bias of
# the projection. The keys' is 0: what moves all scores of a row alike moves no softmax. The values' is that of g: a row
# of P sums to 1.


def attention_backward(T, d, queries, n):
    """All of dqkv from g = dO; program (h, r) has head h of images r, r + ROWS, … Grid: (H, ROWS)."""
    cut, along, asked = pieces(d, LEAST), all_pieces(T), -(-queries // n)

    @ct.kernel
    def kernel(q, qkv, o, lse, g, dqkv, sums, scale: float):
        h, r, c = ct.bid(0), ct.bid(1), scale * LOG2E
        sum_q, sum_v = zeros(1, cut), zeros(1, cut)
        for b in range(r, qkv.shape[0], ct.num_blocks(1)):
            keys = tuple(head(qkv, b, j, 1, h, m, cut) for m, j in ct.static_iter(along))  # (T, d)
            values = tuple(head(qkv, b, j, 2, h, m, cut) for m, j in ct.static_iter(along))
            dk = tuple(zeros(m, cut) for m, j in ct.static_iter(along))
            dv = tuple(zeros(m, cut) for m, j in ct.static_iter(along))
            for i in range(asked):
                rows, go = head(q, b, i, 0, h, n, cut), merged(g, b, i, h, n, cut)  # (n, d)
                row_lse = load(lse, (b, h, i), (1, 1, n)).reshape((n, 1))
                delta = row_dot(go, merged(o, b, i, h, n, cut)) * scale  # Σ P∘dP along a row is dO·O
                s = tuple(scores(rows, k, j, T) for k, (m, j) in ct.static_iter(zip(keys, along)))
                p = tuple(exp2(x * c - row_lse) for x in ct.static_iter(s))  # (n, T)
                ds = tuple(x * (inner(go, v) * scale - delta) for x, v in ct.static_iter(zip(p, values)))  # dP = dO·Vᵀ
                dq = zeros(n, cut)
                for x, k in ct.static_iter(zip(ds, keys)):
                    dq = add_product(dq, x, k)  # dQ = dS·K
                dk = tuple(add_product(t, x.transpose(), rows) for t, x in ct.static_iter(zip(dk, ds)))  # dK = dSᵀ·Q
                dv = tuple(add_product(t, x.transpose(), go) for t, x in ct.static_iter(zip(dv, p)))  # dV = Pᵀ·dO
                put_head(dqkv, b, i, 0, h, dq, cut)
                sum_q, sum_v = add_columns(sum_q, dq), add_columns(sum_v, go)
            for i in range(asked, -(-T // n)):  # the queries that were not asked
                put_head(dqkv, b, i, 0, h, zeros(n, cut), cut)
            for x, y, (_, j) in ct.static_iter(zip(dk, dv, along)):
                put_head(dqkv, b, j, 1, h, x, cut)
                put_head(dqkv, b, j, 2, h, y, cut)
        put_head(sums, 0, r, 0, h, sum_q, cut)
        put_head(sums, 0, r, 1, h, zeros(1, cut), cut)
        put_head(sums, 0, r, 2, h, sum_v, cut)

    return kernel


def add_queries(dq, s, k, v, go, lse, delta, scale):
    """Return dQ + dS·K with the scores of a piece of keys: P = 2^(s - lse), dP = dO·Vᵀ, dS = P∘(dP - Σ P∘dP)."""
    p = exp2(s * (scale * LOG2E) - lse)  # (n, m)
    return add_product(dq, p * (inner(go, v) * scale - delta), k)


def attention_backward_queries(T, d, queries, n):
    """dQ, and delta (B, H, queries) = scale·Σ P∘dP; program (h, r) has every ROWSth n queries. Grid: (H, ROWS)."""
    cut, (whole, rest), asked = pieces(d, LEAST), blocks(T), -(-queries // n)
    others = max(-(-T // n) - asked, 1)

    @ct.kernel
    def kernel(q, qkv, o, lse, g, dqkv, delta, sums, scale: float):
        h, r = ct.bid(0), ct.bid(1)
        sum_q, sum_v = zeros(1, cut), zeros(1, cut)
        for t in range(r, qkv.shape[0] * asked, ct.num_blocks(1)):
            b, i = t // asked, t % asked
            rows, go, dq = head(q, b, i, 0, h, n, cut), merged(g, b, i, h, n, cut), zeros(n, cut)  # (n, d)
            row_lse = load(lse, (b, h, i), (1, 1, n)).reshape((n, 1))
            row_delta = row_dot(go, merged(o, b, i, h, n, cut)) * scale  # Σ P∘dP along a row is dO·O
            for j in range(whole):
                k, v = head(qkv, b, j, 1, h, BLOCK, cut), head(qkv, b, j, 2, h, BLOCK, cut)  # (BLOCK, d)
                dq = add_queries(dq, inner(rows, k), k, v, go, row_lse, row_delta, scale)
            for m, j in ct.static_iter(rest):
                k, v = head(qkv, b, j, 1, h, m, cut), head(qkv, b, j, 2, h, m, cut)  # (m, d)
                dq = add_queries(dq, scores(rows, k, j, T), k, v, go, row_lse, row_delta, scale)
            put_head(dqkv, b, i, 0, h, dq, cut)
            store(delta, (b, h, i), row_delta.reshape((1, 1, n)))
            sum_q, sum_v = add_columns(sum_q, dq), add_columns(sum_v, go)
        if asked * n < T:
            for t in range(r, qkv.shape[0] * others, ct.num_blocks(1)):  # the queries that were not asked
                put_head(dqkv, t // others, asked + t % others, 0, h, zeros(n, cut), cut)
        put_head(sums, 0, r, 0, h, sum_q, cut)
        put_head(sums, 0, r, 1, h, zeros(1, cut), cut)
        put_head(sums, 0, r, 2, h, sum_v, cut)

    return kernel


def attention_backward_keys(d, queries, n, m):
    """dK and dV, from what attention_backward_queries left; a program has m keys. Grid: (T / m, H, B)."""
    cut, asked = pieces(d, LEAST), -(-queries // n)

    @ct.kernel
    def kernel(q, qkv, lse, g, delta, dqkv, scale: float):
        j, h, b, c = ct.bid(0), ct.bid(1), ct.bid(2), scale * LOG2E
        k, v = head(qkv, b, j, 1, h, m, cut), head(qkv, b, j, 2, h, m, cut)  # (m, d)
        dk, dv = zeros(m, cut), zeros(m, cut)
        for i in range(asked):
            rows, go = head(q, b, i, 0, h, n, cut), merged(g, b, i, h, n, cut)  # (n, d)
            row_lse = load(lse, (b, h, i), (1, 1, n)).reshape((1, n))
            row_delta = load(delta, (b, h, i), (1, 1, n)).reshape((1, n))
            p = exp2(inner(k, rows) * c - row_lse)  # Pᵀ (m, n)
            dv = add_product(dv, p, go)  # dV = Pᵀ·dO
            dk = add_product(dk, p * (inner(v, go) * scale - row_delta), rows)  # dK = dSᵀ·Q
        put_head(dqkv, b, j, 1, h, dk, cut)
        put_head(dqkv, b, j, 2, h, dv, cut)

    return kernel
