"""Traces of a model in eval mode, one batch after another in bounded memory, and what is averaged over many images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor
from minivit.backend import Team, array_module, available_memory, cpu_cores, is_array, is_floating, to_device
from minivit.errors import ConfigError, DataError, DTypeError, NonFiniteError, value_text
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
    size = batch_size(first_trace(model, images), memory)
    for start in range(0, len(images), size):
        here = slice(start, min(start + size, len(images)))
        yield here, batch_trace(model, images, here)


def first_trace(model: Any, images: Any) -> Trace:
    """Return the trace of the first of images (N, C, H, W); raise DTypeError or DataError if they are none."""
    if not is_array(images) or not images.ndim:
        raise DTypeError(f"images are an array (N, C, H, W), got a {type(images).__name__}", "np.asarray(images)")
    if not len(images):
        raise DataError("there is no image to study", "give at least one")
    return trace_model(model, images[:1])


def batch_trace(model: Any, images: Any, here: slice) -> Trace:
    """Return the trace of the images ``here``; raise NonFiniteError with the number of one that is none."""
    batch = images[here]
    for i, image in enumerate(batch):
        if is_floating(image.dtype) and not array_module(image).isfinite(image).all():
            raise NonFiniteError(f"image {here.start + i} holds NaN or infinity", "look at where it comes from")
    return trace_model(model, batch)


def batch_size(first: Trace, memory: int | None = None) -> int:
    """Return how many images may be traced at once, by the trace of one of them."""
    if memory is not None and not (isinstance(memory, Integral) and memory > 0):
        raise ConfigError(f"memory is {value_text(memory)}", "give a number of bytes, or None")
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
    """Return distance, entropy and importance of every head over images (N, C, H, W), batch by batch, on all cores.

    ``classes``, one or (N,) of them, are those whose logit the importance follows: of each image the predicted one
    unless given. ``memory`` as :func:`traces` has it, of all threads together. ``after_batch(n)`` is called after each
    batch, of n images, by one thread at a time.
    """
    first = first_trace(model, images)
    size, count, device = batch_size(first, memory), len(images), first.logits.device
    if classes is not None:
        classes = class_indices(classes, count, first.logits.shape[-1])
    largest = largest_entropy(first)
    del first
    threads, telling = min(cpu_cores(), size) if device == "cpu" else 1, threading.Lock()

    def work(thread: int, start: int, stop: int) -> list[np.ndarray]:
        trace = batch_trace(model, images, slice(start, stop))
        follow = predicted(trace) if classes is None else classes[start:stop]
        gradient = flows(trace, follow, trace.attention, keep=False)
        sums = [*distance_sums(trace), *entropy_sums(trace), importance_sums(trace, gradient)]
        with telling:
            if after_batch is not None:
                after_batch(stop - start)
        return sums

    parts = Team(threads, size // threads, device).run(work, count)
    distance, queries, bits, rows, importance = (np.sum(column, axis=0) for column in zip(*parts, strict=True))
    return HeadStatistics(count, over_counts(distance, queries), over_counts(bits, rows), largest, importance / count)


def predicted(trace: Trace) -> np.ndarray:
    """Return the class with the largest logit of each image, (B,); of the patches' mean if each has its own."""
    logits = values(trace.logits, "the logits")
    return (logits if logits.ndim == 2 else logits.mean(axis=1)).argmax(axis=-1)
