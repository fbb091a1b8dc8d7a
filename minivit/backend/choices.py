"""Which of cuBLASLt's algorithms a product runs: the fastest, found by timing once, and kept for every later run.

Two algorithms may add in another order, and so differ in the last bits. A choice is therefore made once in a process,
and kept on the disk for each kind of GPU and version of the library: later runs have the same bits. What a process has
used says :func:`chosen`, for the record of a run; which goes on with the same, on whatever machine, by :func:`prefer`.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minivit.backend.cublaslt import ALGORITHM_BYTES, Plan, Products, check, gpus_in_use
from minivit.files import open_regular, user_cache, write_text

ROUNDS = 5  # timed together, after one that is not

_LARGEST_FILE = 1 << 24
_thread = threading.local()
_lock = threading.RLock()
_preferred: dict[tuple[str, str], bytes] = {}  # (GPU, product) → algorithm


@contextlib.contextmanager
def tuning(enabled: bool) -> Iterator[None]:
    """Let matrix products of this thread time algorithms, in this block, or not: then the library's first guess runs.

    What has been timed before, in this process or another, is used all the same.
    """
    before = getattr(_thread, "enabled", True)
    _thread.enabled = enabled
    try:
        yield
    finally:
        _thread.enabled = before


def chosen() -> list[dict[str, str]]:
    """Return the matrix products that this process has run on GPUs, and for each the algorithm (in hex) and its source.

    ``source`` is "timed", "kept" (timed before: read from the disk, or of :func:`prefer`), or "first" (the library's
    first guess).
    """
    used = [(gpu.name, plan) for gpu in gpus_in_use() for plan in gpu.plans() if plan.chosen is not None]
    return [
        {"gpu": name, "product": str(plan.spec), "algorithm": (plan.chosen or b"").hex(), "source": plan.source}
        for name, plan in used
    ]


def prefer(algorithms: Mapping[str, Mapping[str, bytes]]) -> None:
    """Let products of these GPUs, by the names that :func:`chosen` has, run these algorithms, where they still can.

    What has been chosen in this process already stays as it is.
    """
    with _lock:
        _preferred.update({(gpu, name): how for gpu, found in algorithms.items() for name, how in found.items()})


def choose(gpu: Products, plan: Plan, stream: Any, trial: Callable[[], Callable[[bytes], int]]) -> None:
    """Choose a plan's algorithm: what was kept, or the fastest, or the first that can run; and nothing if none can.

    ``trial()`` returns a function that puts the product on the stream by a given algorithm, and returns a status. It
    writes to memory of its own: timing must not touch the output, to which a product may add.
    """
    with _lock:
        if plan.chosen is not None:
            return
        product = str(plan.spec)
        known = _preferred.get((gpu.name, product)), _read(_file(gpu)).get(product)
        if kept := next((how for how in known if how is not None and plan.accepts(how)), None):
            plan.source, plan.chosen = "kept", kept
        elif len(plan.candidates) > 1 and getattr(_thread, "enabled", True) and not stream.is_capturing():
            if (fastest := _fastest(plan, stream, trial())) is not None:
                _keep(_file(gpu), product, fastest)
                plan.source, plan.chosen = "timed", fastest
        else:
            plan.source, plan.chosen = "first", next(filter(plan.accepts, plan.candidates), None)


def _fastest(plan: Plan, stream: Any, run: Callable[[bytes], int]) -> bytes | None:
    import cupy

    times: dict[bytes, float] = {}
    for algorithm in plan.candidates:
        if run(algorithm):
            continue  # what the search proposes does not always run
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(ROUNDS):
            check(run(algorithm), "cublasLtMatmul", plan.spec)
        end.record(stream)
        end.synchronize()
        times[algorithm] = cupy.cuda.get_elapsed_time(start, end)
    return min(times, key=lambda algorithm: times[algorithm], default=None)


# ---- on the disk -----------------------------------------------------------------------------------------------------


def _file(gpu: Products) -> Path:
    """Return where the choices for one kind of GPU and version of the library are kept."""
    return user_cache() / "products" / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu.name)}.json"


def _read(path: Path) -> dict[str, bytes]:
    """Return product → algorithm; nothing of a file that is not there or that is damaged."""
    return _algorithms(_object(path))


def kept_in(path: Path) -> dict[str, dict[str, bytes]]:
    """Return GPU → product → algorithm of a run's record; nothing of a file that is not there or that is damaged."""
    return {gpu: algorithms for gpu, found in _object(path).items() if (algorithms := _algorithms(found))}


def _object(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError), open_regular(path) as f:
        if isinstance(found := json.loads(f.read(_LARGEST_FILE)), dict):
            return found
    return {}


def _algorithms(found: Any) -> dict[str, bytes]:
    """Return product → algorithm, as far as ``found``, of whatever kind, has any."""
    return {
        product: bytes.fromhex(algorithm)
        for product, algorithm in (found.items() if isinstance(found, dict) else ())
        if isinstance(algorithm, str) and re.fullmatch(f"[0-9a-f]{{{2 * ALGORITHM_BYTES}}}", algorithm)
    }


def _keep(path: Path, product: str, algorithm: bytes) -> None:
    """Add a choice to a file, in which another process may have put others meanwhile; not where none can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = {name: value.hex() for name, value in (_read(path) | {product: algorithm}).items()}
        write_text(path, json.dumps(kept, ensure_ascii=False, indent=0, sort_keys=True) + "\n")
