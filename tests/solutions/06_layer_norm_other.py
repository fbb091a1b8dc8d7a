import numpy as np


def forward(x, weight, bias, eps):
    rows = x.reshape(-1, x.shape[-1])
    out = np.stack([(row - row.mean()) / np.sqrt(row.var() + eps) for row in rows]).reshape(x.shape)
    return out * weight + bias


def backward(g, x, weight, bias, eps):
    """Every row by its whole Jacobian."""
    dx, dweight, dbias = np.empty_like(x), np.zeros_like(weight), np.zeros_like(bias)
    n = x.shape[-1]
    for i in np.ndindex(x.shape[:-1]):
        s = np.sqrt(x[i].var() + eps)
        x_hat = (x[i] - x[i].mean()) / s
        jacobian = (np.eye(n) - np.full((n, n), 1 / n) - np.outer(x_hat, x_hat) / n) / s
        dx[i] = jacobian.T @ (g[i] * weight)
        dweight += g[i] * x_hat
        dbias += g[i]
    return dx, dweight, dbias
