"""The machine and the software that figures are from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from minivit import __version__
from minivit.backend import compiling, cpu_cores, cubins, cuda_status, tile, total_memory
from minivit.show.text import bytes_text, plural

PARTS = ("numpy", "pillow", "tqdm", "threadpoolctl")


def versions() -> dict[str, str]:
    """Return the versions of minivit and of what it stands on."""
    found = {"minivit": __version__, "python": platform.python_version()}
    for part in PARTS:
        try:
            found[part] = importlib.metadata.version(part)
        except importlib.metadata.PackageNotFoundError:
            found[part] = "not installed"
    cupy = [d for d in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if _installed(d)]
    found["cupy"] = importlib.metadata.version(cupy[0]) if cupy else "not installed"
    return found


def _installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def system_text() -> str:
    """Return the operating system, its version and the kind of processor; ``platform.platform()`` would start uname."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def cpu_text() -> str:
    """Return the processor's name, and how many of its cores this process may use."""
    name = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # no /proc
        pass
    return f"{name}, {plural(os.cpu_count() or 1, 'core')}, {cpu_cores()} usable here"


def blas_text() -> str:
    """Return which BLAS NumPy uses, for which processors it was tuned, and on how many threads."""
    import threadpoolctl

    found = [
        f"{lib['internal_api']} {lib.get('version') or '?'}, {lib.get('architecture', 'unknown')} kernels, "
        f"{plural(lib['num_threads'], 'thread')}"
        for lib in threadpoolctl.threadpool_info()
        if lib["user_api"] == "blas"
    ]
    return "; ".join(found) or "unknown to threadpoolctl"


def gpu_text() -> str:
    """Return the first GPU's memory."""
    return f"cuda:0 with {bytes_text(total_memory('cuda:0'))}"


def kernels_text() -> str:
    """Return which compiler of kernels there is, how many compiled ones, and whether they run on the first GPU."""
    version = compiling.compiler()[1]
    made = {arch: count for arch in compiling.ARCHITECTURES if (count := cubins.how_many(arch))}
    kept = ", ".join(f"{count:,} for {arch}" for arch, count in made.items()) or "none"
    how = f"compiler {version}" if version else f"no compiler ({compiling.REMEDY})"
    usable = "no GPU runs them here" if cuda_status() else tile.why_not() or f"they run here, on {tile.architecture()}"
    return f"{how}; compiled: {kept}; {usable}"
