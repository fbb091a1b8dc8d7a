"""Matrix products of arrays: NumPy's own on the CPU, cuBLASLt's on CUDA.

An array of rows is, read in columns, its own transpose: the rows of D = A·B are the columns of Dᵀ = Bᵀ·Aᵀ. So b takes
the place of cuBLASLt's A and a that of its B, and nothing is moved.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.backend.choices import choose
from minivit.backend.cublaslt import TYPES, Matrix, Plan, Pointers, Spec, check, on_gpu
from minivit.backend.devices import Array, array_module, device_of, is_array
from minivit.backend.outline import product_shape
from minivit.backend.planning import is_on_gpu
from minivit.errors import ConfigError, DeviceError, DTypeError, ShapeError

_thread = threading.local()


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Let float32 matrix products of this thread, on CUDA, be ``"float32"`` or ``"tf32"`` in this block.

    With tf32 they run on tensor cores, which round what they multiply to 10 bits of mantissa; sums stay float32.
    """
    if precision not in ("float32", "tf32"):
        raise ConfigError(f"matrix products in {precision!r}", "give 'float32' or 'tf32'; other dtypes have their own")
    before = getattr(_thread, "precision", "float32")
    _thread.precision = precision
    try:
        yield
    finally:
        _thread.precision = before


def product(
    a: Array, b: Array, out: Array | None = None, *, bias: Array | None = None, onto: Array | None = None,
    add: bool = False,
) -> Array:  # fmt: skip
    """Return a·b + bias + onto: a (…, M, K), b (…, K, N) → (…, M, N), leading axes broadcast, a vector as in NumPy.

    ``bias`` is (N,), ``onto`` of the result's shape. ``out``, whose memory is none of a's and b's, is written to, or
    with ``add`` added to. On CUDA a and b are of float16, bfloat16, float32 or float64; sums are in float32, of float64
    in float64, and rounded once, to the dtype of ``out``: that of a and b, or float32. Views are taken as they are
    where one of the last two axes is contiguous and the leading ones run evenly, and copied elsewhere. Equal arguments
    give equal bits.

    While kernels are planned (:func:`minivit.backend.planning.planning`) nothing is computed.

    Raises ShapeError, DTypeError (integers; dtypes that differ), DeviceError (arrays on several devices; what
    cuBLASLt refuses).
    """
    if isinstance(a, np.ndarray):
        if is_on_gpu(a):  # planning: what the numbers are does not matter
            return np.empty(product_shape(a.shape, b.shape), a.dtype) if out is None else out
        return _on_cpu(a, b, out, bias, onto, add)
    if a.ndim < 2 or b.ndim < 2:
        return _of_vectors(a, b, out, bias, onto, add)
    if a.dtype.kind == "c":  # a gradient check's complex step: never captured
        return _on_cpu(a, b, out, bias, onto, add)
    _check(a, b, out, bias, onto, add)
    with a.device:
        return _on_cuda(a, b, out, bias, onto, add)


def square_sum(x: Array) -> Array:
    """Return Σx² of a flat array, 0-d. On CUDA by a reduction: a product of one row and one column has one block."""
    return x @ x if isinstance(x, np.ndarray) else (x * x).sum()


def _on_cpu(a: Array, b: Array, out: Any, bias: Any, onto: Any, add: bool) -> Array:
    if out is not None and out.dtype != a.dtype:
        a, b = a.astype(out.dtype), b.astype(out.dtype)
    made = a @ b
    for other in (bias, onto):
        if other is not None:
            made += other
    if out is None:
        return made
    if add:
        out += made
    else:
        out[...] = made
    return out


def _of_vectors(a: Array, b: Array, *others: Any) -> Array:
    if any(x is not None and x is not False for x in others):
        raise ShapeError(f"product: {a.shape} · {b.shape} with bias, onto or out", "reshape the vector to a matrix")
    if a.ndim < 1 or b.ndim < 1:
        raise ShapeError(f"product: {a.shape} · {b.shape}: a number is no matrix", "multiply by it: a * b")
    made = product(a if a.ndim > 1 else a[None], b if b.ndim > 1 else b[:, None])
    made = made if b.ndim > 1 else made[..., 0]  # (…, M, 1) → (…, M)
    return made if a.ndim > 1 else made[..., 0, :] if b.ndim > 1 else made[0]  # (…, 1, N) → (…, N)


@functools.cache
def _name(dtype: Any) -> str:
    return np.dtype(dtype).name  # which NumPy makes anew each time


def _lead(a: Array, b: Array) -> tuple[int, ...]:
    """Return the leading axes of a·b."""
    if a.ndim == b.ndim == 2:
        return ()
    try:
        return np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError as error:
        raise ShapeError(f"product: {a.shape} · {b.shape}: {error}", "leading axes broadcast") from error


