"""The speed of a step: what is counted and timed, and the command that prints it. No test asks how fast anything is."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.autograd.op import OPS
from minivit.backend import Key, normal
from minivit.cli.bench import profile_table
from minivit.cli.main import main
from minivit.errors import ConfigError, DataError
from minivit.measure.profile import OpTimes, Profile, profile_step, timed_calls
from minivit.measure.speed import flops, image_flops, sgemm_rate, step_flops, time_steps

D, M, P, C, DEPTH = 8, 24, 16, 3, 3  # widths of tokens and MLP, pixels of a patch, classes, blocks
TINY: dict[str, Any] = {"image_size": (8, 12), "patch_size": 4, "in_channels": 1, "num_classes": C, "dim": D,
                        "depth": DEPTH, "heads": 2, "mlp_dim": M}  # fmt: skip


def tiny_step(**settings: Any) -> tuple[mv.TrainStep, np.ndarray, np.ndarray]:
    """A step on one thread in two micro-batches, with images and labels for it."""
    model = mv.ViT(**TINY)
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters()), **{"threads": 1, "micro_batch": 2} | settings)
    return step, normal(Key(0), (4, 1, 8, 12)).astype(np.float32), np.arange(4) % C


# ---- counting --------------------------------------------------------------------------------------------------------


def products_of_a_block(tokens: int, queries: int) -> int:
    """Multiplications of a block: the projection of all tokens, everything after it of the queries alone."""
    return 3 * tokens * D**2 + queries * (D**2 + 2 * D * M + 2 * tokens * D)


@pytest.mark.parametrize(("pool", "tokens", "queries"), [("cls", 7, 1), ("mean", 6, 6)])
def test_flops_of_a_step_by_the_closed_form(pool: str, tokens: int, queries: int) -> None:
    patches = 6 * P * D
    blocks = (DEPTH - 1) * products_of_a_block(tokens, tokens) + products_of_a_block(tokens, queries)
    forward = 2 * (patches + blocks + D * C)
    model = mv.ViT(**TINY, pool=pool).eval()
    # backward, two products for each: the gradients of both factors; but nobody wants the images'
    assert image_flops(model) == (forward, 2 * forward - 2 * patches)
    assert step_flops(model, 5) == 5 * (3 * forward - 2 * patches)
    assert not model.training


def test_flops_of_frozen_layers_are_forward_only() -> None:
    model = mv.ViT(**TINY)
    whole, _ = image_flops(model)
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("head")
    assert image_flops(model) == (whole, 2 * D * C)
    model.blocks[-1].mlp.fc2.weight.requires_grad = True  # then its gradient, and through the head that of its output
    assert image_flops(model) == (whole, 2 * (2 * D * C + M * D))


def test_flops_of_a_composed_product() -> None:
    a, b = mv.tensor(np.ones((2, 3, 4)), requires_grad=True), mv.tensor(np.ones((4, 5)), requires_grad=True)
    for product in (a @ b, a @ b.data, a.data @ b):
        assert flops(product.node) == 2 * 2 * 3 * 4 * 5
    assert flops((a + a).node) == 0


# ---- timing ----------------------------------------------------------------------------------------------------------


def test_time_steps_counts_without_the_warmup() -> None:
    calls: list[Any] = []
    times = time_steps(lambda *args: calls.append(args), "images", "labels", 4, warmup=2)
    assert len(times) == 4
    assert min(times) >= 0.0
    assert calls == [("images", "labels")] * 6


def test_sgemm_rate_of_two_threads() -> None:
    assert sgemm_rate(2) > 0.0
    with pytest.raises(ConfigError, match="0 threads"):
        sgemm_rate(0)


class Owner:
    """Functions that call each other: one of the object's own, two of its class."""

    absent = None

    def __init__(self) -> None:
        self.own = lambda x: self.inner(x) + 1

    def inner(self, x: float) -> float:
        return 1.0 / x

    def outer(self, x: float) -> float:
        return self.own(x) + self.inner(x)


def test_timed_calls_count_the_outermost_only_and_are_undone() -> None:
    owner = Owner()
    before = dict(vars(owner))
    times: dict[str, list[float]] = {name: [] for name in ("own", "inner", "outer", "absent")}
    calls = [(owner, name, times[name]) for name in times]
    with timed_calls(calls):
        assert owner.outer(2.0) == 2.0
        assert {name: len(t) for name, t in times.items()} == {"own": 0, "inner": 0, "outer": 1, "absent": 0}
        with pytest.raises(ZeroDivisionError):
            owner.own(0.0)
        owner.inner(1.0)  # no longer inside of the one that raised
    assert {name: len(t) for name, t in times.items()} == {"own": 1, "inner": 1, "outer": 1, "absent": 0}
    assert vars(owner) == before
    with pytest.raises(ZeroDivisionError), timed_calls(calls):
        owner.outer(0.0)
    assert vars(owner) == before


# ---- profiling -------------------------------------------------------------------------------------------------------


def state_of_ops() -> dict[str, dict[str, Any]]:
    return {name: dict(vars(op)) for name, op in OPS.items()}


