"""By logsumexp, and the whole Jacobian in einsum."""

import numpy as np


def forward(x):
    top = np.max(x, axis=-1)[..., None]
    return np.exp(x - top - np.log(np.sum(np.exp(x - top), axis=-1, keepdims=True)))


def backward(g, x):
    p = forward(x)
    jacobian = p[..., :, None] * (np.eye(p.shape[-1]) - p[..., None, :])  # ∂p_i/∂x_j
    return np.einsum("...i,...ij->...j", g, jacobian)
