"""Exercise 3: softmax

Softmax makes a probability distribution of a row of numbers (logits, or attention scores):

    p_i = e^(x_i) / Z,     Z = Σ_k e^(x_k)

In a Vision Transformer it stands in two places: in every head of every block, where a query spreads its attention over
the keys, and at the very end, in the loss. It is where most hand-written backward passes go wrong, because one input
moves every output of its row.

WHAT IS GIVEN, WHAT IS ASKED

    x   (…, K)   any number of leading axes, perhaps none; each row along the last axis is a softmax of its own
    p   (…, K)   p = forward(x), positive, every row adds up to 1
    g   (…, K)   the cotangent: g_i = ∂L/∂p_i for a loss L that you do not know
    dx  (…, K)   dx = backward(g, x), dx_j = ∂L/∂x_j

THE FORWARD PASS, AND ITS TRAP

e^710 is infinity in float64, and e^(-746) is 0: with scores of that size the formula above gives inf/inf or 0/0, NaN.
Let c be any number and look at the row x - c:

    e^(x_i - c) / Σ_k e^(x_k - c) = e^(-c) e^(x_i) / (e^(-c) Σ_k e^(x_k)) = p_i

Nothing has changed. So c may be chosen, for each row, such that no exponent can overflow and the sum cannot be 0,
however far apart the numbers of a row lie, and the rows.

THE BACKWARD PASS

The chain rule, for one row:

    dx_j = Σ_i g_i ∂p_i/∂x_j                                                                        (1)

The sum is over all i, because every p_i has x_j in its denominator. Write p_i = e^(x_i) · Z^(-1) and use the product
rule. With [i = j] for 1 if i = j and 0 otherwise:

    ∂e^(x_i)/∂x_j = [i = j] e^(x_i)
    ∂Z/∂x_j       = e^(x_j)
    ∂Z^(-1)/∂x_j  = -Z^(-2) e^(x_j)

Put these together and write the result in p_i and p_j alone: e^(x_i)/Z is p_i. You get a K × K matrix, the Jacobian,
which is symmetric. Put it into (1), use [i = j] to get rid of one sum, and see what is left of the other. You need no
K × K matrix in the code: with 197 tokens that is one for each of 197 rows, in each of 12 heads and 12 layers, a
thousand million numbers an image.

TWO THINGS TO CHECK BY HAND BEFORE YOU RUN ANYTHING

    Σ_j dx_j = 0 in every row, because adding c to the whole row changes no p.
    If all g_i of a row are equal, dx = 0: Σ p_i = 1 whatever x is. (This is why a test with g = ones proves nothing.)

Check your work, in this folder:  minivit learn check . 3
"""

import numpy as np


def forward(x):
    """Return the softmax of x (…, K) over the last axis, (…, K)."""
    raise NotImplementedError("write me")


def backward(g, x):
    """Return dx (…, K), the gradient in x of a loss whose gradient in forward(x) is g (…, K)."""
    raise NotImplementedError("write me")
