"""Exercise 10: the pre-norm encoder block, and the gradients of all its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.learn.given import block, gelu, layer_norm, linear, with_backwards
from minivit.learn.mutants import cut, misread
from minivit.ops.samples import Draw

NAMES = (
    "norm1_weight", "norm1_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias",
    "norm2_weight", "norm2_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias",
)  # fmt: skip


def parameters(r: Draw, dim: int, hidden: int, *leading: int, scale: float = 1.0) -> tuple[Any, ...]:
    """Draw the twelve parameters of a block, or of as many as ``leading`` says; ``scale`` is that of the scores."""
    shapes = [(dim,), (dim,), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,),
              (dim,), (dim,), (hidden, dim), (hidden,), (dim, hidden), (dim,)]  # fmt: skip
    drawn = [r(*leading, *shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 1.0) for shape in shapes]
    drawn[2] = drawn[2] * scale
    return tuple(drawn)


def samples(key: Key) -> list[Sample]:
    """Draw tokens (B, T, D), the parameters and the number of heads."""
    r = Draw(key)
    return [
        ("two images, three tokens, two heads", (r(2, 3, 4), *parameters(r, 4, 7), 2)),
        ("a batch of one, odd sizes", (r(1, 5, 9), *parameters(r, 9, 5), 3)),
        ("one token", (r(3, 1, 4), *parameters(r, 4, 6), 2)),
        ("one head, as many tokens as numbers", (r(4, 4, 4), *parameters(r, 4, 4), 1)),
        ("tokens far from zero, large scores", (9.0 + 3.0 * r(2, 4, 6), *parameters(r, 6, 8, scale=4.0), 2)),
    ]


Wiring = Callable[[Any, Any, Any, Any, Any], Any]


def parts(
    norm1_weight: Any, norm1_bias: Any, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any,
    norm2_weight: Any, norm2_bias: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, fc2_bias: Any, heads: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Return norm1, attention, norm2 and mlp as functions of tokens.

    The norms and, for their first layer, the branches may be given the tokens that backward reads by mistake.
    """

    def norm1(x: Any, read: Any = None) -> Any:
        return misread(layer_norm, x, read, norm1_weight, norm1_bias)

    def norm2(x: Any, read: Any = None) -> Any:
        return misread(layer_norm, x, read, norm2_weight, norm2_bias)

    def attention(u: Any, read: Any = None, heads: int = heads, scale: float | None = None) -> Any:
        qkv = misread(linear, u, read, qkv_weight, qkv_bias)
        return linear(ops.self_attention(qkv, heads, None, None, scale), proj_weight, proj_bias)

    def mlp(u: Any, read: Any = None, activation: Any = gelu, last: Any = None) -> Any:
        hidden = misread(linear, u, read, fc1_weight, fc1_bias)
        return misread(linear, activation(hidden), None if last is None else last(hidden), fc2_weight, fc2_bias)

    return norm1, attention, norm2, mlp


def wired(wiring: Wiring) -> Callable[..., Any]:
    """Return a block's forward that puts its parts together as ``wiring(x, norm1, attention, norm2, mlp)`` does."""
    return lambda x, *parameters: wiring(x, *parts(*parameters))


def going_back(wiring: Wiring) -> Callable[..., Any]:
    """Return the gradient of a wiring: of one whose numbers are right but whose way back is not."""
    return backward_of(wired(wiring), 13)


def post_norm(x: Any, norm1: Any, attention: Any, norm2: Any, mlp: Any) -> Any:
    """Take the norms after the sums."""
    y = norm1(x + attention(x))
    return norm2(y + mlp(y))


def after_attention(x: Any, norm1: Any, attention: Any) -> Any:
    """Return y, the first half's result."""
    return x + attention(norm1(x))


def then(second: Callable[[Any, Any, Any, Any], Any]) -> Wiring:
    """Return a wiring with the right first half; ``second(y, norm2, mlp, x)`` is the other."""
    return lambda x, norm1, attention, norm2, mlp: second(after_attention(x, norm1, attention), norm2, mlp, x)


def first(half: Callable[[Any, Any, Any], Any]) -> Wiring:
    """Return a wiring with the right second half; ``half(x, norm1, attention)`` is the first."""

    def wiring(x: Any, norm1: Any, attention: Any, norm2: Any, mlp: Any) -> Any:
        y = half(x, norm1, attention)
        return y + mlp(norm2(y))

    return wiring


def g_for_dy(x: Any, norm1: Any, attention: Any, norm2: Any, mlp: Any) -> Any:
    """Let the MLP's news reach the road only, not the attention's branch."""
    a = attention(norm1(x))
    return x + a + mlp(norm2(x + cut(a)))


def twice(x: Any) -> Any:
    """Return x, whose gradient comes back twice: what a road gets that is given the branch's news."""
    return x + x - cut(x)


