"""What changes from step to step, kept on the GPU: updates led by it are those of the CPU, and wait for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal, to_device, to_numpy
from minivit.errors import GraphError
from minivit.nn.module import Parameter
from minivit.train.clip import scale_to_norm
from minivit.train.ema import EMA
from minivit.train.numbers import DeviceNumbers
from minivit.train.optim import SGD, AdamW, FlatParameters, Muon, Optimizer
from minivit.train.precision import LossScale

SHAPES = {"matrix": (6, 5), "stack": (8, 9), "bias": (7,), "token": (1, 1, 70)}
SCALES = {"matrix": 0.5, "bias": 0.25}


class Signed(Optimizer):
    """A user's own: the sign of a mean of gradients, corrected by its number."""

    slots = ("mean",)

    def update_chunk(self, p: Any, g: Any, lr: Any, decay: float, *state: Any) -> None:
        (mean,) = state
        mean *= 0.5
        mean += 0.5 * g
        p -= lr * (mean / (1.0 - 0.5**self.steps) + decay * p)


MAKE: dict[str, Callable[[FlatParameters], Optimizer]] = {
    "AdamW": lambda store: AdamW(store, lr=0.1, weight_decay=0.1),
    "SGD": lambda store: SGD(store, lr=0.1, weight_decay=0.1),
    "Muon": lambda store: Muon(store, lr=0.1, weight_decay=0.1),
    "own": lambda store: Signed(store, 0.1, 0.1),
}


def a_store(device: str, dtype: Any = np.float64) -> FlatParameters:
    """Return the same parameters on any device."""
    named = []
    for i, (name, shape) in enumerate(SHAPES.items()):
        p = Parameter(to_device(normal(mv.Key(1, i), shape).astype(dtype), device))
        p.matrices = {"matrix": 1, "stack": 2}.get(name, 0)
        named.append((name, p))
    return FlatParameters(named, SCALES)


def give_gradients(store: FlatParameters, t: int, times: float = 1.0) -> None:
    """Put the gradients of step t, the same on any device, into a store."""
    for i, (name, view) in enumerate(store.by_name(store.grad).items()):
        view[...] = to_device((normal(mv.Key(2, i, t), SHAPES[name]) * times).astype(view.dtype), device_of(store))


def device_of(store: FlatParameters) -> str:
    return store.parameters[0].device


def values_of(*flats: tuple[FlatParameters, Any]) -> list[dict[str, np.ndarray]]:
    return [{n: to_numpy(a).copy() for n, a in store.by_name(flat).items()} for store, flat in flats]


def everything(opt: Optimizer, ema: EMA) -> list[dict[str, np.ndarray]]:
    store = opt.store
    return values_of((store, store.values), (store, ema.flat), *((store, s) for s in opt.state.values()))


def host_step(opt: Optimizer, ema: EMA, clip_norm: float | None) -> float:
    norm = float(np.sqrt(opt.store.grad @ opt.store.grad))
    if clip_norm is not None:
        scale_to_norm([opt.store.grad], norm, clip_norm)
    opt.update()
    ema.update()
    return norm


def device_step(opt: Optimizer, ema: EMA, numbers: DeviceNumbers, clip_norm: float | None, loss: Any) -> None:
    grad = opt.store.grad
    numbers.finish(loss, (grad * grad).sum() ** 0.5)
    if clip_norm is not None:
        numbers.clip(clip_norm)
    with numbers.leading():
        opt.update()
        ema.update()


@pytest.mark.parametrize("clip_norm", [None, 5.0, 100.0], ids=["free", "clipped", "not reached"])
@pytest.mark.parametrize("kind", MAKE)
def test_updates_led_by_the_gpu_are_those_of_the_cpu(strict_cupy, kind, clip_norm):
    cpu, gpu = MAKE[kind](a_store("cpu")), MAKE[kind](a_store("cuda"))
    ema_cpu, ema_gpu = EMA(cpu.store, 0.5), EMA(gpu.store, 0.5)
    numbers, loss = DeviceNumbers(gpu.store), strict_cupy.ones((), np.float32)
    for t in range(20):
        cpu.lr = gpu.lr = 0.1 / (1 + t)
        give_gradients(cpu.store, t)
        give_gradients(gpu.store, t)
        norm = host_step(cpu, ema_cpu, clip_norm)
        numbers.begin(gpu.lr)
        strict_cupy.counters.reset()
        device_step(gpu, ema_gpu, numbers, clip_norm, loss)
        counters = strict_cupy.counters
        assert (counters.syncs, counters.transfers) == (0, 0), counters.synced
        report = numbers.read(numbers.report.get())
        assert report.made and not report.halted and gpu.steps == cpu.steps == t + 1
        assert report.loss == 1.0 and abs(report.grad_norm - norm) < 1e-12 * norm
    for ours, theirs in zip(everything(gpu, ema_gpu), everything(cpu, ema_cpu), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12, atol=1e-13, err_msg=name)
    assert {k: v.shape for k, v in gpu.state_dict().items()} == {k: v.shape for k, v in cpu.state_dict().items()}
    assert int(gpu.state_dict()["steps"]) == 20


