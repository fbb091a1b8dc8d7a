"""cuBLASLt by ctypes: NVIDIA's matrix products, as calls that a CUDA graph can hold.

CuPy's own ``matmul`` refuses to run while a stream captures. Here the stream is an argument of each call, the handle is
our own, and the workspace is made beforehand: so a product is captured like any other kernel. Which product it is says
a :class:`Spec`; :mod:`minivit.backend.multiply` makes one of arrays.

cuBLASLt counts in columns: D (m, n) = op(A) (m, k) · op(B) (k, n) + beta·C, each matrix stored column after column,
``ld`` elements from one to the next. Numbers of enumerations are those of cublasLt.h and library_types.h.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as pointer
from typing import Any, NamedTuple

from minivit.errors import DeviceError

WORKSPACE = 32 << 20  # bytes, what NVIDIA recommends for Hopper
CANDIDATES = 8
ALGORITHM_BYTES = 64

TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # CUDA_R_…
COMPUTE = {"float32": 68, "tf32": 77, "float64": 70}  # CUBLAS_COMPUTE_32F, _32F_FAST_TF32, _64F

# attributes of a product's descriptor, of a matrix's layout, of the search for an algorithm, and of an algorithm
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE, BIAS_POINTER = 3, 4, 7, 8
BATCH_COUNT, BATCH_STRIDE = 5, 6
WORKSPACE_LIMIT, REDUCTIONS, ALIGNMENT_A = 1, 3, 5  # B, C and D follow A
REDUCTION = 3

PLAIN, WITH_BIAS = 1, 4  # CUBLASLT_EPILOGUE_DEFAULT, _BIAS

REPEATABLE = 2
"""The reductions that an algorithm may use: none, or through the workspace in the dtype of the sums (_COMPUTE_TYPE).

