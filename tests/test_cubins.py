"""The cache of compiled kernels, with a compiler that only counts; at the end the real one, where it is installed."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from minivit.backend import compiling, cubins
from minivit.backend.compiling import ARCHITECTURES, Plan, source_hash
from minivit.backend.promises import promises
from minivit.errors import ConfigError, KernelError


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler of version 1.0+2.0, and an empty cache. What it makes is new each time; its list says what it made."""
    made = []

    def compiled(plan, arch):
        if not compiling.compiler()[1]:
            raise KernelError("no compiler", "install it")
        made.append(plan)
        return f"cubin {len(made)} of {plan} for {arch}\n".encode() * 1000

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "compiler", lambda: ("tileiras", "1.0+2.0"))
    monkeypatch.setattr(compiling, "compiled", compiled)
    cubins._say_unkept.cache_clear()
    return made


@pytest.fixture
def no_compiler(monkeypatch):
    return lambda: monkeypatch.setattr(compiling, "compiler", lambda: ("", ""))


def plan_for(*args, factory="scale", file="tests.toy_kernels", hints=(), **constants):
    args = args or (np.zeros((4, 8), np.float32),)
    return Plan(file, factory, promises(args)[0], tuple((k, repr(v)) for k, v in sorted(constants.items())), hints)


PLAN = plan_for(R=4, W=16, by=2.0)


def files():
    return sorted(path for path in cubins.folder().rglob("*") if path.is_file())


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_kernel_is_compiled_once(compiler, no_compiler):
    cubin = cubins.obtain(PLAN, "sm_90")
    assert cubins.obtain(PLAN, "sm_90") == cubin
    assert compiler == [PLAN]
    (path,) = files()
    assert path.parent == cubins.folder() / "sm_90"
    assert (cubins.how_many("sm_90"), cubins.how_many("sm_80")) == (1, 0)
    no_compiler()
    assert cubins.obtain(PLAN, "sm_90") == cubin
    with pytest.raises(KernelError, match="no compiler"):
        cubins.obtain(PLAN, "sm_80")
    assert cubins.missing("sm_90") is None
    assert "--build-kernels sm_80" in cubins.missing("sm_80")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cubins.folder() == tmp_path / ".cache" / "minivit" / "kernels"


