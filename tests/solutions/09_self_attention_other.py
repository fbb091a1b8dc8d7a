import math

import numpy as np


def forward(qkv, heads, mask):
    x = apart(qkv, heads)
    out = np.zeros_like(x[:, :, 0])
    for b, i, h, seen in queries(x, mask):
        out[b, i, h] = weights(x, b, i, h, seen) @ x[b, seen, 2, h]
    return out.reshape(*qkv.shape[:2], -1)


def backward(g, qkv, heads, mask):
    """Query by query, over the keys that it may attend to, with the whole Jacobian of the softmax."""
    x = apart(qkv, heads)
    dx = np.zeros_like(x)
    g = g.reshape(x[:, :, 0].shape)
    for b, i, h, seen in queries(x, mask):
        p = weights(x, b, i, h, seen)
        dp = x[b, seen, 2, h] @ g[b, i, h]
        ds = (np.diag(p) - np.outer(p, p)) @ dp / math.sqrt(x.shape[-1])
        dx[b, i, 0, h] += ds @ x[b, seen, 1, h]
        dx[b, seen, 1, h] += np.outer(ds, x[b, i, 0, h])
        dx[b, seen, 2, h] += np.outer(p, g[b, i, h])
    return dx.reshape(qkv.shape)


def apart(qkv, heads):
    return qkv.reshape(*qkv.shape[:2], 3, heads, -1)


def queries(x, mask):
    """Yield (image, token, head, the keys seen) of each query that may attend to something."""
    batch, tokens, _, heads, _ = x.shape
    mask = np.broadcast_to(mask, (batch, heads, tokens, tokens))
    for b, h, i in np.ndindex(batch, heads, tokens):
        seen = np.flatnonzero(~mask[b, h, i])
        if len(seen):
            yield b, i, h, seen


def weights(x, b, i, h, seen):
    s = x[b, seen, 1, h] @ x[b, i, 0, h] / math.sqrt(x.shape[-1])
    e = np.exp(s - s.max())
    return e / e.sum()
