"""Learning rate schedules: their values at the corners, and what they refuse."""

import itertools
import math

import pytest

from minivit.errors import ConfigError
from minivit.train import warmup_cosine, warmup_linear

BOTH = pytest.mark.parametrize("make", [warmup_cosine, warmup_linear])


@BOTH
def test_it_rises_in_equal_steps_peaks_falls_and_ends_at_the_final_rate(make):
    rate = make(0.8, 20, 4, 0.1)
    values = [rate(t) for t in range(20)]
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert all(a > b for a, b in itertools.pairwise(values[3:]))
    assert values[-1] == pytest.approx(0.1) and rate(1000) == values[-1]


@BOTH
def test_without_warm_up_it_starts_at_the_base_rate(make):
    rate = make(0.8, 5, 0)
    assert rate(0) == 0.8 and rate(4) == 0.0


@BOTH
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (5, 4), (5, 1)])
def test_short_runs(make, total, warmup):
    values = [make(1.0, total, warmup)(t) for t in range(total)]
    assert max(values) == values[max(warmup - 1, 0)] == 1.0
    assert total == 1 or values[-1] == 0.0


def test_the_shapes_are_the_papers():
    cosine, linear = warmup_cosine(3.0, 12, 2, 1.0), warmup_linear(3.0, 12, 2, 1.0)
    for t in range(1, 12):
        p = (t - 1) / 10
        assert cosine(t) == pytest.approx(1.0 + 0.5 * 2.0 * (1.0 + math.cos(math.pi * p)))
        assert linear(t) == pytest.approx(1.0 + 2.0 * (1.0 - p))


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 10, 1), "base_lr is 0.0"),
        ((-1.0, 10, 1), "base_lr is -1.0"),
        ((math.nan, 10, 1), "base_lr is nan"),
        ((math.inf, 10, 1), "base_lr is inf"),
        ((0.1, 10, 1, 0.2), "final_lr 0.2 is outside"),
        ((0.1, 10, 1, -0.1), "final_lr -0.1 is outside"),
        ((0.1, 10, 1, math.nan), "final_lr nan is outside"),
        ((0.1, 0, 0), "total_steps is 0"),
        ((0.1, 10, 10), "warmup_steps 10 is outside 0 … 9"),
        ((0.1, 10, -1), "warmup_steps -1 is outside"),
    ],
)
def test_arguments_that_cannot_be_meant(make, arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(*arguments)
    assert caught.value.remedy
