"""Exercise 12: a whole Vision Transformer, and the gradient of every parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.learn.given import block, cross_entropy, embed, layer_norm, linear, with_backwards
from minivit.learn.ladder.e10_block import NAMES, parameters
from minivit.learn.mutants import cut, misread
from minivit.ops.samples import Draw

FIRST = ("patch_weight", "patch_bias", "cls", "positions", "norm_weight", "norm_bias", "head_weight", "head_bias")


def samples(key: Key) -> list[Sample]:
    """Draw images, labels, the number of heads and the parameters: depth is the first axis of those of the blocks."""
    r = Draw(key)

    def drawn(images: tuple[int, ...], patch: tuple[int, int], dim: int, heads: int, depth: int, classes: int) -> Any:
        b, c, h, w = images
        tokens = 1 + (h // patch[0]) * (w // patch[1])
        embedding = r(dim, c, *patch) * (c * patch[0] * patch[1]) ** -0.5, r(dim), r(dim), r(tokens, dim)
        last = r(dim), r(dim), r(classes, dim), r(classes)
        blocks = parameters(r, dim, dim + 1, depth)
        return r(*images), r.integers(classes, b), heads, *embedding, *last, *blocks

    return [
        ("two images, two blocks", drawn((2, 3, 4, 6), (2, 3), 4, 2, 2, 5)),
        ("a batch of one, three blocks", drawn((1, 1, 4, 4), (2, 2), 6, 3, 3, 3)),
        ("one block, one patch, one head", drawn((3, 2, 3, 2), (3, 2), 3, 1, 1, 2)),
        ("as many images as classes", drawn((3, 1, 2, 3), (1, 1), 4, 1, 2, 3)),
    ]


class Model:
    """The boxes of the chain, for some parameters; what a mistake changes is a method."""

    def __init__(self, images: Any, labels: Any, heads: int, *parameters: Any) -> None:
        self.images, self.labels = images, labels
        self.embedding, self.norm_of, self.head_of = parameters[:4], parameters[4:6], parameters[6:8]
        self.blocks = [[*(p[i] for p in parameters[8:]), heads] for i in range(len(parameters[8]))]

    def start(self) -> Any:
        """Return z0, (B, T, D)."""
        return embed(self.images, *self.embedding)

    def step(self, i: int, z: Any) -> Any:
        """Return the tokens after block i."""
        return block(z, *self.blocks[i])

    def encode(self, z: Any) -> Any:
        """Return zN of z0."""
        for i in range(len(self.blocks)):
            z = self.step(i, z)
        return z

    def norm(self, z: Any) -> Any:
        """Return u."""
        return layer_norm(z, *self.norm_of)

    def row(self, u: Any) -> Any:
        """Return what the head reads, (B, D)."""
        return u[:, 0]

    def head(self, u: Any, z: Any) -> Any:
        """Return the logits of u; z is zN."""
        return linear(self.row(u), *self.head_of)

    def loss_of(self, logits: Any) -> Any:
        """Return the loss."""
        return cross_entropy(logits, self.labels)

    def loss(self) -> Any:
        """Return the loss of the images."""
        z = self.encode(self.start())
        return self.loss_of(self.head(self.norm(z), z))

    def before(self, i: int) -> Any:
        """Return z_i with no way back, what went into block i; counted from the end if i is negative."""
        z, found = cut(self.start()), []
        for k in range(len(self.blocks) + 1):
            found.append(z)
            z = cut(self.step_right(k, z)) if k < len(self.blocks) else z
        return found[i]

    def step_right(self, i: int, z: Any) -> Any:
        """Return the tokens after block i, whatever a mistake makes of :meth:`step`."""
        return Model.step(self, i, z)


def with_(**methods: Callable[..., Any]) -> Callable[..., Any]:
    """Return the loss of a model with some methods replaced."""
    made = type("Mutant", (Model,), methods)
    return lambda *args: made(*args).loss()


def back(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return backward(g, images, labels, heads, *parameters) of a loss."""
    return lambda g, images, labels, heads, *parameters: backward_of(
        lambda *p: loss(images, labels, heads, *p), len(parameters)
    )(g, *parameters)


