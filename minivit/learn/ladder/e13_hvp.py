"""Exercise 13: forward mode and the Hessian-vector product of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.tensor import grad_or_zeros, tensor
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.learn.mutants import cut
from minivit.ops.attention import attention
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw queries (…, Tq, d), keys (…, Tk, d) and values (…, Tk, e), and a direction for each."""
    r = Draw(key)

    def drawn(queries: int, keys: int, d: int, e: int, *leading: int, scale: float = 1.0) -> tuple[Any, ...]:
        shapes = [(*leading, queries, d), (*leading, keys, d), (*leading, keys, e)]
        return r(*shapes[0]) * scale, *(r(*shape) for shape in shapes[1:]), *(r(*shape) for shape in shapes)

    # few digits: scores are exact in whatever order they are summed
    far = tuple(np.round(8.0 * x) / 8.0 for x in drawn(4, 5, 4, 3))
    far[0][:, 0], far[1][:, 0], far[3][:, 0] = (320.0, -320.0, 320.0, -320.0), 5.0, 0.0
    far[4][:, 0] = 0.0

    return [
        ("one head", drawn(3, 4, 2, 5)),
        ("as many queries as keys as numbers", drawn(4, 4, 4, 4)),
        ("two images, three heads", drawn(3, 3, 5, 2, 2, 3)),
        ("one query", drawn(1, 5, 3, 3, 1)),
        ("one key: nothing to choose from", drawn(3, 1, 2, 2)),
        ("scores up to twenty", drawn(3, 5, 4, 3, 2, scale=5.0)),
        ("rows of scores near 800 and near -800", far),
    ]


def with_g(key: Key) -> list[Sample]:
    """Draw g, queries, keys, values and a direction of each."""
    return with_cotangents(samples, lambda q, k, v, *t: attention(q, k, v))(key)


def along(function: Callable[..., Any], at: tuple[Any, ...], direction: tuple[Any, ...]) -> Any:
    """Return d/dε function(at + ε·direction) at 0, of an array or of a tuple of them.

    The vector-Jacobian product Jᵀw is linear in w: the derivative of (Jᵀw)·t in w is J·t.
    """
    leaves = [tensor(x, requires_grad=True) for x in at]
    results = function(*leaves)
    several = results if isinstance(results, tuple) else (results,)
    weights = [tensor(np.zeros(x.shape), requires_grad=True) for x in several]
    total = sum(ops.sum(x * w) for x, w in zip(several, weights, strict=True))
    pulled = grad_or_zeros(total, leaves, create_graph=True)
    moved = sum(ops.sum(x * t) for x, t in zip(pulled, direction, strict=True))
    found = tuple(x.numpy() for x in grad_or_zeros(moved, weights))
    return found if isinstance(results, tuple) else found[0]


def tangent_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return tangent(q, k, v, tq, tk, tv) of a function of q, k and v."""
    return lambda q, k, v, *t: along(function, (q, k, v), t)


# ---- attention and its gradients in lines that a mistake may hold fixed ----------------------------------------------

turned = lambda x: ops.swapaxes(x, -1, -2)
scale_of = lambda q: q.shape[-1] ** -0.5
scores_of = lambda q, k: q @ turned(k) * scale_of(q)
row_sums_of = lambda p, dp: ops.sum(p * dp, -1, True)


def attended(scores: Any = scores_of, softmax: Any = ops.softmax, product: Any = lambda p, v: p @ v) -> Any:
    """Return attention as a function of q, k and v, with some lines changed."""
    return lambda q, k, v: product(softmax(scores(q, k)), v)


def gradients(
    scores: Any = scores_of,
    softmax: Any = ops.softmax,
    values: Any = lambda v: v,
    row_sums: Any = row_sums_of,
    d_scores: Any = lambda p, bracket: p * bracket,
    d_query: Any = lambda ds, k: ds @ k,
    d_key: Any = lambda ds, q: turned(ds) @ q,
) -> Any:
    """Return (g, q, k, v) → (dQ, dK, dV), with some lines changed in what they let through, not in their numbers."""

    def of(g: Any, q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        p = softmax(scores(q, k))
        dp = g @ turned(values(v))
        ds = d_scores(p, dp - row_sums(p, dp)) * scale_of(q)
        return d_query(ds, k), d_key(ds, q), turned(p) @ g

    return of


def moved(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Return hvp(g, q, k, v, tq, tk, tv): the derivative of (g, q, k, v) → gradients along a direction, g fixed."""
    return lambda g, q, k, v, *t: along(lambda *leaves: gradient(g, *leaves), (q, k, v), t)


