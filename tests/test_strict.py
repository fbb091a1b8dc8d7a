"""The stand-in for CuPy is itself tested: what it refuses, what it counts, and that its numbers are NumPy's."""

from __future__ import annotations

import copy
import gc
import operator
import sys
import threading

import numpy as np
import pytest

from tests import strict

strict_cupy = strict.strict_cupy
any_cupy = strict.any_cupy


@pytest.fixture
def a(any_cupy):
    return any_cupy.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))


def test_it_takes_cupys_place_and_leaves_it():
    before = [sys.modules.get(name) for name in ("cupy", "cupyx", "cupyx.scipy.special")]
    with strict.installed() as stand_in:
        import cupy
        import cupyx.scipy.special

        assert cupy is stand_in
        assert cupyx.scipy.special.erf(cupy.asarray(1.0)).get() == pytest.approx(0.8427007929497149)
    assert [sys.modules.get(name) for name in ("cupy", "cupyx", "cupyx.scipy.special")] == before


def test_it_has_what_cupy_and_numpy_both_have(strict_cupy):
    assert {*strict.CROSSING, *strict.LAYOUT, *strict.MAKING, *strict.SYNCING} <= set(strict.API)
    functions = [key for key, parameters in strict.API.items() if isinstance(parameters, list)]
    lacking = [key for key in functions if not key.startswith("cu") and not has(np, key)]
    assert len(lacking) < len(functions) / 10
    for key in functions:
        if has(np, key):
            assert callable(operator.attrgetter(key)(strict_cupy)), key


def has(module, key) -> bool:
    try:
        return bool(operator.attrgetter(key)(module))
    except AttributeError:
        return False


# ---- refusals: what CuPy refuses, too, is tested on both -------------------------------------------------------------

HOST = np.ones((2, 3), np.float32)


REFUSALS = "Unsupported type|Cannot convert numpy.ndarray|incorrect type"  # the last two: Cython's, of an argument
BINARY = "add sub mul truediv floordiv mod pow matmul and_ lshift lt le eq ne"


@pytest.mark.parametrize("function", operator.attrgetter(*BINARY.split())(operator))
def test_operators_refuse_numpy_arrays(a, function):
    words = REFUSALS if function is operator.matmul else "Unsupported type"
    with pytest.raises(TypeError, match=words):
        function(a, HOST)
    with pytest.raises(TypeError, match=words):
        function(HOST, a)


@pytest.mark.parametrize("name", ["iadd", "imul", "isub", "itruediv"])
def test_in_place_operators_refuse_numpy_arrays(a, name):
    for left, right in ((a, HOST), (HOST.copy(), a)):
        with pytest.raises(TypeError):
            getattr(operator, name)(left, right)


# CuPy's __array__ has no parameter ``copy``: np.array warns of that, and calls it without
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
def test_numpy_cannot_convert_it(a):
    for convert in (np.asarray, np.array, lambda x: np.array([x, x])):
        with pytest.raises(TypeError, match="Implicit conversion"):
            convert(a)


@pytest.mark.parametrize("function", [np.exp, np.sum, np.shape, lambda x: np.add(x, 1.0), lambda x: np.stack([x, x])])
def test_numpy_functions_refuse_it(strict_cupy, function):
    with pytest.raises(TypeError):
        function(strict_cupy.ones(3))


@pytest.mark.parametrize(
    "call",
    [
        lambda cupy, a: cupy.sum(HOST),
        lambda cupy, a: cupy.exp(HOST),
        lambda cupy, a: cupy.maximum(a, HOST),
        lambda cupy, a: cupy.where(a > 0, a, HOST),
        lambda cupy, a: cupy.where(HOST > 0, a, a),
        lambda cupy, a: cupy.concatenate([a, HOST]),
        lambda cupy, a: cupy.take_along_axis(a, np.zeros((2, 1), int), 1),
        lambda cupy, a: cupy.array([a[0, 0], 1.0]),
        lambda cupy, a: cupy.add(a, a, out=np.zeros((2, 3))),
        lambda cupy, a: cupy.sum([1.0, 2.0]),
        lambda cupy, a: cupy.where(True, a, a),
        lambda cupy, a: a.__setitem__(..., HOST),
        lambda cupy, a: a.__setitem__(0, [1.0, 2.0, 3.0]),
        lambda cupy, a: a + None,
        lambda cupy, a: a == None,  # noqa: E711
        lambda cupy, a: a + "text",
        lambda cupy, a: a * [1.0, 2.0, 3.0],
        lambda cupy, a: cupy.asarray(np.array(["text"])),
        lambda cupy, a: cupy.asarray(np.array([None])),
        lambda cupy, a: hash(a),
        lambda cupy, a: range(cupy.asarray(3)),
        lambda cupy, a: len(a.sum()),
    ],
)
def test_functions_refuse_what_is_not_on_the_gpu(strict_cupy, call):
    a = strict_cupy.asarray(HOST)
    with pytest.raises(TypeError):
        call(strict_cupy, a)


