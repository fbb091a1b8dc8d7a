"""One training step, and prediction, over all cores.

The batch is cut into micro-batches whose activations stay in the cache, shared out to one thread a core; each thread
adds its gradients up in a flat buffer of its own, and the buffers are added in a fixed order: equal settings give equal
bits. ``loss.backward(); opt.step()`` does the same in plain steps.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from numbers import Integral
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import Node, first_order, no_grad, propagate
from minivit.autograd.op import raw
from minivit.autograd.tensor import Tensor
from minivit.backend import (
    Array,
    Key,
    array_module,
    blas_threads,
    cpu_cores,
    device_of,
    is_array,
    l2_cache,
    on_device_of,
    to_device,
    to_numpy,
)
from minivit.errors import ConfigError, DataError, GraphError, NonFiniteError, ShapeError
from minivit.nn.module import Module, mode, watching
from minivit.nn.random import random_key
from minivit.ops.loss import check_labels
from minivit.train.optim import Optimizer, check_clip_norm, scale_to_norm

DROP_STREAM = 0xD209  # the stream of dropout and drop path under a run's seed
CACHED_NUMBERS = 51 << 12  # tokens · dim of a micro-batch, for each MiB of L2 cache: fewer make calls too short
USUAL_DIM = 192  # of a model that does not say
KEPT_NUMBERS = 5 << 18  # tokens · dim · blocks of a micro-batch: its activations, some 20 times as many, are kept
SHARE_NUMBERS = 1 << 18  # numbers of a flat array worth a thread of its own
THREAD_NUMBERS = 1 << 15  # tokens · dim worth a thread of its own: with fewer, threads wait for the interpreter's lock


class TrainStep:
    """A whole training step: ``loss = step(images, labels)`` runs forward, backward, clipping and the update.

    ``loss(logits, labels)`` is a mean over rows. ``threads`` is the number of cores unless given, ``micro_batch`` the
    largest number of images worked on at once. ``clip_norm`` bounds the gradient's norm, which is kept in
    ``grad_norm``. Dropout and drop path draw from (``seed``, the optimizer's ``steps``) and from an image's place in
    the batch: neither threads nor micro-batches change them.

    ``right`` is the number of images in the last batch whose largest logit was that of their label, or of the largest
    share of a soft label; None unless logits are (B, K) and labels (B,) integers or (B, K).

    Only what gets a gradient in a step is updated, as by ``loss.backward(); opt.step()``: parameters that were frozen
    or are not reached keep their values and the optimizer's state. A model that was set to eval mode, as
    :func:`minivit.load_model` returns it, is trained in training mode all the same, and stays set as it was; in one
    that is in training mode, the parts that were set to eval mode remain in it.

    The C library gives freed memory back to the system, with which a step of a small model takes 1.4 times as long, of
    a larger one 1.07: a program that does little else than train calls ``minivit.backend.keep_freed_memory()`` first,
    and ``keep_freed_memory(False)`` gives the memory back.
    """

    def __init__(
        self,
        model: Module,
        opt: Optimizer,
        loss: Callable[..., Any] = ops.cross_entropy,
        threads: int | None = None,
        micro_batch: int | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if clip_norm is not None:
            check_clip_norm(clip_norm)
        self.model, self.opt, self.loss, self.clip_norm, self.seed = model, opt, loss, clip_norm, seed
        self.grad_norm = math.nan
        self.right: int | None = None
        self.team = Team(model, threads, micro_batch)
        # a flat gradient for each thread; the first thread's is the optimizer's own
        others = [array_module(opt.flat).zeros_like(opt.flat) for _ in range(self.team.threads - 1)]
        self.flats = [opt.grad, *others]
        self.views = [opt.split(flat) for flat in self.flats]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the views, of which it would make arrays of their own."""
        return {name: value for name, value in vars(self).items() if name != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.views = [self.opt.split(flat) for flat in self.flats]

    def __call__(self, images: Any, labels: Any) -> float:
        """Make one update and return the batch's mean loss before it.

        images (B, C, H, W), made the model's dtype, labels as the loss takes them. Raises :class:`NonFiniteError`
        before the update if the loss or the gradient is not finite, :class:`GraphError` if nothing gets a gradient.
        """
        for name, given in (("images", images), ("labels", labels)):
            if isinstance(given, Tensor) and given.is_recorded:
                what = f"a TrainStep has no gradient in its {name}, a Tensor that requires one"
                raise GraphError(what, f"give {name}.detach() to hold them constant, or train by loss.backward()")
        images, labels = as_array(images, self.opt.flat.dtype), as_array(labels)
        if not (images.ndim and labels.ndim):
            raise ShapeError(f"images {images.shape}, labels {labels.shape}", "give arrays (B, C, H, W) and (B,)")
        if len(images) != len(labels):
            raise ShapeError(f"{len(images)} images, {len(labels)} labels", "give one label for each image")
        key = Key(self.seed, DROP_STREAM, self.opt.steps)
        training = None if self.model.training else True  # as each module was set, or all of them
        place = {p.node: i for i, p in enumerate(self.opt.parameters) if p.requires_grad}
        written: list[set[int]] = [set() for _ in self.flats]  # a thread's first part of a gradient needs no adding

        def work(thread: int, start: int, stop: int) -> Any:
            share = (stop - start) / len(images)
            with mode(training), random_key(key.at_row(start)), first_order():
                logits = self.model(self.team.here(images[start:stop]))
                loss = self._loss(logits, labels, start, stop)
            right = count_right(logits, labels[start:stop])
            views, done = self.views[thread], written[thread]
            cotangent = array_module(loss.data).full((), share, loss.dtype)
            for node, part in propagate(loss.node, cotangent) if loss.node is not None else ():
                if (i := place.get(node)) is None:
                    raise self._not_optimized(node)
                if i in done:
                    views[i] += part
                else:
                    views[i][...] = part
                    done.add(i)
            return loss.data * share, right

        self.right = None
        with on_device_of(self.opt.flat):
            losses, rights = zip(*self.team.run(work, len(images)), strict=True)
            loss, right = self._add_up(written, losses, rights)
            if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
                with mode(training):
                    raise self._non_finite(loss, images, key)
            size = self.opt.flat.size
            if (limit := self.clip_norm) is not None and self.grad_norm > limit:
                # all of it first: an update may read beyond its share
                self.team.spread(lambda a, b: scale_to_norm([self.opt.grad[a:b]], self.grad_norm, limit), size)
            self.opt.begin_update(self.opt.spans_of(set().union(*written)))
            self.team.spread(lambda a, b: self.opt.update_spans([(a, b)]), size)
        self.right = right
        return loss

    def _loss(self, logits: Any, labels: Array, start: int, stop: int) -> Tensor:
        """Return the loss of a piece of the batch."""
        try:
            return check_loss(self.loss(logits, labels[start:stop]))
        except DataError:  # of a label: then name its row in the batch, not in this piece of it
            if labels.dtype.kind in "iu":
                check_labels(labels, logits.shape[-1])
            raise

    def _add_up(
        self, written: list[set[int]], losses: Sequence[Array], rights: Sequence[Array | None]
    ) -> tuple[float, int | None]:
        """Add up what the threads found: the gradient, of which ``grad_norm`` is kept; return loss and right ones."""
        if not any(written):
            raise GraphError(
                "no parameter of the optimizer gets a gradient from this loss",
                "set requires_grad = True on what is to learn, and let the loss depend on the model's output",
            )
        # the first thread's buffer is the optimizer's own gradient; others that had nothing to do are left as they are
        used = [0, *(t for t in range(1, len(self.flats)) if written[t])]
        for t in used:
            for i in set(range(len(self.views[t]))) - written[t]:
                self.views[t][i][...] = 0.0

        def share(start: int, stop: int) -> Array:
            total = self.opt.grad[start:stop]
            for t in used[1:]:
                total += self.flats[t][start:stop]
            return total @ total

        squares = self.team.spread(share, self.opt.flat.size)
        xp = array_module(self.opt.flat)
        found = [sum(losses[1:], losses[0]), xp.sqrt(sum(squares[1:], squares[0]))]
        counts = [right for right in rights if right is not None]
        if len(counts) == len(rights):
            found.append(sum(counts[1:], counts[0]))
        # the one time that a GPU is waited for; float64 holds the number of any dtype
        loss, self.grad_norm, *right = to_numpy(xp.stack([x.astype(np.float64) for x in found])).tolist()
        return loss, int(right[0]) if right else None

    def _not_optimized(self, node: Node) -> GraphError:
        name = next((n for n, p in self.model.named_parameters() if p.node is node), "a Tensor outside the model")
        return GraphError(
            f"{name} requires a gradient, but the optimizer does not have it",
            "make the optimizer after changing the model, or freeze it: parameter.requires_grad = False",
        )

    def _non_finite(self, loss: float, images: Array, key: Key) -> NonFiniteError:
        places = (
            first_non_finite(self.model, self.team.here(images[start:stop]), key.at_row(start))
            for start, stop in self.team.pieces(len(images))
        )
        place = next((p for p in places if p is not None), None)
        if place is None and math.isfinite(loss):
            place = self._non_finite_gradient()
        return NonFiniteError(
            f"step {self.opt.steps}: the loss is {loss}, the gradient's norm {self.grad_norm}; "
            f"the first non-finite value is in {place or 'the loss itself'}",
            "nothing was updated: lower the learning rate, warm up longer, clip gradients, or look at this batch",
        )

    def _non_finite_gradient(self) -> str:
        """Return which gradient was the first that is not finite: they come from the last layer to the first."""
        gradients = {id(p): (n, g) for p, n, g in zip(self.opt.parameters, self.opt.names, self.views[0], strict=True)}
        backwards = [id(p) for p in self.model.parameters()][::-1]
        for name, g in [gradients.pop(p) for p in backwards if p in gradients] + list(gradients.values()):
            if not bool(array_module(g).isfinite(g).all()):
                return f"the gradient of {name}"
        return "the gradient's norm, which overflows"


class Team:
    """Threads that share the rows of a batch, BLAS held to one thread meanwhile; on a GPU, one thread and one piece."""

    def __init__(self, model: Module, threads: int | None, micro_batch: int | None) -> None:
        if not all(n is None or (isinstance(n, Integral) and n >= 1) for n in (threads, micro_batch)):
            remedy = "each must be a whole number, at least 1, or None"
            raise ConfigError(f"threads={threads}, micro_batch={micro_batch}", remedy)
        self.device = next(model.parameters()).device
        self.threads, self.micro_batch = 1, micro_batch
        tokens, dim = getattr(model, "num_tokens", 1), getattr(model, "dim", None)
        self.numbers: int = tokens * (dim or THREAD_NUMBERS)  # of a row's activations, a layer
        if self.device == "cpu":
            self.threads = threads or cpu_cores()
            fit = CACHED_NUMBERS * l2_cache() // 2**20 // (tokens * (dim or USUAL_DIM))
            kept = KEPT_NUMBERS // (self.numbers * max(1, len(getattr(model, "blocks", ()))))
            self.micro_batch = micro_batch or max(1, min(fit, kept))
        self.all_threads = threads is not None  # asked for, whether they pay or not
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # and the process that it was started in

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the threads."""
        return vars(self) | {"_pool": None}

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads, started when they are first needed, and anew in a forked child, which has none of them."""
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads, "minivit")
        return self._pool[1]

    def here(self, images: Array) -> Array:
        """Return images on the model's device."""
        return to_device(images, self.device)

    def threads_for(self, rows: int) -> int:
        """Return how many threads to work on so many rows with."""
        return self.threads if self.all_threads else min(self.threads, max(1, rows * self.numbers // THREAD_NUMBERS))

    def pieces(self, rows: int) -> list[tuple[int, int]]:
        """Return the micro-batches (start, stop): of even size, and as many for every thread if there are enough."""
        if rows < 1:
            raise DataError("an empty batch", "give at least one image")
        threads = self.threads_for(rows)
        size = min(self.micro_batch or rows, -(-rows // threads))
        rounds = -(-rows // (size * threads))
        count = min(rounds * threads, rows)
        edges = [rows * i // count for i in range(count + 1)]
        return list(itertools.pairwise(edges))

    def run(self, work: Callable[[int, int, int], Any], rows: int) -> list[Any]:
        """Call work(thread, start, stop) for every micro-batch; return the results in the order of the rows."""
        return self._run(work, self.pieces(rows), self.threads_for(rows))

    def spread(self, work: Callable[[int, int], Any], length: int) -> list[Any]:
        """Call work(start, stop) for even shares of a flat array, one a thread; return the results in their order."""
        threads = min(self.threads, max(1, length // SHARE_NUMBERS))
        edges = [length * i // threads for i in range(threads + 1)]
        return self._run(lambda thread, start, stop: work(start, stop), list(itertools.pairwise(edges)), threads)

    def _run(self, work: Callable[[int, int, int], Any], pieces: list[tuple[int, int]], threads: int) -> list[Any]:
        results: list[Any] = [None] * len(pieces)
        stop = threading.Event()

        def share(thread: int) -> None:
            with np.errstate(all="ignore"):  # what is not finite is looked for in the result
                for i in range(thread, len(pieces), threads):
                    if not stop.is_set():
                        results[i] = work(thread, *pieces[i])

        with blas_threads(1) if self.device == "cpu" else contextlib.nullcontext():
            if threads == 1:
                share(0)
                return results
            pool = self.pool
            futures = [pool.submit(share, t) for t in range(threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also of an interrupt: the others end with their piece, before their buffers are used again
                stop.set()
                wait(futures)
            error = next((e for e in [f.exception() for f in futures] if e is not None), None)
            del futures  # an error refers to this frame: what refers to the error here would keep both alive
        if error is not None:
            try:
                raise error
            finally:
                del error
        return results


def as_array(x: Any, dtype: Any = None) -> Array:
    """Return the array of a Tensor, an array itself or one made of a list; floating numbers as ``dtype``, if given."""
    x = raw(x) if is_array(raw(x)) else np.asarray(x)
    return x.astype(dtype, copy=False) if dtype is not None and x.dtype.kind == "f" else x


def predict_logits(
    model: Module, images: Any, threads: int | None = None, micro_batch: int | None = None
) -> np.ndarray:
    """Return the logits of images (N, C, H, W) in eval mode as one NumPy array, computed in micro-batches.

    The model stays set as it is: threads may predict with it, and one may train it, at the same time.
    """
    team = Team(model, threads, micro_batch or (None if next(model.parameters()).device == "cpu" else 256))
    images = as_array(images, next(model.parameters()).dtype)

    def work(thread: int, start: int, stop: int) -> np.ndarray:
        with mode(False), no_grad(), first_order():
            return to_numpy(model(team.here(images[start:stop])).data)

    return np.concatenate(team.run(work, len(images)))


def check_loss(loss: Any) -> Tensor:
    """Return the loss; raise if it is not what a step can go back from."""
    if not isinstance(loss, Tensor):
        raise GraphError(f"the loss is a {type(loss).__name__}, not a Tensor", "make it of mv.ops, and keep its graph")
    if loss.ndim:
        raise ShapeError(f"the loss has the shape {loss.shape}", "give one number, the mean over the rows: mv.ops.mean")
    return loss


def count_right(logits: Any, labels: Array) -> Array | None:
    """Return how many rows of logits (B, K) are largest at their label, as a 0-d array.

    labels (B,) of integers or (B, K) of shares; None if logits or labels are anything else.
    """
    logits = raw(logits)
    if not is_array(logits) or logits.ndim != 2 or logits.shape[1] < 2:
        return None
    if labels.shape == logits.shape:
        if isinstance(labels, np.ndarray) and not (np.abs(labels.sum(axis=1) - 1.0) < 0.01).all():
            return None  # no shares, but several classes at once, or other numbers; on a GPU, to look would be to wait
        labels = labels.argmax(axis=1)  # (B, K) → (B,)
    elif labels.shape != logits.shape[:1] or labels.dtype.kind not in "iu":
        return None
    return (logits.argmax(axis=1) == to_device(labels, device_of(logits))).sum()


def first_non_finite(model: Module, images: Array, key: Key) -> str | None:
    """Return where the first NaN or infinity of a forward pass is: the images, a parameter, or a layer's output."""

    def bad(x: Any) -> bool:
        x = raw(x)
        return not bool(array_module(x).isfinite(x).all())

    if bad(images):
        return "the images"
    for name, p in model.named_parameters():
        if bad(p):
            return f"the parameter {name}"
    found: list[str] = []

    def look(path: str, out: Any) -> None:
        if not found and bad(out):
            found.append(f"the output of {path or type(model).__name__}")

    with watching(model, look), no_grad(), random_key(key), np.errstate(all="ignore"):
        model(images)
    return found[0] if found else None
