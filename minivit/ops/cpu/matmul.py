"""The twin of :mod:`minivit.ops.matmul`'s linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.ops.cpu.sums import column_sums
from minivit.ops.matmul import as_matrix, check_linear, linear


@linear.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, onto: np.ndarray | None) -> Any:
    shape, weight = weight.shape, as_matrix(weight)  # (out, …) → (out, in)
    check_linear(x, weight, onto)
    rows = x.reshape(-1, x.shape[-1])  # (…, in) → (rows, in)
    out = rows @ weight.T  # → (rows, out)
    if bias is not None:
        out += bias
    out = out.reshape(*x.shape[:-1], weight.shape[0])  # (rows, out) → (…, out)
    if onto is not None:
        out += onto
    return out, (rows, weight, x.shape, shape)


@linear.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    rows, weight, shape, weight_shape = kept
    g_rows = g.reshape(-1, weight.shape[0])  # (…, out) → (rows, out)
    return (
        (g_rows @ weight).reshape(shape) if needs[0] else None,
        (g_rows.T @ rows).reshape(weight_shape) if needs[1] else None,
        column_sums(g_rows) if needs[2] else None,
        g,
    )
