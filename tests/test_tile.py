"""Kernels: the stand-in for cuda.tile, what is promised of arrays, launching, planning. Their cache: test_cubins.py."""

import threading
import warnings
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import minivit as mv
from minivit.backend import Array, array_module, tile
from minivit.backend.planning import planned, planning
from minivit.backend.promises import ArrayPromise, flat, promises
from minivit.backend.tile import Kernel, Like, Loose
from minivit.errors import ConfigError, KernelError
from tests.tile import TileError, emulate

load_for_real, why_not_for_real = tile._load, tile.why_not  # before the strict stand-in takes their places

SCALE = Kernel("tests.toy_kernels", "scale")
ROW_SUMS = Kernel("tests.toy_kernels", "row_sums", occupancy=4)
WRONG = Kernel("tests.toy_kernels", "wrong")
BF16 = np.dtype(ml_dtypes.bfloat16)


def plan_of(kernel, *args, **constants):
    with planning() as plans:
        kernel(1, *args, **constants)
    (plan,) = plans
    return plan


def run(kernel, grid, *args, **constants):
    """Launch a kernel on NumPy arrays, by the stand-in."""
    grid = (*grid, *(1,) * (3 - len(grid)))
    emulate(plan_of(kernel, *args, **constants), grid, args)


def numbers(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# ---- the stand-in for cuda.tile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_a_kernel_gives_what_numpy_gives(dtype):
    x = numbers(10, 20).astype(dtype)
    out = np.full((10, 20), np.nan, dtype)
    run(SCALE, (2, 3), x, out, 0.5, R=4, W=16, by=2.0)
    np.testing.assert_array_equal(out, (x.astype(np.float32) * np.float32(2) + np.float32(0.5)).astype(dtype))


def test_sums_over_rows():
    x, out = numbers(10, 20), np.full(10, np.nan, np.float32)
    run(ROW_SUMS, (3,), x, out, R=4, W=32)
    np.testing.assert_allclose(out, x.sum(1), rtol=1e-6, atol=1e-6)


def test_the_shared_helpers():
    x, weight, out = np.abs(numbers(10, 24)) + 1, np.arange(24, dtype=np.float32), np.full((10, 24), np.nan, BF16)
    run(Kernel("tests.toy_kernels", "shares"), (3,), x, weight, out, D=24, R=4)
    np.testing.assert_allclose(out.astype(np.float32), weight * x / x.sum(1, keepdims=True), rtol=2**-8)


def test_gather_and_scatter():
    x, index, out = numbers(10, 8), np.array([3, 0, 9], np.int32), np.full((3, 8), np.nan, np.float32)
    run(Kernel("tests.toy_kernels", "picked"), (3,), x, index, out, n=8)
    np.testing.assert_array_equal(out, x[index])


@pytest.mark.parametrize(
    "kind, said",
    [
        ("side", "not a power of two"), ("outside", "wholly outside"), ("dtype", "is stored in an array of"),
        ("half", "convert to float32"), ("mixed", "several dtypes: float32 float16"), ("double", "float64"),
        ("element", "only"),
        ("changed", "does not change"), ("half sum", "convert to float32"), ("product", "a product of"),
        ("accumulator", "added up in float16"), ("both write", "two programs write"),
        ("reads another's", "reads what another has written"), ("writes what another reads", "another"),
        ("unchecked", "check_bounds=False"), ("scattered twice", "twice"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(kind, said):
    x, out = numbers(8, 8), np.zeros((8, 8), np.float32)
    with pytest.raises(TileError, match=said):
        run(WRONG, (2,), x, out, kind=kind)
    run(WRONG, (2,), x, out, kind="")
    np.testing.assert_array_equal(out, x)


def test_what_lies_beyond_an_array_is_poison():
    x, out = numbers(7, 8), np.zeros((8, 8), np.float32)
    run(WRONG, (2,), x, out, kind="padding")
    np.testing.assert_array_equal(out[:7], x)
    assert np.isnan(out[7]).all()


def test_writes_beyond_an_array_are_dropped():
    x, memory = numbers(8, 8), np.zeros((9, 8), np.float32)
    run(WRONG, (2,), x, memory[:7], kind="")
    np.testing.assert_array_equal(memory[:7], x[:7])
    assert not memory[7:].any()


# ---- launching -------------------------------------------------------------------------------------------------------


def test_a_launch_is_counted(strict_cupy):
    x, out = strict_cupy.asarray(numbers(10, 20)), strict_cupy.empty((10, 20), np.float32)
    strict_cupy.counters.reset()
    assert SCALE.ready(x, Like(np.float32, (10, 20)), 0.5, R=4, W=16, by=2.0)
    SCALE((2, 3), x, out, 0.5, R=4, W=16, by=2.0)
    assert strict_cupy.counters.launched == {"scale": 1}
    assert strict_cupy.counters.bytes == 2 * 10 * 20 * 4
    np.testing.assert_array_equal(out.get(), x.get() * np.float32(2) + np.float32(0.5))
    none = x[:0], out[:0]
    strict_cupy.counters.reset()
    SCALE((0, 3), *none, 0.5, R=4, W=16, by=2.0)
    assert strict_cupy.counters.launches == 0, "no programs, no launch"


def test_a_kernel_stays_on_its_device(strict_cupy):
    with strict_cupy.cuda.Device(1):
        x = strict_cupy.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="device 1"):
        WRONG(1, x, x, kind="")


@pytest.mark.parametrize("array", ["gaps", "backwards"])
def test_an_array_that_does_not_fit(strict_cupy, array):
    x = strict_cupy.asarray(numbers(8, 16))
    x = {"gaps": x[:, ::2], "backwards": x[::-1, :8]}[array]
    out = strict_cupy.empty((8, 8), np.float32)
    assert not WRONG.ready(x, out, kind="")
    with pytest.raises(KernelError, match=array) as error:
        WRONG(2, x, out, kind="")
    assert error.value.remedy


def test_wrong_arguments(strict_cupy):
    x = strict_cupy.zeros((4, 8), np.float32)
    for arguments, constants in (((x, "x"), {}), ((x, True), {}), ((x[0, 0], x), {}), ((x, x), {"D": np.float32(1)})):
        with pytest.raises(ConfigError):
            WRONG(1, *arguments, kind="", **constants)
    with pytest.raises(KernelError, match="grid"):
        WRONG((1, 65536), x, x, kind="")
    with pytest.raises(KernelError, match="grid"):
        WRONG((1, 1, 1, 1), x, x, kind="")
    assert not WRONG.ready(x, 2**31, kind="")


# ---- what is promised ------------------------------------------------------------------------------------------------


def promised(*args):
    return promises(args)[0]


def test_promises_hold():
    x = np.zeros((6, 24), np.float32)
    plain = ArrayPromise("float32", (4,), 4, 16, False, ())
    assert promised(x, 1, 2.0) == (plain, "int32", "float32")
    assert promised(x[:, :21]) == (plain._replace(length=1),)
    assert promised(x[:, 4:]) == (plain,)
    assert promised(x[:, 1:21]) == (plain._replace(base=4),)
    assert promised(np.zeros((6, 22), np.float32)) == (plain._replace(strides=(1,), length=1, base=4),)
    assert promised(np.zeros((6, 24), BF16)) == (ArrayPromise("bfloat16", (8,), 8, 16, False, ()),)
    assert promised(np.zeros((6, 24), bool)) == (ArrayPromise("bool", (1,), 1, 1, False, ()),)
    assert promised(np.broadcast_to(x[0], (5, 24)))[0].over_itself
    assert promised(np.zeros(24, np.float32)) == (plain._replace(strides=()),)


def test_batches_of_all_sizes_share_a_kernel():
    assert len({promised(np.zeros((n, 24), np.float32)) for n in (1, 2, 7, 64)}) == 1
    assert promised(np.zeros((7, 24), np.float32)[:1]) == promised(np.zeros((1, 24), np.float32))


def test_of_a_loose_array_only_its_dtype_is_promised():
    x = np.zeros((6, 24), np.float32)
    arrays = (x, x[:, :21], x[:, 1:21], np.zeros((6, 22), np.float32), Like(np.float32, (6, 24)))
    assert {promised(Loose(array)) for array in arrays} == {(ArrayPromise("float32", (1,), 1, 4, False, ()),)}
    assert [p.overlaps for p in promised(Loose(x), x[3:])] == [("0-1",), ("0-1",)]


def test_what_is_to_be_made_is_promised_as_if_it_were():
    for shape, dtype in (((6, 24), np.float32), ((7,), np.int32), ((3, 5, 8), np.float16)):
        assert promised(Like(dtype, shape)) == promised(np.empty(shape, dtype))


def test_overlaps_are_seen():
    x, y = np.zeros((6, 24), np.float32), np.zeros((6, 24), np.float32)
    assert [p.overlaps for p in promised(x, y, x[3:])] == [("0-2",), (), ("0-2",)]
    assert [p.overlaps for p in promised(x[:3], 1.0, x[3:])[::2]] == [(), ()]
    assert [p.overlaps for p in promised(x, x[2:], x[:1])] == [("0-1", "0-2"), ("0-1",), ("0-2",)]


def test_an_axis_of_one_place_has_the_stride_of_a_contiguous_array():
    def passed(x):
        _, (place,), why_not = promises([x])
        return why_not or place.layout.numbers

    assert passed(np.zeros((4, 6, 8), np.float32)[:, :1]) == (4, 1, 8, 48, 8, 1)
    assert passed(np.zeros((8, 3), np.float32)[:, 1:2]) == (8, 1, 3, 1)
    assert "gaps" in passed(np.zeros((8, 3), np.float32)[:, :1].T)
    pairs = np.zeros(8, [("a", np.float32), ("b", np.int16)])["a"]
    assert pairs.strides == (6,) and "gaps" in passed(pairs)


def test_more_than_int32_is_refused():
    x = np.broadcast_to(np.zeros(1, np.int8), (2**31 + 1,))
    assert "spans" in promises([np.lib.stride_tricks.as_strided(x, (2, 8), (2**31, 1))])[2]
    assert "int32" in promises([2**31])[2]


def test_the_calling_convention():
    x = np.zeros((6, 24), np.float16)[:, 8:]
    args = (x, 3, 0.5)
    sent = flat(args, promises(args)[1])
    address = x.__array_interface__["data"][0]
    assert sent == [address, 6, 16, 24, 1, 3, 0.5]
    assert [type(n) for n in sent] == [np.uint64, *[np.int32] * 5, np.float32]


def test_constants_are_told_apart():
    x = np.zeros((4, 8), np.float32)
    plans = {plan_of(WRONG, x, x, kind=value) for value in (1, 1.0, True, "1", (1,))}
    assert len(plans) == 5
    assert [plan.values()["kind"] for plan in plans if plan.constants[0][1] == "(1,)"] == [(1,)]


# ---- on a GPU, as far as it goes without one -------------------------------------------------------------------------


class Noted:
    """What a driver was told."""

    def __init__(self):
        self.loaded, self.launched, self.capturing = [], [], False


@pytest.fixture
def driver(strict_cupy, monkeypatch):
    """CuPy's way to load and launch cubins, which only notes what it is told; kernels compile to b"cubin"."""
    noted = Noted()

    class Module:
        def load(self, cubin):
            noted.loaded.append((strict_cupy.cuda.runtime.getDevice(), cubin))

        def get_function(self, name):
            return lambda *args: noted.launched.append((name, *args))

    cuda = strict_cupy.cuda
    monkeypatch.setattr(cuda, "Module", Module, raising=False)
    monkeypatch.setattr(cuda, "driver", SimpleNamespace(CUDADriverError=OSError), raising=False)
    monkeypatch.setattr(cuda.Device, "compute_capability", "90", raising=False)
    monkeypatch.setattr(tile, "_load", load_for_real)
    monkeypatch.setattr(tile, "why_not", why_not_for_real)
    monkeypatch.setattr(tile, "_device", lambda: (noted, strict_cupy.cuda.runtime.getDevice()))
    monkeypatch.setattr(tile, "_capturing", lambda: noted.capturing)
    monkeypatch.setattr("minivit.backend.cubins.obtain", lambda plan, arch: f"{plan} {arch}".encode())
    monkeypatch.setattr("minivit.backend.cubins.missing", lambda arch: None)
    return noted


def test_a_kernel_is_loaded_once_for_each_gpu(strict_cupy, driver):
    for device in (0, 1, 0, 1):
        with strict_cupy.cuda.Device(device):
            x, out = strict_cupy.zeros((10, 20), np.float32), strict_cupy.empty(10, np.float32)
            ROW_SUMS(3, x, out, R=4, W=32)
    assert driver.loaded == [(device, b"row_sums(R=4, W=32) sm_90") for device in (0, 1)]
    name, grid, block, args = driver.launched[-1]
    assert (name, grid, block) == ("row_sums", (3, 1, 1), (1, 1, 1))
    assert args == [x.data.ptr, 10, 20, 20, 1, out.data.ptr, 10, 1]


def test_many_threads_load_once(strict_cupy, driver):
    x, out = strict_cupy.zeros((10, 20), np.float32), strict_cupy.empty(10, np.float32)
    threads = [threading.Thread(target=lambda: ROW_SUMS(3, x, out, R=4, W=32)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(driver.loaded), len(driver.launched)) == (1, 8)


def test_nothing_is_loaded_in_a_capture(strict_cupy, driver):
    x, out = strict_cupy.zeros((10, 20), np.float32), strict_cupy.empty(10, np.float32)
    driver.capturing = True
    for call in (ROW_SUMS.ready, lambda *args, **constants: ROW_SUMS(3, *args, **constants)):
        with pytest.raises(KernelError, match="capture"):
            call(x, out, R=4, W=32)
    driver.capturing = False
    assert ROW_SUMS.ready(x, out, R=4, W=32)
    driver.capturing = True
    ROW_SUMS(3, x, out, R=4, W=32)
    assert (len(driver.loaded), len(driver.launched)) == (1, 1)


def test_a_kernel_that_cannot_be_had_is_said_once_and_tried_once(strict_cupy, driver, monkeypatch):
    tried = []

    def obtain(plan, arch):
        tried.append(plan)
        raise KernelError("it cannot be compiled", "report this")

    monkeypatch.setattr("minivit.backend.cubins.obtain", obtain)
    kernel = Kernel("tests.toy_kernels", "row_sums")
    x, out = strict_cupy.zeros((10, 20), np.float32), strict_cupy.empty(10, np.float32)
    with pytest.warns(UserWarning, match="cannot be compiled: the plain operation"):
        assert not kernel.ready(x, out, R=4, W=32)
    assert not kernel.ready(x, out, R=4, W=32)  # and silent: a warning would be an error
    assert len(tried) == 1
    with pytest.raises(KernelError, match="cannot be compiled"):
        kernel(3, x, out, R=4, W=32)
    monkeypatch.setattr("minivit.backend.cubins.missing", lambda arch: "no compiler")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Kernel("tests.toy_kernels", "row_sums").ready(x, out, R=4, W=32)
    assert tile.why_not() == "no compiler"


@pytest.mark.parametrize(
    "capability, arch",
    [("75", None), ("80", "sm_80"), ("86", "sm_86"), ("89", "sm_89"), ("90", "sm_90"), ("100", "sm_100"),
     ("103", "sm_103"), ("109", "sm_107"), ("121", "sm_121"), ("130", None)],
)  # fmt: skip
def test_architectures(strict_cupy, driver, monkeypatch, capability, arch):
    monkeypatch.setattr(strict_cupy.cuda.Device, "compute_capability", capability)
    assert tile.architecture() == arch
    assert (tile.why_not() is None) == (arch is not None)


# ---- planning --------------------------------------------------------------------------------------------------------


@pytest.fixture
def doubled(toys):
    """An operation 2 x whose twin for CUDA launches a kernel on arrays of two axes."""

    @mv.op()
    def doubled(x: Array) -> Array:
        return x * 2.0

    doubled.vjps(lambda g, out, x: g * 2.0)

    def launch(x):
        out = array_module(x).empty(x.shape, x.dtype)
        SCALE((-(-x.shape[1] // 16), -(-x.shape[0] // 4)), x, out, 0.0, R=4, W=16, by=2.0)
        return out

    @doubled.twin("cuda")
    def _(x):
        if x.ndim != 2 or not SCALE.ready(x, Like(x.dtype, x.shape), 0.0, R=4, W=16, by=2.0):
            return NotImplemented
        return launch(x), None

    doubled.twin("cuda").vjp(lambda g, kept, needs: (launch(array_module(g).ascontiguousarray(g)),))
    return doubled


def test_a_step_is_planned_without_a_gpu(doubled):
    x = mv.tensor(numbers(6, 20), requires_grad=True)
    with planning() as plans, mv.first_order():
        doubled(doubled(x)).sum().backward()
        with planning() as inner:
            doubled(x)
    assert list(plans.values()) == [4]
    assert list(inner.values()) == [1]
    with mv.first_order():
        out = doubled(x)
    np.testing.assert_array_equal(out.numpy(), 2 * x.numpy(), "outside nothing is planned")


def test_planning_goes_by_the_plain_operation_where_there_is_no_kernel(doubled):
    x = mv.tensor(numbers(6), requires_grad=True)
    with planning() as plans, mv.first_order():
        out = doubled(x)
    assert not plans
    np.testing.assert_array_equal(out.numpy(), 2 * x.numpy())


def test_what_is_planned_is_what_is_launched(doubled, strict_cupy, monkeypatch):
    """Offsets of views count from the start of their memory, there as here."""
    loaded = []
    load = tile._load
    monkeypatch.setattr(tile, "_load", lambda plan: loaded.append(plan) or load(plan))
    monkeypatch.setattr(tile, "_device", lambda: "this test's")
    for view in (np.s_[:, :], np.s_[:, 4:], np.s_[:, 3:], np.s_[1:, :18], np.s_[:1, :]):
        with mv.first_order():
            with planning() as plans:
                doubled(mv.Tensor(numbers(6, 20)[view]))
            doubled(mv.Tensor(strict_cupy.asarray(numbers(6, 20))[view]))
        assert set(loaded) == set(plans)
        SCALE._functions.clear()
        loaded.clear()


def test_threads_plan_for_themselves():
    seen = []
    with planning():
        thread = threading.Thread(target=lambda: seen.append(planned()))
        thread.start()
        thread.join()
    assert seen == [None]