def roads_overwritten(x: Any, norm1: Any, attention: Any, norm2: Any, mlp: Any) -> Any:
    """Let nothing come back by the two roads, and twice as much by the branches."""
    y = cut(x) + attention(norm1(twice(x)))
    return cut(y) + mlp(norm2(twice(y)))


def swapped_norms(x: Any, *parameters: Any) -> Any:
    """Exchange the parameters of the two norms."""
    return block(x, *parameters[6:8], *parameters[2:6], *parameters[:2], *parameters[8:])


def unprojected(x: Any, *parameters: Any) -> Any:
    """Let the projection change nothing."""
    own = list(parameters)
    own[4:6] = np.eye(x.shape[-1]), 0.0 * own[5]
    return block(x, *own)


def bias_not_summed(g: Any, x: Any, *parameters: Any) -> Any:
    """Return the right gradients, but for the last bias as it comes."""
    return *backward_of(block, 13)(g, x, *parameters)[:12], g


def mean_over_batch(g: Any, x: Any, *parameters: Any) -> Any:
    """Return the right gradients, those of the parameters divided by the images."""
    dx, *rest = backward_of(block, 13)(g, x, *parameters)
    return dx, *(d / len(x) for d in rest)


FORWARD_MISTAKES = (
    Mistake(
        "post-norm",
        "The norms are taken of the sums. In a pre-norm block nothing stands on the road from x to the output but two "
        "additions: look at where each norm stands in the two lines at the top of the text.",
        wired(post_norm),
    ),
    Mistake(
        "attention's residual forgotten",
        "The attention's branch is there, but what it should be added to is not.",
        wired(first(lambda x, norm1, attention: attention(norm1(x)))),
    ),
    Mistake(
        "MLP's residual forgotten",
        "The MLP's branch is there, but what it should be added to is not.",
        wired(then(lambda y, norm2, mlp, x: mlp(norm2(y)))),
    ),
    Mistake(
        "attention added to the normed tokens",
        "The attention's output is added to what norm1 gave. The norm stands in the branch only; the road has x as it "
        "is. (Was x overwritten?)",
        wired(first(lambda x, norm1, attention: norm1(x) + attention(norm1(x)))),
    ),
    Mistake(
        "MLP added to the normed tokens",
        "The MLP's output is added to what norm2 gave. The norm stands in the branch only.",
        wired(then(lambda y, norm2, mlp, x: norm2(y) + mlp(norm2(y)))),
    ),
    Mistake(
        "MLP reads the block's input",
        "norm2 is given x, as if the two branches stood side by side. Which tokens does the second line of the text "
        "norm?",
        wired(then(lambda y, norm2, mlp, x: y + mlp(norm2(x)))),
    ),
    Mistake(
        "MLP added to the block's input",
        "The MLP's output is added to x, so that what attention has added is lost.",
        wired(then(lambda y, norm2, mlp, x: x + mlp(norm2(y)))),
    ),
    Mistake(
        "norm1 forgotten",
        "Attention reads x itself, not the normed x.",
        wired(first(lambda x, norm1, attention: x + attention(x))),
    ),
    Mistake(
        "norm2 forgotten",
        "The MLP reads y itself, not the normed y.",
        wired(then(lambda y, norm2, mlp, x: y + mlp(y))),
    ),
    Mistake("norms exchanged", "norm1's weight and bias are used where norm2's belong, and the other way about.",
            swapped_norms),
    Mistake(
        "norm1 twice",
        "norm2 is made with norm1's weight and bias.",
        lambda x, *parameters: block(x, *parameters[:6], *parameters[:2], *parameters[8:]),
    ),
    Mistake(
        "projection forgotten",
        "What the heads return is added to x as it is. A linear layer, proj, stands between.",
        unprojected,
    ),
    Mistake(
        "activation forgotten",
        "There is nothing between the MLP's two linear layers: two of them without a bend between are one.",
        wired(then(lambda y, norm2, mlp, x: y + mlp(norm2(y), activation=lambda h: h))),
    ),
    Mistake(
        "scale forgotten",
        "The scores of attention lack the factor 1/√d, d the length of a head's queries.",
        wired(first(lambda x, norm1, attention: x + attention(norm1(x), scale=1.0))),
    ),
    Mistake(
        "one head for all",
        "Attention runs as one head over all D numbers. The argument heads has to reach it.",
        wired(first(lambda x, norm1, attention: x + attention(norm1(x), heads=1))),
    ),
)  # fmt: skip

