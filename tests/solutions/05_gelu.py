import math

import numpy as np


def forward(x):
    return x * cdf(x)


def backward(g, x):
    density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return g * (cdf(x) + x * density)


def cdf(x):
    return 0.5 * (1 + erf(x / math.sqrt(2)))


def erf(x):
    return np.vectorize(math.erf, otypes=[float])(x)
