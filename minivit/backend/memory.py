"""Memory: how much is in use, how much is left, and what the C library does with what is freed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

from minivit.backend.devices import gpu, resolve_device


def memory_in_use(device: str = "cpu") -> int:
    """Return bytes in use now: the process's resident set on the CPU, CuPy's pool on a GPU."""
    if (device := resolve_device(device)) != "cpu":
        import cupy

        with gpu(device):
            return int(cupy.get_default_memory_pool().used_bytes())
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * _page_size()
    except OSError:  # no /proc: the peak is the best that the standard library offers
        return peak_memory()


def peak_memory() -> int:
    """Return the process's largest resident set so far, in bytes."""
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kibibytes on Linux, bytes on macOS


def total_memory(device: str = "cpu") -> int:
    """Return the machine's or the GPU's memory in bytes."""
    if (device := resolve_device(device)) != "cpu":
        with gpu(device) as here:
            return int(here.mem_info[1])
    return os.sysconf("SC_PHYS_PAGES") * _page_size()


def available_memory(device: str = "cpu") -> int:
    """Return how many bytes a process can still take before the machine, its container, or the GPU has none left."""
    if (device := resolve_device(device)) != "cpu":
        import cupy

        with gpu(device) as here:
            pool = cupy.get_default_memory_pool()  # what it holds and nobody uses is free, too
            return int(here.mem_info[0] + pool.total_bytes() - pool.used_bytes())
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
