"""Planning: the formulas by hand, their limits, and what the command says of what cannot be."""

import json
import math

import pytest

from minivit.cli.main import main
from minivit.errors import ConfigError
from minivit.measure import here
from minivit.measure.forecast import (
    MEASURED,
    Compute,
    Kernel,
    Link,
    Rates,
    Run,
    Step,
    all_reduce,
    cpu_step,
    gpu_step,
    kernel_seconds,
    largest_share,
    on_gpu,
    work_of,
)
from minivit.measure.here import Core, Machine
from minivit.models import MODELS, model_outline

LINK = Link(bandwidth=1e9, latency=1e-3)


@pytest.fixture(scope="module")
def digits():
    return model_outline(*MODELS["vit_digits"])


@pytest.fixture(scope="module")
def work(digits):
    return work_of(digits)


# ---- formulas --------------------------------------------------------------------------------------------------------


def test_all_reduce_by_hand():
    assert all_reduce(1, 1e9, LINK) == 0.0
    assert all_reduce(2, 1e9, LINK) == pytest.approx(2e-3 + 1.0)  # each sends half, and gets half
    assert all_reduce(8, 1e9, LINK) == pytest.approx(6e-3 + 1.75)
    assert all_reduce(5, 0.0, LINK) == pytest.approx(6e-3)
    times = [all_reduce(n, 1e6, LINK) for n in range(1, 300)]
    assert times == sorted(times)
    assert all_reduce(10**5, 1e9, Link(1e9, 0.0)) < 2.0


def test_kernels_by_hand(work):
    rates = Rates(product=2.0, attention=4.0, copy=10.0, launch=0.5)
    product = Kernel("product", flops=40, given=4, made=5, weights=20, wanted=2, readers=1)
    once = math.hypot(3 * 40 / 2, 2 * (3 * 9 + 20) / 10) + 0.5
    assert kernel_seconds(product, 3, 2, rates) == pytest.approx((once, 2 * once))
    attention = Kernel("attention", flops=8, given=6, made=2, weights=0, wanted=1, readers=1)
    assert kernel_seconds(attention, 1, 4, rates) == pytest.approx((2 + 3.2 + 0.5, 4 + 6.4 + 0.5))
    norm = Kernel("move", flops=0, given=10, made=10, weights=5, wanted=2, readers=3)  # 2 more gradients to add
    assert kernel_seconds(norm, 2, 1, rates) == pytest.approx((5.0, 7.0 + 2 * (6 + 0.5)))
    assert kernel_seconds(Kernel("view", 0, 5, 5, 0, 1, 1), 9, 4, rates) == (0.0, 0.0)
    kinds = [kernel.kind for kernel in work.kernels]
    assert [kinds.count(kind) for kind in ("product", "attention", "move", "view")] == [18, 4, 14, 2]
    assert sum(kernel.flops for kernel in work.kernels) == 1176832
    assert max(kernel.readers for kernel in work.kernels) == 2  # the stream, and the norm that reads it


def test_the_steps_that_the_rates_were_fitted_to():
    for name, settings, rows, seconds in MEASURED:
        found = on_gpu(work_of(model_outline("vit", settings)), rows, "bfloat16").seconds
        assert found == pytest.approx(seconds, rel=0.04), name


def test_one_gpu_alone_is_fully_used(work):
    step = gpu_step(work, 1, 64)
    assert step.exchange == step.exchanged == step.hidden == 0.0
    assert step.efficiency == pytest.approx(1.0)
    assert step.seconds == pytest.approx(on_gpu(work, 64, "bfloat16").seconds)


def test_more_gpus_are_faster_and_less_used(work):
    steps = [gpu_step(work, n, 1 << 16) for n in (1, 2, 4, 8, 16)]
    rates, shares = [s.rate for s in steps], [s.efficiency for s in steps]
    assert rates == sorted(rates) and shares == sorted(shares, reverse=True)
    assert all(0 < share <= 1 for share in shares)
    assert gpu_step(work, 8, 100).seconds == gpu_step(work, 8, 104).seconds  # the one with the most decides


