"""Muon: momentum made orthogonal, for a model's hidden matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from minivit.backend import Array, array_module, product
from minivit.backend.planning import is_on_gpu
from minivit.errors import ConfigError
from minivit.nn.module import Parameter
from minivit.train.numbers import scaled_gradient, unless_stopped
from minivit.train.optimizer import AdamW, check_momentum
from minivit.train.parameters import CHUNK, FlatParameters, Group, Span, overlaps, traits

TOGETHER = 1 << 24
"""So many numbers of matrices are updated at a time on a GPU, or one parameter's: each takes some five times its memory
meanwhile. On a CPU they are as few as fit into its cache."""


class Matrices(NamedTuple):
    """Hidden matrices that lie one after the other in the flat arrays, from ``start`` to ``stop``."""

    start: int
    stop: int
    shape: tuple[int, int, int]  # how many, of how many rows and columns


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
        self.matrices: list[Matrices] = []
        for name, p, (start, stop) in zip(self.names, self.parameters, self.store.spans, strict=True):
            if count := traits(p).matrices:
                if p.ndim < 2 or count < 0 or p.shape[0] % count:
                    raise ConfigError(
                        f"{name} of shape {p.shape} cannot be {count} matrices stacked along its first axis",
                        "set its attribute matrices to what it is, 0 for no matrix",
                    )
                rows = p.shape[0] // count  # the rest of a filter's axes are what it is a sum over: one row
                self.matrices.append(Matrices(start, stop, (count, rows, math.prod(p.shape[1:]))))

    def update_spans(self, spans: Sequence[Span]) -> None:
        """Update the given spans of the flat parameters; a matrix is updated as a whole, with the span it begins in."""
        due: list[Matrices] = []
        values = self.store.values
        for start, stop in overlaps(spans, self.store.updated):
            place, between = start, []
            for matrices in self.matrices:
                a, b, _ = matrices
                if a < stop and b > start:
                    between.append((place, max(place, a)))
                    place = min(self.store.aligned(b), stop)
                    if a >= start:
                        due.append(matrices)
            super().update_spans([*between, (place, stop)])
        for group in self.groups:
            of_group = [matrices for matrices in due if group.start <= matrices.start < group.stop]
            for batch in batches(of_group, TOGETHER if is_on_gpu(values) else CHUNK, values.size):
                self._update_batch(batch, group)

    def _update_batch(self, batch: Sequence[Matrices], group: Group) -> None:
        lr, decay = self._rates(group)
        p, b, g = (laid_over(flat, batch) for flat in (self.store.values, self.state["m"], self.store.grad))
        with unless_stopped(self.store, [p, b]):
            self._update_matrix(p, scaled_gradient(self.store, g), b, lr, decay)

    def _update_matrix(self, p: Array, g: Array, b: Array, lr: Any, decay: float) -> None:
        """Update matrices (…, n, k) by their gradient and their momentum ``b``."""
        g = g * (1.0 - self.momentum)
        after = b * self.momentum + g
        u = orthogonalized(after * self.momentum + g)
        u *= lr * 0.2 * math.sqrt(max(p.shape[-2:]))
        b[...] = after  # only now: if there was no memory for all this, nothing has changed yet
        if decay:
            p *= 1.0 - lr * decay
        p -= u


def batches(matrices: Iterable[Matrices], most: int, size: int) -> list[list[Matrices]]:
    """Return the matrices in batches of equal ones that begin at even distances, of ``most`` numbers or one at a time.

    Those of equal sides that follow each other without a gap, such as the weights around an attention, become one. A
    flat array of ``size`` numbers holds as many stretches, as long as that distance, as there are in a batch.
    """
    joined: list[Matrices] = []
    for one in sorted(matrices):
        before = joined[-1] if joined else None
        if (
            before
            and before.stop == one.start
            and before.shape[1:] == one.shape[1:]
            and one.stop - before.start <= most
        ):
            shape = (before.shape[0] + one.shape[0], *one.shape[1:])
            joined[-1] = Matrices(before.start, one.stop, shape)
        else:
            joined.append(one)
    found: dict[tuple[int, int, int], list[list[Matrices]]] = {}
    for one in joined:
        rows = found.setdefault(one.shape, [[]])
        row, count = rows[-1], len(rows[-1]) + 1
        if row:
            apart = one.start - row[-1].start
            even = count == 2 or apart == row[1].start - row[0].start
            if not even or count * math.prod(one.shape) > most or count * apart > size:
                rows.append(row := [])
        row.append(one)
    return [row for rows in found.values() for row in rows]


def laid_over(flat: Array, batch: Sequence[Matrices]) -> Array:
    """Return the view of a flat array that a batch of matrices is: (batch, matrices of each, rows, columns)."""
    (a, b, shape), count = batch[0], len(batch)
    apart = batch[1].start - a if count > 1 else b - a
    start = min(a, flat.size - count * apart)  # of stretches that hold one of the batch each
    stretches = flat[start : start + count * apart].reshape(count, apart)
    return stretches[:, a - start : b - start].reshape(count, *shape)


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
