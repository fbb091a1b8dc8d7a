"""Exercise 4: cross-entropy from logits, a mean over rows, with label smoothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw logits (…, K), labels (…) and the smoothing."""
    r = Draw(key)
    return [
        ("two rows, three classes", (np.round(r(2, 3), 2), r.integers(3, 2), 0.0)),
        ("smoothed: two rows, three classes", (np.round(r(2, 3), 2), r.integers(3, 2), 0.25)),
        ("one row, five classes", (r(1, 5), r.integers(5, 1), 0.0)),
        ("no leading axis", (r(4), np.asarray(r.integers(4)), 0.1)),
        ("two leading axes", (r(2, 3, 5), r.integers(5, 2, 3), 0.3)),
        ("a row of each class", (r(4, 4), np.arange(4), 0.0)),
        ("one class alone", (r(3, 1), np.zeros(3, np.int64), 0.0)),
        ("logits near 900 and near -900", (900.0 * np.sign(r(3, 4)) + r(3, 4), r.integers(4, 3), 0.1)),
        ("one row near 900, the next near -900", (np.array([[900.0], [-900.0]]) + r(2, 3), r.integers(3, 2), 0.0)),
        ("surely wrong: the label's logit is 900 below", (r(2, 3) - 900.0 * np.eye(3)[:2], np.arange(2), 0.0)),
    ]


