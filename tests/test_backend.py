"""Devices, transfers, memory and random numbers; and: the package calls nothing that CuPy does not have."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import mmap
import operator
import platform
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import threadpoolctl

from minivit import backend
from minivit.backend import Key, normal, permutation, random_bits, uniform
from minivit.errors import ConfigError, DeviceError
from tests import strict

strict_cupy = strict.strict_cupy
any_cupy = strict.any_cupy
PACKAGE = Path(backend.__file__).parents[1]
SAMPLES = 1 << 16


# ---- every call of an array module, against the list of what CuPy has ------------------------------------------------


class Use(NamedTuple):
    line: int
    key: str  # as in cupy_api.json
    positional: int
    keywords: list[str]


def cupy_uses(source: str) -> Iterator[Use]:
    """Find what a source takes from an array module: from ``xp``, ``array_module(…)``, names bound to it, and CuPy."""
    nodes = list(ast.walk(ast.parse(source)))
    modules = {"xp": ""}

    def key_of(node: ast.AST) -> str | None:
        """Return the dotted name that an expression has below cupy, or None if it is something else."""
        if isinstance(node, ast.Name):
            return modules.get(node.id)
        if isinstance(node, ast.NamedExpr):
            return key_of(node.value)
        if isinstance(node, ast.Attribute):
            base = key_of(node.value)
            return None if base is None else f"{base}.{node.attr}".lstrip(".")
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function == "array_module":
                return ""
            if function == "import_module" and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                if name.split(".")[0] in ("cupy", "cupyx"):
                    return "" if name == "cupy" else name.removeprefix("cupy.")
            if function == "getattr" and (base := key_of(node.args[0])) is not None:
                name = (
                    node.args[1].value if isinstance(node.args[1], ast.Constant) else "name that is not in the source"
                )
                return f"{base}.{name}".lstrip(".")
        return None

    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.split(".")[0]
                if root in ("cupy", "cupyx"):
                    name = alias.name if alias.asname else root
                    modules[alias.asname or root] = name.removeprefix("cupy.") if name != "cupy" else ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("cupy", "cupyx"):
            for alias in node.names:
                key = f"{node.module}.{alias.name}".removeprefix("cupy.")
                modules[alias.asname or alias.name] = key
                yield Use(node.lineno, key, 0, [])
        elif isinstance(node, ast.Assign | ast.NamedExpr):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(name, ast.Name) and (key := key_of(value)) is not None:
                        modules[name.id] = key

    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    within = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Attribute | ast.Call | ast.Name) and id(node) not in within and (key := key_of(node)):
            call = calls.get(id(node))
            args = call.args if call else []
            positional = 0 if any(isinstance(a, ast.Starred) for a in args) else len(args)
            yield Use(node.lineno, key, positional, [k.arg for k in call.keywords if k.arg] if call else [])


def package_uses() -> list[tuple[str, Use]]:
    files = sorted(PACKAGE.rglob("*.py"))
    return [(str(file.relative_to(PACKAGE)), use) for file in files for use in cupy_uses(file.read_text())]


def test_the_package_calls_only_what_cupy_has():
    uses = package_uses()
    keys = {(file, use.key) for file, use in uses}
    assert {("backend/random.py", "arange"), ("backend/devices.py", "cuda.Device")} <= keys  # it does look
    problems = [
        f"{file}:{use.line}: {wrong}"
        for file, use in uses
        if (wrong := strict.misuse(use.key, use.positional, use.keywords))
    ]
    assert not problems, "\n".join(problems)


def test_the_package_calls_only_what_the_cupy_here_has():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy's own, about the machine
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        cupyx = importlib.import_module("cupyx")
        importlib.import_module("cupyx.scipy.special")
    root = types.SimpleNamespace(cupyx=cupyx)

    def find(key: str) -> Any:
        return operator.attrgetter(key)(root if key.startswith("cupyx") else cupy)

    for _, use in package_uses():
        try:
            signature = inspect.signature(find(use.key))
        except (TypeError, ValueError):  # exists, but keeps its signature to itself
            continue
        signature.bind_partial(*[None] * use.positional, **dict.fromkeys(use.keywords))  # TypeError if it does not fit
    if cupy.__version__ == strict.API["__version__"]:
        for key in strict.API:
            find(key)


@pytest.mark.parametrize(
    "source",
    [
        "xp.vecdot(a, b)",
        "xp.sum(a, where=mask)",
        "xp.var(a, correction=1)",
        "xp.take_along_axis(a, i, 1, 2)",
        "xp.maximum.reduce(a)",
        "xp.exp(a, where=mask)",
        "m = array_module(a)\nm.errstate()",
        "m, n = backend.array_module(a), 3\nm.vecdot(a, b)",
        "if (m := array_module(a)) is not np: m.vecdot(a, a)",
        "array_module(a).matvec(a, b)",
        "import cupy\ncupy.linalg.nrm(a)",
        "import cupy as cp\ncp.sum(a, initial=0)",
        "import cupyx.scipy.special as special\nspecial.erfx(a)",
        "from cupy import vecdot",
        "importlib.import_module('cupyx.scipy.special').erfx(a)",
        "import_module('cupy.linalg').nrm(a)",
        "getattr(xp, 'vecdot')(a, b)",
        "getattr(xp, name)(a)",
        "function = xp.vecdot",
    ],
)
def test_the_checker_catches(source):
    assert any(strict.misuse(use.key, use.positional, use.keywords) for use in cupy_uses(source))


@pytest.mark.parametrize(
    "source",
    [
        "xp.sum(a, axis=0, keepdims=True)",
        "xp.sum(*args, **kwargs)",
        "xp.linalg.norm(a, axis=-1)",
        "m = xp.linalg\nm.norm(a)",
        "xp.add.at(a, i, b)",
        "xp.add(a, b, out=a)",
        "xp.finfo(a.dtype).eps + xp.pi",
        "np.vecdot(a, b)",
        "a.sum(where=mask)",
        "if array_module(a) is array_module(b): pass",
        "import cupy\nwith cupy.cuda.Device(0): cupy.get_default_memory_pool().used_bytes()",
        "importlib.import_module('cupyx.scipy.special').erf(a)",
        "importlib.import_module(f'package.{name}').exp(a)",
    ],
)
def test_the_checker_lets_pass(source):
    assert not [wrong for use in cupy_uses(source) if (wrong := strict.misuse(use.key, use.positional, use.keywords))]


# ---- devices ---------------------------------------------------------------------------------------------------------


def cupy_with_driver(count: int | str) -> types.ModuleType:
    """Return a CuPy that counts ``count`` devices, or fails so."""

    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count():
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    stub = types.ModuleType("cupy")
    runtime = types.SimpleNamespace(getDeviceCount=get_device_count, CUDARuntimeError=CUDARuntimeError)
    stub.cuda = types.SimpleNamespace(runtime=runtime)
    return stub


def test_auto_device_says_that_cupy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # import cupy: ImportError
    device, why = backend.auto_device("auto")
    assert device == "cpu"
    assert why.startswith("CuPy is not installed: pip install 'minivit[cuda13]'")


def test_auto_device_says_that_the_driver_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_with_driver("cudaErrorInsufficientDriver: CUDA driver version is …"))
    device, why = backend.auto_device()
    assert device == "cpu"
    assert why.startswith("CuPy found, no CUDA driver (cudaErrorInsufficientDriver)")


def test_auto_device_says_that_the_gpu_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_with_driver(0))
    assert backend.auto_device() == ("cpu", "CuPy and a CUDA driver found, but no CUDA device")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_real_cupy_without_a_driver_says_so():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    out = run_python("from minivit import backend; print(*backend.auto_device())")
    if out.startswith("cuda"):
        pytest.skip("this machine has a GPU")
    assert out.startswith("cpu CuPy found, no CUDA driver (cudaError")


def test_cupy_is_imported_only_for_a_cuda_device():
    run_python(
        "import sys, types\n"
        "tried = []\n"
        "finder = types.SimpleNamespace(find_spec=lambda name, *_: tried.append(name) if 'cupy' in name else None)\n"
        "sys.meta_path.insert(0, finder)\n"
        "from minivit import backend\n"
        "backend.to_device(backend.random_bits(backend.Key(0), (3,)), backend.auto_device('cpu')[0])\n"
        "assert not tried, tried\n"
        "backend.auto_device()\n"
        "assert tried[0] == 'cupy'\n"
    )


def test_a_named_device_gets_no_reason(strict_cupy):
    assert backend.auto_device("cpu") == ("cpu", "")
    assert backend.auto_device("cuda:1") == ("cuda:1", "")
    assert backend.auto_device() == ("cuda:0", "")


@pytest.mark.parametrize(("name", "device"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0")])
def test_resolve_device(any_cupy, name, device):
    assert backend.resolve_device(name) == device


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda1", "cuda:0:0", "mps"])
def test_unknown_devices(strict_cupy, name):
    with pytest.raises(DeviceError, match="unknown device") as caught:
        backend.resolve_device(name)
    assert repr(name) in str(caught.value)
    assert "'cuda'" in caught.value.remedy


def test_a_device_beyond_the_last(strict_cupy):
    with pytest.raises(DeviceError, match="'cuda:2' does not exist") as caught:
        backend.resolve_device("cuda:2")
    assert "there are 2: cuda:0 to cuda:1" in caught.value.remedy


def test_a_cuda_device_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match="'cuda' is not available: CuPy is not installed"):
        backend.to_device(np.zeros(3), "cuda")


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_what_a_container_keeps_of_files_counts_as_available(tmp_path, monkeypatch):
    monkeypatch.setattr("minivit.backend.memory._CGROUP", tmp_path)
    of_the_machine = backend.available_memory()  # no such limit
    assert 0 < of_the_machine <= backend.total_memory()
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 300000\nactive_file 100000\ninactive_file 500000\n")
    assert backend.available_memory() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert backend.available_memory() > 1_000_000


# ---- arrays and transfers --------------------------------------------------------------------------------------------


def test_transfers_keep_values_and_dtype(any_cupy):
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    there = backend.to_device(host, "cuda")
    assert isinstance(there, any_cupy.ndarray)
    assert backend.device_of(there) == "cuda:0"
    back = backend.to_device(there, "cpu")
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, host)
    np.testing.assert_array_equal(backend.to_numpy(there), host)


def test_no_transfer_where_none_is_needed(strict_cupy):
    host = np.zeros(3)
    assert backend.to_device(host, "cpu") is host
    assert backend.to_numpy(host) is host
    there = backend.to_device(host, "cuda:1")
    assert strict_cupy.counters.transfers == 1
    assert backend.to_device(there, "cuda:1") is there
    assert strict_cupy.counters.transfers == 1


def test_transfer_from_gpu_to_gpu(strict_cupy):
    first = backend.to_device(np.arange(3.0), "cuda:0")
    second = backend.to_device(first, "cuda:1")
    assert (backend.device_of(first), backend.device_of(second)) == ("cuda:0", "cuda:1")
    np.testing.assert_array_equal(second.get(), first.get())
    assert strict_cupy.cuda.Device() == strict_cupy.cuda.Device(0)  # what was current is so again


def test_whose_array_is_it(any_cupy):
    host = np.zeros(2)
    there = any_cupy.asarray(host)
    assert backend.array_module(host, 1.0) is np
    assert backend.array_module(2.0) is np
    assert backend.array_module(1.0, there) is any_cupy
    assert [backend.is_array(x) for x in (host, there, 1.0, [1.0], np.float64(1))] == [True, True, False, False, False]


def test_on_device_of(strict_cupy):
    there = backend.to_device(np.zeros(2), "cuda:1")
    with backend.on_device_of(there):
        assert backend.device_of(strict_cupy.ones(2) + there) == "cuda:1"
    assert backend.device_of(strict_cupy.ones(2)) == "cuda:0"
    with backend.on_device_of(np.zeros(2)):
        assert backend.device_of(strict_cupy.ones(2)) == "cuda:0"


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_the_machine():
    before = backend.memory_in_use()
    block = mmap.mmap(-1, 1 << 25)  # 32 MiB past malloc, which may have kept as much from a test before
    block.write(b"x" * len(block))
    assert 1 << 20 < before <= backend.memory_in_use() <= backend.total_memory()
    assert backend.memory_in_use() - before > len(block) // 2
    assert backend.peak_memory() >= backend.memory_in_use() * 0.9  # the kernel counts the two not quite alike


def test_memory_of_the_gpu(strict_cupy):
    before = backend.memory_in_use("cuda:1")
    block = backend.to_device(np.ones(1 << 10), "cuda:1")
    assert backend.memory_in_use("cuda:1") - before == block.nbytes
    view = block[5:]
    del block
    assert backend.memory_in_use("cuda:1") - before == 8 << 10  # the view keeps it
    del view
    assert backend.memory_in_use("cuda:1") == before
    assert backend.total_memory("cuda:1") == strict_cupy.cuda.Device(1).mem_info[1]


def test_blas_threads():
    def threads() -> list[int]:
        return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]

    before = threads()
    with backend.blas_threads(1):
        assert set(threads()) <= {1}
    assert threads() == before
    with pytest.raises(ConfigError, match="0 threads"), backend.blas_threads(0):
        pass


def test_blas_threads_of_several_threads_end_in_any_order():
    def threads() -> set[int]:
        return {lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(3, "blas"):
        (own,) = threads()
        assert own > 1
        first, second, third = backend.blas_threads(1), backend.blas_threads(2), backend.blas_threads(1)
        second.__enter__()
        assert threads() == {2}
        first.__enter__()
        third.__enter__()
        first.__exit__(None, None, None)  # as threads do that began before the others and end before them
        assert threads() == {1}
        third.__exit__(None, None, None)
        assert threads() == {2}
        second.__exit__(None, None, None)
        assert threads() == {own}


KEEPING = """
import numpy as np
from minivit.backend import keep_freed_memory, memory_in_use

