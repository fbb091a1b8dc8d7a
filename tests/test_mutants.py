"""The check is checked: every operation's gradient is spoiled in many ways, and the check must refuse each of them."""

from __future__ import annotations

import functools
from collections import Counter

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.check import judged
from minivit.autograd.mutate import SCALES, Verdict, _function, _gradients, check_mutants, check_op, mutants, refuses
from minivit.autograd.op import OPS
from minivit.errors import GradientError, UndecidedError
from minivit.ops.samples import SAMPLES

counted: Counter[str] = Counter()
killed: Counter[str] = Counter()


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_mutant_is_killed(name):
    for i, sample in enumerate(s for s in SAMPLES if s.op == name):
        verdict = check_mutants(sample.function, sample.build(), scales=SCALES if i == 0 else SCALES[:1])
        assert not verdict.survivors, f"{sample}: the check accepts {verdict.survivors}"
        killed[name] += verdict.killed
        counted[name] += verdict.total
    assert killed[name] == counted[name] >= 3


def test_the_number_of_mutants(capsys):
    if set(counted) != set(OPS):
        pytest.skip("counts what the tests before it did: run the whole file")
    fewest = min(counted, key=lambda name: counted[name])
    with capsys.disabled():
        print(f"\nmutants killed: {killed.total()} of {counted.total()}, in {len(counted)} operations; ", end="")
        print(f"fewest {counted[fewest]} ({fewest})")
    assert counted.total() > 6000


def row(name: str, label: str):
    return next(s for s in SAMPLES if (s.op, s.label) == (name, label))


@pytest.mark.parametrize(
    "change",
    [
        "gradient 0 1% too large",
        "gradient 1 zero",
        "gradient 2 a millionth",
        "gradient 0 a million times too large",
        "gradient 0 the sign flipped",
        "gradient 0 transposed",
        "gradient 1 shifted along the second axis",
        "gradient 0 the cotangent itself",
        "gradient 0 a factor √d too large",  # a missing 1/√d
        "gradients 0 and 1 swapped",
        "the cotangent taken for ones",
        "gradient 2 a constant to the second order",
        "p * (gp - sum(p * gp, -1, True)) * scale → p * (gp - sum(p * gp, -1, True)) * 1.0",
        "gp - sum(p * gp, -1, True) → gp - 0.0",  # only the diagonal of the softmax's Jacobian
        "gp - sum(p * gp, -1, True) → gp + sum(p * gp, -1, True)",
    ],
)
def test_attention_has_the_mutants_that_it_should(change):
    sample = row("attention", "no leading axes")
    found = [m for description, m in mutants(sample.function, sample.build()) if change in description]
    assert len(found) == 1
    for mutated in found:
        with mutated:
            for scale in SCALES:
                with pytest.raises(GradientError):
                    check_op(sample.function, sample.build(), scale=scale)
    check_op(sample.function, sample.build())  # and the operation is itself again


def test_a_missing_sum_over_broadcast_axes_is_a_mutant():
    sample = row("add", "broadcast both ways")
    descriptions = [d for d, _ in mutants(sample.function, sample.build())]
    assert {f"add: gradient {i} not summed where broadcast" for i in (0, 1)} <= set(descriptions)


def test_what_changes_nothing_is_not_counted():
    x = mv.tensor(np.zeros((1, 1)))  # nothing to transpose, to shift or to sum; g · cos 0 is g
    assert check_mutants(OPS["neg"], [x.data]).total < check_mutants(OPS["neg"], [np.ones((3, 3))]).total


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "label"), [("mul", "broadcast both ways"), ("softmax", "the last axis")])
def test_differences_alone_refuse_every_mutant_on_every_scale(name, label, scale, monkeypatch):
    central = functools.partial(judged, method="central")
    monkeypatch.setattr("minivit.autograd.mutate.judged", central)
    sample = row(name, label)
    assert mv.check_grads(sample.function, sample.build(), method="central").passed
    verdict = check_mutants(sample.function, sample.build(), scales=[scale])
    assert verdict.total > 20 and not verdict.survivors


def test_on_every_scale_the_gradients_are_that_large():
    for scale in SCALES:
        report = check_op(OPS["exp"], [np.ones(3)], scale=scale)
        assert report.checks[0].analytic == pytest.approx(scale * check_op(OPS["exp"], [np.ones(3)]).checks[0].analytic)


def test_the_factors_around_a_mutant_of_mul_are_true_ones():
    fn, arrays = _function(OPS["mul"], [np.full(3, 2.0), np.full(3, 5.0)], 1e6)
    (mutated,) = [m for description, m in mutants(OPS["mul"], arrays) if description == "mul: gradient 0 zero"]
    with mutated:
        gradients = list(_gradients(fn, arrays))
    assert (gradients[0] == 0.0).all() and (gradients[1] != 0.0).all()


def test_refusing_is_not_being_undecided(monkeypatch):
    monkeypatch.setattr("minivit.autograd.mutate.judged", functools.partial(judged, method="complex"))

    def kink(x: mv.Tensor) -> mv.Tensor:
        return ops.maximum(x, 1.0)

    with pytest.raises(UndecidedError):
        mv.check_grads(kink, [np.ones(3)], method="complex")
    assert not refuses(kink, [np.ones(3)], seed=0)


def test_a_blind_check_would_be_found_out(monkeypatch):
    monkeypatch.setattr("minivit.autograd.mutate.refuses", lambda fn, arrays, seed: False)  # accepts everything
    verdict = check_mutants(OPS["exp"], [np.ones(3)])
    assert isinstance(verdict, Verdict) and verdict.killed == 0 and len(verdict.survivors) == verdict.total > 9
    assert {s.partition(", scale ")[2] for s in verdict.survivors} == {"", "1e-06", "1e+06"}
