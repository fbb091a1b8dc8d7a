"""Exercise 14: attention in blocks, with nothing of size T² kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key, normal
from minivit.learn.exercise import Asked, Exercise, Limit, Mistake, Sample, backward_of
from minivit.learn.streamed import (
    from_lines,
    in_blocks,
    inner_of_block,
    last_block,
    last_dropped,
    last_top,
    newest_top,
    no_top,
    own_top,
    running_top,
    scores_of,
    shifted,
    top_from_zero,
)
from minivit.ops.samples import Draw

LARGE = 768
"""Queries and keys of the sample in which memory is measured."""


def samples(key: Key) -> list[Sample]:
    """Draw queries (Tq, d), keys (Tk, d), values (Tk, e) and the length of a block."""
    r = Draw(key)

    def drawn(queries: int, keys: int, d: int, e: int, block: int) -> tuple[Any, ...]:
        return r(queries, d), r(keys, d), r(keys, e), block

    # eighths, so that these scores are exact in whatever order they are summed: an ulp of 800 is 1e-13
    far, keys = np.round(8.0 * r(3, 4)) / 8.0, np.round(8.0 * r(7, 4)) / 8.0
    far[:, 0], keys[:, 0] = (320.0, -320.0, 1.0), 5.0  # scores near 800, near -800 and near 2
    falling = np.round(8.0 * r(7, 4)) / 8.0
    falling[:, 0] = np.where(np.arange(7) < 4, 4.0, -4.0)  # scores near 640, then near -640
    rising = np.sort(np.abs(r(7, 1)), axis=0)
    return [
        ("three blocks, the last one shorter", drawn(5, 7, 4, 3, 3)),
        ("blocks that fit", drawn(4, 6, 2, 4, 2)),
        ("a block that is larger than all", drawn(3, 4, 3, 3, 9)),
        ("blocks of one key", drawn(3, 5, 4, 2, 1)),
        ("one query", drawn(1, 8, 2, 2, 3)),
        ("one key", drawn(4, 1, 3, 2, 1)),
        ("rows of scores near 800, -800 and 2", (far, keys, r(7, 3), 2)),
        ("scores that fall by more than a thousand, and rise by it", (far, falling, r(7, 3), 2)),
        ("each block's scores above the last's", (np.abs(r(3, 1)) + 1.0, 3.0 * rising, r(7, 2), 2)),
    ]


def forward(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return attention and the logarithms of its softmax's sums."""
    return ops.attention(q, k, v), ops.logsumexp(scores_of(q, k), -1)


def with_results(key: Key, samples: Callable[[Key], list[Sample]] = samples) -> list[Sample]:
    """Draw g, and queries, keys, values, what forward returns of them, and the length of a block."""
    return [
        (label, (normal(key.child(1000 + i), (len(q), v.shape[1])), q, k, v, *forward(q, k, v, block), block))
        for i, (label, (q, k, v, block)) in enumerate(samples(key))
    ]


def backward(g: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, block: int) -> Any:
    """Return the gradients of attention."""
    return backward_of(ops.attention, 3)(g, q, k, v)


# ---- mistakes in the forward pass ------------------------------------------------------------------------------------


