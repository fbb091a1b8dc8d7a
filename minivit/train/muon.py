"""Muon: momentum made orthogonal, for a model's hidden matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minivit.backend import Array, array_module, product
from minivit.errors import ConfigError
from minivit.nn.module import Parameter
from minivit.train.numbers import scaled_gradient, unless_stopped
from minivit.train.optimizer import AdamW, check_momentum
from minivit.train.parameters import FlatParameters, Span, overlaps, traits


class Muon(AdamW):
    """Momentum made orthogonal for hidden matrices, AdamW for all the rest (Jordan et al. 2024, "Muon").

    For a matrix of n × k: b ← momentum·b + (1-momentum)·g, u = momentum·b + (1-momentum)·g (Nesterov's), and
    p ← (1 - lr·decay)·p - lr·0.2·√max(n, k)·O, where O is ``u`` with all its singular values near 1, see
    :func:`orthogonalized`. So a step goes equally far in every direction of the gradient, and not mostly in the few
    that are largest. The factor gives the step the size of AdamW's: both take one ``lr`` and one decay (Liu et al.
    2025, arXiv 2502.16982, section 2.2). What is a hidden matrix, or several kept as one like queries, keys and values,
    a parameter says itself: its ``matrices``. Raises ConfigError for one whose rows are not divided by their number.
    """

    def __init__(
        self,
        named_parameters: FlatParameters | Iterable[tuple[str, Parameter]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        self.momentum = check_momentum(momentum)
        super().__init__(named_parameters, lr, betas, eps, weight_decay, lr_scales)
        self.matrices = []  # (start, stop, shape) in the flat arrays
        for name, p, (start, stop) in zip(self.names, self.parameters, self.store.spans, strict=True):
            if count := traits(p).matrices:
                if p.ndim != 2 or count < 0 or p.shape[0] % count:
                    raise ConfigError(
                        f"{name} of shape {p.shape} cannot be {count} matrices stacked along its first axis",
                        "set its attribute matrices to what it is, 0 for no matrix",
                    )
                self.matrices.append((start, stop, (count, p.shape[0] // count, p.shape[1])))

    def update_spans(self, spans: Sequence[Span]) -> None:
        """Update the given spans of the flat parameters; a matrix is updated as a whole, with the span it begins in."""
        for start, stop in overlaps(spans, self.store.updated):
            place, between = start, []
            for a, b, shape in self.matrices:
                if a < stop and b > start:
                    between.append((place, max(place, a)))
                    place = min(self.store.aligned(b), stop)
                    if a >= start:
                        self._update_matrices(slice(a, b), shape)
            super().update_spans([*between, (place, stop)])

    def _update_matrices(self, piece: slice, shape: tuple[int, int, int]) -> None:
        group = next(g for g in self.groups if g.start <= piece.start < g.stop)
        lr, decay = self._rates(group)
        p, b = (flat[piece].reshape(shape) for flat in (self.store.values, self.state["m"]))
        g = scaled_gradient(self.store, piece).reshape(shape)
        with unless_stopped(self.store, [p, b]):
            self._update_matrix(p, g, b, lr, decay)

    def _update_matrix(self, p: Array, g: Array, b: Array, lr: Any, decay: float) -> None:
        """Update matrices (…, n, k) by their gradient and their momentum ``b``."""
        g = g * (1.0 - self.momentum)
        after = b * self.momentum + g
        u = orthogonalized(after * self.momentum + g)
        u *= lr * 0.2 * math.sqrt(max(p.shape[1:]))
        b[...] = after  # only now: if there was no memory for all this, nothing has changed yet
        if decay:
            p *= 1.0 - lr * decay
        p -= u


def orthogonalized(x: Array) -> Array:
    """Return matrices (…, n, k) with the singular vectors that ``x`` has, and singular values near 1 (0.7 to 1.2).

    Five steps of a Newton-Schulz iteration with the odd polynomial of Jordan et al. 2024, "Muon", each of which makes
    small singular values 3.4 times as large: what is below 1/500 of the Frobenius norm stays under 0.7, and 0 stays 0.
    """
    xp = array_module(x)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x  # the products below are of the shorter side
    x = x / (xp.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(5):
        a = product(x, x.swapaxes(-1, -2))  # (…, n, n)
        x = 3.4445 * x + product(2.0315 * product(a, a) - 4.7750 * a, x)
    return x.swapaxes(-1, -2) if tall else x
