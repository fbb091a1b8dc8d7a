"""Gradients scaled down together, so that no step goes too far (Pascanu et al. 2013, arXiv 1211.5063, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from minivit.backend import Array, array_module, square_sum
from minivit.errors import ConfigError
from minivit.nn.module import Parameter


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their norm is at most ``max_norm``; return the norm they had.

    Parameters that do not require a gradient, and are therefore not updated, do not count. Raises ConfigError for a
    ``max_norm`` that is not positive.
    """
    check_clip_norm(max_norm)
    grads = [p.grad for p in parameters if p.grad is not None and p.requires_grad]
    if not grads:
        return 0.0
    norm = float(gradient_norm(grads))
    scale_to_norm(grads, norm, max_norm)
    return norm


def gradient_norm(arrays: Iterable[Array]) -> Array:
    """Return the Euclidean norm over all arrays together, as a 0-d array on their device."""
    total: Any = 0.0
    for a in arrays:
        total = total + square_sum(a.reshape(-1))
    return array_module(total).sqrt(total)


def check_clip_norm(norm: Any) -> None:
    """Raise ConfigError unless ``norm`` is a positive number: a negative one would turn the gradient round."""
    if not (isinstance(norm, int | float | np.number) and norm > 0):
        raise ConfigError(
            f"a gradient norm of at most {norm!r}", "give a positive number; for TrainStep, None clips nothing"
        )


def scale_to_norm(arrays: Iterable[Array], norm: float, max_norm: float) -> None:
    """Scale arrays, whose norm together is ``norm``, in place to ``max_norm`` if that is smaller."""
    if norm > max_norm:
        for a in arrays:
            a *= max_norm / (norm + 1e-6)
