"""Compiling: from a kernel's source to a cubin, by cuda-tile and its assembler tileiras. It needs no GPU."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minivit.backend.promises import ArrayPromise, Promise
from minivit.errors import ConfigError, KernelError

SOURCES = "minivit.ops.cuda.kernels"
"""The package whose files hold the kernels; a file's name with a dot is that of a module elsewhere."""

ARCHITECTURES = tuple(f"sm_{n}" for n in (80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121))
"""What tileiras 13.4 compiles for."""

REMEDY = "pip install 'minivit[tile]'"


class Plan(NamedTuple):
    """A kernel as a launch needs it: all that a cubin depends on, but for the GPU and the compiler.

    Constants are kept as Python writes them: 1, 1.0 and True are three.
    """

    file: str
    factory: str
    promises: tuple[Promise, ...]
    constants: tuple[tuple[str, str], ...]
    hints: tuple[tuple[str, int], ...]

    @property
    def module(self) -> str:
        """The name of the module that holds the factory."""
        return self.file if "." in self.file else f"{SOURCES}.{self.file}"

    def values(self) -> dict[str, Any]:
        """Return the factory's arguments."""
        return {name: ast.literal_eval(text) for name, text in self.constants}

    def __str__(self) -> str:
        return f"{self.factory}({', '.join(f'{name}={text}' for name, text in self.constants)})"

    def key(self, arch: str) -> str:
        """Return the hash by which a cubin is found, 64 hexadecimal digits.

        The host's processor is in it because a cubin that uses the copy engine holds code for it.
        """
        host = f"{sys.platform} {platform.machine()}"
        parts = [1, source_hash(self.module), *self, arch, host]  # 1: how arguments are passed
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


parsing = threading.RLock()
"""Python 3.11 does not take two threads at once in ``ast.parse`` (python/cpython#106905), which cuda.tile uses as well.

The assembler, which takes longer, runs beside it.
"""


# ---- sources ---------------------------------------------------------------------------------------------------------


@functools.cache
def source_hash(module: str) -> str:
    """Return a hash over the text of a kernel's module and of those of its package that it imports.

    They are read, not imported; and once, as Python imports a module once.
    """
    with parsing:
        return _hash_of_sources(module)


def _hash_of_sources(module: str) -> str:
    texts: dict[str, str] = {}
    packages = {module.rpartition(".")[0], SOURCES}
    todo = [module]
    while todo:
        name = todo.pop()
        path = None if name in texts else _file(name)
        if path is not None:
            texts[name] = path.read_text(encoding="utf-8")
            # a name in a module of the package, or a module of it
            found = [part for full in imported(texts[name]) for part in (full.rpartition(".")[0], full)]
            todo += [part for part in found if part.rpartition(".")[0] in packages and part not in packages]
    if module not in texts:
        raise ConfigError(f"there is no file {module} of kernels", "see the first argument of tile.Kernel")
    return hashlib.sha256(json.dumps(sorted(texts.items())).encode()).hexdigest()


def _file(module: str) -> Path | None:
    """Return a module's file, without importing it."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its package is none
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin)


def imported(text: str) -> list[str]:
    """Return the names that a source imports, with their modules."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


