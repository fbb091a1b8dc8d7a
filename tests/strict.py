"""A strict stand-in for CuPy, so that the CUDA path runs, and is measured, on machines without a GPU.

It is a module that takes CuPy's place in ``sys.modules``: its ``ndarray`` holds a NumPy array, its functions are
NumPy's, called by name. So ``device="cuda"`` takes minivit's own code path, unchanged, and gives NumPy's numbers. It
is stricter than NumPy, and in places than CuPy:

- only the names and parameters of CuPy 14.2 exist (cupy_api.json): no ``vecdot``, ``errstate``, ``sum(where=)``;
- NumPy arrays never mix with it: operators, ``np.*`` functions, ``np.asarray`` and assignment raise TypeError. Only
  ``cupy.asarray`` and its like, ``set`` and index arrays cross over, and they are counted as transfers;
- reductions and ``a[0]`` give 0-d arrays; ``empty`` is full of NaN (integers: their maximum); there are two devices,
  and work on an array that is not on the current one raises ValueError.

Streams, graphs, pools and pinned memory are in streams.py: while a stream captures, operations are noted instead of
run, and run when the graph is launched. A test's own stand-in for a kernel does both through :func:`launch`. Matrix
products go to a stand-in for cuBLASLt (fake_cublaslt.py), which is ``cupy.cublaslt`` in a test: minivit itself may not
call CuPy's own, which refuse to be captured.

What it costs is counted in ``cupy.counters``: ``launches`` (operations that would start a kernel; views are free, and
some of CuPy's functions start several, so it is a floor), ``bytes`` (read and written by them), ``syncs`` (the host
waits for the GPU) and ``transfers`` (between host and device, or two devices). ``launched``, ``synced`` and
``transferred`` say which, by name or by source line. How a test uses it::

    from tests import strict

    strict_cupy = strict.strict_cupy  # makes the fixture known to this file; in conftest.py: to all

    def test_a_step_syncs_once(strict_cupy):
        step = ...  # built with device="cuda"
        strict_cupy.counters.reset()
        step(images, labels)
        assert strict_cupy.counters.syncs <= 1, strict_cupy.counters.synced

``any_cupy`` is the same fixture, which also runs the test on real CuPy where there is a GPU (marker ``gpu``).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import math
import operator
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit
from tests import streams
from tests.streams import Block, CUDARuntimeError, Stream

API: dict[str, Any] = json.loads(Path(__file__).with_name("cupy_api.json").read_text())
"""Dotted name below cupy (or from cupyx on) → its parameters, "numpy" (NumPy's own object) or null (unknown)."""

PACKAGE = Path(minivit.__file__).parent

CROSSING = ("array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray")
BLAS = ("dot", "inner", "matmul", "tensordot", "vdot")  # calls of cuBLAS
LAYOUT = ("can_cast", "may_share_memory", "ndim", "result_type", "shape", "shares_memory", "size")  # ask no values
MAKING = ("arange", "empty", "eye", "full", "identity", "indices", "linspace", "ones", "tri", "zeros")  # from nothing
SYNCING = ("argwhere", "bincount", "compress", "extract", "flatnonzero", "nonzero", "unique")  # shape from values
SCALARS = (bool, int, float, complex, np.generic)
DEVICES = 2


# ---- what is counted -------------------------------------------------------------------------------------------------


class Counters:
    """What has run since the last reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.launched: Counter[str] = Counter()  # by CuPy's name for the operation
        self.synced: Counter[str] = Counter()  # by source line
        self.transferred: Counter[str] = Counter()  # by source line
        self.bytes = 0
        self.transfer_bytes = 0

    launches = property(lambda self: self.launched.total())
    syncs = property(lambda self: self.synced.total())
    transfers = property(lambda self: self.transferred.total())

    def sync(self) -> None:
        streams.refuse_sync()
        self.synced[_caller()] += 1

    def transfer(self, nbytes: int, way: str = "H2D") -> None:
        streams.refuse_transfer(way)
        self.transferred[_caller()] += 1
        self.transfer_bytes += nbytes


counters = Counters()


def _caller() -> str:
    """Return the three innermost source lines outside this file: ``"backend.py:64 < tensor.py:120 < …"``."""
    frame, lines = sys._getframe(1), []
    while frame is not None and len(lines) < 3:
        if frame.f_code.co_filename != __file__:
            lines.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def _file_of_the_caller() -> Path:
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return Path(frame.f_code.co_filename)


# ---- devices and their memory ----------------------------------------------------------------------------------------

_blocks: dict[int, Block] = {}  # by the id of the NumPy array that owns the memory
addressed: weakref.WeakValueDictionary[int, ndarray] = weakref.WeakValueDictionary()
"""Address → the array that was last asked for it, and is alive."""
_current = streams.current_device


class Memory:
    """Memory that belongs to no pool."""

    def __init__(self, size: int) -> None:
        self.size, self._host = size, np.empty(size, np.uint8)
        self.ptr = self._host.ctypes.data


class Device:
    """A GPU by its number; as a context, this thread's current one."""

    TOTAL = 1 << 34
    compute_capability = "90"

    def __init__(self, device: int | Device | None = None) -> None:
        self.id = _current() if device is None else int(device)
        self._outer: list[int] = []

    def use(self) -> None:
        if not 0 <= self.id < DEVICES:
            raise CUDARuntimeError("cudaErrorInvalidDevice: invalid device ordinal")
        streams.use_device(self.id)

    def __enter__(self) -> Device:
        outer = _current()
        self.use()
        self._outer.append(outer)
        return self

    def __exit__(self, *error: object) -> None:
        streams.use_device(self._outer.pop())

    @property
    def mem_info(self) -> tuple[int, int]:
        with self:
            return self.TOTAL - streams.default_pool.used_bytes(), self.TOTAL

    def synchronize(self) -> None:
        _synchronize()

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"<CUDA Device {self.id}>"


# ---- the array -------------------------------------------------------------------------------------------------------


def _refusal(x: object) -> TypeError:
    return TypeError(f"Unsupported type {type(x)}: cupy.asarray takes an array to the GPU, get() takes it back")


class ndarray:
    """A NumPy array that behaves as if it lay on a GPU. Operators and most methods are attached further down."""

    __slots__ = ("__weakref__", "_block", "_device", "_host")
    __array_ufunc__ = None  # np_array + a comes to our operator, np.add(np_array, a) fails
    __array_priority__ = 100
    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None) -> Any:  # without NumPy 2's ``copy``, of which np.array warns first
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_function__(self, function: Callable, *args: object) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called with a cupy.ndarray")

    @property
    def device(self) -> Device:
        return Device(self._device)

    @property
    def data(self) -> types.SimpleNamespace:
        """The address: as if the memory that it lies in started at 0, where CuPy's starts at a multiple of 512."""
        owner = _owner(self._host)
        start = owner.__array_interface__["data"][0]
        address = self._host.__array_interface__["data"][0] - start + (start << 9)
        addressed[address] = self
        return types.SimpleNamespace(ptr=address)

    @property
    def flags(self) -> types.SimpleNamespace:
        flags = self._host.flags
        return types.SimpleNamespace(c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous)

    def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
        counters.transfer(self._host.nbytes, "D2H")
        if blocking:
            counters.sync()
            streams.deliver()
        if out is None:
            return self._host.copy(order)
        if (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError("get needs an array of the same dtype and shape")
        if blocking or not streams.is_pinned(out):
            out[...] = self._host
        else:
            streams.copy_out(self._host, out)
        return out

    def set(self, array: np.ndarray, stream: Any = None) -> None:
        if not isinstance(array, np.ndarray) or (array.dtype, array.shape) != (self.dtype, self.shape):
            raise TypeError("set needs a NumPy array of the same dtype and shape")
        counters.transfer(array.nbytes)
        if streams.is_pinned(array):
            streams.copy_in(array)
        self._host[...] = array

    def __del__(self) -> None:
        if (block := getattr(self, "_block", None)) is not None:
            block.leave()

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def __len__(self) -> int:
        return len(self._host)  # TypeError if 0-d

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    def __deepcopy__(self, memo: object) -> ndarray:
        return cupy.copy(self)

    def __getitem__(self, index: Any) -> ndarray:
        index, arrays = _index(index)
        return _run("getitem", lambda a, *_: a[index], (self, *arrays), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        if not isinstance(value, (ndarray, *SCALARS)):
            raise _refusal(value)
        index, arrays = _index(index)
        if not arrays:  # only the part that is written counts
            self, index = _new(self._host[index], self._device), ...
        _run("setitem", lambda a, v, *_: operator.setitem(a, index, v), (self, value, *arrays), {})


def _index(index: Any) -> tuple[tuple, list[ndarray]]:
    """Return the index for NumPy and the arrays in it. Host arrays and lists are moved, as CuPy does, and counted."""
    parts: list[Any] = []
    arrays = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, np.ndarray | list):
            part = cupy.asarray(np.asarray(part, dtype=None if len(part) else int))
        if isinstance(part, ndarray):
            arrays.append(part)
            part = part._host
            if part.dtype == bool:
                _sync_for_size()
        parts.append(part)
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # with it NumPy gives a 0-d view instead of a scalar
    return tuple(parts), arrays


def _sync_for_size() -> None:
    """Count that the host waits for the size of a result, which it copies from the GPU."""
    streams.refuse_transfer("D2H")
    counters.sync()


def _owner(host: np.ndarray) -> np.ndarray:
    """Return the array that owns the memory; between it and a sliding window's view NumPy has an object of its own."""
    owner, found = host, host.base
    while found is not None:
        owner, found = (found if isinstance(found, np.ndarray) else owner), getattr(found, "base", None)
    return owner


def _new(host: np.ndarray, device: int) -> ndarray:
    """Put a NumPy array on a device, and its memory on the books."""
    if host.dtype.char not in "?bhilqBHILQefdFD" and host.dtype.name != "bfloat16":
        raise TypeError(f"Unsupported dtype {host.dtype}")
    owner = _owner(host)
    if (block := _blocks.get(key := id(owner))) is None:
        block = _blocks[key] = Block(owner, device)
        block.owner = weakref.ref(owner, lambda _, blocks=_blocks: blocks.pop(key))
        if block.capture is not None:
            block.capture.taken.append(owner)
    block.enter()
    array = object.__new__(ndarray)
    array._host, array._device, array._block = host, device, block
    return array


# ---- calls -----------------------------------------------------------------------------------------------------------


def misuse(key: str, positional: int = 0, keywords: Iterable[str] = ()) -> str:
    """Return what is wrong with a call of CuPy's ``key``, ``""`` if nothing is."""
    if key not in API:
        return "" if any(other.startswith(f"{key}.") for other in API) else f"CuPy has no {key}"  # a module is fine
    limit, known = _parameters(key)
    unknown = [] if known is None else sorted(set(keywords) - known)
    if unknown or positional > limit:
        return f"{key}({', '.join(API[key])}) cannot be called with {positional} positional arguments and {unknown}"
    return ""


@functools.cache
def _parameters(key: str) -> tuple[float, set[str] | None]:
    """Return how many positional arguments CuPy's ``key`` takes, and its keywords (None: any)."""
    names = API[key]
    if not isinstance(names, list):
        return math.inf, None
    star = next((i for i, name in enumerate(names) if name.startswith("*")), None)
    limit = len(names) if star is None else math.inf if names[star].strip("*") else star  # "*args" or a bare "*"
    return limit, None if "**" in names else {name for name in names if not name.startswith("*")}


def _traffic(host: np.ndarray) -> int:
    """Return the bytes behind an array; along a broadcast axis (stride 0) they count once."""
    if host.flags.c_contiguous:
        return host.nbytes
    return host.itemsize * math.prod(n for n, stride in zip(host.shape, host.strides, strict=True) if stride)


def _unwrap(x: Any, found: list[ndarray]) -> Any:
    """Return ``x`` with NumPy's arrays in place of the GPU's, which are added to ``found``."""
    if isinstance(x, ndarray):
        found.append(x)
        return x._host
    if isinstance(x, np.ndarray):
        raise _refusal(x)
    return type(x)(_unwrap(item, found) for item in x) if type(x) in (list, tuple) else x


def _run(name: str, function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call NumPy's ``function`` on the arrays within the arguments, count what it costs, and wrap what it returns."""
    inputs: list[ndarray] = []
    out: list[ndarray] = []
    args = _unwrap(args, inputs)
    kwargs = {key: _unwrap(value, out if key == "out" else inputs) for key, value in kwargs.items()}
    capture = streams.capture_now()
    # what a capture does not run, it must still have the shape of: it runs, and what it wrote is put back
    before = [(a._host, a._host.copy()) for a in inputs + out if capture and a._host.flags.writeable]
    try:
        with np.errstate(all="ignore"):  # a GPU raises no floating-point warnings
            result = function(*args, **kwargs)
    finally:
        for host, value in before:
            host[...] = value
    if name in LAYOUT:
        return result
    if name in BLAS and np.asarray(result).dtype.kind in "fV" and _file_of_the_caller().is_relative_to(PACKAGE):
        raise AssertionError(f"CuPy's {name} cannot be captured: minivit.backend.product can")
    several = isinstance(result, list | tuple)
    hosts = [np.asarray(x) for x in (result if several else [result]) if x is not None]
    known = {id(a._host): a for a in inputs + out}  # out=, or an array that needed no change: the very same comes back
    may_be_view = hosts and not out and not isinstance(function, np.ufunc)
    device = _current()
    if may_be_view and all(any(np.may_share_memory(host, a._host) for a in inputs) for host in hosts):
        device = inputs[0]._device
    elif name in ("empty", "empty_like"):
        streams.poison(hosts[0])
    else:
        for a in inputs + out:
            if a._device != device:
                raise ValueError(
                    f"The device where the array resides ({a._device}) is different from the current device ({device})."
                )
        read = [a._host for a in inputs]
        if name == "getitem":
            read[0] = hosts[0]  # gathering reads what it writes, not the whole array
        counters.launched[name] += 1
        counters.bytes += sum(map(_traffic, hosts + read))
        if name in SYNCING or (name == "where" and len(args) == 1):
            _sync_for_size()
        if capture is not None:
            _refuse_in_capture(name, args)
            made = [host for host in hosts if id(host) not in known]
            again = functools.partial(_again, function, args, kwargs, made)
            capture.add(name, again, [a._block for a in inputs + out])
            for host in made:
                streams.poison(host)
    arrays = [known[id(host)] if id(host) in known else _new(host, device) for host in hosts]
    return (arrays if isinstance(result, list) else tuple(arrays)) if several else arrays[0] if arrays else None


def _again(function: Callable, args: tuple, kwargs: dict[str, Any], made: list[np.ndarray]) -> None:
    """Run what was captured, into the arrays that it had made then."""
    with np.errstate(all="ignore"):
        result = function(*args, **kwargs)
    if made:
        for host, value in zip(made, result if isinstance(result, list | tuple) else [result], strict=True):
            np.copyto(host, value)


def _refuse_in_capture(name: str, args: tuple) -> None:
    """Raise CuPy's error for what it does not capture: cuBLAS, and concatenating more arrays than it has names for."""
    if name in BLAS or (name == "einsum" and len(args) > 2):
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    if name in ("concatenate", "stack", "vstack", "hstack", "dstack", "column_stack") and len(args[0]) > 8:
        streams.refuse_transfer("H2D")  # of their addresses


def launch(name: str, function: Callable[[], Any], read: Iterable[ndarray], written: Iterable[ndarray]) -> None:
    """Run ``function()`` as one kernel called ``name``, or note it if the current stream is capturing.

    It works on the NumPy arrays behind CuPy's (``array._host``), reads those of ``read`` and writes those of
    ``written`` in place, and looks at their values only when it is called. What it costs is counted.
    """
    read, written = list(read), list(written)
    for a in read + written:
        if a._device != _current():
            raise ValueError(f"{name}: an array resides on device {a._device}, the current device is {_current()}")
    counters.launched[name] += 1
    counters.bytes += sum(_traffic(a._host) for a in read + written)
    if (capture := streams.capture_now()) is None:
        with np.errstate(all="ignore"):
            function()
        return
    hosts = [a._host for a in read + written]  # kept as long as the graph, whatever the function refers to

    def again(_: list[np.ndarray] = hosts) -> None:
        with np.errstate(all="ignore"):
            function()

    capture.add(name, again, [a._block for a in read + written])


def _function(key: str, call: Callable) -> Callable:
    """Return CuPy's function or method ``key``: NumPy's ``call`` with CuPy's parameters, for CuPy's arrays only."""
    name = key.removeprefix("ndarray.")

    def function(*args: Any, **kwargs: Any) -> Any:
        if wrong := misuse(key, len(args), kwargs):
            raise TypeError(wrong)
        if isinstance(call, np.ufunc):
            for x in args:
                if not isinstance(x, (ndarray, *SCALARS)):
                    raise _refusal(x)
        elif name not in MAKING and name not in LAYOUT:
            first = next((x for x in (*args, *kwargs.values()) if not isinstance(x, str)), None)  # einsum's is a string
            if not any(isinstance(x, ndarray) for x in (first if isinstance(first, list | tuple) else [first])):
                raise _refusal(first)
        return _run(name, call, args, kwargs)

    for method in ("accumulate", "reduce"):
        if f"{key}.{method}" in API:
            setattr(function, method, _function(f"{key}.{method}", getattr(call, method)))
    if f"{key}.at" in API:
        function.at = _scatter(f"{key}.at", call)
    return function


def _scatter(name: str, ufunc: np.ufunc) -> Callable:
    """Return ``ufunc.at`` for the dtypes that CUDA has atomic operations for, with indices as for ``[]``."""

    def scatter(a: ndarray, slices: Any, value: Any) -> None:
        if a.dtype.char not in "iILQefd":
            raise TypeError(f"{name} does not support {a.dtype}")
        index, arrays = _index(slices)
        _run(name, lambda a, value, *_: ufunc.at(a, index, value), (a, value, *arrays), {})

    return scatter


def _crossing(key: str) -> Callable:
    """Return ``asarray`` or one of its like: from the host, from another device, or within one."""
    call = getattr(np, key)
    within = _function(key, call)

    def function(obj: Any, *args: Any, **kwargs: Any) -> ndarray:
        kwargs.pop("blocking", None)
        if isinstance(obj, ndarray) and obj._device != _current():
            counters.transfer(obj.nbytes, "D2D")
            obj = _new(obj._host.copy(), _current())
        on_gpu = [isinstance(x, ndarray) for x in (obj if isinstance(obj, list | tuple) else [obj])]
        if any(on_gpu) and not all(on_gpu):
            raise TypeError("GPU arrays and host values in one list")
        if any(on_gpu):
            return within(obj, *args, **kwargs)
        if wrong := misuse(key, 1 + len(args), kwargs):
            raise TypeError(wrong)
        host = np.array(call(obj, *args, **kwargs))  # never the caller's own memory
        counters.transfer(host.nbytes)
        if isinstance(obj, np.ndarray) and streams.is_pinned(obj):
            streams.copy_in(obj)
        return _new(host, _current())

    return function


# ---- the modules -----------------------------------------------------------------------------------------------------


def _erf(x: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(x):
        raise TypeError("CuPy's erf takes real numbers only")
    to = {"float16": np.float64, "bfloat16": np.float32}.get(x.dtype.name, x.dtype)  # CuPy has no loops for halves
    return np.vectorize(math.erf, otypes=[float])(x).astype(to)


def _where(condition: np.ndarray, *choices: Any) -> Any:
    made = np.where(condition, *choices)
    halves = any(getattr(x, "dtype", np.dtype(bool)).name == "bfloat16" for x in choices)
    doubles = any(getattr(x, "dtype", None) == np.float64 for x in choices)
    return made.astype(np.float32) if halves and not doubles else made  # CuPy's has no loop for bfloat16


BEYOND_NUMPY = {
    "where": _function("where", _where),
    "cupyx.rsqrt": _function("cupyx.rsqrt", lambda x: np.reciprocal(np.sqrt(x))),
    "cupyx.scatter_add": _scatter("scatter_add", np.add),
    "cupyx.scipy.special.erf": _function("cupyx.scipy.special.erf", _erf),
}


class _Module(types.ModuleType):
    """A module that looks its attributes up in the API when they are first asked for."""

    def __init__(self, name: str, prefix: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self._prefix = prefix

    def __getattr__(self, name: str) -> Any:
        key = self._prefix + name
        value: Any
        if key in CROSSING:
            value = _crossing(key)
        elif key in BEYOND_NUMPY:
            value = BEYOND_NUMPY[key]
        elif API.get(key) == "numpy":
            value = getattr(np, name)
        elif API.get(key) is not None:
            value = _function(key, operator.attrgetter(key)(np))
        elif any(other.startswith(f"{key}.") for other in API):
            value = _Module(f"{self.__name__}.{name}", f"{key}.")
        else:
            raise AttributeError(f"{'the stand-in for CuPy' if key in API else 'CuPy'} has no {key}")
        setattr(self, name, value)
        return value


def _defers_to(other: object) -> bool:
    """Tell whether CuPy leaves an operator to its right-hand side, a Tensor for example."""
    if isinstance(other, ndarray):
        return False
    if hasattr(other, "__array_ufunc__"):
        return other.__array_ufunc__ is None
    return getattr(other, "__array_priority__", 0) > ndarray.__array_priority__


def _product_of_arrays(a: Any, b: Any) -> ndarray:
    """Return a @ b: CuPy's operator goes past its ufunc, whose words for another type are not Cython's."""
    for x in (a, b):
        if not isinstance(x, ndarray):
            raise TypeError(f"Cannot convert {type(x).__module__}.{type(x).__name__} to cupy._core.core.ndarray")
    return cupy.matmul(a, b)


def _complete_ndarray() -> None:
    for name in ("dtype", "itemsize", "nbytes", "ndim", "shape", "size", "strides"):
        setattr(ndarray, name, property(operator.attrgetter(f"_host.{name}")))
    for name in ("T", "mT", "real", "imag"):
        view = operator.attrgetter(name)
        setattr(ndarray, name, property(lambda self, name=name, view=view: _run(name, view, (self,), {})))
    for convert in (bool, int, float, complex, repr, str, format):
        to_host = lambda self, *args, convert=convert: convert(self.get(), *args)
        setattr(ndarray, f"__{convert.__name__}__", to_host)
    ndarray.tolist = lambda self: self.get().tolist()
    ndarray.tobytes = lambda self: self.get().tobytes()

    unary = {"abs": "absolute", "invert": "invert", "neg": "negative", "pos": "positive"}
    compare = {"eq": "equal", "ne": "not_equal"}
    compare |= {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    binary = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide"}
    binary |= {"mod": "remainder", "pow": "power", "lshift": "left_shift", "rshift": "right_shift"}
    binary |= {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "divmod": "divmod", "matmul": "matmul"}
    for name, ufunc in (unary | compare | binary).items():
        f = getattr(cupy, ufunc)
        if name == "matmul":
            f = _product_of_arrays
        setattr(ndarray, f"__{name}__", lambda a, *b, f=f: NotImplemented if any(map(_defers_to, b)) else f(a, *b))
        if name in binary:
            setattr(ndarray, f"__r{name}__", lambda a, b, f=f: f(b, a))
        if name in binary and name not in ("divmod", "matmul"):  # CuPy has no @= of its own
            setattr(ndarray, f"__i{name}__", lambda a, b, f=f: f(a, b, out=a))

    ndarray.scatter_add = BEYOND_NUMPY["cupyx.scatter_add"]
    for key, parameters in API.items():
        name = key.removeprefix("ndarray.")
        if name != key and parameters is not None and name not in vars(ndarray) and hasattr(np.ndarray, name):
            setattr(ndarray, name, _function(key, getattr(np.ndarray, name)))


cupy: Any = _Module("cupy", "")
cupyx: Any = _Module("cupyx", "cupyx.")


def _synchronize() -> None:
    counters.sync()
    streams.deliver()


Stream.waited = counters.sync
_runtime = types.SimpleNamespace(
    CUDARuntimeError=CUDARuntimeError,
    deviceSynchronize=_synchronize,
    getDevice=_current,
    getDeviceCount=lambda: DEVICES,
    getDeviceProperties=lambda device: {"name": b"strict stand-in", "multiProcessorCount": 132},
)
cupy.cuda = types.SimpleNamespace(
    Device=Device,
    Event=streams.Event,
    Graph=streams.Graph,
    Memory=Memory,
    MemoryPool=streams.MemoryPool,
    Stream=Stream,
    get_current_stream=streams.get_current_stream,
    get_elapsed_time=lambda start, end: 1.0,
    is_available=lambda: True,
    runtime=_runtime,
    using_allocator=streams.using_allocator,
)
cupyx.empty_pinned = streams.empty_pinned
cupy.counters = counters
cupy.ndarray = ndarray
cupy.asnumpy = lambda a: a if isinstance(a, np.ndarray) else a.get()
cupy.get_array_module = lambda *args: cupy if any(isinstance(a, ndarray) for a in args) else np
cupy.get_default_memory_pool = lambda: streams.default_pool
cupy.is_available = lambda: True
cupy.__version__ = API["__version__"]
_complete_ndarray()


# ---- for tests -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def installed(kernels: bool = True) -> Iterator[Any]:
    """Put the stand-in into CuPy's place, with its counters at zero, and yield it.

    Kernels run in tests/tile.py, matrix products in tests/fake_cublaslt.py, which build on this file. Without
    ``kernels`` they are launched and counted, but those of several programs compute nothing, which takes a hundredth of
    the time. What they were to write holds zeros.
    """
    from tests import fake_cublaslt, tile

    counters.reset()
    streams.forget()
    with pytest.MonkeyPatch.context() as patch:
        tile.install(patch, _current)
        emulate = tile.emulate
        if not kernels:
            alone = lambda plan, grid, args: None if math.prod(grid) > 1 else emulate(plan, grid, args)
            patch.setattr(tile, "emulate", alone)
            patch.setattr(streams, "poison", lambda host: host.fill(0))
        for module in (cupy, cupyx, cupyx.scipy, cupyx.scipy.special):
            patch.setitem(sys.modules, module.__name__, module)
        cupy.cublaslt = fake_cublaslt.install(patch)
        yield cupy


@pytest.fixture
def strict_cupy() -> Iterator[Any]:
    with installed() as module:
        yield module


@pytest.fixture
def idle_cupy() -> Iterator[Any]:
    with installed(kernels=False) as module:
        yield module


REAL = [pytest.param("real", marks=pytest.mark.gpu)] if importlib.util.find_spec("cupy") else []


@pytest.fixture(params=["strict", *REAL])
def any_cupy(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "strict":
        with installed() as module:
            yield module
        return
    real = importlib.import_module("cupy")
    try:
        real.cuda.runtime.getDeviceCount()
    except real.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    yield real