@pytest.mark.parametrize(
    "path",
    ["vecdot", "matvec", "errstate", "random", "asmatrix", "maximum.reduce", "exp.at", "linalg.nrm", "RawKernel.x"],
)
def test_names_that_do_not_exist(strict_cupy, path):
    with pytest.raises(AttributeError):
        operator.attrgetter(path)(strict_cupy)


@pytest.mark.parametrize(
    "call",
    [
        lambda cupy, a: cupy.sum(a, where=a > 0),
        lambda cupy, a: cupy.sum(a, initial=0.0),
        lambda cupy, a: cupy.var(a, correction=1),
        lambda cupy, a: cupy.exp(a, where=a > 0),
        lambda cupy, a: cupy.clip(a, min=0),
        lambda cupy, a: cupy.asarray(HOST, like=a),
        lambda cupy, a: cupy.take_along_axis(a, a > 0, 1, "wrap"),
        lambda cupy, a: cupy.einsum("ij->i", a, out=a),
        lambda cupy, a: a.sum(where=a > 0),
        lambda cupy, a: a.var(correction=1),
        lambda cupy, a: a.astype("f8", casting="safe"),
        lambda cupy, a: a.item(0),
    ],
)
def test_parameters_that_do_not_exist(any_cupy, a, call):
    with pytest.raises(TypeError):
        call(any_cupy, a)


def test_the_devices_do_not_mix(strict_cupy):
    with strict_cupy.cuda.Device(1) as one:
        there = strict_cupy.ones(3)
    here = strict_cupy.ones(3)
    assert (here.device.id, there.device) == (0, one)
    for call in (lambda: here + there, lambda: there + 1.0, lambda: there.sum(), lambda: there.__setitem__(0, 1.0)):
        with pytest.raises(ValueError, match=r"resides \(1\) is different from the current device \(0\)"):
            call()
    with one, pytest.raises(ValueError, match=r"resides \(0\)"):
        here + there
    with one:
        assert (there + 1.0).device == one
    assert there[1:].reshape(1, 2).T.device == one  # views need no kernel
    assert there.get().tolist() == [1, 1, 1]
    assert strict_cupy.asarray(there).device.id == 0  # moved
    with pytest.raises(strict_cupy.cuda.runtime.CUDARuntimeError), strict_cupy.cuda.Device(2):
        pass
    assert strict_cupy.cuda.Device().id == 0


def test_each_thread_has_its_current_device(strict_cupy):
    seen = []
    with strict_cupy.cuda.Device(1):
        thread = threading.Thread(target=lambda: seen.append(strict_cupy.ones(1).device.id))
        thread.start()
        thread.join()
        seen.append(strict_cupy.ones(1).device.id)
    assert seen == [0, 1]


# ---- behaviour -------------------------------------------------------------------------------------------------------


def test_reductions_and_elements_are_arrays(any_cupy, a):
    for x in (a.sum(), any_cupy.max(a), a[0, 1], a.mean(), any_cupy.exp(1.0), any_cupy.array_equal(a, a), a.sum() * 2):
        assert isinstance(x, any_cupy.ndarray)
        assert x.shape == ()
    for x in (a.any(), a.all(), a.argmax(), any_cupy.count_nonzero(a)):
        assert isinstance(x, any_cupy.ndarray)


def test_elements_are_views(a):
    element = a[1, 2]
    a += 1.0
    assert element.item() == 6.0
    row = a[0]
    row[...] = 7.0
    assert a.get().tolist() == [[7, 7, 7], [4, 5, 6]]


def test_empty_is_poisoned(strict_cupy):
    assert np.isnan(strict_cupy.empty((2, 3)).get()).all()
    assert np.isnan(strict_cupy.empty_like(strict_cupy.ones(2, "e")).get()).all()
    assert np.isnan(strict_cupy.empty(2, "F").get()).all()
    assert strict_cupy.empty(1, np.int32).item() == 2**31 - 1
    assert strict_cupy.empty(1, np.uint8).item() == 255
    assert strict_cupy.empty(1, bool).item() is True


