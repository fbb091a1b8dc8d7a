"""Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; ViT appendix A, eq. 5 to 8)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.autograd.op import op, raw
from minivit.backend import Array, Key, device_of, product, to_device
from minivit.errors import ConfigError, DTypeError, ShapeError
from minivit.ops.dropout import keep_scale
from minivit.ops.elementwise import where
from minivit.ops.matmul import matmul
from minivit.ops.normalize import softmax
from minivit.ops.reduce import narrow, sum, wide
from minivit.ops.shape import pad, stack, swapaxes

FORBIDDEN = -1e30  # a score that no allowed one comes near, and yet finite: a row of them alone has no NaN


def attention_weights(q: Any, k: Any, mask: Any = None, scale: float | None = None) -> Any:
    """Return P = softmax(scale · Q·Kᵀ) over the keys: q (…, Tq, d), k (…, Tk, d) → (…, Tq, Tk).

    ``mask`` (bool, broadcast to the result, True = may not attend). A query that may attend to nothing gets zeros.
    ``scale`` is 1/√d unless given. Works on arrays and on Tensors.
    """
    return narrow(_weights(q, k, mask, scale), q)


def attention_scores(q: Any, k: Any, scale: float | None = None) -> Any:
    """Return scale · Q·Kᵀ, (…, Tq, Tk), of float16 as float32: scores are soon too large for float16."""
    return matmul(wide(q), swapaxes(wide(k), -1, -2)) * (1.0 / math.sqrt(q.shape[-1]) if scale is None else scale)


def _weights(q: Any, k: Any, mask: Any, scale: float | None) -> Any:
    """Return P, of float16 as float32."""
    return masked_softmax(attention_scores(q, k, scale), mask)


def masked_softmax(scores: Any, mask: Any = None) -> Any:
    """Return softmax of scores (…, Tq, Tk) over the keys that ``mask`` lets a query attend to; zeros if there is none.

    Works on arrays and on Tensors.
    """
    if mask is None:
        return softmax(scores)
    return where(mask, 0.0, softmax(where(mask, FORBIDDEN, scores)))


@op(save=("q", "k", "v"))
def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Any = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Array:
    """Return P·V with P = softmax(scale · Q·Kᵀ): q (…, Tq, d), k (…, Tk, d), v (…, Tk, e) → (…, Tq, e).

    ``mask`` is bool, broadcast to (…, Tq, Tk), True = may not attend; a query that may attend to nothing gets zeros.
    ``dropout`` drops entries of P, by ``key``; with several axes before Tq the first is the batch.
    Twins: ops/cpu/attention.py, ops/cuda/attention.py.
    """
    check_inputs(q, k, v, mask, dropout, key)
    p = _weights(q, k, _on_device(mask, q), scale)
    drop = _drop(p, dropout, key)
    return narrow(product(p if drop is None else p * drop, wide(v)), q)


def check_inputs(q: Array, k: Array, v: Array, mask: Any, dropout: float, key: Key | None) -> None:
    """Raise if queries, keys, values and mask do not fit each other, or if dropout has no key."""
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ShapeError(
            f"attention: queries {q.shape}, keys {k.shape}, values {v.shape}",
            "queries and keys share their last axis, keys and values the last but one",
        )
    if mask is not None:
        mask = bool_mask(mask)
        scores = (*np.broadcast_shapes(q.shape[:-2], k.shape[:-2]), q.shape[-2], k.shape[-2])
        pairs = zip(mask.shape[::-1], scores[::-1], strict=False)
        if len(mask.shape) > len(scores) or any(m not in (1, n) for m, n in pairs):
            raise ShapeError(f"attention: a mask of {mask.shape} for scores of {scores}", "give one that broadcasts")
    if dropout > 0 and key is None:
        raise ConfigError("attention: dropout needs a key", "pass key=minivit.Key(seed, stream, step)")


def bool_mask(mask: Any) -> Any:
    """Return a mask (array, Tensor or list) as something that has a shape; raise DTypeError unless it is bool."""
    mask = mask if hasattr(mask, "dtype") else np.asarray(mask)
    if mask.dtype != bool:
        raise DTypeError(f"an attention mask is bool (True = may not attend), got {mask.dtype}", "mask.astype(bool)")
    return mask


def _on_device(mask: Any, like: Array) -> Any:
    return None if mask is None else to_device(raw(bool_mask(mask)), device_of(like))


def _drop(p: Array, dropout: float, key: Key | None) -> Array | None:
    if dropout == 0.0:
        return None
    assert key is not None
    return keep_scale(p, p.shape, dropout, key)


@attention.vjp
def _(g: Any, out: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any, dropout: float, key: Any,
      needs: tuple[bool, ...]) -> Any:  # fmt: skip
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    like, g, q, k, v = g, wide(g), wide(q), wide(k), wide(v)
    p = _weights(q, k, _on_device(mask, raw(q)), scale)  # computed again rather than kept: T² numbers a head
    drop = _drop(raw(p), dropout, key)
    kept = p if drop is None else p * drop
    gv = narrow(matmul(swapaxes(kept, -1, -2), g), like) if needs[2] else None  # dV = Pᵀ·dO
    if not (needs[0] or needs[1]):
        return None, None, gv
    gp = matmul(g, swapaxes(v, -1, -2))  # dP = dO·Vᵀ
    if drop is not None:
        gp = gp * drop
    gs = p * (gp - sum(p * gp, -1, True)) * scale  # dS: softmax's whole Jacobian, not its diagonal
    return (narrow(matmul(gs, k), like) if needs[0] else None,  # dQ = dS·K
            narrow(matmul(swapaxes(gs, -1, -2), q), like) if needs[1] else None,  # dK = dSᵀ·Q
            gv)  # fmt: skip


@attention.composed
def _(
    q: Any, k: Any, v: Any, mask: Any = None, scale: float | None = None, dropout: float = 0.0, key: Any = None
) -> Any:
    p = attention_weights(q, k, mask, scale)
    drop = _drop(raw(p), dropout, key)
    return matmul(p if drop is None else p * drop, v)


def split_heads(x: Any, parts: int, heads: int) -> Any:
    """Return features (B, T, parts·heads·d) as (parts, B, heads, T, d), a view. Works on arrays and on Tensors."""
    b, t, features = x.shape
    return x.reshape((b, t, parts, heads, features // (parts * heads))).transpose((2, 0, 3, 1, 4))


def merge_heads(x: Any) -> Any:
    """Return (parts, B, heads, T, d) as features (B, T, parts·heads·d): the inverse of :func:`split_heads`."""
    parts, b, heads, t, d = x.shape
    return x.transpose((1, 3, 0, 2, 4)).reshape((b, t, parts * heads * d))  # → (B, T, parts, heads, d) → (B, T, …)


@op(save=("qkv",))
def self_attention(
    qkv: Array, heads: int, queries: int | None = None, mask: Any = None, scale: float | None = None,
    dropout: float = 0.0, key: Key | None = None,
) -> Array:  # fmt: skip
    """Return :func:`attention` of each head of qkv (B, T, 3·heads·d), the heads merged: → (B, T, heads·d).

    qkv holds a token's queries, then its keys, then its values, as one projection makes them: one input instead of
    three, whose gradient is written in one piece. With ``queries`` only that many first tokens attend, to all of them:
    → (B, queries, heads·d). Twins: ops/cpu/attention.py, ops/cuda/attention.py.
    """
    check_heads(qkv, heads, queries)
    q, k, v = split_heads(qkv, 3, heads)
    return merge_heads(attention.forward(q[..., :queries, :], k, v, mask, scale, dropout, key)[None])


def check_heads(qkv: Array, heads: int, queries: int | None) -> None:
    """Raise unless qkv is (B, T, 3·heads·d) and has as many queries."""
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ShapeError(
            f"self_attention: {qkv.shape} does not hold queries, keys and values of {heads} heads",
            "give (B, T, 3·heads·d)",
        )
    if queries is not None and not 1 <= queries <= qkv.shape[1]:
        raise ShapeError(f"self_attention: {queries} queries of {qkv.shape[1]} tokens", "give 1 to all")


@self_attention.vjp
def _(g: Any, out: Any, qkv: Any, heads: int, queries: Any, *settings: Any, needs: tuple[bool, ...]) -> Any:
    assert attention._vjp is not None
    parts = split_heads(qkv, 3, heads)
    q, k, v = parts[0], parts[1], parts[2]
    rows = q[..., :queries, :]
    gq, gk, gv = attention._vjp(split_heads(g, 1, heads)[0], out, rows, k, v, *settings, needs=(True, True, True))
    if queries is not None:
        gq = pad(gq, [(0, 0), (0, 0), (0, q.shape[2] - queries), (0, 0)])  # the others' queries were not read
    return merge_heads(stack([gq, gk, gv]))


@self_attention.composed
def _(qkv: Any, heads: int, queries: Any = None, *settings: Any) -> Any:
    parts = split_heads(qkv, 3, heads)
    return merge_heads(attention(parts[0][..., :queries, :], parts[1], parts[2], *settings)[None])
