"""Twins on CuPy arrays: forwards and gradients by kernels of our own, in three layers of files of one name.

    ops/activation.py               the plain operation, its definition and its proven gradient, on any arrays
    ops/cuda/activation.py          its twin: sees whether kernels serve these arrays, makes the outputs, launches
    ops/cuda/kernels/activation.py  the kernels, in cuTile Python: what one program does with its tiles

A twin computes what the plain operation does, and the tests hold it to that. It runs while recording for ``backward``
under ``first_order()`` only, as in a TrainStep. It asks whether the kernels of its forward *and* of its gradient are
``ready``; where one does not serve these arrays, or cannot be had, it returns NotImplemented, and the plain operation
runs. It works on whichever arrays it gets, CuPy's or, while planning (backend/planning.py), NumPy's: it makes its own
by ``array_module(x)``, and imports neither CuPy nor cuda.tile.

Some files have no twins: rows.py what they share, sums.py the sums of columns that a step makes all at once; update.py
and verdict.py do in one launch what the text in train/ does in many, and where they cannot they return False or None:
then that text runs.
"""

from minivit.ops.cuda import activation, attention, dropout, loss, matmul, normalize, shape, verdict

__all__ = ["activation", "attention", "dropout", "loss", "matmul", "normalize", "shape", "verdict"]
