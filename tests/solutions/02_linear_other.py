"""By einsum, and the sum over rows in loops."""

import numpy as np


def forward(x, weight, bias):
    return np.einsum("...i,oi->...o", x, weight) + bias


def backward(g, x, weight, bias):
    dweight, dbias = np.zeros_like(weight), np.zeros_like(bias)
    for place in np.ndindex(x.shape[:-1]):
        dweight += np.outer(g[place], x[place])
        dbias += g[place]
    return np.einsum("...o,oi->...i", g, weight), dweight, dbias
