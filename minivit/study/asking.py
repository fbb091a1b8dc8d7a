"""What is asked of a trace: the class whose logit is followed, and arrays that can be relied on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor
from minivit.backend import is_array, is_half, to_numpy
from minivit.errors import ConfigError, DTypeError, NonFiniteError, ShapeError, value_text
from minivit.models.trace import Trace
from minivit.nn.layers import PatchEmbed


def check_trace(trace: Any) -> None:
    """Raise ConfigError for what is no trace."""
    if not isinstance(trace, Trace):
        raise ConfigError(
            f"a trace is studied, got a {type(trace).__name__}", "give model.trace(images) or study.trace_model(…)"
        )


def values(x: Any, what: str) -> np.ndarray:
    """Return a Tensor's or array's numbers as a NumPy array, float16 and bfloat16 as float32.

    Raises NonFiniteError for NaN and infinity, of which no map or mean says anything, and DTypeError for what is
    neither real nor floating; ``what`` they are is what the message says.
    """
    array = to_numpy(x.data if isinstance(x, Tensor) else x)
    array = array.astype(np.float32) if is_half(array.dtype) else array
    if array.dtype.kind != "f":
        raise DTypeError(f"{what}: {array.dtype} numbers", "give float32 or float64")
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise NonFiniteError(
            f"{what}: {count:,} of {array.size:,} numbers are NaN or infinite",
            "look at the images and at the model's parameters: something there is no number",
        )
    return array


def attention_of(trace: Trace) -> list[np.ndarray]:
    """Return the probabilities P of every block, (B, H, T, T), checked."""
    check_trace(trace)
    return [values(p, f"the attention of block {i}") for i, p in enumerate(trace.attention)]


def gradient_of(trace: Trace, gradient: Sequence[Any]) -> list[np.ndarray]:
    """Return the gradients dP of every block, (B, H, T, T), checked: as many, and of the shapes, as the attention."""
    check_trace(trace)
    expected = [tuple(p.shape) for p in trace.attention]
    alike = isinstance(gradient, list | tuple) and all(isinstance(g, Tensor) or is_array(g) for g in gradient)
    if not alike or [tuple(g.shape) for g in gradient] != expected:
        got = [tuple(g.shape) for g in gradient] if alike else value_text(type(gradient))
        raise ShapeError(
            f"the gradient of {len(expected)} blocks with attention {expected[:1]} is asked for, got {got}",
            "give attention_gradient(trace, of) of the same trace, block by block from the first",
        )
    return [values(g, f"the gradient of block {i}'s attention") for i, g in enumerate(gradient)]


def class_indices(trace: Trace, classes: Any) -> np.ndarray:
    """Return the class of each image, (B,) integers, of one class or as many as there are images.

    Raises ConfigError for a class that the model has not, ShapeError for another number of them.
    """
    count, batch = trace.logits.shape[-1], trace.logits.shape[0]
    given = to_numpy(classes.data if isinstance(classes, Tensor) else classes) if not is_number(classes) else classes
    given = np.asarray(given)
    if given.dtype.kind not in "iu" or given.dtype == bool:
        raise DTypeError(f"a class is an integer, got {value_text(classes)}", f"give one of 0 to {count - 1}")
    if given.shape not in ((), (batch,)):
        raise ShapeError(f"classes of shape {given.shape} for {batch} images", f"give one class, or ({batch},) of them")
    if given.size and not (given.min() >= 0 and given.max() < count):
        wrong = int(given.min() if given.min() < 0 else given.max())
        raise ConfigError(f"there is no class {wrong}: the model has {count}", f"give 0 to {count - 1}")
    return np.broadcast_to(given.astype(np.int64), (batch,))


def is_number(x: Any) -> bool:
    """Tell whether x is a plain number or a list, not an array or a Tensor."""
    return not (isinstance(x, Tensor) or is_array(x))


def patch_embed(model: Any) -> PatchEmbed:
    """Return the layer that makes tokens of patches; raise ConfigError if there is none."""
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, PatchEmbed):
        raise ConfigError(f"{type(model).__name__} has no PatchEmbed called patch_embed", "name it so")
    return embed
