"""Kernels written in cuTile Python: compiled when first needed, kept on the disk, launched on CuPy's arrays.

    FORWARD = tile.Kernel("normalize", "layer_norm_forward", occupancy=4)    # ops/cuda/kernels/normalize.py

    if not FORWARD.ready(x, weight, bias, out, D=192, R=16, eps=1e-6):
        return NotImplemented                                               # the plain operation runs
    FORWARD((rows // 16,), x, weight, bias, out, D=192, R=16, eps=1e-6)     # on the current stream

A kernel's source holds factories: ``def layer_norm_forward(D, R, eps)`` returns a ``@ct.kernel``, with its constants
compiled in. The source is imported to compile it and no sooner: a machine that has neither ``cuda-tile`` nor its
compiler runs what another has compiled (:mod:`minivit.backend.cubins`).

What the compiler is promised of the arrays (dtype, axes, alignment, which lengths are whole multiples of 16 bytes,
which arrays overlap) is read off the arrays of each launch, and is part of what a cubin is found by: nothing is
promised that does not hold.

The calling convention is that of cuTile 1.7: of an array its address, its shape and its strides in elements as int32,
in this order; scalars as int32 or float32; blocks of (1, 1, 1).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from minivit.backend import cubins
from minivit.backend.compiling import ARCHITECTURES, Plan
from minivit.backend.devices import cuda_status
from minivit.backend.planning import planned
from minivit.backend.promises import Like, Loose, Place, flat, promises
from minivit.errors import ConfigError, KernelError

__all__ = ["Kernel", "Like", "Loose", "Plan", "architecture", "why_not"]

GRID = (2**31 - 1, 65535, 65535)  # the most programs along each axis

# ---- where kernels run -----------------------------------------------------------------------------------------------


def architecture() -> str | None:
    """Return for what kernels are compiled that run on the current GPU, ``"sm_90"``; None below compute capability 8.0.

    A GPU that the compiler does not know runs what is compiled for an older one of its major version.
    """
    import cupy

    capability = int(cupy.cuda.Device().compute_capability)
    older = [name for name in ARCHITECTURES if capability // 10 * 10 <= int(name.removeprefix("sm_")) <= capability]
    return older[-1] if older else None


def why_not() -> str | None:
    """Return why none of minivit's kernels can run on the current GPU, None if some can."""
    if no_cuda := cuda_status():
        return no_cuda
    arch = architecture()
    if arch is None:
        known = f"{ARCHITECTURES[0]} to {ARCHITECTURES[-1]}"
        return f"minivit's kernels are for GPUs of compute capability 8.0 and later ({known}): this one is none"
    return cubins.missing(arch)


Launch = Callable[[tuple[int, ...], tuple[Any, ...], list[Place | None]], None]


def _load(plan: Plan) -> Launch:
    """Return a function of (grid, arguments, where they lie) that launches a kernel on the current GPU and stream.

    Raises KernelError where it cannot be had.
    """
    import cupy

    if reason := why_not():
        raise KernelError(f"the kernel {plan} cannot run: {reason}", "use the plain operation")
    arch = architecture()
    assert arch is not None
    module = cupy.cuda.Module()
    try:
        module.load(cubins.obtain(plan, arch))
        function = module.get_function(plan.factory)
    except cupy.cuda.driver.CUDADriverError as error:
        raise KernelError(f"the GPU does not take the kernel {plan}: {error}", "update NVIDIA's driver") from error

    def launch(grid: tuple[int, ...], args: tuple[Any, ...], places: list[Place | None]) -> None:
        function(grid, (1, 1, 1), flat(args, places))

    return launch


def _device() -> Any:
    """Return what names the current GPU among all that this process knows."""
    import cupy

    return cupy.cuda.runtime.getDevice()


def _capturing() -> bool:
    import cupy

    return cupy.cuda.get_current_stream().is_capturing()


class _InCaptureError(KernelError):
    """A kernel that is not loaded yet is needed in a capture, which waits for nothing: not a reason to go without."""


# ---- kernels ---------------------------------------------------------------------------------------------------------


