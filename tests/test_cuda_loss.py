"""cross_entropy, patchify and embed_tokens on CuPy arrays: their kernels, run by the stand-in for cuda.tile."""

import ml_dtypes
import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.graph import propagate
from minivit.autograd.needs import Slot
from minivit.autograd.twin import Twin
from minivit.backend import tile
from minivit.ops.cuda import loss as counted
from minivit.ops.cuda import sums
from minivit.train.pieces import count_right

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    np.dtype(np.float32): 2e-6,
    BFLOAT16: 2.0**-8,
    np.dtype(np.float16): 2.0**-11,
}  # and what a gradient is off by


def on_gpu(cupy, *arrays):
    return [None if x is None else mv.tensor(cupy.asarray(x), requires_grad=True) for x in arrays]


# ---- cross_entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, BFLOAT16], ids=str)
@pytest.mark.parametrize("label", [-1, 5, 16, 1 << 20])
def test_a_label_that_is_no_class_makes_the_loss_nan(strict_cupy, dtype, label):
    x = strict_cupy.asarray(np.zeros((3, 5), dtype))
    for smoothing in (0.0, 0.1):
        assert np.isfinite(ops.cross_entropy(x, strict_cupy.asarray(np.array([1, 4, 0])), smoothing).get())
        assert np.isnan(ops.cross_entropy(x, strict_cupy.asarray(np.array([1, label, 0])), smoothing).get())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["labels", "soft", "a Tensor"])
@pytest.mark.parametrize(("m", "classes"), [(1, 2), (33, 10), (5, 1000), (3, 5000), (1, 21843), (2100, 3)])
def test_cross_entropy_equals_the_formula(strict_cupy, m, classes, kind, dtype):
    rng = np.random.default_rng(classes)
    logits = (2 * rng.standard_normal((m, classes))).astype(dtype)
    logits[:, ::2] += np.asarray(200, dtype)
    soft = kind != "labels"
    labels = rng.uniform(0.1, 1, (m, classes)).astype(np.float32) if soft else rng.integers(0, classes, m)
    smoothing = 0.1 if m % 2 else 0.0
    (x,), y = on_gpu(strict_cupy, logits), strict_cupy.asarray(labels)
    y = mv.tensor(y, requires_grad=True) if kind == "a Tensor" else y
    strict_cupy.counters.reset()
    with mv.first_order():
        out = ops.cross_entropy(x, y, smoothing)
    if kind != "a Tensor":
        assert strict_cupy.counters.launches == 2
    assert out.dtype == np.float32
    exact = mv.tensor(logits.astype(np.float64), requires_grad=True)
    wanted = mv.tensor(labels.astype(np.float64), requires_grad=True) if soft else labels
    expected = ops.cross_entropy(exact, wanted, smoothing)
    np.testing.assert_allclose(out.data.get(), expected.data, rtol=1e-6)
    out.backward(strict_cupy.asarray(np.float32(0.5)))
    expected.backward(np.float64(0.5))
    assert x.grad.dtype == dtype
    size = np.abs(exact.grad).max()
    assert np.abs(x.grad.get().astype(np.float64) - exact.grad).max() <= DTYPES[dtype] * size
    if kind == "a Tensor":
        np.testing.assert_allclose(y.grad.get(), wanted.grad, rtol=1e-5, atol=1e-6 / m)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("classes", [2, 10, 3000])
def test_what_is_right_is_counted_on_the_way(strict_cupy, classes, soft):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (70, classes)).astype(np.float32)  # with ties: the first counts
    labels = rng.integers(0, classes, 70)
    labels[:40] = logits[:40].argmax(1)
    labels = np.eye(classes, dtype=np.float32)[labels] if soft else labels
    (x,), y = on_gpu(strict_cupy, logits), strict_cupy.asarray(labels)
    assert counted.counted_right(x.data, y) is None
    with mv.first_order():
        ops.cross_entropy(x, y)
    right = counted.counted_right(x.data, y)
    assert right.get() == count_right(logits, labels) >= 40
    strict_cupy.counters.reset()
    assert count_right(x.data, y) is right and not strict_cupy.counters.launches
    assert counted.counted_right(x.data, y[:5]) is None
    assert counted.counted_right(strict_cupy.asarray(logits), y) is None