OTHERS = {
    "factory": plan_for(R=4, W=16, by=2.0, factory="row_sums"),
    "constant": plan_for(R=4, W=16, by=3.0),
    "type of a constant": plan_for(R=4, W=16, by=2),
    "hint": plan_for(R=4, W=16, by=2.0, hints=(("occupancy", 4),)),
    "dtype": plan_for(np.zeros((4, 8), np.float16), R=4, W=16, by=2.0),
    "axes": plan_for(np.zeros(8, np.float32), R=4, W=16, by=2.0),
    "alignment": plan_for(np.zeros((4, 9), np.float32)[:, 1:], R=4, W=16, by=2.0),
    "divisibility": plan_for(np.zeros((4, 7), np.float32), R=4, W=16, by=2.0),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_key_tells_kernels_apart(what):
    assert OTHERS[what].key("sm_90") != PLAN.key("sm_90")


def test_the_key_knows_gpu_host_and_arrays(monkeypatch):
    assert plan_for(np.ones((9, 16), np.float32), R=4, W=16, by=2.0).key("sm_90") == PLAN.key("sm_90")
    assert PLAN.key("sm_80") != (before := PLAN.key("sm_90"))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert PLAN.key("sm_90") != before, "a cubin holds code for the host's processor"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no header", "list", "nested", "another's", "folder"])
def test_a_damaged_file_is_compiled_again(compiler, no_compiler, damage):
    whole = cubins.obtain(PLAN, "sm_90")
    (path,) = files()
    data = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "another's":
        other = plan_for(R=4, W=16, by=3.0)
        cubins.obtain(other, "sm_90")
        shutil.copy(files()[0], path)
    else:
        spoilt = {"cut": data[:-1], "flipped": data[:-9] + b"\0" + data[-8:], "empty": b"", "no header": data[9:],
                  "list": b"[1]\n" + whole, "nested": b"[" * 100_000}  # fmt: skip
        path.write_bytes(spoilt[damage])
    assert cubins.cached(PLAN, "sm_90") is None
    if damage == "folder":
        with pytest.warns(UserWarning, match="cannot be kept"):
            cubins.obtain(PLAN, "sm_90")
        return
    again = cubins.obtain(PLAN, "sm_90")
    assert again != whole
    no_compiler()
    assert cubins.obtain(PLAN, "sm_90") == again


def test_versions(compiler, no_compiler, monkeypatch):
    found = {}
    for version in ("1.9.0+13.4", "1.10.0+13.4", "1.7.0+13.4"):
        monkeypatch.setattr(compiling, "compiler", lambda version=version: ("tileiras", version))
        found[version] = cubins.obtain(PLAN, "sm_90")
    assert len(compiler) == 3, "each compiler makes its own"
    assert cubins.obtain(PLAN, "sm_90") == found["1.7.0+13.4"]
    no_compiler()
    assert cubins.obtain(PLAN, "sm_90") == found["1.10.0+13.4"], "without one, the newest"
    newest = next(path for path in files() if "1.10" in path.name)
    newest.write_bytes(b"")
    assert cubins.obtain(PLAN, "sm_90") == found["1.9.0+13.4"], "that is whole"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_to_the_user(compiler):
    cubins.folder().mkdir(parents=True)
    cubins.folder().chmod(0o555)
    with pytest.warns(UserWarning, match="cannot be kept"):
        cubins.obtain(PLAN, "sm_90")


def test_a_folder_that_cannot_be_written_to(compiler, tmp_path):
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.warns(UserWarning, match="cannot be kept"):
        first = cubins.obtain(PLAN, "sm_90")
    assert cubins.obtain(PLAN, "sm_90") != first, "compiled again, and silently: a warning would be an error"


def test_many_at_once(compiler):
    """Threads here stand for processes: nothing but the files is shared."""
    found = []
    threads = [threading.Thread(target=lambda: found.append(cubins.obtain(PLAN, "sm_90"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert cubins.cached(PLAN, "sm_90") in found
    assert len(files()) == 1, "no half file is left"


def test_building(compiler, monkeypatch):
    plans, told = [plan_for(R=4, W=16, by=float(n)) for n in range(5)], []
    cubins.obtain(plans[3], "sm_90")
    make = compiling.compiled

    def compiled(plan, arch):
        if plan == plans[1]:
            raise KernelError("broken", "report this")
        return make(plan, arch)

    monkeypatch.setattr(compiling, "compiled", compiled)
    built, cached, failed = cubins.build(plans, "sm_90", lambda plan, how, error: told.append((plan, how)))
    assert (built, cached, [error.what for error in failed]) == (3, 1, ["broken"])
    assert told == list(zip(plans, ["built", "failed", "built", "cached", "built"], strict=True))


# ---- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of kernels: a.py imports b.py of it, c.py is imported by none."""
    folder = tmp_path / "kernels_of_ours"
    folder.mkdir()
    for name, text in {"__init__": "", "a": "from kernels_of_ours import b\n", "b": "x = 1\n", "c": ""}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.startswith("kernels_of_ours")]:
        del sys.modules[name]


def test_the_key_knows_the_sources(package):
    def hashes(name, text):
        (package / name).write_text(text)
        source_hash.cache_clear()
        return source_hash("kernels_of_ours.a")

    first = source_hash("kernels_of_ours.a")
    assert "kernels_of_ours.a" not in sys.modules, "nothing is imported"
    assert hashes("c.py", "y = 2\n") == first
    assert hashes("b.py", "x = 2\n") != first
    assert hashes("b.py", "x = 1\n") == first
    assert hashes("a.py", "from kernels_of_ours.b import x\n") != first
    assert hashes("b.py", "x = 3\n") != hashes("b.py", "x = 1\n"), "imported by the other form, too"
    with pytest.raises(ConfigError, match="no file"):
        source_hash("kernels_of_ours.none")


def test_our_kernels_import_nothing_that_their_hash_does_not_know():
    folder = Path(importlib.import_module(compiling.SOURCES).__file__).parent
    for path in folder.glob("*.py"):
        for name in compiling.imported(path.read_text()):
            assert name.startswith(("cuda.tile", "math", compiling.SOURCES)), f"{path.name} imports {name}"


def test_hints_that_break_the_assembler_are_left_out(monkeypatch):
    hints = []

    def run(command, **_):
        if hints[-1] or "sm_121" in command:
            raise subprocess.CalledProcessError(1, command, stderr=f"broken by {hints[-1]}")
        Path(command[3]).write_bytes(b"cubin")

    monkeypatch.setattr(compiling, "compiler", lambda: ("tileiras", "1.0+2.0"))
    monkeypatch.setattr(compiling, "_bytecode", lambda plan, arch: hints.append(plan.hints) or b"")
    monkeypatch.setattr(subprocess, "run", run)
    plan = OTHERS["hint"]
    assert compiling.compiled(plan, "sm_80") == b"cubin"
    assert hints == [plan.hints, ()]
    with pytest.raises(KernelError, match=r"broken by \(\)"):
        compiling.compiled(plan, "sm_121")
    hints.clear()
    with pytest.raises(KernelError, match="broken"):
        compiling.compiled(PLAN, "sm_121")
    assert hints == [()], "it has none to leave out"


# ---- the real compiler -----------------------------------------------------------------------------------------------

real = pytest.mark.skipif(not compiling.compiler()[1], reason=f"no compiler of kernels: {compiling.REMEDY}")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@real
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_kernels_are_compiled(empty_cache, arch):
    told = []
    with compiling.watching(told.append):
        cubin = cubins.obtain(plan_for(np.zeros((4, 8)), np.zeros((4, 8)), 0.5, R=4, W=16, by=2.0), arch)
    assert cubin[:4] == b"\x7fELF"
    assert b"scale" in cubin
    assert os.fsencode(Path(__file__).parent) not in cubin, "nothing of this machine is in it"
    assert [str(plan) for plan in told] == ["scale(R=4, W=16, by=2.0)"]


@real
def test_what_the_compiler_refuses(empty_cache):
    x = np.zeros((8, 8), np.float32)
    with pytest.raises(KernelError, match=r"wrong\(kind='side'\) cannot be compiled for sm_90 by .*power"):
        cubins.obtain(plan_for(x, x, factory="wrong", kind="side"), "sm_90")
    with pytest.raises(KernelError, match="cannot be compiled"):
        cubins.obtain(plan_for(x, factory="none"), "sm_90")
    with pytest.raises(KernelError, match="cannot be compiled"):
        cubins.obtain(plan_for(x, x, factory="wrong", kind=""), "sm_10")
    assert files() == []


@real
def test_a_source_that_changes_while_minivit_runs(empty_cache, package):
    text = (Path(__file__).parent / "toy_kernels.py").read_text()
    (package / "a.py").write_text(text)
    source_hash.cache_clear()
    plan = plan_for(np.zeros((8, 8)), np.zeros((8, 8)), factory="wrong", file="kernels_of_ours.a", kind="")
    plan.key("sm_90")
    (package / "a.py").write_text(text.replace("x (R, 8)", "x (r, 8)"))
    with pytest.raises(KernelError, match="was changed"):
        cubins.obtain(plan, "sm_90")
    assert files() == []


@real
def test_the_known_architectures_are_the_compilers():
    import subprocess

    said = subprocess.run([compiling.compiler()[0], "--help"], capture_output=True, text=True, check=True).stdout
    assert all(f"={arch} " in said for arch in ARCHITECTURES)


def test_headers_are_json(compiler):
    cubins.obtain(PLAN, "sm_90")
    header = json.loads(files()[0].read_bytes().partition(b"\n")[0])
    assert header["kernel"] == "scale(R=4, W=16, by=2.0)"
    assert (header["arch"], header["compiler"]) == ("sm_90", "1.0+2.0")
