"""The kernels of the twins, in cuTile Python: each file has those that the twins in the file of the same name launch.

A file holds factories: a function of constants (sizes, which are compiled in) that returns a kernel. Its files are
imported to compile a kernel only, where the package ``cuda-tile`` is: whoever launches one names it by file and factory
(:class:`minivit.backend.tile.Kernel`). They import ``cuda.tile``, ``math`` and each other, nothing else: a cubin is
found by a hash over their text.

The sides of a tile are powers of two, so a length such as 65 or 197 is cut into pieces (``tiles.pieces``).
"""