def back_with(**methods: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradient of a model whose numbers are right, and whose way back is not in the methods given."""
    return back(with_(**methods))


forward = with_()
backward = back(forward)


def every_block_the_first(self: Model, i: int, z: Any) -> Any:
    """Use block 0's parameters everywhere."""
    return block(z, *self.blocks[0])


def backwards(self: Model, i: int, z: Any) -> Any:
    """Use the blocks from the last to the first."""
    return block(z, *self.blocks[-1 - i])


def read_at(place: Callable[[Model, int], int]) -> Callable[..., Any]:
    """Return a step whose block is walked back at z_k, k = place(model, i), in the place of z_i."""
    return lambda self, i, z: misread(block, z, self.before(place(self, i)), *self.blocks[i])


def all_rows(share: Callable[[Any], float]) -> Callable[..., Any]:
    """Return a row whose gradient goes to every token, times a share."""
    return lambda self, u: cut(u[:, 0]) + (ops.sum(u, 1) - cut(ops.sum(u, 1))) * share(u)


def class_token_only(self: Model, i: int, z: Any) -> Any:
    """Let nothing go back through the patches' rows."""
    return self.step_right(i, ops.concat([z[:, :1], cut(z[:, 1:])], axis=1))


def order_met(g: Any, *args: Any) -> Any:
    """Return the right gradients, the blocks' in the order in which backward meets them."""
    found = backward(g, *args)
    return *found[:8], *(d[::-1] for d in found[8:])


def times(factor: Callable[[int], float]) -> Callable[..., Any]:
    """Return the right gradients times a factor of the number of images."""
    return lambda g, images, *args: backward(g * factor(len(images)), images, *args)


def blocks_walked_forwards(g: Any, images: Any, labels: Any, heads: int, *parameters: Any) -> Any:
    """Walk back through block 0 first, then 1, …, each at its own input."""
    model = Model(images, labels, heads, *parameters)
    dz = backward_of(lambda z: model.loss_of(model.head(model.norm(z), z)), 1)(g, model.before(-1))
    rows = []
    for i, own in enumerate(model.blocks):
        dz, *found = backward_of(block, 13)(dz, model.before(i), *own)
        rows.append(found)
    _, *embedding = backward_of(embed, 5)(dz, images, *model.embedding)
    return *embedding, *backward(g, images, labels, heads, *parameters)[4:8], *map(np.stack, zip(*rows, strict=True))


FORWARD_MISTAKES = (
    Mistake(
        "last token read",
        "The head reads the last row of u. The class token's row is another one: where did the embedding put it?",
        with_(row=lambda self, u: u[:, -1]),
    ),
    Mistake(
        "mean of all tokens read",
        "The head reads the mean over the tokens. Some ViTs do; this one reads the class token's row alone.",
        with_(row=lambda self, u: ops.mean(u, 1)),
    ),
    Mistake(
        "last norm forgotten",
        "The head reads what the last block gave. There is a norm between.",
        with_(norm=lambda self, z: z),
    ),
    Mistake(
        "norm before the blocks",
        "The last norm is applied to z0, before the first block. Look at the third line at the top of the text.",
        with_(start=lambda self: self.norm_first(), norm=lambda self, z: z,
              norm_first=lambda self: Model.norm(self, Model.start(self))),
    ),
    Mistake(
        "loss summed",
        "The loss is the sum over the images. It should be the mean, whose size does not depend on how many they are.",
        with_(loss_of=lambda self, logits: cross_entropy(logits, self.labels) * len(self.labels)),
    ),
    Mistake(
        "mean over the wrong count",
        "The loss is divided by the number of logits, B·K. It is one number for each image: how many of them are "
        "averaged?",
        with_(loss_of=lambda self, logits: cross_entropy(logits, self.labels) / logits.shape[1]),
    ),
    Mistake(
        "every block the first",
        "All blocks run with the parameters of block 0. What has to be indexed anew in each turn of the loop?",
        with_(step=every_block_the_first),
    ),
    Mistake("blocks in reverse", "The last block is run first.", with_(step=backwards)),
    Mistake(
        "a block too few",
        "The last block is not run. N is the length of the first axis of each array of blocks.",
        with_(step=lambda self, i, z: self.step_right(i, z) if i + 1 < len(self.blocks) else z),
    ),
)  # fmt: skip

BACKWARD_MISTAKES = (
    Mistake(
        "g left out",
        "These are the gradients for g = 1. g is what arrives from outside: with which of the boxes does it come in?",
        lambda g, *args: backward(np.ones_like(g), *args),
    ),
    Mistake(
        "divided by the batch again",
        "All gradients are B times too small. The mean's 1/B is in cross_entropy_backward already.",
        times(lambda b: 1.0 / b),
    ),
    Mistake(
        "mean over the batch forgotten",
        "All gradients are B times too large: they are those of the sum over the images.",
        times(float),
    ),
    Mistake(
        "every token read",
        "∂L/∂u has the head's gradient in every row. What does the loss do if a row that is not read changes?",
        back_with(row=all_rows(lambda u: 1.0)),
    ),
    Mistake(
        "every token read, as in a mean",
        "∂L/∂u has a T-th of the head's gradient in every row, as if the head read the mean of all tokens.",
        back_with(row=all_rows(lambda u: 1.0 / u.shape[1])),
    ),
    Mistake(
        "last norm skipped",
        "∂L/∂u goes into the last block as it is. The norm stands between.",
        back_with(norm=lambda self, z: z - cut(z) + Model.norm(self, cut(z))),
    ),
    Mistake(
        "last norm reads its own output",
        "layer_norm_backward is given u. It wants what went into the norm.",
        back_with(norm=lambda self, z: misread(layer_norm, z, cut(Model.norm(self, z)), *self.norm_of)),
    ),
    Mistake(
        "head reads the row before the norm",
        "linear_backward of the head is given zN's row. What went into the head has passed the norm.",
        back_with(head=lambda self, u, z: misread(linear, u[:, 0], z[:, 0], *self.head_of)),
    ),
    Mistake(
        "all blocks read the last tokens",
        "Each block's backward is given zN. Every block had an input of its own: is it still there after the loop?",
        back_with(step=read_at(lambda self, i: -1)),
    ),
    Mistake(
        "all blocks read the embedding",
        "Each block's backward is given z0. Only the first block had it as its input.",
        back_with(step=read_at(lambda self, i: 0)),
    ),
    Mistake(
        "blocks read their own output",
        "Block i's backward is given z_{i+1}. With N + 1 arrays kept, the index is easily off by one.",
        back_with(step=read_at(lambda self, i: i + 1)),
    ),
    Mistake(
        "gradients in the order met",
        "The blocks' gradients stand in the order in which they were found. Which block does one meet first, going "
        "back?",
        order_met,
    ),
    Mistake(
        "blocks walked forwards",
        "The gradient goes through block 0 first, and through the last block last.",
        blocks_walked_forwards,
    ),
    Mistake(
        "blocks passed by",
        "The embedding is given ∂L/∂zN. It made z0: what has come out of the first block's backward belongs here.",
        back_with(encode=lambda self, z: Model.encode(self, cut(z)) + z - cut(z)),
    ),
    Mistake(
        "only the class token's row goes back",
        "Between blocks all rows but the class token's are set to zero. The head reads one row, but attention reads "
        "all: what a block's backward gives for the patches' rows goes on into the block before.",
        back_with(step=class_token_only),
    ),
)  # fmt: skip

EXERCISE = Exercise(
    number=12,
    slug="vit",
    title="a whole ViT",
    given=with_backwards("embed", "block", "layer_norm", "linear", "cross_entropy"),
    asked=(
        Asked("forward", ("loss",), right=forward, samples=samples, mistakes=FORWARD_MISTAKES),
        Asked(
            "backward",
            tuple(f"d{name}" for name in (*FIRST, *NAMES)),
            right=backward,
            samples=with_cotangents(samples, forward),
            mistakes=BACKWARD_MISTAKES,
        ),
    ),
    hints=(
        "Let one function run the chain and return everything that backward wants: the list z0 … zN, u and the logits. "
        "forward takes its last result, backward all of them.",
        "Make the blocks' gradients first, as zeros of the parameters' shapes, and write each block's twelve into "
        "place i. For ∂L/∂u: zeros of u's shape, of which one row is filled.",
        "Backward, in this order: cross_entropy_backward with g; linear_backward at u's row; layer_norm_backward at "
        "the last of the list; then for i from N-1 down to 0 block_backward at z_i, the first of what it returns being "
        "the g of the next; and embed_backward, whose first result nobody wants.",
    ),
)
