"""Kernels of the activations: see ops/activation.py for the formulas."""

import math

import cuda.tile as ct

from minivit.ops.cuda.kernels.tiles import F32, LOG2E, load, over, store

PHI_SCALE = 1 / math.sqrt(2 * math.pi)
TANH_SCALE, TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715
# Φ(-t) ≈ e^(-t²/2) Σ tail[k]·q^(k+1), q = 1/(1 + bend·t), 0 ≤ t ≤ 13.6: fitted by least squares, reweighted until the
# largest relative error was least. It is 2.0e-8 for float32 and 2.9e-5, a hundredth of a unit of the last place of
# bfloat16, for the halves. The form is that of Abramowitz and Stegun 7.1.26, whose error is absolute.
EXACT_BEND = 0.345
EXACT_TAIL = (
    0.13761912699602893, 0.13802397717396367, 0.11721394559122117, 0.11190391494669433, -0.03786857351724187,
    0.18761537252094754, -0.27156762656834027, 0.14548681114147918, -0.028426958114805907,
)  # fmt: skip
HALF_BEND = 0.375
HALF_TAIL = (
    0.1490452185379708, 0.15788197439104995, 0.08309460955148862, 0.20088778328091972, -0.09091530360787912
)  # fmt: skip


def bell(t, exact):
    """Return e^(-t²/2) of t ≥ 0; of ``exact`` the rounding of t² is not seen in it.

    t = a + b, a a multiple of 1/16, whose square float32 holds: e^(-a²/2)·e^(-(t - a)(t + a)/2) (Cody 1969).
    """
    if exact:
        a = ct.floor(t * 16.0) * 0.0625
        return ct.exp(a * a * -0.5) * ct.exp((t - a) * (t + a) * -0.5)
    return ct.exp2(t * t * (-0.5 * LOG2E), flush_to_zero=True)


def normal(x, exact):
    """Return the standard normal distribution Φ(x), and e^(-x²/2)."""
    t = ct.minimum(ct.abs(x), 16.0)  # beyond it all is 0 or 1
    e = bell(t, exact)
    q = 1.0 / (1.0 + EXACT_BEND * t) if exact else over(1.0, 1.0 + HALF_BEND * t)
    tail = EXACT_TAIL if exact else HALF_TAIL
    total = tail[-1]
    for c in ct.static_iter(tail[-2::-1]):
        total = total * q + c
    beyond = e * (total * q)  # Φ(-t)
    return ct.where(x > 0.0, 1.0 - beyond, beyond), e


def tanh_form(x, exact):
    """Return (1 + tanh u)/2 = 1/(1 + e^-2u), u = √(2/π)(x + 0.044715x³), and 2 du/dx."""
    square = x * x
    v = x * (2 * TANH_SCALE + 2 * TANH_SCALE * TANH_CUBIC * square)  # 2u
    cdf = 1.0 / (1.0 + ct.exp(-v)) if exact else over(1.0, 1.0 + ct.exp2(v * -LOG2E))
    return cdf, 2 * TANH_SCALE + 6 * TANH_SCALE * TANH_CUBIC * square


def gelu_forward(tanh, exact, R, W):
    """y = x·Φ(x), or its tanh form, of x (M, N). Grid: (N / W, M / R)."""

    @ct.kernel
    def kernel(x, y):
        at = (ct.bid(1), ct.bid(0))
        u = load(x, at, (R, W), tma=False).astype(F32)
        cdf, _ = tanh_form(u, exact) if tanh else normal(u, exact)
        store(y, at, u * cdf, tma=False)

    return kernel


def gelu_backward(tanh, exact, rows, R, W):
    """dx = g·(Φ(x) + x·φ(x)), or of the tanh form; partials (rows, N), sums of its columns. Grid: (N / W, rows)."""

    @ct.kernel
    def kernel(g, x, dx, partials):
        j, total = ct.bid(0), ct.zeros((R, W), F32)
        for i in range(ct.bid(1), ct.num_tiles(x, 0, (R, W)), rows):
            u, d = load(x, (i, j), (R, W), tma=False).astype(F32), load(g, (i, j), (R, W), tma=False).astype(F32)
            if tanh:
                cdf, slope = tanh_form(u, exact)
                d = d * (cdf + u * cdf * (1.0 - cdf) * slope)
            else:
                cdf, e = normal(u, exact)
                d = d * (cdf + u * e * PHI_SCALE)
            store(dx, (i, j), d, tma=False)
            total = total + d
        store(partials, (ct.bid(1), j), ct.sum(total, 0, keepdims=True), tma=False)  # (R, W) → (1, W)

    return kernel
