"""The kernels that work on rows and on the flat store, on CuPy's stand-in: layer_norm, gelu, column sums, AdamW."""

from __future__ import annotations

import functools
import gc
import math
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from minivit.autograd.needs import Slot, SoFar, Total
from minivit.backend import Key, normal, tile, uniform
from minivit.ops import gelu, layer_norm, rms_norm
from minivit.ops.cuda import sums, update
from tests import tile as stand_in

FLOAT32, FLOAT16, BFLOAT16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
EPS = 2.0**-24  # half a unit of the last place of float32
dtypes = pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)


def exact(a: Any) -> np.ndarray:
    return (a if isinstance(a, np.ndarray) else a.get()).astype(np.float64)


def numbers(seed: int, *shape: int, dtype: Any = FLOAT32, scale: float = 1.0) -> np.ndarray:
    return np.asarray(normal(Key(seed), shape) * scale).astype(dtype)


def unit(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the unit of the last place of values in a dtype."""
    info = ml_dtypes.finfo(dtype)
    least = float(info.smallest_normal)
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(values), least))) - info.nmant)


def assert_within(actual: Any, expected: np.ndarray, scale: Any, roundings: float, dtype: Any = FLOAT32) -> None:
    """Hold ``actual`` to ``expected`` within so many roundings of ``scale`` in float32, and one to its own dtype."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    error = np.abs(exact(actual) - expected)
    bound = roundings * EPS * np.broadcast_to(scale, expected.shape) + 0.5001 * unit(expected, dtype)
    assert (error <= bound).all(), f"{np.nanmax(error / bound)} times too far, {np.isnan(error).sum()} are NaN"


def cuda(op: Any) -> Any:
    return op.twins["cuda"]


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)


# ---- layer_norm ------------------------------------------------------------------------------------------------------

EPSILON = 1e-6


def normed(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, g: np.ndarray) -> dict[str, tuple[Any, Any]]:
    """Return of float64 rows (M, D) each result and the size of what it is summed of."""
    offsets = x - x[:, :1]
    largest = np.abs(offsets).max(1, keepdims=True)
    offsets = offsets - offsets.mean(1, keepdims=True)
    rstd = 1 / np.sqrt((offsets**2).mean(1, keepdims=True) + EPSILON)
    x_hat, gw = offsets * rstd, g * weight
    # x̂ is off by roundings of the largest offset, and so is all that is made of it
    size = largest * rstd
    gx = rstd * (gw - gw.mean(1, keepdims=True) - x_hat * (gw * x_hat).mean(1, keepdims=True))
    most = np.abs(gw).max(1, keepdims=True)
    of_gx = rstd * most * (2 + size * size)
    return {
        "out": (x_hat * weight + bias, size * np.abs(weight) + np.abs(bias)),
        "gx": (gx, of_gx),
        "weight": ((g * x_hat).sum(0), (np.abs(g) * size).sum(0)),
        "bias": (g.sum(0), np.abs(g).sum(0)),
        "columns": (gx.sum(0), of_gx.sum(0) + np.zeros(x.shape[1])),
    }