def test_what_makes_a_step_shorter_or_longer(work):
    usual = gpu_step(work, 8, 4096, link=LINK)
    hidden = gpu_step(work, 8, 4096, link=LINK, overlap=1.0)
    assert hidden.hidden == min(hidden.exchange, hidden.compute.backward) > 0
    assert usual.seconds - hidden.seconds == pytest.approx(hidden.hidden)
    slow = gpu_step(work, 8, 4096, data_rate=100.0)
    assert slow.seconds == pytest.approx(512 / 100) and slow.efficiency == pytest.approx(1.0)
    one, parts = on_gpu(work, 64, "bfloat16"), on_gpu(work, 64, "bfloat16", micro_batch=16)
    assert parts.forward > one.forward and parts.update == one.update
    again = model_outline("vit", {**MODELS["vit_digits"].settings, "recompute": True})
    twice = on_gpu(work_of(again), 64, "bfloat16")
    assert twice.forward == pytest.approx(one.forward) and twice.backward == pytest.approx(
        one.backward + one.forward, rel=0.1
    )


def test_a_step_of_processes_by_hand(digits):
    core, machine = Core(8, 0.01, 0.03, 1000), Machine(1e-9, 1e-10, 1e-9, 1e-4, 0.5)
    p, image = digits.num_parameters(), 4 * 64
    alone = cpu_step(digits, 1, 16, core, core, Machine(1e-9, 1e-10, 1e-9, 1e-4, 1.0))
    assert alone.seconds == pytest.approx(2 * 0.04 + p * 1e-9) and alone.exchange == 0.0
    assert alone.efficiency == pytest.approx(1.0)
    two = cpu_step(digits, 2, 16, core, core, machine)
    assert two.compute.forward == pytest.approx(0.02) and two.compute.backward == pytest.approx(0.06)
    assert two.exchange == pytest.approx(1e-4 + 8 * image * 1e-9 + p * 1e-10)
    assert two.exchanged == 8 * image + 4 * p
    ranks = cpu_step(digits, 3, 24, core, core, machine, link=LINK)
    assert ranks.exchanged == 2 * (8 * image + 8 * p)
    assert ranks.exchange == pytest.approx(4e-3 + ranks.exchanged / 1e9 + 2 * p * 1e-10)


def test_a_run_by_hand():
    step = Step(4, 100, Compute(0.5, 1.0, 0.5), 0.0, 0.0, 0.0, 0.0, 12.5)
    run = Run(step, 1001, 3, 2.5)
    assert run.steps == 33 and run.hours == pytest.approx(66 / 3600)
    assert run.cost == pytest.approx(2.5 * 4 * 66 / 3600) and step.efficiency == pytest.approx(1.0)
    assert Run(step, 1000, 3).steps == 30 and Run(step, 1000, 3).cost is None


def test_the_largest_share_that_fits():
    assert [largest_share(lambda n: 10 * n, room, 100) for room in (9, 10, 99, 5000)] == [0, 1, 9, 100]


@pytest.mark.parametrize(("devices", "batch"), [(0, 8), (8, 0), (9, 8)])
def test_a_share_without_images_is_refused(work, devices, batch):
    with pytest.raises(ConfigError):
        gpu_step(work, devices, batch)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_this_machine_is_measured(digits, monkeypatch):
    monkeypatch.setattr(here, "SPENT", 0.0)
    monkeypatch.setattr(here, "sgemm_rate", lambda cores: 1e9 * cores**0.5)
    core, machine = here.measured_core(digits, 4), here.measured_machine(1000, 1024, 4)
    assert 0 < core.forward < 1 and 0 < core.backward < 1
    assert core.flops == 4 * (1176832 + 2345472)
    assert machine.shared == pytest.approx(0.5)
    assert min(machine.update, machine.add, machine.message) > 0 <= machine.sent < 1e-6
    assert here.decoded_a_second((32, 32), 3) > 0


def test_operations_of_one_kind_are_measured_once(digits, monkeypatch):
    measured = []
    monkeypatch.setattr(here, "_seconds", lambda node: measured.append(node.op.name) or (1.0, 2.0))
    monkeypatch.setattr(here, "_loss_seconds", lambda shape: (0.0, 0.0))
    monkeypatch.setattr(here, "SMALL", 0)
    core = here.measured_core(digits, 2)
    assert (core.forward, core.backward) == (38, 76)  # all nodes
    assert len(measured) < 25


# ---- the command -----------------------------------------------------------------------------------------------------


