"""Twins on CuPy arrays: forwards and gradients by kernels of our own, which run while recording for ``backward`` only.

Each file has the twins of the plain operations in the file of the same name, and the kernels that they launch are in
the file of the same name in ``kernels/``. A twin computes what the plain operation does, which is its definition and
what the tests hold it to. On arrays that no kernel serves it returns NotImplemented: then the plain operation runs.

A twin works on whichever arrays it gets, CuPy's or (while planning, see :func:`minivit.backend.tile.planning`) NumPy's:
it makes its own by ``array_module(x)``, and imports neither CuPy nor cuda.tile.
"""

from minivit.ops.cuda import activation, attention, dropout, loss, matmul, normalize, shape, verdict

__all__ = ["activation", "attention", "dropout", "loss", "matmul", "normalize", "shape", "verdict"]
