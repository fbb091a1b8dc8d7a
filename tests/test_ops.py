"""Every operation on every sample of the table, held against references, layouts, dtypes and devices."""

from __future__ import annotations

import contextlib
import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.mutate import check_op
from minivit.autograd.op import OPS
from minivit.backend import Key, is_array, is_half, named_dtype, normal, to_device, to_numpy
from minivit.errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError
from minivit.ops.cpu import attention as cpu_attention
from minivit.ops.samples import SAMPLES, Sample
from tests.optable import FORWARD

rows = pytest.mark.parametrize("sample", SAMPLES, ids=str)
ON_CUDA = (("cuda", (), "stand-in"), ("cuda", pytest.mark.gpu, "cuda"))
twins = pytest.mark.parametrize(
    ("sample", "kind", "on"),
    [
        pytest.param(s, kind, on, marks=marks, id=f"{s}, {on}")
        for s in SAMPLES
        for twin in s.function.twins
        for kind, marks, on in (ON_CUDA if twin == "cuda" else [("cpu", (), "cpu")])
    ],
)
fused = pytest.mark.parametrize("sample", [s for s in SAMPLES if s.function.reference], ids=str)


def places(sample: Sample, args: Any) -> list[int]:
    """Return the positions of the differentiable arrays."""
    return [i for i in sample.function.input_positions(args) if i < len(args) and is_array(args[i])]


def mapped(f: Any, x: Any) -> Any:
    """Return x with f applied to every array in it."""
    if is_array(x):
        return f(x)
    return type(x)(mapped(f, y) for y in x) if type(x) in (list, tuple) else x


def flat(x: Any) -> list[Any]:
    """Return the arrays in x."""
    if is_array(x):
        return [x]
    return [a for y in x for a in flat(y)] if isinstance(x, list | tuple) else []


def strided(a: np.ndarray) -> np.ndarray:
    """Return a copy of ``a`` in every second element of Fortran-ordered memory, the last axis backwards."""
    big = np.full([2 * n for n in a.shape], np.nan if a.dtype.kind == "f" else 0).astype(a.dtype)
    view = np.require(big, requirements="F")[(..., *[slice(None, None, 2)] * a.ndim)]
    view = view[..., ::-1] if a.ndim else view
    view[...] = a
    return view


def subsets(at: list[int]) -> list[list[int]]:
    return [list(some) for n in range(1, len(at) + 1) for some in itertools.combinations(at, n)]


def as_type(dtype: Any, args: Any) -> Any:
    return mapped(lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, args)


def cotangent_for(out: Any) -> np.ndarray:
    return np.asarray(normal(Key(5), out.shape)).astype(out.dtype)


def backward(fn: Any, args: Any, at: list[int], cotangent: Any = None) -> tuple[mv.Tensor, list[Any]]:
    """Return the output and the gradient of each argument ``at``, by backward()."""
    values = list(args)
    for i in at:
        values[i] = mv.tensor(args[i], requires_grad=True)
    out = fn(*values)
    out.backward(cotangent_for(out) if cotangent is None else cotangent)
    return out, [values[i].grad for i in at]


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale)


def assert_same(actual: Any, expected: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e, strict=True)


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_operation_has_rows_and_a_reference():
    assert {s.op for s in SAMPLES} == set(OPS) == set(FORWARD)
    assert len({str(s) for s in SAMPLES}) == len(SAMPLES)


def test_every_operation_is_public():
    assert set(OPS) <= set(ops.__all__)
    assert all(hasattr(ops, name) for name in ops.__all__)


@rows
def test_forward(sample):
    args = sample.build()
    out = sample.function(*args)
    assert np.asarray(out).dtype == np.float64
    assert_near(out, FORWARD[sample.op](*args), 1e-13)
    tensor_out = sample.function(*[mv.tensor(a) if i in places(sample, args) else a for i, a in enumerate(args)])
    assert isinstance(tensor_out, mv.Tensor)
    assert not tensor_out.requires_grad
    np.testing.assert_array_equal(tensor_out.data, out)


@rows
def test_gradients_of_order_1_and_2(sample):
    report = check_op(sample.function, sample.build())
    assert {c.order for c in report.checks} == {1, 2}
    if sample.op == "softmax" and sample.label == "saturated":  # e⁻³⁰⁰ is less than differences can confirm
        report.checks = [c for c in report.checks if c.order == 1]
    assert {c.method for c in report.checks} == {"complex"}
    assert report.worst.error <= 1e-12


@fused
def test_equals_its_composed_reference(sample):
    args = sample.build()
    at = places(sample, args)
    out, gradients = backward(sample.function, args, at)
    expected, expected_gradients = backward(sample.function.reference, args, at)
    assert_near(out.data, expected.data)
    for g, e in zip(gradients, expected_gradients, strict=True):
        assert_near(g, e)


