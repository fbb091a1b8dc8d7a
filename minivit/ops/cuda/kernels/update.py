"""Kernels on the flat store: see ops/cuda/update.py."""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, load, number, store


def less_power(half_log, t):
    """Return 1 - βᵗ = 2h/(1 + h), h = tanh(-t·log(β)/2), which cancels nothing; ``half_log`` = -log(β)/2."""
    h = ct.tanh(t * half_log)
    return 2.0 * h / (1.0 + h)


def adamw(beta1, beta2, half_log1, half_log2, eps, B):
    """AdamW on flat arrays (n,). Where ``ok`` is 0 nothing is written.

    ``half_log1`` = -log(β₁)/2, ``half_log2`` = -log(β₂)/2. Grid: (n / B,).
    """

    @ct.kernel
    def kernel(p, g, m, v, ok, count, lr, factor, scale, decay):
        i = ct.bid(0)
        if ct.load(ok, (0,), ()) != 0:
            t, rate = number(count), number(lr) * scale
            d = load(g, (i,), (B,), tma=False) * number(factor)
            first = beta1 * load(m, (i,), (B,), tma=False) + (1.0 - beta1) * d
            second = beta2 * load(v, (i,), (B,), tma=False) + (1.0 - beta2) * (d * d)
            size = ct.sqrt(second) / ct.sqrt(less_power(half_log2, t)) + eps
            w = load(p, (i,), (B,), tma=False) * (1.0 - rate * decay) - first / size * (rate / less_power(half_log1, t))
            store(p, (i,), w, tma=False)
            store(m, (i,), first, tma=False)
            store(v, (i,), second, tma=False)

    return kernel


def average(B):
    """An average (n,) goes to the values p (n,) by ``share`` of the way, but by at least 9/(10 + t) at update t.

    Where ``ok`` is 0 nothing is written. Grid: (n / B,).
    """

    @ct.kernel
    def kernel(average, p, ok, count, share):
        i = ct.bid(0)
        if ct.load(ok, (0,), ()) != 0:
            a = load(average, (i,), (B,), tma=False)
            a = a + (load(p, (i,), (B,), tma=False) - a) * ct.maximum(9.0 / (10.0 + number(count)), share)
            store(average, (i,), a, tma=False)

    return kernel


def squares(rows, B):
    """sums (rows,) of the squares of x (n,), each of one program. Grid: (rows,)."""

    @ct.kernel
    def kernel(x, sums):
        total = ct.zeros((B,), F32)
        for i in range(ct.bid(0), ct.num_tiles(x, 0, (B,)), rows):
            part = load(x, (i,), (B,), tma=False).astype(F32)
            total = total + part * part
        store(sums, (ct.bid(0),), ct.sum(total, 0, keepdims=True), tma=False)  # (B,) → (1,)

    return kernel


def total(rows):
    """out (1,) = the sum of sums (rows,), a power of two. Grid: (1,)."""

    @ct.kernel
    def kernel(sums, out):
        store(out, (0,), ct.sum(load(sums, (0,), (rows,), tma=False), 0, keepdims=True), tma=False)  # (rows,) → (1,)

    return kernel
