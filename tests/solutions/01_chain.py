import numpy as np


def forward(x, w, b):
    v = np.tanh(w * x + b)
    return v * (x + v)


def backward(g, x, w, b):
    v = np.tanh(w * x + b)
    dv = g * (x + 2 * v)
    du = dv * (1 - v * v)
    return g * v + du * w, du * x, du