Where the sum over k is cut up, its parts lie in the workspace and are added by a second kernel in a fixed order. With
the one that is left out, _INPLACE, they are rounded to the dtype of the output on the way. None uses atomics: cuBLAS
promises equal bits for one algorithm on one kind of GPU, if each stream has a workspace of its own (cuBLAS, "Results
reproducibility"). So equal seeds give equal bits as long as the algorithm is the same: choices.py keeps it.
"""

_STATUS = {
    1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR",
    13: "EXECUTION_FAILED", 14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR",
}  # fmt: skip
_REMEDIES = {
    1: "check the driver: nvidia-smi must list the GPU",
    3: "free memory of the GPU, or make the batch smaller",
    13: "an earlier kernel on this GPU has failed, or the GPU has: run again with CUDA_LAUNCH_BLOCKING=1",
}


class Candidate(Structure):
    """What the search finds: cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (pointer,),
    "cublasLtMatmulDescCreate": (pointer, c_int, c_int),
    "cublasLtMatmulDescSetAttribute": (pointer, c_int, pointer, c_size_t),
    "cublasLtMatrixLayoutCreate": (pointer, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutSetAttribute": (pointer, c_int, pointer, c_size_t),
    "cublasLtMatmulPreferenceCreate": (pointer,),
    "cublasLtMatmulPreferenceSetAttribute": (pointer, c_int, pointer, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*[pointer] * 7, c_int, pointer, POINTER(c_int)),
    "cublasLtMatmulAlgoCheck": (*[pointer] * 7, POINTER(Candidate)),
    "cublasLtMatmulAlgoConfigGetAttribute": (pointer, c_int, pointer, c_size_t, POINTER(c_size_t)),
    "cublasLtMatmul": (*[pointer] * 14, c_size_t, pointer),
}
"""What is called, and the types of its arguments; each returns a status."""


def load() -> Any:
    """Return the library that CuPy's own packages brought along, or the system's."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, OSError, RuntimeError) as error:
        remedy = "install NVIDIA's libraries with CuPy: pip install 'minivit[cuda13]' (or [cuda12])"
        raise DeviceError(f"cuBLASLt, which multiplies matrices on the GPU, was not found: {error}", remedy) from error
    for name, types in FUNCTIONS.items():
        getattr(library, name).argtypes = types
        getattr(library, name).restype = c_int
    library.cublasLtGetVersion.argtypes, library.cublasLtGetVersion.restype = (), c_size_t
    return library


def check(status: int, function: str, what: object) -> None:
    """Raise DeviceError for a status that is no success."""
    if status:
        name = f"CUBLAS_STATUS_{_STATUS.get(status, status)}"
        remedy = _REMEDIES.get(status, "compare with the same product on the device 'cpu', and report this line")
        raise DeviceError(f"{function} of cuBLASLt: {name}: {what}", remedy)


# ---- one product -----------------------------------------------------------------------------------------------------


class Matrix(NamedTuple):
    """A matrix as it lies in memory: ``rows`` one after the other within a column, ``ld`` from column to column.

    ``stride`` leads to the next of a batch (0: the same again); both count elements. ``alignment`` is the largest power
    of two, up to 256, that divides its address.
    """

    dtype: str
    rows: int
    columns: int
    ld: int
    stride: int
    alignment: int
    transposed: bool = False


class Spec(NamedTuple):
    """One kind of product, all but its addresses: D = op(A)·op(B), + C if there is one or ``add`` (D's own), + bias.

    ``bias`` is how the bias is aligned, as of a :class:`Matrix`, or 0 if there is none.
    """

    a: Matrix
    b: Matrix
    c: Matrix | None
    d: Matrix
    batch: int
    compute: str
    add: bool
    bias: int

    @property
    def k(self) -> int:
        """The length of the sums."""
        return self.a.rows if self.a.transposed else self.a.columns

    def __str__(self) -> str:
        """Return it as a line of text, which no other has: D (m×n) of A, B and C, each with layout and alignment."""

        def shown(x: Matrix) -> str:
            return f"{x.dtype}{'ᵀ' if x.transposed else ''}:{x.ld}:{x.stride}:{x.alignment}"

        added = " + itself" if self.add else f" + {shown(self.c)}" if self.c else ""
        size = f"{self.batch}×{self.d.rows}×{self.d.columns}×{self.k}"
        bias = f" + bias:{self.bias}" if self.bias else ""
        return f"{size} {self.compute} {shown(self.a)} · {shown(self.b)}{added}{bias} → {shown(self.d)}"


class Pointers(NamedTuple):
    """The addresses of one call; ``c`` is that of D where there is no C."""

    a: int
    b: int
    c: int
    d: int
    bias: int


class Plan:
    """The descriptors of one kind of product on one GPU, the algorithms for it, best guess first, and the chosen one.

    ``candidates`` is empty where cuBLASLt has none. choices.py sets ``chosen``, once, and ``source``: how it chose.
    """

    def __init__(self, library: Any, handle: Any, spec: Spec) -> None:
        self.spec, self._library, self._handle = spec, library, handle
        self._lock = threading.Lock()  # the bias's address is written into the descriptor, then read by the call
        self.chosen: bytes | None = None
        self.source = ""
        double = spec.compute == "float64"
        number = c_double if double else c_float
        self._one, self._beta = number(1.0), number(1.0 if spec.add or spec.c else 0.0)
        self._descriptor = pointer()
        self._call("cublasLtMatmulDescCreate", byref(self._descriptor), COMPUTE[spec.compute], TYPES[_scale(spec)])
        self._set("MatmulDesc", self._descriptor, TRANSPOSE_A, c_int32(spec.a.transposed))
        self._set("MatmulDesc", self._descriptor, TRANSPOSE_B, c_int32(spec.b.transposed))
        self._set("MatmulDesc", self._descriptor, EPILOGUE, c_uint32(WITH_BIAS if spec.bias else PLAIN))
        if spec.bias:  # the search reads from the address how it is aligned, and nothing else
            self._set("MatmulDesc", self._descriptor, BIAS_POINTER, c_uint64(spec.bias))
        # C's layout is one of its own: the same one twice would say that C is D
        a, b, d = (self._layout(x) for x in (spec.a, spec.b, spec.d))
        self._layouts = (a, b, self._layout(spec.c) if spec.c else d, d)
        self.candidates = self._search()

    def _call(self, function: str, *args: Any) -> None:
        check(getattr(self._library, function)(*args), function, self.spec)

    def _set(self, kind: str, place: Any, attribute: int, value: Any) -> None:
        self._call(f"cublasLt{kind}SetAttribute", place, attribute, byref(value), ctypes.sizeof(value))

    def _layout(self, x: Matrix) -> Any:
        layout = pointer()
        self._call("cublasLtMatrixLayoutCreate", byref(layout), TYPES[x.dtype], x.rows, x.columns, x.ld)
        if self.spec.batch > 1:
            self._set("MatrixLayout", layout, BATCH_COUNT, c_int32(self.spec.batch))
            self._set("MatrixLayout", layout, BATCH_STRIDE, c_int64(x.stride))
        return layout

    def _search(self) -> list[bytes]:
        """Return the algorithms that fit, the one that cuBLASLt thinks the fastest first."""
        spec, preference = self.spec, pointer()
        self._call("cublasLtMatmulPreferenceCreate", byref(preference))
        self._set("MatmulPreference", preference, WORKSPACE_LIMIT, c_uint64(WORKSPACE))
        self._set("MatmulPreference", preference, REDUCTIONS, c_uint32(REPEATABLE))
        for attribute, x in zip(itertools.count(ALIGNMENT_A), (spec.a, spec.b, spec.c or spec.d, spec.d)):
            self._set("MatmulPreference", preference, attribute, c_uint32(x.alignment))
        found, count = (Candidate * CANDIDATES)(), c_int(0)
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, self._descriptor, *self._layouts, preference, CANDIDATES, found, byref(count)
        )
        if status not in (0, 7, 15):  # 7, 15: it has none for these
            check(status, "cublasLtMatmulAlgoGetHeuristic", spec)
        return [bytes(c.algorithm) for c in found[: count.value] if not status and not c.state]

    def accepts(self, algorithm: bytes) -> bool:
        """Tell whether an algorithm, of whatever origin, can run here and adds up in a fixed order."""
        if len(algorithm) != ALGORITHM_BYTES:
            return False
        place, result = ctypes.create_string_buffer(algorithm, ALGORITHM_BYTES), Candidate()
        args = (self._handle, self._descriptor, *self._layouts, place, byref(result))
        if self._library.cublasLtMatmulAlgoCheck(*args) or result.workspace > WORKSPACE:
            return False
        scheme, written = c_uint32(0), c_size_t(0)
        status = self._library.cublasLtMatmulAlgoConfigGetAttribute(
            place, REDUCTION, byref(scheme), ctypes.sizeof(scheme), byref(written)
        )
        return status == 0 and scheme.value in (0, REPEATABLE)

    def run(self, algorithm: bytes, at: Pointers, workspace: int, stream: int) -> int:
        """Put the product on a stream; return cuBLASLt's status."""
        with self._lock:
            if self.spec.bias:
                self._set("MatmulDesc", self._descriptor, BIAS_POINTER, c_uint64(at.bias))
            a, b, c, d = self._layouts
            return self._library.cublasLtMatmul(
                self._handle, self._descriptor, byref(self._one), at.a, a, at.b, b, byref(self._beta), at.c, c, at.d, d,
                ctypes.create_string_buffer(algorithm, ALGORITHM_BYTES), workspace, WORKSPACE, stream,
            )  # fmt: skip


def _scale(spec: Spec) -> str:
    return "float64" if spec.compute == "float64" else "float32"


# ---- one GPU ---------------------------------------------------------------------------------------------------------


class Products:
    """cuBLASLt on one GPU: its handle, a workspace for each stream, and a plan for each kind of product.

    Two streams run at once, and so have two workspaces. A graph keeps the workspace of the stream that it was captured
    on: wherever it is launched, nothing that runs at the same time may be work of that stream.
    """

    def __init__(self, device: int) -> None:
        import cupy

        self.library, self.device = load(), device
        self._handle, self._lock = pointer(), threading.RLock()
        self._plans: dict[Spec, Plan] = {}
        self._workspaces: dict[tuple[int, int], Any] = {}
        check(self.library.cublasLtCreate(byref(self._handle)), "cublasLtCreate", f"on cuda:{device}")
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        name = properties["name"].decode(errors="replace").strip("\0 ")
        self.name = f"{name}, {properties['multiProcessorCount']} SMs, cuBLASLt {self.library.cublasLtGetVersion()}"

    def plan(self, spec: Spec) -> Plan:
        """Return the plan of a kind of product."""
        if (found := self._plans.get(spec)) is None:
            with self._lock:
                found = self._plans.get(spec)
                if found is None:
                    found = self._plans[spec] = Plan(self.library, self._handle, spec)
        return found

    def plans(self) -> Sequence[Plan]:
        """Return the plans made so far."""
        return list(self._plans.values())

    def workspace(self, stream: Any) -> int:
        """Return the address of a stream's workspace, which is made when it is first asked for.

        Raises DeviceError where that is within a capture: the graph's own pool of memory may be gone before the graph.
        """
        # 2 is the default stream of each thread, where CuPy is told to use that
        place = (stream.ptr, threading.get_ident() if stream.ptr == 2 else 0)
        if (found := self._workspaces.get(place)) is None:
            import cupy

            if stream.is_capturing():
                remedy = "run the step once on the same stream before it is captured"
                raise DeviceError("the first matrix product of a stream, in a capture: it has no workspace yet", remedy)
            with self._lock:
                found = self._workspaces.setdefault(place, cupy.cuda.Memory(WORKSPACE))  # from no pool
        return found.ptr


_gpus: dict[int, Products] = {}
_lock = threading.Lock()


def on_gpu(device: int) -> Products:
    """Return cuBLASLt on a GPU, which is the current one."""
    if (found := _gpus.get(device)) is None:
        with _lock:
            if (found := _gpus.get(device)) is None:
                found = _gpus[device] = Products(device)
    return found


def gpus_in_use() -> list[Products]:
    """Return cuBLASLt on each GPU that has multiplied something."""
    return list(_gpus.values())
