"""Traces of a model in eval mode, one batch after another in bounded memory, and what is averaged over many images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor
from minivit.backend import array_module, available_memory, is_array, is_floating, to_device
from minivit.errors import ConfigError, DataError, DTypeError, NonFiniteError
from minivit.models.trace import Change, Trace
from minivit.nn.module import mode
from minivit.study.asking import class_indices, values
from minivit.study.distance import distance_sums, over_counts
from minivit.study.flow import flows
from minivit.study.heads import entropy_sums, importance_sums, largest_entropy

MOST_BYTES = 2**28  # that a batch's trace may take unless told otherwise: more is slower, for want of caches
MOST_IMAGES = 64  # of a batch
OVERHEAD = 1.25  # of a trace: the gradient on its way back


def trace_model(model: Any, images: Any, mask: Any = None, change: Change | None = None) -> Trace:
    """Return the trace of images (B, C, H, W), an array of real numbers, in eval mode, on the model's device and dtype.

    ``mask`` and ``change`` as :func:`minivit.models.trace.trace` has them. The model stays set as it is. Raises
    ConfigError for a model that cannot be traced.
    """
    if not callable(getattr(model, "trace", None)):
        raise ConfigError(
            f"a {type(model).__name__} has no trace: it has no attention that could be looked at",
            "give a model with one, such as a ViT; what a trace needs is at minivit.models.trace",
        )
    parameter = next(model.parameters())
    images = images.data if isinstance(images, Tensor) else images
    if is_array(images):
        images = to_device(images, parameter.device)
        images = images.astype(parameter.dtype, copy=False) if is_floating(images.dtype) else images
    with mode(False):
        return model.trace(images, mask, change)


def traces(model: Any, images: Any, memory: int | None = None) -> Iterator[tuple[slice, Trace]]:
    """Yield (which images, their trace) for batch after batch of images (N, C, H, W), an array or a memory map.

    A batch is as large as ``memory`` bytes allow, at least one image: a first trace of one image tells what one keeps.
    Unless given that is 256 MiB, or a quarter of what is free if that is less. A gradient that is asked for without
    giving up the graph takes twice as much again. Let go of one trace (``del trace``) before the next.
    """
    if not is_array(images):
        raise DTypeError(f"images are an array (N, C, H, W), got a {type(images).__name__}", "np.asarray(images)")
    count = len(images)
    if count == 0:
        raise DataError("there is no image to study", "give at least one")
    size = 1 if count == 1 else batch_size(model, images, memory)
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        check_images(images[here], start)
        yield here, trace_model(model, images[here])


def check_images(images: Any, start: int) -> None:
    """Raise NonFiniteError if one of the images, numbered from ``start``, holds what is no number."""
    for i, image in enumerate(images):
        if is_floating(image.dtype) and not array_module(image).isfinite(image).all():
            raise NonFiniteError(f"image {start + i} holds NaN or infinity", "look at where it comes from")


def batch_size(model: Any, images: Any, memory: int | None = None) -> int:
    """Return how many of the images may be traced at once."""
    first = trace_model(model, images[:1])
    budget = min(MOST_BYTES, available_memory(first.logits.device) // 4) if memory is None else memory
    return int(np.clip(budget / (OVERHEAD * kept_bytes(first)), 1, MOST_IMAGES))


def kept_bytes(trace: Trace) -> int:
    """Return the bytes of all arrays that a trace and its graph hold, those of the model's parameters left out."""
    arrays = [x.data for x in (*trace.tokens, *trace.attended, *trace.mlp)]
    arrays += [getattr(heads, field.name).data for heads in trace.heads for field in fields(heads)]
    nodes = {trace.logits.node} - {None}
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        arrays += [x for x in (*(node.args or ()), node.out) if is_array(x)]
        nodes |= (new := set(node.parents) - seen - {None})
        seen |= new
    held = {id(base): base.nbytes for base in map(base_of, arrays)}
    for p in trace.model.parameters():
        held.pop(id(base_of(p.data)), None)
    return sum(held.values())


def base_of(array: Any) -> Any:
    """Return the array that a view is one of."""
    while getattr(array, "base", None) is not None and is_array(array.base):
        array = array.base
    return array


@dataclass(frozen=True)
class HeadStatistics:
    """What is known of every head from ``images`` many images, float64.

    ``distance`` (L, H) in pixels, as of :func:`attention_distance`; ``entropy`` (L, H) in bits and ``largest_entropy``,
    as of :func:`entropy`; ``importance`` (L, H), as of :func:`head_importance`.
    """

    images: int
    distance: np.ndarray
    entropy: np.ndarray
    largest_entropy: float
    importance: np.ndarray


def head_statistics(
    model: Any,
    images: Any,
    classes: Any = None,
    memory: int | None = None,
    after_batch: Callable[[int], None] | None = None,
) -> HeadStatistics:
    """Return distance, entropy and importance of every head over images (N, C, H, W), batch by batch.

    ``classes``, one or (N,) of them, are those whose logit the importance follows: of each image the predicted one
    unless given. ``memory`` as :func:`traces` has it. ``after_batch(n)`` is called after each batch, of n images.
    """
    parts: list[list[np.ndarray]] = []
    largest = 0.0
    for here, trace in traces(model, images, memory):
        if classes is not None and not parts:  # all of them, before any work
            classes = class_indices(classes, len(images), trace.logits.shape[-1])
        follow = predicted(trace) if classes is None else classes[here]
        gradient = flows(trace, follow, trace.attention, keep=False)
        parts.append([*distance_sums(trace), *entropy_sums(trace), importance_sums(trace, gradient)])
        largest = largest_entropy(trace)
        del trace, gradient  # before the next is there
        if after_batch is not None:
            after_batch(here.stop - here.start)
    distance, queries, bits, rows, importance = (np.sum(column, axis=0) for column in zip(*parts, strict=True))
    count = len(images)
    return HeadStatistics(count, over_counts(distance, queries), over_counts(bits, rows), largest, importance / count)


def predicted(trace: Trace) -> np.ndarray:
    """Return the class with the largest logit of each image, (B,); of the patches' mean if each has its own."""
    logits = values(trace.logits, "the logits")
    return (logits if logits.ndim == 2 else logits.mean(axis=1)).argmax(axis=-1)
