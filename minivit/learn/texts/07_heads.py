"""Exercise 7: features split into heads and merged again, and the gradients of both.

WHAT IS GIVEN, WHAT IS ASKED

One linear layer makes the queries, keys and values of all heads of attention at once. Its output is packed: each
token has 3·H·d numbers (H heads, each of width d). Attention wants them apart, and wants a (T, d) matrix for each
head of each image; afterwards the heads are put side by side again. You write four functions, all on float64:

    split(qkv, heads)              qkv (B, T, 3·H·d) → (3, B, H, T, d): entry 0 the queries, 1 the keys, 2 the values
    split_backward(g, qkv, heads)  g (3, B, H, T, d) → dqkv (B, T, 3·H·d)
    merge(x)                       x (B, H, T, d) → (B, T, H·d)
    merge_backward(g, x)           g (B, T, H·d) → dx (B, H, T, d)

Each returns one array (split, too: the three parts along its first axis). d is no argument: it is what is left,
qkv.shape[-1] // (3·H); with a single / it is a float, which reshape refuses. g is the cotangent, ∂L/∂out of a scalar
loss L. Nothing is computed here, numbers only move. It is where most hand-written attention goes wrong all the same,
for whatever is moved wrongly has the right shape.

WHERE WHICH NUMBER LIES

The layer (as in timm and PyTorch) gives a token first all queries, then all keys, then all values. Within the queries
come those of head 0, then those of head 1, …, and within a head its d numbers side by side. With p = 0, 1, 2 for
queries, keys, values, with head h and place i within the head, the feature's number is

    f = (p·H + h)·d + i.

For H = 2, d = 3 a token's 18 features are

    f      0 1 2   3 4 5 | 6 7 8   9 10 11 | 12 13 14   15 16 17
    p            0       |        1        |           2
    h        0       1   |    0       1    |     0          1

and split is said in one line: split(qkv, H)[p, b, h, t, i] = qkv[b, t, (p·H + h)·d + i].
merge packs in the same manner, without p: merge(x)[b, t, h·d + i] = x[b, h, t, i].

reshape AND transpose

NumPy numbers the entries of an array row by row: the last axis runs fastest. (reshape always goes by this numbering,
however the array lies in memory.)

- reshape keeps every number's place in that row and only cuts the row in another way. So it may cut one axis into
  several, or join neighbouring axes into one. The sizes are given slowest first: if entry h·3 + i of an axis of 6
  belongs to h and i, the axis is cut into (2, 3), and not into (3, 2), which also fits and means something else.
- reshape can never exchange two axes. transpose does, and only that: out = x.transpose(2, 0, 1) has as its axis 0 the
  old axis 2, as its axis 1 the old axis 0, as its axis 2 the old axis 1.

So splitting is: cut the axis of features, with the sizes in the order in which f counts; then bring the axes into the
order asked. Merging is: bring the axes into an order in which those to be joined are neighbours, the slow one first;
then join them.

GOING BACK

Every number of the output is one number of the input, at another place; every input number is used once. Write π(n) for
the place of input number n in the output: out[π(n)] = x[n]. Then

    ∂L/∂x[n] = Σ_m g[m] · ∂out[m]/∂x[n],

and of these derivatives one is 1 and all others are 0. Which one remains says what the gradient is: g itself, moved.
Number m of g goes back to the place that number m of the output came from: undo your steps, the last one first.

As a matrix, moving is a permutation M, and the gradient is Mᵀ·g. For a permutation Mᵀ = M⁻¹. This is the whole of it:
no number of g is changed, added to another, or lost. Two checks: split_backward(split(x, H), x, H) is x; and the sum of
g · out equals the sum of dx · x, for any g and x.

If you undo a transpose by another transpose, mind that the order which undoes it is not the same order again, but its
inverse: if axis 2 went to place 0, then place 0 must go back to axis 2. Only an exchange of two axes is its own
inverse.

TRAPS

- qkv.reshape(3, B, H, T, d) has the right shape and gives each head pieces of other tokens.
- Features cut as (H, 3, d) or (3, d, H) also have the right size.
- merge: x.reshape(B, T, H·d) has the right shape, too.
- g.reshape(qkv.shape) as a gradient has the right shape as well. None of these raises an error; with T = 1 or H = 1
  some of them are even right. Test with B, T, H, d all different.

Check your work, in this folder:  minivit learn check . 7
"""

import numpy as np


def split(qkv, heads):
    """Return queries, keys and values of every head: qkv (B, T, 3·H·d), heads = H → (3, B, H, T, d)."""
    raise NotImplementedError("write me")


def split_backward(g, qkv, heads):
    """Return dqkv: g (3, B, H, T, d) the cotangent of split's output, qkv (B, T, 3·H·d) → (B, T, 3·H·d)."""
    raise NotImplementedError("write me")


def merge(x):
    """Return the heads side by side: x (B, H, T, d) → (B, T, H·d)."""
    raise NotImplementedError("write me")


def merge_backward(g, x):
    """Return dx: g (B, T, H·d) the cotangent of merge's output, x (B, H, T, d) → (B, H, T, d)."""
    raise NotImplementedError("write me")