SHAPES = [(1, 1), (1, 7), (5, 24), (3, 100), (261, 1536), (2, 5, 192), (9, 1280), (3, 2, 4, 64), (1, 4096)]


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "residual"])
def test_layer_norm(strict_cupy, shape, dtype, add):
    width = shape[-1]
    x, g, so_far = (numbers(i, *shape, dtype=dtype) for i in range(3))
    weight, bias = (numbers(i, width, dtype=dtype) for i in (3, 4))
    wanted = normed(*(exact(a) for a in (x.reshape(-1, width), weight, bias, g.reshape(-1, width))))
    there = [strict_cupy.asarray(a) for a in (x, weight, bias)]
    strict_cupy.counters.reset()
    out, kept = cuda(layer_norm).forward(*there, EPSILON)
    assert dict(strict_cupy.counters.launched) == {"layer_norm_forward": 1}
    need = SoFar(strict_cupy.asarray(so_far)) if add else True
    arena = sums.Arena(strict_cupy.zeros(width, FLOAT32))
    strict_cupy.counters.reset()
    with sums.collecting(arena):
        gx, *of_vectors = cuda(layer_norm)._vjp(strict_cupy.asarray(g), kept, (need, True, True))
        assert strict_cupy.counters.launched["layer_norm_backward"] == 1
        assert type(gx) is (Total if add else strict_cupy.ndarray)
        gx = gx.array if add else gx
        columns = sums.of(gx)
        assert strict_cupy.counters.launched["columns"] == 0  # they were made on the way
        total = columns.get().sum(0)
    if add:
        wanted["gx"] = (
            wanted["gx"][0] + exact(so_far).reshape(-1, width),
            wanted["gx"][1] + np.abs(exact(so_far)).max(),
        )
        wanted["columns"] = (wanted["gx"][0].sum(0), wanted["columns"][1] + np.abs(exact(so_far)).sum())
    for name, a, type_ in (
        ("out", out.reshape(-1, width), dtype), ("gx", gx.reshape(-1, width), dtype), ("weight", of_vectors[0], dtype),
        ("bias", of_vectors[1], dtype), ("columns", total, FLOAT32),
    ):  # fmt: skip
        assert_within(a, *wanted[name], roundings=16, dtype=type_)


@dtypes
def test_layer_norm_takes_one_token_of_each_image_without_a_copy(strict_cupy, dtype):
    tokens, weight, bias = numbers(0, 6, 5, 24, dtype=dtype), numbers(1, 24, dtype=dtype), numbers(2, 24, dtype=dtype)
    there = [strict_cupy.asarray(a) for a in (tokens, weight, bias)]
    strict_cupy.counters.reset()
    out, kept = cuda(layer_norm).forward(there[0][:, 0], *there[1:], EPSILON)
    g = numbers(3, 6, 24, dtype=dtype)
    gx, _, _ = cuda(layer_norm)._vjp(strict_cupy.asarray(g), kept, (True, False, False))
    assert set(strict_cupy.counters.launched) == {"layer_norm_forward", "layer_norm_backward"}
    wanted = normed(exact(tokens[:, 0]), exact(weight), exact(bias), exact(g))
    assert_within(out, *wanted["out"], roundings=16, dtype=dtype)
    assert_within(gx, *wanted["gx"], roundings=16, dtype=dtype)


def test_layer_norm_of_equal_numbers_is_the_bias_and_far_ones_keep_their_digits(strict_cupy):
    width = 100
    x = np.concatenate([np.full((1, width), 0.1), np.full((1, width), -1e6), 1e4 + 0.01 * normal(Key(1), (9, width))])
    x = x.astype(FLOAT32)
    weight, bias = numbers(2, width), numbers(3, width)
    out, kept = cuda(layer_norm).forward(*map(strict_cupy.asarray, (x, weight, bias)), EPSILON)
    np.testing.assert_array_equal(out.get()[:2], np.stack([bias, bias]))
    g = numbers(4, *x.shape)
    gx, of_weight, _ = cuda(layer_norm)._vjp(strict_cupy.asarray(g), kept, (True, True, False))
    wanted = normed(exact(x), exact(weight), exact(bias), exact(g))
    assert_within(out, *wanted["out"], roundings=16)
    assert_within(gx, *wanted["gx"], roundings=16)
    assert_within(of_weight, *wanted["weight"], roundings=16)


def test_layer_norm_that_no_kernel_serves_is_left_to_the_plain_operation(strict_cupy, monkeypatch):
    forward = lambda *arrays: cuda(layer_norm).forward(*map(strict_cupy.asarray, arrays), EPSILON)
    ones = np.ones(6, FLOAT32)
    assert forward(np.ones((2, 6)), np.ones(6), np.ones(6)) is NotImplemented  # float64
    assert forward(np.ones((0, 6), FLOAT32), ones, ones) is NotImplemented
    assert forward(np.ones((2, 6), FLOAT32), ones[:4], ones) is NotImplemented  # the plain one says what is wrong
    assert forward(np.ones((2, 8192), FLOAT32), np.ones(8192, FLOAT32), np.ones(8192, FLOAT32)) is NotImplemented
    without_kernels(monkeypatch)
    assert cuda(layer_norm).forward(*map(strict_cupy.asarray, (np.ones((2, 11), FLOAT32), *[np.ones(11, FLOAT32)] * 2)),
                                    EPSILON) is NotImplemented  # fmt: skip