def test_profile_has_every_operation_that_the_step_runs() -> None:
    step, images, labels = tiny_step()
    nodes, ran = set(), Counter({"cross_entropy": 2})
    x = mv.tensor(images[:2], requires_grad=True)  # then all of it is recorded
    with mv.first_order():
        stack = [step.model(x).node]
    while stack:
        node = stack.pop()
        if node is not None and node.op is not None and node not in nodes:
            nodes.add(node)
            stack += node.parents
    for node in nodes:
        ran[node.op.name] += 2  # micro-batches
    result = profile_step(step, images, labels, steps=1, warmup=0)
    assert {name: len(times.forward) for name, times in result.ops.items()} == ran
    no_gradient = {"patchify"}  # of images, which want none
    assert {name: len(times.backward) for name, times in result.ops.items()} == {
        name: 0 if name in no_gradient else count for name, count in ran.items()
    }
    assert result.update > 0.0
    assert result.outside > 0.0  # nothing was counted twice


def test_profiling_changes_nothing() -> None:
    before = state_of_ops()
    (plain, images, labels), (profiled, *_) = tiny_step(), tiny_step()
    profile_step(profiled, images, labels, steps=2, warmup=1)
    for _ in range(3):
        plain(images, labels)
    assert state_of_ops() == before
    assert "update" not in vars(profiled.opt)
    assert plain.opt.steps == profiled.opt.steps == 3
    np.testing.assert_array_equal(plain.opt.store.values, profiled.opt.store.values)


def test_profiling_leaves_no_trace_after_an_error() -> None:
    before = state_of_ops()
    step, images, _ = tiny_step()
    with pytest.raises(DataError):
        profile_step(step, images, np.array([0, 1, 2, C]))
    assert state_of_ops() == before
    assert "update" not in vars(step.opt)


def test_profiling_of_several_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 threads"):
        profile_step(*tiny_step(threads=2))


def test_profile_table_is_sorted_and_adds_up() -> None:
    ops = {"linear": OpTimes([0.001, 0.002], [0.003]), "gelu": OpTimes([0.0005], []), "add": OpTimes([0.0], [0.0075])}
    rows = [line.split("  ") for line in profile_table(Profile(ops, update=0.001, seconds=0.02)).splitlines()[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["add", "1", "0.00", "7.50", "7.50", "37.5%"],
        ["linear", "2", "3.00", "3.00", "6.00", "30.0%"],
        ["outside operations", "5.00", "25.0%"],
        ["optimizer's update", "1.00", "5.0%"],
        ["gelu", "1", "0.50", "0.00", "0.50", "2.5%"],
        ["total", "4", "3.50", "10.50", "20.00", "100.0%"],
    ]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_bench_prints_speeds_and_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "vit_digits", "-b", "5", "--steps", "2", "--threads", "1", "--micro-batch", "2", "--profile"]
    assert main([*args, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "vit_digits, 136,138 parameters, float32, images of 1 × 8 × 8"
    assert lines[2] == "1 thread, batches of 5 images, at most 2 at once"
    for name in ("training step", "forward only"):
        speed, low, to, high, ms, *_, rate, share = next(x for x in lines if x.startswith(name)).split()[2:]
        assert to == "to"
        low, speed, high, ms, rate = (float(x.replace(",", "")) for x in (low, speed, high, ms, rate))
        assert 0 < low <= speed <= high
        assert speed * ms == pytest.approx(5e3, rel=0.02)  # the batch, of images/s · ms
        assert rate > 0
        assert share.endswith("%")
    assert next(x for x in lines if x.startswith("sgemm")).split()[2] == "100%"
    assert "Medians of 2 steps" in out
    table = lines[next(i for i, x in enumerate(lines) if x.startswith("operation")) + 1 :]
    times = [float(row.split()[-2]) for row in table]
    assert sum(times[:-1]) == pytest.approx(times[-1], abs=0.005 * len(times))
    assert times[:-1] == sorted(times[:-1], reverse=True)
    names = {row.split("  ")[0] for row in table}
    assert {"linear", "outside operations", "optimizer's update", "total"} <= names


def test_bench_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "vit_digits", "-b", "5", "--steps", "2", "--threads", "1", "--micro-batch", "2", "--profile"]
    assert main([*args, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"model": "vit_digits", "parameters": 136138, "image": [1, 8, 8], "device": "cpu", "threads": 1}
    expected |= {"batch_size": 5, "micro_batch": 2, "steps": 2}
    assert {key: found[key] for key in expected} == expected
    assert [row["work"] for row in found["speed"]] == ["training step", "forward only"]
    for row in found["speed"]:
        low, high = row["seconds_range"]
        assert 0 < low <= row["seconds"] <= high
        assert row["images_per_second"] * row["seconds"] == pytest.approx(5)
        assert row["flops_per_second"] * row["seconds"] == pytest.approx(row["flops"])
    assert found["sgemm_flops_per_second"] > 0
    *rows, total = found["profile"]
    assert sum(row["seconds"] for row in rows) == pytest.approx(total["seconds"])
    assert total["share"] == 1.0
    assert {"linear", "outside operations", "optimizer's update"} <= {row["operation"] for row in rows}


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["vit_digit"], 1, "unknown model 'vit_digit'\n  → did you mean 'vit_digits'"),
        (["gone.npz"], 1, "there is no checkpoint gone.npz"),
        (["-b", "0"], 2, "--batch-size/-b: takes a number from 1 to 1,000,000, not '0'"),
        (["--steps", "0"], 2, "--steps: takes a number from 1"),
        (["vit_digits", "--threads", "-1"], 2, "--threads: takes a number from 0 to 1,024"),
        (["--device", "gpu"], 1, "unknown device 'gpu'"),
        (["--steps", "many"], 2, "takes a whole number, not 'many'"),
        (["--profil"], 2, "did you mean --profile?"),
    ],
)
def test_bench_of_bad_arguments(args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "\n  → " in err
