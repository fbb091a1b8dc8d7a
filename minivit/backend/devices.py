"""Whose array is it, and on which device: NumPy's on the CPU, CuPy's on CUDA.

Arrays decide: :func:`array_module` finds the module (NumPy or CuPy) that an array belongs to, and an operation works on
whichever array it gets. There is no current backend to set or to forget. CuPy is imported only when a CUDA device is
asked for.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import numpy as np

from minivit.errors import DeviceError, DTypeError

Array = Annotated[Any, "Array"]
"""A NumPy or CuPy ndarray. Written on a parameter of an operation, it marks a differentiable input."""


# ---- whose array is it -----------------------------------------------------------------------------------------------


def array_module(*arrays: Array) -> Any:
    """Return the module, NumPy or CuPy, that the arrays belong to (Python scalars belong to any)."""
    cupy = sys.modules.get("cupy")  # an array of CuPy's can only exist once CuPy is imported
    if cupy is not None and any(isinstance(a, cupy.ndarray) for a in arrays):
        return cupy
    return np


def is_array(x: object) -> bool:
    """Tell whether ``x`` is an ndarray of one of the backends."""
    return isinstance(x, np.ndarray) or array_module(x) is not np


def device_of(array: Array) -> str:
    """Return ``"cpu"`` or ``"cuda:N"``."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def address_of(array: Array) -> int:
    """Return the address of an array's first number."""
    return array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.data.ptr


def on_device_of(array: Array) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which new arrays are made on the device of ``array``."""
    return contextlib.nullcontext() if array_module(array) is np else array.device


def to_device(array: Array, device: str) -> Array:
    """Return ``array`` on ``device``; the array itself if it is there already."""
    device = resolve_device(device)
    if device_of(array) == device:
        return array
    if device == "cpu":
        return to_numpy(array)
    import cupy

    with gpu(device):
        return cupy.asarray(array)


def to_numpy(array: Array) -> np.ndarray:
    """Return a NumPy array: itself, or a copy from the GPU (which waits for the GPU)."""
    return array if isinstance(array, np.ndarray) else array.get()


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def is_floating(dtype: Any) -> bool:
    """Tell whether numbers of ``dtype`` have a gradient: real or complex floats, bfloat16 among them."""
    return dtype.kind in "fc" or is_bfloat16(dtype)


def is_half(dtype: Any) -> bool:
    """Tell whether ``dtype`` is float16 or bfloat16, in which sums and statistics are not taken."""
    return bool(dtype.itemsize == 2 and is_floating(dtype))


def is_bfloat16(dtype: Any) -> bool:
    """Tell whether ``dtype`` is ml_dtypes' bfloat16, to NumPy a kind of its own."""
    return bool(dtype.kind == "V" and dtype.name == "bfloat16")


def named_dtype(name: str) -> np.dtype:
    """Return the dtype of a name, NumPy's or ``"bfloat16"``; raise DTypeError where ml_dtypes, which has it, is not."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise DTypeError("bfloat16 needs the package ml_dtypes", "pip install 'minivit[tile]'") from None
    return np.dtype(ml_dtypes.bfloat16)


def spelled(dtype: Any) -> str:
    """Return how a dtype is written in Python, for a message: ``np.float32``, ``'bfloat16'``."""
    return repr(dtype.name) if is_bfloat16(dtype) else f"np.{dtype}"


def largest(dtype: Any) -> float:
    """Return the largest number that a real ``dtype`` holds."""
    return 2.0**127 * (2 - 2.0**-7) if is_bfloat16(dtype) else float(np.finfo(dtype).max)


# ---- devices ---------------------------------------------------------------------------------------------------------


def cuda_status() -> str | None:
    """Return None if CUDA can be used, else why not and what to install."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install 'minivit[cuda13]' (or [cuda12] for an older driver)"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy found, no CUDA driver ({str(error).split(':')[0]}): install NVIDIA's driver"
    return None if count else "CuPy and a CUDA driver found, but no CUDA device"


def gpu(device: str) -> Any:
    """Return CuPy's object of the GPU ``"cuda:N"``, as :func:`resolve_device` names it: it is current in a ``with``."""
    import cupy

    return cupy.cuda.Device(int(device.removeprefix("cuda:")))


def compute_capability(device: str) -> tuple[int, int]:
    """Return the compute capability of a GPU, (9, 0) of an H100."""
    digits = gpu(resolve_device(device)).compute_capability
    return int(digits[:-1]), int(digits[-1])


def resolve_device(device: str) -> str:
    """Return ``"cpu"`` or ``"cuda:N"`` for any name of a device; raise DeviceError if it is not there."""
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or device.endswith(":"):
        raise DeviceError(f"unknown device {device!r}", "use 'cpu', 'cuda', 'cuda:1', …")
    if why_not := cuda_status():
        raise DeviceError(f"device {device!r} is not available: {why_not}", "use the device 'cpu' until then")
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    if int(index or 0) >= count:
        raise DeviceError(f"device {device!r} does not exist", f"there are {count}: cuda:0 to cuda:{count - 1}")
    return f"cuda:{int(index or 0)}"


def auto_device(device: str = "auto") -> tuple[str, str]:
    """Resolve ``"auto"``: return the device and, where it is the CPU for want of CUDA, the reason (else ``""``)."""
    if device != "auto":
        return resolve_device(device), ""
    why_not = cuda_status()
    return ("cpu", why_not) if why_not else ("cuda:0", "")
