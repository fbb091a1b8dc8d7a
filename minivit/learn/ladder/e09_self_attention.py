"""Exercise 9: self-attention of several heads from one packed array, with a mask, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.learn.ladder import e08_attention as one_head
from minivit.learn.ladder.e08_attention import large, scores, spanning, turned, unshifted
from minivit.ops.attention import merge_heads, split_heads
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw packed features (B, T, 3·H·d), H, and a mask (T, T) or (B, 1, T, T)."""
    r = Draw(key)
    far = np.concatenate([large(r(2, 4, 2, 4), 3200.0), large(r(2, 4, 2, 4), 0.5), r(2, 4, 2, 4)], axis=2)
    far[:, ::2, :2] *= -1.0  # of every other token's queries
    q, k = spanning(r, 4, 2, 2)  # only the last token may attend to the last key, whose score is the largest
    return [
        ("each token sees itself and those before", (r(2, 5, 3 * 3 * 2), 3, later(5))),
        ("a mask for each image", (r(3, 4, 3 * 2 * 3), 2, r.mask(3, 1, 4, 4) & (np.arange(4) > 0)[:, None])),
        ("a token that may attend to nothing", (r(2, 5, 3 * 2 * 4), 2, r.mask(5, 5))),
        ("nothing masked, one image", (r(1, 3, 3 * 3 * 5), 3, np.zeros((3, 3), bool))),
        ("one token", (r(2, 1, 3 * 2 * 3), 2, np.zeros((1, 1), bool))),
        ("one head", (r(2, 3, 3 * 1 * 4), 1, later(3))),
        ("rows of scores around 800 and around -800", (far.reshape(2, 4, 3 * 2 * 4), 2, later(4))),
        ("a masked score 3000 above the others", (merge_heads(np.stack([q, k, r(2, 2, 4, 4)])), 2, later(4))),
    ]


def later(tokens: int) -> np.ndarray:
    """Return the causal mask: True for keys after the query."""
    return np.triu(np.ones((tokens, tokens), bool), 1)


def forward(qkv: Any, heads: int, mask: Any) -> Any:
    """Return the attended values, heads side by side."""
    return ops.self_attention(qkv, heads, None, mask)


right = backward_of(forward, 1)


