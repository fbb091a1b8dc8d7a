"""Exercise 8: scaled dot-product attention, and its gradients in queries, keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw queries and keys (…, T, d) and values (…, T, e)."""
    r = Draw(key)
    far = large(r(2, 5, 4), 3200.0)
    far[:, ::2] *= -1.0
    return [
        ("five tokens, no leading axis", (r(5, 3), r(5, 3), r(5, 3))),
        ("batch and heads", (r(2, 3, 4, 5), r(2, 3, 4, 5), r(2, 3, 4, 5))),
        ("values of another width", (r(2, 3, 6), r(2, 3, 6), r(2, 3, 4))),
        ("one token", (r(2, 1, 3), r(2, 1, 3), r(2, 1, 3))),
        ("width one", (r(1, 7, 1), r(1, 7, 1), r(1, 7, 2))),
        ("as many tokens as features", (r(4, 4), r(4, 4), r(4, 4))),
        ("rows of scores around 800 and around -800", (far, large(r(2, 5, 4), 0.5), r(2, 5, 4))),
        ("rows of scores that span 750 and 3000", (*spanning(r, 10), r(10, 3))),
    ]


def large(x: np.ndarray, first: float) -> np.ndarray:
    """Return x with another first feature, and few digits: products and sums have no rounding, in whatever order."""
    return np.concatenate([np.full_like(x[..., :1], first), np.round(8.0 * x[..., 1:]) / 8.0], axis=-1)


