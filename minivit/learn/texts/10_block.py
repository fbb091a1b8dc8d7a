"""Exercise 10: the pre-norm block

A Vision Transformer is one block, again and again (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 2 and 3). The
tokens x (B, T, D) run through it along a straight road, the residual stream, and two branches add to what is on the
road:

    y   = x + attention(norm1(x))        the tokens look at each other
    out = y + mlp(norm2(y))              each token is worked on by itself

    attention(u) = self_attention(u·Wqkvᵀ + bqkv)·Wprojᵀ + bproj
    mlp(u)       = gelu(u·W1ᵀ + b1)·W2ᵀ + b2

"Pre-norm" says where the layer norms stand: at the mouth of a branch, never on the road. (In "post-norm", the order
of the first Transformer, the norm is taken of the sum: norm(x + attention(x)). The two are not the same function.)

WHAT IS GIVEN

    x (B, T, D), and with M the hidden numbers of the MLP:
    norm1_weight (D,)    norm1_bias (D,)         norm2_weight (D,)   norm2_bias (D,)
    qkv_weight (3D, D)   qkv_bias (3D,)          fc1_weight (M, D)   fc1_bias (M,)
    proj_weight (D, D)   proj_bias (D,)          fc2_weight (D, M)   fc2_bias (D,)
    heads, an int that divides D. A weight is (out, in), as in PyTorch. The layer norms' eps is 1e-6.

You have made every piece already: linear in exercise 2, gelu in 5, layer norm in 6, self-attention from a packed qkv
in 9. Paste your own in here (rename them, as all are called forward and backward; give layer norm 1e-6 for eps, and
self-attention np.zeros((T, T), bool) for mask), or take minivit's, which are imported below; nothing else of minivit
can be imported where the file is marked. Each is a pair, and all pairs work alike:

    out = layer_norm(x, weight, bias)                                       (…, D) → (…, D)
    dx, dweight, dbias = layer_norm_backward(g, x, weight, bias)
    out = linear(x, weight, bias)                                           (…, in) → (…, out)
    dx, dweight, dbias = linear_backward(g, x, weight, bias)
    out = gelu(x)                                                           any shape
    dx = gelu_backward(g, x)
    out = self_attention(qkv, heads)                                        (B, T, 3D) → (B, T, D)
    dqkv = self_attention_backward(g, qkv, heads)

where g is the gradient of the loss with respect to the pair's ``out``. What a backward takes after g are the
arguments that its forward had: the numbers that went *into* the box, not those that came out.

WHAT IS ASKED

forward: the block's output, (B, T, D).
backward: for a cotangent g (B, T, D), that is ∂L/∂out of some loss L, the thirteen gradients ∂L/∂x,
    ∂L/∂norm1_weight, … each of the shape of what it belongs to, in the order of the arguments.

No new calculus is needed: this exercise is about wiring, and wiring is where real implementations go wrong.

THE DERIVATION

1. A chain. Write the forward pass as a list of boxes, one a line, each with a name for what comes out:

       s1 = box1(s0, w1),  s2 = box2(s1, w2),  …

   Going back, start with g = ∂L/∂(last s) and walk the list from its end. Every box turns the gradient of its
   output into the gradient of its input and of its weights: (ds1, dw2) = box2_backward(g, s1, w2), then
   (ds0, dw1) = box1_backward(ds1, s0, w1). It needs s1 and s0, which a backward is not given: it runs the forward
   pass again and gives each result a name. Each gradient, too: g will be needed once more, in 4.

2. A sum. If r = a + b then ∂L/∂a = ∂L/∂r and ∂L/∂b = ∂L/∂r: the same gradient goes into both, unchanged.

3. A fork. If a value x is read in two places, a small change of x changes the loss by both ways, and to first order
   the changes add up: ∂L/∂x is the *sum* of what comes back from the places that read x.

4. The block has a fork and a sum twice. For one residual step r = x + f(x), with 2 and 3,

       ∂L/∂x = g + J_fᵀ·g         g = ∂L/∂r, J_f the Jacobian of the whole branch f,

   and J_fᵀ·g is what you get by walking the branch backwards as in 1. The term g is what makes deep networks
   trainable: it reaches the first block however small the J_f are.

5. The block is two such steps, one after the other. What leaves the second step backwards, ∂L/∂y, is the g of the
   first: all of ∂L/∂y, not only g, goes into the attention's branch and onto its road.

TRAPS

- Two roads: a gradient in which one of the two "g +" is left out has the right shape and a plausible size.
- What does norm2 read? What is added to the MLP's output? y both times, and neither x nor norm2(y).
- gelu_backward wants what went into gelu.
- The bias of a linear layer is a fork with B·T prongs: by 3 its gradient is a sum over all tokens of all images.

TRY IT

With proj_weight, proj_bias, fc2_weight and fc2_bias all zero the branches add nothing: out is x, and dx is g,
exactly. With only fc2_weight and fc2_bias zero, ∂L/∂y is g.

Check your work, in this folder:  minivit learn check . 10
"""

import numpy as np

from minivit.learn.given import (
    gelu,
    gelu_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
    self_attention,
    self_attention_backward,
)


def forward(
    x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
    norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, heads,
):  # fmt: skip
    """Return the tokens after the block: x (B, T, D) → (B, T, D)."""
    raise NotImplementedError("write me")


def backward(
    g, x, norm1_weight, norm1_bias, qkv_weight, qkv_bias, proj_weight, proj_bias,
    norm2_weight, norm2_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, heads,
):  # fmt: skip
    """Return the gradients (dx, dnorm1_weight, dnorm1_bias, …, dfc2_weight, dfc2_bias), in the order of the arguments.

    g (B, T, D) is the cotangent of what forward returns; each gradient has the shape of its argument.
    """
    raise NotImplementedError("write me")
