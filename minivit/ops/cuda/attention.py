"""The twins of :mod:`minivit.ops.attention`, whose gradients make the softmax again."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit.backend import Array, Key, array_module, tile
from minivit.ops.attention import attention, check_heads, check_inputs, self_attention
from minivit.ops.cuda import sums
from minivit.ops.cuda.rows import power

HEADS = (16, 32, 64, 80, 128)
"""The lengths of a head that there are kernels for."""

LONGEST = 1024  # tokens
AT_HAND = 256  # the longest sequence all of whose scores one program holds

_FORWARD = tile.Kernel("attention", "attention_forward")
_FORWARD_LONG = tile.Kernel("attention", "attention_forward_long")
_BACKWARD = tile.Kernel("attention", "attention_backward")
_BACKWARD_QUERIES = tile.Kernel("attention", "attention_backward_queries")
_BACKWARD_KEYS = tile.Kernel("attention", "attention_backward_keys")


def _height(rows: int, most: int) -> int:
    """Return how many of so many rows a tile has, a power of two from 16 on."""
    return min(most, max(16, power(rows)))


class _Plan:
    """Which kernels a head of a size is worked through by, with what constants and hints; launches them.

    The hints are those by which nothing is kept outside the registers, as ``cuobjdump -res-usage`` tells for sm_90.
    """

    def __init__(self, shape: tuple[int, ...], queries: int, scale: float) -> None:
        b, t, _, heads, d = shape
        self.scale, self.queries = scale, queries
        self.qkv_shape, self.out_shape = shape, (b, queries, heads, d)
        self.lse_shape, self.sums_shape = (b, heads, queries), (1, sums.ROWS, 3, heads, d)
        n = _height(t, 64)
        self.forward_kernel = _FORWARD if t <= AT_HAND else _FORWARD_LONG
        light = t <= 128 and d <= 64 and n > 16
        self.forward_constants = {"T": t, "d": d, "n": n, "hints": {"occupancy": 4 if light else 2}}
        self.forward_grid = (-(-queries // n), heads, b)
        # one kernel holds dK and dV of a whole head; where that is too much dQ has one, and a piece of the keys another
        self.in_one = (t <= 64 and d <= 64) or (t <= 128 and d == 64)
        rows = 128 if self.in_one and queries > 64 else n
        many = t > 64 or n == (16 if self.in_one else 64)
        hints = {"num_worker_warps": 8} if many else {"occupancy": 2}
        self.backward_constants = {"T": t, "d": d, "queries": queries, "n": rows, "hints": hints}
        m = _height(t, 64)
        hints = {"num_worker_warps": 8} if d == 32 else {"occupancy": 2}
        self.keys_constants = {"d": d, "queries": queries, "n": n, "m": m, "hints": hints}
        self.keys_grid = (-(-t // m), heads, b)

    def ready(self, qkv: Array) -> bool:
        """Tell whether all kernels are there."""
        qkv, like, lse = self._split(qkv), tile.Like(qkv.dtype, self.out_shape), tile.Like(np.float32, self.lse_shape)
        grad, partials = tile.Like(qkv.dtype, self.qkv_shape), tile.Like(np.float32, self.sums_shape)
        rows = qkv[:, : self.queries]
        return self.forward_kernel.ready(rows, qkv, like, lse, self.scale, **self.forward_constants) and all(
            kernel.ready(*arguments, self.scale, **constants)
            for kernel, _, arguments, constants in self._backward(qkv, like, lse, like, grad, lse, partials)
        )

    def forward(self, qkv: Array) -> tuple[Array, Array]:
        """Return o (B, queries, H·d) and lse (B, H, queries)."""
        xp, qkv = array_module(qkv), self._split(qkv)
        out, lse = xp.empty(self.out_shape, qkv.dtype), xp.empty(self.lse_shape, np.float32)
        arguments = (qkv[:, : self.queries], qkv, out, lse, self.scale)
        self.forward_kernel(self.forward_grid, *arguments, **self.forward_constants)
        return out.reshape(*self.out_shape[:2], -1), lse  # (B, queries, H, d) → (B, queries, H·d)

    def backward(self, qkv: Array, out: Array, lse: Array, g: Array) -> Array:
        """Return the gradient of qkv, of whose columns partial sums are noted."""
        xp = array_module(qkv)
        grad = xp.empty(qkv.shape, qkv.dtype)
        delta = lse if self.in_one else xp.empty(self.lse_shape, np.float32)
        partials = sums.partial(grad, qkv.shape[2]).reshape(self.sums_shape)  # (ROWS, 3·H·d) → (1, ROWS, 3, H, d)
        out, g = out.reshape(self.out_shape), xp.ascontiguousarray(g).reshape(self.out_shape)
        arrays = (self._split(qkv), out, lse, g, self._split(grad), delta, partials)
        for kernel, grid, arguments, constants in self._backward(*arrays):
            kernel(grid, *arguments, self.scale, **constants)
        return grad

    def _split(self, qkv: Array) -> Array:
        return qkv.reshape(self.qkv_shape)  # (B, T, 3·H·d) → (B, T, 3, H, d)

    def _backward(self, qkv: Any, out: Any, lse: Any, g: Any, grad: Any, delta: Any, partials: Any) -> list[Any]:
        """Return (kernel, grid, arrays, constants) of each kernel of the gradient."""
        rows, grid = qkv[:, : self.queries], (self.qkv_shape[3], sums.ROWS)
        if self.in_one:
            return [(_BACKWARD, grid, (rows, qkv, out, lse, g, grad, partials), self.backward_constants)]
        first, second = (rows, qkv, out, lse, g, grad, delta, partials), (rows, qkv, lse, g, delta, grad)
        return [
            (_BACKWARD_QUERIES, grid, first, self.backward_constants),
            (_BACKWARD_KEYS, self.keys_grid, second, self.keys_constants),
        ]


def _plan(shape: tuple[int, ...], like: Array, queries: int, mask: Any, scale: Any, dropout: float) -> _Plan | None:
    """Return how queries, keys and values (B, T, 3, H, d), as many and of a dtype ``like``, are worked on, or None."""
    b, t, _, _, d = shape
    served = like.dtype.name in ("float16", "bfloat16") and d in HEADS and t <= LONGEST
    scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
    if not served or mask is not None or dropout > 0 or scale <= 0 or not 0 < b < 1 << 16:
        return None
    return _Plan(shape, queries, scale)


@self_attention.twin("cuda")
def _(
    qkv: Array, heads: int, queries: int | None, mask: Any, scale: float | None, dropout: float, key: Key | None
) -> Any:
    check_heads(qkv, heads, queries)
    b, t, features = qkv.shape
    plan = _plan(
        (b, t, 3, heads, features // (3 * heads)), qkv, t if queries is None else queries, mask, scale, dropout
    )
    if plan is None:
        return NotImplemented
    qkv = array_module(qkv).ascontiguousarray(qkv)
    if not plan.ready(qkv):
        return NotImplemented
    out, lse = plan.forward(qkv)
    return out, (plan, qkv, out, lse)


@self_attention.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    plan, qkv, out, lse = kept
    return (plan.backward(qkv, out, lse, g),)


@attention.twin("cuda")
def _(q: Array, k: Array, v: Array, mask: Any, scale: float | None, dropout: float, key: Key | None) -> Any:
    check_inputs(q, k, v, mask, dropout, key)
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or not 0 < q.shape[2] <= k.shape[2]:
        return NotImplemented
    b, heads, t, d = k.shape
    plan = _plan((b, t, 3, heads, d), q, q.shape[2], mask, scale, dropout)
    if plan is None:
        return NotImplemented
    qkv = array_module(q).empty((b, t, 3 * heads * d), q.dtype)  # as the kernels read it
    if not plan.ready(qkv):
        return NotImplemented
    parts = qkv.reshape(plan.qkv_shape)  # → (B, T, 3, H, d); queries that are not asked are not read
    for i, x in enumerate((q, k, v)):
        parts[:, : x.shape[2], i] = x.swapaxes(1, 2)  # (B, H, T, d) → (B, T, H, d)
    out, lse = plan.forward(qkv)
    return out.reshape(plan.out_shape).swapaxes(1, 2), (plan, qkv, out, lse)  # (B, T, H, d) → (B, H, T, d)


@attention.twin("cuda").vjp
def _(g: Array, kept: Any, needs: tuple[Any, ...]) -> Any:
    plan, qkv, out, lse = kept
    grad = plan.backward(qkv, out, lse, g.swapaxes(1, 2)).reshape(plan.qkv_shape)  # (B, T, 3, H, d)
    q, k, v = (grad[:, :, i].swapaxes(1, 2) for i in range(3))  # → (B, H, T, d) each
    return q[:, :, : plan.queries], k, v
