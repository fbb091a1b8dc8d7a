"""Exercise 11: patches, projection, class token, positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.learn.given import embed, linear
from minivit.learn.mutants import but
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw images, and the weight, bias, class token and positions that fit them."""
    r = Draw(key)

    def drawn(images: tuple[int, ...], dim: int, p: int, q: int) -> tuple[Any, ...]:
        tokens = 1 + (images[2] // p) * (images[3] // q)
        return r(*images), r(dim, images[1], p, q), r(dim), r(dim), r(tokens, dim)

    return [
        ("two images of 4 x 6, patches of 2 x 3", drawn((2, 3, 4, 6), 5, 2, 3)),
        ("a batch of one, one channel", drawn((1, 1, 6, 4), 3, 2, 2)),
        ("one patch", drawn((3, 2, 3, 2), 4, 3, 2)),
        ("patches of one pixel", drawn((2, 2, 2, 3), 3, 1, 1)),
        ("square images, square patches", drawn((2, 2, 6, 6), 4, 2, 2)),
    ]


def projected(cut: Callable[[Any, int, int], Any]) -> Callable[..., Any]:
    """Return the embedding whose patches, (B, N, C·P·Q), are ``cut(images, p, q)``."""

    def forward(images: Any, weight: Any, bias: Any, cls: Any, positions: Any) -> Any:
        patches = linear(cut(images, *weight.shape[2:]), weight, bias)
        return ops.embed_tokens(patches, cls.reshape((1, 1, -1)), positions[None])

    return forward


def cut_as(order: tuple[int, ...], strided: bool = False) -> Callable[[Any, int, int], Any]:
    """Return a way of cutting: H and W split as (count, size), or (size, count) if strided; the axes in an order."""

    def cut(images: Any, p: int, q: int) -> Any:
        b, c, h, w = images.shape
        rows, columns = ((p, h // p), (q, w // q)) if strided else ((h // p, p), (w // q, q))
        six = ops.transpose(ops.reshape(images, (b, c, *rows, *columns)), order)
        return ops.reshape(six, (b, (h // p) * (w // q), c * p * q))

    return cut


# the six axes are (image, channel, patch's row, row, patch's column, column); the right order is 0 2 4 1 3 5
CHANNELS_LAST = cut_as((0, 2, 4, 3, 5, 1))
COLUMN_BY_COLUMN = cut_as((0, 4, 2, 1, 3, 5))
PIXELS_TRANSPOSED = cut_as((0, 2, 4, 1, 5, 3))
STRIDED = cut_as((0, 3, 5, 1, 2, 4), strided=True)


def one_reshape(images: Any, p: int, q: int) -> Any:
    """Take runs of pixels for patches."""
    b, c, _, _ = images.shape
    return ops.reshape(images, (b, -1, c * p * q))


def put_together(tokens: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """Return the embedding that makes tokens of the projected patches, cls (B, 1, D) and positions (1, T, D) so."""

    def forward(images: Any, weight: Any, bias: Any, cls: Any, positions: Any) -> Any:
        patches = linear(ops.patchify(images, weight.shape[2:]), weight, bias)
        first = ops.broadcast_to(cls.reshape((1, 1, -1)), (patches.shape[0], 1, patches.shape[2]))
        return tokens(patches, first, positions[None])

    return forward


joined = lambda *parts: ops.concat(parts, axis=1)
backward = backward_of(embed, 5)


def seen_from_one_row_early(g: Any, *args: Any) -> Any:
    """Return the gradients with the last row of g for the class token's and the others for the patches."""
    right = list(backward(g, *args))
    early = backward(ops.concat([g[:, -1:], g[:, :-1]], axis=1), *args)
    right[:4] = early[:4]
    return tuple(right)


def patch_gradients(g: Any, images: Any, weight: Any) -> Any:
    """Return the gradients of the patches' pixels, (B, H/P, W/Q, C, P, Q)."""
    (b, _, h, w), (_, c, p, q) = images.shape, weight.shape
    return ops.reshape(g[:, 1:] @ weight.reshape(len(weight), -1), (b, h // p, w // q, c, p, q))


FORWARD_MISTAKES = (
    Mistake(
        "pixels channels last",
        "Within a patch the numbers stand in the order (row, column, channel). weight (D, C, P, Q) has them as "
        "(channel, row, column): look at the last three axes of your transpose.",
        projected(CHANNELS_LAST),
    ),
    Mistake(
        "patches column by column",
        "The patches are counted down the columns. They are read like a page, row by row: which of the two grid axes "
        "has to come first when they are joined?",
        projected(COLUMN_BY_COLUMN),
    ),
    Mistake(
        "pixels of a patch transposed",
        "Within each patch rows and columns are exchanged: the column runs slower than the row.",
        projected(PIXELS_TRANSPOSED),
    ),
    Mistake(
        "strided patches",
        "The pixels of a patch lie H/P rows and W/Q columns apart instead of beside each other. When an axis of H is "
        "split by a reshape the last of the two new axes walks over neighbours: which of H/P and P has to be last?",
        projected(STRIDED),
    ),
    Mistake(
        "one reshape",
        "The images are reshaped into patches in one step: a run of pixels along a row is no patch. An axis has to be "
        "moved between splitting and joining.",
        projected(one_reshape),
    ),
    Mistake(
        "class token last",
        "The class token stands behind the patches. It is token 0.",
        put_together(lambda patches, cls, pos: joined(patches, cls) + pos),
    ),
    Mistake(
        "class token without a position",
        "The class token is not given its position. There are T = N + 1 positions, and the first is its own.",
        put_together(lambda patches, cls, pos: joined(cls, patches + pos[:, 1:])),
    ),
    Mistake(
        "positions one too early",
        "Patch n has positions[n], and the class token none. Positions are added when the class token is there "
        "already.",
        put_together(lambda patches, cls, pos: joined(cls, patches + pos[:, :-1])),
    ),
    Mistake(
        "class token forgotten",
        "There are only the patches' tokens: N of them, and not T = N + 1.",
        put_together(lambda patches, cls, pos: patches + pos[:, 1:]),
    ),
    Mistake("positions forgotten", "Nothing says where a patch was: the positions are not added.",
            put_together(lambda patches, cls, pos: joined(cls, patches))),
    Mistake(
        "bias forgotten",
        "The projection of the patches has a bias.",
        lambda images, weight, bias, cls, positions: embed(images, weight, 0.0 * bias, cls, positions),
    ),
    Mistake(
        "bias on the class token",
        "The class token is given the bias of the patches' projection, too. It is not projected.",
        lambda images, weight, bias, cls, positions: embed(images, weight, bias, cls + bias, positions),
    ),
)  # fmt: skip

BACKWARD_MISTAKES = (
    Mistake(
        "class token not summed",
        "dcls is (B, D). One and the same cls went into every image: it collects from all of them.",
        but(backward, 3, lambda d, g, *args: g[:, 0]),
    ),
    Mistake(
        "class token averaged",
        "dcls is the mean over the batch. A number that is used B times gets the sum of what comes back.",
        but(backward, 3, lambda d, g, *args: d / len(g)),
    ),
    Mistake(
        "class token counted twice",
        "dcls is twice what it should be. Its row is g[:, 0], once; what its position gets is the position's.",
        but(backward, 3, lambda d, g, *args: 2.0 * d),
    ),
    Mistake(
        "class token from all rows",
        "dcls collects from all T rows. cls is read in the first row only.",
        but(backward, 3, lambda d, g, *args: ops.sum(g, (0, 1))),
    ),
    Mistake(
        "positions not summed",
        "dpositions is (B, T, D), g itself. The same positions were added to every image.",
        but(backward, 4, lambda d, g, *args: g),
    ),
    Mistake(
        "positions averaged",
        "dpositions is the mean over the batch. A number that is used B times gets the sum of what comes back.",
        but(backward, 4, lambda d, g, *args: d / len(g)),
    ),
    Mistake(
        "positions of the patches only",
        "dpositions has zeros for the class token. Its row was given a position, too.",
        but(backward, 4, lambda d, g, *args: joined(0.0 * d[None, :1], d[None, 1:])[0]),
    ),
    Mistake(
        "positions never updated",
        "dpositions is zero. Positions are parameters; what is added in the forward pass has a gradient.",
        but(backward, 4, lambda d, g, *args: 0.0 * d),
    ),
    Mistake(
        "bias from all rows",
        "dbias collects from all T rows. The class token's row was not made by the projection.",
        but(backward, 2, lambda d, g, *args: ops.sum(g, (0, 1))),
    ),
    Mistake(
        "weight's gradient channels last",
        "The numbers of dweight stand in the order (row, column, channel) of a patch, in an array of weight's shape.",
        but(backward, 1, lambda d, *args: ops.reshape(ops.transpose(d, (0, 2, 3, 1)), d.shape)),
    ),
    Mistake(
        "weight's gradient as a matrix",
        "dweight is (D, C·P·Q), the matrix's gradient. Its numbers are right; give them weight's own shape.",
        but(backward, 1, lambda d, *args: ops.reshape(d, (len(d), -1))),
    ),
    Mistake(
        "rows off by one",
        "The last row of g is taken for the class token's, and the first for a patch's. Which row did forward put cls "
        "in?",
        seen_from_one_row_early,
    ),
    Mistake(
        "images put together by one reshape",
        "The gradients of the patches' pixels are reshaped into images in one step. Every step of cutting has to be "
        "undone: split, move the axes back, join.",
        but(backward, 0, lambda d, g, images, weight, *args: patch_gradients(g, images, weight).reshape(d.shape)),
    ),
    Mistake(
        "the same transpose again",
        "The axes are moved by the permutation of the forward pass once more. It is not its own inverse: write down "
        "where each of the six axes is and where it has to go.",
        but(backward, 0, lambda d, g, images, weight, *args: ops.transpose(patch_gradients(g, images, weight),
                                                                       (0, 2, 4, 1, 3, 5)).reshape(d.shape)),
    ),
    Mistake(
        "patches put back column by column",
        "Patch n is put back as if they were counted down the columns.",
        backward_of(projected(COLUMN_BY_COLUMN), 5),
    ),
    Mistake(
        "pixels put back channels last",
        "The pixels' gradients, and the weight's, are those of patches in the order (row, column, channel).",
        backward_of(projected(CHANNELS_LAST), 5),
    ),
)  # fmt: skip

EXERCISE = Exercise(
    number=11,
    slug="embedding",
    title="patches, class token, positions",
    asked=(
        Asked("forward", ("tokens",), right=embed, samples=samples, mistakes=FORWARD_MISTAKES),
        Asked(
            "backward",
            ("dimages", "dweight", "dbias", "dcls", "dpositions"),
            right=backward,
            samples=with_cotangents(samples, embed),
            mistakes=BACKWARD_MISTAKES,
        ),
    ),
    hints=(
        "Write a function that cuts (B, C, H, W) into (B, N, C·P·Q) and one that puts such patches back together; test "
        "that the second undoes the first on images of 0, 1, 2, … with H ≠ W, P ≠ Q and C > 1.",
        "After the reshape into six axes, (B, C, H/P, P, W/Q, Q), the transpose brings the axes numbered 1, 3, 5 to "
        "the end, in this order. Going back, start from (B, H/P, W/Q, C, P, Q) and ask of each axis of the result "
        "which one of these it is.",
        "Split g into its first row and the rest. The rest is the g of a linear layer whose input are the cut patches: "
        "all of exercise 2. What was broadcast over the batch is summed over axis 0; g whole belongs to only one of "
        "the five.",
    ),
)