def test_more_rows_than_a_grid_has_programs_are_left_to_the_plain_operation(strict_cupy, monkeypatch):
    monkeypatch.setattr(tile, "GRID", (2**31 - 1, 2, 2))  # 65,535 on a GPU
    labels = np.zeros(33, np.int64)
    for rows, by_kernels in ((32, True), (33, False)):  # 16 a program
        (x,) = on_gpu(strict_cupy, np.zeros((rows, 10), np.float32))
        with mv.first_order():
            loss = ops.cross_entropy(x, strict_cupy.asarray(labels[:rows]))
        loss.backward()
        assert abs(loss.item() - np.log(10.0)) < 1e-6 and (x.grad[:, 0].get() < 0).all()
        assert (counted.counted_right(x.data, strict_cupy.asarray(labels[:rows])) is None) or by_kernels
        assert bool(strict_cupy.counters.launched["cross_entropy_backward"]) == by_kernels
        strict_cupy.counters.reset()


def test_a_loss_gives_equal_bits_and_knows_no_other_row(strict_cupy):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((100, 10)).astype(np.float32), rng.integers(0, 10, 100)
    found = []
    for rows in (logits, logits, np.where(np.arange(100)[:, None] == 7, np.nan, logits).astype(np.float32)):
        (x,) = on_gpu(strict_cupy, rows)
        with mv.first_order():
            out = ops.cross_entropy(x, strict_cupy.asarray(labels))
        out.backward()
        found.append((out.data.get().tobytes(), x.grad.get()))
    assert found[0][0] == found[1][0] and found[0][1].tobytes() == found[1][1].tobytes()
    assert np.isnan(np.frombuffer(found[2][0], np.float32)).all()
    assert np.isnan(found[2][1][7]).all() and (found[2][1][8:] == found[0][1][8:]).all()


# ---- patchify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize(
    ("shape", "patch"),
    [((5, 3, 32, 32), (4, 4)), ((2, 3, 28, 42), (14, 7)), ((1, 1, 8, 8), (2, 2)), ((3, 2, 6, 5), (6, 1))],
)
def test_patches_are_the_images_numbers(strict_cupy, shape, patch, dtype):
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (x,) = on_gpu(strict_cupy, images)
    with mv.first_order():
        out = ops.patchify(x, patch, dtype)
    assert isinstance(out.node.op, Twin) and out.dtype == (dtype or np.float32)
    assert strict_cupy.counters.launched["patchify"] == strict_cupy.counters.launches == 1
    expected = ops.patchify(images, patch)
    np.testing.assert_array_equal(out.data.get(), expected if dtype is None else expected.astype(dtype))
    out.backward(out.data)
    np.testing.assert_array_equal(x.grad.get(), images if dtype is None else images.astype(dtype).astype(np.float32))


# ---- embed_tokens ----------------------------------------------------------------------------------------------------

TOKENS = [(5, 64, 192, True, True), (40, 3, 24, True, True), (2, 300, 33, True, True), (3, 4, 48, False, True),
          (1, 1, 16, True, False)]  # fmt: skip


