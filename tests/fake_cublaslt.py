"""A stand-in for the library cuBLASLt, so that minivit's matrix products on CUDA run on machines without a GPU.

Its functions are C functions: they get what ctypes hands over, and nothing else. A product reads the descriptors,
layouts and addresses that it was given, and computes with NumPy on the memory of strict.py's arrays. What the real
library refuses, it refuses: a leading dimension that is too small, dtypes that do not go together, memory that is less
aligned than was promised, a workspace that is too small. What the real one does without a word, to read or write beyond
an array, it refuses as well; ``refused`` says why.

One product is one launch, ``cublasLtMatmul``, and captured like any other. How a test uses it: ``strict_cupy`` has
brought it along, as ``strict_cupy.cublaslt``.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minivit.backend import cublaslt
from tests import strict

TYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float64), 2: np.dtype(np.float16), 14: np.dtype(ml_dtypes.bfloat16)}
HALF = (2, 14)
F32, F64 = 0, 1
COMPUTE_32F, COMPUTE_64F, COMPUTE_TF32 = 68, 70, 77
INVALID_VALUE, NOT_SUPPORTED = 7, 15
MAGIC = 0x6375424C41534C74  # "cuBLASLt"


class Refusal(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


def refuse_if(wrong: bool, why: str, status: int = INVALID_VALUE) -> None:
    if wrong:
        raise Refusal(status, why)


class FakeCublasLt:
    """The library. ``candidates`` is how many algorithms a search finds; products are listed in ``calls``."""

    def __init__(self) -> None:
        self.candidates, self.version = 1, 130000
        self.unsupported: Callable[[Any], bool] = lambda product: False  # of which the search finds nothing
        self.calls: list[SimpleNamespace] = []
        self.refused: list[str] = []
        self.searches = 0
        self._objects: dict[int, SimpleNamespace] = {}
        self._ids = itertools.count(0x1000)
        for name, types in cublaslt.FUNCTIONS.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *types)(self._guarded(getattr(self, f"_{name}"))))

    def cublasLtGetVersion(self) -> int:
        return self.version

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., int]:
        def call(*args: Any) -> int:
            try:
                function(*args)
            except Refusal as refusal:
                self.refused.append(str(refusal))
                return refusal.status
            except Exception as error:  # none may leave a C function
                self.refused.append(f"{type(error).__name__}: {error}")
                return 14
            return 0

        return call

    # ---- objects and their attributes ----

    def _create(self, place: int, **attributes: Any) -> None:
        number = next(self._ids)
        self._objects[number] = SimpleNamespace(**attributes)
        ctypes.c_void_p.from_address(place).value = number

    def _object(self, number: int | None) -> SimpleNamespace:
        refuse_if(number not in self._objects, "an object that was not created")
        return self._objects[number or 0]

    def _cublasLtCreate(self, place: int) -> None:
        self._create(place)

    def _cublasLtMatmulDescCreate(self, place: int, compute: int, scale: int) -> None:
        self._create(place, compute=compute, scale=scale, values={3: 0, 4: 0, 7: 1, 8: 0})

    def _cublasLtMatrixLayoutCreate(self, place: int, type_: int, rows: int, columns: int, ld: int) -> None:
        refuse_if(type_ not in TYPES, f"the type {type_}")
        refuse_if(rows < 1 or columns < 1 or ld < rows, f"a matrix of {rows} × {columns} with ld {ld}")
        self._create(place, type=type_, rows=rows, columns=columns, ld=ld, values={5: 1, 6: 0})

    def _cublasLtMatmulPreferenceCreate(self, place: int) -> None:
        self._create(place, values={1: 0, 3: 7, 5: 256, 6: 256, 7: 256, 8: 256})

    def _set(self, sizes: dict[int, Any], number: int, attribute: int, buffer: int, size: int) -> None:
        kind = sizes.get(attribute)
        refuse_if(kind is None or ctypes.sizeof(kind) != size, f"attribute {attribute} of {size} bytes")
        self._object(number).values[attribute] = kind.from_address(buffer).value  # type: ignore[union-attr]

    def _cublasLtMatmulDescSetAttribute(self, *args: Any) -> None:
        self._set({3: ctypes.c_int32, 4: ctypes.c_int32, 7: ctypes.c_uint32, 8: ctypes.c_uint64}, *args)

    def _cublasLtMatrixLayoutSetAttribute(self, *args: Any) -> None:
        self._set({5: ctypes.c_int32, 6: ctypes.c_int64}, *args)

    def _cublasLtMatmulPreferenceSetAttribute(self, *args: Any) -> None:
        self._set({1: ctypes.c_uint64, **dict.fromkeys((3, 5, 6, 7, 8), ctypes.c_uint32)}, *args)

    # ---- algorithms ----

    def _fit(self, descriptor: int, *layouts: int) -> SimpleNamespace:
        """Return a product's descriptors, if they fit each other."""
        p, (a, b, c, d) = self._object(descriptor), map(self._object, layouts)
        transposed_a, transposed_b, epilogue = (p.values[i] for i in (3, 4, 7))
        m, k = (a.columns, a.rows) if transposed_a else (a.rows, a.columns)
        kb, n = (b.columns, b.rows) if transposed_b else (b.rows, b.columns)
        shapes = ((d.rows, d.columns), (c.rows, c.columns))
        refuse_if(k != kb or any(shape != (m, n) for shape in shapes), f"{m} × {k} · {kb} × {n} → {shapes}")
        refuse_if(len({x.values[5] for x in (a, b, c, d)}) != 1, "batches of several sizes")
        batch = d.values[5]
        refuse_if(batch > 1 and d.values[6] < d.ld * (n - 1) + m, "matrices of the output lie in each other")
        types = (p.compute, p.scale, a.type, b.type, c.type, d.type)
        half = (
            a.type in HALF and types == (COMPUTE_32F, F32, a.type, a.type, d.type, d.type) and d.type in (a.type, F32)
        )
        known = half or types in ((COMPUTE_32F, *[F32] * 5), (COMPUTE_TF32, *[F32] * 5), (COMPUTE_64F, *[F64] * 5))
        refuse_if(not known, f"dtypes {types}", NOT_SUPPORTED)
        refuse_if(epilogue not in (1, 4) or (epilogue == 4 and d.type == F64), f"epilogue {epilogue}", NOT_SUPPORTED)
        return SimpleNamespace(
            p=p, a=a, b=b, c=c, d=d, m=m, n=n, k=k, batch=batch, transposed=(transposed_a, transposed_b)
        )

    def _cublasLtMatmulAlgoGetHeuristic(
        self, handle: int, descriptor: int, a: int, b: int, c: int, d: int, preference: int, wanted: int, found: int,
        count: Any,
    ) -> None:  # fmt: skip
        self._object(handle)
        self.searches += 1
        product, limits = self._fit(descriptor, a, b, c, d), self._object(preference).values
        refuse_if(self.unsupported(product), "nothing for this product", NOT_SUPPORTED)
        refuse_if(limits[3] & 1 == 1, "a reduction in place, in the dtype of the output")
        address = product.p.values[8]  # of the bias: the library reads from it how it will be aligned
        refuse_if(product.p.values[7] == 4 and not address, "a bias without an address")
        bias = min(address & -address, 256)
        for i in range(min(self.candidates, wanted)):
            place = cublaslt.Candidate.from_address(found + i * ctypes.sizeof(cublaslt.Candidate))
            index = i + (bias << 8)
            place.algorithm = (MAGIC, index, 2 * (i % 2), 4096 * i, limits[5], limits[6], limits[7], limits[8])
            place.workspace, place.state = 4096 * i, 0
        count[0] = min(self.candidates, wanted)

    def _algorithm(self, place: int) -> tuple[int, ...]:
        words = tuple((ctypes.c_uint64 * 8).from_address(place))
        refuse_if(words[0] != MAGIC or words[1] & 0xFF >= 8, "an algorithm that is none")
        return words

    def _cublasLtMatmulAlgoCheck(
        self, handle: int, descriptor: int, a: int, b: int, c: int, d: int, algorithm: int, result: Any
    ) -> None:
        self._fit(descriptor, a, b, c, d)
        result[0].workspace = self._algorithm(algorithm)[3]

    def _cublasLtMatmulAlgoConfigGetAttribute(
        self, algorithm: int, attribute: int, buffer: int, size: int, written: Any
    ) -> None:
        refuse_if((attribute, size) != (3, 4), f"attribute {attribute} of {size} bytes")
        ctypes.c_uint32.from_address(buffer).value = self._algorithm(algorithm)[2]
        written[0] = 4

    # ---- the product ----

    def _cublasLtMatmul(
        self, handle: int, descriptor: int, alpha: int, a: int, la: int, b: int, lb: int, beta: int, c: int, lc: int,
        d: int, ld: int, algorithm: int, workspace: int | None, workspace_size: int, stream: int | None,
    ) -> None:  # fmt: skip
        self._object(handle)
        product = self._fit(descriptor, la, lb, lc, ld)
        words = self._algorithm(algorithm)
        refuse_if(words[3] > 0 and (not workspace or workspace_size < words[3]), "too small a workspace")
        refuse_if((stream or 0) != strict.cupy.cuda.get_current_stream().ptr, "another stream than the current one")
        for address, alignment, name in zip((a, b, c, d), words[4:], "ABCD", strict=True):
            refuse_if(address % alignment != 0, f"{name} at {address} is not aligned to {alignment} bytes")
        scalar = ctypes.c_double if product.p.scale == F64 else ctypes.c_float
        beta_value = scalar.from_address(beta).value
        refuse_if(scalar.from_address(alpha).value != 1.0 or beta_value not in (0.0, 1.0), "alpha, beta")
        refuse_if(beta_value == 1.0 and c == d and lc != ld and _differ(product.c, product.d), "C is D, laid out anew")
        left, right, into = (
            self._memory(x, at, product.batch) for x, at in ((product.a, a), (product.b, b), (product.d, d))
        )
        added = self._memory(product.c, c, product.batch) if beta_value else None
        bias = None
        if product.p.values[7] == 4:
            vector = SimpleNamespace(type=product.d.type, rows=product.m, columns=1, ld=product.m, values={6: 0})
            bias = self._memory(vector, product.p.values[8], 1)
            refuse_if(product.p.values[8] % (words[1] >> 8) != 0, "a bias that is not aligned as was promised")
        read = [x for x in (left, right, added, bias) if x is not None]
        strict.launch("cublasLtMatmul", lambda: _multiply(product, left, right, added, bias, into), read, [into])
        self.calls.append(
            SimpleNamespace(
                m=product.m, n=product.n, k=product.k, batch=product.batch, compute=product.p.compute,
                algorithm=words[1] & 0xFF, transposed=product.transposed, types=(product.a.type, product.d.type),
                beta=beta_value, bias=bias is not None, c_is_d=c == d, into=d, workspace=workspace, stream=stream or 0,
            )
        )  # fmt: skip

    def _memory(self, layout: Any, address: int | None, batch: int) -> SimpleNamespace:
        """Return a batch of matrices in memory, (batch, columns, rows), as far as they lie in one array's memory."""
        array = strict.addressed.get(address or 0)
        refuse_if(array is None, f"{address}: no array that is alive was asked for this address")
        assert array is not None
        owner = array._host
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        dtype = TYPES[layout.type]
        shape = (batch, layout.columns, layout.rows)
        strides = (layout.values[6] * dtype.itemsize, layout.ld * dtype.itemsize, dtype.itemsize)
        start = array._host.ctypes.data
        size = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + dtype.itemsize
        end = owner.ctypes.data + owner.nbytes
        refuse_if(start + size > end, f"{size} bytes, of which {start + size - end} are beyond an array {array.shape}")
        raw = (ctypes.c_char * size).from_address(start)
        view = np.ndarray(shape, dtype, buffer=raw, strides=strides)
        return SimpleNamespace(_host=view, _device=array._device, _block=array._block, keeps=owner)


