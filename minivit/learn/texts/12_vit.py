"""Exercise 12: a whole ViT

From images to the loss, and the gradient of every parameter (Dosovitskiy et al. 2020, arXiv 2010.11929, eq. 1 to 4).
With N blocks:

    z0     = embed(images)                          (B, T, D): class token first, then the patches
    z1     = block 0 of z0, z2 = block 1 of z1, …   (B, T, D) each
    u      = norm(zN)                               (B, T, D): a last layer norm, after the last block
    logits = head(the class token's row of u)       (B, K): a linear layer
    loss   = cross_entropy(logits, labels)          a number: the mean over the B images

After this exercise you have written the gradients of a complete model by hand, the ones that train it: hand them to
the AdamW of exercise 15 and it learns.

WHAT IS GIVEN

    images (B, C, H, W), labels (B,) of whole numbers 0 … K-1, heads (an int that divides D)
    patch_weight (D, C, P, Q), patch_bias (D,), cls (D,), positions (T, D)      of the embedding, exercise 11
    norm_weight (D,), norm_bias (D,)                                            of the last norm, exercise 6
    head_weight (K, D), head_bias (K,)                                          of the head, exercise 2
    *blocks: twelve arrays, the parameters of exercise 10 in the order of exercise 10, of all N blocks at once: one
        more axis in front counts the blocks. blocks[0] (N, D) is norm1_weight, blocks[2] (N, 3D, D) qkv_weight:

        norm1_weight  norm1_bias  qkv_weight  qkv_bias  proj_weight  proj_bias
        norm2_weight  norm2_bias  fc1_weight  fc1_bias  fc2_weight   fc2_bias

N is ``len(blocks[0])``. The parameters of block i alone, in order, are ``[p[i] for p in blocks]``: they, and then
heads, are what follows x in a call of ``block``.

The pieces are yours from before, or minivit's, imported below (nothing else of minivit can be imported where the file
is marked). They work alike; g is the gradient of what the forward returned, and after it come the forward's arguments:

    tokens = embed(images, weight, bias, cls, positions)
    dimages, dweight, dbias, dcls, dpositions = embed_backward(g, images, weight, bias, cls, positions)
    out = block(x, norm1_weight, …, fc2_bias, heads)
    dx, dnorm1_weight, …, dfc2_bias = block_backward(g, x, norm1_weight, …, fc2_bias, heads)        thirteen of them
    out = layer_norm(x, weight, bias)
    dx, dweight, dbias = layer_norm_backward(g, x, weight, bias)
    out = linear(x, weight, bias)
    dx, dweight, dbias = linear_backward(g, x, weight, bias)
    loss = cross_entropy(logits, labels)                            the mean over the rows, a number
    dlogits = cross_entropy_backward(g, logits, labels)             g a number

WHAT IS ASKED

forward: the loss, a number.
backward: for a cotangent g = ∂L/∂loss, a number (loss may be a part of something larger, L, for instance half of a
    sum: then g is 1/2), the gradient of every parameter, twenty arrays, each in its parameter's shape, in this order:

    dpatch_weight, dpatch_bias, dcls, dpositions, dnorm_weight, dnorm_bias, dhead_weight, dhead_bias,
    and the twelve of blocks, (N, …) each.

No gradient of the images is asked for: nobody trains them.

THE DERIVATION

1. It is a chain of N + 5 boxes, as in exercise 10: embedding, N blocks, norm, "take row 0", head, loss. Walk forwards
   and keep what went *into* each box. That is z0 … zN (N + 1 arrays), u's row 0, the logits. This is the memory that
   training takes, and why the tokens after every block are kept.

2. Walk back. g → dlogits → (the row's gradient, dhead_weight, dhead_bias) → du → (dzN, dnorm_weight, dnorm_bias) → …

3. "Take row 0", u0 = u[:, 0], is a selection: a picture of u in which most numbers are not looked at. What is
   ∂L/∂u of a number that nobody reads? So du has the shape of u, and all of it is known.
   The tokens of the patches still get a gradient, only not here: their news reaches the class token in the attention
   of the blocks, and that is the way by which the gradient comes back to them.

4. The blocks in reverse: block i has turned z_i into z_{i+1}, so it is given ∂L/∂z_{i+1} and z_i, and gives back
   ∂L/∂z_i and twelve gradients of its own. These belong at place i of the (N, …) arrays, though you meet block N-1
   first.

5. What is left at the end, ∂L/∂z0, goes into the embedding.

TRAPS

- Each block's backward wants *its* input. One variable ``x`` that the forward loop has overwritten holds zN.
- Gradients that are appended in the order in which you meet them are in the wrong order, and as all blocks are alike
  in shape nothing complains.
- The mean: 1/B is in cross_entropy_backward already, once. Nowhere does one divide by T, or by B again.
- The last norm stands between the last block and the head. It has parameters, too.
- g multiplies everything. With g = 1 nobody notices that it was left out.

TRY IT

dhead_bias must add up to 0 (it is made of rows of a softmax minus one-hot rows), and dcls must equal dpositions[0].
Change one entry of any parameter by ±1e-5, and (loss₊ - loss₋)/2e-5 is its gradient to about nine digits.

Check your work, in this folder:  minivit learn check . 12
"""

import numpy as np

from minivit.learn.given import (
    block,
    block_backward,
    cross_entropy,
    cross_entropy_backward,
    embed,
    embed_backward,
    layer_norm,
    layer_norm_backward,
    linear,
    linear_backward,
)


def forward(
    images, labels, heads, patch_weight, patch_bias, cls, positions,
    norm_weight, norm_bias, head_weight, head_bias, *blocks,
):  # fmt: skip
    """Return the loss, the mean over the images of the cross-entropy: a number."""
    raise NotImplementedError("write me")


def backward(
    g, images, labels, heads, patch_weight, patch_bias, cls, positions,
    norm_weight, norm_bias, head_weight, head_bias, *blocks,
):  # fmt: skip
    """Return the twenty gradients of g·loss with respect to the parameters, from patch_weight on, in their order.

    g is a number. Each gradient has the shape of its parameter, those of the blocks (N, …).
    """
    raise NotImplementedError("write me")
