"""Matrix products: the same numbers from every view, on a stand-in for cuBLASLt, and on the real one where it is."""

import itertools
import json
import random
import sys
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.needs import Slot, SoFar, Total
from minivit.backend import choices, chosen, cublaslt, product, products, square_sum, to_numpy, tuning
from minivit.errors import ConfigError, DeviceError, DTypeError, ShapeError
from minivit.ops.samples import SAMPLES
from tests import fake_cublaslt, strict

any_cupy = strict.any_cupy

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(x) for x in (np.float32, np.float64, np.float16)] + [BF16]
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the choices of these tests in a folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "minivit" / "products"


def numbers(*shape, dtype=np.float32, seed=0):
    return np.asarray(mv.backend.normal(mv.Key(seed, 1), shape)).reshape(shape).astype(dtype)


def wide(x):
    return np.asarray(to_numpy(x)).astype(np.float64)


def assert_product(actual, a, b, *added, dtype=None):
    """Compare with float64, each number to within the roundings of the sums and of the output's dtype."""
    a, b = wide(a), wide(b)
    expected = a @ b + sum(map(wide, added))
    size = np.abs(a) @ np.abs(b) + sum(np.abs(wide(x)) for x in added)
    actual_dtype = actual.dtype if dtype is None else np.dtype(dtype)
    assert actual.dtype == actual_dtype
    assert actual.shape == expected.shape
    sums = "float64" if actual.dtype == np.float64 else "float32"
    bound = EPS[actual.dtype.name] * np.abs(expected) + (a.shape[-1] + 4) * EPS[sums] * size + 1e-7
    assert (np.abs(wide(actual) - expected) <= bound).all()


# ---- views -----------------------------------------------------------------------------------------------------------

VIEWS = {
    "as it is": (lambda s: s, lambda x: x),
    "transposed": (lambda s: (*s[:-2], s[-1], s[-2]), lambda x: x.swapaxes(-1, -2)),
    "a part": (lambda s: (*s[:-2], s[-2] + 2, s[-1] + 3), lambda x: x[..., 1:-1, 2:-1]),
    "a part, transposed": (lambda s: (*s[:-2], s[-1] + 1, s[-2] + 2), lambda x: x[..., 1:, 2:].swapaxes(-1, -2)),
    "every other row": (lambda s: (*s[:-2], 2 * s[-2], s[-1]), lambda x: x[..., ::2, :]),
    "every other column": (lambda s: (*s[:-1], 2 * s[-1]), lambda x: x[..., ::2]),
    "rows backwards": (lambda s: s, lambda x: x[..., ::-1, :]),
    "columns backwards": (lambda s: s, lambda x: x[..., ::-1]),
    "rows first": (lambda s: (s[-2], *s[:-2], s[-1]), lambda x: x.transpose(*range(1, x.ndim - 1), 0, x.ndim - 1)),
    "between others": (lambda s: (*s[:-1], 3, s[-1]), lambda x: x[..., 1, :]),
    "one row stretched": (lambda s: (*s[:-2], 1, s[-1]), None),
}


def drawn(seed):
    """Return the shapes of a and b, and how each lies."""
    r = random.Random(seed)
    m, k, n = r.choices([1, 2, 3, 5, 8], k=3)
    lead = r.choices([1, 2, 3], k=r.randint(0, 2))
    sides = [[r.choice([1, x]) for x in lead][r.randint(0, len(lead)) :] for _ in range(2)]
    return (*sides[0], m, k), (*sides[1], k, n), *r.choices(sorted(VIEWS), k=2)


def laid(xp, shape, view, dtype, seed):
    """Return an array of this shape that is a certain view of another."""
    before, look = VIEWS[view]
    base = numbers(*before(shape), dtype=dtype, seed=seed)
    if look is None:
        return xp.broadcast_to(xp.asarray(base), shape)
    return look(xp.asarray(base))


