"""Exercise 7: features split into heads and merged again, and the gradients of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.attention import merge_heads, split_heads
from minivit.ops.samples import Draw


def packed_samples(key: Key) -> list[Sample]:
    """Draw packed features (B, T, 3·H·d), and H."""
    r = Draw(key)
    return [
        ("all sizes different", (r(2, 5, 3 * 4 * 3), 4)),
        ("two heads of width two", (r(3, 4, 3 * 2 * 2), 2)),
        ("one image", (r(1, 3, 3 * 3 * 2), 3)),
        ("one token", (r(2, 1, 3 * 2 * 5), 2)),
        ("one head", (r(2, 3, 3 * 1 * 4), 1)),
        ("heads of width one", (r(2, 4, 3 * 3 * 1), 3)),
    ]


def head_samples(key: Key) -> list[Sample]:
    """Draw what heads return, (B, H, T, d)."""
    return [(label, (np.ascontiguousarray(split(*args)[2]),)) for label, args in packed_samples(key)]


def split(qkv: Any, heads: int) -> Any:
    """Return queries, keys and values of every head, (3, B, H, T, d)."""
    return split_heads(qkv, 3, heads)


def merge(x: Any) -> Any:
    """Return the heads side by side, (B, T, H·d)."""
    return merge_heads(x[None])


def sizes_of(qkv: Any, heads: int) -> dict[str, int]:
    """Return the length of every axis: p are the three parts, b images, h heads, t tokens, d a head's width."""
    b, t, features = qkv.shape
    return {"p": 3, "b": b, "h": heads, "t": t, "d": features // (3 * heads)}


def cut(x: Any, sizes: dict[str, int], order: str, wanted: str) -> Any:
    """Return x reshaped to axes of these names, then transposed to another order of them."""
    return ops.transpose(ops.reshape(x, tuple(sizes[a] for a in order)), tuple(order.index(a) for a in wanted))


def split_as(order: str, wanted: str = "pbhtd") -> Callable[..., Any]:
    """Return a split that takes the features' axis for axes in another order."""
    return lambda qkv, heads: cut(qkv, sizes_of(qkv, heads), order, wanted)


def parts_reshaped(qkv: Any, heads: int) -> Any:
    """Return the three parts cut apart, and each then reshaped to (B, H, T, d) as it lies."""
    sizes = sizes_of(qkv, heads)
    return ops.reshape(ops.stack(ops.split(qkv, 3, -1)), tuple(sizes[a] for a in "pbhtd"))


def joined_as(order: str) -> Callable[..., Any]:
    """Return a backward of split that brings the axes into another order before they are joined."""
    return lambda g, qkv, heads: ops.reshape(cut(g, sizes_of(qkv, heads), "pbhtd", order), qkv.shape)


def merged_as(order: str) -> Callable[..., Any]:
    """Return a merge that brings the axes into another order before they are joined."""

    def merged(x: Any) -> Any:
        b, h, t, d = x.shape
        return ops.reshape(cut(x, dict(zip("bhtd", x.shape, strict=True)), "bhtd", order), (b, t, h * d))

    return merged


def unmerged_as(order: str) -> Callable[..., Any]:
    """Return a backward of merge that takes g for an array of axes in another order."""
    return lambda g, x: cut(g, dict(zip("bhtd", x.shape, strict=True)), order, "bhtd")


SPLIT_MISTAKES = (
    Mistake(
        "reshape alone",
        "The features are cut by one reshape to the final shape. It cannot exchange axes: each head has pieces of "
        "other tokens. Cut the last axis first, then transpose.",
        split_as("pbhtd"),
    ),
    Mistake(
        "heads and width exchanged",
        "The features of a part are cut into (d, H). A head's d numbers lie side by side: which of h and i runs faster "
        "in f = (p·H + h)·d + i?",
        split_as("btpdh"),
    ),
    Mistake(
        "parts within heads",
        "The features are cut into (H, 3, d), as if queries, keys and values lay together for each head. Which of p "
        "and h is the slowest in f = (p·H + h)·d + i?",
        split_as("bthpd"),
    ),
    Mistake(
        "parts innermost",
        "The features are cut with the 3 last, as if query, key and value numbers took turns. Which of p, h and i is "
        "the slowest in f = (p·H + h)·d + i?",
        split_as("bthdp"),
    ),
    Mistake(
        "each part reshaped",
        "Queries, keys and values are told apart, but each part is then reshaped to (B, H, T, d) as it lies. A reshape "
        "cannot exchange tokens and heads: cut into (B, T, H, d), then transpose.",
        parts_reshaped,
    ),
    Mistake(
        "parts in reverse",
        "Entry 0 has the values and entry 2 the queries.",
        lambda qkv, heads: split(qkv, heads)[::-1],
    ),
)

SPLIT_BACKWARD_MISTAKES = (
    Mistake(
        "reshape alone",
        "g is reshaped to the shape of qkv. The forward moved numbers, so this gives them to others: transpose back "
        "first.",
        joined_as("pbhtd"),
    ),
    Mistake(
        "the forward's order again",
        "g is transposed by the order that the forward used. What undoes it is the inverse of that order.",
        joined_as("hptbd"),
    ),
    Mistake(
        "parts within heads",
        "The gradient is packed with queries, keys and values together for each head. They are packed as they came: "
        "first all queries.",
        joined_as("bthpd"),
    ),
    Mistake(
        "heads and width exchanged",
        "Within a part the gradient is packed with the heads running fastest. A head's d numbers lie side by side.",
        joined_as("btpdh"),
    ),
    Mistake(
        "tokens not before the heads",
        "The batch is in its place, but the tokens are not: for each token, all that belongs to it lies together.",
        joined_as("bphtd"),
    ),
    Mistake(
        "each part reshaped",
        "The gradient of each part, (B, H, T, d), is reshaped to (B, T, H·d) as it lies. Exchange heads and tokens "
        "first.",
        backward_of(parts_reshaped, 1),
    ),
    Mistake(
        "parts in reverse",
        "The gradient of the values stands where the queries' should be, and the other way round.",
        lambda g, qkv, heads: joined_as("btphd")(g[::-1], qkv, heads),
    ),
)

MERGE_MISTAKES = (
    Mistake(
        "reshape alone",
        "x is reshaped to (B, T, H·d) as it lies. It cannot exchange heads and tokens: transpose first.",
        merged_as("bhtd"),
    ),
    Mistake(
        "heads and width exchanged",
        "The heads run fastest in the output. They lie side by side, a head's d numbers together: h·d + i.",
        merged_as("btdh"),
    ),
    Mistake(
        "batch and tokens exchanged",
        "The tokens come before the batch when the axes are joined. B stays the first axis.",
        merged_as("tbhd"),
    ),
)

MERGE_BACKWARD_MISTAKES = (
    Mistake(
        "reshape alone",
        "g is reshaped to the shape of x. The forward moved numbers: cut the last axis first, then transpose.",
        unmerged_as("bhtd"),
    ),
    Mistake(
        "heads and width exchanged",
        "The last axis of g is cut into (d, H). A head's d numbers lie side by side.",
        unmerged_as("btdh"),
    ),
    Mistake(
        "transposed before it is cut",
        "g is transposed first and cut afterwards, so that its cut runs through the tokens. Undo the forward's steps "
        "in the opposite order.",
        lambda g, x: ops.reshape(ops.swapaxes(g, 1, 2), x.shape),
    ),
)

EXERCISE = Exercise(
    number=7,
    slug="heads",
    title="heads split and merged",
    asked=(
        Asked("split", ("out",), split, packed_samples, SPLIT_MISTAKES),
        Asked(
            "split_backward", ("dqkv",), backward_of(split, 1), with_cotangents(packed_samples, split),
            SPLIT_BACKWARD_MISTAKES,
        ),
        Asked("merge", ("out",), merge, head_samples, MERGE_MISTAKES),
        Asked(
            "merge_backward", ("dx",), backward_of(merge, 1), with_cotangents(head_samples, merge),
            MERGE_BACKWARD_MISTAKES,
        ),
    ),
    hints=(
        "Each function is one reshape and one transpose. split cuts first and moves then; its backward moves first and "
        "joins then. With merge it is the other way round.",
        "split: write down the names of the axes after the cut, in the order in which the feature's number counts, "
        "slowest first, with B and T before them. Below it write the names in the order asked. For each wanted name, "
        "at which place does it stand in the upper line? Those places are the transpose's arguments.",
        "Going back, do the same with the two lines exchanged: the axes of g in the order in which they come, and "
        "below them those of the cut qkv. Then join what was cut. merge_backward: cut the last axis of g into two, "
        "slow one first, and exchange two axes.",
    ),
)  # fmt: skip
