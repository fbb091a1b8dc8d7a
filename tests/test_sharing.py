"""How many threads work on a batch, and how large its micro-batches are: by what a model says of its rows."""

from __future__ import annotations

import numpy as np
import pytest

import minivit as mv
from minivit.backend import Team
from minivit.errors import ConfigError
from minivit.nn import RowSize
from minivit.train import sharing
from minivit.train.sharing import as_array, team_for


class Silent(mv.nn.Module):
    """A model that does not say how large its rows are."""

    def __init__(self):
        self.linear = mv.nn.Linear(4, 3)


class Telling(Silent):
    def __init__(self, numbers, layers):
        super().__init__()
        self.size = RowSize(numbers, layers)

    def row_size(self):
        return self.size


def test_a_vit_says_its_tokens_times_dim_and_its_blocks():
    settings = {"image_size": (12, 8), "patch_size": (4, 2), "in_channels": 3, "num_classes": 5, "dim": 16, "heads": 4}
    assert mv.ViT(**settings, depth=3).row_size() == (13 * 16, 3)
    assert mv.ViT(**settings, depth=1, pool="mean").row_size() == (12 * 16, 1)
    assert Silent().row_size() is None


@pytest.mark.parametrize("cache", [1 << 19, 1 << 20, 2 << 20])
@pytest.mark.parametrize("tokens, dim, depth", [(17, 64, 4), (65, 192, 6), (197, 768, 12), (13, 16, 1), (5, 8, 400)])
def test_micro_batches_fit_the_cache_and_the_memory(cache, tokens, dim, depth, monkeypatch):
    monkeypatch.setattr(sharing, "l2_cache", lambda: cache)
    team = team_for(Telling(tokens * dim, depth))
    fit = (51 << 12) * cache // 2**20 // (tokens * dim)
    assert team.micro_batch == max(1, min(fit, (5 << 18) // (tokens * dim * depth)))
    for rows in (1, 7, 64, 5000):
        team.threads = 4
        assert team.threads_for(rows) == min(4, max(1, rows * tokens * dim // (1 << 15)))


@pytest.mark.parametrize("cache", [1 << 19, 1 << 20])
def test_a_model_that_says_nothing_is_worth_a_thread_a_row(cache, monkeypatch):
    monkeypatch.setattr(sharing, "l2_cache", lambda: cache)
    team = team_for(Silent())
    assert team.micro_batch == min((51 << 12) * cache // 2**20 // 192, (5 << 18) // (1 << 15)) == 40
    team.threads = 4
    assert [team.threads_for(rows) for rows in (1, 3, 9)] == [1, 3, 4]


def test_what_is_asked_for_is_what_there_is():
    team = team_for(Telling(10, 2), 3, 5)
    assert (team.threads, team.micro_batch, team.device, team.threads_for(1)) == (3, 5, "cpu", 3)
    for wrong in ({"threads": 0}, {"micro_batch": 0}, {"threads": 1.5}):
        with pytest.raises(ConfigError, match="each must be a whole number, at least 1, or None"):
            team_for(Silent(), **wrong)
        with pytest.raises(ConfigError, match="each must be a whole number, at least 1, or None"):
            mv.predict_logits(Silent(), np.zeros((2, 4), np.float32), **wrong)


def test_on_a_gpu_a_batch_is_one_piece_of_one_thread(strict_cupy):
    team = team_for(Telling(10, 2).to("cuda"), threads=3)
    assert (team.threads, team.micro_batch, team.device) == (1, None, "cuda:0")
    assert team.pieces(1000) == [(0, 1000)]


def test_a_team_is_even_and_keeps_the_order_of_the_rows():
    team = Team(threads=2, micro_batch=3)
    assert team.pieces(10) == [(0, 2), (2, 5), (5, 7), (7, 10)]  # two rounds, as many pieces for either thread
    done = team.run(lambda thread, start, stop: (thread, start, stop), 10)
    assert done == [(0, 0, 2), (1, 2, 5), (0, 5, 7), (1, 7, 10)]
    assert team.spread(lambda start, stop: (start, stop), 10) == [(0, 10)]  # too few to be shared out
    assert team.spread(lambda start, stop: (start, stop), 1 << 20) == [(0, 1 << 19), (1 << 19, 1 << 20)]


def test_as_array_takes_what_a_batch_may_come_as():
    x = np.ones((2, 3), np.float32)
    assert as_array(x) is x and as_array(mv.tensor(x)) is x
    assert as_array([[1.0, 2.0]], np.float32).dtype == np.float32
    assert as_array([1, 2], np.float32).dtype.kind == "i"  # labels stay whole numbers