def try_everything(xp, case, dtype):
    shape_a, shape_b, view_a, view_b = case
    a, b = laid(xp, shape_a, view_a, dtype, 1), laid(xp, shape_b, view_b, dtype, 2)
    before = to_numpy(a).copy(), to_numpy(b).copy()
    out = product(a, b)
    assert_product(out, a, b, dtype=dtype)
    bias, onto = xp.asarray(numbers(shape_b[-1], dtype=dtype, seed=3)), numbers(*out.shape, dtype=dtype, seed=4)
    assert_product(product(a, b, bias=bias, onto=xp.asarray(onto)), a, b, bias, onto, dtype=dtype)
    for look in (VIEWS["a part"], VIEWS["transposed"], VIEWS["every other column"], VIEWS["rows backwards"]):
        for wider in {dtype, np.dtype(np.float32)} if dtype.itemsize == 2 else {dtype}:
            base = xp.asarray(numbers(*look[0](out.shape), dtype=wider, seed=5))
            into, first = look[1](base), to_numpy(base).copy()
            held = to_numpy(into).copy()
            assert product(a, b, into, bias=bias, add=True) is into
            assert_product(into, a, b, bias, held, dtype=wider)
            assert product(a, b, into, onto=xp.asarray(onto)) is into
            assert_product(into, a, b, onto, dtype=wider)
            into[...] = xp.asarray(held)
            np.testing.assert_array_equal(to_numpy(base), first)  # nothing around it was touched
    for x, was in zip((a, b), before, strict=True):
        np.testing.assert_array_equal(to_numpy(x), was)


@dtypes
def test_every_view(any_cupy, dtype):
    with tuning(False):
        for seed in range(60):
            try_everything(any_cupy, drawn(seed), dtype)


@dtypes
def test_sums_of_nothing_and_results_without_numbers(any_cupy, dtype):
    xp = any_cupy
    a, b = xp.zeros((2, 3, 0), dtype), xp.zeros((0, 4), dtype)
    bias, onto = xp.asarray(numbers(4, dtype=dtype)), xp.asarray(numbers(2, 3, 4, dtype=dtype))
    assert_product(product(a, b), a, b)
    assert_product(product(a, b, bias=bias, onto=onto), a, b, bias, onto)
    assert_product(product(a, b, onto.copy(), bias=bias, add=True), a, b, bias, onto)
    for shapes in (((0, 3), (3, 4)), ((4, 3), (3, 0)), ((0, 2, 3), (3, 4)), ((2, 0, 2, 3), (3, 4))):
        empty = [xp.zeros(shape, dtype) for shape in shapes]
        assert product(*empty).shape == np.matmul(*map(wide, empty)).shape
    if xp is strict.cupy:
        assert not xp.cublaslt.calls


@dtypes
def test_vectors_are_taken_as_numpy_takes_them(any_cupy, dtype):
    vector, matrix, stack = (numbers(*shape, dtype=dtype) for shape in ((4,), (4, 4), (2, 4, 4)))
    for a, b in ((vector, vector), (vector, matrix), (matrix, vector), (stack, vector), (vector, stack)):
        out = product(any_cupy.asarray(a), any_cupy.asarray(b))
        np.testing.assert_allclose(wide(out), wide(a) @ wide(b), rtol=4 * EPS[dtype.name], atol=4 * EPS[dtype.name])
    with pytest.raises(ShapeError, match="vector"):
        product(any_cupy.asarray(vector), any_cupy.asarray(matrix), bias=any_cupy.asarray(vector))
    with pytest.raises(ShapeError, match="a number is no matrix"):
        product(any_cupy.asarray(vector), any_cupy.asarray(numbers(dtype=dtype)))


def test_bits_are_numpys_where_the_library_is_a_stand_in(strict_cupy):
    a, b, bias, onto = numbers(7, 40), numbers(40, 9), numbers(9), numbers(7, 9)
    out = product(*map(strict_cupy.asarray, (a, b)), bias=strict_cupy.asarray(bias), onto=strict_cupy.asarray(onto))
    np.testing.assert_array_equal(out.get(), product(a, b, bias=bias, onto=onto))


@pytest.mark.parametrize("xp", [np], ids=["numpy"])
def test_numpys_products_take_the_same_arguments(xp):
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        try_everything(xp, ((2, 3, 5), (5, 4), "transposed", "a part"), dtype)
    half = numbers(3, 300, dtype=np.float16), numbers(300, 4, dtype=np.float16)
    assert_product(product(*half, np.empty((3, 4), np.float32)), *half, dtype=np.float32)


# ---- what is not copied ----------------------------------------------------------------------------------------------