def hvp_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return hvp of another function than attention, made of q, k and v."""

    def hvp(g: Any, q: Any, k: Any, v: Any, *t: Any) -> Any:
        leaves = [tensor(x, requires_grad=True) for x in (q, k, v)]
        first = grad_or_zeros(ops.sum(function(*leaves) * g), leaves, create_graph=True)
        total = sum(ops.sum(x * y) for x, y in zip(first, t, strict=True))
        return tuple(x.numpy() for x in grad_or_zeros(total, leaves))

    return hvp


hvp = hvp_of(attention)


def scaled_by(scale: Callable[[Any, Any], float]) -> Callable[..., Any]:
    """Return attention with another factor before q·kᵀ, made of q and v."""
    return lambda q, k, v: attention(q, k, v, None, scale(q, v))


def both_dotted_tangent(q: Any, k: Any, v: Any, tq: Any, tk: Any, tv: Any) -> Any:
    """Return Ṗ·V + P·V̇, with c·Q̇·K̇ᵀ for Ṡ."""
    return along(lambda s, v: ops.softmax(s) @ v, (scores_of(q, k), v), (scores_of(tq, tk), tv))


def both_dotted(g: Any, q: Any, k: Any, v: Any, tq: Any, tk: Any, tv: Any) -> Any:
    """Return the hvp with c·Q̇·K̇ᵀ for Ṡ."""
    of = lambda q, k, v, s: gradients(scores=lambda q, k: s)(g, q, k, v)
    return along(of, (q, k, v, scores_of(q, k)), (tq, tk, tv, scores_of(tq, tk)))


def overflowing(s: Any) -> Any:
    """Return e^s / Σ e^s as it stands."""
    e = ops.exp(s)
    return e / ops.sum(e, -1, True)


def dv_for_dp(g: Any, q: Any, k: Any, v: Any, *t: Any) -> Any:
    """Return the hvp with g·Vᵀ for (dP)˙."""
    hq, hk, _ = moved(gradients())(g, q, k, v, *t[:2], v)
    return hq, hk, hvp(g, q, k, v, *t)[2]


def scaled(power: float, terms: str = "both") -> Callable[..., Any]:
    """Return the hvp with d to a power before (dQ)˙ and (dK)˙, or before the terms only in which Q and K move."""
    of = gradients(d_query=lambda ds, k: cut(ds) @ k, d_key=lambda ds, q: turned(cut(ds)) @ q)

    def gives(g: Any, q: Any, *args: Any) -> Any:
        (hq, hk, hv), factor = hvp(g, q, *args), q.shape[-1] ** power - 1.0
        more = (hq, hk) if terms == "both" else moved(of)(g, q, *args)[:2]
        return hq + factor * more[0], hk + factor * more[1], hv

    return gives


def unscaled(q: Any, k: Any) -> Any:
    """Return the scores, whose tangent is that of q·kᵀ."""
    u = q @ turned(k)
    return u - cut(u) + cut(scores_of(q, k))


def no_row_sum(s: Any) -> Any:
    """Return the softmax, whose tangent is P ∘ Ṡ."""
    return cut(ops.softmax(s)) * (1.0 + s - cut(s))


def diagonal(s: Any) -> Any:
    """Return the softmax, whose tangent is P ∘ (1 - P) ∘ Ṡ."""
    p = cut(ops.softmax(s))
    return p * (1.0 + (1.0 - p) * (s - cut(s)))


def plain_mean(s: Any) -> Any:
    """Return the softmax, whose tangent is P ∘ (Ṡ - mean Ṡ)."""
    return cut(ops.softmax(s)) * (1.0 + s - cut(s) - ops.mean(s - cut(s), -1, True))


fixed_softmax = lambda s: cut(ops.softmax(s))


def gauss_newton(g: Any, q: Any, k: Any, v: Any, *t: Any) -> Any:
    """Return Jᵀ·J·t."""
    return backward_of(attention, 3)(along(attention, (q, k, v), t), q, k, v)


SOFTMAX_MISTAKES = (
    (
        "softmax's denominator held fixed",
        "Ṗ is P ∘ Ṡ: the rows of such a Ṗ do not sum to 0. The sum in the softmax's denominator moves as well.",
        no_row_sum,
    ),
    (
        "only the softmax's diagonal",
        "Ṗ has only the diagonal of the softmax's Jacobian. Every score of a row moves every probability of that row.",
        diagonal,
    ),
    (
        "plain mean for weighted mean",
        "What is taken off Ṡ is its plain mean over the row. In step 2 each term of the sum has a weight.",
        plain_mean,
    ),
)
SCORES_MISTAKES = (
    (
        "keys held still in the scores",
        "Ṡ has the term in which the queries move, and not the other. Both factors of Q·Kᵀ move.",
        lambda q, k: scores_of(q, cut(k)),
    ),
    (
        "queries held still in the scores",
        "Ṡ has the term in which the keys move, and not the other. Both factors of Q·Kᵀ move.",
        lambda q, k: scores_of(cut(q), k),
    ),
    ("scale forgotten in the scores", "Ṡ lacks the factor 1/√d that S has.", unscaled),
)
SCALE_MISTAKES = (
    ("divided by d", "c is 1/d: the scores are divided by the root of d.", lambda q, v: 1.0 / q.shape[-1]),
    (
        "the values' width",
        "c is made of the width of the values, not of d.",
        lambda q, v: v.shape[-1] ** -0.5,
    ),
    ("scale forgotten", "c is nowhere: S = c·Q·Kᵀ, c = 1/√d.", lambda q, v: 1.0),
)
BOTH_DOTTED = "Ṡ is c·Q̇·K̇ᵀ. The dot of a product is a sum of two terms, in each of which one factor has the dot."
OVERFLOW = "e^s is infinite from s = 710 on, and 0 below -745: NaN. Take each row's largest score off (exercise 8)."

TANGENT_MISTAKES = (
    *(Mistake(name, says, tangent_of(attended(softmax=softmax))) for name, says, softmax in SOFTMAX_MISTAKES),
    *(Mistake(name, says, tangent_of(attended(scores=scores))) for name, says, scores in SCORES_MISTAKES),
    *(Mistake(name, says, tangent_of(scaled_by(scale))) for name, says, scale in SCALE_MISTAKES),
    Mistake("both factors with a dot", BOTH_DOTTED, both_dotted_tangent),
    Mistake("overflow", OVERFLOW, tangent_of(attended(softmax=overflowing))),
    Mistake(
        "probabilities held still",
        "Only the values move. out = P·V is a product of two things that move.",
        tangent_of(attended(softmax=fixed_softmax)),
    ),
    Mistake(
        "values held still",
        "Only the probabilities move. out = P·V is a product of two things that move.",
        tangent_of(attended(product=lambda p, v: p @ cut(v))),
    ),
    Mistake(
        "attention of the direction",
        "This is attention(tq, tk, tv). A derivative along a direction is taken at (q, k, v).",
        lambda q, k, v, *t: attention(*t),
    ),
)

PRODUCTS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("dQ", "dS and K", "K", {"d_query": lambda ds, k: ds @ cut(k)}),
    ("dQ", "dS and K", "dS", {"d_query": lambda ds, k: cut(ds) @ k}),
    ("dK", "dSᵀ and Q", "Q", {"d_key": lambda ds, q: turned(ds) @ cut(q)}),
    ("dK", "dSᵀ and Q", "dS", {"d_key": lambda ds, q: cut(turned(ds)) @ q}),
)

HVP_MISTAKES = (
    *(Mistake(name, says, moved(gradients(softmax=softmax))) for name, says, softmax in SOFTMAX_MISTAKES),
    *(Mistake(name, says, moved(gradients(scores=scores))) for name, says, scores in SCORES_MISTAKES),
    *(Mistake(name, says, hvp_of(scaled_by(scale))) for name, says, scale in SCALE_MISTAKES),
    Mistake("both factors with a dot", BOTH_DOTTED, both_dotted),
    Mistake("overflow", OVERFLOW, moved(gradients(softmax=overflowing))),
    Mistake(
        "c forgotten in dQ and dK",
        "The factor c of the lines dQ = c·dS·K and dK = c·dSᵀ·Q is missing: it is in Ṡ, and here once more.",
        scaled(0.5),
    ),
    Mistake("c twice in dQ and dK", "The factor c of dQ = c·dS·K and dK = c·dSᵀ·Q is there twice.", scaled(-0.5)),
    Mistake(
        "c in one term only",
        "In the terms of (dQ)˙ and (dK)˙ in which K and Q move, c is missing. Mind the brackets.",
        scaled(0.5, "moved"),
    ),
    Mistake("V for its dot", "(dP)˙ is g·Vᵀ, which is dP itself: what moves in that line?", dv_for_dp),
    Mistake(
        "probabilities held still",
        "Ṗ is missing everywhere: P is a constant in your lines. It moves with Q and K, in dV, in r and in dS.",
        moved(gradients(softmax=fixed_softmax)),
    ),
    Mistake("values held still", "(dP)˙ is missing: dP = g·Vᵀ, and V moves.", moved(gradients(values=cut))),
    Mistake(
        "row sums held still",
        "ṙ is missing: r is a sum over the keys of things that move.",
        moved(gradients(row_sums=lambda p, dp: cut(row_sums_of(p, dp)))),
    ),
    Mistake(
        "row sums: only dP moves",
        "ṙ has one of its two terms: the one with Ṗ is missing.",
        moved(gradients(row_sums=lambda p, dp: row_sums_of(cut(p), dp))),
    ),
    Mistake(
        "row sums: only P moves",
        "ṙ has one of its two terms: the one with (dP)˙ is missing.",
        moved(gradients(row_sums=lambda p, dp: row_sums_of(p, cut(dp)))),
    ),
    Mistake(
        "dS: only the bracket moves",
        "(dS)˙ has one of its two terms: P ∘ (dP - r) is a product, and its first factor moves, too.",
        moved(gradients(d_scores=lambda p, bracket: cut(p) * bracket)),
    ),
    Mistake(
        "dS: only P moves",
        "(dS)˙ has one of its two terms: P ∘ (dP - r) is a product, and the bracket moves, too.",
        moved(gradients(d_scores=lambda p, bracket: p * cut(bracket))),
    ),
    *(
        Mistake(
            f"{of}: {still} held still",
            f"({of})˙ has one of its two terms: {of} is a product of {pair}, and {still} moves, too.",
            moved(gradients(**line)),
        )
        for of, pair, still, line in PRODUCTS
    ),
    Mistake(
        "the gradient itself",
        "This is ∇f, without any derivative along the direction: t is not used.",
        lambda g, q, k, v, *t: backward_of(attention, 3)(g, q, k, v),
    ),
    Mistake(
        "Gauss-Newton",
        "This is the backward pass of exercise 8 fed with the tangent, Jᵀ·J·t: first derivatives only, and no g.",
        gauss_newton,
    ),
)

EXERCISE = Exercise(
    number=13,
    slug="hvp",
    title="Hessian-vector product of attention",
    asked=(
        Asked("tangent", ("tout",), right=tangent_of(attention), samples=samples, mistakes=TANGENT_MISTAKES),
        Asked("hvp", ("hq", "hk", "hv"), right=hvp, samples=with_g, mistakes=HVP_MISTAKES),
    ),
    hints=(
        "Write S and P first, then under each line the same line with dots. Name the dotted ones alike (ts, tp, tdp, "
        "tr, tds): every one of them has the shape of what it belongs to, so a forgotten transpose shows.",
        "Softmax: Ṗ = P ∘ (Ṡ - u) with u the mean of Ṡ over the row, each key weighted by its probability. It is the "
        "same function that the backward pass applies to dP.",
        "Of the six lines of the backward pass, dV and dP have one term with dots each (g stands still); r, dS, dQ and "
        "dK have two. In all there are ten terms; count yours.",
    ),
)
