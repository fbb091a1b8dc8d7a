"""One training step over all cores, in four verbs: gradients → exchange → clip → update.

The batch is cut into micro-batches whose activations stay in the cache, shared out to one thread a core; each thread
adds its gradients up in a flat buffer of its own, and the buffers are added in a fixed order: equal settings give equal
bits. ``loss.backward(); opt.step()`` does the same in plain steps.

What changes from step to step is in a :class:`Batch` on the way in (images, labels, the random key), in the optimizer's
``lr`` and ``steps``, and in :class:`Totals` on the way out (loss, the gradient's norm, how many were right). All else
is the same work on the same arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minivit import ops
from minivit.autograd.graph import Node, first_order, propagate
from minivit.autograd.op import raw
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, Key, array_module, device_of, is_array, on_device_of, to_device, to_numpy
from minivit.errors import DataError, GraphError, NonFiniteError, ShapeError
from minivit.nn.module import Module, mode
from minivit.nn.random import random_key
from minivit.ops.loss import check_labels
from minivit.train.clip import check_clip_norm, scale_to_norm
from minivit.train.nonfinite import first_non_finite, first_non_finite_gradient
from minivit.train.optimizer import Optimizer
from minivit.train.parameters import FlatParameters, LaidOut
from minivit.train.sharing import as_array, team_for

DROP_STREAM = 0xD209  # the stream of dropout and drop path under a run's seed


@dataclass(frozen=True)
class Batch:
    """What the micro-batches of one step have in common."""

    images: Array  # (B, C, H, W)
    labels: Array  # (B, …)
    key: Key  # of dropout and drop path, in this step
    training: bool | None  # the mode of all modules, or None: as each was set
    places: Mapping[Node, int]  # of the parameters that get a gradient, in the order of the store


class Piece(NamedTuple):
    """What a micro-batch came to, on the device: its share of the batch's mean loss, and how many were right."""

    loss: Array
    right: Array | None


class Totals(NamedTuple):
    """What a batch came to: its mean loss, the norm of its gradient before it is clipped, and how many were right."""

    loss: float
    grad_norm: float
    right: int | None