def of_twin(fn: Any, args: Any, at: list[int], cotangent: Any = None) -> tuple[mv.Tensor, list[Any]]:
    """Return the output and the gradients of ``fn`` as its twin has them."""
    with mv.first_order():
        return backward(fn, args, at, cotangent)


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["float64", "float32"])
@twins
def test_twin_equals_the_plain_operation(request, sample, kind, on, dtype):
    if on == "stand-in":
        request.getfixturevalue("strict_cupy")
    args = as_type(dtype, sample.build())
    at = places(sample, args)
    for some in subsets(at):
        out, gradients = backward(sample.function, args, some)
        for layout in (np.copy, strided):
            given, cotangent = (mapped(lambda a: to_device(a, kind), x) for x in
                                (mapped(layout, args), layout(cotangent_for(out))))  # fmt: skip
            before = mapped(lambda a: to_numpy(a).copy(), [given, cotangent])
            for a in flat([given, cotangent]):
                if kind == "cpu":
                    a.flags.writeable = False  # a write in place raises
            ours, our_gradients = of_twin(sample.function, given, some, cotangent)
            for a, e in zip([ours.data, *our_gradients], [out.data, *gradients], strict=True):
                assert a.dtype == dtype
                assert_near(to_numpy(a), e, 1e-12 if dtype == np.float64 else 1e-5)
            assert_same(map(to_numpy, flat([given, cotangent])), flat(before))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if "cuda" in s.function.twins], ids=str)
def test_a_twin_on_cuda_is_as_near_as_the_digits_of_a_half(strict_cupy, sample, dtype):
    args = as_type(named_dtype(dtype), sample.build())
    at = places(sample, args)
    wide = mapped(lambda a: a.astype(np.float64) if is_half(a.dtype) else a, args)
    of_a_loss = np.float32 if sample.op == "cross_entropy" else dtype
    cotangent = cotangent_for(np.asarray(sample.function(*wide))).astype(of_a_loss)
    out, gradients = backward(sample.function, wide, at, cotangent.astype(np.float64))
    there = mapped(lambda a: to_device(a, "cuda"), args)
    ours, our_gradients = of_twin(sample.function, there, at, to_device(cotangent, "cuda"))
    for a, e in zip([ours.data, *our_gradients], [out.data, *gradients], strict=True):
        assert_near(to_numpy(a).astype(np.float64), e, 2e-3 if dtype == "float16" else 1.6e-2)  # two units


def test_every_twin_is_whole_and_where_the_plain_operation_says():
    found = [(op, kind, twin) for op in OPS.values() for kind, twin in op.twins.items()]
    assert {kind for _, kind, _ in found} >= {"cpu"}
    for op, kind, twin in found:
        room, _, file = op.forward.__module__.rpartition(".")
        assert twin is op.twin(kind) and (twin.name, twin.kind) == (op.name, kind)
        assert twin.forward.__module__ == twin._vjp.__module__ == f"{room}.{kind}.{file}"
        assert f"ops/{kind}/{file}.py" in op.__doc__, f"{op.name} does not say where its twin is"
    assert {op.name for op, _, _ in found} == {op.name for op in OPS.values() if "Twins: " in (op.__doc__ or "")}


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelus_twin_over_more_than_one_block(approximate):
    args = [normal(Key(8), (7, 10_001)).astype(np.float32) * 3.0, approximate]
    out, (expected,) = backward(ops.gelu, args, [0])
    ours, (actual,) = of_twin(ops.gelu, args, [0])
    assert_near(ours.data, out.data, 1e-6)
    assert_near(actual, expected, 1e-6)
    with mv.first_order(), mv.no_grad():  # without the derivative
        np.testing.assert_array_equal(ops.gelu(mv.tensor(args[0]), approximate).data, ours.data)


@pytest.mark.parametrize("scores", [1, 6, 9])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.op in ("attention", "self_attention")], ids=str)
def test_attention_in_blocks_of_queries_equals_the_plain_one(monkeypatch, sample, scores):
    monkeypatch.setattr(cpu_attention, "KEPT_SCORES", scores)  # a block of one query, or of two or three
    args = sample.build()
    at = places(sample, args)
    out, gradients = backward(sample.function, args, at)
    in_blocks, block_gradients = of_twin(sample.function, args, at)
    for a, e in zip([in_blocks.data, *block_gradients], [out.data, *gradients], strict=True):
        assert_near(a, e, 1e-12)


def test_memory_of_attention_does_not_grow_with_the_square_of_the_length():
    peaks = []
    for tokens in (400, 800):
        qkv = mv.tensor(normal(Key(3), (1, tokens, 3 * 2 * 8)), requires_grad=True)
        tracemalloc.start()
        with mv.first_order():
            out = ops.self_attention(qkv, 2)
        out.backward(np.ones_like(out.data))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_head = 8 * 800 * 800  # bytes of its scores
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < one_head


@rows
def test_float32_stays_float32(sample):
    args = sample.build()
    single = as_type(np.float32, args)
    at = places(sample, args)
    out, gradients = backward(sample.function, single, at)
    assert out.dtype == np.float32
    assert np.asarray(sample.function(*single)).dtype == np.float32
    exact = as_type(np.float64, single)  # the rounded inputs: what remains is the operation's own rounding
    expected, expected_gradients = backward(sample.function, exact, at, cotangent_for(out).astype(np.float64))
    largest = max(float(np.abs(args[i]).max()) for i in at)
    for a, e in zip([out.data, *gradients], [expected.data, *expected_gradients], strict=True):
        assert a.dtype == np.float32
        assert_near(a, e, 2e-6 * max(1.0, largest))