RUN = ["plan", "vit_cifar", "--images", "1.2e6", "--epochs", "90"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(here, "decoded_a_second", lambda size, channels: 200.0)
    monkeypatch.setattr(here, "measured_core", lambda model, rows: Core(rows, 0.01, 0.02, 10**9))
    monkeypatch.setattr(here, "measured_machine", lambda *about: Machine(1e-9, 1e-10, 1e-9, 1e-4, 0.9))


def test_a_plan_for_gpus(quick, capsys):
    assert main([*RUN, "--gpus", "8", "--price", "4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    step, hours = plan["step"], plan["hours"]
    assert plan["steps"] == 90 * math.ceil(1_200_000 / 1024) and hours == pytest.approx(
        plan["steps"] * step["seconds"] / 3600
    )
    assert plan["cost"] == pytest.approx(32 * hours) and plan["device_hours"] == pytest.approx(8 * hours)
    assert step["bytes_exchanged"] == pytest.approx(1.75 * 4 * plan["parameters"])
    assert any("Extrapolated: nothing was measured on more than one GPU" in said for said in plan["assumptions"])
    assert main([*RUN, "--gpus", "8", "--price", "4"]) == 0
    text = capsys.readouterr().out
    assert "A prediction, not a measurement" in text and "8 GPUs" in text and "cost" in text
    assert main([*RUN, "--gpus", "1", "--image-size", "64", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["image"] == [3, 64, 64] and alone["step"]["exchange"] == 0 and alone["efficiency"] == pytest.approx(1)
    assert not any("more than one" in said for said in alone["assumptions"])


@pytest.mark.parametrize(("kind", "factor"), [("--workers", 1), ("--ranks", 2)])
def test_a_plan_for_cores(quick, capsys, kind, factor):
    assert main([*RUN, kind, "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["step"]["bytes_exchanged"] == 32 * 4 * 3 * 32**2 + factor * 4 * plan["parameters"]
    assert plan["cost"] is None
    assert any(said.startswith("Rates: measured here just now") for said in plan["assumptions"])
    assert any("between ranks" in said for said in plan["assumptions"]) == (kind == "--ranks")
    assert main([*RUN, kind, "2000", "--batch-size", "4000"]) == 0
    assert "Extrapolated: this process may use" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ([], 2, "one of the arguments --gpus --workers --ranks is required"),
        (["--gpus", "0"], 2, "takes a number from 1 to"),
        (["--gpus", "-3"], 2, "takes a number from 1 to"),
        (["--gpus", "1e9"], 2, "takes a whole number"),
        (["--gpus", "2", "--workers", "2"], 2, "not allowed with"),
        (["--gpus", "2", "--price", "nan"], 2, "takes a number from"),
        (["--gpus", "2", "--price", "0"], 2, "takes a number from"),
        (["--gpus", "2", "--link-gbps", "inf"], 2, "takes a number from"),
        (["--gpus", "2", "--rate-tflops", "1e9"], 2, "takes a number from 0.001 to 1,000,000"),
        (["--gpus", "2", "--latency-us", "-1"], 2, "takes a number from 0 to"),
        (["--gpus", "2", "--overlap", "1.5"], 2, "takes a number from 0 to 1"),
        (["--gpus", "2", "--dtype", "int8"], 2, "unknown dtype"),
        (["--gpus", "2", "--images", "1.5"], 1, "no whole number"),
        (["--gpus", "2", "--dtype", "float32"], 1, "in float32 was not measured"),
        (["--gpus", "2000"], 1, "leaves some without any"),
        (["--gpus", "2", "--image-size", "33"], 1, "not divided by patch"),
        (["--gpus", "2", "--image-size", "16384"], 1, "an image of 16,384"),
        (["--workers", "2", "--image-size", "16384"], 1, "an image of 16,384"),
        (["--workers", "2", "--rate-tflops", "1"], 1, "the plan is for cores"),
        (["--workers", "2", "--link-gbps", "1"], 1, "share memory"),
        (["--ranks", "2", "--overlap", "0.5"], 1, "leave it out"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(quick, capsys, words, code, says):
    assert main([*RUN, *words]) == code
    assert says in capsys.readouterr().err


def test_what_does_not_fit_is_told_what_would(quick, capsys):
    words = [*RUN, "--gpus", "4", "--memory-gb", "1"]
    assert main([*words, "--batch-size", "8192"]) == 1
    error = capsys.readouterr().err
    batch = int(error.partition("--batch-size ")[2].split()[0])
    piece = int(error.partition("--micro-batch ")[2].split(":")[0])
    assert main([*words, "--batch-size", str(batch)]) == 0
    assert main([*words, "--batch-size", str(batch + 4)]) == 1
    assert main([*words, "--batch-size", "8192", "--micro-batch", str(piece)]) == 0
    capsys.readouterr()
    assert main([*RUN, "--gpus", "4", "--memory-gb", "0.001"]) == 1
    assert "use a smaller model or smaller images" in capsys.readouterr().err