def _differ(c: Any, d: Any) -> bool:
    return (c.ld, c.values) != (d.ld, d.values)


def _rounded(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers with the 10 bits of mantissa that TF32 has."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def _multiply(product: Any, left: Any, right: Any, added: Any, bias: Any, into: Any) -> None:
    """Compute Dᵀ = op(B)ᵀ·op(A)ᵀ, which is how NumPy sees it: so the bits are those of NumPy's own product."""
    wide = np.float64 if product.p.compute == COMPUTE_64F else np.float32
    # memory is (batch, columns, rows), already each matrix's transpose
    a, b = (
        (x._host.swapaxes(1, 2) if transposed else x._host).astype(wide, copy=False)
        for x, transposed in zip((left, right), product.transposed, strict=True)
    )
    if product.p.compute == COMPUTE_TF32:
        a, b = _rounded(a), _rounded(b)
    made = b @ a if product.batch > 1 else (b[0] @ a[0])[None]  # (batch, n, k) · (batch, k, m)
    if bias is not None:
        made += bias._host[0, 0].astype(wide)
    if added is not None:
        made += added._host.astype(wide)
    into._host[...] = made.astype(into._host.dtype)


def install(patch: pytest.MonkeyPatch) -> FakeCublasLt:
    """Put the stand-in into the library's place, where nothing has been multiplied yet."""
    library = FakeCublasLt()
    patch.setattr(cublaslt, "load", lambda: library)
    patch.setattr(cublaslt, "_gpus", {})
    return library
