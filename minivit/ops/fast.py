"""Fast twins: raw-array forwards and gradients for NumPy arrays, used while recording for ``backward`` only.

Each stands beside the plain operation of the same name and computes the same numbers; the plain text is the
definition, the test suite holds the twin to it (``tests/test_ops.py``), and ``create_graph=True`` always uses the
plain one. They are faster for four reasons: they work in place, on arrays of their own; they keep what the gradient
wants (a derivative, probabilities, 1/σ) instead of computing it again; sums over rows and columns are products with a
vector of ones, which BLAS does several times faster than ``sum``; and they skip the softmax's row maximum where a bound
shows that nothing can overflow.

A twin's forward returns (out, kept); its gradient gets (g, kept, needs) and changes neither g nor what it did not make.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minivit.backend import Key
from minivit.ops import activation, attention, dropout, loss, matmul, normalize
from minivit.ops.dropout import keep_scale
from minivit.ops.elementwise import ERF_TANH, tanh_of_odd

Needs = tuple[bool, ...]


@functools.lru_cache(maxsize=256)
def _ones(n: int, dtype: np.dtype) -> np.ndarray:
    ones = np.ones(n, dtype)
    ones.flags.writeable = False
    return ones


def _column_sums(rows: np.ndarray) -> np.ndarray:
    return _ones(rows.shape[0], rows.dtype) @ rows


# ---- linear ----------------------------------------------------------------------------------------------------------


@matmul.linear.fast
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    rows = x.reshape(-1, x.shape[-1])  # (…, in) → (rows, in)
    return matmul.linear.forward(x, weight, bias), (rows, weight, x.shape)


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


@normalize.layer_norm.fast
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> Any:
    n = x.shape[-1]
    rows = x.reshape(-1, n)  # (…, D) → (rows, D)
    x_hat = rows - (rows @ (_ones(n, x.dtype) / n))[:, None]
    rstd = np.vecdot(x_hat, x_hat)[:, None]  # (rows, 1): n·σ², and in place 1/√(σ² + eps)
    rstd /= n
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.reciprocal(rstd, out=rstd)
    x_hat *= rstd
    out = x_hat * weight
    out += bias
    return out.reshape(x.shape), (x_hat, rstd, weight)


@normalize.layer_norm.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    x_hat, rstd, weight = kept
    shape, g = g.shape, g.reshape(x_hat.shape)
    product = g * x_hat
    g_weight = _column_sums(product) if needs[1] else None
    g_bias = _column_sums(g) if needs[2] else None
    if not needs[0]:
        return None, g_weight, g_bias
    mean_weight = weight / g.shape[-1]  # its product with a row is the mean of row·weight
    along_one = (g @ mean_weight)[:, None]
    along_x_hat = (product @ mean_weight)[:, None]
    gx = g * weight
    np.multiply(x_hat, along_x_hat, out=product)
    product += along_one
    gx -= product
    gx *= rstd
    return gx.reshape(shape), g_weight, g_bias


# ---- gelu ------------------------------------------------------------------------------------------------------------


BLOCK = 1 << 15  # numbers that a chain of elementwise steps works on at a time: they stay in the L1 and L2 cache
_HALF_POWERS = [0.5 ** (i + 0.5) for i in range(len(ERF_TANH))]
_CDF_TANH = [c * h for c, h in zip(ERF_TANH, _HALF_POWERS, strict=True)]  # erf(x/√2) = tanh(x·p(x²))


def _gelu_block(x: np.ndarray, out: np.ndarray, slope: np.ndarray) -> None:
    """Write x·Φ(x) and its derivative Φ(x) + x·φ(x), float32."""
    z = x * x
    tanh_of_odd(x, z, _CDF_TANH, out=slope)  # erf(x/√2)
    slope *= 0.5
    slope += 0.5  # Φ
    np.multiply(x, slope, out=out)
    z *= -0.5
    np.exp(z, out=z)
    z *= x
    z *= 1.0 / math.sqrt(2.0 * math.pi)  # x·φ
    slope += z


@activation.gelu.fast
def _(x: np.ndarray, approximate: str) -> Any:
    shape, x = x.shape, np.atleast_1d(x)  # NumPy's results of 0-d arrays cannot be written to
    if approximate == "none" and x.dtype == np.float32:
        x = np.ascontiguousarray(x)
        out, slope = np.empty_like(x), np.empty_like(x)
        flat = x.reshape(-1), out.reshape(-1), slope.reshape(-1)
        for start in range(0, x.size, BLOCK):
            _gelu_block(*[a[start : start + BLOCK] for a in flat])
        return out.reshape(shape), slope
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
    return out.reshape(shape), cdf


@activation.gelu.fast_vjp
def _(g: np.ndarray, kept: np.ndarray, needs: Needs) -> Any:
    return (g * kept,)


# ---- softmax, and attention around it --------------------------------------------------------------------------------


def _softmax_rows(scores: np.ndarray, bound: float) -> np.ndarray:
    """Make scores (…, n) probabilities, in place; ``bound`` is a number that no \\|score\\| exceeds."""
    if not bound < 60.0:  # else e^±60 neither overflows nor vanishes, summed or divided
        scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    total = (scores @ _ones(scores.shape[-1], scores.dtype))[..., None]
    np.reciprocal(total, out=total)
    scores *= total
    return scores


@normalize.softmax.fast
def _(x: np.ndarray, axis: int) -> Any:
    if axis % x.ndim != x.ndim - 1:
        return (out := normalize.softmax.forward(x, axis)), (out, axis)
    out = _softmax_rows(x.copy(), math.inf)
    return out, (out, -1)


@normalize.softmax.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    out, axis = kept
    gx = g - (np.vecdot(g, out)[..., None] if axis == -1 else (g * out).sum(axis=axis, keepdims=True))
    gx *= out
    return (gx,)


def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: Any,
    scale: float | None,
    p_drop: float,
    key: Key | None,
    row: int,
) -> Any:
    """Return O = P·V and what the gradient reads. Memory of O is laid out as that of q: heads merge without a copy."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = q @ k.swapaxes(-1, -2)  # (…, Tq, d) · (…, d, Tk) → (…, Tq, Tk)
    p *= scale
    # |q·k| ≤ |q|·|k| (Cauchy and Schwarz): far cheaper to look at than every score
    bound = abs(scale) * math.sqrt(float(np.vecdot(q, q).max(initial=0.0)) * float(np.vecdot(k, k).max(initial=0.0)))
    if mask is not None:
        p[np.broadcast_to(mask, p.shape)] = attention.FORBIDDEN
        bound = math.inf
    _softmax_rows(p, bound)
    if mask is not None:
        p[np.broadcast_to(mask, p.shape)] = 0.0  # a row that may attend to nothing is zero
    drop = keep_scale(p, p.shape, p_drop, key, row) if p_drop > 0 and key is not None else None
    batch = np.broadcast_shapes(p.shape[:-2], v.shape[:-2])
    out = np.empty_like(q, shape=(*batch, q.shape[-2], v.shape[-1]))
    np.matmul(p if drop is None else p * drop, v, out=out)
    return out, (q, k, v, p, drop, out, scale)


