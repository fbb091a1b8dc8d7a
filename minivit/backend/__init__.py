"""Array backends: NumPy on the CPU and CuPy on CUDA, behind a handful of functions."""

from minivit.backend.devices import (
    Array,
    array_module,
    auto_device,
    cuda_status,
    device_of,
    is_array,
    on_device_of,
    resolve_device,
    to_device,
    to_numpy,
)
from minivit.backend.memory import (
    available_memory,
    keep_freed_memory,
    memory_in_use,
    peak_memory,
    total_memory,
)
from minivit.backend.random import (
    Key,
    normal,
    permutation,
    random_bits,
    uniform,
    uniform_rows,
)
from minivit.backend.threads import (
    Team,
    blas_threads,
    cpu_cores,
    l2_cache,
)

__all__ = [
    "Array",
    "Key",
    "Team",
    "array_module",
    "auto_device",
    "available_memory",
    "blas_threads",
    "cpu_cores",
    "cuda_status",
    "device_of",
    "is_array",
    "keep_freed_memory",
    "l2_cache",
    "memory_in_use",
    "normal",
    "on_device_of",
    "peak_memory",
    "permutation",
    "random_bits",
    "resolve_device",
    "to_device",
    "to_numpy",
    "total_memory",
    "uniform",
    "uniform_rows",
]