def partial_dropped(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return attention over whole blocks only; of none there is 0/0."""
    whole = len(k) // block * block
    if not whole:
        return np.full((len(q), v.shape[1]), np.nan), np.full(len(q), -np.inf)
    return forward(q, k[:whole], v[:whole], block)


def each_normalised(share: Callable[[int], float]) -> Callable[..., Any]:
    """Return the sum of every block's own attention, times a share of the number of blocks."""

    def gives(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
        lse = forward(q, k, v, block)[1]
        weights = in_blocks(ops.softmax, scores_of(q, k), block)
        return (weights @ v) * share(-(-len(k) // block)), lse

    return gives


def sum_of_the_last_block(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return the accumulator over the last block's sum."""
    out, lse = forward(q, k, v, block)
    s = scores_of(q, k)
    last = ops.logsumexp(s[:, (len(k) - 1) // block * block :], -1)
    return out * np.exp(lse - last)[:, None], last


def no_division(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return the accumulator."""
    s = scores_of(q, k)
    return np.exp(s - last_top(s, block)) @ v, forward(q, k, v, block)[1]


def sum_for_lse(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return attention, and the shifted sum."""
    out, lse = without_top(q, k, v, block)
    return out, np.exp(lse)


def without_top(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return attention, and the logarithm of the shifted sum."""
    out, lse = forward(q, k, v, block)
    return out, lse - last_top(scores_of(q, k), block)[:, 0]


def unscaled(q: Any, k: Any, v: Any, block: int) -> tuple[Any, Any]:
    """Return attention of scores without 1/√d."""
    return forward(q * q.shape[1] ** 0.5, k, v, block)


FORWARD_MISTAKES = (
    Mistake(
        "nothing rescaled",
        "Each block's terms keep the maximum that was known when they came in. When the maximum rises, what was summed "
        "up before has to be brought to the new one, the sum and the accumulator.",
        shifted(running_top, running_top),
    ),
    Mistake(
        "accumulator not rescaled",
        "The sum is brought to the new maximum, the accumulator is not.",
        shifted(running_top, last_top),
    ),
    Mistake(
        "sum not rescaled",
        "The accumulator is brought to the new maximum, the sum is not.",
        shifted(last_top, running_top),
    ),
    Mistake(
        "each block its own maximum",
        "The maximum is that of the block alone, and not of what came before as well; and nothing is brought from one "
        "to the other.",
        shifted(own_top, own_top, own_top),
    ),
    Mistake(
        "maximum of the block at hand",
        "What was summed up is brought to the maximum of the new block alone. If that is far below the old one, the "
        "factor is infinite: the new maximum is the larger of the two.",
        shifted(newest_top, newest_top, own_top),
    ),
    Mistake(
        "no maximum",
        "Nothing is subtracted from the scores before exp: e^1000 is infinite.",
        shifted(no_top, no_top, no_top),
    ),
    Mistake(
        "maximum from 0",
        "The running maximum begins at 0. In a row whose scores are all far below 0 it stays there, and the sum is 0: "
        "with which number does a maximum of nothing begin?",
        shifted(top_from_zero, top_from_zero, top_from_zero),
    ),
    Mistake(
        "one maximum for all queries",
        "The maximum is taken over the whole block of scores. Rows may be far apart: every query needs its own, or all "
        "its exponentials are 0. Look at axis= in the maximum.",
        shifted(*[lambda s, block: np.broadcast_to(s.max(), s.shape)] * 3),
    ),
    Mistake(
        "last block dropped",
        "The keys after the last whole block are left out. Count the turns of your loop for 7 keys in blocks of 3.",
        partial_dropped,
    ),
    Mistake(
        "blocks normalised and added",
        "Each block's softmax is divided by its own sum, and the results are added. There is one sum, of all blocks, "
        "and one division, at the end.",
        each_normalised(lambda blocks: 1.0),
    ),
    Mistake(
        "blocks normalised and averaged",
        "Each block's softmax is divided by its own sum, and the results are averaged. Blocks weigh differently: there "
        "is one sum, of all blocks, and one division, at the end.",
        each_normalised(lambda blocks: 1.0 / blocks),
    ),
    Mistake(
        "divided by the last block's sum",
        "The sum l has only the last block in it: = in the place of +=?",
        sum_of_the_last_block,
    ),
    Mistake("not divided", "out is the accumulator: the division by l is missing.", no_division),
    Mistake("lse is the sum", "lse is l itself. It is the logarithm of a sum, with the maximum: step 4.", sum_for_lse),
    Mistake(
        "lse without the maximum",
        "lse is the logarithm of the sum of e^(s - m). It should be that of the sum of e^s: step 4.",
        without_top,
    ),
    Mistake("scale forgotten", "The scores lack the factor 1/√d.", unscaled),
)

BACKWARD_MISTAKES = (
    Mistake(
        "D forgotten",
        "dS is P ∘ dP: D is missing, which every probability of a row owes to all others of that row.",
        from_lines(inner=lambda p, dp, block: 0.0),
    ),
    Mistake(
        "D of each block alone",
        "D is summed over the keys of the block at hand. It is a sum over all keys; step 6 has a way to get it at "
        "once.",
        from_lines(inner=inner_of_block),
    ),
    Mistake(
        "D averaged",
        "D is a mean where it should be a sum.",
        lambda g, *args: from_lines(inner=lambda p, dp, block: ops.sum(p * dp, -1, True) / g.shape[1])(g, *args),
    ),
    Mistake(
        "softmax of each block",
        "Each block's probabilities are divided by the block's own sum. lse holds the sum over all keys.",
        from_lines(probabilities=lambda s, lse, block: in_blocks(ops.softmax, s, block)),
    ),
    Mistake(
        "maximum in the place of lse",
        "The probabilities are e^(s - max): they are not divided by the sum. lse has the maximum and the sum in it.",
        from_lines(probabilities=lambda s, lse, block: np.exp(s - last_top(s, block))),
    ),
    Mistake(
        "no maximum",
        "The probabilities are e^s divided by e^lse: inf/inf where scores are large. Subtract before exp.",
        from_lines(probabilities=lambda s, lse, block: np.exp(s) / np.exp(lse)[:, None]),
    ),
    Mistake(
        "dq overwritten",
        "dq has only the last block's part. Every block of keys adds to every query's gradient.",
        from_lines(keys=last_block),
    ),
    Mistake(
        "last block dropped", "The keys after the last whole block get no gradient, and give none to dq.", last_dropped
    ),
    Mistake(
        "scale forgotten in the gradient",
        "The factor 1/√d is missing: the scores are Q·Kᵀ times it.",
        from_lines(scale=lambda q: 1.0),
    ),
    Mistake(
        "scale twice in the gradient",
        "The factor 1/√d is there twice. (If q is scaled beforehand, dK has it already, and dQ not.)",
        from_lines(scale=lambda q: 1.0 / q.shape[1]),
    ),
    Mistake(
        "scale forgotten in the scores",
        "The scores that backward makes again lack the factor 1/√d, and give other probabilities than forward's.",
        from_lines(of_scores=lambda q: 1.0),
    ),
)

LIMIT = (
    "The numbers are right, but somewhere an array of Tq x Tk is made: all scores, all probabilities, a mask of that "
    "shape. Which line of yours has a product of all queries with all keys?"
)


def large(key: Key) -> Sample:
    """Draw a sample whose scores would not fit."""
    r = Draw(key)
    return f"{LARGE} queries and keys, blocks of 32", (r(LARGE, 8), r(LARGE, 8), r(LARGE, 8), 32)


def large_with_results(key: Key) -> Sample:
    """Draw the same for backward."""
    return with_results(key, lambda key: [large(key)])[0]


EXERCISE = Exercise(
    number=14,
    slug="blockwise",
    title="attention in blocks",
    asked=(
        Asked(
            "forward",
            ("out", "lse"),
            right=forward,
            samples=samples,
            mistakes=FORWARD_MISTAKES,
            limit=Limit(large, LARGE * LARGE * 4, "too much memory", LIMIT),
        ),
        Asked(
            "backward",
            ("dq", "dk", "dv"),
            right=backward,
            samples=with_results,
            mistakes=BACKWARD_MISTAKES,
            limit=Limit(large_with_results, LARGE * LARGE * 4, "too much memory", LIMIT),
        ),
    ),
    hints=(
        "Loop over the starts of the blocks, range(0, Tk, block), and take k[start : start + block]; queries need no "
        "loop. Keep m (Tq, 1) at -∞, l (Tq, 1) and a (Tq, e) at zero before it.",
        "In each turn: the block's scores; the new maximum of the old one and of theirs; one factor, (Tq, 1), by which "
        "l and a are multiplied before the block's own sum and product with the values are added. Only then is m "
        "replaced.",
        "Backward: D (Tq, 1) is the sum over e of g times out, before the loop. In the loop P of the block is exp of "
        "scores minus lse; then the five lines of exercise 8 with these P and D, of which dk and dv fill their rows "
        "and dq is added up.",
    ),
)
