"""By blocks of queries, within them by blocks of keys; the running logsumexp in the place of maximum and sum."""

import math

import numpy as np


def pieces(n, block):
    return [slice(start, min(start + block, n)) for start in range(0, n, block)]


def forward(q, k, v, block):
    out, lse = np.zeros((len(q), v.shape[1])), np.full(len(q), -np.inf)
    for rows in pieces(len(q), block):
        for keys in pieces(len(k), block):
            scores = np.einsum("id,jd->ij", q[rows], k[keys]) / math.sqrt(q.shape[1])
            new = np.logaddexp(lse[rows], np.logaddexp.reduce(scores, axis=1))
            out[rows] *= np.exp(lse[rows] - new)[:, None]
            out[rows] += np.exp(scores - new[:, None]) @ v[keys]
            lse[rows] = new
    return out, lse


def backward(g, q, k, v, out, lse, block):
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for keys in pieces(len(k), block):
        for rows in pieces(len(q), block):
            p = np.exp(q[rows] @ k[keys].T / math.sqrt(q.shape[1]) - lse[rows, None])
            dv[keys] += np.einsum("ij,ie->je", p, g[rows])
            ds = p * (g[rows] @ v[keys].T - np.einsum("ie,ie->i", g[rows], out[rows])[:, None])
            dq[rows] += ds @ k[keys] / math.sqrt(q.shape[1])
            dk[keys] += ds.T @ q[rows] / math.sqrt(q.shape[1])
    return dq, dk, dv