def after_a_large_pass():
    before = memory_in_use()
    arrays = [np.ones(1 << 18) for _ in range(100)]  # 200 MiB
    del arrays
    return memory_in_use() - before > 1e8

could = keep_freed_memory()
before = memory_in_use()
kept = after_a_large_pass()
restored = keep_freed_memory(False)
print(could, kept, restored, memory_in_use() - before > 1e8, after_a_large_pass())
"""


def test_keep_freed_memory_and_give_it_back():
    glibc = str(platform.libc_ver()[0] == "glibc")
    assert run_python(KEEPING) == f"{glibc} {glibc} {glibc} False False"  # it holds for the whole process


LIBRARY = """
import types
import numpy as np
import minivit as mv
from minivit import backend

calls = []
backend.ctypes = types.SimpleNamespace(CDLL=calls.append)
model = mv.ViT(8, 4, 1, 3, dim=8, depth=1, heads=2)
images, labels = np.zeros((6, 1, 8, 8), np.float32), np.arange(6) % 3
mv.TrainStep(model, mv.optim.AdamW(model.named_parameters()))(images, labels)
mv.predict_logits(model, images)
print(calls)
"""


def test_a_step_and_a_prediction_leave_the_processs_memory_settings_alone():
    assert run_python(LIBRARY) == "[]"


@pytest.mark.parametrize(
    "command", ["train digits --dry-run --quiet", "lr-find digits", "eval x", "predict x y", "bench"]
)
def test_the_commands_keep_freed_memory(command, monkeypatch):
    import minivit.runs.job
    from minivit.cli.main import main

    class Called(Exception):
        pass

    def keep() -> None:
        raise Called

    monkeypatch.setattr(backend, "keep_freed_memory", keep)
    monkeypatch.setattr(minivit.runs.job, "keep_freed_memory", keep)
    with pytest.raises(Called):
        main(command.split())


# ---- random numbers --------------------------------------------------------------------------------------------------


def close(value: float, expected: float, standard_error: float) -> bool:
    """Tell whether a statistic is within 5 standard errors; chance alone fails one seed in two million."""
    return abs(value - expected) < 5 * standard_error


def chi_square(counts: np.ndarray) -> bool:
    """Tell whether counts are as even as uniform ones are, and no more: χ² of k bins has mean k-1, variance 2(k-1)."""
    expected = counts.sum() / counts.size
    freedom = counts.size - 1
    return close(((counts - expected) ** 2 / expected).sum(), freedom, np.sqrt(2 * freedom))


def test_bits_are_splitmix64():
    """The published sequence for the seed 1234567 (Vigna's splitmix64.c), upper halves."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert backend.random._splitmix(np, 1234567, 0, 4).tolist() == [z >> 32 for z in published]


def test_bits_never_change():
    """Frozen: another number here means that no old run can be repeated."""
    assert [Key(0).bits(), Key(1).bits(), Key(-1, 2, 3).bits(), Key(0).child(7).bits()] == [
        2558736989570252433,
        12793040940332582595,
        17314280079339337836,
        11263544890201807909,
    ]
    assert random_bits(Key(3, 4, 5), (2, 3)).tolist() == [
        [373617702, 567285820, 4030156718],
        [4275956176, 3333841694, 3493189875],
    ]


def test_bits_are_the_same_on_both_backends(any_cupy):
    for shape, start in (((5, 7), 0), ((3, 20_001), 5), ((3,), 1 << 40), ((), 2), ((0, 4), 0)):
        here = random_bits(Key(1, 2, 3), shape, start=start)
        there = random_bits(Key(1, 2, 3), shape, start=start, device="cuda:0")
        assert here.shape == there.shape == shape
        assert here.dtype == there.dtype == np.uint32
        np.testing.assert_array_equal(here, there.get())
    there = uniform(Key(4), (20_001,), device="cuda:0")
    assert there.dtype == np.float32
    np.testing.assert_array_equal(uniform(Key(4), (20_001,)), there.get())


def test_bits_lie_on_the_device_asked_for(strict_cupy):
    assert backend.device_of(random_bits(Key(0), (3,), device="cuda:1")) == "cuda:1"
    assert strict_cupy.counters.syncs == strict_cupy.counters.transfers == 0  # made there, not sent there


@pytest.mark.parametrize("draw", [random_bits, uniform])
def test_parts_are_parts_of_the_whole(draw):
    whole = draw(Key(5), (6, 10))
    np.testing.assert_array_equal(draw(Key(5), (2, 10), start=30), whole[3:5])
    np.testing.assert_array_equal(draw(Key(5), (60,)), whole.ravel())
    long = draw(Key(5), (50_000,))
    np.testing.assert_array_equal(draw(Key(5), (40_000,), start=9_000), long[9_000:49_000])


def test_keys_are_distinct():
    keys = [Key(seed, stream, step) for seed in range(12) for stream in range(12) for step in range(12)]
    keys += [Key(seed, 0, 1).child(i).child(j) for seed in range(3) for i in range(20) for j in range(20)]
    keys += [Key(0).child(i) for i in range(100)]
    assert len({key.bits() for key in keys}) == len(set(keys)) == len(keys)


def test_children_keep_step_and_row():
    assert Key(1, 2, 3, 4).child(4).at(9) == Key(1, 2, 9, 4).child(4)
    assert Key(1, 2, 3).child(4).at_row(5) == Key(1, 2, 3, 5).child(4) != Key(1, 2, 3).child(4)
    assert Key(1, 2, 3).at(9) == Key(1, 2, 9)
    assert Key(1).child(2).child(3) != Key(1).child(3).child(2)


@pytest.mark.parametrize("row", [-1, 1.5, 1 << 63, "1"])
def test_a_row_is_a_whole_number_from_0_up(row):
    with pytest.raises(ConfigError, match="a batch begins at row"):
        Key(1).at_row(row)


def test_a_row_changes_no_stream():
    key, other = Key(1, 2, 3), Key(1, 2, 3, row=4)
    assert key.bits() == other.bits() and key.child(5).bits() == other.child(5).bits()
    np.testing.assert_array_equal(random_bits(key, (3, 4)), random_bits(other, (3, 4)))
    assert len({key, other, Key(1, 2, 3, 4)}) == 2


def test_bits_are_uniform():
    octets = random_bits(Key(11), (SAMPLES,)).view(np.uint8).reshape(-1, 4)
    for column in octets.T:
        assert chi_square(np.bincount(column, minlength=256))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (Key(0), Key(1)),
        (Key(0), Key(0, 1)),
        (Key(0), Key(0, 0, 1)),
        (Key(1, 2, 3), Key(1, 3, 2)),
        (Key(0), Key(0).child(0)),
        (Key(7).child(0), Key(7).child(1)),
        (Key(7).child(0).at(1), Key(7).child(1).at(0)),
    ],
)
def test_streams_are_independent(a, b):
    x, y = random_bits(a, (SAMPLES,)), random_bits(b, (SAMPLES,))
    different = np.bitwise_count(x ^ y)  # of 32 bits: mean 16, variance 8
    assert close(different.mean(), 16, np.sqrt(8 / SAMPLES))
    for lag in (0, 1, 2):
        assert close(np.corrcoef(x[lag:], y[: SAMPLES - lag])[0, 1], 0, 1 / np.sqrt(SAMPLES))
    pairs = (x >> np.uint32(28)) * np.uint32(16) + (y >> np.uint32(28))
    assert chi_square(np.bincount(pairs, minlength=256))