def tokens(b, n, d, has_cls, has_positions, dtype):
    rng = np.random.default_rng(0)
    t = n + has_cls
    shapes = (b, n, d), (1, 1, d) if has_cls else None, (1, t, d) if has_positions else None
    g = rng.standard_normal((b, t, d)).astype(dtype)
    return [None if s is None else rng.standard_normal(s).astype(dtype) for s in shapes], g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_embed_tokens_equals_the_plain_operation(strict_cupy, shape, dtype):
    arrays, g = tokens(*shape, dtype)
    given, exact = on_gpu(strict_cupy, *arrays), [None if x is None else x.astype(np.float64) for x in arrays]
    exact = [None if x is None else mv.tensor(x, requires_grad=True) for x in exact]
    with mv.first_order():
        out = ops.embed_tokens(*given)
    assert strict_cupy.counters.launches == 1
    expected = ops.embed_tokens(*exact)
    np.testing.assert_array_equal(out.data.get(), expected.data.astype(dtype))
    out.backward(strict_cupy.asarray(g))
    expected.backward(g.astype(np.float64))
    np.testing.assert_array_equal(given[0].grad.get(), exact[0].grad.astype(dtype))
    for x, e in zip(given[1:], exact[1:], strict=True):
        if x is not None:
            assert x.grad.dtype == dtype
            np.testing.assert_allclose(x.grad.get().astype(float), e.grad, rtol=DTYPES[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_embed_tokens_writes_into_slots(strict_cupy, shape, dtype):
    """In float32, whatever the tokens are; twice is added."""
    arrays, g = tokens(*shape, dtype)
    given, sizes = on_gpu(strict_cupy, *arrays), [0 if x is None else x.size for x in arrays[1:]]
    flat = strict_cupy.empty(sum(sizes), np.float32)
    views = flat[: sizes[0]], flat[sizes[0] :]
    slots = {x.node: Slot(view.reshape(x.shape)) for x, view in zip(given[1:], views, strict=True) if x is not None}
    for _ in range(2):
        with mv.first_order():
            out = ops.embed_tokens(*given)
        assert [node for node, _ in propagate(out.node, strict_cupy.asarray(g), slots=slots)] == [given[0].node]
    total = 2 * g.astype(np.float64).sum(0, keepdims=True)
    for x, of in zip(given[1:], (total[:, :1], total), strict=True):
        if x is not None:
            np.testing.assert_allclose(slots[x.node].array.get(), of, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", TOKENS, ids=str)
def test_embed_tokens_leaves_the_sums_for_the_projections_bias(strict_cupy, monkeypatch, shape):
    arrays, g = tokens(*shape, np.float32)
    given, noted = on_gpu(strict_cupy, *arrays), []
    partial = sums.partial
    monkeypatch.setattr(sums, "partial", lambda *x: noted.append((x[0], partial(*x))) or noted[0][1])
    with mv.first_order():
        out = ops.embed_tokens(*given)
    out.backward(strict_cupy.asarray(g))
    ((of, partials),) = noted
    assert of.shape == arrays[0].shape
    expected = g[:, len(arrays[1] if arrays[1] is not None else ()) :].astype(np.float64).sum((0, 1))
    np.testing.assert_allclose(partials.get().astype(np.float64).sum(0), expected, rtol=1e-5, atol=1e-4)


# ---- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_model_of_halves_takes_float32_images_and_runs_by_kernels(strict_cupy, pool):
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "pool": pool}
    ours, exact = mv.ViT(**sizes), mv.ViT(**sizes)
    rng = np.random.default_rng(0)
    ours.head.weight.data[...] = 0.1 * rng.standard_normal(ours.head.weight.shape)
    ours.to(BFLOAT16).to("cuda")
    exact.to(np.float64)
    for p, e in zip(ours.parameters(), exact.parameters(), strict=True):
        e.data[...] = p.data.get().astype(np.float64)
    images, labels = rng.standard_normal((6, 3, 16, 16)).astype(np.float32), rng.integers(0, 10, 6)
    there = strict_cupy.asarray(images), strict_cupy.asarray(labels)
    strict_cupy.counters.reset()
    with mv.first_order():
        loss = ops.cross_entropy(ours(there[0]), there[1], 0.1)
    launched = strict_cupy.counters.launched
    once = ("patchify", "embed_forward", "cross_entropy_rows", "cross_entropy_total")
    assert {name: launched[name] for name in once} == dict.fromkeys(once, 1) and launched["attention_forward"] == 2
    loss.backward()
    assert launched["attention_backward"] == 2 and launched["embed_backward"] == launched["cross_entropy_backward"] == 1
    expected = ops.cross_entropy(exact(images.astype(BFLOAT16).astype(np.float64)), labels, 0.1)
    expected.backward()
    np.testing.assert_allclose(loss.data.get(), expected.data, rtol=5e-3)
    grads = [
        (p.grad.get().astype(np.float64), e.grad) for p, e in zip(ours.parameters(), exact.parameters(), strict=True)
    ]
    off = sum(((a - b) ** 2).sum() for a, b in grads) / sum((b**2).sum() for _, b in grads)
    assert off**0.5 < 0.03
