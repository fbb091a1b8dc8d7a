import math

import numpy as np

EPS = 1e-6


def linear(x, weight, bias):
    return x @ weight.T + bias


def linear_backward(g, x, weight):
    rows = g.reshape(-1, g.shape[-1])
    return g @ weight, rows.T @ x.reshape(-1, x.shape[-1]), rows.sum(axis=0)


def normalised(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS)
    return centred / sigma, sigma


def layer_norm(x, weight, bias):
    return normalised(x)[0] * weight + bias


def layer_norm_backward(g, x, weight):
    x_hat, sigma = normalised(x)
    gw = g * weight
    dx = (gw - gw.mean(axis=-1, keepdims=True) - x_hat * (gw * x_hat).mean(axis=-1, keepdims=True)) / sigma
    axes = tuple(range(g.ndim - 1))
    return dx, (g * x_hat).sum(axis=axes), g.sum(axis=axes)


def cdf(x):
    return 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def gelu_backward(g, x):
    return g * (cdf(x) + x * np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi))


def split(qkv, heads):
    b, t, features = qkv.shape
    return qkv.reshape(b, t, 3, heads, features // (3 * heads)).transpose(2, 0, 3, 1, 4)


def probabilities(q, k):
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def self_attention(qkv, heads):
    q, k, v = split(qkv, heads)
    return (probabilities(q, k) @ v).transpose(0, 2, 1, 3).reshape(*qkv.shape[:2], -1)


def self_attention_backward(g, qkv, heads):
    q, k, v = split(qkv, heads)
    b, t, features = g.shape
    g = g.reshape(b, t, heads, features // heads).transpose(0, 2, 1, 3)
    p = probabilities(q, k)
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) / math.sqrt(q.shape[-1])
    parts = np.stack([ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g])
    return parts.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def steps(x, n1w, n1b, qkvw, qkvb, pw, pb, n2w, n2b, w1, b1, w2, b2, heads):
    u = layer_norm(x, n1w, n1b)
    qkv = linear(u, qkvw, qkvb)
    c = self_attention(qkv, heads)
    y = x + linear(c, pw, pb)
    n = layer_norm(y, n2w, n2b)
    h = linear(n, w1, b1)
    e = h * cdf(h)
    return u, qkv, c, y, n, h, e, y + linear(e, w2, b2)


def forward(*args):
    return steps(*args)[-1]


def backward(g, x, n1w, n1b, qkvw, qkvb, pw, pb, n2w, n2b, w1, b1, w2, b2, heads):
    u, qkv, c, y, n, h, e, _ = steps(x, n1w, n1b, qkvw, qkvb, pw, pb, n2w, n2b, w1, b1, w2, b2, heads)
    de, dw2, db2 = linear_backward(g, e, w2)
    dn, dw1, db1 = linear_backward(gelu_backward(de, h), n, w1)
    dy, dn2w, dn2b = layer_norm_backward(dn, y, n2w)
    dy = dy + g
    dc, dpw, dpb = linear_backward(dy, c, pw)
    du, dqkvw, dqkvb = linear_backward(self_attention_backward(dc, qkv, heads), u, qkvw)
    dx, dn1w, dn1b = layer_norm_backward(du, x, n1w)
    return dx + dy, dn1w, dn1b, dqkvw, dqkvb, dpw, dpb, dn2w, dn2b, dw1, db1, dw2, db2