@dtypes
@pytest.mark.parametrize("shape", [(5, 24), (3, 100), (2, 5, 192)], ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "residual"])
def test_rms_norm(strict_cupy, shape, dtype, add):
    width = shape[-1]
    x, g, so_far = (numbers(i, *shape, dtype=dtype) for i in range(3))
    weight = numbers(3, width, dtype=dtype)
    there = [strict_cupy.asarray(a) for a in (x, weight)]
    strict_cupy.counters.reset()
    out, kept = cuda(rms_norm).forward(*there, EPSILON)
    need = SoFar(strict_cupy.asarray(so_far)) if add else True
    with sums.collecting(sums.Arena(strict_cupy.zeros(width, FLOAT32))):
        gx, of_weight = cuda(rms_norm)._vjp(strict_cupy.asarray(g), kept, (need, True))
        gx = gx.array if add else gx
        columns = sums.of(gx).get().sum(0)
    launched = strict_cupy.counters.launched
    assert (launched["rms_norm_forward"], launched["rms_norm_backward"], launched["columns"]) == (1, 1, 0)
    xs, gs, before = (exact(a).reshape(-1, width) for a in (x, g, so_far))
    root = np.sqrt((xs**2).mean(1, keepdims=True) + EPSILON)
    x_hat, gw = xs / root, gs * exact(weight)
    expected = (gw - x_hat * (gw * x_hat).mean(1, keepdims=True)) / root + add * before
    size = np.abs(gw).max(1, keepdims=True) * (1 + x_hat**2) / root + add * np.abs(before).max()
    assert_within(out.reshape(-1, width), x_hat * exact(weight), np.abs(x_hat * exact(weight)), 16, dtype)
    assert_within(gx.reshape(-1, width), expected, size, 16, dtype)
    assert_within(of_weight, (gs * x_hat).sum(0), np.abs(gs * x_hat).sum(0), 16, dtype)
    assert_within(columns, expected.sum(0), size.sum(0), 16, FLOAT32)
    assert cuda(rms_norm).forward(there[0], there[1][:4], EPSILON) is NotImplemented  # the plain one says what is wrong


# ---- gelu ------------------------------------------------------------------------------------------------------------


