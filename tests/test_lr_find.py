"""The learning rate range test, and the command that runs it."""

from __future__ import annotations

import itertools
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from minivit import nn
from minivit.backend import Key, normal
from minivit.cli.main import main
from minivit.errors import ConfigError
from minivit.train.lr_find import lr_range_test, smoothed, suggest
from minivit.train.optim import SGD, AdamW
from minivit.train.step import TrainStep

X = normal(Key(0), (64, 6))
Y = (X[:, 0] > 0).astype(np.int64)


def made(opt=AdamW, **settings) -> TrainStep:
    model = nn.Linear(6, 2)
    for i, p in enumerate(model.parameters()):
        p.data[...] = normal(Key(1, i), p.shape)
    return TrainStep(model, opt(model.named_parameters(), lr=0.123, **settings), threads=1)


def batches():
    return itertools.repeat((X, Y))


def test_the_rate_rises_by_a_constant_factor():
    points = lr_range_test(made(), batches(), 1e-5, 1e-2, steps=31)
    assert [lr for lr, _ in points] == pytest.approx(np.geomspace(1e-5, 1e-2, 31))
    assert points[-1][1] < points[0][1]


def test_the_losses_are_those_of_the_steps():
    points = lr_range_test(made(), batches(), 1e-3, 1e-1, steps=5)
    step = made()
    for lr, loss in points:
        step.opt.lr = lr
        assert step(X, Y) == loss


@pytest.mark.parametrize("opt", [AdamW, SGD])
def test_nothing_is_kept(opt):
    step = made(opt)
    step(X, Y)
    model, state, flat = step.model.state_dict(), step.opt.state_dict(), step.opt.store.values.copy()
    lr_range_test(step, batches(), steps=20)
    for before, after in ((model, step.model.state_dict()), (state, step.opt.state_dict())):
        assert all(np.array_equal(before[name], after[name]) for name in before)
    assert np.array_equal(step.opt.store.values, flat)
    assert step.opt.lr == 0.123
    again = made(opt)
    again(X, Y)
    assert step(X, Y) == again(X, Y)  # and goes on as if nothing had been


def test_nothing_is_kept_when_it_is_interrupted():
    def interrupted():
        yield X, Y
        raise KeyboardInterrupt

    step = made()
    before = step.opt.store.values.copy()
    with pytest.raises(KeyboardInterrupt):
        lr_range_test(step, interrupted())
    assert np.array_equal(step.opt.store.values, before)
    assert step.opt.lr == 0.123


def test_it_stops_when_the_loss_explodes():
    noise = np.arange(64) % 2  # labels that no rate learns
    points = lr_range_test(made(SGD), itertools.repeat((X, noise)), 1e-3, 1e6, steps=200)
    smooth = smoothed([loss for _, loss in points])
    assert len(points) < 200
    assert smooth[-1] > 4 * min(smooth)
    assert max(smooth[:-1]) <= 4 * min(smooth[:-1])


def test_it_stops_before_a_loss_that_is_not_finite():
    def spoiled():
        yield from itertools.repeat((X, Y), 5)
        yield X * np.float32(np.inf), Y

    step = made()
    before = step.opt.store.values.copy()
    assert len(lr_range_test(step, spoiled())) == 5
    assert np.array_equal(step.opt.store.values, before)


def test_it_ends_with_the_batches_and_takes_no_more_than_it_needs():
    assert len(lr_range_test(made(), [(X, Y)] * 3)) == 3
    source = iter([(X, Y)] * 10)
    lr_range_test(made(), source, steps=4)
    assert len(list(source)) == 6


@pytest.mark.parametrize(("low", "high", "steps"), [(0.0, 1.0, 9), (1.0, 1.0, 9), (1e-3, math.inf, 9), (1e-3, 1.0, 1)])
def test_a_range_that_cannot_be_is_refused(low, high, steps):
    with pytest.raises(ConfigError):
        lr_range_test(made(), batches(), low, high, steps)


def test_the_smoothed_loss_has_no_bias():
    assert smoothed([3.0] * 10) == pytest.approx([3.0] * 10)
    assert smoothed([1.0, 2.0, 4.0], share=0.5) == pytest.approx([1.0, (0.5 + 2) / 1.5, (0.25 + 1 + 4) / 1.75])
    assert smoothed([]) == []


def test_the_suggestions_are_where_the_loss_falls_fastest_and_a_tenth_of_its_least():
    rates = np.geomspace(1e-6, 1, 121)
    falls = 2 - 1 / (1 + (1e-3 / rates) ** 3)  # steepest at 1e-3
    losses = falls + 50 * rates**2
    found = suggest(list(zip(rates, losses, strict=True)))
    assert found is not None
    assert 1e-3 <= found[0] < 4e-3  # a mean over the past is late
    least = rates[np.argmin(smoothed(list(losses)))]
    assert found[1] == pytest.approx(least / 10)


def test_a_loss_that_never_falls_gives_no_suggestion():
    assert suggest([(10.0**e, 3.0 + e) for e in range(5)]) is None
    assert suggest([(1e-3, 1.0)]) is None
    assert suggest([]) is None


def test_the_command_prints_a_rate_and_draws_the_curve(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--set", "model.depth=1", "--set", "model.dim=16", "--set", "model.heads=2", "--batch-size", "16"]
    assert main(["lr-find", "digits", *small]) == 0
    out = capsys.readouterr().out
    suggestion = float(out.partition("suggestion  --lr ")[2].split(",")[0])
    assert 1e-4 < suggestion < 0.3
    root = ElementTree.parse(tmp_path / "lr-find.svg").getroot()
    assert root.tag.endswith("svg")
    assert [path.name for path in tmp_path.iterdir()] == ["lr-find.svg"]
    assert main(["lr-find", *small, "--seed", "1", "-o", str(tmp_path / "other.svg")]) == 0
    assert (tmp_path / "other.svg").exists()


def test_the_command_in_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--set", "model.depth=1", "--set", "model.dim=16", "--set", "model.heads=2", "--batch-size", "16"]
    assert main(["lr-find", "digits", *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    points = found["points"]
    assert [p["smoothed"] for p in points] == pytest.approx(smoothed([p["loss"] for p in points]))
    assert (found["suggestion"], found["cautious"]) == suggest([(p["lr"], p["loss"]) for p in points])
    assert found["curve"] == "lr-find.svg"
    assert (tmp_path / "lr-find.svg").exists()
    assert found["so_far"] > 0


def test_the_command_takes_the_settings_of_a_run(capsys):
    assert main(["lr-find", "--set", "model.depht=1"]) == 1
    assert "model.depth" in capsys.readouterr().err
    assert main(["lr-find", "--name", "x"]) == 2
