"""How far twins are off: their errors in ulps of the step's numbers, against the plain operation in float64.

The inputs and the gradient that reaches the output are rounded to the step's numbers first, and both sides get the same
rounded ones: what is measured is what the twin itself rounds. An ulp is the distance of two neighbouring numbers at the
largest value in an entry's row (its last axis): of a sum, the terms count, not what cancelling leaves of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.graph import first_order, propagate
from minivit.autograd.op import OPS, Op
from minivit.autograd.tensor import Tensor
from minivit.autograd.twin import Twin
from minivit.backend import Key, array_module, on_device_of, products, to_device, to_numpy
from minivit.ops.samples import SAMPLES, Draw
from minivit.train.precision import check_precision

DIGITS = {"float32": 23, "tf32": 10, "bfloat16": 7, "float16": 10}
"""How many binary digits after the first a number has."""

ALLOWED = {"float32": 64.0, "tf32": 8.0, "bfloat16": 4.0, "float16": 4.0}
"""The largest error, in ulps, of an operation that rounds its result and works in float32 within. Float32 has no wider
numbers within: its errors grow with the length of the sums."""

LOOSER = {"attention": 2.0, "self_attention": 2.0, "softmax": 4.0, "cross_entropy": 2.0}
"""Operations that round twice, by how much more they may be off. Attention's weights, and their gradients, are rounded
to the step's numbers before they are multiplied by the values, and by queries and keys; softmax's gradient, a
difference, reads the probabilities as they were rounded."""

USUAL: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "linear": lambda r: (r(2, 65, 192), r(576, 192) / 14, r(576), r(2, 65, 576)),
    "matmul": lambda r: (r(2, 65, 192), r(192, 64) / 14),
    "conv2d": lambda r: (r(4, 16, 16, 16), r(32, 16, 3, 3) / 12, r(32), 1, 1),
    "max_pool2d": lambda r: (r(2, 16, 16, 16), 3, 2, 1),
    "group_norm": lambda r: (r(2, 64, 16, 16), 32, r.positive(64), r(64)),
    "layer_norm": lambda r: (r(2, 65, 192), r.positive(192), r(192)),
    "rms_norm": lambda r: (r(2, 65, 192), r.positive(192)),
    "gelu": lambda r: (2 * r(2, 65, 768),),
    "softmax": lambda r: (2 * r(2, 65, 65),),
    "self_attention": lambda r: (r(2, 65, 576), 3),
    "attention": lambda r: (r(2, 3, 65, 64), r(2, 3, 65, 64), r(2, 3, 65, 64)),
    "cross_entropy": lambda r: (r(64, 10), r.positive(64, 10)),
    "embed_tokens": lambda r: (r(2, 64, 192), r(1, 1, 192), r(1, 65, 192)),
    "patchify": lambda r: (r(2, 3, 32, 32), (4, 4)),
}
"""Arguments of the sizes that a model has, for which kernels are made; other operations take their first sample."""


@dataclass(frozen=True)
class Ulps:
    """The largest errors of one operation: of its output, and of the gradient of each input, by its name.

    ``ran`` says what ran: "twin", or "plain" where the twin had no kernel for these arguments.
    """

    operation: str
    ran: str
    output: float
    gradients: dict[str, float]
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether no error is larger than is allowed (NaN is)."""
        return all(error <= self.allowed for error in (self.output, *self.gradients.values()))


def twins_on(device: str) -> list[str]:
    """Return the names of the operations that have a twin on ``device``, in the order of the samples."""
    kind = "cpu" if device == "cpu" else "cuda"
    return [name for name in dict.fromkeys(sample.op for sample in SAMPLES) if kind in OPS[name].twins]


def measure_ulps(name: str, device: str, dtype: str, seed: int = 0) -> Ulps:
    """Return how far the twin of an operation is off on ``device``, in numbers of ``dtype``."""
    op, numbers = OPS[name], check_precision(dtype, device).dtype
    draw = USUAL.get(name) or next(sample.draw for sample in SAMPLES if sample.op == name)
    args = list(draw(Draw(Key(seed))))
    given = [i for i in op.input_positions(args) if i < len(args)]
    floats = [i for i in given if isinstance(args[i], np.ndarray) and args[i].dtype.kind == "f"]
    for i in floats:
        args[i] = args[i].astype(numbers)
    wide = [np.asarray(a, np.float64) if i in floats else a for i, a in enumerate(args)]
    exact, weights, gradients, _ = _differentiated(op, wide, floats, None, Key(seed, 1), numbers)
    here = [to_device(a, device) if isinstance(a, np.ndarray) else a for a in args]
    with products("tf32" if dtype == "tf32" else "float32"), first_order():
        out, _, found, ran = _differentiated(op, here, floats, weights, Key(seed, 1), numbers)
    names = {i: op.names[i] if i < len(op.names) else f"input {i}" for i in floats}
    errors = {names[i]: ulps(found[i], gradients[i], dtype) for i in floats if i in gradients}
    return Ulps(name, ran, ulps(out, exact, dtype), errors, ALLOWED[dtype] * LOOSER.get(name, 1.0))


def _differentiated(
    op: Op, args: list[Any], floats: list[int], weights: Any, key: Key, numbers: np.dtype
) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray], str]:
    """Return the output, what came into the backward pass, the gradients by their arguments' places, and what ran."""
    leaves = {i: Tensor(args[i]) for i in floats}
    for leaf in leaves.values():
        leaf.requires_grad = True
    out = op(*[leaves.get(i, a) for i, a in enumerate(args)])
    if weights is None:  # the reference's own: rounded as the other side will have it
        weights = Draw(key)(*out.shape).astype(numbers).astype(np.float64)
    xp, node = array_module(out.data), out.node
    ran = "twin" if isinstance(node.op, Twin) else "plain"
    with on_device_of(out.data):
        cotangent = xp.asarray(weights.astype(to_numpy(out.data).dtype))
    sums: dict[Any, Any] = {}
    for reached, part in propagate(node, cotangent):
        sums[reached] = sums[reached] + part if reached in sums else part
    places = {leaf.node: i for i, leaf in leaves.items()}
    return _wide(out.data), weights, {places[n]: _wide(part) for n, part in sums.items()}, ran


def _wide(array: Any) -> np.ndarray:
    return np.asarray(to_numpy(array).astype(np.float64))


def ulps(found: np.ndarray, exact: np.ndarray, dtype: str) -> float:
    """Return the largest error in ulps of ``dtype``, one being that of the largest value in an entry's row."""
    error = np.abs(found - exact)
    largest = np.abs(exact).max(axis=-1, keepdims=True) if exact.ndim else np.abs(exact)
    largest = np.where(largest > 0, largest, np.abs(exact).max(initial=0.0))
    if not error.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        one = 2.0 ** (np.floor(np.log2(largest)) - DIGITS[dtype])
        worst = float((error / one).max())
    return worst if math.isfinite(worst) else math.inf
