"""Sample inputs for every operation: what the gradient checks, their mutants and the tests run on.

The samples look for trouble: odd sizes, axes of length 1 and missing leading axes (broadcasting), three axes and more,
negative axes, logits 200 apart, one key that takes all attention, rows of equal numbers and of almost equal ones far
from 0, a scale other than 1 and a shift other than 0, masks that leave a query nothing to attend to, indices named
twice, 0-d arrays. None lies on a kink, where there is no derivative to check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.op import OPS, Op
from minivit.backend import Key, normal, random_bits
from minivit.ops.image_samples import IMAGE_ROWS


class Draw:
    """Draws float64 arrays, each from a key of its own: ``draw(2, 3)`` is standard normal, of shape (2, 3)."""

    def __init__(self, key: Key) -> None:
        self._key, self._drawn = key, 0

    def _next(self) -> Key:
        self._drawn += 1
        return self._key.child(self._drawn)

    def __call__(self, *shape: int) -> np.ndarray:
        """Return standard normal numbers."""
        return np.asarray(normal(self._next(), shape))  # 0-d: an array too

    def positive(self, *shape: int) -> np.ndarray:
        """Return numbers from about 0.2 to 5."""
        return np.asarray(np.exp(0.5 * self(*shape)))

    def far_apart(self, *shape: int) -> np.ndarray:
        """Return logits, some 200 apart within each row and from row to row."""
        x = self(*shape)
        x[..., ::2] += 200.0
        return x + 200.0 * np.arange(shape[-2])[:, None]

    def almost_equal(self, *shape: int) -> np.ndarray:
        """Return numbers a hundredth apart at 10,000, those of the first row all equal."""
        x = 1e4 + 0.01 * self(*shape)
        x[0] = 1e4 + 0.1
        return x

    def integers(self, n: int, *shape: int) -> np.ndarray:
        """Return integers from 0 to n-1 as int64."""
        return np.asarray(random_bits(self._next(), shape) % n, np.int64)

    def mask(self, *shape: int) -> np.ndarray:
        """Return a mask, True = may not attend: a third of the places, all of the first row, not all of any other."""
        mask = self(*shape) > 0.43
        mask[..., 1:, 0] = False
        mask[..., 0, :] = True
        return mask


@dataclass(frozen=True)
class Sample:
    """One row of the table: an operation's name, what is special about the row, and how its arguments are drawn."""

    op: str
    label: str
    draw: Callable[[Draw], tuple[Any, ...]]

    @property
    def function(self) -> Op:
        """The operation."""
        return OPS[self.op]

    def build(self, key: Key = Key(0)) -> tuple[Any, ...]:  # noqa: B008 - a Key never changes
        """Return the operation's positional arguments: the same arrays, made anew, for the same key."""
        return self.draw(Draw(key))

    def __str__(self) -> str:
        return f"{self.op}: {self.label}"


_KEY = Key(7, stream=3)  # for what drops
_LATER = Key(7, stream=3, row=5)  # and for the later rows of a batch

