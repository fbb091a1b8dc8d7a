"""Exercise 13: Hessian-vector product of attention

Take a scalar made of one head's attention,

    f(Q, K, V) = Σ g ∘ attention(Q, K, V)        g fixed, of attention's shape;  ∘ entry by entry,  Σ over all entries

Its gradient is what exercise 8 computes: ∇f = backward(g, Q, K, V). The Hessian ∇²f is the matrix of second
derivatives: how ∇f changes when the inputs move. For T tokens it has (3·T·d)² entries, a hundred million for one
small head of T = 50, d = 64: nobody builds it. What Newton's method, conjugate gradients, sharpness measures and
influence functions need is only its product with a vector, and this costs no more than a few backward passes
(Pearlmutter 1994, "Fast exact multiplication by the Hessian"):

    (∇²f)·t  =  d/dε ∇f(inputs + ε·t)  at ε = 0        t = (tq, tk, tv), a direction in which all inputs move

It is the derivative *along a direction* of the gradient. Nothing is approximated: a difference quotient is good to 7
digits, a central one to 10, and 12 are asked for. (The complex step of exercise 1, put through exercise 8, gives all of
them. Check your work by it; it is not the answer.)

WHAT IS GIVEN

    q, tq (…, Tq, d)      k, tk (…, Tk, d)      v, tv (…, Tk, w)      g (…, Tq, w)
The leading axes "…" (heads, batch; or none) are the same everywhere: each head is by itself.

    S = c·Q·Kᵀ, c = 1/√d       P = softmax(S) over the last axis       out = P·V

The gradients of exercise 8 (solve that first; its answer stands here):

    dV = Pᵀ·g              dP = g·Vᵀ             r = Σ P ∘ dP, over the keys, (…, Tq, 1)
    dS = P ∘ (dP - r)      dQ = c·dS·K           dK = c·dSᵀ·Q

WHAT IS ASKED

tangent: d/dε attention(q + ε·tq, k + ε·tk, v + ε·tv) at ε = 0, of shape (…, Tq, w). This is forward mode: "if the
    inputs move that way, how does the output move?"
hvp: d/dε of the three gradients (dQ, dK, dV) along the same direction, g held fixed, of the shapes of q, k and v.

THE DERIVATION

1. Write a dot over what moves: Q̇ = tq, K̇ = tk, V̇ = tv, ġ = 0, ċ = 0. Three rules carry dots through any formula:

       sum        (A + B)˙ = Ȧ + Ḃ,   (Σ A)˙ = Σ Ȧ
       product    (A·B)˙ = Ȧ·B + A·Ḃ      for the matrix product as for ∘; transposing keeps the dot: (Aᵀ)˙ = (Ȧ)ᵀ
       function   (h(A))˙ = h'(A) ∘ Ȧ     for h entry by entry

   A product of two things that both move has two terms. There is nothing else to remember; but every factor counts.

2. Softmax. With E = exp(S), P = E / ΣE. From log P = S - log ΣE follows, by the rules,

       Ṗ / P = Ṡ - (Σ E ∘ Ṡ)/ΣE                         each Σ over a row, and kept as an axis of length 1

   and the last term can be written with P. The rows of P sum to 1 whatever S is, so the rows of Ṗ sum to 0: check
   yours. Compare with dS above. The Jacobian of softmax is symmetric: the rule forwards looks like the rule
   backwards.

3. The tangent of the output is the product rule on P·V with Ṗ from 2 and Ṡ from the product rule on c·Q·Kᵀ.

4. hvp: take the six lines of the backward pass one after the other, as they stand above, and put the dot on each. The
   first:

       dV = Pᵀ·g      →      (dV)˙ = (Ṗ)ᵀ·g             one term, as g does not move

   The other lines go the same way: (dP)˙, then ṙ, then (dS)˙, then (dQ)˙ and (dK)˙. Count, before you compute, which
   factors of each line move. ("Forward over reverse": the tangent of a program that computes a gradient.)

TRAPS

- In f everything meets everything: although dV does not contain V, it moves when Q moves. Although out is linear in
  V, the gradient dQ moves when V does.
- r is not a constant. It is a sum of products, and both factors move.
- dQ = c·dS·K has two factors that move, dK too.
- c is in Ṡ once, and once in the lines of dQ and dK, there before both terms.
- Rows of scores around 800 come, too: P as in exercise 8.

TRY IT

The Hessian is symmetric (Schwarz): for two directions t and s, Σ s ∘ hvp(t) = Σ t ∘ hvp(s). A forgotten term nearly
always breaks this. hvp is linear in t. With one key (Tk = 1) P is 1 and stays 1: what is left of everything?
And hvp is d/dε of a function that you have: (∇f(inputs + 1e-5·t) - ∇f(inputs - 1e-5·t))/2e-5 should agree to 9 or 10
digits.

Check your work, in this folder:  minivit learn check . 13
"""

import numpy as np


def tangent(q, k, v, tq, tk, tv):
    """Return the derivative of attention(q, k, v) along (tq, tk, tv): (…, Tq, w).

    q, tq (…, Tq, d), k, tk (…, Tk, d), v, tv (…, Tk, w).
    """
    raise NotImplementedError("write me")


def hvp(g, q, k, v, tq, tk, tv):
    """Return the derivatives (hq, hk, hv) along (tq, tk, tv) of the gradients of Σ g ∘ attention(q, k, v).

    g (…, Tq, w) is held fixed; hq, hk and hv have the shapes of q, k and v.
    """
    raise NotImplementedError("write me")
