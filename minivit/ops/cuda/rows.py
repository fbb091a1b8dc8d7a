"""What the twins have in common: which arrays their kernels take, and how they see them, as rows."""

from __future__ import annotations

from minivit.backend import Array, array_module

DTYPES = ("float32", "float16", "bfloat16")
"""The numbers that kernels read and write; what they add up, they add up in float32."""


def serves(x: Array) -> bool:
    """Tell whether the kernels on rows take x: there are some numbers, of one of ``DTYPES``."""
    return x.size > 0 and x.dtype.name in DTYPES


def as_rows(x: Array) -> Array:
    """Return x (…, n) as rows (M, n) whose numbers lie side by side; a view where that can be."""
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1] if x.ndim else 1)
    return rows if rows.strides[-1] == rows.itemsize else array_module(x).ascontiguousarray(rows)


def power(n: int) -> int:
    """Return the least power of two that is not below n, from 1 on: the side of a tile."""
    return 1 << max(n - 1, 0).bit_length()