def test_neighbours_in_a_stream_are_independent():
    x = random_bits(Key(13), (SAMPLES,))
    for lag in (1, 2, 64):
        assert close(np.corrcoef(x[lag:], x[:-lag])[0, 1], 0, 1 / np.sqrt(SAMPLES))


def test_uniform():
    u = uniform(Key(17), (SAMPLES,))
    assert u.dtype == np.float32
    assert u.min() >= 0 and u.max() < 1
    np.testing.assert_array_equal(u * 2.0**24, np.floor(u * 2.0**24))
    assert close(u.mean(dtype=float), 1 / 2, np.sqrt(1 / 12 / SAMPLES))
    assert close(u.var(dtype=float), 1 / 12, np.sqrt(1 / 180 / SAMPLES))


def test_uniform_never_reaches_one(monkeypatch):
    monkeypatch.setattr("minivit.backend.random._splitmix", lambda *args: np.array([0, 2**32 - 1], np.uint32))
    assert backend.uniform(Key(0), (2,)).tolist() == [0.0, 1 - 2.0**-24]


def test_normal_moments():
    z = normal(Key(19), (SAMPLES,))
    assert z.dtype == np.float64
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # Var zᵏ = E z²ᵏ - (E zᵏ)²
        assert close((z**power).mean(), moment, np.sqrt(variance / SAMPLES))
    assert close((np.abs(z) < 1).mean(), 0.6826895, np.sqrt(0.6826895 * 0.3173105 / SAMPLES))
    assert normal(Key(19), (2, 3)).shape == (2, 3)