def forward(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the mean over rows of -Σ target · log softmax(logits)."""
    return ops.cross_entropy(logits, labels, smoothing)


def held_against(logits: Any, labels: Any, on: float, off: float) -> Any:
    """Return targets (…, K): ``on`` for the row's label, ``off`` for the other classes."""
    return np.where(np.asarray(labels)[..., None] == np.arange(logits.shape[-1]), on, off)


def against(logits: Any, target: Any) -> Any:
    """Return the mean over rows of -Σ target · log softmax(logits) for targets of any kind."""
    return ops.sum(ops.log_softmax(logits) * target) / -rows(logits)


def rows(logits: Any) -> int:
    """Return how many rows logits (…, K) have."""
    return int(np.prod(logits.shape[:-1]))


def exchanged(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss with the shares of smoothing and label exchanged."""
    share = (1.0 - smoothing) / logits.shape[-1]
    return against(logits, held_against(logits, labels, smoothing + share, share))


def others_only(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss with the smoothing shared by the other classes."""
    off = smoothing / max(logits.shape[-1] - 1, 1)
    return against(logits, held_against(logits, labels, 1.0 - smoothing, off))


def log_of(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the loss by the logarithm of changed probabilities."""

    def gives(logits: Any, labels: Any, smoothing: float) -> Any:
        target = held_against(logits, labels, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
        return (np.log(change(ops.softmax(logits))) * target).sum() / -rows(logits)

    return gives


def kept_from_zero() -> Iterator[Mistake]:
    """Yield the usual ways to have no logarithm of 0: a small number added to p, or taken where p is less."""

    def made(what: str, small: float, change: Callable[[Any], Any]) -> Mistake:
        says = (
            f"The logarithm is that of {what}, so that it is never of 0: a row that is surely wrong gets a loss of "
            f"{-np.log(small):.0f} where the true one is 900, and others are a little off. Take the logarithm on "
            "paper: log p can be written without p."
        )
        return Mistake(f"logarithm of {what}", says, log_of(change))

    for small in (1e-5, 1e-6, 1e-7, 1e-8, 1e-9):
        yield made(f"p + {small:.0e}", small, plus(small))
        yield made(f"p, {small:.0e} at least", small, clipped(small, 1.0))
        yield made(f"p clipped by {small:.0e} on both sides", small, clipped(small, 1.0 - small))
    kinds = np.finfo(np.float64)
    for small in (1e-12, 1e-15, 1e-16, float(kinds.eps), 1e-20, 1e-30, 1e-300, float(kinds.tiny)):
        yield made(f"p + {small:.2g}, or of p clipped there", small, plus(small))


def plus(small: float) -> Callable[[Any], Any]:
    """Return a function that adds ``small``."""
    return lambda p: p + small


def clipped(low: float, high: float) -> Callable[[Any], Any]:
    """Return a function that clips to [low, high]."""
    return lambda p: p.clip(low, high)


def not_taken_off(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss with the smoothing added to all, and taken from none."""
    off = smoothing / logits.shape[-1]
    return against(logits, held_against(logits, labels, 1.0 + off, off))


def log_of_softmax(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss by the logarithm of the probabilities, which may be 0."""
    target = held_against(logits, labels, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
    logs = np.where(target > 0.0, np.log(ops.softmax(logits)) * target, 0.0)
    return logs.sum() / -rows(logits)


def overflowing(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss by log Σ e^x without a shift."""
    target = held_against(logits, labels, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return (logs * target).sum() / -rows(logits)


def one_maximum(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss with the largest of all rows taken off each: log 0 in a row far below."""
    target = held_against(logits, labels, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
    shifted = logits - logits.max()
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return (logs * target).sum() / -rows(logits)


def first_axis(logits: Any) -> float:
    """Return the rows for each entry of the first axis, by which a mean over that axis alone is too large."""
    return rows(logits) / logits.shape[0] if logits.ndim > 1 else 1.0


RIGHT = backward_of(forward, 1)


def probabilities(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient without the target."""
    return g * ops.softmax(logits) / rows(logits)


def in_probabilities(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient in p, where that in the logits is asked for."""
    target = held_against(logits, labels, 1.0 - smoothing, 0.0) + smoothing / logits.shape[-1]
    return -g * target / ops.softmax(logits) / rows(logits)


def less_one_everywhere(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient with 1 taken off every class."""
    return g * (ops.softmax(logits) - 1.0) / rows(logits)


EXERCISE = Exercise(
    number=4,
    slug="cross_entropy",
    title="cross-entropy from logits, with label smoothing",
    asked=(
        Asked(
            "forward",
            ("loss",),
            right=forward,
            samples=samples,
            mistakes=(
                Mistake(
                    "overflow",
                    "e^900 is infinite, so the loss is not a number. Shift each row before exp, as in exercise 3; what "
                    "does the shift do to log Σ e^x?",
                    overflowing,
                ),
                Mistake(
                    "one maximum for all rows",
                    "The maximum of all rows together is taken off, so that the sum of a row far below it is 0, and "
                    "its logarithm infinite. Each row needs a number of its own.",
                    one_maximum,
                ),
                Mistake(
                    "logarithm of 0",
                    "A probability of e^(-900) is 0 in float64, and its logarithm is infinite, while the true loss is "
                    "900. Take the logarithm on paper: log p can be written without p.",
                    log_of_softmax,
                ),
                *kept_from_zero(),
                Mistake(
                    "sum for mean",
                    "The rows' losses are added up; the loss is their mean.",
                    lambda *args: forward(*args) * rows(args[0]),
                ),
                Mistake(
                    "mean over classes, too",
                    "The loss is too small by the number of classes: over the classes there is a sum, over the rows a "
                    "mean. A mean without axis= takes both.",
                    lambda *args: forward(*args) / args[0].shape[-1],
                ),
                Mistake(
                    "mean over the first axis only",
                    "The sum is divided by the length of the first axis. Every row counts, along all leading axes.",
                    lambda *args: forward(*args) * first_axis(args[0]),
                ),
                Mistake(
                    "smoothing forgotten",
                    "The label has all of the target. `smoothing` is the share that goes to all classes alike.",
                    lambda logits, labels, smoothing: forward(logits, labels, 0.0),
                ),
                Mistake(
                    "smoothing on the wrong side",
                    "The label gets the share `smoothing` and the uniform part the rest: it is the other way round.",
                    exchanged,
                ),
                Mistake(
                    "smoothing for the others only",
                    "The smoothed share goes to the K - 1 other classes. It goes to all K, the label's among them.",
                    others_only,
                ),
                Mistake(
                    "target adds up to more than 1",
                    "The uniform part is added, and nothing is taken off the label for it.",
                    not_taken_off,
                ),
            ),
        ),
        Asked(
            "backward",
            ("dlogits",),
            right=RIGHT,
            samples=with_cotangents(samples, forward),
            mistakes=(
                Mistake(
                    "not divided by the rows",
                    "The gradient is that of the sum of the rows' losses. The forward pass divides by their number.",
                    lambda *args: RIGHT(*args) * rows(args[1]),
                ),
                Mistake(
                    "divided by the first axis only",
                    "The gradient is divided by the length of the first axis. The mean is over all rows, along all "
                    "leading axes.",
                    lambda *args: RIGHT(*args) * first_axis(args[1]),
                ),
                Mistake(
                    "target forgotten",
                    "These are the probabilities. They come from the term log Σ e^x; the other term, the logits that "
                    "the target picks, has a derivative, too.",
                    probabilities,
                ),
                Mistake(
                    "1 taken off every class",
                    "1 is taken off in every class, where the target is 1 for the label's class only. Does the index "
                    "pick one entry in each row, or a whole row?",
                    less_one_everywhere,
                ),
                Mistake(
                    "target minus p",
                    "The sign is wrong: the loss has a minus before the logarithm.",
                    lambda *args: -RIGHT(*args),
                ),
                Mistake(
                    "smoothing forgotten",
                    "The gradient is that of the loss without smoothing. The target in it is the one of the forward "
                    "pass.",
                    lambda g, logits, labels, smoothing: RIGHT(g, logits, labels, 0.0),
                ),
                Mistake(
                    "smoothing on the wrong side",
                    "The shares of the label and of the uniform part are exchanged. The target is the one of the "
                    "forward pass.",
                    backward_of(exchanged, 1),
                ),
                Mistake(
                    "smoothing for the others only",
                    "The smoothed share goes to the K - 1 other classes. It goes to all K, the label's among them.",
                    backward_of(others_only, 1),
                ),
                Mistake(
                    "gradient in p",
                    "This is the gradient in the probabilities. From there one more step leads back to the logits: the "
                    "softmax of exercise 3.",
                    in_probabilities,
                ),
                Mistake(
                    "g forgotten",
                    "The result does not depend on g. A loss, too, gets a cotangent: it may be a term of a larger one.",
                    lambda g, *args: RIGHT(np.ones_like(g), *args),
                ),
            ),
        ),
    ),
    hints=(
        "Build the target first, an array like the logits: a comparison of labels[..., None] with the class numbers "
        "gives ones and zeros for any leading axes. Then log p, without p: a shift, and the logarithm of one sum.",
        "For one row, L = Σ_k t_k (log Σ_j e^(x_j) - x_k). Its derivative in x_j has two terms: one from the "
        "logarithm of the sum, which you know by another name, and one from the -x_k.",
        "The first term carries the factor Σ_k t_k, which is 1 here. So each row's gradient is a difference of two "
        "distributions. What is left are the constants that all entries share: g, and what makes the sum a mean.",
    ),
)
