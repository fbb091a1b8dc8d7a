"""A run's record of how it multiplied on a GPU, by which it goes on to the same bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivit.backend import choices
from minivit.cli.main import main
from tests import fake_cublaslt

SMALL = ["--set", "model.dim=16", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "data.overfit=20"]
GPU = "strict stand-in, 132 SMs, cuBLASLt 130000"


@pytest.fixture
def fastest(request: pytest.FixtureRequest, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Eight algorithms of each product, of which the one whose number this list holds is the fastest.

    Kernels compute in a test that asks for ``strict_cupy`` itself; no other looks at numbers.
    """
    xp = request.getfixturevalue("strict_cupy" if "strict_cupy" in request.fixturenames else "idle_cupy")
    number = [5]
    xp.cublaslt.candidates = 8
    speed = lambda start, end: 1.0 if xp.cublaslt.calls[-1].algorithm == number[0] else 2.0
    monkeypatch.setattr(xp.cuda, "get_elapsed_time", speed)
    monkeypatch.setattr("minivit.runs.results.SHOWN", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    monkeypatch.setattr(choices, "_preferred", {})
    return number


def on_another_day(xp: Any, patch: pytest.MonkeyPatch, here: Path, version: int = 130000) -> None:
    """Begin as a new process does, on a machine of the same kind that has never multiplied."""
    (here / "cache").rename(here / f"cache {len(list(here.iterdir()))}")
    xp.cublaslt = fake_cublaslt.install(patch)
    xp.cublaslt.candidates, xp.cublaslt.version = 8, version
    patch.setattr(choices, "_preferred", {})


def train(*words: str) -> int:
    return main(["train", *words])


def start(name: str, epochs: int = 1) -> None:
    """Train on the stand-in, in a folder of that name."""
    words = ["digits", "--device", "cuda", *SMALL, "--batch-size", "12", "--min-lr", "0.001"]
    assert train(*words, "--epochs", str(epochs), "--name", name) == 0


def kept(folder: str = "run") -> dict[str, dict[str, str]]:
    return json.loads(Path("runs", folder, "products.json").read_text())


def test_a_run_goes_on_with_the_algorithms_it_had(
    strict_cupy: Any, fastest: list[int], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    start("run", epochs=2)
    record = kept()
    assert record.keys() == {GPU} and len(record[GPU]) > 20
    assert set(record[GPU].values()) <= {row["algorithm"] for row in choices.chosen()}
    on_another_day(strict_cupy, monkeypatch, here)
    fastest[0] = 3
    assert train("--resume", "runs/run", "--epochs", "4") == 0
    assert record[GPU].items() <= kept()[GPU].items()
    assert "kept" in {row["source"] for row in choices.chosen()}
    assert "algorithm" not in capsys.readouterr().err
    with np.load("runs/run/checkpoints/last.npz") as resumed:
        assert all(np.isfinite(resumed[name]).all() for name in resumed.files if name.startswith("model/"))


def test_what_differs_all_the_same_is_remarked_on_once(
    idle_cupy: Any, fastest: list[int], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    start("run")
    before = kept()
    on_another_day(idle_cupy, monkeypatch, here)
    fastest[0] = 3
    start("other")  # the same products, in the same process
    capsys.readouterr()
    assert train("--resume", "runs/run", "--epochs", "3") == 0
    said = capsys.readouterr().err
    told = (
        r"\b[1-9]\d* matrix products? by another algorithm of cuBLASLt than before: the numbers agree but for rounding"
    )
    assert len(re.findall(told, said)) == 1
    assert kept() != before and kept().keys() == {GPU}
    on_another_day(idle_cupy, monkeypatch, here, version=130001)
    assert train("--resume", "runs/run", "--epochs", "4") == 0
    newer = GPU.replace("130000", "130001")
    assert f"goes on with another GPU or cuBLASLt: {GPU} → {newer}: the numbers" in capsys.readouterr().err
    assert kept().keys() == {GPU, newer}


@pytest.mark.parametrize("damage", ["", "[]", '{"a": 5}', json.dumps({GPU: {"x": "zz"}}), "\udcff"])
def test_a_damaged_record_is_not_believed(
    idle_cupy: Any, fastest: list[int], here: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["digits", "--device", "cuda", *SMALL, "--batch-size", "20", "--min-lr", "0.001"]
    assert train(*start, "--epochs", "1", "--name", "run", "-q") == 0
    whole = kept()
    Path("runs/run/products.json").write_text(damage, errors="surrogateescape")
    assert train("--resume", "runs/run", "--epochs", "2", "-q") == 0
    assert whole[GPU].items() <= kept()[GPU].items() and kept().keys() == {GPU}


def test_a_run_on_a_cpu_keeps_none(here: Path) -> None:
    assert train("digits", "--device", "cpu", *SMALL, "--epochs", "1", "--name", "run", "-q") == 0
    assert not Path("runs/run/products.json").exists()