def test_views_that_cublaslt_can_walk_are_not_copied(strict_cupy):
    xp = strict_cupy
    x, w, qkv = xp.asarray(numbers(2, 5, 8)), xp.asarray(numbers(6, 8)), xp.asarray(numbers(1, 5, 3 * 2 * 4))
    q, k, _ = qkv.reshape(1, 5, 3, 2, 4).transpose(2, 0, 3, 1, 4)  # (3, B, H, T, d)
    sums, onto = xp.zeros((6, 8), np.float32), xp.asarray(numbers(2, 7, 6))[:, :1]
    xp.counters.reset()
    del xp.cublaslt.calls[:]
    product(x, w.T)
    product(x.reshape(-1, 8).T, x.reshape(-1, 8), xp.zeros((8, 8), np.float32), add=True)
    product(q, k.swapaxes(-1, -2))
    product(q[:, :, 1:3], k[:, :, ::2].swapaxes(-1, -2))
    product(xp.asarray(numbers(3, 5, 8))[1:].swapaxes(-1, -2), x)
    product(x[:, 0], w.T, bias=w[:, 0].copy(), onto=onto[:, 0])
    product(w, sums.T, xp.zeros((6, 9), np.float32)[:, 1:7])
    made = [name for name in xp.counters.launched if name not in ("cublasLtMatmul", "zeros", "empty")]
    assert made == ["copy"] and xp.counters.launched["copy"] == 1  # of w[:, 0], which the test made
    assert [call.batch for call in xp.cublaslt.calls] == [1, 1, 2, 2, 2, 1, 1]


def test_what_it_cannot_walk_is_copied_once(strict_cupy):
    xp = strict_cupy
    qkv = xp.asarray(numbers(3, 5, 3 * 2 * 4))
    q, k, _ = qkv.reshape(3, 5, 3, 2, 4).transpose(2, 0, 3, 1, 4)  # leading axes (B, H) do not run evenly
    for a, b, copies in ((q, k.swapaxes(-1, -2), 2), (xp.asarray(numbers(8, 8))[:, ::2], xp.asarray(numbers(4, 2)), 1)):
        xp.counters.reset()
        assert_product(product(a, b), a, b)
        assert (xp.counters.launched["copy"], xp.counters.launched["cublasLtMatmul"]) == (copies, 1)


def test_a_broadcast_batch_is_one_product(strict_cupy):
    xp = strict_cupy
    a, b, w = (xp.asarray(numbers(*shape)) for shape in ((2, 3, 4, 5), (5, 6), (4, 4)))
    product(a, b)
    product(w, a)
    assert [(call.m, call.n, call.batch) for call in xp.cublaslt.calls] == [(6, 24, 1), (5, 4, 6)]


def test_only_the_tests_use_cupys_own_products(strict_cupy):
    x = strict_cupy.asarray(numbers(3, 3))
    x @ x
    source = compile("made = x @ x", str(strict.PACKAGE / "ops" / "matmul.py"), "exec")
    with pytest.raises(AssertionError, match=r"minivit\.backend\.product can"):
        exec(source, {"x": x})
    exec(source, {"x": x.astype(np.complex128)})  # a gradient check's


def test_complex_numbers_are_multiplied_for_gradient_checks(any_cupy):
    a, b = numbers(3, 4, dtype=np.complex128), numbers(4, 2, dtype=np.complex128) * 1j
    np.testing.assert_allclose(to_numpy(product(any_cupy.asarray(a), any_cupy.asarray(b))), a @ b, rtol=1e-14)


@pytest.mark.parametrize("size", [1, 1000])
def test_a_sum_of_squares(any_cupy, size):
    x = numbers(size)
    np.testing.assert_allclose(to_numpy(square_sum(any_cupy.asarray(x))), (wide(x) ** 2).sum(), rtol=1e-5)
    np.testing.assert_array_equal(square_sum(x), x @ x)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(strict_cupy):
    xp = strict_cupy
    a, b = xp.asarray(numbers(3, 4)), xp.asarray(numbers(4, 5))
    good = xp.zeros((3, 5), np.float32)
    for error, words, args, keywords in [
        (ShapeError, "last axis of the left", (a, a), {}),
        (ShapeError, "leading axes", (xp.zeros((2, 3, 4), np.float32), xp.zeros((3, 4, 5), np.float32)), {}),
        (ShapeError, "out of", (a, b, xp.zeros((3, 6), np.float32)), {}),
        (ShapeError, "bias of", (a, b), {"bias": xp.zeros(3, np.float32)}),
        (ShapeError, "onto of", (a, b), {"onto": xp.zeros((1, 5), np.float32)}),
        (DTypeError, "one dtype", (a, b.astype(np.float64)), {}),
        (DTypeError, "one dtype", (a.astype(np.int32), b.astype(np.int32)), {}),
        (DTypeError, "into float64", (a, b, good.astype(np.float64)), {}),
        (DTypeError, "list", (a, b), {"bias": [0.0] * 5}),
        (ConfigError, "give out=", (a, b), {"add": True}),
        (ConfigError, "no onto=", (a, b, good), {"add": True, "onto": good}),
        (DeviceError, "on cpu", (a, b.get()), {}),
    ]:
        with pytest.raises(error, match=words):
            product(*args, **keywords)
    with pytest.raises(DeviceError, match="cuda:1"), strict_cupy.cuda.Device(1):
        product(a, xp.zeros((4, 5), np.float32))
    with pytest.raises(ConfigError, match="bfloat16"), products("bfloat16"):
        pass
    assert not strict_cupy.cublaslt.calls


