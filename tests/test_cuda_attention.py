"""self_attention on CuPy arrays: its kernels, run by the stand-in for cuda.tile, against the formula in float64."""

import math

import ml_dtypes
import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.twin import Twin
from minivit.backend.planning import planning
from minivit.ops.cuda import sums
from tests import tile as emulation

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALF = {BFLOAT16: 2.0**-8, np.dtype(np.float16): 2.0**-11}  # half a unit in the last place of 1


def formula(qkv, heads, queries, g, scale=None):
    """Return, in float64, the output and the gradient of qkv."""
    b, t, features = qkv.shape
    d = features // (3 * heads)
    q, k, v = qkv.astype(np.float64).reshape(b, t, 3, heads, d).transpose(2, 0, 3, 1, 4)  # (B, H, T, d)
    g = g.astype(np.float64).reshape(b, queries, heads, d).transpose(0, 2, 1, 3)
    scale, q = 1 / math.sqrt(d) if scale is None else scale, q[:, :, :queries]
    s = q @ k.swapaxes(-1, -2) * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = g @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq = np.zeros_like(k)
    dq[:, :, :queries] = ds @ k
    grads = np.stack([dq, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ g])  # (3, B, H, T, d)
    return (p @ v).transpose(0, 2, 1, 3).reshape(b, queries, -1), grads.transpose(1, 3, 0, 2, 4).reshape(qkv.shape)


def run(cupy, qkv, heads, queries, g, scale=None):
    """Return the twin's output and gradient, and the partial sums that it has noted."""
    x = mv.tensor(cupy.asarray(qkv), requires_grad=True)
    with mv.first_order():
        out = ops.self_attention(x, heads, queries, None, scale)
    twin, noted = out.node.op, []
    assert isinstance(twin, Twin), "no kernel has run"
    with pytest.MonkeyPatch.context() as patch:
        partial = sums.partial
        patch.setattr(sums, "partial", lambda *given: noted.append((given[0], partial(*given))) or noted[0][1])
        out.backward(cupy.asarray(g))
    ((of, partials),) = noted
    assert of.shape == qkv.shape and partials.shape == (sums.ROWS, qkv.shape[2]) and partials.dtype == np.float32
    return out.data.get(), x.grad.get(), partials.get()


def draw(b, t, heads, d, queries, dtype, seed=0):
    rng = np.random.default_rng(seed)
    queries = t if queries is None else queries
    qkv = rng.standard_normal((b, t, 3 * heads * d)).astype(dtype)
    return qkv, rng.standard_normal((b, queries, heads * d)).astype(dtype)


def assert_as_near(got, exact, dtype, most, mean):
    """Assert how far all are off, in halves of a unit in the last place: the worst, and in root mean square.

    Of numbers smaller than their root mean square that one's unit counts: they are sums of larger ones.
    """
    assert got.dtype == dtype
    size = math.sqrt(np.mean(exact**2))
    error = np.abs(got.astype(np.float64) - exact) / np.maximum(np.abs(exact), size) / HALF[np.dtype(dtype)]
    assert error.max() <= most and math.sqrt(np.mean(error**2)) <= mean, (error.max(), math.sqrt(np.mean(error**2)))


SHAPES = [
    # B, T, H, d, queries
    (1, 1, 1, 16, None), (2, 2, 3, 16, 1), (2, 16, 3, 16, None), (2, 17, 3, 16, None), (2, 17, 1, 64, None),
    (1, 50, 1, 64, None), (2, 64, 1, 32, None), (1, 64, 3, 64, None), (2, 65, 1, 64, None), (1, 65, 3, 64, 1),
    (1, 65, 1, 64, 3), (1, 65, 1, 32, 64), (1, 100, 1, 64, 17), (1, 128, 1, 64, None), (1, 65, 1, 16, None),
    (1, 37, 2, 80, None), (2, 20, 1, 128, 3), (1, 5, 1, 128, None),
]  # fmt: skip
LONGER = [
    (1, 197, 2, 64, None), (2, 197, 1, 64, 1), (1, 196, 1, 64, 70), (1, 256, 1, 128, None), (1, 257, 1, 80, None),
    (1, 300, 1, 64, 2), (1, 577, 1, 32, None), (1, 1024, 1, 64, 130), (1, 1023, 1, 16, 1),
]  # fmt: skip