@pytest.mark.parametrize("kind", MAKE)
def test_float32_is_not_promoted_and_as_near(strict_cupy, kind):
    cpu, gpu = MAKE[kind](a_store("cpu", np.float32)), MAKE[kind](a_store("cuda", np.float32))
    ema_cpu, ema_gpu = EMA(cpu.store, 0.5), EMA(gpu.store, 0.5)
    numbers, loss = DeviceNumbers(gpu.store), strict_cupy.ones((), np.float32)
    for t in range(20):
        give_gradients(cpu.store, t)
        give_gradients(gpu.store, t)
        host_step(cpu, ema_cpu, 5.0)
        numbers.begin(gpu.lr)
        device_step(gpu, ema_gpu, numbers, 5.0, loss)
        assert numbers.rate(0.5).dtype == numbers.factor.dtype == np.float32
        numbers.read(numbers.report.get())
    for ours, theirs in zip(everything(gpu, ema_gpu), everything(cpu, ema_cpu), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["plain", "kernels"])
@pytest.mark.parametrize("kind", MAKE)
def test_what_is_not_finite_changes_no_bit_until_the_host_allows_it(strict_cupy, kind, dtype, what, value):
    opt = MAKE[kind](a_store("cuda", dtype))
    ema, numbers, one = EMA(opt.store, 0.5), DeviceNumbers(opt.store), strict_cupy.ones((), np.float32)
    for t in range(5):  # of which the third goes wrong, and the host looks only after the fifth
        give_gradients(opt.store, t)
        if t == 2:
            before = everything(opt, ema)
            if what == "gradient":
                opt.store.grad[3] = value
        numbers.begin(opt.lr)
        device_step(opt, ema, numbers, 5.0, one * value if what == "loss" and t == 2 else one)
        report = numbers.read(numbers.report.get())
        assert report.made == (t < 2) and report.halted == (t >= 2)
        assert opt.steps == min(t + 1, 2) == int(numbers.steps.get())
    for ours, theirs in zip(everything(opt, ema), before, strict=True):
        for name in SHAPES:
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    numbers.clear()
    give_gradients(opt.store, 9)
    device_step(opt, ema, numbers, 5.0, one)
    assert numbers.read(numbers.report.get()).made and opt.steps == 3
    assert (everything(opt, ema)[0]["matrix"] != before[0]["matrix"]).all()


def test_what_lies_between_parameters_is_and_stays_zero(strict_cupy):
    for make in MAKE.values():
        opt = make(a_store("cuda"))
        store, ema, numbers = opt.store, EMA(opt.store, 0.5), DeviceNumbers(opt.store)
        for t in range(3):
            give_gradients(store, t)
            device_step(opt, ema, numbers, 5.0, strict_cupy.ones(()))
        between = np.ones(store.values.size, bool)
        for start, stop in store.spans:
            assert start % 64 == 0
            between[start:stop] = False
        assert between.sum() == store.values.size - 30 - 72 - 7 - 70
        for flat in (store.values, store.grad, ema.flat, *opt.state.values()):
            assert not to_numpy(flat)[between].any()
        assert to_numpy(store.values)[~between].all()


def test_a_step_number_that_was_loaded_reaches_the_gpu(strict_cupy):
    first, second = MAKE["AdamW"](a_store("cuda")), MAKE["AdamW"](a_store("cuda"))
    numbers = DeviceNumbers(first.store), DeviceNumbers(second.store)
    averages = EMA(first.store, 0.9), EMA(second.store, 0.9)
    one = strict_cupy.ones(())
    for t in range(6):
        if t == 3:
            second.load_state_dict(first.state_dict())
            averages[1].load_state_dict(averages[0].state_dict())
            second.store.values[...] = first.store.values
        for opt, n, ema in zip((first, second), numbers, averages, strict=True):
            give_gradients(opt.store, t)
            if opt is first or t >= 3:
                n.begin(0.1)
                device_step(opt, ema, n, 5.0, one)
                n.read(n.report.get())
    assert first.steps == second.steps == 6 == int(numbers[1].steps.get())
    for ours, theirs in zip(everything(first, averages[0]), everything(second, averages[1]), strict=True):
        for name in SHAPES:
            assert ours[name].tobytes() == theirs[name].tobytes(), name


