"""Exercise 1: the chain rule, on single numbers

Everything that a framework's backward() does is in this exercise; the others only make the numbers into arrays.

HOW THE EXERCISES WORK

You write two functions. forward(x, …) computes a result. backward(g, x, …) is given the gradient that arrives at this
result from whatever comes after it, and returns the gradients at the arguments, in their order. Write g for it:

    g = ∂L/∂y     L is some number computed from y, such as the loss of a network; you never see it
    dx = ∂L/∂x    what you return, for every argument

g is called the cotangent. You cannot assume anything about it: the marks use random ones. Name your own intermediates
the same way: dv is ∂L/∂v, "what arrives at v".

backward is called by itself, and nothing that an earlier call left is there: what it needs of forward it must compute
again (as `recompute` does in large networks). Use NumPy (np.tanh, np.exp, …) and no other library. What your functions
print is shown with the first sample that is wrong.

All fifteen texts write alike: L for that unseen number, Σ_k for a sum over k, [k = j] for 1 if k = j and 0 if not,
δx for a small change of x; and in a shape, "…" for any number of leading axes, perhaps none.

WHAT IS GIVEN, WHAT IS ASKED

Three numbers x, w and b, and

    u = w·x + b
    v = tanh(u)
    y = v·(x + v)

    forward(x, w, b)      returns y
    backward(g, x, w, b)  returns dx, dw, db

THE CHAIN RULE

If L depends on v, and v depends on u, then a small change of u changes L by the product of the slopes:

    ∂L/∂u = ∂L/∂v · ∂v/∂u,     or   du = dv · (the local derivative of this step)                        (1)

So go from the result back to the arguments, step by step. At each step multiply what arrives by the local derivative.
The local derivative of tanh can be written with the value that you have already:

    tanh'(u) = 1 - tanh(u)² = 1 - v²                                                                     (2)

If L depends on x on several paths, as here, where x stands in u and once more in the last line, a small change of x
changes L on each of them, and the changes add up:

    dx = the sum, over every place where x is used, of what comes back from that place                   (3)

This is all there is: multiply along a path, add over paths. The order matters in one point only: before you go on from
v to u, everything that arrives at v must have arrived. v is used twice, too.

Draw it. Give the bracket a name, s = x + v, so that y = v·s. A circle for each of x, w, b, u, v, s, y, an arrow from
each number to the ones computed from it, and on every arrow its local derivative, the other numbers held fixed: on the
one from v to y, for instance, s. Then read ds, dv, du, dx, dw, db off the drawing, in this order.

THE TRAPS

    x is used in two places, v in two places: count the arrows that leave each circle.
    For u beyond 710, e^u is infinite (e^(2u) beyond 355). A tanh written with exponentials gives NaN there, or for
    large negative u, or both; NumPy's does not.
    y = v·(x + v) has v² in it, whose derivative in v is not v.

CHECKING WITHOUT AN ANSWER

A derivative can be measured. For a small h, (forward(x + h, w, b) - forward(x - h, w, b)) / (2h) is ∂y/∂x to about
ten digits (h = 1e-6). Better still, NumPy's functions take complex numbers, and for them

    imag(forward(x + 1e-30j, w, b)) / 1e-30                                                              (4)

is ∂y/∂x to all sixteen digits, as nothing is subtracted. Multiply by g and compare with your dx. The marks come from
gradients that are proven in this way. (Handed in as backward, (4) would be marked as right, for its numbers are. It is
the check and not the answer: it costs a forward pass for every single argument, a hundred million of them in a model.)

Check your work, in this folder:  minivit learn check . 1
Three hints, each says more than the one before:  minivit learn hint 1
"""

import numpy as np


def forward(x, w, b):
    """Return y, a number, of three numbers."""
    raise NotImplementedError("write me")


def backward(g, x, w, b):
    """Return dx, dw, db: the gradients in x, w and b of a loss whose gradient in y is g."""
    raise NotImplementedError("write me")