_ROWS: dict[str, dict[str, Callable[[Draw], tuple[Any, ...]]]] = {
    # ---- elementwise ----
    "add": {
        "one shape": lambda r: (r(3, 5), r(3, 5)),
        "broadcast both ways": lambda r: (r(2, 1, 3), r(5, 1)),
        "a missing leading axis": lambda r: (r(3), r(2, 5, 3)),
        "0-d": lambda r: (r(), r(3)),
        "a Python number": lambda r: (r(3, 1), 1.5),
    },
    "sub": {
        "one shape": lambda r: (r(3, 5), r(3, 5)),
        "broadcast both ways": lambda r: (r(2, 1, 3), r(5, 1)),
        "a missing leading axis": lambda r: (r(1, 3), r(2, 5, 3)),
        "from a Python number": lambda r: (1.5, r(3, 3)),
    },
    "mul": {
        "one shape": lambda r: (r(3, 3), r(3, 3)),
        "broadcast both ways": lambda r: (r(2, 1, 3), r(5, 1)),
        "a missing leading axis": lambda r: (r(2, 5, 3), r(3)),
        "0-d": lambda r: (r(), r()),
        "a Python number": lambda r: (-2.5, r(3)),
    },
    "div": {
        "one shape": lambda r: (r(3, 3), r.positive(3, 3)),
        "broadcast both ways": lambda r: (r(2, 1, 3), -r.positive(5, 1)),
        "a missing leading axis": lambda r: (r(3), r.positive(2, 5, 3)),
        "of a Python number": lambda r: (2.0, r.positive(3)),
    },
    "pow": {
        "an array to an array": lambda r: (r.positive(2, 1, 3), r(5, 1)),
        "a square": lambda r: (r(3, 3), 2),
        "a cube": lambda r: (r(2, 3), 3),
        "a root's inverse": lambda r: (r.positive(3), -0.5),
        "power 1": lambda r: (r(3), 1),
        "power 0": lambda r: (r(3), 0),
        "of a Python number": lambda r: (2.0, r(3, 1)),
    },
    "neg": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r(),)},
    "exp": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r(),)},
    "log": {"3-D": lambda r: (r.positive(2, 3, 3),), "0-d": lambda r: (r.positive(),)},
    "sqrt": {"3-D": lambda r: (r.positive(2, 3, 3),), "0-d": lambda r: (r.positive(),)},
    "tanh": {"3-D": lambda r: (r(2, 3, 3),), "saturated": lambda r: (r.far_apart(3, 5) - 200.0,)},
    "sin": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r(),)},
    "cos": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r(),)},
    "erf": {"3-D": lambda r: (r(2, 1, 3),), "out to 7": lambda r: (np.linspace(-7.0, 7.0, 9),)},
    "abs": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r(),)},
    "maximum": {
        "one shape": lambda r: (r(3, 3), r(3, 3)),
        "broadcast both ways": lambda r: (r(2, 1, 3), r(5, 1)),
        "a Python number": lambda r: (r(3, 3), 0.25),
    },
    "minimum": {
        "one shape": lambda r: (r(3, 3), r(3, 3)),
        "broadcast both ways": lambda r: (r(2, 1, 3), r(5, 1)),
        "a Python number": lambda r: (0.25, r(3, 3)),
    },
    "where": {
        "one shape": lambda r: (r(3, 3) > 0, r(3, 3), r(3, 3)),
        "broadcast all ways": lambda r: (r(5, 1) > 0, r(2, 1, 3), r(3)),
        "a Python number": lambda r: (r(2, 5) > 0, r(2, 5), 0.0),
    },
    "clip": {
        "between": lambda r: (r(3, 5), -0.5, 0.5),
        "from below": lambda r: (r(3, 5), -0.5),
        "from above": lambda r: (r(3, 5), None, 0.5),
    },
    # ---- reductions ----
    "sum": {
        "over all": lambda r: (r(2, 3, 5),),
        "a negative axis": lambda r: (r(2, 3, 5), -2),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
        "0-d": lambda r: (r(),),
    },
    "mean": {
        "over all": lambda r: (r(2, 3, 5),),
        "a negative axis": lambda r: (r(2, 3, 5), -2),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
        "0-d": lambda r: (r(),),
    },
    "var": {
        "over all": lambda r: (r(2, 3, 5),),
        "a negative axis, unbiased": lambda r: (r(2, 3, 5), -2, False, 1),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
        "far from zero": lambda r: (r(3, 5) + 200.0, -1, True),
        "almost equal numbers, one row of equal ones": lambda r: (r.almost_equal(3, 5), -1, True),
    },
    "max": {
        "over all": lambda r: (r(2, 3, 5),),
        "a negative axis": lambda r: (r(2, 3, 5), -2),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
    },
    "min": {
        "over all": lambda r: (r(2, 3, 5),),
        "a negative axis": lambda r: (r(2, 3, 5), -2),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
    },
    "logsumexp": {
        "the last axis": lambda r: (r(2, 3, 5),),
        "two axes, kept": lambda r: (r(3, 1, 5), (0, -1), True),
        "over all": lambda r: (r(3, 5), None),
        "200 apart": lambda r: (r.far_apart(3, 5), -1),
    },
    # ---- shapes ----
    "reshape": {
        "3-D to 2-D": lambda r: (r(2, 3, 5), (-1, 5)),
        "transposed before": lambda r: (r(3, 2, 5).transpose(2, 0, 1), (5, 6)),
        "0-d": lambda r: (r(), (1, 1)),
    },
    "transpose": {
        "reversed": lambda r: (r(2, 3, 5),),
        "a cycle": lambda r: (r(2, 3, 5, 1), (2, 0, 3, 1)),
        "negative axes": lambda r: (r(3, 3, 3), (-1, 0, -2)),
    },
    "swapaxes": {"the last two": lambda r: (r(2, 3, 5), -1, -2), "the outer two": lambda r: (r(3, 1, 3), 0, 2)},
    "broadcast_to": {"new and stretched axes": lambda r: (r(3, 1, 5), (2, 3, 3, 5)), "0-d": lambda r: (r(), (3, 2))},
    "concat": {
        "the first axis": lambda r: (0, r(2, 3), r(1, 3), r(2, 3)),
        "a negative axis": lambda r: (-2, r(2, 3, 3), r(2, 5, 3)),
        "one alone": lambda r: (1, r(3, 3)),
    },
    "stack": {
        "the first axis": lambda r: (0, r(2, 3), r(2, 3), r(2, 3)),
        "a negative axis": lambda r: (-1, r(3, 5), r(3, 5)),
        "0-d": lambda r: (0, r(), r()),
    },
    "pad": {
        "all sides": lambda r: (r(2, 3, 3), ((1, 0), (0, 0), (2, 3))),
        "with a value": lambda r: (r(3), ((1, 1),), 2.5),
    },
    "getitem": {
        "slices, one backwards": lambda r: (r(3, 5, 7), (slice(1, None), slice(None, None, -2))),
        "None and Ellipsis": lambda r: (r(2, 3, 5), (None, ..., 1, slice(0, 3))),
        "integers": lambda r: (r(3, 5), (-1, 2)),
        "a Python integer": lambda r: (r(3, 5), 1),
        "an integer array, repeated": lambda r: (r(5, 3), np.array([4, 0, 0, -1, 2, 4])),
        "two integer arrays, broadcast": lambda r: (r(5, 3), (np.array([[0], [4]]), np.array([2, 0, 2]))),
        "a list after a slice": lambda r: (r(2, 5), (slice(None), [3, 0, 3])),
        "tuples, a place twice": lambda r: (r(3, 5), ((0, 2, 0), (1, 1, 1))),
        "a range and a list": lambda r: (r(3, 5), (range(3), [1, 1, 4])),
        "a boolean mask": lambda r: (r(3, 5), np.arange(15).reshape(3, 5) % 4 < 2),
        "all there is": lambda r: (r(3, 1, 5), (slice(None), 0)),
        "0-d": lambda r: (r(), None),
    },
    "scatter": {
        "slices, one backwards": lambda r: (r(2, 3), (slice(1, None), slice(None, None, -2)), (3, 5)),
        "an integer array, repeated": lambda r: (r(4, 3), np.array([2, 0, 2, -1]), (5, 3)),
        "tuples, a place twice": lambda r: (r(3), ((0, 2, 0), (1, 1, 1)), (3, 5)),
        "a boolean mask": lambda r: (r(7), np.arange(15).reshape(3, 5) % 2 == 1, (3, 5)),
        "0-d": lambda r: (r(), (1, 2), (3, 3)),
        "all there is": lambda r: (r(3, 5), (slice(None), 0), (3, 1, 5)),
        "all there is, backwards": lambda r: (r(5), slice(None, None, -1), (5,)),
    },
    "take_along_axis": {
        "the last axis, repeated": lambda r: (r(2, 3, 5), r.integers(5, 2, 3, 4)),
        "the first axis": lambda r: (r(5, 3), r.integers(5, 2, 3), 0),
    },
    "patchify": {"rectangles": lambda r: (r(2, 3, 4, 9), (2, 3)), "square": lambda r: (r(1, 1, 6, 6), (3, 3))},
    "unpatchify": {
        "rectangles": lambda r: (r(2, 6, 18), (2, 3), (4, 9)),
        "square": lambda r: (r(1, 4, 9), (3, 3), (6, 6)),
    },
    "embed_tokens": {
        "a class token, positions": lambda r: (r(2, 3, 5), r(1, 1, 5), r(1, 4, 5)),
        "a class token": lambda r: (r(3, 2, 3), r(1, 1, 3)),
        "positions": lambda r: (r(2, 3, 5), None, r(1, 3, 5)),
        "one image of one patch": lambda r: (r(1, 1, 3), r(1, 1, 3), r(1, 2, 3)),
        "two tokens beside the patches": lambda r: (r(2, 3, 5), r(1, 2, 5), r(1, 5, 5)),
    },
    "convert": {"to where it is": lambda r: (r(2, 3, 3), "cpu")},
    # ---- products ----
    "matmul": {
        "2-D": lambda r: (r(3, 5), r(5, 2)),
        "square": lambda r: (r(3, 3), r(3, 3)),
        "batches, broadcast both ways": lambda r: (r(2, 1, 3, 5), r(3, 5, 1)),
        "a missing leading axis": lambda r: (r(3, 5), r(2, 5, 3)),
    },
    "linear": {
        "3-D": lambda r: (r(2, 3, 3), r(2, 3), r(2)),
        "no bias": lambda r: (r(2, 1, 3), r(3, 3), None),
        "a single vector": lambda r: (r(5), r(3, 5), r(3)),
        "one wide": lambda r: (r(3, 1, 1), r(1, 1), r(1)),
        "a convolution's weight": lambda r: (r(2, 3, 6), r(2, 3, 1, 2), r(2)),
        "onto every other row": lambda r: (r(2, 2, 3), r(5, 3), r(5), r(2, 4, 5)[:, ::2]),
    },
    # ---- activations ----
    "relu": {"3-D": lambda r: (r(2, 3, 3),), "0-d": lambda r: (r.positive(),)},
    "sigmoid": {"3-D": lambda r: (r(2, 3, 3),), "saturated": lambda r: (r.far_apart(3, 5) - 200.0,)},
    "silu": {"3-D": lambda r: (r(2, 3, 3),), "saturated": lambda r: (r.far_apart(3, 5) - 200.0,)},
    "gelu": {
        "exact": lambda r: (r(2, 1, 5),),
        "exact, out to 7": lambda r: (np.linspace(-7.0, 7.0, 9), "none"),
        "tanh": lambda r: (r(2, 3, 3), "tanh"),
        "0-d": lambda r: (r(),),
        "tanh, out to 7": lambda r: (np.linspace(-7.0, 7.0, 9), "tanh"),
    },
    # ---- normalisation, attention, losses ----
    "softmax": {
        "the last axis": lambda r: (r(2, 3, 5),), "the first axis": lambda r: (r(3, 3), 0),
        "200 apart": lambda r: (r.far_apart(3, 5),), "one wide": lambda r: (r(3, 1),),
        "saturated": lambda r: (300.0 * np.eye(3, 5) + r(3, 5),),
        "equal scores": lambda r: (np.repeat([[300.0], [0.0], [-300.0]], 7, axis=1),),
    },
    "log_softmax": {
        "the last axis": lambda r: (r(2, 3, 5),), "the first axis": lambda r: (r(3, 3), 0),
        "200 apart": lambda r: (r.far_apart(3, 5),),
    },
    "layer_norm": {
        "3-D": lambda r: (r(2, 2, 3), r.positive(3), r(3)), "a large eps": lambda r: (r(3, 3), r(3), r(3), 0.5),
        "rows far from zero": lambda r: (r.far_apart(3, 5), r.positive(5), r(5)),
        "a single vector": lambda r: (r(5), r.positive(5), r(5)),
        "rows of equal numbers": lambda r: (
            np.concatenate([r(2, 7), np.repeat([[1000.0], [0.1]], 7, axis=1)]), r.positive(7), r(7)
        ),
        "almost equal numbers, one row of equal ones": lambda r: (r.almost_equal(3, 9), r.positive(9), r(9)),
    },
    "rms_norm": {
        "3-D": lambda r: (r(2, 2, 3), r.positive(3)), "a large eps": lambda r: (r(3, 3), r(3), 0.5),
        "far from zero": lambda r: (r.far_apart(3, 5), r.positive(5)), "a vector": lambda r: (r(5), r.positive(5)),
    },
    "attention": {
        "heads": lambda r: (r(2, 2, 3, 2), r(2, 2, 3, 2), r(2, 2, 3, 2)),
        "other lengths and widths": lambda r: (r(2, 3, 2), r(2, 5, 2), r(2, 5, 3)),
        "no leading axes": lambda r: (r(3, 3), r(3, 3), r(3, 3)),
        "broadcast": lambda r: (r(2, 1, 3, 2), r(3, 5, 2), r(1, 1, 5, 1)),
        "a mask": lambda r: (r(1, 2, 3, 2), r(1, 2, 5, 2), r(1, 2, 5, 3), r.mask(3, 5)),
        "a mask for each image, a scale": lambda r: (
            r(2, 1, 3, 3), r(2, 1, 3, 3), r(2, 1, 3, 3), r.mask(2, 1, 3, 3), 0.3
        ),
        "200 apart": lambda r: (r(3, 2), r(5, 2) + 200.0 * (np.arange(5) % 2)[:, None], r(5, 2)),
        "saturated": lambda r: (100.0 * np.eye(3, 5), 100.0 * np.eye(4, 5), r(4, 2)),
        "saturated, but the winners may not be attended to": lambda r: (
            100.0 * np.eye(3, 5) + 0.1 * r(3, 5), 100.0 * np.eye(4, 5) + 0.1 * r(4, 5), r(4, 2), np.eye(3, 4) > 0
        ),
        "equal keys": lambda r: (
            np.concatenate([r(1, 3, 4), np.full((1, 3, 4), 100.0)]),
            np.concatenate([r(1, 7, 4), np.full((1, 7, 4), 100.0)]),
            r(2, 7, 2),
        ),
        "dropout": lambda r: (r(2, 3, 2), r(2, 5, 2), r(2, 5, 3), None, None, 0.3, _LATER),
    },
    "self_attention": {
        "heads": lambda r: (r(2, 3, 12), 2),
        "a mask": lambda r: (r(1, 3, 12), 2, None, r.mask(3, 3)),
        "a mask for each image, scale, dropout": lambda r: (r(2, 3, 9), 1, None, r.mask(2, 1, 3, 3), 0.3, 0.3, _LATER),
        "a single query": lambda r: (r(2, 3, 12), 2, 1),
        "two queries, a mask, a scale, dropout": lambda r: (r(2, 5, 6), 2, 2, r.mask(2, 5), 0.3, 0.3, _LATER),
    },
    "cross_entropy": {
        # weights that do not add up to 1: a gradient right for probabilities only would pass with them
        "2-D": lambda r: (r(5, 3), r.positive(5, 3)), "3-D": lambda r: (r(2, 3, 5), r.positive(2, 3, 5)),
        "a single row": lambda r: (r(5), r.positive(5)),
        "200 apart": lambda r: (r.far_apart(3, 5), r.positive(3, 5)),
        "smoothed": lambda r: (r(5, 3), r.positive(5, 3), None, 0.3),
        "labels": lambda r: (r(2, 3, 5), None, r.integers(5, 2, 3)),
        "labels, smoothed": lambda r: (r.far_apart(5, 3), None, r.integers(3, 5), 0.3),
        "soft labels, smoothed": lambda r: (r(5, 3), None, r.positive(5, 3), 0.3),
    },
    "dropout": {"3-D": lambda r: (r(2, 3, 5), 0.3, _KEY), "later rows": lambda r: (r(2, 5), 0.5, _LATER)},
    "drop_path": {"3-D": lambda r: (r(5, 2, 3), 0.4, _KEY), "later rows": lambda r: (r(7, 1), 0.5, _LATER)},
}  # fmt: skip

SAMPLES = [Sample(op, label, draw) for op, rows in (_ROWS | IMAGE_ROWS).items() for label, draw in rows.items()]
"""The table: at least one row for every operation."""
