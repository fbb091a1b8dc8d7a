"""Kernels of cross_entropy: see ops/loss.py for the formula.

Rows of logits (M, K) are worked on R at a time, in W columns at a time. target is labels (M,), integers, or (M, K).
stats (5, M), float32, has of each row its loss, whether its largest logit is that of its target (1 or 0), its largest
logit, Σ exp(logit - largest), and Σ target.
"""

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, I32, LN2, LOG2E, load, store

NONE = 2**31 - 1  # no column


def columns(j, W):
    """Return the numbers of the columns of block j: (1, W)."""
    return j * W + ct.arange(W, dtype=I32)[None, :]


def logits_block(x, i, j, R, W, K):
    """Return a block of logits as float32, -∞ beyond the last: (R, W)."""
    return ct.where(columns(j, W) < K, load(x, (i, j), (R, W), False).astype(F32), -float("inf"))


def given_block(target, i, j, R, W, soft):
    """Return a block of what was given as target, (R, W)."""
    if soft:
        return load(target, (i, j), (R, W), False).astype(F32)
    label = load(target, (i,), (R,), False).astype(I32).reshape((R, 1))
    return ct.where(columns(j, W) == label, 1.0, 0.0)


def target_block(target, i, j, R, W, K, soft, smoothing):
    """Return a block of the target, smoothed, 0 beyond the last column: (R, W)."""
    share = ct.where(columns(j, W) < K, smoothing * (1.0 / K), 0.0)  # (1, W)
    return given_block(target, i, j, R, W, soft) * (1.0 - smoothing) + share


def larger(x, j, top, at):
    """Return the largest of rows so far, and its first column, with block j: (R, W), (R, 1), (R, 1)."""
    here = ct.max(x, 1, keepdims=True)
    first = ct.min(ct.where(x == here, columns(j, x.shape[1]), NONE), 1, keepdims=True)
    return ct.maximum(top, here), ct.where(here > top, first, at)


def cross_entropy_rows(K, R, W, soft):
    """stats of each row. Grid: (M / R,)."""
    blocks = -(-K // W)

    @ct.kernel
    def kernel(logits, target, stats, smoothing: float):
        i = ct.bid(0)
        top, at, total = ct.full((R, 1), -float("inf"), F32), ct.zeros((R, 1), I32), ct.zeros((R, 1), F32)
        most, want = ct.full((R, 1), -float("inf"), F32), ct.zeros((R, 1), I32)
        for j in range(blocks):
            z, before = logits_block(logits, i, j, R, W, K), top
            top, at = larger(z, j, top, at)
            total = total * ct.exp2((before - top) * LOG2E) + ct.sum(ct.exp2((z - top) * LOG2E), 1, keepdims=True)
            given = ct.where(columns(j, W) < K, given_block(target, i, j, R, W, soft), -float("inf"))
            most, want = larger(given, j, most, want)
        weight, dot = ct.zeros((R, 1), F32), ct.zeros((R, 1), F32)
        for j in range(blocks):
            t, z = target_block(target, i, j, R, W, K, soft, smoothing), logits_block(logits, i, j, R, W, K)
            weight = weight + ct.sum(t, 1, keepdims=True)
            dot = dot + ct.sum(ct.where(columns(j, W) < K, t * (z - top), 0.0), 1, keepdims=True)
        right = ct.where(at == want, 1.0, 0.0)
        loss = ct.log2(total) * LN2 * weight - dot  # -Σ t·log softmax
        if not soft:
            loss = ct.where(most > 0.0, loss, float("nan"))  # of a label that is no class
        store(stats, (0, i), loss.reshape((1, R)), False)
        store(stats, (1, i), right.reshape((1, R)), False)
        store(stats, (2, i), top.reshape((1, R)), False)
        store(stats, (3, i), total.reshape((1, R)), False)
        store(stats, (4, i), weight.reshape((1, R)), False)

    return kernel


def cross_entropy_total(R):
    """The mean of the rows' losses, and the sum of right ones, (1,) each. Grid: (1,)."""

    @ct.kernel
    def kernel(stats, loss, right, share: float):
        sum_loss, sum_right = ct.zeros((1, R), F32), ct.zeros((1, R), F32)
        for i in range(ct.num_tiles(stats, 1, (1, R))):
            sum_loss = sum_loss + load(stats, (0, i), (1, R), False)
            sum_right = sum_right + load(stats, (1, i), (1, R), False)
        store(loss, (0,), ct.sum(sum_loss, 1) * share, False)
        store(right, (0,), ct.sum(sum_right, 1), False)

    return kernel


def cross_entropy_backward(K, R, W, soft):
    """dx = (softmax·Σ target - target)·g/M, g (1,). Grid: (K / W, M / R)."""

    @ct.kernel
    def kernel(logits, target, stats, g, dx, smoothing: float, share: float):
        j, i = ct.bid(0), ct.bid(1)
        scale = load(g, (0,), (1,), False).astype(F32).reshape((1, 1)) * share
        top = load(stats, (2, i), (1, R), False).reshape((R, 1))
        total = load(stats, (3, i), (1, R), False).reshape((R, 1))
        weight = load(stats, (4, i), (1, R), False).reshape((R, 1))
        z = load(logits, (i, j), (R, W), False).astype(F32)
        p = ct.exp2((z - top) * LOG2E) / total  # (R, W)
        store(dx, (i, j), (p * weight - target_block(target, i, j, R, W, K, soft, smoothing)) * scale, False)

    return kernel