def test_arrays_of_another_gpu_are_multiplied_there(strict_cupy):
    with strict_cupy.cuda.Device(1):
        a = strict_cupy.asarray(numbers(3, 3))
    out = product(a, a)
    assert out.device.id == 1
    assert {call["gpu"] for call in chosen()} == {"strict stand-in, 132 SMs, cuBLASLt 130000"}


def test_a_failure_of_the_library_says_of_what(strict_cupy, monkeypatch):
    library, a = strict_cupy.cublaslt, strict_cupy.asarray(numbers(3, 3))
    library.unsupported = lambda product: True
    with pytest.raises(DeviceError, match=r"CUBLAS_STATUS_NOT_SUPPORTED: 1×3×3×3 float32 float32:3:0:256"):
        product(a, a)
    library.unsupported = lambda product: False
    product(a.T, a)
    monkeypatch.setattr(library, "cublasLtMatmul", lambda *args: 13)
    with pytest.raises(DeviceError, match=r"CUBLAS_STATUS_EXECUTION_FAILED(.|\n)*CUDA_LAUNCH_BLOCKING"):
        product(a.T, a)


@pytest.mark.parametrize("found", [None, "absent", "/dev/null"], ids=["no pathfinder", "not there", "no library"])
def test_a_missing_library_is_a_device_error(monkeypatch, found):
    def find(name):
        if found == "absent":
            raise RuntimeError(f"{name} was not found")
        return SimpleNamespace(abs_path=found)

    module = None if found is None else SimpleNamespace(load_nvidia_dynamic_lib=find)
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", module)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=module))
    with pytest.raises(DeviceError, match=r"cuBLASLt(.|\n)*pip install"):
        cublaslt.load()


@dtypes
@pytest.mark.parametrize("epilogue", [True, False], ids=["no bias", "no residual"])
def test_what_the_library_cannot_add_on_the_way_is_added_after(strict_cupy, dtype, epilogue):
    xp = strict_cupy
    xp.cublaslt.unsupported = lambda p: p.p.values[7] == 4 if epilogue else p.c is not p.d
    a, b, bias, onto = (xp.asarray(numbers(*s, dtype=dtype)) for s in ((3, 4), (4, 5), (5,), (3, 5)))
    out = product(a, b, bias=bias, onto=onto)
    tolerance = 4 * EPS[dtype.name]
    np.testing.assert_allclose(wide(out), wide(a) @ wide(b) + wide(bias) + wide(onto), rtol=tolerance, atol=tolerance)
    assert not any(call.bias for call in xp.cublaslt.calls) or not epilogue


# ---- descriptors -----------------------------------------------------------------------------------------------------


def last(xp):
    return xp.cublaslt.calls[-1]


def test_float32_is_tf32_only_where_it_is_asked_for(strict_cupy):
    xp = strict_cupy
    a, b = xp.asarray(numbers(8, 64)), xp.asarray(numbers(64, 8))
    exact = product(a, b)
    assert last(xp).compute == 68
    with products("tf32"):
        rounded = product(a, b)
        assert last(xp).compute == 77
        seen = []
        thread = threading.Thread(target=lambda: (product(a, b), seen.append(last(xp).compute)))
        thread.start()
        thread.join()
        assert seen == [68]  # another thread's are not
        product(a.astype(np.float64), b.astype(np.float64))
        assert last(xp).compute == 70
        product(a.astype(BF16), b.astype(BF16))
        assert last(xp).compute == 68
        with products("float32"):
            np.testing.assert_array_equal(product(a, b).get(), exact.get())
    assert 1e-5 < np.abs(rounded.get() - exact.get()).max() < 0.1
    np.testing.assert_array_equal(product(a, b).get(), exact.get())


