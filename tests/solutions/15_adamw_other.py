"""The correction in the rate, as many implementations have it; the run by the unrolled sums of the derivation."""

import math

import numpy as np


def step(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    m, v = m + (1.0 - beta1) * (g - m), v + (1.0 - beta2) * (np.square(g) - v)
    root = math.sqrt(1.0 - beta2**t)
    return p - lr * decay * p - (lr * root / (1.0 - beta1**t)) * m / (np.sqrt(v) + eps * root), m, v


def run(p, gradients, lrs, beta1, beta2, eps, decay, decays):
    for t in range(1, len(gradients) + 1):
        past = np.arange(t - 1, -1, -1)
        m = np.einsum("s,s...->...", beta1**past, gradients[:t]) / (beta1**past).sum()
        v = np.einsum("s,s...->...", beta2**past, gradients[:t] ** 2) / (beta2**past).sum()
        p = p * (1.0 - lrs[t - 1] * decay * decays) - lrs[t - 1] * m / (np.sqrt(v) + eps)
    return p
