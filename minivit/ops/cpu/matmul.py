"""The twin of :mod:`minivit.ops.matmul`'s linear."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.ops.cpu.sums import column_sums
from minivit.ops.matmul import check_linear, linear


@linear.twin("cpu")
def _(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    check_linear(x, weight)
    rows = x.reshape(-1, x.shape[-1])  # (…, in) → (rows, in)
    out = rows @ weight.T  # → (rows, out)
    if bias is not None:
        out += bias
    return out.reshape(*x.shape[:-1], weight.shape[0]), (rows, weight, x.shape)


@linear.twin("cpu").vjp
def _(g: np.ndarray, kept: Any, needs: tuple[bool, ...]) -> Any:
    rows, weight, shape = kept
    g = g.reshape(-1, weight.shape[0])  # (…, out) → (rows, out)
    return (
        (g @ weight).reshape(shape) if needs[0] else None,
        g.T @ rows if needs[1] else None,
        column_sums(g) if needs[2] else None,
    )