def spanning(r: Draw, tokens: int, *leading: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw queries and keys of width 4 whose last key has scores around 750 or 3000, and the others around 0.

    The first is too far for e^(s - smallest), but not for e^(s - mean) of ten tokens; the other is for both.
    """
    q, k = large(r(*leading, tokens, 4), 0.5), large(r(*leading, tokens, 4), 0.0)
    q[..., ::2, 0], k[..., -1, 0] = 2.0, 3000.0
    return q, k


def forward(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
    """Return softmax(q·kᵀ/√d)·v; ``mask`` (True = may not attend) is for the next exercise."""
    return ops.attention(q, k, v, mask)


right = backward_of(forward, 3)


def scores(q: Any, k: Any) -> Any:
    """Return q·kᵀ/√d."""
    return ops.matmul(q, turned(k)) * (1.0 / math.sqrt(q.shape[-1]))


def scaled_by(scale: Callable[[Any, Any], float]) -> Callable[..., Any]:
    """Return attention with another factor before q·kᵀ, made of q and v."""
    return lambda q, k, v: ops.attention(q, k, v, None, scale(q, v))


def weighed_by(softmax: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return attention with other weights than the softmax of the scores over the keys."""
    return lambda q, k, v: ops.matmul(softmax(scores(q, k)), v)


def unshifted(s: Any, mask: Any = False) -> Any:
    """Return e^s / Σ e^s over what is not masked, as it stands."""
    e = np.where(mask, 0.0, np.exp(s))
    return e / e.sum(axis=-1, keepdims=True)


def from_scores(wrong: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return a backward whose dS is ``wrong(P, dP)``, and which does the rest right."""

    def backward(g: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        p, dp = ops.attention_weights(q, k, mask), ops.matmul(g, turned(v))
        return (*backward_of(scores, 2)(wrong(p, dp), q, k), right(g, q, k, v, mask)[2])

    return backward


def scaled_gradients(power: int, of_values: int = 0) -> Callable[..., Any]:
    """Return a backward whose dq and dk are √d to a power too large, and dv √d to another."""

    def backward(g: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        dq, dk, dv = right(g, q, k, v, mask)
        root = math.sqrt(q.shape[-1])
        return dq * root**power, dk * root**power, dv * root**of_values

    return backward


def products(change: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., Any]:
    """Return a backward in which ``change`` makes (dq, dk, dv) of the right ones, P, dS/√d, g, q and k."""

    def backward(g: Any, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        dp = ops.matmul(g, turned(v))
        ds = backward_of(weights, 1)(dp, scores(q, k), mask) / math.sqrt(q.shape[-1])
        return change(*right(g, q, k, v, mask), ops.attention_weights(q, k, mask), ds, g, q, k)

    return backward


def weights(s: Any, mask: Any) -> Any:
    """Return the attention of scores: what is masked gets none."""
    return ops.softmax(s) if mask is None else ops.where(mask, 0.0, ops.softmax(ops.where(mask, -1e30, s)))


def turned(x: Any) -> Any:
    """Return x with its last two axes exchanged."""
    return ops.swapaxes(x, -1, -2)


FORWARD_MISTAKES = (
    Mistake(
        "scores not divided by √d",
        "The scores are q·kᵀ as they are. What brings them back to size 1, whatever the width?",
        scaled_by(lambda q, v: 1.0),
    ),
    Mistake(
        "divided by d",
        "The scores are divided by d. The variance of q·k is d; by what does one divide to bring it to 1?",
        scaled_by(lambda q, v: 1.0 / q.shape[-1]),
    ),
    Mistake(
        "divided by √T",
        "The scores are divided by the root of the number of tokens. q·k is a sum over the features: which axis is "
        "that?",
        scaled_by(lambda q, v: 1.0 / math.sqrt(q.shape[-2])),
    ),
    Mistake(
        "divided by the root of the values' width",
        "The scores are divided by √w, w the width of the values. It is the width of the queries that counts.",
        scaled_by(lambda q, v: 1.0 / math.sqrt(v.shape[-1])),
    ),
    Mistake(
        "divided after the softmax",
        "The weights are divided by √d, not the scores: their rows do not add up to 1.",
        lambda q, k, v: ops.attention(q, k, v, None, 1.0) / math.sqrt(q.shape[-1]),
    ),
    Mistake(
        "softmax over the queries",
        "The columns of P add up to 1. Each query, a row, spreads its attention over the keys: look at axis=.",
        weighed_by(lambda s: ops.softmax(s, -2)),
    ),
    Mistake(
        "softmax over everything",
        "All of a matrix P adds up to 1, and not each row. Sum and maximum run along the last axis, and keep it.",
        weighed_by(lambda s: ops.reshape(ops.softmax(ops.reshape(s, (*s.shape[:-2], -1))), s.shape)),
    ),
    Mistake(
        "overflow",
        "e^s is infinite from s = 710 on, and 0 below -745: the quotient is NaN. Take something off each row of S "
        "first: which number makes sure that no exponent is above 0, and one is 0?",
        weighed_by(unshifted),
    ),
    Mistake(
        "one maximum for all rows",
        "The largest score of all is taken off every row. In a row far below it every e^s is 0, and so is their sum. "
        "Take off each row's own.",
        weighed_by(lambda s: unshifted(s - s.max())),
    ),
    Mistake(
        "mean taken off",
        "The mean of the row of scores is taken off. Where one score is far above the others its exponent is still far "
        "above 0: take off what makes it 0.",
        weighed_by(lambda s: unshifted(s - s.mean(axis=-1, keepdims=True))),
    ),
    Mistake(
        "smallest taken off",
        "The row's smallest score is taken off, so that all exponents are above 0: which number makes sure that none "
        "is?",
        weighed_by(lambda s: unshifted(s - s.min(axis=-1, keepdims=True))),
    ),
    Mistake(
        "queries and keys exchanged",
        "S is transposed: row i holds what the key of token i has with all queries. Rows belong to queries.",
        lambda q, k, v: forward(k, q, v),
    ),
)

BACKWARD_MISTAKES = (
    Mistake(
        "no 1/√d in the gradient",
        "The factor of the scores is missing. S = q·kᵀ/√d has it in the forward, so what reaches q and k has it, too.",
        scaled_gradients(1),
    ),
    Mistake(
        "1/√d twice",
        "The factor of the scores is there twice (or is 1/d). It stands once in the forward, and goes into dS or into "
        "dQ and dK.",
        scaled_gradients(-1),
    ),
    Mistake(
        "√d multiplies",
        "The gradient is multiplied by √d. In the forward √d divides, and so it does here.",
        scaled_gradients(2),
    ),
    Mistake(
        "1/√d in dV",
        "dV has the factor of the scores. Only what goes through S has it, and V does not.",
        scaled_gradients(0, -1),
    ),
    Mistake(
        "only the diagonal",
        "dS is dP times the diagonal of the softmax's Jacobian, p(1 - p). A score changes all weights of its row, so "
        "the terms off the diagonal count as well.",
        from_scores(lambda p, dp: p * (1.0 - p) * dp),
    ),
    Mistake(
        "row sum missing",
        "dS is P∘dP. This is the numerator's part of the softmax; what the denominator does, the same number for a "
        "whole row, is missing.",
        from_scores(lambda p, dp: p * dp),
    ),
    Mistake(
        "sum over the queries",
        "In dS the sum runs down the columns. The softmax runs along the keys, and so does this sum.",
        from_scores(lambda p, dp: p * (dp - ops.sum(p * dp, -2, True))),
    ),
    Mistake(
        "plain mean for weighted mean",
        "In dS the plain mean of dP over the row is taken off. The sum over k in the derivation has a factor in each "
        "term that is not 1/T.",
        from_scores(lambda p, dp: p * (dp - ops.mean(dp, -1, True))),
    ),
    Mistake(
        "plain sum for weighted sum",
        "In dS the plain sum of dP over the row is taken off. Each term of the sum over k in the derivation has "
        "another factor.",
        from_scores(lambda p, dp: p * (dp - ops.sum(dp, -1, True))),
    ),
    Mistake(
        "sum over everything",
        "In dS the sum runs over all entries at once. Each row has its own: it runs along the last axis, and keeps it.",
        from_scores(lambda p, dp: p * (dp - ops.sum(p * dp))),
    ),
    Mistake(
        "axis of the row sum not kept",
        "In dS the sum over each row has lost its axis, so that it is taken off columns where the shapes allow it: "
        "keepdims=True.",
        from_scores(lambda p, dp: p * (dp - ops.sum(p * dp, -1))),
    ),
    Mistake(
        "p left off the row sum",
        "In dS the first term has its p_j, the sum over the row has not. Both parts of the derivative have the factor "
        "p_j: mind the brackets.",
        from_scores(lambda p, dp: p * dp - ops.sum(p * dp, -1, True)),
    ),
    Mistake(
        "P left out of dS",
        "In dS the bracket is right, and the factor before it, which every term of the derivative has, is missing.",
        from_scores(lambda p, dp: dp - ops.sum(p * dp, -1, True)),
    ),
    Mistake(
        "softmax left out", "dP is passed on as dS. Between S and P stands the softmax.", from_scores(lambda p, dp: dp)
    ),
    Mistake(
        "dK from dS without its transpose",
        "The product for dK has dS in it where its transpose belongs. dK_j collects over all queries i that looked at "
        "key j: write down the indices.",
        products(lambda dq, dk, dv, p, ds, g, q, k: (dq, ops.matmul(ds, q), dv)),
    ),
    Mistake(
        "dQ from the transpose of dS",
        "The product for dQ has dS transposed. dQ_i collects over all keys j that query i looked at: write down the "
        "indices.",
        products(lambda dq, dk, dv, p, ds, g, q, k: (ops.matmul(turned(ds), k), dk, dv)),
    ),
    Mistake(
        "dQ from Q, dK from K",
        "In a product A·B the gradient of A has B in it, and that of B has A. In yours each has itself.",
        products(lambda dq, dk, dv, p, ds, g, q, k: (ops.matmul(ds, q), ops.matmul(turned(ds), k), dv)),
    ),
    Mistake(
        "dV from P without its transpose",
        "The product for dV has P in it where its transpose belongs. dV_j collects over all queries i that read value "
        "j: write down the indices.",
        products(lambda dq, dk, dv, p, ds, g, q, k: (dq, dk, ops.matmul(p, g))),
    ),
)

EXERCISE = Exercise(
    number=8,
    slug="attention",
    title="attention",
    asked=(
        Asked("forward", ("out",), forward, samples, FORWARD_MISTAKES),
        Asked("backward", ("dq", "dk", "dv"), right, with_cotangents(samples, forward), BACKWARD_MISTAKES),
    ),
    hints=(
        "Write a helper that returns P, stable for large scores, with only the last two axes of k exchanged. backward "
        "computes P again, and S itself is needed nowhere. Then write dV, dP, dS, dQ, dK in this order, one line each.",
        "O = P·V gives dV and dP by the rule for A·B, with g for dC. S without its factor is Q·Kᵀ: by the same rule "
        "with B = Kᵀ, dQ is dS times K, and dKᵀ is Qᵀ times dS, both times the factor. Turn the latter round: "
        "(XY)ᵀ = YᵀXᵀ.",
        "ds_j = Σ_k dp_k (p_k [k = j] - p_k p_j). The first part is dp_j p_j; in the second, p_j goes before the sum, "
        "and what is left in it, Σ_k dp_k p_k, is one number for each row: keep its axis. Take p_j out of both.",
    ),
)
