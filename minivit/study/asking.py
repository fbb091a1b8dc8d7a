"""What is asked of a trace: the class whose logit is followed, and arrays that can be relied on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import Tensor
from minivit.backend import is_array, is_half, to_numpy
from minivit.errors import ConfigError, DTypeError, NonFiniteError, ShapeError, value_text
from minivit.models.trace import Trace
from minivit.nn.layers import Tokenizer
from minivit.nn.scored import SequencePool


def check_trace(trace: Any) -> None:
    """Raise ConfigError for what is no trace."""
    if not isinstance(trace, Trace):
        raise ConfigError(
            f"a trace is studied, got a {type(trace).__name__}", "give model.trace(images) or study.trace_model(…)"
        )


def values(x: Any, what: str) -> np.ndarray:
    """Return a Tensor's or array's numbers as a NumPy array, float16 and bfloat16 as float32.

    Raises NonFiniteError for NaN and infinity, of which no map or mean says anything, and DTypeError for what is
    neither real nor floating, or no array; ``what`` they are is what the message says.
    """
    given = x.data if isinstance(x, Tensor) else x
    if not is_array(given):
        raise DTypeError(f"{what}: an array is asked for, got a {type(given).__name__}", "np.asarray(…, np.float32)")
    array = to_numpy(given)
    array = array.astype(np.float32) if is_half(array.dtype) else array
    if array.dtype.kind != "f":
        raise DTypeError(f"{what}: {array.dtype} numbers", "give float32 or float64")
    if not np.isfinite(array).all():
        where = np.argwhere(~np.isfinite(array))
        raise NonFiniteError(
            f"{what}: {len(where):,} of {array.size:,} numbers are NaN or infinite, the first at {where[0].tolist()}",
            "look at the images and at the model's parameters: something there is no number",
        )
    return array


def reads_class_token(trace: Trace) -> bool:
    """Tell whether the class is read from the first token; else it is read from the patches, all of them."""
    return trace.prefix > 0 and getattr(trace.model, "pool", "cls") == "cls"


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


def token_weights(trace: Trace) -> np.ndarray | None:
    """Return how much of each token a model reads that weighs them, (B, 1, N); None for others, who weigh none."""
    pool = getattr(trace.model, "attn_pool", None)
    if not isinstance(pool, SequencePool):
        return None
    with no_grad():
        return values(pool.weights(trace.model.norm(trace.tokens[-1].detach())), "the weights of the tokens")


def class_indices(classes: Any, batch: int, count: int) -> np.ndarray:
    """Return the class of each of ``batch`` images, (B,) integers, of one class or as many as there are images.

    Raises ConfigError for one that a model of ``count`` classes has not, ShapeError for another number of them,
    DTypeError for what is no integer.
    """
    given = classes.data if isinstance(classes, Tensor) else classes
    try:
        given = to_numpy(given) if is_array(given) else np.asarray(given)
    except ValueError:  # lists of unequal length
        given = np.asarray(None)
    if given.dtype.kind not in "iu":
        raise DTypeError(f"a class is an integer, got {value_text(classes)}", f"give one of 0 to {count - 1}")
    if given.shape not in ((), (batch,)):
        raise ShapeError(f"classes of shape {given.shape} for {batch} images", f"give one class, or ({batch},) of them")
    if wrong := [int(c) for c in given.ravel() if not 0 <= c < count]:
        raise ConfigError(f"there is no class {wrong[0]}: the model has {count}", f"give 0 to {count - 1}")
    return np.broadcast_to(given.astype(np.int64), (batch,))


def followed(trace: Trace, classes: Any) -> np.ndarray:
    """Return :func:`class_indices` of a trace's images."""
    return class_indices(classes, trace.logits.shape[0], trace.logits.shape[-1])


def patch_embed(model: Any) -> Tokenizer:
    """Return the layer that makes tokens of images; raise ConfigError if there is none."""
    embed = getattr(model, "patch_embed", None)
    if not isinstance(embed, Tokenizer):
        raise ConfigError(f"{type(model).__name__} has no Tokenizer called patch_embed", "name it so")
    return embed
