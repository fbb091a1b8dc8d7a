"""Exercise 2: a linear layer, its bias broadcast

Nearly all parameters of a Vision Transformer are in linear layers: queries, keys, values and the projection after
them, both layers of every MLP, the patch embedding, the head. The gradient is two products of matrices and a sum; what
goes wrong are the shapes.

WHAT IS GIVEN, WHAT IS ASKED

    x       (…, I)   rows of I numbers, along any number of leading axes: none, (tokens,), (images, tokens), …
    weight  (O, I)   an output's row, an input's column, as in PyTorch and in minivit
    bias    (O,)
    y       (…, O)   y = forward(x, weight, bias): y_o = Σ_i weight_oi x_i + bias_o in every row, y = x·weightᵀ + bias
    g       (…, O)   the cotangent, ∂L/∂y

    backward(g, x, weight, bias) returns dx (…, I), dweight (O, I), dbias (O,): each with the shape of what it is the
    gradient of. That is the first thing to check, always.

THE DERIVATION

Number the rows by n, whatever axes they lie along. Then

    y_no = Σ_i weight_oi x_ni + bias_o

L depends on x_ni through every y in which x_ni stands. So, by the chain rule, with a sum over all entries of y:

    dx_ni      = Σ_m Σ_o g_mo ∂y_mo/∂x_ni
    dweight_oi = Σ_m Σ_p g_mp ∂y_mp/∂weight_oi
    dbias_o    = Σ_m Σ_p g_mp ∂y_mp/∂bias_o         p counts the outputs: o is taken, it stands on the left

Most of these derivatives are 0. For instance

    ∂y_mo/∂x_ni = weight_oi if m = n, and 0 in every other row

because rows do not know of each other. Write the other two down in the same way, and cross out the sums that have only
one term left. Three sums over products remain. In each, an index that is summed over is gone from the result, and the
others are the result's axes, in the order in which they stand on the left. A sum of products over one common index is
a product of matrices: Σ_k a_ik b_kj = (a·b)_ij. Where the common index is the first one of both, or the last one of
both, one of the two has to be transposed.

BROADCASTING, BACKWARDS

The bias has no n, and is added to every row: NumPy broadcasts it. Copying a number to many places is using it many
times, and by exercise 1 what comes back from all these places is added up. So, for every operation:

    what is broadcast along an axis going forward is summed over that axis going back

and the weight is no other case: it, too, is used once for every row.

THE TRAPS

    Leading axes: x may have two axes, or four, or one. x.T reverses all of them, and a sum over axis=0 is only right
    for two. x.reshape(-1, I) makes a matrix of x, whatever its leading axes are, even if there are none.
    If O = I, or the number of rows equals I, a transposed matrix has the right shape and the wrong numbers.
    Sum, not mean: if L is a mean over a batch, the division is in g already.

Check your work, in this folder:  minivit learn check . 2
"""

import numpy as np


def forward(x, weight, bias):
    """Return x·weightᵀ + bias, (…, O), of x (…, I), weight (O, I) and bias (O,)."""
    raise NotImplementedError("write me")


def backward(g, x, weight, bias):
    """Return dx (…, I), dweight (O, I), dbias (O,): the gradients of a loss whose gradient in y is g (…, O)."""
    raise NotImplementedError("write me")