def test_normal_is_finite_at_the_ends(monkeypatch):
    monkeypatch.setattr(
        "minivit.backend.random.random_bits", lambda *args, **kwargs: np.array([0, 2**32 - 1], np.uint32)
    )
    assert np.isfinite(backend.normal(Key(0), (2,))).all()


def test_permutation():
    for n in (0, 1, 2, 1000):
        order = permutation(Key(23), n)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(permutation(Key(23), 100), permutation(Key(23), 100))
    orders = {tuple(permutation(Key(23).at(step), 100)) for step in range(50)}
    assert len(orders) == 50


def test_permutation_is_fair():
    orders = np.array([permutation(Key(29).at(step), 6) for step in range(6000)])
    for place in orders.T:
        assert chi_square(np.bincount(place, minlength=6))


def test_a_key_whose_step_lies_on_a_gpu_draws_the_same_numbers(any_cupy):
    key = Key(seed=7, stream=3).child(5)
    for step in (0, 1, 2**63 + 11):
        on_gpu = key.at(any_cupy.asarray(np.array(step, np.uint64)))
        host = uniform(key.at(step), (3, 5), start=4)
        np.testing.assert_array_equal(host, uniform(on_gpu, (3, 5), start=4, device="cuda").get())
        np.testing.assert_array_equal(
            uniform(key.child(1).at(step), (4,)), uniform(on_gpu.child(1), (4,), device="cuda").get()
        )
