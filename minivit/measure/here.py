"""What this machine's cores do in a second, measured in a few seconds: each kind of work of a training step, once."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import Node, Unsaved, first_order, propagate
from minivit.autograd.needs import Slot
from minivit.autograd.tensor import Tensor
from minivit.backend import Key, blas_threads, l2_cache, normal, uniform
from minivit.backend.outline import Outline, outline
from minivit.data.images import read_image
from minivit.measure.speed import image_flops, recorded, sgemm_rate
from minivit.models import Model, build
from minivit.nn.module import Parameter, mode
from minivit.nn.recompute import keeping
from minivit.train.optim import AdamW
from minivit.train.peer import receive, send

FEWEST, SPENT = 3, 0.03  # measurements of each kind, and the seconds after which there are no more
NUMBERS = 1 << 21  # of a flat array that is measured with: more than the caches hold
SMALL = 1 << 23  # parameters of a model that is made to look at what its layers do besides
PHOTO = (375, 500)  # rows and columns of a photo as ImageNet has them


@dataclass(frozen=True)
class Core:
    """What one core takes for a piece of a batch, ``rows`` images at once, in seconds; ``flops`` of its products."""

    rows: int
    forward: float
    backward: float
    flops: int

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Machine:
    """What else it takes: seconds for each number that is updated, or added up, for a byte sent to a process and for a
    message; ``shared`` is the rate of a core when so many work at once, as a share of one alone."""

    update: float
    add: float
    sent: float
    message: float
    shared: float


# ---- a piece of a batch ----------------------------------------------------------------------------------------------


def measured_core(model: Model, rows: int) -> Core:
    """Return what ``rows`` images take on one core: each different operation of the model is run, and counted.

    ``model`` may be an outline. Parameters and activations are random numbers, of one operation at a time, so that a
    model may be measured that does not fit into memory. What is outside of operations, the layers' own code, is seen on
    one image of a model that is small; of a large one it is next to nothing. Blocks that are computed again count their
    forward pass twice.
    """
    again = any(node.op.name == "recompute" for node in recorded(_outlined(model, rows)))
    with keeping(), blas_threads(1):
        nodes = recorded(_outlined(model, rows))
        forward, backward = _sum(nodes)
        if model.num_parameters() <= SMALL and len(nodes[-1].shape) == 2:
            whole_way, apart = _whole(model), _sum(recorded(_outlined(model, 1)))
            forward += max(0.0, whole_way[0] - apart[0])
            backward += max(0.0, whole_way[1] - apart[1])
    return Core(rows, forward, backward + (forward if again else 0.0), rows * sum(image_flops(model)))


def _sum(nodes: Sequence[Node]) -> tuple[float, float]:
    """Return the seconds of all operations, and of their gradients: each different one is run by itself."""
    kinds, of_kind = Counter(map(_kind, nodes)), {_kind(node): node for node in nodes}
    taken = {kind: _seconds(of_kind[kind]) for kind in kinds}
    forward, backward = (sum(n * taken[kind][way] for kind, n in kinds.items()) for way in (0, 1))
    loss = _loss_seconds(nodes[-1].shape)
    return forward + loss[0], backward + loss[1]


def _whole(model: Model) -> tuple[float, float]:
    """Return the seconds of one image's forward and backward pass through a model like ``model``."""
    own = build(model.kind, model.config)
    slots = {p.node: Slot(np.zeros(p.shape, p.dtype)) for p in own.parameters()}
    image, label = uniform(Key(0), (1, *own.settings.image_shape)).astype(np.float32), np.zeros(1, np.int64)

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        with mode(True), first_order():
            loss = ops.cross_entropy(own(image), label)
        between = time.perf_counter()
        for leaf, part in propagate(loss.node, np.ones((), np.float32)):
            slots[leaf].add(part)
        return between - start, time.perf_counter() - between

    return _fastest(once)


def _outlined(model: Model, rows: int) -> Node:
    image = outline((rows, *model.settings.image_shape), next(model.parameters()).dtype)
    with mode(True):
        node: Node = model(Tensor(image)).node
    return node


def _kind(node: Node) -> tuple[Any, ...]:
    """Return what makes two operations take the same time: name, shapes, settings, and whose gradients are wanted."""
    args, _ = node.read()
    settings = tuple(getattr(a, "shape", None) or repr(a) for a in args)
    return node.op.name, node.shape, settings, tuple(p is not None for p in node.parents)


