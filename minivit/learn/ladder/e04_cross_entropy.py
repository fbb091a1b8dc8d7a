"""Exercise 4: cross-entropy from logits, a mean over rows, with label smoothing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
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
    """Return targets with the shares of smoothing and label exchanged."""
    share = (1.0 - smoothing) / logits.shape[-1]
    return held_against(logits, labels, smoothing + share, share)


def others_only(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return targets with the smoothing shared by the other classes."""
    return held_against(logits, labels, 1.0 - smoothing, smoothing / max(logits.shape[-1] - 1, 1))


def not_taken_off(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return targets with the smoothing added to all, and taken from none."""
    return held_against(logits, labels, 1.0, 0.0) + smoothing / logits.shape[-1]


def uniform_without_label(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return targets with 1 - α for the label, α/K for the others."""
    return held_against(logits, labels, 1.0 - smoothing, smoothing / logits.shape[-1])


def label_alone(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return targets with 1 - α for the label, and nothing for the others."""
    return held_against(logits, labels, 1.0 - smoothing, 0.0)


def target_of(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the targets, (…, K)."""
    return label_alone(logits, labels, smoothing) + smoothing / logits.shape[-1]


def with_target(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss with other targets."""
    return lambda logits, *args: against(logits, target(logits, *args))


def less_target(target: Callable[..., Any], softmax: Callable[[Any], Any] = ops.softmax) -> Callable[..., Any]:
    """Return g·(p - t)/rows with other targets, or another p."""
    return lambda g, logits, *args: g * (softmax(logits) - target(logits, *args)) / rows(logits)


def of_probability(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the loss by the logarithm of p, changed so that it is not 0."""
    return lambda logits, *args: (
        ops.sum(ops.log(change(ops.softmax(logits))) * target_of(logits, *args)) / -rows(logits)
    )


def through_p(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient by way of that in p, a division by 0 where p is 0."""
    p = ops.softmax(logits)
    dp = in_probabilities(g, logits, labels, smoothing)
    return p * (dp - ops.sum(dp * p, -1, True))


def naive(logits: Any) -> Any:
    """Return e^x / Σ e^x as it stands."""
    e = np.exp(logits)
    return e / e.sum(axis=-1, keepdims=True)


def log_of_softmax(logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the loss by the logarithm of the probabilities, which may be 0."""
    target = target_of(logits, labels, smoothing)
    logs = np.where(target > 0.0, np.log(ops.softmax(logits)) * target, 0.0)
    return logs.sum() / -rows(logits)


def shifted_by(shift: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return the loss by log Σ e^(x - shift(x)), which may overflow, or be log 0."""

    def gives(logits: Any, labels: Any, smoothing: float) -> Any:
        shifted = logits - shift(logits)
        logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return (logs * target_of(logits, labels, smoothing)).sum() / -rows(logits)

    return gives


def first_axis(logits: Any) -> float:
    """Return the rows for each entry of the first axis, by which a mean over that axis alone is too large."""
    return rows(logits) / logits.shape[0]


SMALL = ("1e-7", "1e-8", "1e-9", "1e-10", "1e-12", "1e-15", "1e-16", "1e-300")
"""What people add to p before its logarithm, or clip it at."""

ADDED = (
    "{0} is added to p inside the logarithm, or p is clipped there. That changes every loss a little, and that of a "
    "surely wrong row a lot: log p can be written without p."
)

TARGETS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    (
        "smoothing on the wrong side",
        "The label has the share α, the smoothing, and the uniform part the rest: it is the other way round.",
        exchanged,
    ),
    (
        "smoothing for the others only",
        "The smoothed share goes to the K - 1 other classes. It goes to all K, the label's among them.",
        others_only,
    ),
    (
        "uniform part not for the label",
        "The label's class has 1 - α only. The uniform share goes to all K classes, the label's among them.",
        uniform_without_label,
    ),
    (
        "uniform part forgotten",
        "The label's share is 1 - α, and the α that was taken off is given to nobody: Σ_k t_k is not 1.",
        label_alone,
    ),
    (
        "target adds up to more than 1",
        "The uniform part is added, and nothing is taken off the label for it: Σ_k t_k is not 1.",
        not_taken_off,
    ),
)
"""Targets that learners make: name, what the learner reads, targets of (logits, labels, smoothing)."""

RIGHT = backward_of(forward, 1)


def probabilities(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient without the target."""
    return g * ops.softmax(logits) / rows(logits)


def in_probabilities(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient in p, where that in the logits is asked for."""
    target = target_of(logits, labels, smoothing)
    return -g * target / ops.softmax(logits) / rows(logits)


def less_one_everywhere(g: Any, logits: Any, labels: Any, smoothing: float) -> Any:
    """Return the gradient with 1 taken off every class."""
    return g * (ops.softmax(logits) - 1.0) / rows(logits)


FORWARD_MISTAKES = (
    Mistake(
        "overflow",
        "e^900 is infinite, so the loss is not a number. Shift each row before exp, as in exercise 3; what does the "
        "shift do to log Σ e^x?",
        shifted_by(lambda logits: 0.0),
    ),
    Mistake(
        "one maximum for all rows",
        "The maximum of all rows together is taken off, so that the sum of a row far below it is 0, and its logarithm "
        "infinite. Each row needs a number of its own.",
        shifted_by(lambda logits: logits.max()),
    ),
    Mistake(
        "logarithm of 0",
        "A probability of e^(-900) is 0 in float64, and its logarithm is infinite, while the true loss is 900. Take "
        "the logarithm on paper: log p can be written without p.",
        log_of_softmax,
    ),
    Mistake(
        "sum for mean",
        "The rows' losses are added up; the loss is their mean.",
        lambda *args: forward(*args) * rows(args[0]),
    ),
    Mistake(
        "mean over classes, too",
        "The loss is too small by the number of classes: over the classes there is a sum, over the rows a mean. A mean "
        "without axis= takes both.",
        lambda *args: forward(*args) / args[0].shape[-1],
    ),
    Mistake(
        "mean over the first axis only",
        "The sum is divided by the length of the first axis. Every row counts, along all leading axes.",
        lambda *args: forward(*args) * first_axis(args[0]),
    ),
    Mistake(
        "smoothing forgotten",
        "The label has all of the target. α, the smoothing, is the share that goes to all classes alike.",
        lambda logits, labels, smoothing: forward(logits, labels, 0.0),
    ),
    *(Mistake(name, says, with_target(target)) for name, says, target in TARGETS),
    Mistake(
        "a column for every label",
        "logits[:, labels] takes a whole column for every label, not one entry of each row. (α is not used, either.)",
        lambda logits, labels, smoothing: -np.mean(ops.log_softmax(logits)[:, labels]),
    ),
    *(
        Mistake(how.format(text), ADDED.format(text), of_probability(partial(change, float(text))))
        for how, change, texts in (
            ("{} in the logarithm", operator.add, SMALL),
            ("p clipped at {}", ops.maximum, SMALL[:4]),
        )
        for text in texts
    ),
    Mistake(
        "softmax along the first axis",
        "The probabilities add up to 1 along the first axis. Each row, along the last axis, is a distribution of its "
        "own.",
        lambda logits, *args: ops.sum(ops.log_softmax(logits, 0) * target_of(logits, *args)) / -rows(logits),
    ),
)

BACKWARD_MISTAKES = (
    Mistake(
        "not divided by the rows",
        "The gradient is that of the sum of the rows' losses. The forward pass divides by their number.",
        lambda *args: RIGHT(*args) * rows(args[1]),
    ),
    Mistake(
        "divided by the first axis only",
        "The gradient is divided by the length of the first axis. The mean is over all rows, along all leading axes.",
        lambda *args: RIGHT(*args) * first_axis(args[1]),
    ),
    Mistake(
        "target forgotten",
        "These are the probabilities. They come from the term log Σ e^x; the other term, the logits that the target "
        "picks, has a derivative, too.",
        probabilities,
    ),
    Mistake(
        "1 taken off every class",
        "1 is taken off in every class, where the target is 1 for the label's class only. Does the index pick one "
        "entry in each row, or a whole row?",
        less_one_everywhere,
    ),
    Mistake(
        "target minus p", "The sign is wrong: the loss has a minus before the logarithm.", lambda *args: -RIGHT(*args)
    ),
    Mistake(
        "smoothing forgotten",
        "The gradient is that of the loss without smoothing. The target in it is the one of the forward pass.",
        lambda g, logits, labels, smoothing: RIGHT(g, logits, labels, 0.0),
    ),
    *(Mistake(name, says, less_target(target)) for name, says, target in TARGETS),
    Mistake(
        "softmax along the first axis",
        "p adds up to 1 along the first axis. Rows lie along the last one.",
        less_target(target_of, lambda logits: ops.softmax(logits, 0)),
    ),
    Mistake(
        "overflow going back",
        "backward computes p once more, without the shift of exercise 3: NaN.",
        less_target(target_of, naive),
    ),
    Mistake(
        "through p",
        "The gradient goes through p, which is 0 in float64 where a class is sure not to be: 0/0. Take the short way, "
        "in which nothing is divided by p.",
        through_p,
    ),
    Mistake(
        "gradient in p",
        "This is the gradient in the probabilities. From there one more step leads back to the logits: the softmax of "
        "exercise 3.",
        in_probabilities,
    ),
    Mistake(
        "g forgotten",
        "The result does not depend on g. A loss, too, gets a cotangent: it may be a term of a larger one.",
        lambda g, *args: RIGHT(np.ones_like(g), *args),
    ),
)

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
            mistakes=FORWARD_MISTAKES,
        ),
        Asked(
            "backward",
            ("dlogits",),
            right=RIGHT,
            samples=with_cotangents(samples, forward),
            mistakes=BACKWARD_MISTAKES,
        ),
    ),
    hints=(
        "Build the target first, an array like the logits: a comparison of labels[..., None] with the class numbers "
        "gives ones and zeros for any leading axes. Then log p, without p: a shift, and the logarithm of one sum.",
        "For one row, ℓ = Σ_k t_k (log Σ_j e^(x_j) - x_k). Its derivative in x_j has two terms: one from the logarithm "
        "of the sum, which you know by another name, and one from the -x_k.",
        "The first term carries the factor Σ_k t_k, which is 1 here. So each row's gradient is a difference of two "
        "distributions. What is left are the constants that all entries share: g, and what makes the sum a mean.",
    ),
)
