"""What a training step takes of a GPU's memory, predicted from a model's outline before anything is made.

A graph of operations is captured once and holds its memory for as long as it lives, so the peak is what one step needs:
the parameters with all that belongs to them, what the forward pass keeps, and what passes through the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minivit.autograd.graph import Node
from minivit.autograd.tensor import Tensor
from minivit.backend.cublaslt import WORKSPACE
from minivit.backend.outline import Outline, outline
from minivit.measure.speed import recorded
from minivit.models import Model
from minivit.nn.module import mode
from minivit.nn.recompute import keeping
from minivit.ops.cuda.sums import ROWS

HALF = ("bfloat16", "float16")
"""The names of dtypes of two bytes; a float32 and a TF32 number take four."""

PASSING = {2: 1.5, 4: 2.2}  # times the largest array that is kept: what passes back, by the bytes of a number
SCORES = 3  # arrays of all scores, at the least, that pass back through attention where no kernel does it


@dataclass(frozen=True)
class Kept:
    """What a model keeps of one image until its gradient has gone back: counted in numbers, not in bytes.

    ``values`` are of the step's dtype, ``statistics`` always float32; ``again`` of them are kept while one block is
    computed again. ``largest`` is the largest array among them, ``scores`` all heads' scores in one attention.
    """

    values: int
    statistics: int
    again: int
    largest: int
    scores: int


def kept_on_gpu(model: Model) -> Kept:
    """Return what ``model``, or its outline, keeps of one image on a GPU.

    That is what the plain operations say that they save: their twins there keep the same arrays, and besides them a
    mean and a scale of each row that LayerNorm has normalised, and a sum of exponentials of each query.
    """
    nodes = _nodes(model)
    values, largest = _saved(nodes, model)
    repeated = sum(node.op.name == "recompute" for node in nodes)
    again = 0
    if repeated:
        with keeping():
            nodes = _nodes(model)  # with what is inside of the blocks, for their statistics and scores
        everything, largest = _saved(nodes, model)
        again = (everything - values) // repeated
    attentions = [node for node in nodes if node.op.name == "self_attention"]
    heads = {node: node.read()[0][1] for node in attentions}
    of_norms = {"layer_norm": 2, "rms_norm": 1}  # for each row
    statistics = sum(of_norms.get(node.op.name, 0) * math.prod(node.shape[:-1]) for node in nodes)
    statistics += sum(heads[node] * math.prod(node.shape[:-1]) for node in attentions)
    scores = max((n * math.prod(node.shape[:-1]) * node.read()[0][0].shape[1] for node, n in heads.items()), default=0)
    return Kept(values, statistics, again, largest, scores)


def gpu_step_memory(model: Model, rows: int, dtype: str = "float32", kept: Kept | None = None) -> dict[str, int]:
    """Return the bytes that a training step takes on a GPU, ``rows`` images at once, by what they are for.

    The data set is not among them: it lies there only if there is room for it, else two batches do. Who asks for
    several numbers of rows gives what is ``kept`` of one image.
    """
    kept, size = kept or kept_on_gpu(model), 2 if dtype in HALF else 4
    weights = model.num_parameters()
    columns = sum(p.size for p in model.parameters() if p.ndim == 1)  # whose gradients are sums over rows
    passing = PASSING[size] * kept.largest
    if dtype not in HALF:
        passing = max(passing, SCORES * kept.scores)
    held, sums = rows * (size * kept.values + 4 * kept.statistics), ROWS * 4 * columns
    return {
        "parameters": 4 * weights,
        "gradient": 4 * weights,
        "optimizer": 8 * weights,  # AdamW's state
        "working copy": size * weights if dtype in HALF else 0,
        "batches": 3 * 4 * rows * math.prod(model.settings.image_shape),
        "kept": held,
        # of a small model the most is taken at the end of the first step, where the sums get a place together
        "passing": max(rows * size * math.ceil(passing + kept.again), sums - held),
        "sums": sums,
        "workspace": WORKSPACE,
    }


def gpu_memory(model: Model, rows: int, dtype: str = "float32") -> int:
    """Return about how many bytes a training step takes on a GPU at the most: see :func:`gpu_step_memory`."""
    return sum(gpu_step_memory(model, rows, dtype).values())


def _nodes(model: Model) -> list[Node]:
    """Return the operations that ``model`` records of one image, as they are without twins."""
    image = outline((1, *model.settings.image_shape), next(model.parameters()).dtype)
    with mode(True):
        out = model(Tensor(image))
    return recorded(out.node) if out.node is not None else []


def _saved(nodes: list[Node], model: Model) -> tuple[int, int]:
    """Return how many numbers the operations save, each array counted once, and those of the largest."""
    seen = {id(_memory(p.data)) for p in model.parameters()}
    sizes = []
    for node in nodes:
        args, out = node.read()
        for array in (*args, out):
            if isinstance(array, Outline) and id(array.memory) not in seen:
                seen.add(id(array.memory))
                sizes.append(array.memory.nbytes // array.itemsize)
    return sum(sizes), max(sizes, default=0)


def _memory(array: Any) -> Any:
    return array.memory if isinstance(array, Outline) else array
