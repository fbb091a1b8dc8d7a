"""Fast twins: raw-array forwards and gradients for NumPy arrays, used while recording for ``backward`` only.

Each stands beside the plain operation of the same name and computes the same numbers; the plain text is the
definition, the test suite holds the twin to it (``tests/test_ops.py``), and ``create_graph=True`` always uses the
plain one. They are faster for four reasons: they work in place, on arrays of their own; they keep what the gradient
wants (a derivative, probabilities, 1/σ) instead of computing it again; sums over rows and columns are products with a
vector of ones, which BLAS does several times faster than ``sum``; and they skip the softmax's row maxima where no score
is large enough to overflow.

float16, which BLAS does not know and in which scores and squares overflow, is worked off in float32.
A twin's forward returns (out, kept); its gradient gets (g, kept, needs) and changes neither g nor what it did not make.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minivit.autograd.graph import recording
from minivit.autograd.op import raw
from minivit.backend import Key
from minivit.ops import activation, attention, dropout, loss, matmul, normalize
from minivit.ops.dropout import keep_scale
from minivit.ops.elementwise import ERF_TANH, tanh_of_odd
from minivit.ops.reduce import HALF, narrow, wide

Needs = tuple[bool, ...]


@functools.lru_cache(maxsize=256)
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    ones = np.ones(n, dtype)
    ones.flags.writeable = False
    return ones


@functools.lru_cache(maxsize=256)
def _shares(n: int, dtype: np.dtype) -> np.ndarray:
    """Return n times 1/n, whose product with a row is the row's mean."""
    return _ones(n, dtype) / n


def _column_sums(rows: np.ndarray) -> np.ndarray:
    return _ones(rows.shape[0], rows.dtype) @ rows


def _row_sums(x: np.ndarray) -> np.ndarray:
    """Return the sums of x (…, n) along its last axis, (…, 1)."""
    n = x.shape[-1]
    return (x.reshape(-1, n) @ _ones(n, x.dtype)).reshape(*x.shape[:-1], 1)  # one product, not one for each matrix