def weighed_by(weights: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return self-attention with other weights, made of the scores and the mask."""

    def attended(qkv: Any, heads: int, mask: Any) -> Any:
        parts = split_heads(qkv, 3, heads)
        return merge_heads(ops.matmul(weights(scores(parts[0], parts[1]), mask), parts[2])[None])

    return attended


def scaled_by(scale: Callable[[int, int], float]) -> Callable[..., Any]:
    """Return self-attention with another factor before q·kᵀ, made of H and d."""
    return lambda qkv, heads, mask: ops.self_attention(
        qkv, heads, None, mask, scale(heads, qkv.shape[-1] // (3 * heads))
    )


def read_by_head(qkv: Any, heads: int) -> Any:
    """Return features that lie as (H, 3, d) so that they lie as (3, H, d)."""
    b, t, features = qkv.shape
    return ops.reshape(ops.swapaxes(ops.reshape(qkv, (b, t, heads, 3, -1)), 2, 3), (b, t, features))


def merged_by_reshape(qkv: Any, heads: int, mask: Any) -> Any:
    """Return the heads' outputs (B, H, T, d) reshaped to (B, T, H·d) as they lie."""
    return ops.reshape(split_heads(forward(qkv, heads, mask), 1, heads)[0], (*qkv.shape[:2], -1))


def parts_as(change: Callable[[Any, Any, Any], list[Any]]) -> Callable[..., Any]:
    """Return a backward that packs ``change(dq, dk, dv)``, each (B, H, T, d), in the place of the three."""
    return lambda g, qkv, heads, mask: merge_heads(
        ops.stack(change(*split_heads(right(g, qkv, heads, mask), 3, heads)))
    )


def packed(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward of exercise 8, (g, q, k, v, mask) → (dq, dk, dv), for packed features."""
    return lambda g, qkv, heads, mask: merge_heads(
        ops.stack(backward(split_heads(g, 1, heads)[0], *split_heads(qkv, 3, heads), mask))
    )


def uniform_rows(s: Any, mask: Any) -> Any:
    """Return weights whose rows, where nothing is allowed, are 1/T everywhere."""
    return ops.softmax(ops.where(mask, -1e30, s))


def masked_afterwards(s: Any, mask: Any) -> Any:
    """Return the softmax over all keys, with zeros where the mask is True."""
    return ops.where(mask, 0.0, ops.softmax(s))


def shifted_by(shift: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """Return weights by e^(s - shift(s)), s with -1e30 where masked."""
    masked = lambda s, mask: np.where(mask, -1e30, s)
    return lambda s, mask: np.where(mask, 0.0, unshifted(masked(s, mask) - shift(masked(s, mask))))


def largest_of_all(s: Any, mask: Any, zeros: bool) -> Any:
    """Return weights with the row's largest score taken off, masked ones included; 0/0 becomes 0 if ``zeros``."""
    e = np.where(mask, 0.0, np.exp(s - s.max(axis=-1, keepdims=True)))
    p = np.where(mask, 0.0, e / e.sum(axis=-1, keepdims=True))
    return np.nan_to_num(p) if zeros else p


def by_hand(weights: Callable[[Any, Any], Any], in_ds: bool = False) -> Callable[..., Any]:
    """Return the backward of the text with other weights, and dS masked, too, if ``in_ds``."""

    def backward(g: Any, q: Any, k: Any, v: Any, mask: Any) -> tuple[Any, ...]:
        p, dp = weights(scores(q, k), mask), ops.matmul(g, turned(v))
        ds = np.where(in_ds & mask, 0.0, p * (dp - ops.sum(p * dp, -1, True)))
        return *backward_of(scores, 2)(ds, q, k), ops.matmul(turned(p), g)

    return packed(backward)


def read_in_parts(qkv: Any, heads: int, mask: Any) -> Any:
    """Return self-attention of qkv reshaped to (3, B, H, T, d) as it lies."""
    b, t, features = qkv.shape
    return forward(merge_heads(ops.reshape(qkv, (3, b, heads, t, features // (3 * heads)))), heads, mask)


def packed_by_reshape(g: Any, qkv: Any, heads: int, mask: Any) -> Any:
    """Return (dq, dk, dv), each (B, H, T, d), reshaped to (B, T, H·d) as they lie and joined."""
    parts = split_heads(right(g, qkv, heads, mask), 3, heads)  # (3, B, H, T, d)
    return ops.concat([ops.reshape(part, (*qkv.shape[:2], -1)) for part in parts], -1)


def cotangent_by_reshape(g: Any, qkv: Any, heads: int, mask: Any) -> Any:
    """Return the gradient where g (B, T, H·d) is reshaped to (B, H, T, d) as it lies."""
    b, t, features = g.shape
    return right(merge_heads(ops.reshape(g, (1, b, heads, t, features // heads))), qkv, heads, mask)


NOTHING_ALLOWED: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "all attended where nothing is allowed": (
        "A token that may attend to nothing attends to all tokens alike: its scores are all equal, however small they "
        "are. Its weights should be 0.",
        uniform_rows,
    ),
    "mask without effect where nothing is allowed": (
        "Something finite is added to masked scores. A token that may attend to nothing has it added to all its "
        "scores, where it cancels. Its weights should be 0.",
        lambda s, mask: ops.softmax(s + np.where(mask, -1e9, 0.0)),
    ),
    "NaN where nothing is allowed": (
        "A row of scores that are all minus infinity has no softmax: -∞ - (-∞) is NaN. Its weights should be 0.",
        lambda s, mask: np.where(np.all(mask, -1, keepdims=True), np.nan, uniform_rows(s, mask)),
    ),
}
"""What learners do with a row that is all masked: name → (what the learner reads, weights of scores and mask)."""

WRONG_WAY_ROUND = "Tokens attend where they may not, and not where they may. True means: may not."

FORWARD_MISTAKES = (
    Mistake("mask the wrong way round", WRONG_WAY_ROUND, lambda qkv, heads, mask: forward(qkv, heads, ~mask)),
    *(Mistake(name, says, weighed_by(weights)) for name, (says, weights) in NOTHING_ALLOWED.items()),
    *(
        Mistake(
            f"mask the wrong way round, {name}",
            f"{WRONG_WAY_ROUND} And once it is turned round: {says}",
            lambda qkv, heads, mask, weights=weights: weighed_by(weights)(qkv, heads, ~mask),
        )
        for name, (says, weights) in NOTHING_ALLOWED.items()
    ),
    Mistake(
        "mask forgotten",
        "Every token attends to all tokens, as if mask were False everywhere.",
        lambda qkv, heads, mask: forward(qkv, heads, np.zeros_like(mask)),
    ),
    Mistake(
        "mask transposed",
        "mask[i, j] is read as if i were the key. Its rows are queries, as those of S.",
        lambda qkv, heads, mask: forward(qkv, heads, np.swapaxes(mask, -1, -2)),
    ),
    Mistake(
        "mask after the softmax",
        "The masked weights are 0, but those that are left do not add up to 1: the sum in the denominator has run over "
        "all keys.",
        weighed_by(masked_afterwards),
    ),
    Mistake(
        "masked scores set to 0",
        "The masked scores are 0 when the softmax is taken, but e^0 is 1. Which score has the weight 0?",
        weighed_by(lambda s, mask: ops.softmax(ops.where(mask, 0.0, s))),
    ),
    Mistake(
        "scores not divided by √d", "The scores are q·kᵀ as they are. Look at step 2.", scaled_by(lambda heads, d: 1.0)
    ),
    Mistake(
        "divided by the root of all features",
        "The scores are divided by √(H·d). A head's scores are sums over its own features.",
        scaled_by(lambda heads, d: 1.0 / math.sqrt(heads * d)),
    ),
    Mistake(
        "parts within heads",
        "The features are cut into (H, 3, d), as if queries, keys and values lay together for each head. First come "
        "all queries.",
        lambda qkv, heads, mask: forward(read_by_head(qkv, heads), heads, mask),
    ),
    Mistake(
        "heads merged by a reshape",
        "(B, H, T, d) is reshaped to (B, T, H·d) as it lies. A reshape cannot exchange heads and tokens.",
        merged_by_reshape,
    ),
    Mistake(
        "overflow",
        "e^s is infinite from s = 710 on, and 0 below -745: the quotient is NaN. Take each row's largest score off "
        "first.",
        weighed_by(lambda s, mask: np.where(mask, 0.0, unshifted(s, mask))),
    ),
    Mistake(
        "one maximum for all rows",
        "The largest score of all is taken off every row. In a row far below it every e^s is 0, and so is their sum. "
        "Take off each row's own.",
        weighed_by(lambda s, mask: np.where(mask, 0.0, unshifted(s - np.max(np.where(mask, -1e30, s)), mask))),
    ),
    Mistake(
        "mean or smallest taken off",
        "Not the largest score of a row is taken off, but their mean or the smallest, so that e^s is infinite.",
        weighed_by(shifted_by(lambda s: s.mean(axis=-1, keepdims=True))),
    ),
    *(
        Mistake(
            f"maximum before the mask{more}",
            "The largest score of the row is taken before the mask. If it is a masked one, far above the others, e^s "
            "is 0 for all that is allowed: mask first.",
            weighed_by(partial(largest_of_all, zeros=bool(more))),
        )
        for more in ("", ", 0 for 0/0")
    ),
    Mistake(
        "0 times infinity",
        "Where mask is False, mask·(-∞) is 0·∞: NaN. Choose by np.where, do not multiply.",
        weighed_by(lambda s, mask: np.where(mask, 0.0, np.nan * s)),
    ),
    Mistake(
        "reshape alone",
        "qkv is cut by one reshape to (3, B, H, T, d). It cannot exchange axes: each head has pieces of other tokens.",
        read_in_parts,
    ),
    Mistake(
        "overflow, and NaN where nothing is allowed",
        "Two things give NaN: e^s, which is infinite from s = 710 on (take each row's largest score off first), and a "
        "row with nothing allowed, whose sum is 0 (its weights should be 0).",
        weighed_by(unshifted),
    ),
)

BACKWARD_MISTAKES = (
    *(replace(mistake, gives=packed(mistake.gives)) for mistake in one_head.BACKWARD_MISTAKES),
    Mistake(
        "mask forgotten going back",
        "The weights are computed again in backward without the mask.",
        lambda g, qkv, heads, mask: right(g, qkv, heads, np.zeros_like(mask)),
    ),
    Mistake(
        "mask in dS alone",
        "dS is masked, but the P that it is made of is not: its rows have weights for masked keys.",
        by_hand(lambda s, mask: ops.softmax(s), in_ds=True),
    ),
    Mistake(
        "root of all features",
        "dQ and dK have the factor 1/√(H·d). A head's scores are sums over its own features.",
        parts_as(lambda dq, dk, dv: [dq / math.sqrt(dq.shape[1]), dk / math.sqrt(dq.shape[1]), dv]),
    ),
    Mistake(
        "packed by one reshape",
        "dQ, dK and dV, stacked to (3, B, H, T, d), are reshaped to (B, T, 3·H·d) as they lie. Bring the axes into the "
        "order of qkv first.",
        lambda g, qkv, heads, mask: ops.reshape(split_heads(right(g, qkv, heads, mask), 3, heads), qkv.shape),
    ),
    Mistake(
        "mask after the softmax",
        "The gradient is that of weights that are set to 0 after a softmax over all keys. Take the weights as the "
        "forward has them.",
        by_hand(masked_afterwards),
    ),
    Mistake(
        "gradient from tokens that see nothing",
        "Gradient flows from a token that may attend to nothing: its row of P has equal weights here, and not zeros.",
        by_hand(uniform_rows),
    ),
    Mistake(
        "queries and keys exchanged",
        "dQ and dK stand in each other's place.",
        parts_as(lambda dq, dk, dv: [dk, dq, dv]),
    ),
    Mistake(
        "parts in reverse",
        "dV stands where dQ should be, and the other way round: queries, keys, values.",
        parts_as(lambda dq, dk, dv: [dv, dk, dq]),
    ),
    Mistake(
        "values only",
        "The parts of queries and keys are 0. dV is right, but P depends on Q and K.",
        parts_as(lambda dq, dk, dv: [0.0 * dq, 0.0 * dk, dv]),
    ),
    Mistake(
        "parts within heads",
        "The gradient is packed with queries, keys and values together for each head. They are packed as they came: "
        "first all queries.",
        lambda g, qkv, heads, mask: backward_of(read_by_head, 1)(right(g, qkv, heads, mask), qkv, heads),
    ),
    Mistake(
        "packed by a reshape",
        "dQ, dK and dV, (B, H, T, d), are reshaped to (B, T, H·d) as they lie. Exchange heads and tokens first.",
        packed_by_reshape,
    ),
    Mistake(
        "g reshaped to heads",
        "g, (B, T, H·d), is reshaped to (B, H, T, d) as it lies. Cut its last axis first, then exchange two axes.",
        cotangent_by_reshape,
    ),
)

EXERCISE = Exercise(
    number=9,
    slug="self_attention",
    title="self-attention from packed qkv, masked",
    asked=(
        Asked("forward", ("out",), forward, samples, FORWARD_MISTAKES),
        Asked("backward", ("dqkv",), right, with_cotangents(samples, forward), BACKWARD_MISTAKES),
    ),
    hints=(
        "Copy your functions of exercises 7 and 8 and put them together; only the helper that makes P is new, for it "
        "knows the mask. Call the same helper in backward.",
        "In the helper: where mask is True put -1e30 in the place of the score, take each row's largest off, "
        "exponentiate, divide by the sum, and where mask is True put 0. A row with nothing allowed then comes out "
        "right by the last step.",
        "backward is split, P, g cut into heads, dV, dP, dS, dQ, dK, and packing: the same lines as in exercise 8 with "
        "the mask nowhere but in P, since every term of dS has a factor P. To pack, stack the three as split returns "
        "them and use your split_backward, or merge each and join them along the last axis.",
    ),
)