# ---- the compiler ----------------------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """Return the path of one of NVIDIA's programs, None where it is not.

    It is looked for where cuda.tile does: in NVIDIA's package, PATH, CUDA_HOME, /usr/local/cuda.
    """
    folders = []
    with contextlib.suppress(ImportError, AttributeError):
        import nvidia.cu13

        folders += [os.path.join(path, "bin") for path in nvidia.cu13.__path__]
    folders += os.environ.get("PATH", "").split(os.pathsep)
    folders += [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return shutil.which(name, path=os.pathsep.join(folders))


@functools.cache
def compiler() -> tuple[str, str]:
    """Return the assembler's path and the compiler's version, ("", "") where one of its two parts is missing."""
    import importlib.metadata
    import subprocess

    try:
        version = importlib.metadata.version("cuda-tile")
    except importlib.metadata.PackageNotFoundError:
        return "", ""
    path = find_tool("tileiras")
    if path is None:
        return "", ""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"\bV(\d+(?:\.\d+)+)", said)
    return (path, f"{version}+{release[1]}") if release else ("", "")


class _Watched(threading.local):
    tell: Callable[[Plan], None] | None = None


_watched = _Watched()


@contextlib.contextmanager
def watching(tell: Callable[[Plan], None]) -> Iterator[None]:
    """Call ``tell`` before each kernel that this thread compiles in this block, for a bar."""
    before, _watched.tell = _watched.tell, tell
    try:
        yield
    finally:
        _watched.tell = before


def compiled(plan: Plan, arch: str) -> bytes:
    """Return the cubin of a kernel for ``arch`` (``"sm_90"``); raise KernelError if it cannot be compiled."""
    import subprocess
    import tempfile

    assembler, version = compiler()
    if not version:
        raise KernelError(f"the kernel {plan} is not compiled for {arch}, and its compiler is not installed", REMEDY)
    if _watched.tell is not None:
        _watched.tell(plan)
    with tempfile.TemporaryDirectory(prefix="minivit-") as folder:
        source, cubin = Path(folder) / "kernel.tilebc", Path(folder) / "kernel.cubin"
        command = [assembler, str(source), "-o", str(cubin), "--gpu-name", arch, "-O3"]

        def assemble(plan: Plan) -> bytes:
            source.write_bytes(_bytecode(plan, arch))
            subprocess.run(command, capture_output=True, text=True, check=True)
            return cubin.read_bytes()

        try:
            known = source_hash(plan.module)
            try:
                found = assemble(plan)
            except subprocess.CalledProcessError:
                if not plan.hints:
                    raise
                found = assemble(plan._replace(hints=()))  # its hints are made for sm_90: on others they may break it
            if source_hash.__wrapped__(plan.module) != known:  # it would be kept as what it is not
                raise KernelError(f"{plan.module} was changed while minivit runs", "start it again")
            return found
        except subprocess.CalledProcessError as error:
            raise _failure(plan, arch, version, error.stderr) from error
        except KernelError:
            raise
        except Exception as error:  # cuda.tile's own, and whatever is wrong in a kernel's source
            raise _failure(plan, arch, version, f"{type(error).__name__}: {error}") from error


def _failure(plan: Plan, arch: str, version: str, said: str) -> KernelError:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    why = "\n  ".join(lines[:3]) or "it gave no reason"
    return KernelError(f"the kernel {plan} cannot be compiled for {arch} by {version}: {why}", "report these lines")


def _bytecode(plan: Plan, arch: str) -> bytes:
    """Return the bytecode that the assembler takes."""
    from cuda.tile.compilation import CallingConvention, KernelSignature, export_kernel

    with parsing:
        kernel = getattr(importlib.import_module(plan.module), plan.factory)(**plan.values())
        if plan.hints:
            kernel = kernel.replace_hints(**dict(plan.hints))
        convention = CallingConvention.cutile_python_v2()
        parameters = [_parameter(promise) for promise in plan.promises]
        signature = KernelSignature(parameters, convention, symbol=plan.factory)
        out = io.BytesIO()
        export_kernel(kernel, [signature], out, gpu_code=arch, output_format="tileir_bytecode")
    return out.getvalue()


def _parameter(promise: Promise) -> Any:
    """Return a promise in cuda.tile's terms."""
    import cuda.tile as ct
    from cuda.tile.compilation import ArrayConstraint, ScalarConstraint

    if not isinstance(promise, ArrayPromise):
        return ScalarConstraint(getattr(ct, promise))
    outer = len(promise.strides)
    return ArrayConstraint(
        getattr(ct, {"bool": "bool_"}.get(promise.dtype, promise.dtype)),
        outer + 1,
        index_dtype=ct.int32,
        stride_lower_bound_incl=0,
        alias_groups=promise.overlaps,
        may_alias_internally=promise.over_itself,
        stride_constant=(None,) * outer + (1,),
        stride_divisible_by=(*promise.strides, 1),
        shape_divisible_by=(1,) * outer + (promise.length,),
        base_addr_divisible_by=promise.base,
    )
