"""One training step over all cores, in four verbs: gradients → exchange → clip → update.

The batch is cut into micro-batches whose activations stay in the cache, shared out to one thread a core; each thread
adds its gradients up in a flat buffer of its own, and the buffers are added in a fixed order: equal settings give equal
bits. ``loss.backward(); opt.step()`` does the same in plain steps.

What changes from step to step is in a :class:`Batch` on the way in (images, labels, the random key), in the optimizer's
``lr`` and ``steps``, and in :class:`Totals` on the way out (loss, the gradient's norm, how many were right). All else
is the same work on the same arrays.

On a GPU these numbers lie there (numbers.py), the verbs look at none of them, and so their work can be recorded once
and replayed (capture.py); what it came to is read later (underway.py).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import Node, first_order, propagate
from minivit.autograd.tensor import Tensor
from minivit.backend import Array, Key, array_module, blas_threads, is_floating, on_device_of
from minivit.backend.planning import is_on_gpu
from minivit.errors import GraphError, NonFiniteError
from minivit.nn.module import Module, mode
from minivit.nn.random import random_key
from minivit.ops.cuda.sums import collecting
from minivit.train.capture import Capture
from minivit.train.clip import check_clip_norm, scale_to_norm
from minivit.train.crew import Crew
from minivit.train.ema import EMA
from minivit.train.nonfinite import first_non_finite, first_non_finite_gradient, non_finite
from minivit.train.numbers import DeviceNumbers
from minivit.train.optimizer import Optimizer
from minivit.train.pieces import (
    Batch,
    Buffer,
    Piece,
    Totals,
    add_share,
    are_shares,
    checked,
    count_right,
    loss_of,
)
from minivit.train.precision import LossScale, WorkingCopy, check_precision, computing
from minivit.train.sharing import team_for
from minivit.train.underway import Submitted, Underway

DROP_STREAM = 0xD209  # the stream of dropout and drop path under a run's seed


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

    ``precision`` is what the model computes in, by a name of :data:`minivit.train.precision.NAMES`; ``ema`` is an
    average of the parameters that takes each update in; ``workers`` processes, this one with them, share each batch.

    A step is :meth:`gradients`, :meth:`exchange`, :meth:`clip` and :meth:`update`, one after the other. Each may be
    replaced in a subclass: what it takes and what it leaves is all that the others know of it.

    On a GPU the verbs wait for nothing, and whatever is made of them is recorded in a graph and replayed:
    ``why_launched`` says why, where it is not. :meth:`submit` hands a step in, and ``submit(…).totals()`` waits for
    what it came to: as long as no more than ``ahead`` are asked for later, the GPU has work while the host prepares
    the next. After a step that is not finite nothing is updated until its totals have been asked for.

    The C library gives freed memory back to the system, with which a step of a small model takes 1.4 times as long: a
    program that does little else than train calls ``minivit.backend.keep_freed_memory()`` first.
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
        precision: str = "float32",
        ema: EMA | None = None,
        workers: int = 1,
    ) -> None:
        if clip_norm is not None:
            check_clip_norm(clip_norm)
        self.model, self.opt, self.loss, self.clip_norm, self.seed, self.ema = model, opt, loss, clip_norm, seed, ema
        self.grad_norm = math.nan
        self.right: int | None = None
        self.team = team_for(model, threads, micro_batch)
        self.precision = check_precision(precision, self.team.device)
        self.crew = Crew(workers, type(self))
        # one for each thread; the first thread's is the gradient that the optimizer reads
        flats = [opt.store.grad, *(opt.store.zeros() for _ in range(self.team.threads - 1))]
        self.buffers = [Buffer(opt.store, flat) for flat in flats]
        self._to_begin_with()

    def _to_begin_with(self) -> None:
        """Make what a step on a GPU keeps there: nothing is under way, and nothing recorded."""
        store, dtype = self.opt.store, self.opt.store.values.dtype
        self.numbers: DeviceNumbers | None = None
        self.working: WorkingCopy | None = None
        self.underway: Underway | None = None
        if not is_on_gpu(store.values):
            return
        self.numbers = DeviceNumbers(store, LossScale(store.values) if self.precision.scaled else None)
        if self.precision.is_half:
            dtype = self.precision.dtype
            self.working = WorkingCopy(store, self.model, dtype)
        capture = Capture(self._work, self._settings, self.model, store, dtype)
        self.underway = Underway(self.numbers, capture, self._checked)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not what is recorded, which works on the arrays of this one."""
        own = ("numbers", "working", "underway")
        return {k: v for k, v in vars(self).items() if k not in own} | {"state": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "state"})
        self._to_begin_with()
        self.load_state_dict(state["state"])

    @property
    def ahead(self) -> int:
        """How many steps may be handed in before the totals of the first are asked for."""
        # in float16 a batch whose gradient overflows is worked on again, before the next
        return 0 if self.underway is None or self.precision.scaled else 1

    @property
    def why_launched(self) -> str:
        """Why some steps on a GPU are launched one operation at a time; "" if all are recorded and replayed."""
        return "" if self.underway is None else self.underway.capture.why_not

    def __call__(self, images: Any, labels: Any) -> float:
        """Make one update and return the batch's mean loss before it.

        images (B, C, H, W), made the model's dtype, labels as the loss takes them. Raises :class:`NonFiniteError`
        before the update if the loss or the gradient is not finite, :class:`GraphError` if nothing gets a gradient.
        """
        return float(self.submit(images, labels).totals().loss)

    def submit(self, images: Any, labels: Any) -> Submitted:
        """Make one update, or on a GPU begin it, and return what ``totals()`` of it can be asked for.

        They raise the :class:`NonFiniteError` of this batch, or of one before it that nobody has asked for. The steps
        after that one have not been made, and their batches may be handed in again.
        """
        self.right = None
        batch = self._batch(images, labels)
        with on_device_of(self.opt.store.values):
            if self.underway is None:
                totals = self._run(batch)
                return Submitted(batch, lambda _: self._checked(totals, batch))
            self.opt.check_rates()
            return self.underway.begin(batch, self.opt.lr)

    def _run(self, batch: Batch) -> Totals:
        """Make an update on the CPU, unless something is not finite; return what the batch came to."""
        with blas_threads(1):  # the team asks for it again and again: to change it takes 1% of a small step
            totals = self.exchange(self.gradients(batch))
            if math.isfinite(totals.loss) and math.isfinite(totals.grad_norm):
                self.clip(totals.grad_norm)
                self.update()
                if (ema := self.ema) is not None:
                    self.team.spread(lambda start, stop: ema.update_spans([(start, stop)]), ema.flat.size)
        return totals

    def _work(self, batch: Batch) -> None:
        """Make an update on a GPU, and leave there what the batch came to: no value is looked at."""
        assert self.numbers is not None
        totals = self.exchange(self.gradients(batch))
        self.numbers.finish(totals.loss, totals.grad_norm, totals.right)
        with self.numbers.leading():
            self.clip(totals.grad_norm)
            self.update()
            if self.ema is not None:
                self.ema.update()

    def _checked(self, totals: Totals, batch: Batch) -> Totals:
        """Keep what a batch came to, and return it; raise NonFiniteError if that is not finite."""
        self.grad_norm = totals.grad_norm
        if not (math.isfinite(totals.loss) and math.isfinite(totals.grad_norm)):
            raise self._non_finite(totals, batch)
        self.right = totals.right
        return totals

    # ---- state ----

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of what a step keeps besides the optimizer's state: in float16, the scale of the loss."""
        return {} if self.numbers is None or self.numbers.scale is None else self.numbers.scale.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, in whatever precision that was."""
        if self.numbers is not None and self.numbers.scale is not None and state:
            self.numbers.scale.load_state_dict(state)

    # ---- the four verbs ----

    def gradients(self, batch: Batch) -> list[Piece]:
        """Run every micro-batch forward and backward.

        Leaves in each thread's buffer the sum of its pieces' gradients, each by its share of the rows, and which
        parameters they are of; what was in a buffer before is gone. Returns the pieces in the order of the rows.
        """
        for buffer in self.buffers:
            buffer.mark(())
        batch, team = self.crew.hand_out(batch, self.model, self.loss, self.opt.store, self.team)
        with computing(self.precision, self.working):
            places = {p.node: i for i, p in enumerate(self.opt.parameters) if p.node is not None}
            return team.run(partial(self._piece, batch, places), len(batch.images))

    def exchange(self, pieces: Sequence[Piece]) -> Totals:
        """Add up whatever was computed apart: by threads, or by processes.

        Takes the buffers and pieces as :meth:`gradients` leaves them. Leaves in the first buffer, which is the
        optimizer's ``store.grad``, the gradient of the whole batch, 0 where no thread had a part, and in its
        ``written`` the parameters that any of them had a part for. Returns the totals, on a GPU as 0-d arrays. Raises
        GraphError if no parameter got a gradient.
        """
        elsewhere, beside = self.crew.collect()
        pieces = [*pieces, *elsewhere]
        total, others = self.buffers[0], [buffer for buffer in (*self.buffers[1:], *beside) if buffer.written]
        written = total.written.union(*(buffer.written for buffer in others))
        if not written:
            raise GraphError(
                "no parameter of the optimizer gets a gradient from this loss",
                "set requires_grad = True on what is to learn, and let the loss depend on the model's output",
            )
        for buffer in (total, *others):
            buffer.clear_the_rest()
        squares = self.team.spread(partial(add_share, total.flat, [b.flat for b in others]), total.flat.size)
        total.mark(written)
        losses, rights = [p.loss for p in pieces], [p.right for p in pieces if p.right is not None]
        xp = array_module(total.flat)
        loss, grad_norm = sum(losses[1:], losses[0]), xp.sqrt(sum(squares[1:], squares[0]))
        right = sum(rights[1:], rights[0]) if len(rights) == len(pieces) else None
        if self.numbers is not None:
            return Totals(loss, grad_norm, right)
        return Totals(float(loss), float(grad_norm), None if right is None else int(right))

    def clip(self, grad_norm: Any) -> None:
        """Scale the optimizer's ``store.grad``, whose norm is ``grad_norm``, down to ``clip_norm`` if that is less.

        On a GPU that is left to the update, which takes the factor from ``numbers``.
        """
        if (limit := self.clip_norm) is None:
            return
        if self.numbers is not None and self.opt.store.numbers is self.numbers:
            self.numbers.clip(limit)
        elif grad_norm > limit:
            # all of it before the update begins: that may read beyond its share
            grad = self.opt.store.grad
            self.team.spread(lambda start, stop: scale_to_norm([grad[start:stop]], grad_norm, limit), grad.size)

    def update(self) -> None:
        """Let the optimizer update the parameters ``written`` in the first buffer by its ``store.grad``.

        Raises GraphError if there are none.
        """
        opt, written = self.opt, self.buffers[0].written
        if not written:  # to the optimizer no spans are all of them
            raise GraphError("a step has no gradient to update by", "call gradients, exchange and clip before it")
        opt.begin_update(opt.store.spans_of(written))
        self.team.spread(lambda start, stop: opt.update_spans([(start, stop)]), opt.store.values.size)

    # ---- what they are made of ----

    def _batch(self, images: Any, labels: Any) -> Batch:
        """Return a batch as arrays, with what else this step has of its own; raise an error for what is none."""
        images, labels = checked(images, labels, self.opt.store.values.dtype)
        number = self.opt.steps if self.numbers is None else self.numbers.steps
        mode = None if self.model.training else True
        return Batch(images, labels, Key(self.seed, DROP_STREAM, number), mode, are_shares(labels))

    def _piece(self, batch: Batch, places: Mapping[Node, int], thread: int, start: int, stop: int) -> Piece:
        """Run one micro-batch forward and backward into the thread's buffer."""
        share = (stop - start) / (batch.rows or len(batch.images))
        slots = self.buffers[thread].slots
        with contextlib.nullcontext() if batch.sums is None else collecting(batch.sums):
            with mode(batch.training), random_key(batch.key.at_row(batch.first + start)), first_order():
                logits = self.model(self._images(batch, start, stop))
                if self.working is not None and isinstance(logits, Tensor):
                    logits = ops.convert(logits, np.float32)  # what a loss adds up, and labels that are shares
                loss = loss_of(self.loss, logits, batch, start, stop)
            right = count_right(logits, batch.labels[start:stop]) if batch.counted else None
            cotangent = array_module(loss.data).full((), share, loss.dtype)
            if self.numbers is not None and self.numbers.scale is not None:
                cotangent *= self.numbers.scale.value
            ours = {node: slots[i] for node, i in places.items()} if self.numbers is not None else None
            for node, part in propagate(loss.node, cotangent, slots=ours) if loss.node is not None else ():
                if node not in places:
                    raise self._not_optimized(node)
                slots[places[node]].add(part)
        return Piece(loss.data if share == 1.0 else loss.data * share, right)

    def _images(self, batch: Batch, start: int, stop: int) -> Array:
        """Return some of a batch's images, where the model is and as it takes them."""
        images = self.team.here(batch.images[start:stop])
        is_narrowed = self.working is not None and is_floating(images.dtype)
        return images.astype(self.precision.dtype, copy=False) if is_narrowed else images

    def _not_optimized(self, node: Node) -> GraphError:
        name = next((n for n, p in self.model.named_parameters() if p.node is node), "a Tensor outside the model")
        return GraphError(
            f"{name} requires a gradient, but the optimizer does not have it",
            "make the optimizer after changing the model, or freeze it: parameter.requires_grad = False",
        )

    def _settings(self) -> dict[str, Any]:
        """Return what an update reads besides the model, its batch and the numbers on the GPU."""
        store = self.opt.store
        own = {f"the optimizer's {name}": value for name, value in vars(self.opt).items() if name != "lr"}
        return own | {
            "groups": store.groups, "values": store.values, "gradient": store.grad, "parameters": store.parameters,
            "loss": self.loss, "clip_norm": self.clip_norm, "seed": self.seed, "micro_batch": self.team.micro_batch,
            "average": None if self.ema is None else (self.ema.flat, self.ema.decay),
        }  # fmt: skip

    def _non_finite(self, totals: Totals, batch: Batch) -> NonFiniteError:
        """Return what tells where the first value is that is not finite."""
        place = None
        with mode(batch.training), computing(self.precision, self.working):
            for start, stop in self.team.pieces(len(batch.images)):
                images = self._images(batch, start, stop)
                if place := first_non_finite(self.model, images, batch.key.at_row(start)):
                    break
        if place is None and math.isfinite(totals.loss):
            if self.numbers is not None:  # the next step's gradient may be there by now
                self.gradients(batch)
            place = first_non_finite_gradient(self.model, self.opt.store)
        return non_finite(f"step {self.opt.steps}", totals.loss, totals.grad_norm, place)
