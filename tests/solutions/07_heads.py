import numpy as np


def split(qkv, heads):
    b, t, features = qkv.shape
    return qkv.reshape(b, t, 3, heads, features // (3 * heads)).transpose(2, 0, 3, 1, 4)


def split_backward(g, qkv, heads):
    return g.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def merge(x):
    b, h, t, d = x.shape
    return np.swapaxes(x, 1, 2).reshape(b, t, h * d)


def merge_backward(g, x):
    b, h, t, d = x.shape
    return np.swapaxes(g.reshape(b, t, h, d), 1, 2)