def test_a_product_into_float32_is_rounded_once(strict_cupy):
    xp = strict_cupy
    a, b = xp.asarray(numbers(4, 100, dtype=BF16)), xp.asarray(numbers(100, 4, dtype=BF16))
    into = xp.zeros((4, 4), np.float32)
    product(a, b, into)
    assert last(xp).types == (14, 0)
    product(a, b, into, add=True)
    assert (last(xp).beta, last(xp).c_is_d) == (1.0, True)
    np.testing.assert_allclose(into.get(), 2 * (wide(a) @ wide(b)), rtol=1e-5, atol=1e-5)


@dtypes
def test_an_output_may_be_what_is_added(any_cupy, dtype):
    a, b, held = (numbers(*s, dtype=dtype) for s in ((4, 3), (3, 4), (4, 4)))
    for look in (lambda x: x, lambda x: x[:], lambda x: x.T):
        into = any_cupy.asarray(held)
        product(any_cupy.asarray(a), any_cupy.asarray(b), into, onto=look(into))
        assert_product(into, a, b, look(held), dtype=dtype)


def test_memory_that_is_less_aligned_is_promised_as_such(strict_cupy):
    xp, base = strict_cupy, strict_cupy.asarray(numbers(4096, dtype=BF16))
    at = lambda offset, *shape: base[offset : offset + np.prod(shape)].reshape(shape)
    for offset, alignment in ((0, 256), (128, 256), (64, 128), (8, 16), (4, 8), (2, 4), (1, 2)):
        product(at(offset, 4, 4), at(256, 4, 4), bias=at(offset, 4))
        spec = list(cublaslt.gpus_in_use()[0]._plans)[-1]
        assert (spec.b.alignment, spec.a.alignment, spec.d.alignment, spec.bias) == (alignment, 256, 256, alignment)
    assert not xp.cublaslt.refused


def test_kinds_of_products_are_told_apart(strict_cupy):
    """By their text too: it is what an algorithm is kept under."""
    xp = strict_cupy
    for dtype, (m, k, n), lead in itertools.product(DTYPES[:2], ((4, 4, 4), (4, 4, 8), (8, 4, 4)), ((), (2,), (4,))):
        a, b = xp.asarray(numbers(*lead, m, k, dtype=dtype)), xp.asarray(numbers(*lead, k, n, dtype=dtype))
        into, bias = xp.zeros((*lead, m, n), dtype), xp.zeros(n, dtype)
        for left in (a, xp.asarray(numbers(*lead, k, m, dtype=dtype)).swapaxes(-1, -2)):
            product(left, b, into)
            product(left, b, into, add=True)
            product(left, b, bias=bias)
            product(left, b, onto=into.copy())
    with products("tf32"):
        product(a.astype(np.float32), b.astype(np.float32))
    product(a.astype(BF16), b.astype(BF16))
    product(a.astype(BF16), b.astype(BF16), into.astype(np.float32))
    specs = [plan.spec for plan in cublaslt.gpus_in_use()[0].plans()]
    assert len({str(spec) for spec in specs}) == len(specs) > 50
    searches = xp.cublaslt.searches
    product(a, b, into)
    assert xp.cublaslt.searches == searches  # a second product of a kind looks for nothing


def test_the_stand_in_refuses_what_the_library_does(strict_cupy):
    xp, library = strict_cupy, strict_cupy.cublaslt
    a = xp.asarray(numbers(4, 4))
    out = product(a, a)
    gpu = cublaslt.gpus_in_use()[0]
    plan = gpu.plans()[0]
    workspace, fine = gpu.workspace(xp.cuda.get_current_stream()), [x.data.ptr for x in (a, a, out, out)]
    run = lambda at, algorithm=plan.chosen, space=workspace, stream=0: plan.run(
        algorithm, cublaslt.Pointers(*at, 0), space, stream
    )
    assert run(fine) == 0
    part = a.reshape(-1)[1:5]
    assert run([part.data.ptr, *fine[1:]]) == 7 and "not aligned" in library.refused[-1]
    row = a[1]
    unaligned = plan.chosen[:32] + (4).to_bytes(8, "little") * 4
    assert run([row.data.ptr, *fine[1:]], unaligned) == 7 and "beyond an array" in library.refused[-1]
    assert run([12345 << 9, *fine[1:]]) == 7 and "no array that is alive" in library.refused[-1]
    assert run(fine, plan.chosen[:24] + (99).to_bytes(8, "little") + plan.chosen[32:], space=0) == 7
    assert run(fine, stream=77) == 7 and "stream" in library.refused[-1]
    assert run(fine, bytes(64)) == 7
    wrong = plan.spec._replace(a=plan.spec.a._replace(ld=3))
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        cublaslt.Plan(library, gpu._handle, wrong)
    mixed = plan.spec._replace(a=plan.spec.a._replace(dtype="float16"))
    assert cublaslt.Plan(library, gpu._handle, mixed).candidates == []