@rows
def test_any_memory_layout(sample):
    args = sample.build()
    at = places(sample, args)
    out, gradients = backward(sample.function, args, at)

    odd, odd_gradients = backward(sample.function, mapped(strided, args), at, strided(cotangent_for(out)))
    assert_near(odd.data, out.data, 1e-13)
    for a, e in zip(odd_gradients, gradients, strict=True):
        assert_near(a, e)

    constant = np.broadcast_to(np.float64(0.7), out.shape)  # stride 0, as the gradient of a sum is
    _, from_constant = backward(sample.function, args, at, constant)
    _, from_full = backward(sample.function, args, at, np.full(out.shape, 0.7))
    for a, e in zip(from_constant, from_full, strict=True):
        assert_near(a, e)


@rows
def test_arguments_and_cotangent_are_left_alone(sample):
    args = sample.build()
    before = mapped(np.copy, args)
    arrays = flat(args)
    for a in arrays:
        a.flags.writeable = False  # a write in place raises
    out, gradients = backward(sample.function, args, places(sample, args))
    cotangent = cotangent_for(out)
    cotangent.flags.writeable = False
    backward(sample.function, args, places(sample, args), cotangent)
    assert_same(arrays, flat(before))
    for i, g in zip(places(sample, args), gradients, strict=True):
        assert g.flags.writeable and not np.shares_memory(g, args[i])
        assert not any(np.shares_memory(g, other) for other in gradients if other is not g)


@rows
def test_a_zero_cotangent_gives_zeros(sample):
    args = sample.build()
    out, gradients = backward(sample.function, args, places(sample, args), None)
    _, zeros = backward(sample.function, args, places(sample, args), np.zeros(out.shape))
    for g, z in zip(gradients, zeros, strict=True):
        assert_same([z + 0.0], [np.zeros_like(g)])  # -0 + 0 is 0


@rows
def test_twice_gives_the_same_bits(sample):
    results = []
    for _ in range(2):
        out, gradients = backward(sample.function, sample.build(), places(sample, sample.build()))
        results.append([a.tobytes() for a in [out.data, *gradients]])
    assert results[0] == results[1]


@rows
def test_every_subset_of_needs(sample):
    args = sample.build()
    at = places(sample, args)
    _, gradients = backward(sample.function, args, at)
    for some in subsets(at):
        _, partial = backward(sample.function, args, some)
        assert_same(partial, [gradients[at.index(i)] for i in some])
    values = [mv.tensor(a, requires_grad=True) if i in at else a for i, a in enumerate(args)]
    out = sample.function(*values)  # all recorded, one asked for
    for i, g in zip(at, gradients, strict=True):
        (alone,) = mv.grad(out, [values[i]], cotangent_for(out), create_graph=True)
        assert_near(alone.data, g)


# ---- on a GPU, or its strict stand-in --------------------------------------------------------------------------------


def on_cuda(sample: Sample, host_constants: bool = False) -> tuple[Any, list[Any]]:
    """Run a sample on ``cuda`` and return the output and gradients there."""
    args = sample.build()
    at = places(sample, args)
    moved = mapped(lambda a: to_device(a, "cuda"), args)
    if host_constants:
        moved = [m if i in at else a for i, (m, a) in enumerate(zip(moved, args, strict=True))]
    if sample.op == "convert":
        moved = [moved[0], "cuda:0"]
    cotangent = to_device(cotangent_for(np.asarray(sample.function(*args))), "cuda")
    return moved, [at, cotangent]


def compare_with_numpy(sample: Sample, out: Any, gradients: list[Any], tolerance: float) -> None:
    args = sample.build()
    expected, expected_gradients = backward(sample.function, args, places(sample, args))
    for a, e in zip([out.data, *gradients], [expected.data, *expected_gradients], strict=True):
        assert not isinstance(a, np.ndarray)
        assert a.dtype == e.dtype
        assert_near(to_numpy(a), e, tolerance)


@rows
def test_on_the_strict_stand_in_without_a_sync(sample, strict_cupy):
    moved, (at, cotangent) = on_cuda(sample)
    strict_cupy.counters.reset()
    out, gradients = backward(sample.function, moved, at, cotangent)
    plain = sample.function(*moved)
    if "boolean mask" not in sample.label:  # how many are chosen must be known to the host
        assert strict_cupy.counters.syncs == 0, strict_cupy.counters.synced
    np.testing.assert_array_equal(to_numpy(plain), to_numpy(out.data))
    compare_with_numpy(sample, out, gradients, 1e-13)
    compare_with_numpy(sample, *run_moved(sample, on_cuda(sample, host_constants=True)), 1e-13)


def run_moved(sample: Sample, prepared: Any) -> tuple[Any, list[Any]]:
    moved, (at, cotangent) = prepared
    return backward(sample.function, moved, at, cotangent)


@pytest.mark.gpu
@rows
def test_on_a_gpu(sample):
    compare_with_numpy(sample, *run_moved(sample, on_cuda(sample)), 1e-11)


# ---- values that the table cannot hold: ties, kinks, masks, dropout --------------------------------------------------


def gradient(fn: Any, x: Any) -> np.ndarray:
    """Return d(sum of fn(x))/dx."""
    x = mv.tensor(np.asarray(x, np.float64), requires_grad=True)
    ops.sum(fn(x)).backward()
    return x.grad


