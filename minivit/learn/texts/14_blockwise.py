"""Exercise 14: attention in blocks

out = softmax(Q·Kᵀ/√d)·V needs the softmax's rows, and a row has as many entries as there are keys: for 16,384 tokens
the probabilities of one head are 2 GB in float64. Yet out is only Tq x w. FlashAttention (Dao et al. 2022, arXiv
2205.14135, algorithm 1; the softmax that is computed as its row comes in is Milakov and Gimelshein 2018, arXiv
1805.02867) computes exactly the same numbers, to rounding, from blocks of keys and values, and never has more than a
block of scores. The backward pass does not keep the probabilities either: it makes each block of them again.

WHAT IS GIVEN

    q (Tq, d), k (Tk, d), v (Tk, w): one head, no leading axes
    block, an int: how many keys (and, if you like, queries) are looked at in one go. It need not divide Tk or Tq
    g (Tq, w), the cotangent of out; and in backward also what forward has returned, out and lse

    S = Q·Kᵀ/√d (Tq, Tk), never whole.    lse_i = log Σ_j e^S_ij, one number for a query.    P_ij = e^(S_ij - lse_i)

WHAT IS ASKED

forward: (out, lse), of shapes (Tq, w) and (Tq,).
backward: (dq, dk, dv).
Both within a bound on memory, which is measured: less than half a float64 array of Tq x Tk. A loop over the keys with
arrays of Tq x block fits, and so does a loop over blocks of queries within blocks of keys.

THE DERIVATION: FORWARD

1. Let s be a row of S, one query's scores, v_j row j of V, and m any number. Then

       softmax(s)·V = (Σ_j e^(s_j - m)·v_j) / (Σ_j e^(s_j - m))

   as m cancels. It has to be chosen so that nothing overflows, and the row's largest score is the choice: every
   exponent is at most 0, one is 0. But in blocks the largest score is not known before the last one.

2. So keep, for every query, three things, of the keys that came by so far: the largest score m, the sum
   l = Σ e^(s_j - m), and the accumulator a = Σ e^(s_j - m)·v_j (a vector of length w). At the end out = a/l.

3. A new block of scores s comes. The new largest score is m' = max(m, max of s). The new block's terms are written
   with m'. But l and a were written with m. From e^(s - m') = e^(s - m)·e^(m - m') follows what the old l and a have
   to be multiplied with: a number at most 1, the same for all old keys; l and a both. Before the first key m = -∞,
   l = 0 and a = 0, and e^(-∞ - m') = 0 does the right thing by itself.

4. lse from m and l at the end: log Σ e^(s_j) = log (e^m · Σ e^(s_j - m)).

THE DERIVATION: BACKWARD

5. With all of P one would compute (exercise 8)

       dV = Pᵀ·g              dP = g·Vᵀ           D_i = Σ_j P_ij·dP_ij
       dS = P ∘ (dP - D)      dQ = dS·K/√d        dK = dSᵀ·Q/√d

   (D is the r of exercise 13.) A block of P is made again from a block of scores and lse: no maximum, no sum is needed,
   as lse holds both.

6. D_i is a sum over *all* keys, and a block has only some. But

       D_i = Σ_j P_ij·(g_i · v_j) = g_i · (Σ_j P_ij·v_j)

   and what stands in the brackets is known already. So D can be had before the first block, for all queries, from two
   arrays of (Tq, w).

7. Now each block of keys gives its own rows of dV and dK, once and for all, and *a part* of all rows of dQ.

TRAPS

- A last block that is shorter than the others. (A slice beyond the end is no error.)
- Scores of ±1000: e^1000 is inf, and inf/inf NaN. And a row whose first block has only scores of -1000 must not
  become 0/0.
- The scale belongs to every block of scores, and to dQ and dK.
- dQ is added to, block after block; if you also loop over queries so are dK and dV.
- ``q @ k.T``, even if it is used at once and thrown away, *is* a Tq x Tk array. So is a mask or a comparison of them;
  of bool it takes an eighth, and the bound lets one pass.

TRY IT

With block ≥ Tk there is one block and you have exercise 8. The result must not depend on block, but for rounding.
To measure memory: ``tracemalloc.start(); forward(...); tracemalloc.get_traced_memory()[1]`` is the peak in bytes.

Check your work, in this folder:  minivit learn check . 14
"""

import numpy as np


def forward(q, k, v, block):
    """Return (out, lse) of one head: q (Tq, d), k (Tk, d), v (Tk, w) → out (Tq, w), lse (Tq,).

    lse[i] is log Σ_j exp(q_i · k_j/√d). At most ``block`` keys are looked at in one go; no array of Tq x Tk is made.
    """
    raise NotImplementedError("write me")


def backward(g, q, k, v, out, lse, block):
    """Return (dq, dk, dv) for the cotangent g (Tq, w) of out; out and lse are what forward returned.

    No array of Tq x Tk is made.
    """
    raise NotImplementedError("write me")