def test_dtypes_follow_numpy_2(any_cupy, a):
    for x in (2.0 * a, a + 1, a / 2, a**2, any_cupy.maximum(a, 0.0), any_cupy.where(a > 0, a, 0.0)):
        assert x.dtype == np.float32
    for x in (np.float64(2) * a, a * np.float64(2), np.float64(2) - a, a / any_cupy.asarray(2.0)):
        assert x.dtype == np.float64  # NumPy's scalars and 0-d arrays are strong
    for x in (a > 1, a > np.float64(1), np.float64(1) < a):
        assert x.dtype == bool


def test_numbers_are_numpys(any_cupy, a):
    b = any_cupy.asarray(HOST * 2)
    host = a.get()
    np.testing.assert_array_equal((b - a).get(), 2 - host)
    np.testing.assert_array_equal((3 - a).get(), 3 - host)
    np.testing.assert_array_equal((1 / (a + 1)).get(), 1 / (host + 1))
    np.testing.assert_array_equal((a @ b.T).get(), host @ (HOST * 2).T)
    np.testing.assert_array_equal((-a)[::-1, [2, 0]].get(), (-host)[::-1, [2, 0]])
    np.testing.assert_array_equal(a[a > 2].get(), host[host > 2])
    np.testing.assert_array_equal(any_cupy.stack([a, b], axis=1).get(), np.stack([host, HOST * 2], axis=1))
    np.testing.assert_array_equal(a.transpose(1, 0).reshape(-1, 2).get(), host.T.reshape(-1, 2))
    for part, expected in zip(any_cupy.split(a, 3, axis=1), np.split(host, 3, axis=1), strict=True):
        np.testing.assert_array_equal(part.get(), expected)
    any_cupy.add.at(a, ([0, 0], [1, 1]), 1.0)
    assert a[0, 1].item() == 3.0


def test_what_needs_no_new_array_gives_the_very_same(any_cupy, a):
    same = a
    same += 1.0
    assert same is a
    assert any_cupy.asarray(a) is a
    assert any_cupy.exp(a, out=a) is a
    assert a.astype(np.float32, copy=False) is a


def test_it_keeps_its_own_memory(any_cupy):
    host = np.zeros(3)
    there = any_cupy.asarray(host)
    host += 1
    assert there.get().tolist() == [0, 0, 0]
    there.get()[...] = 5
    copied = copy.deepcopy(there)
    there += 2
    assert (copied.get().tolist(), there.get().tolist()) == ([0, 0, 0], [2, 2, 2])
    there.set(host)
    assert there.get().tolist() == [1, 1, 1]


def test_the_right_hand_side_may_take_over(any_cupy, a):
    class Tensor:
        __array_ufunc__ = None

        def __radd__(self, other):
            return "taken"

        __rmatmul__ = __lt__ = __radd__

    assert (a + Tensor(), a @ Tensor(), a > Tensor()) == ("taken",) * 3


def test_no_floating_point_warnings(any_cupy, a):
    assert np.isnan((a / a)[0, 0].item())
    assert any_cupy.log(a)[0, 0].item() == -np.inf


def test_memory_is_free_when_the_last_array_goes(strict_cupy):
    used = strict_cupy.get_default_memory_pool().used_bytes
    gc.disable()
    try:
        before = used()
        x = strict_cupy.ones((10, 10), np.float32)
        y = (x @ x.T).reshape(-1)[5:]
        z = strict_cupy.broadcast_to(x, (5, 10, 10))
        x[0] = y[:10]
        assert used() - before == 800
        del x
        assert used() - before == 800
        del z
        assert used() - before == 400
        del y
        assert used() == before
    finally:
        gc.enable()


# ---- counters --------------------------------------------------------------------------------------------------------


def cost(cupy, call) -> tuple[int, int, int]:
    cupy.counters.reset()
    call()
    return cupy.counters.launches, cupy.counters.syncs, cupy.counters.transfers