def _check(a: Array, b: Array, out: Any, bias: Any, onto: Any, add: bool) -> None:
    """Raise unless the arrays fit each other."""
    for x in (b, out, bias, onto):
        if x is None or (type(x) is type(a) and x.device.id == a.device.id):
            continue
        if not is_array(x):
            raise DTypeError(f"product: one side is a {type(x).__name__}", "give arrays")
        if device_of(x) != device_of(a):
            what = f"product: {a.shape} is on {device_of(a)}, {x.shape} on {device_of(x)}"
            raise DeviceError(what, f"move one side: minivit.backend.to_device(array, {device_of(a)!r})")
    if _name(a.dtype) not in TYPES or b.dtype != a.dtype:
        what = f"product: {a.dtype}{a.shape} · {b.dtype}{b.shape}"
        raise DTypeError(what, f"on CUDA both sides are of one dtype of {', '.join(TYPES)}: convert with astype")
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"product: {a.shape} · {b.shape}", "the last axis of the left is the last but one of the right"
        )
    if add and (out is None or onto is not None):
        raise ConfigError("product: add=True adds to out, and to nothing else", "give out=, and no onto=")
    if out is not None and out.dtype != a.dtype and (a.dtype.itemsize != 2 or out.dtype != np.float32):
        raise DTypeError(f"product: {a.dtype} into {out.dtype}", f"give an out of {a.dtype}, or of half a float32 one")
    shape = (*_lead(a, b), a.shape[-2], b.shape[-1])
    for name, x, wanted in (("out", out, shape), ("onto", onto, shape), ("bias", bias, shape[-1:])):
        if x is not None and x.shape != wanted:
            raise ShapeError(f"product: {a.shape} · {b.shape} with {name} of {x.shape}", f"give one of {wanted}")


# ---- on CUDA ---------------------------------------------------------------------------------------------------------


class _Laid(NamedTuple):
    """How an array (…, R, C) lies: ``ld`` elements lead to the next row, ``stride`` to the next matrix.

    ``transposed``: it lies in columns, and ``ld`` leads to the next of these.
    """

    array: Array
    ld: int
    stride: int
    transposed: bool


def _on_cuda(a: Array, b: Array, out: Any, bias: Any, onto: Any, add: bool) -> Array:
    xp = array_module(a)
    lead = _lead(a, b)
    made = xp.empty((*lead, a.shape[-2], b.shape[-1]), a.dtype) if out is None else out
    if made.size == 0:
        return made
    if a.shape[-1] == 0:  # sums of nothing
        if not add:
            made[...] = 0.0
        return _add_apart(made, bias, onto)
    if (laid := _laid(made, lead)) is None or laid.transposed:  # cuBLASLt cannot write to it
        made[...] = _on_cuda(a, b, made.copy() if add else xp.empty(made.shape, made.dtype), bias, onto, add)
        return made
    if onto is not None and onto.dtype != made.dtype:
        onto = onto.astype(made.dtype)
    if onto is not None and onto.data.ptr == made.data.ptr:  # D is C if both lie alike, else neither may be the other
        onto, add = (None, True) if onto.strides == made.strides else (onto.copy(), add)
    if bias is not None:
        bias = xp.ascontiguousarray(bias.astype(made.dtype, copy=False))
    if b.ndim == 2 and a.ndim > 2 and made.flags.c_contiguous and all(map(_runs_evenly, (a, onto))):
        a, rows = a.reshape(-1, a.shape[-1]), made.reshape(-1, made.shape[-1])  # (…, M, K) → (rows, K): one product
        _multiply(a, b, rows, bias, None if onto is None else onto.reshape(rows.shape), add)
        return made
    _multiply(a, b, made, bias, onto, add)
    return made


def _add_apart(made: Array, bias: Any, onto: Any) -> Array:
    for other in (onto, bias):
        if other is not None:
            made += other.astype(made.dtype, copy=False)
    return made