class Buffer(LaidOut):
    """A flat sum of gradients; ``written`` has the places of the parameters that it has got a part for."""

    def __init__(self, store: FlatParameters, flat: Array) -> None:
        super().__init__(store, flat)
        self.written: set[int] = set()

    def add(self, place: int, part: Array) -> None:
        """Add a part of a parameter's gradient; the first is copied, so that nothing need be cleared before."""
        if place in self.written:
            self.views[place] += part
        else:
            self.views[place][...] = part
            self.written.add(place)

    def clear_the_rest(self) -> None:
        """Zero the gradients that have got no part."""
        for place in set(range(len(self.views))) - self.written:
            self.views[place][...] = 0.0


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

    A step is :meth:`gradients`, :meth:`exchange`, :meth:`clip` and :meth:`update`, one after the other. Each may be
    replaced in a subclass: what it takes and what it leaves is all that the others know of it.

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
        self.team = team_for(model, threads, micro_batch)
        # one for each thread; the first thread's is the gradient that the optimizer reads
        flats = [opt.store.grad, *(opt.store.zeros() for _ in range(self.team.threads - 1))]
        self.buffers = [Buffer(opt.store, flat) for flat in flats]

    def __call__(self, images: Any, labels: Any) -> float:
        """Make one update and return the batch's mean loss before it.

        images (B, C, H, W), made the model's dtype, labels as the loss takes them. Raises :class:`NonFiniteError`
        before the update if the loss or the gradient is not finite, :class:`GraphError` if nothing gets a gradient.
        """
        self.right = None
        batch = self._batch(images, labels)
        with on_device_of(self.opt.store.values):
            pieces = self.gradients(batch)
            totals = self.exchange(pieces)
            self.grad_norm = totals.grad_norm
            if not (math.isfinite(totals.loss) and math.isfinite(totals.grad_norm)):
                raise self._non_finite(totals, batch)
            self.clip(totals.grad_norm)
            self.update()
        self.right = totals.right
        return totals.loss

    # ---- the four verbs ----

    def gradients(self, batch: Batch) -> list[Piece]:
        """Run every micro-batch forward and backward.

        Leaves in each thread's buffer the sum of its pieces' gradients, each by its share of the rows, and which
        parameters they are of; what was in a buffer before is gone. Returns the pieces in the order of the rows.
        """
        for buffer in self.buffers:
            buffer.written.clear()
        return self.team.run(partial(self._piece, batch), len(batch.images))

    def exchange(self, pieces: Sequence[Piece]) -> Totals:
        """Add up whatever was computed apart: here, by threads.

        Takes the buffers and pieces as :meth:`gradients` leaves them. Leaves in the first buffer, which is the
        optimizer's ``store.grad``, the gradient of the whole batch, 0 where no thread had a part, and in its
        ``written`` the parameters that any of them had a part for. Returns the totals, for which a GPU is waited for
        this once in a step. Raises GraphError if no parameter got a gradient.
        """
        total, others = self.buffers[0], [buffer for buffer in self.buffers[1:] if buffer.written]
        if not (total.written or others):
            raise GraphError(
                "no parameter of the optimizer gets a gradient from this loss",
                "set requires_grad = True on what is to learn, and let the loss depend on the model's output",
            )
        for buffer in (total, *others):
            buffer.clear_the_rest()
        squares = self.team.spread(partial(add_share, total.flat, [b.flat for b in others]), total.flat.size)
        total.written.update(*(buffer.written for buffer in others))
        losses, rights = [p.loss for p in pieces], [p.right for p in pieces if p.right is not None]
        xp = array_module(total.flat)
        found = [sum(losses[1:], losses[0]), xp.sqrt(sum(squares[1:], squares[0]))]
        if len(rights) == len(pieces):
            found.append(sum(rights[1:], rights[0]))
        loss, grad_norm, *right = to_numpy(xp.stack([x.astype(np.float64) for x in found])).tolist()
        return Totals(loss, grad_norm, int(right[0]) if right else None)

    def clip(self, grad_norm: float) -> None:
        """Scale the optimizer's ``store.grad``, whose norm is ``grad_norm``, down to ``clip_norm`` if that is less."""
        if (limit := self.clip_norm) is not None and grad_norm > limit:
            # all of it before the update begins: that may read beyond its share
            grad = self.opt.store.grad
            self.team.spread(lambda start, stop: scale_to_norm([grad[start:stop]], grad_norm, limit), grad.size)

    def update(self) -> None:
        """Let the optimizer update the parameters ``written`` in the first buffer by its ``store.grad``.

        Raises GraphError if there are none.
        """
        opt = self.opt
        if not self.buffers[0].written:  # to the optimizer no spans are all of them
            raise GraphError("a step has no gradient to update by", "call gradients, exchange and clip before it")
        opt.begin_update(opt.store.spans_of(self.buffers[0].written))
        self.team.spread(lambda start, stop: opt.update_spans([(start, stop)]), opt.store.values.size)

    # ---- what they are made of ----

    def _batch(self, images: Any, labels: Any) -> Batch:
        """Return a batch as arrays, with what else this step has of its own; raise an error for what is none."""
        for name, given in (("images", images), ("labels", labels)):
            if isinstance(given, Tensor) and given.is_recorded:
                what = f"a TrainStep has no gradient in its {name}, a Tensor that requires one"
                raise GraphError(what, f"give {name}.detach() to hold them constant, or train by loss.backward()")
        images, labels = as_array(images, self.opt.store.values.dtype), as_array(labels)
        if not (images.ndim and labels.ndim):
            raise ShapeError(f"images {images.shape}, labels {labels.shape}", "give arrays (B, C, H, W) and (B,)")
        if len(images) != len(labels):
            raise ShapeError(f"{len(images)} images, {len(labels)} labels", "give one label for each image")
        return Batch(
            images,
            labels,
            key=Key(self.seed, DROP_STREAM, self.opt.steps),
            training=None if self.model.training else True,
            places={p.node: i for i, p in enumerate(self.opt.parameters) if p.node is not None},
        )

    def _piece(self, batch: Batch, thread: int, start: int, stop: int) -> Piece:
        """Run one micro-batch forward and backward into the thread's buffer."""
        share = (stop - start) / len(batch.images)
        with mode(batch.training), random_key(batch.key.at_row(start)), first_order():
            logits = self.model(self.team.here(batch.images[start:stop]))
            loss = self._loss(logits, batch.labels, start, stop)
        right = count_right(logits, batch.labels[start:stop])
        cotangent = array_module(loss.data).full((), share, loss.dtype)
        for node, part in propagate(loss.node, cotangent) if loss.node is not None else ():
            if node not in batch.places:
                raise self._not_optimized(node)
            self.buffers[thread].add(batch.places[node], part)
        return Piece(loss.data * share, right)

    def _loss(self, logits: Any, labels: Array, start: int, stop: int) -> Tensor:
        """Return the loss of a piece of the batch."""
        try:
            return check_loss(self.loss(logits, labels[start:stop]))
        except DataError:  # of a label: then name its row in the batch, not in this piece of it
            if labels.dtype.kind in "iu":
                check_labels(labels, logits.shape[-1])
            raise

    def _not_optimized(self, node: Node) -> GraphError:
        name = next((n for n, p in self.model.named_parameters() if p.node is node), "a Tensor outside the model")
        return GraphError(
            f"{name} requires a gradient, but the optimizer does not have it",
            "make the optimizer after changing the model, or freeze it: parameter.requires_grad = False",
        )

    def _non_finite(self, totals: Totals, batch: Batch) -> NonFiniteError:
        """Return what tells where the first value is that is not finite."""
        place = None
        with mode(batch.training):
            for start, stop in self.team.pieces(len(batch.images)):
                images = self.team.here(batch.images[start:stop])
                if place := first_non_finite(self.model, images, batch.key.at_row(start)):
                    break
        if place is None and math.isfinite(totals.loss):
            place = first_non_finite_gradient(self.model, self.opt.store)
        return NonFiniteError(
            f"step {self.opt.steps}: the loss is {totals.loss}, the gradient's norm {totals.grad_norm}; "
            f"the first non-finite value is in {place or 'the loss itself'}",
            "nothing was updated: lower the learning rate, warm up longer, clip gradients, or look at this batch",
        )


def add_share(total: Array, others: Sequence[Array], start: int, stop: int) -> Array:
    """Add a share of other flat arrays to that of ``total``, in place; return the sum of its squares, 0-d."""
    share = total[start:stop]
    for other in others:
        share += other[start:stop]
    return share @ share


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