def check(cupy, shape, dtype):
    b, t, heads, _, queries = shape
    qkv, g = draw(*shape, dtype)
    asked = g.shape[1]
    cupy.counters.reset()
    out, grad, partials = run(cupy, qkv, heads, queries, g)
    kernels = [name for name in cupy.counters.launched if name.startswith("attention")]
    assert len(kernels) == cupy.counters.launches - cupy.counters.launched["copy"] <= 3
    exact, exact_grad = formula(qkv, heads, asked, g)
    assert_as_near(out, exact, dtype, 3, 0.6)
    of_q, of_k, of_v = (grad.reshape(b, t, 3, -1)[:, :, i] for i in range(3))
    exact_q, exact_k, exact_v = (exact_grad.reshape(b, t, 3, -1)[:, :, i] for i in range(3))
    assert not of_q[:, asked:].any()  # of a query that was not asked: zeros, written by the kernel
    few = 2 if t < 20 else 1  # with few keys dS is a small difference
    if t > 1:  # of a single token P is 1, whatever query and key are
        assert_as_near(of_q[:, :asked], exact_q[:, :asked], dtype, 6 * few, 0.7 * few)
        assert_as_near(of_k, exact_k, dtype, 6 * few, 0.7 * few)
    assert_as_near(of_v, exact_v, dtype, 6, 0.7)
    spread = max(math.sqrt((exact_grad**2).sum((0, 1)).mean()), 1)  # of a sum of so many numbers of random sign
    off = np.abs(partials.astype(np.float64).sum(0) - exact_grad.sum((0, 1))).max()
    assert off <= 3 * HALF[np.dtype(dtype)] * spread


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(strict_cupy, shape, dtype):
    check(strict_cupy, shape, dtype)


@pytest.mark.parametrize("shape", LONGER, ids=str)
def test_longer_sequences_equal_the_formula(strict_cupy, shape):
    check(strict_cupy, shape, BFLOAT16)


