"""Array backends: NumPy on the CPU and CuPy on CUDA, behind a handful of functions.

Arrays decide: :func:`array_module` finds the module (NumPy or CuPy) that an array belongs to, and an operation works on
whichever array it gets. There is no current backend to set or to forget. CuPy is imported only when a CUDA device is
asked for.

Random numbers are counter-based: a :class:`Key` (seed, stream, step) and a position give a number, with no hidden
state, in integer arithmetic that has the same bits on both backends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from minivit.errors import ConfigError, DeviceError

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

    with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
        return cupy.asarray(array)


def to_numpy(array: Array) -> np.ndarray:
    """Return a NumPy array: itself, or a copy from the GPU (which waits for the GPU)."""
    return array if isinstance(array, np.ndarray) else array.get()


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


# ---- memory ----------------------------------------------------------------------------------------------------------


def memory_in_use(device: str = "cpu") -> int:
    """Return bytes in use now: the process's resident set on the CPU, CuPy's pool on a GPU."""
    if (device := resolve_device(device)) != "cpu":
        import cupy

        with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
            return int(cupy.get_default_memory_pool().used_bytes())
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * _page_size()
    except OSError:  # no /proc: the peak is the best that the standard library offers
        return peak_memory()


def peak_memory() -> int:
    """Return the process's largest resident set so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux, bytes on macOS


def total_memory(device: str = "cpu") -> int:
    """Return the machine's or the GPU's memory in bytes."""
    if (device := resolve_device(device)) != "cpu":
        import cupy

        with cupy.cuda.Device(int(device.removeprefix("cuda:"))) as gpu:
            return int(gpu.mem_info[1])
    return os.sysconf("SC_PHYS_PAGES") * _page_size()