@pytest.mark.parametrize(
    ("fn", "x", "expected"),
    [
        (ops.abs, [-2.0, 0.0, 3.0], [-1.0, 0.0, 1.0]),
        (ops.relu, [-2.0, 0.0, 3.0], [0.0, 0.0, 1.0]),
        (lambda x: ops.maximum(x, 1.0), [0.0, 1.0, 2.0], [0.0, 0.5, 1.0]),
        (lambda x: ops.minimum(1.0, x), [0.0, 1.0, 2.0], [1.0, 0.5, 0.0]),
        (lambda x: ops.clip(x, -1.0, 1.0), [-2.0, -1.0, 0.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0, 0.0]),
        (ops.max, [3.0, 1.0, 3.0, 3.0], [1 / 3, 0.0, 1 / 3, 1 / 3]),
        (lambda x: ops.min(x, 1), [[1.0, 1.0], [2.0, 1.0]], [[0.5, 0.5], [0.0, 1.0]]),
        (lambda x: x**2, [0.0, -3.0], [0.0, -6.0]),
        (lambda x: x**0, [0.0, 2.0], [0.0, 0.0]),
        (lambda x: x**1, [0.0, -2.0], [1.0, 1.0]),
        (lambda x: ops.where(np.asarray(x.data) > 0, ops.sqrt(ops.maximum(x, 0.25)), 0.0), [-1.0, 4.0], [0.0, 0.25]),
        (lambda x: ops.where([True, False], x, ops.log(np.array([1.0, -0.0]) + 1.0)), [1.0, 2.0], [1.0, 0.0]),
    ],
)
def test_gradient_where_it_is_a_convention(fn, x, expected):
    np.testing.assert_allclose(gradient(fn, x), expected, rtol=1e-15)


def test_where_keeps_a_nan_on_its_own_side():
    x, y = (mv.tensor(np.array([1.0, 2.0]), requires_grad=True) for _ in range(2))
    ops.where(np.array([True, False]), x, y).backward(np.array([np.nan, 3.0]))
    np.testing.assert_array_equal(x.grad, [np.nan, 0.0])
    np.testing.assert_array_equal(y.grad, [0.0, 3.0])


@pytest.mark.parametrize("fn", [ops.softmax, ops.log_softmax, ops.logsumexp], ids=lambda fn: fn.name)
@pytest.mark.parametrize("first_order", [False, True])
def test_nothing_overflows_in_float32(fn, first_order):
    x = mv.tensor(np.array([[0.0, 1.0], [1000.0, 1001.0], [-1000.0, 3000.0]], np.float32), requires_grad=True)
    with mv.first_order() if first_order else mv.no_grad():
        assert np.isfinite(fn(x).data).all()
    fn(x).backward(np.ones(fn(x).shape, np.float32))
    assert np.isfinite(x.grad).all()


def test_rows_of_softmax_do_not_know_each_other():
    rows = normal(Key(3), (4, 5)) + np.array([[0.0], [-800.0], [800.0], [3.0]])
    np.testing.assert_allclose(ops.softmax(rows), [ops.softmax(row) for row in rows], rtol=1e-14)


def test_attention_over_nothing_is_zero_and_has_no_gradient():
    q, k, v = (mv.tensor(normal(Key(i), (2, 3, 4)), requires_grad=True) for i in range(3))
    mask = np.zeros((3, 3), bool)
    mask[1] = True
    out = ops.attention(q, k, v, mask)
    assert (out.data[:, 1] == 0).all() and (out.data[:, 0] != 0).all()
    out.backward(np.ones(out.shape))
    assert (q.grad[:, 1] == 0).all() and all(np.isfinite(x.grad).all() for x in (q, k, v))


def test_a_masked_key_has_no_influence():
    q, k, v = (normal(Key(i), (3, 4)) for i in range(3))
    mask = np.zeros((3, 3), bool)
    mask[:, 2] = True
    np.testing.assert_allclose(ops.attention(q, k, v, mask), ops.attention(q, k[:2], v[:2]), rtol=1e-14)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x, key: ops.dropout(x, 0.3, key),
        lambda x, key: ops.drop_path(x, 0.3, key),
        lambda x, key: ops.attention(x, x, x, None, None, 0.3, key),
        lambda x, key: ops.self_attention(x, 2, None, None, None, 0.3, key),
    ],
    ids=["dropout", "drop_path", "attention", "self_attention"],
)
@pytest.mark.parametrize("scores", [None, 6], ids=["at once", "in blocks of queries"])
@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "twin"])
def test_a_batch_in_pieces_is_dropped_as_the_whole(monkeypatch, drop, first_order, scores):
    if scores is not None:
        monkeypatch.setattr(cpu_attention, "KEPT_SCORES", scores)
    x, key = mv.tensor(normal(Key(0), (8, 3, 12)), requires_grad=True), Key(1, 2, 3)
    with mv.first_order() if first_order else contextlib.nullcontext():
        whole, pieces = drop(x, key), [drop(x[:3], key), drop(x[3:], Key(1, 2, 3, row=3))]
        wrong = drop(x[3:], key)
    np.testing.assert_allclose(np.concatenate([piece.data for piece in pieces]), whole.data, rtol=1e-13)
    assert not np.allclose(wrong.data, pieces[1].data)


@pytest.mark.parametrize("fn", [ops.dropout, ops.drop_path], ids=lambda fn: fn.name)
def test_dropout_keeps_the_mean_and_drops_its_share(fn):
    x = np.ones((100_000, 2), np.float32)
    out = fn(x, 0.3, Key(4))
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((out == 0).mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 100_000)
    assert ((out[:, 0] == out[:, 1]).all()) == (fn is ops.drop_path)
    assert not np.array_equal(out, fn(x, 0.3, Key(4, step=1)))
    np.testing.assert_array_equal(fn(x, 0.0, Key(4)), x)


