"""Exercise 6: layer normalisation, and its gradients in x, weight and bias.

WHAT IS GIVEN, WHAT IS ASKED

x (…, D) holds rows of D numbers, with any number of leading axes, none included: (D,), (T, D), (B, T, D). weight (D,)
and bias (D,) are shared by all rows. eps is a small positive number. All arrays are float64. You write

    forward(x, weight, bias, eps)        the normalised rows, (…, D);
    backward(g, x, weight, bias, eps)    dx (…, D), dweight (D,), dbias (D,), in this order.

g (…, D) is the cotangent: g = ∂L/∂out, L a scalar loss that is computed from the output. dx is ∂L/∂x, and so on.

FORWARD

Each row is treated by itself (Ba, Kiros and Hinton 2016, arXiv 1607.06450, section 3). Let x_1 … x_D be one row:

    μ  = 1/D · Σ_j x_j                the row's mean
    σ² = 1/D · Σ_j (x_j - μ)²         its variance: divided by D, not by D - 1
    s  = √(σ² + eps)                  eps keeps s from 0 where all numbers are equal
    x̂_j = (x_j - μ) / s               the row with mean 0 and (but for eps) variance 1
    out_j = x̂_j · weight_j + bias_j

Take σ² of the centred numbers, as it is written. The textbook's E[x²] - μ² is the same on paper, but subtracts two
large numbers that are almost equal: in rows around two million, as one sample has them, it loses 12 of 16 digits.

GOING BACK: weight AND bias

Number the rows r = 1 … R (all leading axes together). weight_j multiplies x̂_rj in every row, bias_j is added in every
row. What is used several times gets the sum of what comes back from every use:

    dbias_j = Σ_r g_rj · ∂out_rj/∂bias_j,        dweight_j = Σ_r g_rj · ∂out_rj/∂weight_j.

The two derivatives are read off the last line of the forward. The sum is over all leading axes, however many there
are, and the result has shape (D,).

GOING BACK: x

Rows do not mix, so take one row and leave r away. What reaches x̂ is

    dx̂_j = ∂L/∂x̂_j,        also read off the last line of the forward.

Now x_i acts on the row's x̂_1 … x̂_D by three ways: directly, through μ, and through s. Shift the row by small numbers
δx_j, and see by how much everything else shifts, to first order:

    δμ        = 1/D · Σ_i δx_i
    δ(x_j-μ)  = δx_j - δμ
    δ(σ²)     = 2/D · Σ_i (x_i - μ) · (δx_i - δμ)
              = 2/D · Σ_i (x_i - μ) · δx_i                  as Σ_i (x_i - μ) = 0: through σ², μ does not matter
    δs        = δ(σ²) / (2s)                                the derivative of a square root
              = 1/D · Σ_i x̂_i · δx_i                        as (x_i - μ)/s = x̂_i
    δx̂_j      = (δx_j - δμ) / s  -  (x_j - μ)/s² · δs       the quotient rule
              = 1/s · (δx_j - δμ - x̂_j · δs)

The loss shifts by δL = Σ_j dx̂_j · δx̂_j. Put δx̂_j in, and δμ and δs into that. You get sums over two indices; exchange
their order, so that everything stands as

    δL = Σ_i ( … ) · δx_i.

What is in the bracket is ∂L/∂x_i, for this is what a gradient is. That exchange is the step left to you. You will find
three terms, one for each way, all divided by s, and in two of them a sum over the whole row, which is one number for
all i.

What your dx must do, whatever g is:

    Σ_i dx_i = 0                    the same number added to a whole row changes nothing in the output
    Σ_i x̂_i · dx_i → 0 as eps → 0   a row twice as large changes nothing either
    D = 1: dx = 0                   the output is bias, whatever x is

TRAPS

- np.var divides by D and np.std(ddof=1) by D - 1. eps goes under the root.
- Means along the last axis must keep it (keepdims=True) to be subtracted from the rows they belong to.
- dx̂ is not g. Look at what stands between x̂ and the output.
- A g of ones with a weight of ones hides most mistakes in dx: the row's outputs then add up to the same number,
  whatever x is, and dx = 0. This is why gradients are checked with random cotangents, here and elsewhere.
- The sums for dweight and dbias run over every leading axis. x (D,) has none: then there is nothing to sum.

Check your work, in this folder:  minivit learn check . 6
"""

import numpy as np


def forward(x, weight, bias, eps):
    """Return the normalised rows: x (…, D), weight (D,), bias (D,), eps a float → (…, D)."""
    raise NotImplementedError("write me")


def backward(g, x, weight, bias, eps):
    """Return (dx, dweight, dbias): g (…, D) the cotangent of forward's output → (…, D), (D,), (D,)."""
    raise NotImplementedError("write me")
