import numpy as np


def step(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    m = beta1 * m + (1.0 - beta1) * g
    v = beta2 * v + (1.0 - beta2) * g * g
    m_hat, v_hat = m / (1.0 - beta1**t), v / (1.0 - beta2**t)
    return (1.0 - lr * decay) * p - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def run(p, gradients, lrs, beta1, beta2, eps, decay, decays):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for i, (g, lr) in enumerate(zip(gradients, lrs, strict=True)):
        p, m, v = step(p, g, m, v, i + 1, lr, beta1, beta2, eps, decay if decays else 0.0)
    return p
