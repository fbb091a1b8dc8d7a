"""An exponential moving average of a model's parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minivit.backend import on_device_of, to_numpy
from minivit.errors import ConfigError
from minivit.train.optim import Optimizer, chunks, load_arrays, overlaps


class EMA:
    """Average of the parameters that ``opt`` updates: a ← d·a + (1 - d)·p after each update of p.

    It does better than the last values, which the noise in the gradients moves about (Polyak and Juditsky 1992,
    "Acceleration of stochastic approximation by averaging"; Dosovitskiy et al. 2020, section 4.1, with d = 0.9999).
    d is ``decay``, but at most (1 + t)/(10 + t) at update t, so that the first values are soon forgotten (as in
    TensorFlow's ``ExponentialMovingAverage``). Raises ConfigError for a decay outside [0, 1).
    """

    def __init__(self, opt: Optimizer, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ConfigError(f"decay={decay}", "it must be in [0, 1); 0.999 to 0.9999 is usual")
        self.opt, self.decay = opt, decay
        with on_device_of(opt.flat):
            self.flat = opt.flat.copy()
        self.views = opt.split(self.flat)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the views, of which it would make arrays of their own."""
        return {name: value for name, value in vars(self).items() if name != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.views = self.opt.split(self.flat)

    def update(self) -> None:
        """Take the parameters' present values in: after ``opt.step()``."""
        self.update_spans([(0, self.flat.size)])

    def update_spans(self, spans: Sequence[tuple[int, int]]) -> None:
        """Take in what the last update changed in given spans; threads may share them out, as ``opt.update_spans``."""
        t = self.opt.steps
        decay = min(self.decay, (1.0 + t) / (10.0 + t))
        with on_device_of(self.flat):
            for start, stop in chunks(self.flat, overlaps(spans, self.opt.updated)):
                average = self.flat[start:stop]
                difference = self.opt.flat[start:stop] - average
                difference *= 1.0 - decay
                average += difference

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model have the averaged parameters in this block, to evaluate it; updates raise GraphError meanwhile.

        Nothing is copied: the optimizer's own values stay where they are, and come back however the block ends.
        """
        before = [p.data for p in self.opt.parameters]
        try:
            for p, average in zip(self.opt.parameters, self.views, strict=True):
                p.data = average
            yield
        finally:
            for p, data in zip(self.opt.parameters, before, strict=True):
                p.data = data

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of each averaged parameter, by its name."""
        return dict(zip(self.opt.names, self.opt.split(np.array(to_numpy(self.flat))), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; raise CheckpointError, nothing changed, if it does not fit."""
        load_arrays(dict(zip(self.opt.names, self.views, strict=True)), state, "the averaged parameters")
