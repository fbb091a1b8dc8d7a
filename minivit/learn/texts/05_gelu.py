"""Exercise 5: GELU, the exact one, and its gradient.

WHAT IS GIVEN, WHAT IS ASKED

x is an array of float64 of any shape. You write

    forward(x)        the activation of every number of x, an array of the same shape;
    backward(g, x)    the gradient in x, an array of the same shape.

Somewhere behind your function a scalar loss L is computed from its output. What comes back from there is the cotangent
g: one number ∂L/∂out[i] for every number of the output, so g has the output's shape. Asked is dx[i] = ∂L/∂x[i].

WHAT GELU IS

ReLU multiplies a number by 1 if it is positive, else by 0. GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415,
section 2) replaces that hard gate by a probability: a number x is multiplied by the chance that a standard normal
variable Z comes out below it,

    gelu(x) = x · Φ(x),        Φ(x) = P(Z ≤ x).

Far to the right the gate is open (gelu(x) ≈ x), far to the left it is shut (gelu(x) ≈ 0), at 0 it stands half open.
Between, the curve dips below zero: its lowest point is about -0.17, at x ≈ -0.75. It is the activation in the MLP of
every block of a ViT. Some models have a formula with tanh in its place, which was cheaper once. That is another
function, up to 5e-4 away, and not what is asked.

FROM THE DISTRIBUTION TO THE ERROR FUNCTION

Z has the density

    φ(t) = e^(-t²/2) / √(2π),        and        Φ(x) = ∫ φ(t) dt   from -∞ to x.

Libraries do not have Φ but the error function,

    erf(u) = 2/√π · ∫ e^(-s²) ds   from 0 to u,        which runs from -1 (far left) through 0 to 1 (far right).

The two are one function, shifted and stretched. φ is even and its whole integral is 1, so the half left of 0 is ½:

    Φ(x) = ½ + ∫ φ(t) dt   from 0 to x.

Substitute t = √2 · s, so that dt = √2 ds and t²/2 = s²:

    ∫ φ(t) dt   from 0 to x    =    √2/√(2π) · ∫ e^(-s²) ds   from 0 to x/√2.

Compare what is on the right with the definition of erf: a multiple of erf at some point. Which multiple, and at which
point, is yours to write; `erf` is given below. Hold your Φ against these:

    Φ(-∞) = 0        Φ(0) = ½        Φ(1) = 0.8413447460685429

GOING BACK

out[i] depends on x[i] and on no other number of x. The Jacobian ∂out[i]/∂x[j] is therefore diagonal, and the chain rule
has one term:

    dx[i] = Σ_j g[j] · ∂out[j]/∂x[i] = g[i] · gelu′(x[i]).

What remains is gelu′. x · Φ(x) is a product of two functions of x, and both of them change when x does. The product
rule asks for Φ′; that of an integral in its upper end is the integrand there (the fundamental theorem of calculus), so
you need not differentiate erf at all. Write gelu′ as one sum of two terms, and multiply by g.

What your gelu′ must do:

    gelu′(0) = ½        gelu′(1) = 1.0833154705876863        gelu′(x) + gelu′(-x) = 1 for every x
    → 1 far right, → 0 far left; it is larger than 1 between, most at x = √2, and negative left of -0.7518

TRAPS

- erf(x) is not Φ(x): it has another range, and another width.
- x stands twice in x · Φ(x). A gradient with one term has let one of them stand still.
- φ without its constant 1/√(2π) is not the derivative of Φ.
- The tanh formula has a derivative of its own, which is close to this one and is not it.
- g belongs to the product, element by element. Nothing is summed, and no shape changes.

LOOK AT IT YOURSELF

`erf` takes complex numbers, so that you can differentiate your own forward without a formula and without the digits
that a difference loses. For a function made of analytic pieces,

    f(x + ih) = f(x) + ih·f′(x) + O(h²),        so        f′(x) = Im f(x + ih) / h,

and as nothing is subtracted, h may be as small as 1e-20 and the result is right to the last digits (Squire and Trapp
1998, SIAM Review 40, 110-112):

    forward(np.array([0.5 + 1e-20j])).imag / 1e-20        against        backward(np.ones(1), np.array([0.5]))

Try it: "python -i 05_gelu.py" runs this file and leaves you at a prompt. It asks of forward to be analytic: no abs, no
comparison, no cast to float on the way. And it is the check, not the answer: the marks see numbers only, and cannot
tell a measured derivative from a derived one, but the formula is what you are here for.

Check your work, in this folder:  minivit learn check . 5
"""

import math

import numpy as np


def forward(x):
    """Return gelu(x) of every number: x (…) → (…), float64."""
    raise NotImplementedError("write me")


def backward(g, x):
    """Return dx = ∂L/∂x: g (…) the cotangent of forward(x), x (…) → (…), float64."""
    raise NotImplementedError("write me")


# ---- given: nothing to write below -----------------------------------------------------------------------------------


def erf(z):
    """Return the error function of every number of z: real ones to the last digit, complex ones to 1e-14.

    Real numbers go to the C library. Complex ones, meant to lie near the real axis, are summed:
    2/√π e^(-z²) Σ 2ⁿ z²ⁿ⁺¹ / (2n+1)!! (Abramowitz and Stegun 7.1.6).
    """
    z = np.asarray(z)
    if z.dtype.kind != "c":
        return np.vectorize(math.erf, otypes=[float])(z)
    inside = np.where(np.abs(z.real) < 6, z, 0)  # beyond 6, erf is ±1 to the last digit
    term = inside * (2 / math.sqrt(math.pi)) * np.exp(-inside * inside)
    total = term.copy()
    for n in range(1, 160):
        term = term * (2 * inside * inside / (2 * n + 1))
        total += term
    return np.where(np.abs(z.real) < 6, total, np.sign(z.real))