BACKWARD_MISTAKES = (
    Mistake(
        "attention's residual forgotten",
        "x is read in two places: by norm1 and by the sum. dx has only what comes back through the branch of "
        "attention.",
        going_back(first(lambda x, norm1, attention: cut(x) + attention(norm1(x)))),
    ),
    Mistake(
        "MLP's residual forgotten",
        "y is read in two places: by norm2 and by the sum. What goes on to the first half is only what comes back "
        "through the MLP.",
        going_back(then(lambda y, norm2, mlp, x: cut(y) + mlp(norm2(y)))),
    ),
    Mistake(
        "MLP's branch goes no further",
        "The MLP's parameters are right, but what comes back through norm2 is dropped: ∂L/∂y is more than g.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(cut(y))))),
    ),
    Mistake(
        "attention's branch goes no further",
        "The parameters are right, but what comes back through norm1 is not in dx.",
        going_back(first(lambda x, norm1, attention: x + attention(norm1(cut(x))))),
    ),
    Mistake(
        "g into the attention's branch",
        "The branch of attention is walked back from g. Attention's output was added into y, and y is read by norm2, "
        "too: what is the gradient of the sum x + attention(…)?",
        going_back(g_for_dy),
    ),
    Mistake(
        "g onto the first road",
        "The first road is given g. It carries all of ∂L/∂y, what came back through the MLP included.",
        going_back(lambda x, norm1, attention, norm2, mlp: x + attention(norm1(x))
                   + mlp(norm2(cut(x) + attention(norm1(x))))),
    ),
    Mistake(
        "g onto the first road, too",
        "The first road is given ∂L/∂y and g once more. g is in ∂L/∂y already: by the second road.",
        going_back(lambda x, norm1, attention, norm2, mlp: after_attention(x, norm1, attention) + x - cut(x)
                   + mlp(norm2(after_attention(x, norm1, attention)))),
    ),
    Mistake(
        "roads overwritten",
        "On both roads goes what the branch has given back, in the place of what came in: is one name, g, used for "
        "both? The branch has then overwritten what the road needs.",
        going_back(roads_overwritten),
    ),
    Mistake(
        "norm1 reads its own output",
        "layer_norm_backward of norm1 is given normed tokens. It wants what went into the norm.",
        going_back(first(lambda x, norm1, attention: x + attention(norm1(x, norm1(x))))),
    ),
    Mistake(
        "norm2 reads its own output",
        "layer_norm_backward of norm2 is given normed tokens. It wants what went into the norm.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y, norm2(y))))),
    ),
    Mistake(
        "norm2 reads the block's input",
        "layer_norm_backward of norm2 is given x. In the forward pass norm2 was given something else.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y, x)))),
    ),
    Mistake(
        "qkv's weight from the tokens before the norm",
        "linear_backward of qkv is given x. What went into that layer in the forward pass?",
        going_back(first(lambda x, norm1, attention: x + attention(norm1(x), read=x))),
    ),
    Mistake(
        "fc1's weight from the tokens before the norm",
        "linear_backward of fc1 is given y. What went into that layer in the forward pass?",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y), read=y))),
    ),
    Mistake(
        "gelu reads its own output",
        "gelu_backward is given what came out of gelu. It wants what went in.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y), activation=lambda h: misread(gelu, h, gelu(h))))),
    ),
    Mistake(
        "gelu forgotten",
        "The gradient goes from fc2 to fc1 as if there were nothing between. One box of the chain is left out.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y), activation=lambda h: h + cut(gelu(h) - h)))),
    ),
    Mistake(
        "fc2's weight from before gelu",
        "linear_backward of fc2 is given fc1's output. What went into fc2 has passed the activation.",
        going_back(then(lambda y, norm2, mlp, x: y + mlp(norm2(y), last=lambda h: h))),
    ),
    Mistake(
        "bias not summed",
        "dfc2_bias is (B, T, D), g itself. The bias was added to every token: each number of it collects from all.",
        bias_not_summed,
    ),
    Mistake(
        "parameters averaged over the batch",
        "The gradients of the parameters are divided by B. Every use of a parameter adds to its gradient; if the loss "
        "is a mean, g has the division already.",
        mean_over_batch,
    ),
)  # fmt: skip

EXERCISE = Exercise(
    number=10,
    slug="block",
    title="the pre-norm block",
    given=with_backwards("linear", "gelu", "layer_norm", "self_attention"),
    asked=(
        Asked("forward", ("out",), right=block, samples=samples, mistakes=FORWARD_MISTAKES),
        Asked(
            "backward",
            ("dx", *(f"d{name}" for name in NAMES)),
            right=backward_of(block, 13),
            samples=with_cotangents(samples, block),
            mistakes=BACKWARD_MISTAKES,
        ),
    ),
    hints=(
        "Forward in ten lines, one box a line, each result under a name of its own: nothing is overwritten. Backward "
        "runs the same lines first, then goes through them from the last to the first.",
        "Do the second half alone: a function (g, y) → (∂L/∂y, the six gradients of norm2 and the MLP). Test it: "
        "with fc2's parameters zero it must give g. The first half is the same again with another branch.",
        "In each half: keep g aside, walk the branch back to the half's input, and then add what you kept. The result "
        "of the second half's addition is the g of the first half, for its branch and for its road.",
    ),
)