@pytest.mark.parametrize(
    "call",
    [
        lambda cupy, a: a.reshape(-1),
        lambda cupy, a: a.reshape(3, 2)[1:, None],
        lambda cupy, a: a.T,
        lambda cupy, a: a.transpose(1, 0),
        lambda cupy, a: cupy.swapaxes(a, 0, 1),
        lambda cupy, a: a[1, 2],
        lambda cupy, a: cupy.broadcast_to(a, (4, 2, 3)),
        lambda cupy, a: cupy.split(a, 3, axis=1),
        lambda cupy, a: cupy.asarray(a),
        lambda cupy, a: a.astype(np.float32, copy=False),
        lambda cupy, a: cupy.ascontiguousarray(a),
        lambda cupy, a: cupy.empty((3, 3)),
        lambda cupy, a: cupy.result_type(a, np.float64),
        lambda cupy, a: (a.shape, a.dtype, a.ndim, a.nbytes, len(a), a.device, list(a)),
        lambda cupy, a: a.real,
    ],
)
def test_what_is_free(strict_cupy, call):
    a = strict_cupy.asarray(HOST)
    assert cost(strict_cupy, lambda: call(strict_cupy, a)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("launches", "call"),
    [
        (1, lambda cupy, a: a + 1.0),
        (1, lambda cupy, a: a.__iadd__(a)),
        (1, lambda cupy, a: cupy.exp(a, out=a)),
        (1, lambda cupy, a: cupy.exp(a, a)),
        (2, lambda cupy, a: (a @ a.T).sum()),
        (1, lambda cupy, a: a.T.reshape(-1)),
        (1, lambda cupy, a: a.copy()),
        (1, lambda cupy, a: cupy.zeros(3)),
        (1, lambda cupy, a: a.__setitem__(0, 1.0)),
        (1, lambda cupy, a: cupy.add.at(a, 0, a[1])),
        (1, lambda cupy, a: a.fill(0)),
        (1, lambda cupy, a: cupy.concatenate([a, a])),
        (1, lambda cupy, a: cupy.copyto(a, 2.0)),
        (1, lambda cupy, a: cupy.linalg.norm(a)),
        (1, lambda cupy, a: cupy.where(a.view(np.int32), a, 0.0)),
    ],
)
def test_launches(strict_cupy, launches, call):
    a = strict_cupy.asarray(HOST)
    assert cost(strict_cupy, lambda: call(strict_cupy, a)) == (launches, 0, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: bool(x),
        lambda x: float(x),
        lambda x: int(x),
        lambda x: complex(x),
        lambda x: x.item(),
        lambda x: x.get(),
        lambda x: x.tolist(),
        lambda x: repr(x),
        lambda x: f"{x:.3f}",
        lambda x: x in [2.0, x],
    ],
)
def test_syncs(strict_cupy, call):
    x = strict_cupy.asarray(1.0)
    _, syncs, transfers = cost(strict_cupy, lambda: call(x))
    assert syncs == transfers >= 1


@pytest.mark.parametrize(
    "call",
    [
        lambda cupy, a: a[a > 0],
        lambda cupy, a: a.__setitem__(a > 0, 0.0),
        lambda cupy, a: a.nonzero(),
        lambda cupy, a: cupy.unique(a),
        lambda cupy, a: cupy.where(a),
        lambda cupy, a: a.device.synchronize(),
    ],
)
def test_hidden_syncs(strict_cupy, call):
    a = strict_cupy.asarray(HOST)
    assert cost(strict_cupy, lambda: call(strict_cupy, a))[1:] == (1, 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda cupy, a: cupy.asarray(HOST),
        lambda cupy, a: cupy.array([1.0, 2.0]),
        lambda cupy, a: a.set(HOST),
        lambda cupy, a: a[np.array([0, 1, 1])],
        lambda cupy, a: a[:, [0, 2]],
    ],
)
def test_transfers(strict_cupy, call):
    a = strict_cupy.asarray(HOST)
    assert cost(strict_cupy, lambda: call(strict_cupy, a))[1:] == (0, 1)


def test_bytes(strict_cupy):
    counters = strict_cupy.counters
    a, row = strict_cupy.ones((100, 10), np.float32), strict_cupy.ones(10, np.float32)
    rows = strict_cupy.arange(2)
    for expected, call in (
        (4000 + 40 + 4000, lambda: a + row),
        (4000 + 40 + 4000, lambda: a + strict_cupy.broadcast_to(row, a.shape)),
        (4000 + 4, lambda: a.sum()),
        (4000 + 40 + 4000, lambda: a.__iadd__(row)),
        (40 + 40, lambda: a.__setitem__(3, row)),
        (80 + 16 + 80, lambda: a[rows]),
    ):
        counters.reset()
        call()
        assert counters.bytes == expected
    counters.reset()
    a.get()
    assert (counters.bytes, counters.transfer_bytes) == (0, 4000)


def test_counters_say_where(strict_cupy):
    x = strict_cupy.ones(3)
    strict_cupy.counters.reset()
    float((x * x).sum())
    line = sys._getframe().f_lineno - 1
    assert dict(strict_cupy.counters.launched) == {"multiply": 1, "sum": 1}
    (place,) = strict_cupy.counters.synced
    assert place.startswith(f"test_strict.py:{line} < ")
    assert strict_cupy.counters.transferred == strict_cupy.counters.synced
