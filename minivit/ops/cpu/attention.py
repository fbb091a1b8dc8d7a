"""The twins of :mod:`minivit.ops.attention`: attention and self_attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minivit.autograd.op import raw
from minivit.backend import Key
from minivit.ops.attention import (
    FORBIDDEN,
    attention,
    check_heads,
    check_inputs,
    merge_heads,
    self_attention,
    split_heads,
)
from minivit.ops.cpu.normalize import softmax_rows
from minivit.ops.cpu.sums import row_dots
from minivit.ops.dropout import keep_scale
from minivit.ops.reduce import narrow, wide

KEPT_SCORES = 1 << 16  # of a head: of longer sequences this many are made at a time, and none are kept


def _is_short(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> bool:
    """Tell whether all scores are made at once, and kept; so are those of heads that are broadcast."""
    return q.shape[-2] * k.shape[-2] <= KEPT_SCORES or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]


def _blocks(q: np.ndarray, k: np.ndarray, v: np.ndarray, key: Key | None) -> Iterator[tuple[Any, slice, Key | None]]:
    """Yield (head, its queries, the key of their scores) of the blocks that attention is worked off in.

    Short sequences are one block of all heads, whose probabilities are kept for the gradient. Long ones go head by
    head in blocks of queries that the gradient makes again: memory grows with their length, not with its square.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if _is_short(q, k, v):
        yield (), slice(0, queries), key
        return
    rows = max(1, KEPT_SCORES // keys)
    before = 0 if key is None else key.row * math.prod(q.shape[1:-1])  # a block's rows are those of (B·heads·Tq, Tk)
    for i, head in enumerate(np.ndindex(q.shape[:-2])):
        for a in range(0, queries, rows):
            here = None if key is None else key.at_row(before + i * queries + a)
            yield head, slice(a, min(a + rows, queries)), here


def _probabilities(
    q: np.ndarray, scaled_kt: np.ndarray, mask: np.ndarray | None, p_drop: float, key: Key | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return P = softmax(Q·scale·Kᵀ), q (…, rows, d), scaled_kt (…, d, Tk) → (…, rows, Tk), and dropout's mask."""
    p = q @ scaled_kt
    if mask is not None:
        p[mask] = FORBIDDEN
    softmax_rows(p)
    if mask is not None:
        p[mask] = 0.0  # a row that may attend to nothing is zero
    return p, keep_scale(p, p.shape, p_drop, key) if p_drop > 0 and key is not None else None


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return a if a == b else np.broadcast_shapes(a, b)  # which is slow


def _transposed(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Return scale · x (…, T, d) as (…, d, T), laid out in rows: OpenBLAS is then twice as fast on small matrices."""
    return np.multiply(x.swapaxes(-1, -2), scale, order="C")


@attention.twin("cpu")
def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any, scale: float | None, p_drop: float, key: Key | None
) -> Any:
    """Return O = P·V and what the gradient reads. Memory of O is laid out as that of q: heads merge without a copy."""
    check_inputs(q, k, v, mask, p_drop, key)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    lead = _broadcast(q.shape[:-2], k.shape[:-2])
    if mask is not None:
        mask = np.broadcast_to(raw(mask), (*lead, q.shape[-2], k.shape[-2]))
    like, q, k, v = q, wide(q), wide(k), wide(v)
    out = np.empty_like(q, shape=(*_broadcast(lead, v.shape[:-2]), q.shape[-2], v.shape[-1]))
    scaled_kt = _transposed(k, scale)
    for head, rows, here in _blocks(q, k, v, key):
        masked = None if mask is None else mask[head][..., rows, :]
        p, drop = _probabilities(q[head][..., rows, :], scaled_kt[head], masked, p_drop, here)
        np.matmul(p if drop is None else p * drop, v[head], out=out[head][..., rows, :])
    made = (p, drop) if _is_short(q, k, v) else None
    return narrow(out, like), (q, k, v, (mask, scale, p_drop, key), out, made)


def _attend_back(g: np.ndarray, kept: Any, gq: np.ndarray, gk: np.ndarray, gv: np.ndarray) -> None:
    """Write the gradients of queries, keys and values into the given arrays."""
    q, k, v, (mask, scale, p_drop, key), out, made = kept
    scaled_kt: Any = None if made else _transposed(k, scale)
    vt = _transposed(v)
    g = wide(g)
    for head, rows, here in _blocks(q, k, v, key):
        masked = None if mask is None else mask[head][..., rows, :]
        q_rows, g_rows, out_rows = (x[head][..., rows, :] for x in (q, g, out))
        p, drop = made or _probabilities(q_rows, scaled_kt[head], masked, p_drop, here)
        gs = g_rows @ vt[head]  # dP = dO·Vᵀ
        if drop is not None:
            gs *= drop
        gs -= row_dots(g_rows, out_rows)  # Σ P∘dP along a row is dO·O, which is shorter
        gs *= p
        gs *= scale
        np.matmul(gs, k[head], out=gq[head][..., rows, :])  # dQ = dS·K
        sums = (gs, q_rows, gk[head]), (p if drop is None else p * drop, g_rows, gv[head])  # dK = dSᵀ·Q, dV = Pᵀ·dO
        for left, right, total in sums:
            if rows.start == 0:
                np.matmul(left.swapaxes(-1, -2), right, out=total)
            else:
                total += left.swapaxes(-1, -2) @ right


@attention.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    grads = [np.empty((*g.shape[:-2], *x.shape[-2:]), x.dtype) for x in kept[:3]]  # q, k, v
    _attend_back(g, kept, *grads)
    return [narrow(grad, g) for grad in grads]


@self_attention.twin("cpu")
def _(qkv: np.ndarray, heads: int, queries: int | None, *settings: Any) -> Any:
    check_heads(qkv, heads, queries)
    q, k, v = split_heads(qkv, 3, heads)
    out, kept = _attend(q[..., :queries, :], k, v, *settings)
    return merge_heads(out[None]), (qkv, heads, queries, kept)


@self_attention.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    qkv, heads, queries, kept = kept
    grad = np.empty_like(wide(qkv))  # (B, T, 3·H·d): in one piece, as the projection's gradient reads it
    gq, gk, gv = split_heads(grad, 3, heads)
    if queries is not None:
        gq[..., queries:, :] = 0.0
    _attend_back(split_heads(g, 1, heads)[0], kept, gq[..., :queries, :], gk, gv)
    return (narrow(grad, qkv),)