def _even(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the stride at which axes can be walked as one, None if there is no such."""
    first, reach, count = None, 0, 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n == 1:
            continue
        if first is None:
            first = stride
        elif stride != reach:
            return None
        count *= n
        reach = count * first
    return first or 0


def _runs_evenly(x: Array | None) -> bool:
    return x is None or _even(x.shape[:-1], x.strides[:-1]) is not None


def _laid(x: Array, lead: tuple[int, ...]) -> _Laid | None:
    """Return how an array lies, its leading axes broadcast to ``lead``, or None if cuBLASLt cannot walk it."""
    missing = len(lead) - (x.ndim - 2)
    strides = [0] * missing + [0 if n == 1 else stride for n, stride in zip(x.shape[:-2], x.strides[:-2], strict=True)]
    size, stride = x.itemsize, _even(lead, strides)
    if stride is None or stride < 0 or stride % size:
        return None
    (rows, columns), (down, along) = x.shape[-2:], x.strides[-2:]
    for transposed, (outer, inner, far, near) in enumerate(
        ((rows, columns, down, along), (columns, rows, along, down))
    ):
        ld, rest = divmod(far, size) if outer > 1 else (inner, 0)  # of an axis of one place no stride means anything
        if (near == size or inner == 1) and not rest and ld >= inner:
            return _Laid(x, ld, stride // size, bool(transposed))
    return None


def _ready(x: Array, lead: tuple[int, ...], in_rows: bool = False) -> _Laid:
    """Return how an array lies, or a copy of it if cuBLASLt cannot walk it, or not ``in_rows``."""
    xp = array_module(x)
    for attempt in (lambda: x, lambda: x.copy(), lambda: xp.broadcast_to(x, (*lead, *x.shape[-2:])).copy()):
        if (found := _laid(attempt(), lead)) is not None and not (in_rows and found.transposed):
            return found
    raise AssertionError(f"a contiguous array of {x.shape} that cannot be walked")


def _alignment(array: Array) -> int:
    """Return the largest power of two, up to 256, that divides an array's address."""
    address = array.data.ptr
    return min(address & -address, 256)


def _matrix(x: _Laid, dtype_of: Array) -> Matrix:
    """Return an array (…, R, C) as cuBLASLt sees it, in columns: C × R, or if it is transposed R × C."""
    rows, columns = x.array.shape[-2:]
    within, across = (rows, columns) if x.transposed else (columns, rows)
    return Matrix(_name(dtype_of.dtype), within, across, x.ld, x.stride, _alignment(x.array), x.transposed)


def _multiply(a: Array, b: Array, made: Array, bias: Any, onto: Any, add: bool) -> None:
    """Write a·b + bias + onto to ``made``, which lies in rows; neither bias nor onto needs another dtype or shape."""
    lead = made.shape[:-2]
    left, right, to = _ready(a, lead), _ready(b, lead), _ready(made, lead)
    from_ = None if onto is None else _ready(onto, lead, in_rows=True)
    folded = None if made.dtype == np.float64 else bias  # cuBLASLt knows no bias of float64
    spec = Spec(
        a=_matrix(right, b),
        b=_matrix(left, a),
        c=None if from_ is None else _matrix(from_, made),
        d=_matrix(to, made),
        batch=math.prod(lead),
        compute=_compute(a),
        add=add,
        bias=0 if folded is None else _alignment(folded),
    )
    at = Pointers(
        a=right.array.data.ptr,
        b=left.array.data.ptr,
        c=(made if from_ is None else from_.array).data.ptr,
        d=made.data.ptr,
        bias=0 if folded is None else folded.data.ptr,
    )
    if _run(spec, at, made):
        if bias is not folded:
            made += bias
    elif folded is not None or onto is not None:  # it has no algorithm that adds them on the way
        _multiply(a, b, made, None, None, add)
        _add_apart(made, bias, onto)
    else:
        check(15, "cublasLtMatmulAlgoGetHeuristic", spec)


def _compute(a: Array) -> str:
    """Return the precision of the sums."""
    if a.dtype == np.float64:
        return "float64"
    return getattr(_thread, "precision", "float32") if a.dtype == np.float32 else "float32"


def _run(spec: Spec, at: Pointers, made: Array) -> bool:
    """Put a product on the current stream; return whether cuBLASLt has an algorithm for it."""
    import cupy

    gpu, stream = on_gpu(made.device.id), cupy.cuda.get_current_stream()
    plan, workspace = gpu.plan(spec), gpu.workspace(stream)
    if plan.chosen is None:
        choose(gpu, plan, stream, lambda: _trial(plan, at, made.dtype, workspace, stream.ptr))
    if plan.chosen is None:
        return False
    check(plan.run(plan.chosen, at, workspace, stream.ptr), "cublasLtMatmul", spec)
    return True


def _trial(plan: Plan, at: Pointers, dtype: Any, workspace: int, stream: int) -> Callable[[bytes], int]:
    """Return what runs a plan's algorithms on memory of its own instead of the output's."""
    import cupy

    d = plan.spec.d
    room = cupy.empty((plan.spec.batch - 1) * d.stride + (d.columns - 1) * d.ld + d.rows, dtype)
    elsewhere = at._replace(d=room.data.ptr, c=at.c if plan.spec.c else room.data.ptr)

    def run(algorithm: bytes, _keeps: Array = room) -> int:
        return plan.run(algorithm, elsewhere, workspace, stream)

    return run
