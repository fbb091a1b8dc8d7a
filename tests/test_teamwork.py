"""How many workers pay: measured where a run is worth it, once, and remembered."""

import json

import pytest

import minivit as mv
from minivit.measure import teamwork
from minivit.runs.job import Job
from minivit.runs.settings import resolve

TINY = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10, "dim": 8, "depth": 1, "heads": 1}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Four cores, a cache of their own, and what is measured of so many workers; return what was asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(teamwork, "cpu_cores", lambda: 4)
    monkeypatch.setattr(teamwork, "WORTH", 0)
    seconds, asked = {1: 0.030, 4: 0.010}, []

    def seconds_a_step(model, batch_size, workers):
        asked.append((batch_size, workers))
        return seconds[workers]

    monkeypatch.setattr(teamwork, "seconds_a_step", seconds_a_step)
    return seconds, asked


def test_it_is_measured_once_for_each_kind_of_step(measured):
    seconds, asked = measured
    model = mv.ViT(**TINY)
    assert teamwork.workers_that_pay(model, 64, 100) == 4 and asked == [(64, 1), (64, 4)]
    seconds[4] = 1.0
    assert teamwork.workers_that_pay(mv.ViT(**TINY, seed=0), 64, 100) == 4 and len(asked) == 2
    assert teamwork.workers_that_pay(model, 32, 100) == 1 and asked[2:] == [(32, 1), (32, 4)]
    assert teamwork.workers_that_pay(mv.ViT(**TINY | {"depth": 2}), 64, 100) == 1 and len(asked) == 6


def test_a_gain_within_the_drift_of_a_machine_is_none(measured):
    seconds, _ = measured
    seconds[4] = 0.0295
    assert teamwork.workers_that_pay(mv.ViT(**TINY), 64, 100) == 1


def test_short_runs_and_large_steps_are_not_measured_for(measured, monkeypatch):
    _, asked = measured
    monkeypatch.setattr(teamwork, "WORTH", 2e11)
    assert teamwork.workers_that_pay(mv.ViT(**TINY), 64, 100) == 1 and asked == []
    monkeypatch.setattr(teamwork, "WORTH", 0)
    monkeypatch.setattr(teamwork, "LARGE", 1)
    assert teamwork.workers_that_pay(mv.ViT(**TINY), 64, 100) == 1 and asked == []
    monkeypatch.setattr(teamwork, "cpu_cores", lambda: 1)
    assert teamwork.workers_that_pay(mv.ViT(**TINY), 64, 100) == 1 and asked == []


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"KEY": 99}', '{"KEY": "4"}', '{"KEY": true}', "[" * 100_000])
def test_a_damaged_memory_is_measured_for_again(measured, tmp_path, damage):
    _, asked = measured
    model, path = mv.ViT(**TINY), tmp_path / "minivit" / "workers.json"
    teamwork.workers_that_pay(model, 64, 100)
    (key,) = json.loads(path.read_text())
    path.write_text(damage.replace("KEY", key))
    assert teamwork.workers_that_pay(model, 64, 100) == 4 and len(asked) == 4
    assert json.loads(path.read_text()) == {key: 4}


def test_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(teamwork, "STEPS", 1)
    assert 0 < teamwork.seconds_a_step(mv.ViT(**TINY), 4, 2) < 60


def test_a_run_asks_for_it_unless_the_number_or_the_threads_are_given(measured):
    _, asked = measured
    numbers = lambda **given: Job(resolve({"data.name": "digits", "data.overfit": 64, **given})).settings[
        "train.workers"
    ]
    assert numbers(**{"train.workers": 1}) == 1 and numbers(**{"train.workers": 3}) == 3
    assert numbers(**{"train.workers": 0, "train.threads": 2}) == 1 and asked == []
    assert numbers() == 4 and asked == [(64, 1), (64, 4)]
