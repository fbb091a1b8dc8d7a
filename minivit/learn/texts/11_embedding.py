"""Exercise 11: patches, class token, positions

A Transformer takes a sequence of vectors; an image is a grid of pixels. The Vision Transformer cuts the image into
patches, P pixels high and Q wide, that do not overlap, and multiplies each with one and the same matrix (Dosovitskiy
et al. 2020, arXiv 2010.11929, section 3.1, eq. 1):

    token 0       =  cls                       + positions[0]          the class token: learned, not from the image
    token 1 + n   =  patch(n)·Wᵀ + bias        + positions[1 + n]      n = 0 … N-1

WHAT IS GIVEN

    images (B, C, H, W): B images of C channels, H rows, W columns of pixels
    weight (D, C, P, Q): as a convolution keeps it, its shape says how large a patch is; P divides H and Q divides W
    bias (D,)
    cls (D,)
    positions (T, D), T = N + 1, N = (H/P)·(W/Q) patches

Two orders are conventions, and everybody must have the same ones or trained weights are noise:

- The patches are counted row by row, as one reads: with R = W/Q patches in a row, patch n is in row i = n // R and
  column j = n % R of the grid of patches: its pixels are images[b, :, i·P : (i+1)·P, j·Q : (j+1)·Q].
- Within a patch the order is (channel, row, column), the same as in weight[d]. So the number d of a token is the sum
  over all c, p, q of weight[d, c, p, q]·patch[c, p, q], plus bias[d].

WHAT IS ASKED

forward: the tokens, (B, T, D), class token first.
backward: for a cotangent g (B, T, D) the gradients of images, weight, bias, cls and positions, each of its own shape.

THE DERIVATION

1. Cutting without a loop. H is H/P blocks of P rows, W is W/Q blocks of Q columns. A reshape splits an axis in two
   and moves nothing in memory:

       (B, C, H, W) → (B, C, H/P, P, W/Q, Q)

   Now every axis has a meaning: image, channel, patch's row, row within, patch's column, column within. Bring them
   into the order (image | patch's row, patch's column | channel, row within, column within) by a transpose, and only
   then join the axes of each group by a reshape: (B, N, C·P·Q). The order in which axes stand when they are joined
   *is* the convention above. With weight as a matrix (D, C·P·Q) what is left is exercise 2.

2. Back through reshape and transpose. They move numbers and compute nothing: each pixel goes to exactly one place, so
   its gradient is the gradient of that place, carried back: the steps in reverse order, each undone. The inverse of a
   transpose by ``axes`` is the transpose by the permutation that undoes it, and that need not be the same one.

3. One rule for all the rest: *a number that is used many times gets the sum of what comes back from every use.* Count
   the uses, for B images of N patches:

       an entry of weight     in every patch of every image
       an entry of bias       in every patch of every image, but for the class token's row it is not used at all
       an entry of cls        once in every image
       an entry of positions  once in every image

   "Summed over", never "averaged over": if a mean is wanted the loss has taken it, and g holds the 1/B already.

4. So split g into g[:, 0] (B, D), which came from the class token's row, and g[:, 1:] (B, N, D), which came from the
   patches' rows. Who reads which of the two, or both? Write that down for all five and the shapes tell the sums.

TRAPS

- (B, C, H, W) → (B, N, C·P·Q) by one reshape has the right shape and is wrong: it takes runs of pixels along a row.
- Square images with square patches forgive mistaking rows for columns, at least in the shapes. Most samples are not
  square.
- weight's gradient is wanted as (D, C, P, Q), in weight's order.
- Nothing of g[:, 0] reaches bias, weight or the images.

TRY IT

One image, C = 1, 2 x 4 pixels 0 … 7, patches of 2 x 2: the patches are [0, 1, 4, 5] and [2, 3, 6, 7].
With weight and bias zero, every image has the same tokens, and token 0 is cls + positions[0].

Check your work, in this folder:  minivit learn check . 11
"""

import numpy as np


def forward(images, weight, bias, cls, positions):
    """Return the tokens (B, T, D) of images (B, C, H, W): the class token, then the patches; positions added.

    weight (D, C, P, Q), bias (D,), cls (D,), positions (T, D), T = 1 + (H/P)·(W/Q).
    """
    raise NotImplementedError("write me")


def backward(g, images, weight, bias, cls, positions):
    """Return (dimages, dweight, dbias, dcls, dpositions), each of the shape of its argument; g is (B, T, D)."""
    raise NotImplementedError("write me")
