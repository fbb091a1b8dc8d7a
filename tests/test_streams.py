"""The stand-in's streams, graphs, pools and pinned memory are themselves tested; where it can be, on CuPy's as well."""

from __future__ import annotations

import gc
import threading

import ml_dtypes
import numpy as np
import pytest

from minivit.backend import side_stream, through_pinned
from minivit.backend.cuda import Aside
from tests import streams, strict

strict_cupy = strict.strict_cupy
any_cupy = strict.any_cupy


class Recorded:
    """Records a function of arrays under a pool of its own."""

    def __init__(self, cupy, work):
        self.stream, self.pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
        cupy.cuda.Stream.null.synchronize()
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            self.stream.begin_capture()
            try:
                self.made = work()
            finally:
                self.graph = self.stream.end_capture()

    def launch(self):
        self.graph.launch(self.stream)
        self.stream.synchronize()


def test_what_is_captured_runs_when_it_is_launched_and_not_before(any_cupy):
    x, total = any_cupy.arange(6, dtype=np.float32).reshape(2, 3), any_cupy.zeros((), np.float32)

    def work():
        doubled = x * 2.0
        rows = doubled.T.reshape(3, 2)[1:]  # views, and views of them
        rows += 1.0
        total[...] += doubled.sum()
        return doubled, any_cupy.where(rows > 5.0, rows, 0.0)

    recorded = Recorded(any_cupy, work)
    assert total.get() == 0.0 and x.get().tolist() == [[0, 1, 2], [3, 4, 5]]
    for scale in (1.0, 10.0):
        x *= scale
        before = float(total)
        any_cupy.cuda.Stream.null.synchronize()
        recorded.launch()
        expected = x.get() * 2.0
        rows = expected.T.copy()[1:] + 1.0
        changed = recorded.made[0].get()
        np.testing.assert_array_equal(changed[:, 0], expected[:, 0])
        np.testing.assert_allclose(float(total) - before, changed.sum(), rtol=1e-6)
        np.testing.assert_array_equal(recorded.made[1].get(), np.where(rows > 5.0, rows, 0.0))


def test_a_random_chain_of_operations_is_replayed_to_the_bit(strict_cupy):
    cupy = strict_cupy
    a, b = (cupy.asarray(np.random.default_rng(i).normal(size=(4, 6)).astype(np.float32)) for i in range(2))
    index, where = cupy.asarray(np.array([2, 0, 3])), a > 0.0
    state = cupy.zeros((4, 6), np.float32)

    def work():
        x = cupy.exp(a) + b[::-1]
        x -= x.max(axis=1, keepdims=True)
        y = cupy.stack([x[index], cupy.where(where, x, 0.0)[:3]], axis=1).swapaxes(0, 1)
        cupy.add.at(state, index, y[0] * 0.5)
        state[1:, ::2] = b[1:, ::2]
        cupy.multiply(state, 0.9, out=state)
        z = cupy.empty((2, 4), np.float32)
        z[...] = x[:, 1:3].T
        parts = cupy.split(cupy.concatenate([z, z], axis=1), 2, axis=1)
        return cupy.sqrt(cupy.square(parts[1])).astype(np.float64), state.copy()

    expected = [x.get() for x in work()]
    state[...] = 0.0
    recorded = Recorded(cupy, work)
    assert not state.get().any() and all(np.isnan(x.get()).all() for x in recorded.made)
    recorded.launch()
    for ours, theirs in zip(recorded.made, expected, strict=True):
        np.testing.assert_array_equal(ours.get(), theirs)


