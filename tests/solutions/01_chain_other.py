"""The lines in order, and back; tanh and its slope from exponentials that cannot overflow."""

import math


def tanh(u):
    e = math.exp(-2 * abs(u))
    return math.copysign((1 - e) / (1 + e), u)


def forward(x, w, b):
    v = tanh(w * x + b)
    return x * v + v**2


def backward(g, x, w, b):
    u = w * x + b
    v = tanh(u)
    s = x + v
    ds, dv = g * v, g * s
    dx, dv = ds, dv + ds
    e = math.exp(-2 * abs(u))
    du = dv * 4 * e / (1 + e) ** 2
    return [dx + w * du, x * du, du]