# ---- streams, workspaces, captures, threads --------------------------------------------------------------------------


def test_each_stream_has_a_workspace_and_a_capture_takes_none(strict_cupy):
    xp, cuda = strict_cupy, strict_cupy.cuda
    a = xp.asarray(numbers(4, 4))
    streams = [cuda.Stream(non_blocking=True) for _ in range(2)]
    for stream in (*streams, *streams):
        with stream:
            product(a, a)
    spaces = [call.workspace for call in xp.cublaslt.calls]
    assert spaces[:2] == spaces[2:] and spaces[0] != spaces[1] and all(spaces)
    assert [call.stream for call in xp.cublaslt.calls[:2]] == [stream.ptr for stream in streams]
    new = cuda.Stream(non_blocking=True)
    with new:
        new.begin_capture()
        with pytest.raises(DeviceError, match="before it is captured"):
            product(a, a)
        new.end_capture()


def test_products_are_captured_and_see_what_their_inputs_hold_then(strict_cupy):
    xp, stream = strict_cupy, strict_cupy.cuda.Stream(non_blocking=True)
    xp.cublaslt.candidates = 8
    a, b, into = xp.asarray(numbers(3, 4)), xp.asarray(numbers(4, 5)), xp.zeros((3, 5), np.float32)
    with stream:
        product(a, b, into)
        product(a, a.T)
        into.fill(0.0)
        xp.counters.reset()
        stream.begin_capture()
        product(a, b, into, add=True)  # a kind of its own, which was not timed before: the first guess
        product(a, b, into, add=True)
        graph = stream.end_capture()
        assert graph.nodes == {"cublasLtMatmul": 2}
        assert not into.get().any()
        a.set(numbers(3, 4, seed=9))
        graph.launch(stream)
    np.testing.assert_allclose(into.get(), 2 * numbers(3, 4, seed=9) @ numbers(4, 5), rtol=1e-5)
    assert {entry["source"] for entry in chosen()} == {"timed", "first"}


def test_threads_share_a_plan(strict_cupy):
    xp = strict_cupy
    a, b = xp.asarray(numbers(6, 6)), xp.asarray(numbers(6, 6))
    biases = [xp.asarray(np.full(6, float(i), np.float32)) for i in range(8)]
    expected = numbers(6, 6) @ numbers(6, 6)
    wrong = []

    def work(i):
        for _ in range(50):
            out = product(a, b, bias=biases[i])._host - i
            if np.abs(out - expected).max() > 1e-4:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(cublaslt.gpus_in_use()) == len(cublaslt.gpus_in_use()[0].plans()) == 1


# ---- which algorithm -------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(strict_cupy, monkeypatch):
    """Eight algorithms, the one numbered 5 the fastest, where there is time to tell."""
    strict_cupy.cublaslt.candidates = 8
    speed = lambda start, end: 1.0 if strict_cupy.cublaslt.calls[-1].algorithm == 5 else 2.0
    monkeypatch.setattr(strict_cupy.cuda, "get_elapsed_time", speed)
    return strict_cupy


def again(xp, patch):
    """Begin as a new process does."""
    before, xp.cublaslt = xp.cublaslt, fake_cublaslt.install(patch)
    xp.cublaslt.candidates, xp.cublaslt.version = 8, before.version


def test_the_fastest_is_chosen_once_and_the_output_is_written_once(timed):
    a, b = timed.asarray(numbers(3, 4)), timed.asarray(numbers(4, 5))
    into = timed.zeros((3, 5), np.float32)
    product(a, b, into, add=True)
    np.testing.assert_allclose(into.get(), numbers(3, 4) @ numbers(4, 5), rtol=1e-5)
    tried, (end,) = timed.cublaslt.calls[:-1], timed.cublaslt.calls[-1:]
    assert len(tried) == 8 * (1 + choices.ROUNDS) and {call.algorithm for call in tried} == set(range(8))
    assert end.algorithm == 5 and end.into not in {call.into for call in tried}
    timed.counters.reset()
    product(a, b, into, add=True)
    assert (timed.counters.launches, timed.counters.syncs) == (1, 0)
    (entry,) = chosen()
    assert entry["source"] == "timed" and "1×5×3×4 " in entry["product"] and "+ itself" in entry["product"]


