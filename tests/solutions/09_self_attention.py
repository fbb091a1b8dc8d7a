import numpy as np


def forward(qkv, heads, mask):
    q, k, v = split(qkv, heads)
    return merge(weights(q, k, mask) @ v)


def backward(g, qkv, heads, mask):
    q, k, v = split(qkv, heads)
    p = weights(q, k, mask)
    b, t, features = g.shape
    do = np.swapaxes(g.reshape(b, t, heads, features // heads), 1, 2)
    dv = turned(p) @ do
    dp = do @ turned(v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return np.concatenate([merge(ds @ k), merge(turned(ds) @ q), merge(dv)], axis=-1)


def weights(q, k, mask):
    s = np.where(mask, -1e30, q @ turned(k) / np.sqrt(q.shape[-1]))
    e = np.exp(s - s.max(-1, keepdims=True))
    return np.where(mask, 0, e / e.sum(-1, keepdims=True))


def split(qkv, heads):
    b, t, features = qkv.shape
    return qkv.reshape(b, t, 3, heads, features // (3 * heads)).transpose(2, 0, 3, 1, 4)


def merge(x):
    b, h, t, d = x.shape
    return np.swapaxes(x, 1, 2).reshape(b, t, h * d)


def turned(x):
    return np.swapaxes(x, -1, -2)