LABELS = np.array([[2, 0, 4], [1, 1, 3]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("first_order", [False, True])
def test_labels_are_the_rows_of_an_identity_matrix(smoothing, first_order):
    logits = normal(Key(2), (2, 3, 5))
    results = []
    for labels in (LABELS, LABELS.tolist(), mv.tensor(LABELS), np.eye(5)[LABELS], np.eye(5)[LABELS].tolist()):
        with mv.first_order() if first_order else contextlib.nullcontext():
            out, gradients = backward(lambda x, y=labels: ops.cross_entropy(x, y, smoothing), [logits], [0])
        assert_near(out.data, FORWARD["cross_entropy"](logits, None, LABELS, smoothing), 1e-14)
        results.append([out.data, *gradients])
    for other in results[1:]:
        assert_same(other, results[0])
    assert isinstance(ops.cross_entropy(logits, mv.tensor(LABELS)), mv.Tensor)
    single = ops.cross_entropy(mv.tensor(logits.astype(np.float32)), LABELS, np.float64(smoothing))
    assert single.dtype == np.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("first_order", [False, True])
def test_soft_labels_get_a_gradient(smoothing, first_order):
    logits, b = normal(Key(2), (2, 3, 5)), normal(Key(3), (2, 3, 5))
    probabilities = ops.softmax(b)
    with mv.first_order() if first_order else contextlib.nullcontext():
        _, (both, soft) = backward(lambda x, y: ops.cross_entropy(x, y, smoothing), [logits, probabilities], [0, 1])
        _, (alone,) = backward(lambda y: ops.cross_entropy(logits, y, smoothing), [probabilities], [0])
        _, (constant,) = backward(lambda x: ops.cross_entropy(x, probabilities, smoothing), [logits], [0])
        _, (through,) = backward(lambda z: ops.cross_entropy(logits, ops.softmax(z), smoothing), [b], [0])
    expected = -ops.log_softmax(logits) * (1 - smoothing) / 6  # the mean is over 2 · 3 rows
    weight = float(cotangent_for(np.zeros(())))
    assert_near(soft, expected * weight)
    assert_same([alone, constant], [soft, both])
    assert np.abs(through).max() > 1e-3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_distillation_is_right_in_both_orders(smoothing):
    def loss(a, b):
        return ops.cross_entropy(a, ops.softmax(b * 0.5), smoothing)

    report = mv.check_grads(loss, [normal(Key(2), (3, 5)), normal(Key(3), (3, 5))])
    assert {(c.name, c.order) for c in report.checks} >= {("a", 1), ("b", 1), ("a", 2), ("b", 2)}
    assert report.worst.error < 1e-12


def test_labels_cost_no_sync_on_the_strict_stand_in(strict_cupy):
    logits = mv.tensor(to_device(normal(Key(2), (2, 3, 5)), "cuda"), requires_grad=True)
    for labels in (LABELS, to_device(LABELS, "cuda"), np.eye(5)[LABELS], mv.tensor(np.eye(5)[LABELS])):
        strict_cupy.counters.reset()
        loss = ops.cross_entropy(logits, labels, 0.1)
        loss.backward()
        assert strict_cupy.counters.syncs == 0, strict_cupy.counters.synced
        assert_near(to_numpy(loss.data), FORWARD["cross_entropy"](to_numpy(logits.data), None, LABELS, 0.1))


def test_matmul_with_vectors():
    a, v, w = normal(Key(0), (2, 3, 5)), normal(Key(1), (5,)), normal(Key(2), (3,))
    for left, right in [(a, v), (w, a), (v, v)]:
        assert_near(ops.matmul(left, right), left @ right)
        mv.check_grads(lambda x, y: x @ y, [left, right])


def test_split_cuts_and_joins_again():
    x = normal(Key(0), (2, 7, 3))
    for axis, sections in [(1, [1, 4, 2]), (-2, [7]), (-1, 3), (0, 2)]:
        np.testing.assert_array_equal(ops.concat(ops.split(x, sections, axis), axis), x)

        def weighed(t: Any, axis: int = axis, sections: Any = sections) -> Any:
            return ops.concat([part * (i + 1.0) for i, part in enumerate(ops.split(t, sections, axis))], axis)

        mv.check_grads(weighed, [x])
    np.testing.assert_array_equal(ops.split(x, [1, 4, 2], 1)[1], x[:, 1:5])


def test_joining_mixes_arrays_and_tensors():
    x = mv.tensor(np.ones((2, 3)), requires_grad=True)
    for joined in (ops.concat([np.zeros((1, 3)), x, x]), ops.stack([x, np.zeros((2, 3))], axis=1)):
        x.grad = None
        joined.backward(np.full(joined.shape, 2.0))
        np.testing.assert_array_equal(x.grad, np.full((2, 3), 4.0 if joined.shape == (5, 3) else 2.0))


def test_convert_gives_the_gradient_in_the_dtype_it_came_from():
    x = mv.tensor(np.array([1.0, 2.0], np.float32), requires_grad=True)
    y = x.to(np.float64) * np.array([3.0, 4.0])
    assert y.dtype == np.float64
    y.sum().backward()
    assert x.grad.dtype == np.float32
    np.testing.assert_array_equal(x.grad, [3.0, 4.0])
    assert x.astype("float16").dtype == np.float16


def test_convert_moves_between_devices(strict_cupy):
    x = mv.tensor(np.array([1.0, 2.0]), requires_grad=True)
    assert (x.to("cuda:1") * 2.0).device == "cuda:1"
    there = x.to("cuda")
    assert there.device == "cuda:0"
    (there * 3.0).to("cpu").sum().backward()
    np.testing.assert_array_equal(x.grad, [3.0, 3.0])


def test_a_patch_is_a_contiguous_block_in_the_order_of_a_convolution():
    image = np.arange(2 * 4 * 6, dtype=np.float64).reshape(1, 2, 4, 6)
    patches = ops.patchify(image, (2, 3))
    np.testing.assert_array_equal(patches[0, 1], [3, 4, 5, 9, 10, 11, 27, 28, 29, 33, 34, 35])
    np.testing.assert_array_equal(ops.unpatchify(patches, (2, 3), (4, 6)), image)


def test_operators_and_methods_are_the_operations():
    a, b = normal(Key(0), (3, 3)), np.exp(normal(Key(1), (3, 3)))
    x, y = mv.tensor(a), mv.tensor(b)
    pairs: list[tuple[Any, Any]] = [
        (x + y, a + b), (x + b, a + b), (a + y, a + b), (1.5 + x, 1.5 + a), (x - y, a - b), (a - y, a - b),
        (2 - x, 2 - a), (x * y, a * b), (a * y, a * b), (x / y, a / b), (a / y, a / b), (1 / y, 1 / b), (y**x, b**a),
        (b**x, b**a), (2.0**x, 2.0**a), (x @ y, a @ b), (a @ y, a @ b), (x @ b, a @ b), (-x, -a), (abs(x), abs(a)),
        (x[1], a[1]), (x[:, None, ::-1], a[:, None, ::-1]), (x[a > 0], a[a > 0]), (x.T, a.T), (x.transpose(), a.T),
        (x.transpose(1, 0), a.T), (x.transpose((1, 0)), a.T), (x.swapaxes(0, 1), a.T), (x.reshape(9), a.reshape(9)),
        (x.reshape(-1, 1), a.reshape(-1, 1)), (x.reshape((1, 9)), a.reshape(1, 9)), (x.sum(axis=0), a.sum(axis=0)),
        (x.mean(-1, True), a.mean(-1, keepdims=True)), (x.var(0), a.var(0)), (x.max(1), a.max(1)), (x.min(), a.min()),
        (x.exp(), np.exp(a)), (y.log(), np.log(b)), (y.sqrt(), np.sqrt(b)), (x.tanh(), np.tanh(a)),
        (x.sin(), np.sin(a)), (x.cos(), np.cos(a)), (x.clip(-1, 1), a.clip(-1, 1)), (x.abs(), abs(a)),
        (x.softmax(), ops.softmax(a)),
        (x.logsumexp(0), ops.logsumexp(a, 0)), (x == a, a == a), (x == y, a == b), (a == x, a == a), (x != y, a != b),
        (x != 0, a != 0), (x < y, a < b), (x <= 0, a <= 0), (x > b, a > b), (x >= y, a >= b),
    ]  # fmt: skip
    for i, (actual, expected) in enumerate(pairs):
        assert isinstance(actual, np.ndarray if np.asarray(expected).dtype == bool else mv.Tensor), i
        np.testing.assert_allclose(getattr(actual, "data", actual), expected, rtol=1e-13, err_msg=str(i))


# ---- bad input: a typed error that names the operation and says what to do -------------------------------------------

X = mv.tensor(np.ones((2, 3)))

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "add, shapes": (lambda: X + np.ones((2, 4)), ShapeError, "add"),
    "add, dtypes": (lambda: X + np.ones((2, 3), np.float32), DTypeError, "add"),
    "add, of integers": (lambda: X + np.ones((2, 3), np.int64), DTypeError, "add"),
    "matmul, shapes": (lambda: X @ np.ones((2, 3)), ShapeError, "matmul"),
    "matmul, a batch": (lambda: ops.matmul(np.ones((2, 3, 4)), np.ones((3, 4, 5))), ShapeError, "matmul"),
    "linear, shapes": (lambda: ops.linear(X, np.ones((5, 4)), None), ShapeError, "linear"),
    "linear, bias": (lambda: ops.linear(X, np.ones((5, 3)), np.ones(4)), ShapeError, "linear"),
    "layer_norm, weight": (lambda: ops.layer_norm(X, np.ones(4), np.ones(4)), ShapeError, "layer_norm"),
    "sum, axis": (lambda: X.sum(axis=2), ShapeError, "sum"),
    "softmax, axis": (lambda: ops.softmax(X, -3), ShapeError, "softmax"),
    "reshape": (lambda: X.reshape(4, 2), ShapeError, "reshape"),
    "transpose": (lambda: X.transpose(0, 2), ShapeError, "transpose"),
    "broadcast_to": (lambda: ops.broadcast_to(X, (4, 3)), ShapeError, "broadcast_to"),
    "concat": (lambda: ops.concat([X, np.ones((2, 4))]), ShapeError, "concat"),
    "stack": (lambda: ops.stack([X, np.ones((2, 4))]), ShapeError, "stack"),
    "split": (lambda: ops.split(X, 2, axis=1), ShapeError, "split"),
    "split, lengths": (lambda: ops.split(X, [1, 1], axis=1), ShapeError, "split"),
    "getitem": (lambda: X[5], ShapeError, "getitem"),
    "getitem, axes": (lambda: X[0, 0, 0], ShapeError, "getitem"),
    "pad": (lambda: ops.pad(X, ((1, 1), (0, 0), (0, 0))), ShapeError, "pad"),
    "patchify": (lambda: ops.patchify(np.ones((1, 3, 8, 9)), (4, 4)), ShapeError, "patchify"),
    "unpatchify": (lambda: ops.unpatchify(np.ones((1, 5, 48)), (4, 4), (8, 8)), ShapeError, "unpatchify"),
    "attention": (lambda: ops.attention(X, np.ones((2, 4)), X), ShapeError, "attention"),
    "attention, values": (lambda: ops.attention(X, X, np.ones((3, 3))), ShapeError, "attention"),
    "attention, mask": (lambda: ops.attention(X, X, X, np.zeros((3, 3), bool)), ShapeError, "(3, 3)"),
    "attention, no key": (lambda: ops.attention(X, X, X, dropout=0.1), ConfigError, "attention"),
    "dropout, rate": (lambda: ops.dropout(X, 1.0, Key(0)), ConfigError, "drop"),
    "gelu, form": (lambda: ops.gelu(X, "fast"), ConfigError, "gelu"),
    "cross_entropy, shapes": (lambda: ops.cross_entropy(X, np.array([0, 1, 2])), ShapeError, "cross_entropy"),
    "cross_entropy, soft": (lambda: ops.cross_entropy(X, np.ones((2, 4))), ShapeError, "cross_entropy"),
    "cross_entropy, dtype": (lambda: ops.cross_entropy(X, np.ones((2, 3), np.float32)), DTypeError, "cross_entropy"),
    "cross_entropy, bools": (lambda: ops.cross_entropy(X, np.ones(2, bool)), DTypeError, "cross_entropy"),
    "cross_entropy, a large label": (lambda: ops.cross_entropy(X, np.array([0, 3])), DataError, "label 3 at row 1"),
    "cross_entropy, a small label": (lambda: ops.cross_entropy(X, np.array([-1, 0])), DataError, "label -1 at row 0"),
    "cross_entropy, smoothing": (lambda: ops.cross_entropy(X, np.array([0, 1]), 1.0), ConfigError, "cross_entropy"),
    "cross_entropy, no rows": (
        lambda: ops.cross_entropy(np.ones((0, 3)), np.ones(0, np.int64)), ShapeError, "cross_entropy"
    ),
    "convert, to integers": (lambda: X.to(np.int64), DTypeError, "int64"),
    "convert, to no device": (lambda: X.to("cuda:99"), DeviceError, "cuda:99"),
    "an unknown argument": (lambda: ops.softmax(X, dim=1), ConfigError, "softmax"),
    "an argument too few": (lambda: ops.clip(), ConfigError, "clip"),
    "an argument too many": (lambda: ops.exp(X, 1), ConfigError, "exp"),
    "an argument twice": (lambda: ops.softmax(X, -1, axis=-1), ConfigError, "softmax"),
    "a Tensor of text": (lambda: mv.tensor(np.array(["a"])), DTypeError, "<U1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    fn, error, words = BAD[name]
    with pytest.raises(error) as caught:
        fn()
    text = str(caught.value)
    assert words in text.splitlines()[0]
    assert "\n  → " in text and not text.endswith("→ ")


def test_arrays_on_two_devices_are_refused(strict_cupy):
    x = mv.tensor(np.ones(3))
    with pytest.raises(DeviceError, match=r"mul: \(3,\) is on cuda:0, \(3,\) on cpu\n  → move one side"):
        x.to("cuda") * x


# ---- float16, and numbers that hardly differ -------------------------------------------------------------------------


def gradients_both_ways(function: Any, args: Any, at: list[int], cotangent: Any) -> list[list[Any]]:
    """Return the output and the gradients of the plain operation, and of its twin if there is one."""
    ways = [backward] + [of_twin] * ("cpu" in function.twins)
    return [[out.data, *gradients] for out, gradients in (way(function, args, at, cotangent) for way in ways)]


@rows
def test_float16_is_as_near_as_its_digits(sample):
    args = as_type(np.float16, sample.build())
    at, exact = places(sample, args), as_type(np.float64, args)
    cotangent = cotangent_for(sample.function(*args))
    expected, gradients = backward(sample.function, exact, at, cotangent.astype(np.float64))
    for actual in gradients_both_ways(sample.function, args, at, cotangent):
        for i, (a, e) in enumerate(zip(actual, [expected.data, *gradients], strict=True)):
            assert a.dtype == (np.float32 if (sample.op, i) == ("cross_entropy", 0) else np.float16)
            assert_near(a, e, 2e-3)  # two units of the last place


WIDE: dict[str, tuple[Any, Any]] = {
    "softmax": (ops.softmax, [[30.0, 29.0, 0.0, -30.0]]),
    "softmax, saturated": (ops.softmax, [[60.0, 59.0, 0.0, -60.0], [6e4, 6e4, -6e4, 1.0]]),
    "softmax of many": (ops.softmax, np.full((2, 4096), 5.0)),
    "softmax over rows": (lambda x: ops.softmax(x, 0), np.full((4096, 2), 5.0)),
    "log_softmax": (ops.log_softmax, [[6e4, 6e4, 1e3, 1.0], [0.0] * 4]),
    "logsumexp": (ops.logsumexp, [[6e4, 6e4, -6e4, 1.0], [0.0] * 4]),
    "layer_norm": (
        lambda x: ops.layer_norm(x, mv.tensor(np.ones(96, x.dtype)), mv.tensor(np.ones(96, x.dtype))),
        [np.linspace(-6e4, 6e4, 96), np.full(96, 2000.0)],
    ),
    "mean": (lambda x: ops.mean(x, 0), np.full((4096, 2), 100.0)),
    "var": (lambda x: ops.var(x, 0), np.where(np.arange(4096)[:, None] % 2, 400.0, 300.0) + np.zeros(2)),
    "sum": (lambda x: ops.sum(x, 0), np.ones((4096, 2))),
    "a bias over many rows": (lambda x: ops.sum(np.zeros((4096, 2), x.dtype) + x), [1.0, 2.0]),
    "gelu": (ops.gelu, [-300.0, -20.0, 20.0, 300.0]),
    "gelu, tanh": (lambda x: ops.gelu(x, "tanh"), [-300.0, -20.0, 20.0, 300.0]),
    "attention": (lambda x: ops.attention(x, x, x), 60.0 * np.eye(5, 32) + 30.0),
    "attention, masked": (lambda x: ops.attention(x, x, x, np.tri(5) > 0), 60.0 * np.eye(5, 32) + 30.0),
    "self_attention": (lambda x: ops.self_attention(x, 2), 6.0 * np.eye(5, 48)[None] + 3.0),
}


@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "twin"])
@pytest.mark.parametrize("name", WIDE)
def test_float16_overflows_only_where_the_result_does(name, first_order):
    fn, values = WIDE[name]
    x = np.asarray(values, np.float16)
    expected = mv.tensor(x.astype(np.float64), requires_grad=True)
    wide = fn(expected)
    cotangent = np.asarray(np.linspace(0.5, 1.0, wide.size).reshape(wide.shape), np.float16)
    wide.backward(cotangent.astype(np.float64))
    half = mv.tensor(x, requires_grad=True)
    with mv.first_order() if first_order else contextlib.nullcontext():
        out = fn(half)
    out.backward(cotangent)
    assert out.dtype == half.grad.dtype == np.float16
    for a, e in ((out.data, wide.data), (half.grad, expected.grad)):
        assert_near(a, e, 3e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("width", [7, 64, 192])
def test_layer_norm_of_equal_and_almost_equal_numbers(dtype, width):
    digits = np.finfo(dtype).eps
    equal = np.repeat(np.array([[1000.0], [0.1], [-1e6], [3e-5]], dtype), width, axis=1)
    close = (1e4 + 0.01 * normal(Key(1), (50, width))).astype(dtype)
    outlier = normal(Key(2), (50, width)).astype(dtype)
    outlier[:, 0] = 1e5
    ones, zeros = np.ones(width, dtype), np.zeros(width, dtype)
    for x in (equal, close, outlier, np.concatenate([close[:1], normal(Key(3), (2000, width)).astype(dtype)])):
        exact = x.astype(np.float64) - x[:, :1]
        exact -= exact.mean(-1, keepdims=True)
        squares = (exact**2).mean(-1)
        exact /= np.sqrt(squares[:, None] + 1e-6)
        for out, *_ in gradients_both_ways(ops.layer_norm, [x, ones, zeros], [0, 1, 2], np.ones_like(x)):
            assert_near(out, exact, 30 * digits)
            if x is equal:
                assert (out == 0).all()
        np.testing.assert_allclose(ops.var(x, -1), squares, rtol=30 * digits, atol=0)


def test_a_loss_of_many_rows_in_float16():
    logits = np.zeros((40_000, 10), np.float16)
    logits[:, 0] = 8  # 8 a row, which add up to far more than float16 holds
    labels = np.ones(len(logits), np.int64)
    plain = ops.cross_entropy(mv.tensor(logits, requires_grad=True), labels)
    with mv.first_order():
        ours = ops.cross_entropy(mv.tensor(logits, requires_grad=True), labels)
    for loss in (plain, ours):
        assert loss.dtype == np.float32  # float16 would round it to 8.0
        assert abs(loss.item() - math.log(9 + math.exp(8))) < 1e-5


@pytest.mark.parametrize("labels", [LABELS.astype(np.float64), LABELS > 0, LABELS.astype(str)])
def test_labels_that_are_no_whole_numbers_are_not_called_soft(labels):
    logits = np.zeros((*LABELS.shape, 4))
    with pytest.raises(DTypeError, match=r"one for each row of logits, .*\n  → give whole numbers"):
        ops.cross_entropy(logits, labels)


@pytest.mark.parametrize("axis", [np.int64(1), np.int8(-1)])
def test_an_axis_may_be_one_of_numpys_integers(axis):
    x = np.arange(6.0).reshape(2, 3)
    for reduce in (ops.sum, ops.mean, ops.var, ops.max, ops.min, ops.logsumexp):
        g, expected = (backward(reduce, [x, where], [0])[1][0] for where in (axis, int(axis)))
        np.testing.assert_array_equal(g, expected)
