"""Exercise 15: AdamW

Every Vision Transformer is trained with it. Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1) keeps, for every
single parameter, two running means: of the gradient (m, where is it going) and of its square (v, how large is it
usually). It steps by their ratio, which has no unit: a parameter whose gradients are all 1000 times larger moves just
as far. AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2) adds weight decay *beside* this machinery
and not through it.

WHAT IS GIVEN

    p, g, m, v: a parameter, its gradient g = ∂L/∂p, and the two means so far: arrays of one shape
    t: the number of this step. The first step has t = 1, and before it m and v are zero
    lr: the learning rate of this step       beta1, beta2: in [0, 1), usually 0.9 and 0.999
    eps: a small number, usually 1e-8        decay: the weight decay, usually 0.05 to 0.3 for ViTs

WHAT IS ASKED

step: (p, m, v) after the step, three new arrays. What you are given must not be changed.
run: p after several steps from the beginning: ``gradients`` (S, …) has the gradient of every step, and ``lrs`` (S,)
    the learning rate of every step. ``decays`` says whether this parameter takes part in the decay: biases, norms,
    class token and positions do not, by custom. If it is False, decay counts as 0.

THE DERIVATION

1. The running means, of old and new, new with the share 1 - β:

       m ← β1·m + (1 - β1)·g           v ← β2·v + (1 - β2)·g²          g² entry by entry

   Unrolled from m = 0, m after t steps is (1 - β1)·Σ_i β1^(t-i)·g_i.

2. The bias of a start at zero. The weights in that sum do not add up to 1: Σ_{i=1..t} (1 - β)·β^(t-i) is a geometric
   sum. Work it out: for t = 1 it is 1 - β, for t → ∞ it is 1. A mean has weights that add up to 1, so divide m, and v
   with its own β, by that sum: m̂ and v̂. What is *kept* for the next step are m and v themselves, not m̂ and v̂.
   With β2 = 0.999 the sum is 0.001 at the first step, so without this the first steps are 0.1/√0.001 ≈ 3 times too
   long.

3. The step of Adam is lr·m̂/(√v̂ + eps). eps stands beside the root: it is in units of the gradient, not of its
   square. It only matters where gradients are about as small as eps, and there the two places differ greatly.

4. Decay. To pull weights towards zero, one may add decay/2·‖p‖² to the loss, that is decay·p to the gradient ("L2").
   With plain gradient descent this multiplies p by (1 - lr·decay) in every step. With Adam it does not: the term goes
   into m and v and is divided by √v̂ like all the rest, so that weights with large gradients are hardly decayed at
   all. AdamW is what you get if the shrinking is done to p directly ("decoupled"), and m and v see the loss's
   gradient only:

       p ← (shrunk p) - (the step of Adam)

   Here, as in PyTorch and in minivit, the shrinking of one step is lr·decay of p, of the p from before the step. (In
   the paper's algorithm 2 the factor by which lr changes from step to step, its schedule, multiplies decay, but the
   base value of lr does not: the same thing with another unit.)

TRAPS

- t begins at 1. With 0 the first step divides by zero; with t + 1 it is a quarter too short.
- β1 belongs to m, β2 to v: in the means and in the corrections.
- ``m *= beta1`` changes the caller's array. So does ``p -= …``.
- In run: m and v live as long as the run does, and so does t.

TRY IT

One step from m = v = 0 with decay 0 and eps 0 moves every parameter by lr exactly, towards -sign(g), whatever β are.
With g = 0 and m = v = 0 only the decay is left (and 0/(0 + eps) is 0).

Check your work, in this folder:  minivit learn check . 15
"""

import numpy as np


def step(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    """Return (p, m, v) after step number t = 1, 2, …: three new arrays of the shape of p."""
    raise NotImplementedError("write me")


def run(p, gradients, lrs, beta1, beta2, eps, decay, decays):
    """Return p after len(gradients) steps from m = v = 0: gradients (S, …), lrs (S,), decays a bool."""
    raise NotImplementedError("write me")