def test_a_later_process_takes_what_was_kept(timed, monkeypatch, cache):
    a = timed.asarray(numbers(4, 4))
    product(a, a)
    (file,) = cache.iterdir()
    assert file.name == "strict-stand-in-132-SMs-cuBLASLt-130000.json"
    assert list(json.loads(file.read_text()).values()) == [entry["algorithm"] for entry in chosen()]
    again(timed, monkeypatch)
    timed.counters.reset()
    product(a, a)
    product(a.T, a)  # another kind joins it
    assert [entry["source"] for entry in chosen()] == ["kept", "timed"]
    assert timed.cublaslt.calls[0].algorithm == 5
    assert len(json.loads(file.read_text())) == 2
    again(timed, monkeypatch)
    timed.cublaslt.version += 1  # another library: its own file
    product(a, a)
    assert [entry["source"] for entry in chosen()] == ["timed"] and len(list(cache.iterdir())) == 2


def test_without_tuning_the_first_guess_runs_and_nothing_is_kept(timed, cache):
    a = timed.asarray(numbers(4, 4))
    with tuning(False):
        product(a, a)
    product(a, a)  # and stays: a choice is made once in a process
    assert [call.algorithm for call in timed.cublaslt.calls] == [0, 0]
    assert chosen()[0]["source"] == "first" and not cache.exists()


