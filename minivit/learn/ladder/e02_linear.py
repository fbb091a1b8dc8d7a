"""Exercise 2: a linear layer on any number of leading axes, its bias broadcast over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw x (…, I), weight (O, I) and bias (O,)."""
    r = Draw(key)
    tidy = lambda *shape: np.round(r(*shape), 2)
    return [
        ("two rows, 3 to 2", (tidy(2, 3), tidy(2, 3), tidy(2))),
        ("square: 3 rows, 3 to 3", (r(3, 3), r(3, 3), r(3))),
        ("one row, 5 to 3", (r(1, 5), r(3, 5), r(3))),
        ("no leading axis", (r(4), r(3, 4), r(3))),
        ("a batch of 2 with 3 tokens each", (r(2, 3, 5), r(4, 5), r(4))),
        ("a batch of one", (r(1, 5, 2), r(3, 2), r(3))),
        ("one token each, 4 to 4", (r(3, 1, 4), r(4, 4), r(4))),
        ("three leading axes, one output", (r(2, 3, 2, 4), r(1, 4), r(1))),
    ]


def forward(x: Any, weight: Any, bias: Any) -> Any:
    """Return x·Wᵀ + b."""
    return ops.linear(x, weight, bias)


RIGHT = backward_of(forward, 3)


def with_other(output: int, change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward of which one output, by its number, is ``change(g, x, weight, right)``."""

    def gives(g: Any, x: Any, weight: Any, bias: Any) -> tuple[Any, ...]:
        found = list(RIGHT(g, x, weight, bias))
        found[output] = change(g, x, weight, found[output])
        return tuple(found)

    return gives


def rows(x: Any) -> int:
    """Return how many rows x (…, I) has."""
    return int(np.prod(np.shape(x)[:-1]))


EXERCISE = Exercise(
    number=2,
    slug="linear",
    title="a linear layer, its bias broadcast",
    asked=(
        Asked(
            "forward",
            ("y",),
            right=forward,
            samples=samples,
            mistakes=(
                Mistake(
                    "bias forgotten",
                    "The bias is not added.",
                    lambda x, weight, bias: ops.linear(x, weight, None),
                ),
                Mistake(
                    "weight not transposed",
                    "x meets the first axis of weight, which counts the outputs. That shows only where both axes are "
                    "of one length; elsewhere the product does not exist.",
                    lambda x, weight, bias: ops.linear(x, weight.T, bias),
                ),
                Mistake(
                    "bias within the product",
                    "The bias is added to x, or to weight, before the product, where it is added to the result.",
                    lambda x, weight, bias: ops.linear(x, weight + bias[:, None], None),
                ),
            ),
        ),
        Asked(
            "backward",
            ("dx", "dweight", "dbias"),
            right=RIGHT,
            samples=with_cotangents(samples, forward),
            mistakes=(
                Mistake(
                    "bias not summed",
                    "dbias is g as it is. One bias was added to every row, so it gets something back from every row, "
                    "and its gradient has its shape, (O,).",
                    with_other(2, lambda g, x, weight, right: g),
                ),
                Mistake(
                    "bias summed over its own axis",
                    "dbias is a sum over the last axis. That is the one axis that the bias has; it was broadcast over "
                    "all the others.",
                    with_other(2, lambda g, x, weight, right: g.sum(axis=-1)),
                ),
                Mistake(
                    "bias summed over the first axis only",
                    "dbias is summed over the first axis, which is enough for a matrix x, not for more leading axes, "
                    "nor for none.",
                    with_other(2, lambda g, x, weight, right: g.sum(axis=0)),
                ),
                Mistake(
                    "bias averaged",
                    "dbias is a mean over the rows. Whether L is a mean is L's business, and in g already: what comes "
                    "back from several uses is added.",
                    with_other(2, lambda g, x, weight, right: right / rows(x)),
                ),
                Mistake(
                    "dweight transposed",
                    "dweight is transposed: entry (o, i) belongs to the output o and the input i, like weight's own.",
                    with_other(1, lambda g, x, weight, right: right.T),
                ),
                Mistake(
                    "dweight for each image",
                    "dweight keeps the leading axes: one weight was used in every image, so what comes back from all "
                    "of them is added. How can all rows, whatever axes they lie along, be made the rows of one matrix?",
                    with_other(1, lambda g, x, weight, right: g.swapaxes(-1, -2) @ x),
                ),
                Mistake(
                    "dweight averaged",
                    "dweight is a mean over the rows. Whether L is a mean is L's business, and in g already: what "
                    "comes back from several uses is added.",
                    with_other(1, lambda g, x, weight, right: right / rows(x)),
                ),
                Mistake(
                    "weight transposed in dx",
                    "dx is made with the transpose of what it should be made with. Look at the shapes: g (…, O) has to "
                    "become (…, I). Where O = I the wrong one works, too.",
                    with_other(0, lambda g, x, weight, right: g @ weight.T),
                ),
                Mistake(
                    "g forgotten",
                    "The result does not depend on g: it is right for a g of ones only. Start from what arrives, g.",
                    lambda g, *args: RIGHT(np.ones_like(g), *args),
                ),
            ),
        ),
    ),
    hints=(
        "Write one entry of the result as a sum with indices, for one row n: y_no. Then ask of each of x_ni, weight_oi "
        "and bias_o: in which entries of y does it stand, and with which factor? Each is a sum of g times that factor.",
        "x_ni stands in the entries y_no of its own row, for all o. weight_oi stands in y_no for all rows n. bias_o "
        "stands in y_no for all rows n, with the factor 1. What is summed over is what must not be left in the result: "
        "read the products of matrices, and which side is transposed, off the indices.",
        "The sum over o of g_no weight_oi is a product of two matrices as they are. The sum over n of g_no x_ni needs "
        "all leading axes merged into one n: reshape g and x to two axes, (-1, last), then one of them is transposed. "
        "The sum over n of g_no uses the same reshaped g.",
    ),
)
