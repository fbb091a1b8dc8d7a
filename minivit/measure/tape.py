"""The tape of one step: every operation that it records, the module that ran it, and what it keeps for the way back.

The engine knows no modules. But a node has an age, and a module that runs begins and ends at a moment: an operation
belongs to the innermost module that was running when its node was made.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import Node, first_order, moment, propagate
from minivit.backend import Key
from minivit.errors import GraphError
from minivit.measure.costs import Kept
from minivit.measure.speed import recorded
from minivit.nn.module import Module, mode, watching
from minivit.nn.random import random_key
from minivit.show.operations import Operation, Weight


def read_tape(model: Module, images: Any, labels: Any = None, gradients: bool = False) -> list[Operation]:
    """Return the operations of a training step of ``model`` on ``images`` (B, C, H, W) up to the loss, as they ran.

    The model runs in training mode, and the loss is the mean cross-entropy with ``labels`` as
    :func:`minivit.ops.cross_entropy` has them, all 0 unless given. With ``gradients`` the step also goes back, and the
    norm of the loss's gradient stands at every operation's result and at every parameter. Without them the model, or
    the images, may be an outline.
    """
    began, places, running = [-1], [""], [""]  # from this moment on, this is the innermost module that runs

    def enter(path: str) -> None:
        running.append(path)
        began.append(moment())
        places.append(path)

    def leave(path: str, out: Any) -> None:
        running.pop()
        began.append(moment())
        places.append(running[-1])

    with first_order(), mode(True), random_key(Key(0)), np.errstate(all="ignore"):  # what overflows is shown
        with watching(model, leave, before=enter):
            logits = model(images)
        labels = np.zeros(logits.shape[:-1], np.int64) if labels is None else labels
        loss = ops.cross_entropy(logits, labels)
    if loss.node is None:
        raise GraphError("no parameter of the model requires a gradient: nothing is recorded", "unfreeze some")
    nodes = recorded(loss.node)
    kept = Kept([*(p.data for p in model.parameters()), images, labels])
    sizes = [kept.by(node) for node in nodes]
    reads = [node.parents for node in nodes]
    norms = _gradient_norms(loss, nodes, model) if gradients else {}
    kinds = {path: type(module).__name__ for path, module in model.named_modules()}
    names = {p.node: name for name, p in model.named_parameters() if p.node is not None}
    numbers = {node: i for i, node in enumerate(nodes)}
    tape = []
    for node, size, parents in zip(nodes, sizes, reads, strict=True):
        place = places[bisect.bisect_right(began, node.age) - 1]
        part = _part(place)
        unique = [p for p in dict.fromkeys(parents) if p is not None]
        inputs = tuple(numbers[p] for p in unique if p in numbers)
        weights = tuple(Weight(names[p], p.shape, norms.get(p)) for p in unique if p in names)
        tape.append(
            Operation(
                node.op.name, place, part, kinds.get(part, ""), node.shape, str(node.dtype), size, inputs, weights,
                norms.get(node),
            )
        )  # fmt: skip
    return tape


def _part(place: str) -> str:
    """Return the part that a module is folded into: of a list of modules the one it is in, else the model's own."""
    names = place.split(".")
    first = next((i for i, name in enumerate(names) if name.isdecimal()), 0)
    return ".".join(names[: first + 1])


def _gradient_norms(loss: Any, nodes: Sequence[Node], model: Module) -> dict[Node, float]:
    """Walk back from the loss, freeing the graph, and return the norm of its gradient at each node and parameter."""
    leaves = {p.node for p in model.parameters() if p.node is not None}
    norms: dict[Node, float] = {}
    sums: dict[Node, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node, part in propagate(loss.node, np.ones_like(loss.data), {*nodes, *leaves}):
            if node in leaves:  # it may be used in several places: its parts are added up
                sums[node] = sums[node] + part if node in sums else part.copy()
            else:
                norms[node] = _norm(part)
    return norms | {node: _norm(total) for node, total in sums.items()}


def _norm(x: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.square(x, dtype=np.float64))))
