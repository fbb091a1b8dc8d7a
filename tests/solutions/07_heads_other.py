import numpy as np


def split(qkv, heads):
    parts = np.split(qkv, 3, axis=-1)
    return np.stack([np.stack(np.split(part, heads, axis=-1), axis=1) for part in parts])


def split_backward(g, qkv, heads):
    dqkv = np.zeros_like(qkv)
    d = g.shape[-1]
    for p in range(3):
        for h in range(heads):
            first = (p * heads + h) * d
            dqkv[:, :, first : first + d] += g[p, :, h]
    return dqkv


def merge(x):
    return np.concatenate([x[:, h] for h in range(x.shape[1])], axis=-1)


def merge_backward(g, x):
    return np.stack(np.split(g, x.shape[1], axis=-1), axis=1)
