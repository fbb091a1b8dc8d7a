import numpy as np


def forward(q, k, v, block):
    scale = 1.0 / np.sqrt(q.shape[1])
    top = np.full((len(q), 1), -np.inf)
    total, out = np.zeros((len(q), 1)), np.zeros((len(q), v.shape[1]))
    for start in range(0, len(k), block):
        scores = scale * (q @ k[start : start + block].T)
        new = np.maximum(top, scores.max(axis=1, keepdims=True))
        e, shrink = np.exp(scores - new), np.exp(top - new)
        total = total * shrink + e.sum(axis=1, keepdims=True)
        out = out * shrink + e @ v[start : start + block]
        top = new
    return out / total, (top + np.log(total))[:, 0]


def backward(g, q, k, v, out, lse, block):
    scale = 1.0 / np.sqrt(q.shape[1])
    inner = (g * out).sum(axis=1, keepdims=True)
    dq, dk, dv = np.zeros(q.shape), np.empty(k.shape), np.empty(v.shape)
    for start in range(0, len(k), block):
        part = slice(start, start + block)
        p = np.exp(scale * (q @ k[part].T) - lse[:, None])
        ds = scale * p * (g @ v[part].T - inner)
        dq += ds @ k[part]
        dk[part], dv[part] = ds.T @ q, p.T @ g
    return dq, dk, dv
