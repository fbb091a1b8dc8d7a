"""Exercise 8: scaled dot-product attention, and its gradients in the queries, keys and values.

WHAT IS GIVEN, WHAT IS ASKED

q and k (…, T, d) hold T tokens' queries and keys of width d, v (…, T, w) their values of width w. In front there may be
any number of axes (batch, heads), or none; whatever is there is done for each of its entries by itself. All float64.

    forward(q, k, v)        the attended values, (…, T, w);
    backward(g, q, k, v)    dq (…, T, d), dk (…, T, d), dv (…, T, w), in this order.

g (…, T, w) is the cotangent: ∂L/∂out of a scalar loss L.

FORWARD

With capitals for the matrices of one entry (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.1; ViT appendix A):

    S = Q·Kᵀ / √d          (T, T)    S_ij: how well the query of token i fits the key of token j
    P = softmax of S       (T, T)    over the keys: each row of P is positive and sums to 1
    O = P·V                (T, w)    row i: the mean of all values, weighted by row i of P

    P_ij = e^(S_ij) / Σ_k e^(S_ik)

Why √d: if q and k have independent entries of variance 1, then q·k is a sum of d products and has variance d. Divided
by its standard deviation √d the scores stay of size 1, whatever d is, and softmax stays away from 0 and 1, where its
derivative dies.

Why softmax needs care: e^S is infinite from S = 710 on, and infinity by infinity is NaN. A number c taken off a whole
row of S changes nothing in P, as e^(-c) cancels. Take off the row's own largest: then the largest exponent is 0.

GOING BACK, ONE MATRIX PRODUCT AT A TIME

Let C = A·B, and let what arrives be dC = ∂L/∂C. Shift A by a small matrix δA: then C shifts by δA·B, and L by

    δL = Σ_ij dC_ij · (δA·B)_ij = Σ_ij dC_ij Σ_k δA_ik B_kj = Σ_ik δA_ik · ( Σ_j dC_ij B_kj ).

What multiplies δA_ik is dA_ik; the bracket is a matrix product of dC with B the other way round. In the same way for B:

    dA = dC·Bᵀ,        dB = Aᵀ·dC.

Do not learn by heart where the transposes go: if all sizes differ, the shapes fit in only one way. Here Q, K and S
leave room for errors that fit, as S is square. So write down the indices if in doubt.

1. O = P·V has this form, and dC is g. It gives dV and dP.
2. From dP to dS: through the softmax, below.
3. S = (1/√d) · Q·Kᵀ has this form, with B = Kᵀ and a constant factor in front. It gives dQ, and dKᵀ, which has to be
   turned round to be dK. The constant goes along: what is a constant factor in the forward is one in the gradient.

GOING BACK THROUGH THE SOFTMAX

This is exercise 3, with s for its x, a row of S, and dp for its g. Rows do not mix. Take one row, s → p,
p_k = e^(s_k) / Z with Z = Σ_l e^(s_l). Then ∂Z/∂s_j = e^(s_j), and by the quotient rule

    ∂p_k/∂s_j = p_k·[k = j] - p_k·p_j,        [k = j] being 1 if k = j, else 0.

This is a full T × T matrix: raising one score lowers all other weights of its row. Its diagonal alone, p_j·(1 - p_j),
is not the derivative. The chain rule sums over all that s_j acts on,

    ds_j = Σ_k dp_k · ∂p_k/∂s_j.

Put the derivative in and take both parts of the sum for themselves: the first has one term, the second a sum over k
that does not depend on j, one number for the whole row. Written so, nobody needs the T × T matrix of derivatives (T³
numbers for all rows): an elementwise product and one sum for each row are all. That is the step left to you.

What your gradients must do:

    each row of dS sums to 0        the same number added to a row of S changes nothing
    dV for g = 1 everywhere:        column sums of P, the attention that each token receives
    T = 1: dq = dk = 0, dv = g      one token attends to itself with weight 1, whatever q and k are

TRAPS

- The factor is 1/√d with d the width of the queries (q.shape[-1]): not that of the values, not T, not d.
- The softmax runs over the keys, the last axis of S. The sum in dS runs along the same axis.
- The factor 1/√d is missing in dQ and dK more often than in the forward.
- dS as well as its transpose fits K and Q in both products. Only one of each pair is right.
- .T turns round all axes. Of an array (B, H, T, d) you want the last two exchanged: np.swapaxes(x, -1, -2).
- One sample has rows of scores around 800 next to rows around -800: each row needs its own largest. In another one
  score is far above the rest of its row: nothing but the largest will do.

Check your work, in this folder:  minivit learn check . 8
"""

import numpy as np


def forward(q, k, v):
    """Return softmax(q·kᵀ/√d)·v: q (…, T, d), k (…, T, d), v (…, T, w) → (…, T, w)."""
    raise NotImplementedError("write me")


def backward(g, q, k, v):
    """Return (dq, dk, dv): g (…, T, w) the cotangent of forward's output → (…, T, d), (…, T, d), (…, T, w)."""
    raise NotImplementedError("write me")