def test_few_launches(strict_cupy):
    opt = MAKE["AdamW"](a_store("cuda", np.float32))
    numbers = DeviceNumbers(opt.store)
    numbers.begin(0.1)
    loss, norm = (strict_cupy.full((), x, np.float32) for x in (2.0, 3.0))
    right = strict_cupy.full((), 5, np.int64)
    strict_cupy.counters.reset()
    numbers.begin(0.1)  # as before: nothing is sent
    assert strict_cupy.counters.launches == 0
    numbers.finish(loss, norm, right)
    numbers.clip(1.0)
    assert strict_cupy.counters.launched == {"finish": 1, "clip": 1}
    assert numbers.report.get().tolist() == [2.0, 3.0, 5.0, 1.0, 1.0, 1.0]
    plain = DeviceNumbers(opt.store)
    plain.finish(loss.astype(np.float64), norm, right)
    plain.clip(1.0)
    assert strict_cupy.counters.launches <= 24, strict_cupy.counters.launched
    assert plain.report.get().tolist() == numbers.report.get().tolist()
    assert abs(float(plain.factor) - float(numbers.factor)) < 1e-7
    numbers.finish(loss, norm)
    assert numbers.report.get().tolist() == [2.0, 3.0, -1.0, 1.0, 1.0, 2.0]


def test_a_norm_that_was_not_reached_leaves_the_gradient(strict_cupy):
    store = a_store("cuda")
    numbers = DeviceNumbers(store)
    for limit, factor in ((2.0, 1.0), (1.0, 1.0), (0.5, 0.5 / (1.0 + 1e-6))):
        numbers.finish(strict_cupy.ones(()), strict_cupy.ones(()))
        numbers.clip(limit)
        assert float(numbers.factor) == factor


def test_one_set_of_numbers_leads(strict_cupy):
    store = a_store("cuda")
    numbers = DeviceNumbers(store)
    with pytest.raises(GraphError, match="led by two"), numbers.leading(), numbers.leading():
        pass
    assert store.numbers is None and store.count == 0


# ---- the scale of the loss -------------------------------------------------------------------------------------------


def scaled(strict_cupy: Any) -> tuple[Optimizer, EMA, DeviceNumbers]:
    opt = MAKE["AdamW"](a_store("cuda"))
    return opt, EMA(opt.store, 0.5), DeviceNumbers(opt.store, LossScale(opt.store.values))


def test_a_scaled_loss_gives_the_same_update(strict_cupy):
    opt, ema, numbers = scaled(strict_cupy)
    plain = MAKE["AdamW"](a_store("cpu"))
    average = EMA(plain.store, 0.5)
    for t in range(5):
        give_gradients(opt.store, t, times=2.0**16)
        give_gradients(plain.store, t)
        norm = host_step(plain, average, 5.0)
        numbers.begin(0.1)
        device_step(opt, ema, numbers, 5.0, strict_cupy.ones(()))
        assert abs(numbers.read(numbers.report.get()).grad_norm - norm) < 1e-12 * norm
    for ours, theirs in zip(everything(opt, ema), everything(plain, average), strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-12, atol=1e-13, err_msg=name)


def test_the_scale_falls_on_overflow_and_grows_with_patience(strict_cupy, monkeypatch):
    monkeypatch.setattr(LossScale, "PATIENCE", 3)
    opt, ema, numbers = scaled(strict_cupy)
    scale = numbers.scale
    assert scale is not None
    expected, good = 2.0**16, 0
    for t, overflows in enumerate([0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1]):
        give_gradients(opt.store, t)
        if overflows:
            opt.store.grad[0] = np.inf
            before = everything(opt, ema)
        steps = opt.steps
        device_step(opt, ema, numbers, None, strict_cupy.ones(()))
        report = numbers.read(numbers.report.get())
        assert report.made == (not overflows) and not report.halted and opt.steps == steps + report.made
        good = 0 if overflows else good + 1
        expected *= 0.5 if overflows else 2.0 if good == 3 else 1.0
        good %= 3
        assert (float(scale.value), int(scale.good)) == (expected, good)
        if overflows:
            assert all((a[n] == b[n]).all() for a, b in zip(everything(opt, ema), before, strict=True) for n in SHAPES)


