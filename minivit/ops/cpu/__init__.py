"""Twins on NumPy arrays: faster forwards and gradients, which run while recording for ``backward`` only.

Each file has the twins of the plain operations in the file of the same name. A twin computes the same numbers as the
plain operation; the plain text is the definition, the test suite holds the twin to it (``tests/test_ops.py``), and
``create_graph=True`` always uses the plain one. They are faster for four reasons: they work in place, on arrays of
their own; they keep what the gradient wants (a derivative, probabilities, 1/σ) instead of computing it again; sums over
rows and columns are products with a vector of ones (``sums.py``); and they skip the softmax's row maxima where no score
is large enough to overflow.

float16, which BLAS does not know and in which scores and squares overflow, is worked off in float32.
A twin's forward returns (out, kept); its gradient gets (g, kept, needs) and changes neither g nor what it did not make.
"""

from minivit.ops.cpu import activation, attention, conv, dropout, loss, matmul, normalize

__all__ = ["activation", "attention", "conv", "dropout", "loss", "matmul", "normalize"]