def _seconds(node: Node) -> tuple[float, float]:
    """Return the seconds of an operation's forward pass and of its gradient, run on arrays of its shapes."""
    given, _ = node.read()
    args, slots = [_array(a, i) for i, a in enumerate(given)], {}
    for i, parent in zip(node.op.input_positions(args), node.parents, strict=True):
        if parent is not None:
            args[i] = tensor = Parameter(args[i])
            if parent.op is None:  # a parameter, whose gradient is added up
                slots[tensor.node] = Slot(np.zeros(tensor.shape, tensor.dtype))
    # in a step, others come between: each then finds little of its own in the cache
    g, others = np.ones(node.shape, node.dtype), np.ones(l2_cache() // 4, np.float32)

    def once() -> tuple[float, float]:
        others.sum()
        start = time.perf_counter()
        with first_order():
            out = node.op(*args)
        forward = time.perf_counter() - start
        others.sum()
        start = time.perf_counter()
        for leaf, part in propagate(out.node, g):
            if leaf in slots:
                slots[leaf].add(part)
        return forward, time.perf_counter() - start

    return _fastest(once)


def _array(value: Any, i: int) -> Any:
    """Return an array like an outline or what stands for one; anything else as it is."""
    if not isinstance(value, Outline | Unsaved):
        return value
    return uniform(Key(i), value.shape).astype(value.dtype) - np.asarray(0.5, value.dtype)


def _loss_seconds(shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the seconds of the loss of logits of a shape, and of its gradient."""
    if len(shape) != 2:
        return 0.0, 0.0
    logits, labels = Parameter(uniform(Key(0), shape).astype(np.float32)), np.zeros(shape[0], np.int64)

    def once() -> tuple[float, float]:
        start = time.perf_counter()
        with first_order():
            loss = ops.cross_entropy(logits, labels)
        between = time.perf_counter()
        list(propagate(loss.node, np.ones((), np.float32)))
        return between - start, time.perf_counter() - between

    return _fastest(once)


def _fastest(once: Callable[[], tuple[float, ...]]) -> Any:
    """Return the least of each that ``once`` measures, after a call that does not count: what else runs only adds."""
    once()
    times, end = list[tuple[float, ...]](), time.perf_counter() + SPENT
    while len(times) < FEWEST or time.perf_counter() < end:
        times.append(once())
    return tuple(map(min, zip(*times, strict=True)))


def _time(work: Callable[[], Any]) -> float:
    def once() -> tuple[float]:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start,)

    return float(_fastest(once)[0])


# ---- the rest of a step ----------------------------------------------------------------------------------------------


def measured_machine(parameters: int, image_bytes: int, cores: int) -> Machine:
    """Return the rates of this machine with so many ``cores`` at work, for a model of so many parameters."""
    n = max(1, min(parameters, NUMBERS))
    a, b = (normal(Key(i), (n,)).astype(np.float32) for i in range(2))
    parameter = Parameter(a.copy())
    opt = AdamW([("weight", parameter)])
    opt.store.grad[...] = 1e-3 * b
    sent, message = _message_seconds(max(1, image_bytes))
    with blas_threads(1):
        update = _time(opt.update) / n
        add = _time(partial(np.add, a, b, out=a)) / n
    shared = 1.0 if cores == 1 else min(1.0, sgemm_rate(cores) / (cores * sgemm_rate(1)))
    return Machine(update, add, sent, message, shared)


def _message_seconds(size: int) -> tuple[float, float]:
    """Return the seconds for a byte, and for a message and its answer, between two ends of a pair of sockets."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        while receive(theirs) is not None:
            send(theirs, {"losses": [0.0]})

    with ours, theirs:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()

        def call(numbers: int) -> None:
            send(ours, {"images": np.zeros(numbers, np.uint8), "first": 0})
            receive(ours)

        large = 1 << 22
        message = _time(partial(call, 1))
        sent = max(0.0, _time(partial(call, large)) - message) / large
        ours.shutdown(socket.SHUT_RDWR)
        thread.join()
    return sent, message


def decoded_a_second(size: tuple[int, int], channels: int) -> float:
    """Return how many photos, JPEG files of :data:`PHOTO`, one core here reads in a second, scaled to ``size``."""
    from PIL import Image

    rows, columns = PHOTO
    rough = (127 * uniform(Key(0), (rows // 8 + 1, columns // 8 + 1, 3)) + 64).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize((columns, rows), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)

    def read() -> None:
        file.seek(0)
        read_image(file, size, 3 if channels == 3 else 1, "crop")

    return 1.0 / _time(read)
