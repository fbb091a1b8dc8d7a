"""The cache of compiled kernels: one file each in the user's cache, found by a hash of all that a cubin depends on.

A file is called ``sm_90/FACTORY-KEY.COMPILER.cubin``: a machine with a compiler takes what its own version has made,
or compiles; one without takes the newest. Its first line is JSON, with the key and the SHA-256 of the rest, the cubin:
what is damaged, or a copy under another name, is compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from minivit.backend import compiling
from minivit.backend.compiling import REMEDY, Plan
from minivit.backend.threads import cpu_cores
from minivit.errors import KernelError
from minivit.files import open_regular, replacing, user_cache

LARGEST = 1 << 26  # bytes of a file; cubins have some 50,000


def folder() -> Path:
    """Return where compiled kernels are kept: ``minivit/kernels`` in the user's cache."""
    return user_cache() / "kernels"


def _path(plan: Plan, key: str, arch: str, version: str) -> Path:
    return folder() / arch / f"{plan.factory}-{key[:32]}.{version}.cubin"


def _newness(path: Path) -> tuple[int, ...]:
    """Return the numbers of the compiler's version in a file's name, which sort."""
    return tuple(map(int, re.findall(r"\d+", path.name.removesuffix(".cubin").partition(".")[2])))


def _candidates(plan: Plan, key: str, arch: str) -> Iterator[Path]:
    """Yield the files that may hold the cubin: the one of the compiler that is here, else the newest first."""
    if version := compiling.compiler()[1]:
        yield _path(plan, key, arch, version)
    else:
        yield from sorted((folder() / arch).glob(f"{plan.factory}-{key[:32]}.*.cubin"), key=_newness, reverse=True)


def _read(path: Path, key: str) -> bytes | None:
    """Return the cubin in a file, None if there is none, or not this one, or not whole."""
    try:
        with open_regular(path) as file:
            text = file.read(LARGEST)
        line, _, cubin = text.partition(b"\n")
        header = json.loads(line)
        whole = header["key"] == key and header["sha256"] == hashlib.sha256(cubin).hexdigest()
        return cubin if whole else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # ValueError: no JSON, or no text
        return None


def cached(plan: Plan, arch: str) -> bytes | None:
    """Return the cubin of a kernel from the cache, None if it is not there."""
    key = plan.key(arch)
    found = (_read(path, key) for path in _candidates(plan, key, arch))
    return next((cubin for cubin in found if cubin is not None), None)


def obtain(plan: Plan, arch: str) -> bytes:
    """Return the cubin of a kernel for ``arch``, from the cache or else compiled, and then kept there.

    Where the folder cannot be written to, that is said once (a warning), and the cubin lives in this process only.
    Raises KernelError where it can be had neither way.
    """
    if (cubin := cached(plan, arch)) is not None:
        return cubin
    cubin = compiling.compiled(plan, arch)
    key, version = plan.key(arch), compiling.compiler()[1]
    header = {"kernel": str(plan), "arch": arch, "compiler": version, "key": key}
    line = json.dumps(header | {"sha256": hashlib.sha256(cubin).hexdigest()}).encode()
    path = _path(plan, key, arch, version)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(line + b"\n" + cubin)
    except OSError as error:
        _say_unkept(str(folder()), str(error.strerror))
    return cubin


@functools.cache
def _say_unkept(where: str, why: str) -> None:
    warnings.warn(f"compiled kernels cannot be kept in {where} ({why}): each process compiles them again", stacklevel=2)


def how_many(arch: str) -> int:
    """Return the number of files with compiled kernels for ``arch``."""
    return sum(1 for _ in (folder() / arch).glob("*.cubin"))


def missing(arch: str) -> str | None:
    """Return why no kernel can be had for ``arch`` at all, None if some can: it is compiled, or can be."""
    if compiling.compiler()[1] or how_many(arch):
        return None
    remedy = f"{REMEDY}, or copy {folder()} from a machine where 'minivit doctor --build-kernels {arch}' has run"
    return f"neither the compiler of kernels nor compiled ones for {arch} are here: {remedy}"


def build(
    plans: Sequence[Plan], arch: str, done: Callable[[Plan, str, KernelError | None], None] | None = None
) -> tuple[int, int, list[KernelError]]:
    """Fill the cache with kernels for ``arch``, several at once; return how many were built, were there, and failed.

    ``done(plan, how, error)`` is called for each, in order; how is "built", "cached" or "failed".
    """

    def one(plan: Plan) -> tuple[str, KernelError | None]:
        try:
            if cached(plan, arch) is not None:
                return "cached", None
            obtain(plan, arch)
            return "built", None
        except KernelError as error:
            return "failed", error

    results = []
    with ThreadPoolExecutor(cpu_cores()) as pool:
        for plan, result in zip(plans, pool.map(one, plans), strict=True):
            results.append(result)
            if done is not None:
                done(plan, *result)
    how = [result[0] for result in results]
    return how.count("built"), how.count("cached"), [error for _, error in results if error is not None]