def _attend_back(g: np.ndarray, kept: Any, gq: np.ndarray, gk: np.ndarray, gv: np.ndarray) -> None:
    """Write the gradients of queries, keys and values into the given arrays."""
    q, k, v, p, drop, out, scale = kept
    np.matmul((p if drop is None else p * drop).swapaxes(-1, -2), g, out=gv)  # dV = Pᵀ·dO
    gs = g @ v.swapaxes(-1, -2)  # dP = dO·Vᵀ
    if drop is not None:
        gs *= drop
    gs -= np.vecdot(g, out)[..., None]  # Σ P∘dP along a row is dO·O, which is shorter
    gs *= p
    gs *= scale
    np.matmul(gs, k, out=gq)  # dQ = dS·K
    np.matmul(gs.swapaxes(-1, -2), q, out=gk)  # dK = dSᵀ·Q


@attention.attention.fast
def _(q: Any, k: Any, v: Any, mask: Any, scale: Any, p_drop: float, key: Any, first_row: int) -> Any:
    attention.check_inputs(q, k, v, mask, p_drop, key)
    return _attend(q, k, v, mask, scale, p_drop, key, first_row)


@attention.attention.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    grads = [np.empty((*g.shape[:-2], *x.shape[-2:]), x.dtype) for x in kept[:3]]  # q, k, v
    _attend_back(g, kept, *grads)
    return grads


@attention.self_attention.fast
def _(qkv: np.ndarray, mask: Any, scale: Any, p_drop: float, key: Any, first_row: int) -> Any:
    q, k, v = qkv
    attention.check_inputs(q, k, v, mask, p_drop, key)
    out, kept = _attend(q, k, v, mask, scale, p_drop, key, first_row)
    return out, (qkv, kept)


@attention.self_attention.fast_vjp
def _(g: np.ndarray, kept: Any, needs: Needs) -> Any:
    qkv, kept = kept
    grad = np.empty_like(qkv)  # in the memory order of qkv, so that the projection's gradient needs no copy
    _attend_back(g, kept, *grad)
    return (grad,)


# ---- cross_entropy ---------------------------------------------------------------------------------------------------


@loss.cross_entropy.fast
def _(logits: np.ndarray, labels: Any, smoothing: float) -> Any:
    log_p = normalize.log_softmax.forward(logits, -1)
    target = loss.targets(logits, labels, smoothing)
    rows = loss.count_rows(logits.shape)
    out = np.asarray(np.vecdot(log_p, target).sum() / -rows, logits.dtype)
    p = np.exp(log_p, out=log_p)
    p *= target.sum(axis=-1, keepdims=True)
    p -= target
    p /= rows
    return out, p


@loss.cross_entropy.fast_vjp
def _(g: np.ndarray, kept: np.ndarray, needs: Needs) -> Any:
    return (kept * g,)


# ---- drop_path -------------------------------------------------------------------------------------------------------


@dropout.drop_path.fast
def _(x: np.ndarray, p: float, key: Key, first_row: int) -> Any:
    scale = keep_scale(x, (x.shape[0], *[1] * (x.ndim - 1)), p, key, first_row)
    return x * scale, scale  # a number a sample: cheaper to keep than to draw again


@dropout.drop_path.fast_vjp
def _(g: np.ndarray, kept: np.ndarray, needs: Needs) -> Any:
    return (g * kept,)
