"""Exercise 9: self-attention of several heads from one packed array, with a mask, and its gradient.

WHAT IS GIVEN, WHAT IS ASKED

This is what stands in a model: exercises 7 and 8 put together, and a mask. All arrays are float64 but for the mask.

    forward(qkv, heads, mask)        qkv (B, T, 3·H·d), heads = H → (B, T, H·d)
    backward(g, qkv, heads, mask)    g (B, T, H·d) → dqkv (B, T, 3·H·d)

qkv holds for each token the queries of all heads, then the keys of all heads, then the values of all heads: feature
(p·H + h)·d + i is entry i of head h of the queries (p = 0), keys (1) or values (2). The output holds the heads side by
side: feature h·d + i. mask is an array of bool of shape (T, T), or (B, 1, T, T): NumPy broadcasts both to the scores
(B, H, T, T). True at [i, j] means: token i may NOT attend to token j (it is "masked out"). g is the cotangent,
∂L/∂out of a scalar loss L.

FORWARD

1. Split: qkv (B, T, 3·H·d) → Q, K, V, each (B, H, T, d). Cut the axis of features into (3, H, d), in this order, then
   bring the axes where you want them. (A reshape straight to the shape that you want gives each head pieces of other
   tokens.)
2. Scores: S = Q·Kᵀ/√d, (B, H, T, T); d is the width of one head, not of all.
3. Weights: P_ij = e^(S_ij) / Σ_k e^(S_ik), the sum only over those keys k that token i may attend to; P_ij = 0 where it
   may not. So the weights of what is left sum to 1. A token that may attend to nothing at all gets a row of zeros, and
   its output is 0.
4. Heads: O = P·V, (B, H, T, d).
5. Merge: → (B, T, H·d), heads side by side.

How to mask. The sum "only over those allowed" is the softmax of scores in which the others have been replaced by
minus infinity, as e^(-∞) = 0. It must be done before the softmax: zeros put into P afterwards leave rows whose sum is
less than 1. Two things to mind:

- A row with nothing allowed becomes -∞ - (-∞) = NaN. Instead of -∞ a large finite number (-1e30) avoids the NaN, but
  then all scores of that row are equal and P is 1/T everywhere, where it ought to be 0. So set P to 0 where mask is
  True once more, after the softmax: it changes nothing in the other rows, and mends these.
- Adding -1e9 to the masked scores, as many do, comes to the same where something is allowed: e^(-1e9) is 0 exactly.
  Where nothing is allowed the added number cancels, and all tokens are attended. One sample has such a row. (Adding
  mask·(-∞) makes NaN of everything: where mask is False that is 0·∞.)

And as in exercise 8 take each row's largest score off before e^S: the largest of those allowed. A masked one may be
thousands above them, and e^S is then 0 for all that is left. So mask first.

GOING BACK

Undo the five steps in the opposite order. Nothing new is needed but care; write down at each step what arrives and
what leaves, with its shape.

5. Merging only moves numbers: the gradient moves back. g (B, T, H·d) → dO (B, H, T, d).
4. O = P·V. For C = A·B: dA = dC·Bᵀ and dB = Aᵀ·dC. This gives dV and dP.
3. From dP to dS through the softmax. For a row p of P the derivative is ∂p_k/∂s_j = p_k·[k = j] - p_k·p_j, and
   ds_j = Σ_k dp_k ∂p_k/∂s_j. And the mask? A masked score was replaced by a constant: whatever S_ij was, it does not
   matter, so dS_ij = 0 there. See what the formula gives if P_ij = 0 exactly, for j masked, and for those that are not:
   if P is what step 3 says, no further masking is needed going back. In a row of zeros nothing flows at all.
2. S = (1/√d)·Q·Kᵀ, which gives dQ and dK. Both carry the factor.
1. dQ, dK and dV go to the places that Q, K and V came from: joined to one array in the same order, then moved back to
   (B, T, 3·H·d).

What your gradient must do:

    each row of dS sums to 0, and is 0 where mask is True
    a token j that nobody may attend to: the keys' and values' parts of dqkv[:, j] are 0
    a token i that may attend to nothing: the queries' part of dqkv[:, i] is 0 (others may still attend to it)

TRAPS

- True means "may not". Libraries differ: in PyTorch's scaled_dot_product_attention True means "may".
- mask[i, j] has the query first: rows are queries, as in S.
- P recomputed in backward needs the mask as well, in every place where the forward had it.
- √d, not √(H·d): qkv.shape[-1] is 3·H·d.
- The order of the parts when joining is that of splitting: queries, keys, values.
- Any one wrong order of axes gives an array of the right shape.

Check your work, in this folder:  minivit learn check . 9
"""

import numpy as np


def forward(qkv, heads, mask):
    """Return the attended values, heads side by side: qkv (B, T, 3·H·d), mask (T, T) or (B, 1, T, T) → (B, T, H·d)."""
    raise NotImplementedError("write me")


def backward(g, qkv, heads, mask):
    """Return dqkv: g (B, T, H·d) the cotangent of forward's output, the rest as above → (B, T, 3·H·d)."""
    raise NotImplementedError("write me")