REFUSED = {
    "get": lambda cupy, a: a.get(),
    "item": lambda cupy, a: a[0].item(),
    "bool": lambda cupy, a: bool(a[0]),
    "print": lambda cupy, a: f"{a[0]}",
    "asarray": lambda cupy, a: cupy.asarray(np.ones(3)),
    "set": lambda cupy, a: a.set(np.ones(3)),
    "host index": lambda cupy, a: a[np.array([0, 1])],
    "list index": lambda cupy, a: a[[0, 1]],
    "mask": lambda cupy, a: a[a > 0],
    "nonzero": lambda cupy, a: a.nonzero(),
    "where": lambda cupy, a: cupy.where(a),
    "unique": lambda cupy, a: cupy.unique(a),
    "many joined": lambda cupy, a: cupy.stack([a] * 9),
    "synchronize": lambda cupy, a: cupy.cuda.get_current_stream().synchronize(),
    "device": lambda cupy, a: cupy.cuda.Device().synchronize(),
    "done": lambda cupy, a: cupy.cuda.get_current_stream().done,
    "cuBLAS": lambda cupy, a: a @ a,
    "matmul": lambda cupy, a: cupy.matmul(a[None], a[:, None]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_capture_refuses(any_cupy, what):
    a = any_cupy.ones(3)
    kind = NotImplementedError if what in ("cuBLAS", "matmul") else RuntimeError
    void = what in ("synchronize", "device", "done")
    stream = any_cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        if what == "done" and any_cupy is not strict.cupy:
            assert REFUSED[what](any_cupy, a) in (True, False)  # CuPy asks, and says nothing
        else:
            with pytest.raises(kind):
                REFUSED[what](any_cupy, a)
        if void:
            with pytest.raises(any_cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
                stream.end_capture()
        else:
            stream.end_capture()
        assert not stream.is_capturing()
        assert float(a.sum()) == 3.0  # the stream can be used


def test_the_default_stream_captures_nothing(any_cupy):
    with pytest.raises(RuntimeError, match="cannot capture on the default"):
        any_cupy.cuda.Stream.null.begin_capture()
    with pytest.raises(any_cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorIllegalState"):
        any_cupy.cuda.Stream(non_blocking=True).end_capture()


def test_memory_that_a_capture_has_freed_is_poisoned_from_there_on(strict_cupy):
    x, out = strict_cupy.ones(3), strict_cupy.zeros(3)
    kept = []

    def work():
        freed = x * 2.0
        kept.append(freed._host)
        out[...] = freed
        del freed

    recorded = Recorded(strict_cupy, work)
    recorded.launch()
    assert out.get().tolist() == [2.0, 2.0, 2.0] and np.isnan(kept[0]).all()

    def wrong():  # reads memory after its array is gone, as a pointer that was kept would
        freed = x * 2.0
        host = freed._host
        del freed
        strict.launch("late", lambda: np.copyto(out._host, host), [x], [out])

    Recorded(strict_cupy, wrong).launch()
    assert np.isnan(out.get()).all()


def test_nothing_is_carried_from_launch_to_launch_in_a_graphs_memory(strict_cupy):
    out, kept = strict_cupy.zeros(3), []

    def work():
        if not kept:
            kept.append(strict_cupy.ones(3))
        empty = strict_cupy.empty(3)
        out[...] = kept[0] + empty

    recorded = Recorded(strict_cupy, work)
    recorded.launch()
    assert np.isnan(out.get()).all()  # an array made by empty holds nothing


def test_a_graph_on_freed_arrays_is_not_launched(strict_cupy):
    kept, out = [strict_cupy.ones(3)], strict_cupy.zeros(3)
    recorded = Recorded(strict_cupy, lambda: out.__iadd__(kept[0][1:2]))
    recorded.launch()
    kept[0] = kept[0][2:]
    recorded.launch()  # a view keeps it
    kept.clear()
    with pytest.raises(AssertionError, match="is freed since"):
        recorded.launch()


def test_each_pool_has_its_own_arrays(strict_cupy):
    default = strict_cupy.get_default_memory_pool()
    before, pool = default.used_bytes(), strict_cupy.cuda.MemoryPool()
    gc.disable()
    try:
        with strict_cupy.cuda.using_allocator(pool.malloc):
            x = strict_cupy.ones((10, 10))
            y = x[5:] * 2.0
        assert (default.used_bytes() - before, pool.used_bytes()) == (0, 1200)
        del x
        assert (pool.used_bytes(), pool.total_bytes()) == (400, 1200)
        z = y * 2.0
        assert (default.used_bytes() - before, pool.used_bytes()) == (400, 400)
        del y, z
        pool.free_all_blocks()
        assert pool.total_bytes() == 0
    finally:
        gc.enable()


def test_kernels_of_ones_own_are_counted_and_captured(strict_cupy):
    x, out = strict_cupy.ones(3), strict_cupy.zeros(3)

    def work():
        strict.launch("mine", lambda: np.add(x._host, out._host, out=out._host), [x, out], [out])

    strict_cupy.counters.reset()
    work()
    assert strict_cupy.counters.launched == {"mine": 1} and strict_cupy.counters.bytes == 72
    recorded = Recorded(strict_cupy, work)
    assert out.get().tolist() == [1, 1, 1] and recorded.graph.nodes == {"mine": 1}
    recorded.launch()
    assert out.get().tolist() == [2, 2, 2]
    with strict_cupy.cuda.Device(1):
        there = strict_cupy.ones(1)
    with pytest.raises(ValueError, match="resides on device 1"):
        strict.launch("mine", lambda: None, [there], [])


def test_a_copy_to_pinned_memory_arrives_when_it_is_waited_for(any_cupy):
    from cupyx import empty_pinned

    event, x = any_cupy.cuda.Event(disable_timing=True), any_cupy.arange(3.0)
    out, later = empty_pinned(3, float), empty_pinned(3, float)
    x.get(out=out, blocking=False)
    event.record()
    x += 1.0
    x.get(out=later, blocking=False)
    if any_cupy is strict.cupy:
        assert np.isnan(out).all()
    event.synchronize()
    assert out.tolist() == [0.0, 1.0, 2.0]
    if any_cupy is strict.cupy:
        assert np.isnan(later).all()
    any_cupy.cuda.get_current_stream().synchronize()
    assert later.tolist() == [1.0, 2.0, 3.0]


def test_pinned_memory_stays_until_its_copy_was_waited_for(strict_cupy):
    pinned, x = streams.empty_pinned(3, np.float64), strict_cupy.zeros(3)
    pinned[...] = 1.0
    x.set(pinned)
    strict_cupy.cuda.get_current_stream().synchronize()
    pinned[...] = 2.0
    x.set(pinned)
    pinned[...] = 3.0
    with pytest.raises(AssertionError, match="overwritten before the copy"):
        x.get()


def test_pinned_memory_is_kept_until_the_copy_to_it_was_waited_for(strict_cupy):
    strict_cupy.ones(3).get(out=streams.empty_pinned(3, float), blocking=False)
    with pytest.raises(AssertionError, match="let go before the copy"):
        strict_cupy.cuda.get_current_stream().synchronize()


# ---- minivit's own, as they stand on these ---------------------------------------------------------------------------


def test_work_is_recorded_and_its_nodes_are_counted(any_cupy):
    x, y, z = any_cupy.ones(5), any_cupy.zeros(5), any_cupy.ones(5, np.float32)

    def work():
        x[...] = x * 2.0 + y  # two kernels and a copy
        z.fill(0.0)  # a filling

    aside = Aside()
    with aside.entered():
        work()
    graph = aside.record(work)
    x[...] = 3.0
    for expected in (6.0, 12.0):
        graph.replay()
        assert x.get().tolist() == [expected] * 5
    assert graph.nodes == 4
    assert aside.record(lambda: z.fill(0.0)).nodes == 1
    assert aside.pool.total_bytes() > 0


def test_a_stream_that_the_caller_has_chosen_stays_its_current_one(any_cupy):
    cuda, chosen = any_cupy.cuda, any_cupy.cuda.Stream(non_blocking=True)
    chosen.use()
    try:
        with cuda.Stream(non_blocking=True):
            assert cuda.get_current_stream() != chosen
        assert cuda.get_current_stream() == cuda.Stream.null  # a block's end goes back past what was chosen in none
        chosen.use()
        with Aside().entered():
            assert cuda.get_current_stream() != chosen
        assert cuda.get_current_stream() == chosen
        with side_stream("cuda:0").working():
            assert cuda.get_current_stream() != chosen
        assert cuda.get_current_stream() == chosen
    finally:
        cuda.Stream.null.use()


def test_a_full_gpu_gives_back_what_nobody_uses_but_not_what_a_graph_works_in(strict_cupy, monkeypatch):
    cuda, freed = strict_cupy.cuda, []

    def memory(size):
        if not freed:
            raise cuda.runtime.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")
        return size

    monkeypatch.setattr(cuda, "Memory", memory)
    monkeypatch.setattr(cuda, "MemoryPointer", lambda mem, offset: (mem, offset), raising=False)
    monkeypatch.setattr(streams.MemoryPool, "free_all_blocks", lambda pool: freed.append(pool))
    aside = Aside()
    aside.stream.begin_capture()
    with pytest.raises(MemoryError, match="no 4,096 bytes left to record"):
        aside.pool.allocator(4096)
    aside.stream.end_capture()
    assert not freed and aside.pool.allocator(4096) == (4096, 0) and freed == [streams.default_pool]


@pytest.mark.gpu
def test_memory_of_a_real_gpu_that_is_full_while_work_is_recorded(any_cupy):
    if any_cupy is strict.cupy:
        pytest.skip("the stand-in has no limit")
    aside, x = Aside(), any_cupy.ones(1 << 20, np.float32)
    with pytest.raises(MemoryError, match="left to record"):
        aside.record(lambda: any_cupy.empty(1 << 50, np.uint8))
    with aside.entered(), pytest.raises(any_cupy.cuda.memory.OutOfMemoryError):
        any_cupy.empty(1 << 50, np.uint8)
    graph = aside.record(lambda: x.__iadd__(any_cupy.ones(1 << 20, np.float32)))
    graph.replay()
    assert float(x.sum()) == 2.0 * (1 << 20)


@pytest.mark.gpu
def test_a_thread_makes_batches_on_a_real_gpu_while_work_is_recorded(any_cupy):
    if any_cupy is strict.cupy:
        pytest.skip("the stand-in runs everything at once")
    side, stop, made = side_stream("cuda:0"), threading.Event(), []

    def make():
        while len(made) < 3 or not (stop.is_set() or len(made) == 10_000):  # new sizes: memory is taken all the time
            with side.working():
                host = through_pinned(lambda out: out.fill(len(made)), (100_000 + 1000 * len(made),), np.float32)
                made.append((host * 2.0).max() + any_cupy.asarray(np.full(3, 1.5, np.float32)).sum())

    def work():
        for n in range(1, 300):
            x[...] = x + any_cupy.ones((n, len(x))).max(axis=0)

    aside, x, thread = Aside(), any_cupy.zeros(1000), threading.Thread(target=make)
    with aside.entered():
        work()
    thread.start()
    try:
        graphs = [aside.record(work) for _ in range(3)]
        for graph in graphs:
            graph.replay()
    finally:
        stop.set()
        thread.join()
    assert (x.get() == 4 * 299).all()
    side.stream.synchronize()
    assert [float(total) for total in made] == [2.0 * n + 4.5 for n in range(len(made))]


def test_bfloat16_is_known(any_cupy):
    x = any_cupy.empty(3, ml_dtypes.bfloat16)
    assert any_cupy is not strict.cupy or np.isnan(x.get().astype(np.float32)).all()
    x.fill(1.5)
    assert (x + x).dtype == x.dtype == ml_dtypes.bfloat16 and float((x + x)[0]) == 3.0
    if any_cupy is strict.cupy:
        with pytest.raises(TypeError, match="Unsupported dtype"):
            any_cupy.empty(3, ml_dtypes.float8_e4m3fn)


def test_what_cupy_makes_of_halves(any_cupy):
    from cupyx.scipy.special import erf

    x, y = any_cupy.ones(3, ml_dtypes.bfloat16), any_cupy.ones(3, np.float16)
    made = x * 0.5, x * 2, any_cupy.maximum(x, 0), any_cupy.where(x > 0, x, x), any_cupy.where(x > 0, x, 0.0), erf(x)
    assert [m.dtype.name for m in made] == ["float32", *["bfloat16"] * 2, *["float32"] * 3]
    made = y * 0.5, y * 2, any_cupy.maximum(y, 0), any_cupy.where(y > 0, y, y), any_cupy.where(y > 0, y, 0.0), erf(y)
    assert [m.dtype.name for m in made] == [*["float16"] * 5, "float64"]
    x *= 0.5
    x[...] = any_cupy.where(x > 0, x, 0.0)
    assert x.dtype == ml_dtypes.bfloat16 and x.get().astype(float).tolist() == [0.5] * 3
    bits = any_cupy.asarray([True, False, True])
    assert bits.astype(x.dtype).get().astype(float).tolist() == [1.0, 0.0, 1.0]
    assert x.astype(np.float32).dtype == x.sum(dtype=np.float32).dtype == np.float32 and int(x.argmax()) == 0