def _row_dots(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the dot product of each row of a (…, n) with that of b, (…, 1)."""
    return ((a * b) @ _ones(a.shape[-1], a.dtype))[..., None]  # np.vecdot calls BLAS for every row


# ---- linear ----------------------------------------------------------------------------------------------------------


@matmul.linear.fast
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    matmul.check_linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])  # (…, in) → (rows, in)
    out = rows @ weight.T  # → (rows, out)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0]), (rows, weight, x.shape)


@matmul.linear.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    rows, weight, shape = kept
    g = g.reshape(-1, weight.shape[0])  # (…, out) → (rows, out)
    return (
        (g @ weight).reshape(shape) if needs[0] else None,
        g.T @ rows if needs[1] else None,
        _column_sums(g) if needs[2] else None,
    )


# ---- layer_norm ------------------------------------------------------------------------------------------------------


FAR = 100.0  # standard deviations from 0 to a row's mean: further off, the mean's own rounding is seen in what is left


def _centred(rows: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows (rows, D) less their means, the means, and √(σ² + eps)."""
    shares = _shares(rows.shape[1], rows.dtype)
    mean = rows @ shares
    offsets = rows - mean[:, None]
    std = (offsets * offsets) @ shares
    std += eps
    np.sqrt(std, out=std)
    return offsets, mean, std


@normalize.layer_norm.fast
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> Any:
    rows = wide(x).reshape(-1, x.shape[-1])  # (…, D) → (rows, D)
    x_hat, mean, std = _centred(rows, eps)
    mean /= std
    if not mean @ mean < FAR * FAR:  # squares add up to at least the largest
        x_hat, _, std = _centred(rows - rows[:, :1], eps)
    std = std[:, None]
    x_hat /= std
    out = x_hat * weight
    out += bias
    return narrow(out, x).reshape(x.shape), (x_hat, std, weight)


@normalize.layer_norm.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    x_hat, std, weight = kept
    like, g = g, wide(g).reshape(x_hat.shape)
    product = g * x_hat
    g_weight = narrow(_column_sums(product), like) if needs[1] else None
    g_bias = narrow(_column_sums(g), like) if needs[2] else None
    if not needs[0]:
        return None, g_weight, g_bias
    mean_weight = wide(weight) / g.shape[-1]  # its product with a row is the mean of row·weight
    along_one = (g @ mean_weight)[:, None]
    along_x_hat = (product @ mean_weight)[:, None]
    gx = g * weight
    np.multiply(x_hat, along_x_hat, out=product)
    product += along_one
    gx -= product
    gx /= std
    return narrow(gx, like).reshape(like.shape), g_weight, g_bias


# ---- gelu ------------------------------------------------------------------------------------------------------------


BLOCK = 1 << 18  # numbers that a chain of elementwise steps works on at a time: about a cache full, and worth a call
_HALF_POWERS = [0.5 ** (i + 0.5) for i in range(len(ERF_TANH))]
_CDF_TANH = [c * h for c, h in zip(ERF_TANH, _HALF_POWERS, strict=True)]  # erf(x/√2) = tanh(x·p(x²))


def _gelu_block(x: np.ndarray, out: np.ndarray, slope: np.ndarray) -> None:
    """Write x·Φ(x) and, while recording, its derivative Φ(x) + x·φ(x), float32."""
    z = x * x
    tanh_of_odd(x, z, _CDF_TANH, out=slope)  # erf(x/√2)
    slope *= 0.5
    slope += 0.5  # Φ
    np.multiply(x, slope, out=out)
    if not recording.enabled:
        return
    z *= -0.5
    np.exp(z, out=z)
    z *= x
    z *= 1.0 / math.sqrt(2.0 * math.pi)  # x·φ
    slope += z


@activation.gelu.fast
def _(x: np.ndarray, approximate: str) -> Any:
    shape, like, x = x.shape, x, np.atleast_1d(wide(x))  # NumPy's results of 0-d arrays cannot be written to
    if approximate == "none" and x.dtype == np.float32:
        x = x if x.flags.c_contiguous else x.copy()  # as np.ascontiguousarray, but of an outline one
        out, slope = np.empty_like(x), np.empty_like(x if recording.enabled else x.reshape(-1)[:BLOCK])
        flat, flat_out, flat_slope = x.reshape(-1), out.reshape(-1), slope.reshape(-1)
        for start in range(0, x.size, BLOCK):
            part = slice(start, min(start + BLOCK, x.size))
            into = part if recording.enabled else slice(part.stop - start)  # else one block serves for all
            _gelu_block(flat[part], flat_out[part], flat_slope[into])
        return narrow(out, like).reshape(shape), narrow(slope, like)
    cdf = activation.gelu_cdf(x, approximate)
    out = x * cdf
    if approximate == "none":  # kept: Φ + x·φ, the derivative itself: the gradient is then one product
        pdf = x * x
        pdf *= -0.5
        np.exp(pdf, out=pdf)
        pdf *= x
        pdf *= 1.0 / math.sqrt(2.0 * math.pi)
        cdf += pdf
        return out.reshape(shape), cdf
    slope = x * x
    slope *= activation.TANH_SCALE * activation.TANH_CUBIC * 6.0
    slope += activation.TANH_SCALE * 2.0
    slope *= out
    slope *= 1.0 - cdf
    cdf += slope
    return narrow(out, like).reshape(shape), narrow(cdf, like)


@activation.gelu.fast_vjp
def _(g: np.ndarray, kept: np.ndarray, needs: Needs) -> Any:
    return (g * kept,)


# ---- softmax, and attention around it --------------------------------------------------------------------------------


def _softmax_rows(scores: np.ndarray) -> np.ndarray:
    """Make scores (…, n), float32 or float64, probabilities, in place."""
    if not (scores.max(initial=0.0) < 60.0 and scores.min(initial=0.0) > -60.0):  # else no e^x overflows or vanishes
        scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = _row_sums(scores)
    np.reciprocal(total, out=total)
    scores *= total
    return scores


@normalize.softmax.fast
def _(x: np.ndarray, axis: int) -> Any:
    if axis % x.ndim != x.ndim - 1:
        return (out := normalize.softmax.forward(x, axis)), (out, axis)
    out = narrow(_softmax_rows(wide(x) if x.dtype == HALF else x.copy()), x)
    return out, (out, -1)


@normalize.softmax.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    out, axis = kept
    gx = g - (_row_dots(g, out) if axis == -1 else (g * out).sum(axis=axis, keepdims=True))
    gx *= out
    return (gx,)


KEPT_SCORES = 1 << 16  # of a head: of longer sequences this many are made at a time, and none are kept


def _is_short(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> bool:
    """Tell whether all scores are made at once, and kept; so are those of heads that are broadcast."""
    return q.shape[-2] * k.shape[-2] <= KEPT_SCORES or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]


def _blocks(q: np.ndarray, k: np.ndarray, v: np.ndarray, first_row: int) -> Iterator[tuple[Any, slice, int]]:
    """Yield (head, its queries, row of the random numbers) of the blocks that attention is worked off in.

    Short sequences are one block of all heads, whose probabilities are kept for the gradient. Long ones go head by
    head in blocks of queries that the gradient makes again: memory grows with their length, not with its square.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if _is_short(q, k, v):
        yield (), slice(0, queries), first_row
        return
    rows = max(1, KEPT_SCORES // keys)
    before = first_row * math.prod(q.shape[1:-1])
    for i, head in enumerate(np.ndindex(q.shape[:-2])):
        for a in range(0, queries, rows):
            yield head, slice(a, min(a + rows, queries)), before + i * queries + a


def _probabilities(
    q: np.ndarray, scaled_kt: np.ndarray, mask: np.ndarray | None, p_drop: float, key: Key | None, row: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return P = softmax(Q·scale·Kᵀ), q (…, rows, d), scaled_kt (…, d, Tk) → (…, rows, Tk), and dropout's mask."""
    p = q @ scaled_kt
    if mask is not None:
        p[mask] = attention.FORBIDDEN
    _softmax_rows(p)
    if mask is not None:
        p[mask] = 0.0  # a row that may attend to nothing is zero
    return p, keep_scale(p, p.shape, p_drop, key, row) if p_drop > 0 and key is not None else None


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return a if a == b else np.broadcast_shapes(a, b)  # which is slow


def _transposed(x: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Return scale · x (…, T, d) as (…, d, T), laid out in rows: OpenBLAS is then twice as fast on small matrices."""
    return np.multiply(x.swapaxes(-1, -2), scale, order="C")


@attention.attention.fast
def _attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: Any, scale: float | None, p_drop: float, key: Key | None,
    first_row: int,
) -> Any:  # fmt: skip
    """Return O = P·V and what the gradient reads. Memory of O is laid out as that of q: heads merge without a copy."""
    attention.check_inputs(q, k, v, mask, p_drop, key)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    lead = _broadcast(q.shape[:-2], k.shape[:-2])
    if mask is not None:
        mask = np.broadcast_to(raw(mask), (*lead, q.shape[-2], k.shape[-2]))
    like, q, k, v = q, wide(q), wide(k), wide(v)
    out = np.empty_like(q, shape=(*_broadcast(lead, v.shape[:-2]), q.shape[-2], v.shape[-1]))
    scaled_kt = _transposed(k, scale)
    for head, rows, row in _blocks(q, k, v, first_row):
        masked = None if mask is None else mask[head][..., rows, :]
        p, drop = _probabilities(q[head][..., rows, :], scaled_kt[head], masked, p_drop, key, row)
        np.matmul(p if drop is None else p * drop, v[head], out=out[head][..., rows, :])
    made = (p, drop) if _is_short(q, k, v) else None
    return narrow(out, like), (q, k, v, (mask, scale, p_drop, key, first_row), out, made)


def _attend_back(g: np.ndarray, kept: Any, gq: np.ndarray, gk: np.ndarray, gv: np.ndarray) -> None:
    """Write the gradients of queries, keys and values into the given arrays."""
    q, k, v, (mask, scale, p_drop, key, first_row), out, made = kept
    scaled_kt: Any = None if made else _transposed(k, scale)
    vt = _transposed(v)
    g = wide(g)
    for head, rows, row in _blocks(q, k, v, first_row):
        masked = None if mask is None else mask[head][..., rows, :]
        q_rows, g_rows, out_rows = (x[head][..., rows, :] for x in (q, g, out))
        p, drop = made or _probabilities(q_rows, scaled_kt[head], masked, p_drop, key, row)
        gs = g_rows @ vt[head]  # dP = dO·Vᵀ
        if drop is not None:
            gs *= drop
        gs -= _row_dots(g_rows, out_rows)  # Σ P∘dP along a row is dO·O, which is shorter
        gs *= p
        gs *= scale
        np.matmul(gs, k[head], out=gq[head][..., rows, :])  # dQ = dS·K
        sums = (gs, q_rows, gk[head]), (p if drop is None else p * drop, g_rows, gv[head])  # dK = dSᵀ·Q, dV = Pᵀ·dO
        for left, right, total in sums:
            if rows.start == 0:
                np.matmul(left.swapaxes(-1, -2), right, out=total)
            else:
                total += left.swapaxes(-1, -2) @ right


@attention.attention.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    grads = [np.empty((*g.shape[:-2], *x.shape[-2:]), x.dtype) for x in kept[:3]]  # q, k, v
    _attend_back(g, kept, *grads)
    return [narrow(grad, g) for grad in grads]


@attention.self_attention.fast
def _(qkv: np.ndarray, heads: int, queries: int | None, *settings: Any) -> Any:
    attention.check_heads(qkv, heads, queries)
    q, k, v = attention.split_heads(qkv, 3, heads)
    out, kept = _attend(q[..., :queries, :], k, v, *settings)
    return attention.merge_heads(out[None]), (qkv, heads, queries, kept)


@attention.self_attention.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    qkv, heads, queries, kept = kept
    grad = np.empty_like(wide(qkv))  # (B, T, 3·H·d): in one piece, as the projection's gradient reads it
    gq, gk, gv = attention.split_heads(grad, 3, heads)
    if queries is not None:
        gq[..., queries:, :] = 0.0
    _attend_back(attention.split_heads(g, 1, heads)[0], kept, gq[..., :queries, :], gk, gv)
    return (narrow(grad, qkv),)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------


@loss._cross_entropy.fast
def _(logits: np.ndarray, target: np.ndarray) -> Any:
    log_p = normalize.log_softmax.forward(logits, -1)
    rows = loss.count_rows(logits.shape)
    out = np.asarray(wide(np.vecdot(log_p, target)).sum() / -rows, logits.dtype)
    p = np.exp(log_p, out=log_p)
    p *= target.sum(axis=-1, keepdims=True)
    p -= target
    p /= rows
    return out, (p, logits)


@loss._cross_entropy.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    p, logits = kept
    log_p = normalize.log_softmax.forward(logits, -1) if needs[1] else None
    return (p * g if needs[0] else None, None if log_p is None else log_p * (g / -loss.count_rows(logits.shape)))


# ---- drop_path -------------------------------------------------------------------------------------------------------


@dropout.drop_path.fast
def _(x: np.ndarray, p: float, key: Key, first_row: int) -> Any:
    scale = keep_scale(x, (x.shape[0], *[1] * (x.ndim - 1)), p, key, first_row)
    return x * scale, scale  # a number a sample: cheaper to keep than to draw again


@dropout.drop_path.fast_vjp
def _(g: np.ndarray, kept: np.ndarray, needs: Needs) -> Any:
    return (g * kept,)
