"""An exponential moving average of a model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minivit.backend import on_device_of, to_numpy
from minivit.errors import ConfigError
from minivit.ops.cuda.update import average
from minivit.train.numbers import lesser
from minivit.train.parameters import FlatParameters, LaidOut, Span, chunks, load_arrays, overlaps


class EMA(LaidOut):
    """Average of the parameters in ``store`` (of an optimizer: ``opt.store``): a ← d·a + (1 - d)·p after each update.

    It does better than the last values, which the noise in the gradients moves about (Polyak and Juditsky 1992,
    "Acceleration of stochastic approximation by averaging"; Dosovitskiy et al. 2020, section 4.1, with d = 0.9999).
    d is ``decay``, but at most (1 + t)/(10 + t) at update t, so that the first values are soon forgotten (as in
    TensorFlow's ``ExponentialMovingAverage``). Raises ConfigError for a decay outside [0, 1).
    """

    def __init__(self, store: FlatParameters, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay={decay}", "it must be in [0, 1); 0.999 to 0.9999 is usual")
        with on_device_of(store.values):
            super().__init__(store, store.values.copy())
        self.decay = decay

    def update(self) -> None:
        """Take the parameters' present values in: after ``opt.step()``."""
        self.update_spans([(0, self.flat.size)])

    def update_spans(self, spans: Sequence[Span]) -> None:
        """Take in what the last update changed in given spans; threads may share them out, as ``opt.update_spans``."""
        numbers = self.store.numbers
        with on_device_of(self.flat):
            for start, stop in chunks(self.flat, overlaps(spans, self.store.updated)):
                ours, values = self.flat[start:stop], self.store.values[start:stop]
                if numbers is None or not average(ours, values, numbers.ok, numbers.count, self.decay):
                    difference = values - ours
                    difference *= self._share()
                    ours += difference

    def _share(self) -> Any:
        """Return how much of the way the average goes to the values in the present update."""
        t, numbers = self.store.count, self.store.numbers
        share = 1.0 - lesser(self.decay, (1.0 + t) / (10.0 + t))
        return share if numbers is None else share * numbers.ok

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have the averaged parameters in this block, to evaluate it; updates raise GraphError meanwhile.

        Nothing is copied: the store's own values stay where they are, and come back however the block ends.
        """
        before = [p.data for p in self.store.parameters]
        try:
            for p, view in zip(self.store.parameters, self.views, strict=True):
                p.data = view
            yield
        finally:
            for p, data in zip(self.store.parameters, before, strict=True):
                p.data = data

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of each averaged parameter, by its name."""
        return self.store.by_name(np.array(to_numpy(self.flat)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; raise CheckpointError, nothing changed, if it does not fit."""
        load_arrays(self.store.by_name(self.flat), state, "the averaged parameters")
