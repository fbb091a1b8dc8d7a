"""Where the first value is that is not finite: what a NonFiniteError tells."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.op import raw
from minivit.backend import Array, Key, array_module
from minivit.errors import NonFiniteError
from minivit.nn.module import Module, watching
from minivit.nn.random import random_key
from minivit.train.parameters import FlatParameters


def first_non_finite(model: Module, images: Array, key: Key) -> str | None:
    """Return where the first NaN or infinity of a forward pass is: the images, a parameter, or a layer's output."""
    if not _finite(images):
        return "the images"
    for name, p in model.named_parameters():
        if not _finite(p):
            return f"the parameter {name}"
    found: list[str] = []

    def look(path: str, out: Any) -> None:
        if not found and not _finite(out):
            found.append(f"the output of {path or type(model).__name__}")

    with watching(model, look), no_grad(), random_key(key), np.errstate(all="ignore"):
        model(images)
    return found[0] if found else None


def first_non_finite_gradient(model: Module, store: FlatParameters) -> str:
    """Return which gradient was the first that is not finite: they come from the last layer to the first."""
    gradients = {id(p): (n, g) for p, n, g in zip(store.parameters, store.names, store.split(store.grad), strict=True)}
    backwards = [id(p) for p in model.parameters()][::-1]
    for name, g in [gradients.pop(p) for p in backwards if p in gradients] + list(gradients.values()):
        if not _finite(g):
            return f"the gradient of {name}"
    return "the gradient's norm, which overflows"


def _finite(x: Any) -> bool:
    x = raw(x)
    return bool(array_module(x).isfinite(x).all())


def non_finite(step: str, loss: float, grad_norm: float, place: str | None) -> NonFiniteError:
    """Return the error of a step whose loss or gradient is not finite, and where it begins."""
    return NonFiniteError(
        f"{step}: the loss is {loss}, the gradient's norm {grad_norm}; "
        f"the first non-finite value is in {place or 'the loss itself, as where a label is no class'}",
        "nothing was updated: lower the learning rate, warm up longer, clip gradients, or look at this batch",
    )
