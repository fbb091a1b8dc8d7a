"""What passes through an encoder of blocks: the tokens after each, and all that its attention computes.

::

    trace = model.trace(images)
    flow = mv.grad(trace.logits[0, 3], trace.attention)   # d logit / d attention, a (B, heads, T, T) for every block

Attention is composed of plain operations here, where the plain forward fuses it; both give the same numbers but for
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from minivit.nn.attention import Heads, attention_mask, watched

Change = Callable[[int, Any], Any]
"""(block, attention) → what is put in its place."""


@dataclass(frozen=True)
class Trace:
    """What passed through ``model``, which has blocks, for images (B, C, H, W).

    ``logits`` as the model gives them; ``tokens``, (B, T, dim) after the embedding and after every block; of every
    block ``heads`` (queries, keys, values, scores, probabilities and what comes of them), ``attended`` and ``mlp``,
    (B, T, dim), what its attention and its MLP add: tokens[i + 1] = tokens[i] + attended[i] + mlp[i], and before them
    ``placed[i]``, (1, T, dim), where positions are added in every layer (None elsewhere). Where a norm stands after
    that addition (block "post"), "adds" is what the step changes. All of them are Tensors on the path, so that
    :func:`minivit.grad` of a logit tells what flows through each. T are ``prefix`` tokens (the class token, if there is
    one, and what else is beside the patches) and then the patches of ``grid``, (rows, columns), row by row. ``mask`` is
    what no token may attend to, bool, (T, T) or (B, 1, T, T), or None.

    Of a model that reads its class token only, the last block's rows but the first reach no logit: their gradient is 0.
    """

    model: Any
    logits: Any
    tokens: list[Any]
    heads: list[Heads]
    attended: list[Any]
    mlp: list[Any]
    grid: tuple[int, int]
    prefix: int
    mask: Any = None
    placed: Sequence[Any] = ()

    @property
    def attention(self) -> list[Any]:
        """The probabilities of every block, (B, H, T, T): row i is what token i attends to, and sums to 1."""
        return [heads.weights for heads in self.heads]


def trace(model: Any, images: Any, mask: Any = None, change: Change | None = None) -> Trace:
    """Run ``model``, an encoder such as :class:`minivit.ViT`, and return what passes through it.

    ``change(block, attention)`` returns what block number ``block`` uses in the place of its attention, which is then
    what the trace shows: the same with another number in it, or without a head. Every block is computed for all tokens,
    and recorded even if the model is made with ``recompute`` or is frozen. So in training, with dropout, the last block
    of a model that reads its class token drops other numbers than in the plain forward, which computes that token only;
    and no patch is dropped.
    """
    x = watched(model.embed(images))
    mask = attention_mask(mask, x.shape[1], x.shape[0])
    mask = model.masked(mask, x) if hasattr(model, "masked") else mask
    tokens, parts, placed = [x], [], []
    for i, block in enumerate(model.blocks):
        placed.append(block.positions(x) if hasattr(block, "positions") else None)
        x = x if placed[i] is None else x + placed[i]
        x, *part = block.traced(x, mask, None if change is None else partial(change, i))
        tokens.append(x)
        parts.append(part)
    heads, attended, mlp = ([part[i] for part in parts] for i in range(3))
    embed = model.patch_embed
    prefix = x.shape[1] - embed.num_patches
    return Trace(model, model.classify(model.norm(x)), tokens, heads, attended, mlp, embed.grid, prefix, mask, placed)