def available_memory() -> int:
    """Return how many bytes a process can still take before the machine, or its container, has none left."""
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as f:
        free.append(1024 * int(next(line for line in f if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # the limit of a container (cgroup version 2); "max" is no number
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free.append(limit - used + int(stat.get("inactive_file", 0)))  # files read before: dropped when memory is short
    return min(free, default=total_memory())


_CGROUP = Path("/sys/fs/cgroup")


def _page_size() -> int:
    return os.sysconf("SC_PAGE_SIZE")


# ---- random numbers --------------------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    """Finalise 64 bits as SplitMix64 does (Steele, Lea, Flood 2014, "Fast splittable … generators")."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Key:
    """Names one stream of random numbers: (seed, stream, step). Equal keys give equal numbers, on every backend.

    ``stream`` tells independent users apart (initialisation, shuffling, one dropout layer and the next); ``step`` is
    the training step. Nothing advances by itself: to get fresh numbers, use another step or another stream.
    """

    seed: int
    stream: int = 0
    step: int = 0

    def child(self, stream: int) -> Key:
        """Return the key of the ``stream``-th user under this one."""
        return Key(self.seed, _mix((self.stream * _GOLDEN + stream + 1) & _MASK), self.step)

    def at(self, step: int) -> Key:
        """Return the same stream's key at another step."""
        return Key(self.seed, self.stream, step)

    def bits(self) -> int:
        """Return the 64 bits that start the counter."""
        z = 0
        for part in (self.seed, self.stream, self.step):
            z = _mix((z + (part & _MASK) + _GOLDEN) & _MASK)
        return z


def random_bits(key: Key, shape: tuple[int, ...], *, start: int = 0, device: str = "cpu") -> Array:
    """Return uint32 random bits of ``shape``; element i (in C order) depends on ``key`` and ``start + i`` only.

    So rows can be made apart: ``start=row * row_size`` gives the very numbers that the whole array has there.
    """
    return _generate(key, shape, start, device, "uint32", lambda bits: bits)


def uniform(key: Key, shape: tuple[int, ...], *, start: int = 0, device: str = "cpu") -> Array:
    """Return float32 uniform numbers in [0, 1), multiples of 2⁻²⁴."""
    return _generate(key, shape, start, device, "float32", _unit_interval)


def uniform_rows(key: Key, rows: np.ndarray, width: int) -> np.ndarray:
    """Return ``uniform(key, (n, width))[rows]``, float32 (len(rows), width), without making the other rows."""
    places = np.uint64(width) * rows.astype(np.uint64)[:, None] + np.arange(1, width + 1, dtype=np.uint64)
    return np.asarray(_unit_interval(_splitmix_at(np, key.bits(), places)))  # (rows, width)


def _unit_interval(bits: Array) -> Array:
    return (bits >> 8).astype("float32") * 2.0**-24


def _generate(
    key: Key, shape: tuple[int, ...], start: int, device: str, dtype: str, finish: Callable[[Array], Array]
) -> Array:
    size, device = math.prod(shape), resolve_device(device)
    if device == "cpu":
        out = np.empty(size, dtype)
        for a in range(0, size, 1 << 14):  # in pieces that stay in the cache: eight times faster for large arrays
            b = min(a + (1 << 14), size)
            out[a:b] = finish(_splitmix(np, key.bits(), start + a, b - a))
        return out.reshape(shape)
    import cupy

    with cupy.cuda.Device(int(device.removeprefix("cuda:"))):
        return finish(_splitmix(cupy, key.bits(), start, size)).reshape(shape)


def _splitmix(xp: Any, seed: int, start: int, size: int) -> Array:
    return _splitmix_at(xp, seed, xp.arange(start + 1, start + size + 1, dtype=xp.uint64))


def _splitmix_at(xp: Any, seed: int, z: Array) -> Array:
    """Return the uint32 bits at the places ``z``, uint64 from 1, which is written over."""
    z *= xp.uint64(_GOLDEN)
    z += xp.uint64(seed)
    z ^= z >> xp.uint64(30)
    z *= xp.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> xp.uint64(27)
    z *= xp.uint64(0x94D049BB133111EB)
    z ^= z >> xp.uint64(31)
    return (z >> xp.uint64(32)).astype(xp.uint32)


def normal(key: Key, shape: tuple[int, ...]) -> np.ndarray:
    """Return float64 standard normal numbers (Box and Muller 1958).

    Always made on the CPU, because log and cos differ in their last bit between libraries; the caller moves them.
    """
    u1 = (random_bits(key.child(0), shape) + 1.0) * 2.0**-32  # in (0, 1]: its logarithm is finite
    u2 = random_bits(key.child(1), shape) * 2.0**-32
    return np.asarray(np.sqrt(-2.0 * np.log(u1)) * np.cos(2.0 * np.pi * u2))


def permutation(key: Key, n: int) -> np.ndarray:
    """Return a random order of 0 … n-1 as int64 (on the CPU: it indexes data that lies there)."""
    high = random_bits(key.child(0), (n,)).astype(np.uint64) << np.uint64(32)
    return np.argsort(high | random_bits(key.child(1), (n,)), kind="stable")


# ---- what the array modules lack -------------------------------------------------------------------------------------


def cpu_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not tell
        return os.cpu_count() or 1


@functools.cache
def l2_cache() -> int:
    """Return the size of a core's second-level cache in bytes; 1 MiB where the system does not tell."""
    try:
        with open("/sys/devices/system/cpu/cpu0/cache/index2/size") as f:
            return int(f.read().strip().removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 1 << 20


class _BlasLimit:
    """Holds the process's BLAS to few threads as long as anybody asks for it, and gives it back its own after the last.

    The number is the process's: a thread that puts back what it found would put back another one's limit.
    """

    def __init__(self) -> None:
        self.asked: dict[object, tuple[int, int]] = {}  # thread that asks, number of BLAS threads
        self.lock, self.limit, self.held = threading.Lock(), None, 0

    @contextlib.contextmanager
    def to(self, threads: int) -> Iterator[None]:
        """Hold BLAS to ``threads`` threads in this block; to the fewest that are asked for at the time."""
        token = object()
        try:
            with self.lock:
                self.asked[token] = threading.get_ident(), threads
                self.apply()
            yield
        finally:
            with self.lock:
                self.asked.pop(token, None)
                self.apply()

    def apply(self) -> None:
        """Set what is asked for, unless it is set already."""
        wanted = min((threads for _, threads in self.asked.values()), default=0)  # 0: no limit
        if wanted != self.held:
            if self.limit is not None:
                self.limit.restore_original_limits()
                self.limit = None
            if wanted:
                self.limit = _threadpools().limit(limits=wanted, user_api="blas")
            self.held = wanted

    def after_fork(self) -> None:
        """Forget, in a child, the threads that it does not have: nobody there would ever end their block or unlock."""
        self.lock = threading.Lock()
        own = threading.get_ident()
        self.asked = {token: asked for token, asked in self.asked.items() if asked[0] == own}
        self.apply()


_blas = _BlasLimit()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_blas.after_fork)


def blas_threads(threads: int) -> contextlib.AbstractContextManager[None]:
    """Return a context in which the CPU's BLAS is held to ``threads`` threads, or fewer if another thread asks for it.

    It has its own number again when the last such block of the process has ended.
    """
    if threads < 1:
        raise ConfigError(f"BLAS cannot run on {threads} threads", "use at least 1")
    return _blas.to(threads)


@functools.cache
def _threadpools() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()  # looks through all loaded libraries: once is enough


def keep_freed_memory(keep: bool = True) -> bool:
    """Let glibc's malloc keep freed pages for the next array, in the whole process; return whether it could.

    A training step frees and allocates the same sizes over and over, and glibc hands large blocks back to the system
    each time, so that every step pays for their page faults again: a step of ``vit_digits`` takes 1.4 times as long, of
    ``vit_cifar`` 1.07. Kept, what a large pass has freed stays with the process, as much as a gigabyte. So the commands
    that train or predict do it, best before threads start, and a library call never does.

    ``keep=False`` gives the kept pages back to the system, now and from now on: large blocks as soon as they are freed.
    glibc's thresholds are then those that a process starts with; they no longer rise by themselves, and all threads
    still share one arena. Other C libraries are left as they are.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        if keep:
            kept = libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older ones stop at 32 MiB
            others = [libc.mallopt(-8, 1), libc.mallopt(-1, (1 << 31) - 1), libc.mallopt(-2, 1 << 26)]
            return bool(kept and all(others))  # M_ARENA_MAX, M_TRIM_THRESHOLD and M_TOP_PAD of malloc.h
        restored = [libc.mallopt(what, 1 << 17) for what in (-3, -1, -2)]  # 128 KiB each
        libc.malloc_trim(0)
        return all(restored)
    except (OSError, AttributeError):
        return False