def gelu_of(x: np.ndarray, approximate: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return float64 gelu, the size of what it is made of, its derivative, and that size of the derivative."""
    if approximate == "none":
        cdf = 0.5 * np.vectorize(math.erfc)(-x / math.sqrt(2))
        slope, of_power = np.exp(-x * x / 2) / math.sqrt(2 * math.pi), 0.0
    else:
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        cdf = 1 / (1 + np.exp(-2 * scale * (x + cubic * x**3)))
        of_v = 2 * scale * (1 + 3 * cubic * x * x)
        slope = cdf * (1 - cdf) * of_v
        of_power = np.abs(2 * scale * (x + cubic * x**3)) * (1 - cdf)  # e^v is off by v times what v is
        of_power += np.abs(x * of_v) * (x > 0) / 20  # 1 - cdf by a rounding of 1
    size = (cdf + np.abs(x * slope)) * (1 + of_power)
    return x * cdf, np.abs(x * cdf) * (1 + of_power), cdf + x * slope, size


def test_gelu_of_more_rows_than_a_grid_has_programs_is_left_to_the_plain_operation(strict_cupy, monkeypatch):
    monkeypatch.setattr(tile, "GRID", (2**31 - 1, sums.ROWS, sums.ROWS))  # 65,535 on a GPU
    rows = strict_cupy.zeros((8 * sums.ROWS + 1, 256), FLOAT32)
    assert cuda(gelu).forward(rows, "none") is NotImplemented
    assert cuda(gelu).forward(rows[1:], "none")[0].shape == rows[1:].shape


@dtypes
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (3, 5), (2, 4, 100), (40, 768), (2049, 3), (520, 300)], ids=str)
def test_gelu(strict_cupy, shape, approximate, dtype):
    x, g = numbers(0, *shape, dtype=dtype, scale=2.0), numbers(1, *shape, dtype=dtype)
    strict_cupy.counters.reset()
    out, kept = cuda(gelu).forward(strict_cupy.asarray(x), approximate)
    y, of_y, slope, size = gelu_of(exact(x), approximate)
    roundings = 20 if dtype == FLOAT32 else 500  # of 2.9e-5 or less
    assert_within(out, y, of_y, roundings, dtype)
    with sums.collecting(sums.Arena(strict_cupy.empty(1, FLOAT32))):
        (gx,) = cuda(gelu)._vjp(strict_cupy.asarray(g), kept, (True,))
        columns = sums.of(gx).get().sum(0)
    assert dict(strict_cupy.counters.launched) == {"gelu_forward": 1, "gelu_backward": 1}
    g = exact(g)
    assert_within(gx, g * slope, np.abs(g) * size, roundings, dtype)
    rows = lambda a: a.reshape(-1, shape[-1])
    assert_within(columns, rows(g * slope).sum(0), rows(np.abs(g) * size).sum(0), roundings)


@pytest.mark.parametrize("dtype, most", [(FLOAT32, 10.0), (FLOAT16, 0.56), (BFLOAT16, 0.56)], ids=str)
def test_gelu_is_right_to_a_few_units_of_its_own_last_place_where_it_is_tiny_too(strict_cupy, dtype, most):
    """Of float32 ten at most, one on average; of a half its own rounding, and a twentieth."""
    for low, high in ((-12.8, -5.0), (-5.0, -1.0), (-1.0, 1.0), (1.0, 20.0)):
        x = (low + (high - low) * uniform(Key(3), (40, 500))).astype(dtype)
        out, kept = cuda(gelu).forward(strict_cupy.asarray(x), "none")
        (gx,) = cuda(gelu)._vjp(strict_cupy.asarray(np.ones_like(x)), kept, (True,))
        y, _, slope, size = gelu_of(exact(x), "none")
        error = np.abs(exact(out) - y) / unit(y, dtype)
        assert error.max() <= most and error.mean() <= 1.3, (low, error.max(), error.mean())
        assert (np.abs(exact(gx) - slope) <= most * unit(size, dtype)).all(), low


def test_gelu_of_what_is_large_or_not_a_number(strict_cupy):
    x = np.array([0.0, -0.0, 1e30, -1e30, np.nan], FLOAT32)
    out, _ = cuda(gelu).forward(strict_cupy.asarray(x), "none")
    np.testing.assert_array_equal(out.get(), [0.0, 0.0, x[2], 0.0, np.nan])
    assert (
        cuda(gelu).forward(strict_cupy.asarray(x), "fast") is NotImplemented
    )  # the plain operation says what is wrong
    assert cuda(gelu).forward(strict_cupy.asarray(x.astype(np.float64)), "none") is NotImplemented


# ---- sums over columns -----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (3, 7, 100), (4200, 130)], ids=str)
def test_column_sums(strict_cupy, monkeypatch, shape, dtype):
    g = numbers(0, *shape, dtype=dtype)
    rows = exact(g).reshape(-1, shape[-1])
    partials = sums.of(strict_cupy.asarray(g))
    assert partials.shape == (sums.ROWS, shape[-1])
    assert_within(sums.deliver(partials, True, FLOAT32), rows.sum(0), np.abs(rows).sum(0), 8)
    assert sums.deliver(partials, True, dtype).dtype == dtype
    without_kernels(monkeypatch)
    plain = sums.deliver(sums.of(strict_cupy.asarray(g[..., ::-1])), True, FLOAT32)
    assert_within(plain[::-1], rows.sum(0), np.abs(rows).sum(0), 8)


def test_column_sums_of_float64_are_float64(strict_cupy):
    g = np.asarray(normal(Key(0), (50, 6)))
    total = sums.deliver(sums.of(strict_cupy.asarray(g)), True, np.float64)
    np.testing.assert_allclose(total.get(), g.sum(0), rtol=1e-14)


class Flat:
    """A flat gradient full of NaN, and slots in it."""

    def __init__(self, cupy: Any, *shapes: tuple[int, ...]) -> None:
        starts = np.cumsum([0, *(-(-math.prod(shape) // 64) * 64 for shape in shapes)]).tolist()
        self.array = cupy.empty(starts[-1], FLOAT32)
        self.slots = [Slot(self.array[a : a + math.prod(s)].reshape(s)) for a, s in zip(starts, shapes, strict=False)]
        self.arena = sums.Arena(self.array)

    def forget(self) -> None:
        for slot in self.slots:
            slot.filled = False


def deliver_all(flat: Flat, cupy: Any, seed: int) -> list[np.ndarray]:
    """Deliver the column sums of arrays to the slots within one collection, to the last one twice; return them."""
    wanted = []
    with sums.collecting(flat.arena):
        for i, slot in enumerate([*flat.slots, flat.slots[-1]]):
            g = numbers(seed + i, 16 * sums.ROWS, slot.array.size, dtype=BFLOAT16)  # every program has some
            assert sums.deliver(sums.of(cupy.asarray(g)), slot, BFLOAT16) is slot
            wanted.append(exact(g).sum(0))
    assert all(slot.filled for slot in flat.slots)
    return [*wanted[:-2], wanted[-2] + wanted[-1]]


@pytest.mark.parametrize("kernels", [True, False])
def test_slots_get_their_sums_when_the_collection_ends(strict_cupy, monkeypatch, kernels):
    flat = Flat(strict_cupy, (5,), (1, 3, 100), (64,), (7,))
    if not kernels:
        without_kernels(monkeypatch)
    for micro_batches in (1, 2):
        flat.forget()
        total: Any = 0.0
        for i in range(micro_batches):
            wanted = deliver_all(flat, strict_cupy, 10 * i)
            total = [a + b for a, b in zip(total, wanted, strict=True)] if i else wanted
        for slot, expected in zip(flat.slots, total, strict=True):
            assert_within(slot.array.reshape(-1), expected, 3000.0, 4)


def test_a_collection_like_one_before_takes_no_memory_and_nothing_from_the_host(strict_cupy, monkeypatch):
    flat = Flat(strict_cupy, (5,), (100,), (64,))
    arrays = [strict_cupy.asarray(numbers(i, 30, slot.array.size)) for i, slot in enumerate(flat.slots)]
    made: list[tuple[int, ...]] = []
    for name in ("empty", "zeros", "asarray"):
        function = getattr(strict_cupy, name)
        monkeypatch.setattr(strict_cupy, name, lambda *a, f=function, **k: made.append(a) or f(*a, **k))
    results = []
    for again in range(2):
        flat.forget()
        made.clear()
        strict_cupy.counters.reset()
        with sums.collecting(flat.arena):
            for slot, g in zip(flat.slots, arrays, strict=True):
                sums.deliver(sums.of(g), slot, FLOAT32)
        if again:
            assert not made and not strict_cupy.counters.transfers
            assert dict(strict_cupy.counters.launched) == {"columns": 3, "settle": 1}
        results.append(flat.array.get())
    np.testing.assert_array_equal(*results)  # bit for bit, but for NaN's between the slots


def test_some_of_the_columns_can_be_delivered(strict_cupy):
    flat = Flat(strict_cupy, (6,), (4,))
    rows = numbers(0, 20, 10)
    for _ in range(2):
        flat.forget()
        with sums.collecting(flat.arena):
            partials = sums.of(strict_cupy.asarray(rows))
            sums.deliver(partials[:, :6], flat.slots[0], FLOAT32)
            sums.deliver(partials[:, 6:], flat.slots[1], FLOAT32)
            assert np.isnan(flat.slots[0].array.get()).all() or _  # as yet
        np.testing.assert_allclose(flat.slots[0].array.get(), rows[:, :6].sum(0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(flat.slots[1].array.get(), rows[:, 6:].sum(0), rtol=1e-5, atol=1e-5)


def test_a_slot_elsewhere_gets_its_sum_at_once(strict_cupy):
    flat, rows = Flat(strict_cupy, (6,)), numbers(0, 20, 6)
    elsewhere = Slot(strict_cupy.zeros(6, FLOAT32))
    for _ in range(2):
        with sums.collecting(flat.arena):
            assert sums.deliver(sums.of(strict_cupy.asarray(rows)), elsewhere, FLOAT32) is elsewhere
    np.testing.assert_allclose(elsewhere.array.get(), 2 * rows.sum(0), rtol=1e-5, atol=1e-5)
    alone = Slot(strict_cupy.zeros(6, FLOAT32))
    assert sums.deliver(sums.of(strict_cupy.asarray(rows)), alone, FLOAT32) is alone  # no collection
    np.testing.assert_allclose(alone.array.get(), rows.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernels", [True, False])
def test_a_part_that_comes_before_the_sum_is_made_is_not_lost(strict_cupy, monkeypatch, kernels):
    """A parameter that is used twice may get one part at once, by an operation that has no twin."""
    flat, rows, part = Flat(strict_cupy, (6,)), numbers(0, 20, 6), strict_cupy.asarray(numbers(1, 6))
    if not kernels:
        monkeypatch.setattr(sums._SETTLE, "ready", lambda *args, **constants: False)
    (slot,) = flat.slots
    for micro_batches in (1, 2):
        flat.forget()
        for _ in range(micro_batches):
            with sums.collecting(flat.arena):
                partials = sums.of(strict_cupy.asarray(rows))
                for _ in range(2):
                    sums.deliver(partials, slot, FLOAT32)
                slot.add(part)
        wanted = micro_batches * (2 * rows.sum(0) + part.get())
        np.testing.assert_allclose(slot.array.get(), wanted, rtol=1e-5, atol=1e-5)


def test_sums_are_remembered_of_the_very_array_only(strict_cupy):
    with sums.collecting(sums.Arena(strict_cupy.zeros(4, FLOAT32))):
        array = strict_cupy.ones((3, 4), FLOAT32)
        partials = sums.partial(array, 4)
        partials[...] = 7.0
        assert sums.of(array) is partials
        assert float(sums.of(array.reshape(3, 4)).sum()) == 12.0  # another array, though of the same memory
        number = id(array)
        del array
        gc.collect()
        other = strict_cupy.ones((3, 4), FLOAT32)
        noted = sums._here.arena._noted
        noted[id(other)] = noted[number]  # as if it had got that number
        assert float(sums.of(other).sum()) == 12.0
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(sums._here.arena))
        thread.start()
        thread.join()
        assert seen == [None]  # a collection is its thread's own
    array = strict_cupy.ones((3, 4), FLOAT32)
    sums.partial(array, 4)[...] = 7.0
    assert float(sums.of(array).sum()) == 12.0  # outside none are kept


def test_a_collection_that_fails_settles_nothing(strict_cupy):
    flat = Flat(strict_cupy, (4,))
    with pytest.raises(ZeroDivisionError), sums.collecting(flat.arena):
        sums.deliver(sums.of(strict_cupy.ones((3, 4), FLOAT32)), flat.slots[0], FLOAT32)
        1 / 0  # noqa: B018
    assert np.isnan(flat.array.get()).all() and sums._here.arena is None
    flat.forget()
    with sums.collecting(flat.arena):
        sums.deliver(sums.of(strict_cupy.ones((3, 4), FLOAT32)), flat.slots[0], FLOAT32)
    np.testing.assert_array_equal(flat.slots[0].array.get(), np.full(4, 3.0))


def test_the_order_of_programs_changes_no_bit(strict_cupy, monkeypatch):
    x, g = (strict_cupy.asarray(numbers(i, 700, 100)) for i in range(2))
    vectors = [strict_cupy.asarray(numbers(i, 100)) for i in (2, 3)]
    emulate, found = stand_in.emulate, []
    for seed in range(2):
        monkeypatch.setattr(stand_in, "emulate", functools.partial(emulate, seed=seed))
        flat = Flat(strict_cupy, (100,), (100,), (100,))
        flat.array[...] = 0.0
        with sums.collecting(flat.arena):
            out, kept = cuda(layer_norm).forward(x, *vectors, EPSILON)
            gx, *_ = cuda(layer_norm)._vjp(g, kept, (True, *flat.slots[:2]))
            out, kept = cuda(gelu).forward(out, "none")
            (gx,) = cuda(gelu)._vjp(gx, kept, (True,))
            sums.deliver(sums.of(gx), flat.slots[2], FLOAT32)
        found.append([out.get(), gx.get(), flat.array.get(), update.squares(gx.reshape(-1)).get()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- the flat store --------------------------------------------------------------------------------------------------

BETAS, ADAM_EPS, LR, SCALE, DECAY, FACTOR = (0.9, 0.999), 1e-8, 3e-3, 0.5, 0.05, 0.25


def adamw(cupy: Any, arrays: list[np.ndarray], ok: bool, count: int, betas: Any = BETAS) -> list[Any]:
    """Run the update and return values, m and v as they are then."""
    given = [cupy.asarray(a) for a in arrays]
    numbers = [cupy.asarray(np.asarray(x, t)) for x, t in
               ((ok, np.bool_), (count, np.float64), (LR, np.float64), (FACTOR, FLOAT32))]  # fmt: skip
    cupy.counters.reset()
    settings: Any = {"betas": betas, "eps": ADAM_EPS, "scale": SCALE, "decay": DECAY}
    assert update.adamw(*given, *numbers, **settings)
    assert dict(cupy.counters.launched) == {"adamw": 1} and not cupy.counters.syncs
    np.testing.assert_array_equal(given[1].get(), arrays[1])  # the gradient
    return [given[0], given[2], given[3]]


@pytest.mark.parametrize("count", [1, 2, 50, 1000, 10**6])
def test_adamw(strict_cupy, count):
    n = 2500
    p, g, m = (numbers(i, n) for i in range(3))
    v = numbers(3, n) ** 2
    found = adamw(strict_cupy, [p, g, m, v], ok=True, count=count)
    p64, d, m64, v64 = exact(p), exact(g) * FACTOR, exact(m), exact(v)
    first, second = 0.9 * m64 + 0.1 * d, 0.999 * v64 + 0.001 * d * d
    step = LR * SCALE * (first / (1 - 0.9**count)) / (np.sqrt(second / (1 - 0.999**count)) + ADAM_EPS)
    wanted = p64 * (1 - LR * SCALE * DECAY) - step
    assert_within(found[1], first, np.abs(0.9 * m64) + np.abs(0.1 * d), 4)
    assert_within(found[2], second, second, 4)
    of_step = np.abs(step) * (np.abs(0.9 * m64) + np.abs(0.1 * d)) / np.abs(first)
    assert_within(found[0], wanted, np.abs(p64) + 8 * of_step, 3)


def test_adamw_that_is_not_to_be_made_changes_no_bit(strict_cupy):
    arrays = [numbers(i, 1500) for i in range(4)]
    arrays[1][3] = np.nan
    arrays[0][5] = -0.0
    values, m, v = adamw(strict_cupy, arrays, ok=False, count=3)
    for a, e in zip((values, m, v), (arrays[0], *arrays[2:]), strict=True):
        assert a.get().tobytes() == e.tobytes()


def test_adamw_without_memory_of_gradients(strict_cupy):
    p, g = numbers(0, 70), numbers(1, 70)
    found = adamw(strict_cupy, [p, g, numbers(2, 70), numbers(3, 70) ** 2], ok=True, count=1, betas=(0.0, 0.0))
    d = exact(g) * FACTOR
    wanted = exact(p) * (1 - LR * SCALE * DECAY) - LR * SCALE * d / (np.abs(d) + ADAM_EPS)
    assert_within(found[0], wanted, np.abs(exact(p)) + LR, 4)


@pytest.mark.parametrize("n", [1, 1000, 600_000])
def test_the_sum_of_squares(strict_cupy, monkeypatch, n):
    x = numbers(0, n)
    strict_cupy.counters.reset()
    total = update.squares(there := strict_cupy.asarray(x))
    assert dict(strict_cupy.counters.launched) == {"squares": 1, "total": 1} and total.shape == ()
    wanted = np.asarray((exact(x) ** 2).sum())
    assert_within(total, wanted, wanted, 8)
    for bad in (np.nan, np.inf, -np.inf):
        there[n // 2] = bad
        assert not np.isfinite(update.squares(there).get())
    without_kernels(monkeypatch)
    assert update.squares(strict_cupy.asarray(numbers(0, n + 1))) is None
