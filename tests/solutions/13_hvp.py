import numpy as np


def parts(q, k, tq, tk):
    c = 1.0 / np.sqrt(q.shape[-1])
    s = c * q @ k.swapaxes(-1, -2)
    e = np.exp(s - s.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    ts = c * (tq @ k.swapaxes(-1, -2) + q @ tk.swapaxes(-1, -2))
    return c, p, p * (ts - (p * ts).sum(axis=-1, keepdims=True))


def tangent(q, k, v, tq, tk, tv):
    _, p, tp = parts(q, k, tq, tk)
    return tp @ v + p @ tv


def hvp(g, q, k, v, tq, tk, tv):
    c, p, tp = parts(q, k, tq, tk)
    dp, tdp = g @ v.swapaxes(-1, -2), g @ tv.swapaxes(-1, -2)
    r = (p * dp).sum(axis=-1, keepdims=True)
    tr = (tp * dp + p * tdp).sum(axis=-1, keepdims=True)
    ds, tds = p * (dp - r), tp * (dp - r) + p * (tdp - tr)
    hq = c * (tds @ k + ds @ tk)
    hk = c * (tds.swapaxes(-1, -2) @ q + ds.swapaxes(-1, -2) @ tq)
    return hq, hk, tp.swapaxes(-1, -2) @ g