class Kernel:
    """A kernel, by the file that holds its source and the factory that makes it.

    ``file`` is the name of a file in ops/cuda/kernels, without ``.py``, or of a module elsewhere, with its dots;
    ``hints`` are the compiler's (``occupancy``, ``num_worker_warps``).
    """

    def __init__(self, file: str, factory: str, **hints: int) -> None:
        self.file, self.factory, self.hints = file, factory, hints
        self._functions: dict[tuple[Any, Plan], Launch | KernelError] = {}
        self._lock = threading.Lock()
        self._told = False

    def __repr__(self) -> str:
        return f"<kernel {self.factory} of {self.file}>"

    def __call__(self, grid: int | tuple[int, ...], *args: Any, hints: Any = None, **constants: Any) -> None:
        """Launch ``grid`` programs (along up to three axes) on the current stream of the current GPU.

        ``args`` are CuPy's arrays, integers (int32) and floats (float32), as the kernel takes them; ``constants`` are
        the factory's. ``hints``, a dict, stand in for the kernel's own. Raises KernelError where it cannot run:
        :meth:`ready` tells.
        """
        plan, places, why_not = self._plan(args, hints, constants)
        if why_not:
            raise KernelError(f"the kernel {self.factory} cannot take its arguments: {why_not}", "ask ready() before")
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        grid += (1,) * (3 - len(grid))
        if len(grid) > 3 or any(not 0 <= n <= most for n, most in zip(grid, GRID, strict=True)):
            raise KernelError(f"a grid of {grid} programs for the kernel {self.factory}", f"the most are {GRID}")
        if (plans := planned()) is not None:
            plans[plan] = plans.get(plan, 0) + 1
        elif 0 not in grid:
            args = tuple([x.array if isinstance(x, Loose) else x for x in args])
            self._function(plan)(grid, args, places)

    def ready(self, *args: Any, hints: Any = None, **constants: Any) -> bool:
        """Tell whether a launch with these would work; the kernel is then loaded, and compiled before if need be.

        An array that is still to be made is given as a :class:`Like`. While planning all is ready that could be
        launched. A kernel that cannot be had though others can is said once, as a warning. Raises KernelError within a
        capture in which it would have to be loaded.
        """
        plan, _, unfit = self._plan(args, hints, constants)
        if unfit:
            return False
        if (plans := planned()) is not None:
            plans.setdefault(plan, 0)  # where the arrays differ a little from a launch's, it is needed as well
            return True
        try:
            self._function(plan)
        except _InCaptureError:
            raise
        except KernelError as error:
            if not self._told and why_not() is None:
                self._told = True
                warnings.warn(f"{error.what}: the plain operation runs in its place", stacklevel=3)
            return False
        return True

    def _plan(
        self, args: tuple[Any, ...], hints: Mapping[str, int] | None, constants: Mapping[str, Any]
    ) -> tuple[Plan, list[Place | None], str]:
        found, places, unfit = promises(args)
        hints = self.hints if hints is None else hints
        texts = tuple([(name, _text(name, constants[name])) for name in sorted(constants)])
        return Plan(self.file, self.factory, found, texts, tuple(sorted(hints.items()))), places, unfit

    def _function(self, plan: Plan) -> Launch:
        """Return what launches the kernel, loaded once on each GPU. That it could not be had is kept as well."""
        key = (_device(), plan)
        found = self._functions.get(key)
        if found is None:
            with self._lock:
                found = self._functions.get(key)
                if found is None:
                    if _capturing():
                        remedy = "run the same step before it is captured"
                        raise _InCaptureError(f"the kernel {plan} is first needed in a capture", remedy)
                    found = self._functions[key] = self._loaded(plan)
        if isinstance(found, KernelError):
            raise found
        return found

    def _loaded(self, plan: Plan) -> Launch | KernelError:
        try:
            return _load(plan)
        except KernelError as error:
            return error


def _text(name: str, value: Any) -> str:
    """Return a constant as Python writes it."""
    if type(value) is tuple:
        for item in value:
            _text(name, item)
    elif type(value) not in (bool, int, float, str):
        raise ConfigError(f"the constant {name} of a kernel is a {type(value).__name__}", "give int, float, bool, str")
    return repr(value)
