"""In einsum, with the softmax's third derivative written out: (dS)˙ from Ṡ by the Jacobian of S → dS."""

import numpy as np


def parts(q, k, tq, tk):
    c = q.shape[-1] ** -0.5
    s = np.einsum("...id,...jd->...ij", q, k) * c
    p = np.exp(s - np.log(np.exp(s - s.max(-1, keepdims=True)).sum(-1, keepdims=True)) - s.max(-1, keepdims=True))
    ts = np.einsum("...id,...jd->...ij", tq, k) * c + np.einsum("...id,...jd->...ij", q, tk) * c
    jacobian = p[..., :, None] * (np.eye(p.shape[-1]) - p[..., None, :])
    return c, p, ts, jacobian


def tangent(q, k, v, tq, tk, tv):
    _, p, ts, jacobian = parts(q, k, tq, tk)
    tp = np.einsum("...ijl,...il->...ij", jacobian, ts)
    return np.einsum("...ij,...je->...ie", tp, v) + np.einsum("...ij,...je->...ie", p, tv)


def hvp(g, q, k, v, tq, tk, tv):
    c, p, ts, jacobian = parts(q, k, tq, tk)
    tp = np.einsum("...ijl,...il->...ij", jacobian, ts)
    dp, tdp = np.einsum("...ie,...je->...ij", g, v), np.einsum("...ie,...je->...ij", g, tv)
    ds = np.einsum("...ijl,...il->...ij", jacobian, dp)
    r = np.einsum("...ij,...ij->...i", p, dp)[..., None]
    tds = (dp - r) * tp - p * np.einsum("...ij,...ij->...i", tp, dp)[..., None]
    tds = tds + np.einsum("...ijl,...il->...ij", jacobian, tdp)
    hq = np.einsum("...ij,...jd->...id", tds, k) + np.einsum("...ij,...jd->...id", ds, tk)
    hk = np.einsum("...ij,...id->...jd", tds, q) + np.einsum("...ij,...id->...jd", ds, tq)
    return hq * c, hk * c, np.einsum("...ij,...ie->...je", tp, g)