def damages():
    foreign, in_place = b"x" * 64, fake_cublaslt.MAGIC.to_bytes(8, "little") + b"\1" + b"\0" * 7 + b"\1" + b"\0" * 47
    large = fake_cublaslt.MAGIC.to_bytes(8, "little") + b"\0" * 16 + b"\xff" * 5 + b"\0" * 35
    yield from (("empty", lambda text: ""), ("cut off", lambda text: text[: len(text) // 2]))
    yield from (("a list", lambda text: "[1, 2]"), ("deep", lambda text: "[" * 100_000), ("null", lambda text: "null"))
    yield "not hexadecimal", lambda text: json.dumps(dict.fromkeys(json.loads(text), "z" * 128))
    yield "too short", lambda text: json.dumps(dict.fromkeys(json.loads(text), "00" * 63))
    yield "numbers", lambda text: json.dumps(dict.fromkeys(json.loads(text), 5))
    yield "of another library", lambda text: json.dumps(dict.fromkeys(json.loads(text), foreign.hex()))
    yield "adds in place", lambda text: json.dumps(dict.fromkeys(json.loads(text), in_place.hex()))
    yield "a huge workspace", lambda text: json.dumps(dict.fromkeys(json.loads(text), large.hex()))


@pytest.mark.parametrize("damage", [pytest.param(f, id=name) for name, f in damages()])
def test_a_damaged_file_is_not_believed(timed, monkeypatch, cache, damage):
    a = timed.asarray(numbers(4, 4))
    product(a, a)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    again(timed, monkeypatch)
    np.testing.assert_allclose(product(a, a).get(), numbers(4, 4) @ numbers(4, 4), rtol=1e-5)
    assert chosen()[0]["source"] == "timed"
    assert file.read_text() == whole  # mended


def test_a_cache_that_cannot_be_written_is_done_without(timed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    a = timed.asarray(numbers(4, 4))
    product(a, a)
    assert chosen()[0]["source"] == "timed"


def test_algorithms_that_do_not_run_are_passed_over(timed, monkeypatch):
    library = timed.cublaslt
    real = library.cublasLtMatmul
    broken = lambda *args: 15 if bytes(args[12])[8] == 5 else real(*args)
    monkeypatch.setattr(library, "cublasLtMatmul", broken)
    a = timed.asarray(numbers(4, 4))
    product(a, a)
    assert library.calls[-1].algorithm != 5


# ---- linear's twin ---------------------------------------------------------------------------------------------------


def twin_of_linear(xp, args, cotangent, needs):
    """Return the output, and what linear's gradient on CuPy arrays returns for these needs."""
    out, kept = ops.linear.twin("cuda").forward(*[None if a is None else xp.asarray(a) for a in args])
    return out, ops.linear.twin("cuda")._vjp(xp.asarray(cotangent), kept, needs)


@dtypes
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op == "linear"], ids=str)
def test_linear_is_the_plain_operation(strict_cupy, sample, dtype):
    args = [a if a is None else a.astype(dtype) for a in (*sample.build(), None, None)[:4]]
    exact = [None if a is None else a.astype(np.float64) for a in args]
    plain = ops.linear.forward(*exact)
    cotangent = numbers(*plain.shape, dtype=dtype)
    given = tuple(a is not None for a in args)
    out, gradients = twin_of_linear(strict_cupy, args, cotangent, given)
    expected = ops.linear._vjp(cotangent.astype(np.float64), plain, *exact, needs=given)
    tolerance = 8 * EPS[dtype.name]
    for a, e, arg in zip((out, *gradients), (plain, *expected), (out, *args), strict=True):
        if arg is not None and e is not None:
            e = mv.autograd.needs.unbroadcast(e, arg.shape)
            assert a.dtype == dtype and a.shape == e.shape
            np.testing.assert_allclose(wide(a), e, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BF16], ids=str)
def test_linears_gradients_go_where_they_are_added_up(strict_cupy, dtype):
    xp = strict_cupy
    x, w, bias, onto, g = (numbers(*s, dtype=dtype) for s in ((2, 3, 8), (4, 8), (4,), (2, 3, 4), (2, 3, 4)))
    of_x, of_onto = numbers(2, 3, 8, dtype=dtype, seed=7), numbers(2, 3, 4, dtype=dtype, seed=8)
    flat = xp.zeros(36, np.float32)
    slots = Slot(flat[:32].reshape(4, 8)), Slot(flat[32:])
    rows, g_rows = wide(x).reshape(6, 8), wide(g).reshape(6, 4)
    for times in (1, 2):
        needs = (SoFar(xp.asarray(of_x)), *slots, SoFar(xp.asarray(of_onto)))
        xp.counters.reset()
        _, found = twin_of_linear(xp, (x, w, bias, onto), g, needs)
        assert found[1:3] == slots and slots[0].filled and slots[1].filled
        assert type(found[0]) is type(found[3]) is Total
        assert_product(found[0].array, wide(g), wide(w), of_x, dtype=dtype)
        np.testing.assert_allclose(wide(found[3].array), wide(g) + wide(of_onto), rtol=2 * EPS[dtype.name])
        np.testing.assert_allclose(flat[:32].get().reshape(4, 8), times * (g_rows.T @ rows), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(flat[32:].get(), times * g_rows.sum(axis=0), rtol=1e-5, atol=1e-5)
        assert xp.counters.launched["cublasLtMatmul"] == 3  # forward with bias and residual, and two back


def test_an_encoder_block_on_a_gpu_adds_its_residuals_in_its_products(strict_cupy):
    block = mv.nn.EncoderBlock(8, 2, 16).to("cuda")
    x = mv.tensor(strict_cupy.asarray(numbers(2, 3, 8)), requires_grad=True)
    with mv.first_order():
        strict_cupy.counters.reset()
        block(x)
        assert strict_cupy.counters.launched["add"] == 0, strict_cupy.counters.launched
    assert [call.beta for call in strict_cupy.cublaslt.calls if call.bias] == [0.0, 1.0, 0.0, 1.0]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@dtypes
def test_two_runs_have_equal_bits(dtype):
    import cupy

    x, w, g = (cupy.asarray(numbers(*s, dtype=dtype)) for s in ((2080, 192), (576, 192), (2080, 576)))
    for a, b in ((x, w.T), (g, w), (g.T, x)):
        first = to_numpy(product(a, b)).tobytes()
        assert all(to_numpy(product(a, b)).tobytes() == first for _ in range(10))
    assert_product(product(x, w.T), x, w.T, dtype=dtype)


@pytest.mark.gpu
def test_a_graph_replays_products():
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        a, b = cupy.asarray(numbers(64, 96, dtype=BF16)), cupy.asarray(numbers(96, 32, dtype=BF16))
        into = cupy.zeros((64, 32), np.float32)
        product(a, b, into)
        stream.begin_capture()
        product(a, b, into, add=True)
        graph = stream.end_capture()
        into.fill(0)
        a[...] = cupy.asarray(numbers(64, 96, dtype=BF16, seed=5))
        graph.launch(stream)
        graph.launch(stream)
        stream.synchronize()
    np.testing.assert_allclose(wide(into), 2 * (wide(a) @ wide(b)), rtol=1e-3, atol=1e-3)
