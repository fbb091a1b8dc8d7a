"""``minivit train`` on a GPU, which the strict stand-in plays: another GPU, none any more, one without kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minivit.cli.main import main
from minivit.errors import DeviceError
from minivit.runs import resume
from tests import strict

SMALL = ["--set", "model.dim=16", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "data.overfit=12"]
START = ["train", "digits", *SMALL, "--epochs", "1", "--min-lr", "0.001", "--name", "run"]


@pytest.fixture(autouse=True)
def few_pictures(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivit.runs.results.SHOWN", 2)


def test_a_run_moves_between_two_gpus(strict_cupy: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*START, "--device", "cuda:1", "--optimizer", "muon", "--model-ema", "0.9"]) == 0
    assert "device      cuda:1, bfloat16" in capsys.readouterr().out
    assert main(["train", "--resume", "runs/run", "--epochs", "2"]) == 0
    assert main(["train", "--resume", "runs/run", "--epochs", "3", "--device", "cuda"]) == 0
    assert "goes on with other device: cuda:1 → cuda:0" in capsys.readouterr().err


def test_a_run_in_bfloat16_does_not_go_on_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with strict.installed():
        assert main([*START, "--device", "cuda"]) == 0
    with pytest.raises(DeviceError, match=r"(?s)this run computes in bfloat16.*--init-from RUN --device cpu"):
        resume("runs/run", settings={"train.epochs": 2, "train.device": "cpu"})
    assert main(["train", "--config", "runs/run/config.toml", "--init-from", "runs/run",
                 "--device", "cpu", "--dtype", "float32", "--name", "after"]) == 0  # fmt: skip
    assert main(["eval", "runs/run", "--device", "cpu"]) == 0


def test_it_is_said_why_no_kernels_run(
    strict_cupy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minivit.backend.tile.why_not", lambda: "there is no compiler")
    assert main([*START, "--device", "cuda", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "kernels     plain operations only, which takes longer: there is no compiler\n" in said
    assert main([*START, "--device", "cpu", "--dry-run"]) == 0
    assert "kernels" not in capsys.readouterr().out


def test_kernels_for_models_need_to_know_for_which_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--for", "vit_digits"]) == 1
    assert "--for without --build-kernels" in capsys.readouterr().err