def truncated(total, p, y):
    cut = lambda x: (np.asarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return tuple(emulation.mma(emulation.tile(cut(p)).astype(v.dtype), v, t) for t, v in zip(total, y, strict=True))


MUTANTS = {
    "P is truncated instead of rounded": ("add_product", lambda f: truncated),
    "keys beyond the end count": ("scores", lambda f: lambda q, k, j, T: f(q, k, j, 1 << 20)),
    "a piece of the keys is missing": ("all_pieces", lambda f: lambda T: f(T)[:1]),
    "dS is without its row sums": ("row_dot", lambda f: lambda x, y: f(x, y) * np.float32(0)),
    "columns are not summed": ("add_columns", lambda f: lambda total, x: total),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_bounds_see_what_is_wrong(strict_cupy, monkeypatch, mutant):
    name, change = MUTANTS[mutant]
    kernels = emulation.source("minivit.ops.cuda.kernels.attention")
    check(strict_cupy, (2, 65, 1, 64, None), BFLOAT16)
    monkeypatch.setattr(kernels, name, change(getattr(kernels, name)))
    with pytest.raises(AssertionError):
        check(strict_cupy, (2, 65, 1, 64, None), BFLOAT16)


@pytest.mark.parametrize(("t", "d", "queries"), [(65, 64, None), (65, 64, 1), (197, 64, None), (300, 32, 1)])
def test_two_runs_give_equal_bits(strict_cupy, t, d, queries):
    qkv, g = draw(3, t, 2, d, queries, BFLOAT16)
    first, second = (run(strict_cupy, qkv, 2, queries, g) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.tobytes() == b.tobytes()


def test_more_images_than_rows_of_partial_sums(strict_cupy):
    qkv, g = draw(sums.ROWS + 3, 2, 1, 16, None, BFLOAT16)
    out, grad, partials = run(strict_cupy, qkv, 1, None, g)
    exact, exact_grad = formula(qkv, 1, 2, g)
    assert_as_near(out, exact, BFLOAT16, 3, 0.6)
    assert_as_near(grad, exact_grad, BFLOAT16, 12, 1.4)
    of_v = exact_grad.reshape(-1, 3, 16)[:, 2].sum(0)
    np.testing.assert_allclose(partials.astype(np.float64).sum(0)[32:], of_v, rtol=1e-5, atol=1e-4)
    assert partials[3:].any(axis=1).all()
    assert not run(strict_cupy, qkv[:5], 1, None, g[:5])[2][5:].any()  # who has no image writes zeros


@pytest.mark.parametrize(("t", "d"), [(65, 64), (197, 64), (300, 64)])
def test_scores_200_apart(strict_cupy, t, d):
    qkv, g = draw(1, t, 1, d, None, BFLOAT16)
    qkv[:, ::2, d : 2 * d] += np.asarray(25, BFLOAT16)  # every other key
    qkv[..., :d] = np.where(np.arange(t)[:, None] % 3, qkv[..., :d], np.asarray(1, BFLOAT16))
    scores = qkv.astype(np.float64)[0, :, :d] @ qkv.astype(np.float64)[0, :, d : 2 * d].T / 8
    assert np.ptp(scores, axis=1).max() > 190
    out, grad, _ = run(strict_cupy, qkv, 1, None, g)
    exact, exact_grad = formula(qkv, 1, t, g)
    assert_as_near(out, exact, BFLOAT16, 3, 0.6)
    assert np.abs(grad - exact_grad).max() < 0.02 * np.abs(exact_grad).max()


@pytest.mark.parametrize("t", [65, 197, 300])
def test_queries_that_are_not_asked_are_not_read(strict_cupy, t):
    qkv, g = draw(2, t, 2, 64, 1, BFLOAT16)
    expected = run(strict_cupy, qkv, 2, 1, g)
    qkv[:, 1:, : 2 * 64] = np.nan
    for a, b in zip(run(strict_cupy, qkv, 2, 1, g), expected, strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_scale_of_ones_own(strict_cupy):
    qkv, g = draw(2, 17, 2, 32, None, BFLOAT16)
    out, grad, _ = run(strict_cupy, qkv, 2, None, g, 0.3)
    exact, exact_grad = formula(qkv, 2, 17, g, 0.3)
    assert_as_near(out, exact, BFLOAT16, 3, 0.6)
    assert_as_near(grad, exact_grad, BFLOAT16, 8, 0.7)


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({"dtype": np.float32}, ()), ({"d": 48}, ()), ({"t": 1025}, ()),
        ({}, (None, np.zeros((5, 5), bool))), ({}, (None, None, None, 0.1, mv.Key(0))), ({}, (None, None, -1.0)),
    ],
    ids=["float32", "a head of 48", "1025 tokens", "a mask", "dropout", "a scale below 0"],
)  # fmt: skip
def test_what_no_kernel_serves_runs_plain(strict_cupy, changes, settings):
    sizes = {"b": 1, "t": 5, "heads": 1, "d": 16, "queries": None, "dtype": np.float16} | changes
    qkv, _ = draw(**sizes)
    with mv.first_order():
        out = ops.self_attention(mv.tensor(strict_cupy.asarray(qkv), requires_grad=True), 1, *settings)
    assert not isinstance(out.node.op, Twin)


@pytest.mark.parametrize(("t", "queries", "scale"), [(17, 17, None), (65, 2, 0.3)])
def test_attention_of_apart_queries_keys_and_values_is_theirs_to_the_bit(strict_cupy, t, queries, scale):
    """They are brought together, worked on by the same kernels, and what comes of it is taken apart."""
    qkv, g = draw(2, t, 3, 16, queries, BFLOAT16)
    out, grad, _ = run(strict_cupy, qkv, 3, queries, g, scale)
    apart = qkv.reshape(2, t, 3, 3, 16).transpose(2, 0, 3, 1, 4)  # (3, B, H, T, d)
    q, k, v = (
        mv.tensor(strict_cupy.asarray(a.copy()), requires_grad=True) for a in (apart[0][:, :, :queries], *apart[1:])
    )
    strict_cupy.counters.reset()
    with mv.first_order():
        other = ops.attention(q, k, v, None, scale)
    assert isinstance(other.node.op, Twin) and strict_cupy.counters.launched == {"setitem": 3, "attention_forward": 1}
    other.backward(strict_cupy.asarray(g.reshape(2, queries, 3, 16).transpose(0, 2, 1, 3).copy()))
    np.testing.assert_array_equal(other.data.get().swapaxes(1, 2).reshape(out.shape), out)
    grads = grad.reshape(2, t, 3, 3, 16).transpose(2, 0, 3, 1, 4)
    for x, expected in zip((q, k, v), (grads[0][:, :, :queries], *grads[1:]), strict=True):
        np.testing.assert_array_equal(x.grad.get(), expected)
    with mv.first_order():  # more queries than keys, or values of another length
        for args in ((k, q, q), (q, k, v[..., :8])) if queries < t else ():
            assert not isinstance(ops.attention(*args).node.op, Twin)


def test_a_step_can_be_walked_without_a_gpu():
    """While planning NumPy's arrays stand for CuPy's: what would be launched is noted."""
    qkv, g = draw(2, 197, 2, 64, None, BFLOAT16)
    with planning() as plans, mv.first_order():
        ops.self_attention(mv.tensor(qkv, requires_grad=True), 2).backward(g)
    assert [plan.factory for plan in plans] == [
        "attention_forward", "attention_backward_queries", "attention_backward_keys",
    ]  # fmt: skip
    q, k, v = (mv.tensor(a, requires_grad=True) for a in qkv.reshape(2, 197, 3, 2, 64).transpose(2, 0, 3, 1, 4).copy())
    with planning() as apart, mv.first_order():
        ops.attention(q, k, v).backward(g.reshape(2, 197, 2, 64).swapaxes(1, 2).copy())
    assert [plan.factory for plan in apart] == [plan.factory for plan in plans]
