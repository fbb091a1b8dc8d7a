"""Exercise 4: cross-entropy from logits, with label smoothing

The loss that classifiers are trained with. Its gradient is the first thing that flows back into a network, and it is
the simplest in this ladder, once the logarithm and the softmax are taken together.

WHAT IS GIVEN, WHAT IS ASKED

    logits     (…, K)  a row of K numbers for each image (or token), along any leading axes, perhaps none
    labels     (…)     whole numbers from 0 to K-1: the class of each row
    smoothing  number  α, from 0 up, below 1; 0 is no smoothing
    loss       ()      loss = forward(logits, labels, smoothing), one number: a mean over all rows
    g          ()      the cotangent, ∂L/∂loss: a loss may be part of a larger one, L, or be scaled, as in training in
                       float16
    dlogits    (…, K)  dlogits = backward(g, logits, labels, smoothing)

For each row a target distribution t over the classes: the label's class gets 1 - α, and then all K classes, the
label's among them, get α/K more (Szegedy et al. 2015, arXiv 1512.00567, section 7):

    t_k = (1 - α)·[k = label] + α/K,        Σ_k t_k = 1            ([…] is 1 if true, else 0)

With p = softmax(logits) of the row, the row's loss and the loss are

    ℓ = -Σ_k t_k log p_k,                   loss = the mean of ℓ over all rows                            (1)

THE FORWARD PASS, AND ITS TRAP

Computed as it stands, (1) fails where it matters most. If the network is surely wrong, the label's logit is, say, 900
below another's. Then p_label = e^(-900), which is 0 in float64, and -log 0 is infinite, while the true loss is 900.
(1e-12 added inside the logarithm, or p clipped there, is no way out: it makes 28 of the 900.)
So take the logarithm on paper, where e^ and log cancel:

    log p_k = x_k - log Σ_j e^(x_j)                                                                       (2)

and the sum is safe with the shift of exercise 3: with c the largest x of the row,

    log Σ_j e^(x_j) = c + log Σ_j e^(x_j - c)

THE BACKWARD PASS

There are two ways. The long one takes the gradient in p, ∂ℓ/∂p_k = -t_k/p_k, through the softmax of exercise 3; it
divides by p, which may be 0. The short one puts (2) into (1):

    ℓ = -Σ_k t_k x_k + (Σ_k t_k) · log Σ_j e^(x_j)                                                        (3)

Take the derivative of (3) in x_j. You need

    ∂/∂x_j log Σ_i e^(x_i) = e^(x_j) / Σ_i e^(x_i)

and that fraction has a name. What remains is a line with two terms. Then one row of the loss is not the whole loss:
how often does the row's ℓ count in the mean, and what arrives from outside?

TWO THINGS TO CHECK BY HAND

    Σ_j dlogits_j = 0 in every row: adding a number to all logits of a row changes nothing.
    Where the prediction equals the target, the gradient is 0: that is when training has nothing left to do.

THE TRAPS

    logits[labels] picks rows; logits[:, labels] picks a column for every label. One entry of each row, along any
    leading axes, is np.take_along_axis(logits, labels[..., None], axis=-1), or a target array made by comparing.
    With two leading axes, (images, tokens, K), the mean is over images · tokens rows.
    A mean without axis= is over the classes as well.

Check your work, in this folder:  minivit learn check . 4
"""

import numpy as np


def forward(logits, labels, smoothing):
    """Return the loss, a number, of logits (…, K), labels (…) and smoothing in [0, 1)."""
    raise NotImplementedError("write me")


def backward(g, logits, labels, smoothing):
    """Return dlogits (…, K), the gradient of a loss whose gradient in the result of forward is the number g."""
    raise NotImplementedError("write me")