def test_an_overflow_at_the_least_scale_halts_and_so_does_a_loss_that_no_scale_mends(strict_cupy):
    opt, ema, numbers = scaled(strict_cupy)
    one = strict_cupy.ones(())
    for _ in range(16):  # 2¹⁶ … 1
        opt.store.grad[...] = np.inf
        device_step(opt, ema, numbers, None, one)
        assert not numbers.read(numbers.report.get()).halted
    device_step(opt, ema, numbers, None, one)
    assert numbers.read(numbers.report.get()).halted
    opt, ema, numbers = scaled(strict_cupy)
    give_gradients(opt.store, 0)
    device_step(opt, ema, numbers, None, one * np.nan)
    assert numbers.read(numbers.report.get()).halted
    assert numbers.scale is not None and float(numbers.scale.value) == 2.0**16


def test_the_scale_is_saved_and_resumed(strict_cupy):
    first, second = (LossScale(strict_cupy.ones(())) for _ in range(2))
    first.value.fill(512.0)
    first.good.fill(7)
    second.load_state_dict(first.state_dict())
    assert (float(second.value), int(second.good)) == (512.0, 7)
    assert second.value.dtype == np.float32 and second.good.dtype == np.int64


# ---- AdamW by its kernel ---------------------------------------------------------------------------------------------


def test_adamw_in_float32_is_one_launch_for_each_group(strict_cupy):
    for kind, kernels in (("AdamW", 3), ("Muon", 2), ("own", 0)):
        opt = MAKE[kind](a_store("cuda", np.float32))
        numbers = DeviceNumbers(opt.store)
        assert len(opt.groups) == 3
        with numbers.leading():
            opt.begin_update()
            strict_cupy.counters.reset()
            opt.update_spans([(0, opt.store.values.size)])
        launched = strict_cupy.counters.launched
        assert launched["adamw"] == kernels and (kind != "AdamW" or launched.total() == 3), launched


def test_an_average_in_float32_is_one_launch(strict_cupy):
    for dtype, most in ((np.float32, 1), (np.float64, 12)):
        store = a_store("cuda", dtype)
        ema, numbers = EMA(store, 0.5), DeviceNumbers(store)
        with numbers.leading():
            store.begin_update()
            strict_cupy.counters.reset()
            ema.update()
        assert strict_cupy.counters.launches <= most, strict_cupy.counters.launched


class Reversed(AdamW):
    """AdamW that climbs, to see whose text is run."""

    def update_chunk(self, p: Any, g: Any, lr: Any, decay: float, *state: Any) -> None:
        super().update_chunk(p, -g, lr, decay, *state)


def test_a_class_with_another_update_is_not_passed_over(strict_cupy):
    ours = Reversed(a_store("cuda", np.float32), lr=0.1, weight_decay=0.0)
    theirs = AdamW(a_store("cuda", np.float32), lr=0.1, weight_decay=0.0)
    before = to_numpy(ours.store.values).copy()
    for opt in (ours, theirs):
        numbers = DeviceNumbers(opt.store)
        numbers.begin(0.1)
        give_gradients(opt.store, 0)
        device_step(opt, EMA(opt.store, 0.5), numbers, None, strict_cupy.ones(()))
    moved, back = to_numpy(ours.store.values) - before, to_numpy(theirs.store.values) - before
    np.testing.assert_allclose(moved, -back, rtol=1e-4, atol=1e-6)
    assert moved.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["kernel", "plain"])
def test_a_factor_of_a_step_before_is_forgotten(strict_cupy, dtype):
    ours, theirs = MAKE["AdamW"](a_store("cuda", dtype)), MAKE["AdamW"](a_store("cuda", dtype))
    numbers = DeviceNumbers(ours.store), DeviceNumbers(theirs.store)
    for opt, n in zip((ours, theirs), numbers, strict=True):
        give_gradients(opt.store, 0)
        if opt is ours:  # clipped, and not updated: only its factor could remain
            n.begin(0.0)
            device_step(opt, EMA(opt.store, 0.5), n, 0.1, strict_cupy.full((), np.nan))
            n.clear()
        give_gradients(opt.store, 1)
        n.begin(0.1)
        device_step(opt, EMA(opt.store, 0.5), n, None, strict_cupy.ones(()))
    assert to_numpy(ours.store.values).tobytes() == to_numpy(theirs.store.values).tobytes()
