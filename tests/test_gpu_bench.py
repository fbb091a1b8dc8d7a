"""``minivit bench`` on a GPU, and the GPU's benchmarks, on the stand-in: they run, and say what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import minivit as mv
from minivit.cli.gpu_bench import gap_text, kernel_table
from minivit.cli.main import main
from minivit.measure import gpu_speed
from minivit.measure.gpu_profile import GpuProfile, Spent
from minivit.measure.gpu_speed import Ceilings, gpu_ceilings
from minivit.nn.module import is_watched

ROOT = Path(__file__).parent.parent
FASTER = ("ti4-1024", "s16-256", "ti4-128")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "COPIED", 1 << 12)
    monkeypatch.setattr(gpu_speed, "SIDES", (8, 16))
    monkeypatch.setattr(gpu_speed, "ROUNDS", 1)


def test_ceilings_by_the_clock(strict_cupy: Any, small: None) -> None:
    # the stand-in's clock says that a millisecond passes between any two marks, here for eight calls
    found = gpu_ceilings("cuda:0", "float32")
    assert found == Ceilings(copy=2 * 4096 / (1e-3 / 8), product=2 * 16**3 / (1e-3 / 8))


def test_bench_on_a_gpu(
    idle_cupy: Any, small: None, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("minivit.measure.gpu_profile.STEPS", 1)
    mv.save(mv.create_model("vit_digits", dim=16, depth=1, heads=2, mlp_dim=32), "tiny.npz")
    command = ["bench", "tiny.npz", "--device", "cuda", "--dtype", "float32", "-b", "2", "--steps", "2"]
    assert main([*command, "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["work"] for row in found["speed"]] == ["captured step", "launched step"]
    assert found["dtype"] == "float32" and found["not_captured"] == "" and 0 < found["nodes"] < 1000
    assert found["memory"] > 0 and found["predicted_memory"] > 0
    rows = {row["kernel"]: row for row in found["profile"]}
    # two norms of the block and that of the end; a product is named by its rows, columns and the length of its sums
    assert rows["layer_norm_forward"]["launches"] == rows["layer_norm_backward"]["launches"] == 3
    qkv = next(row for name, row in rows.items() if name.startswith("product ") and name.endswith("×48×16"))
    assert qkv["launches"] == 1 and qkv["flops_per_second"] > 0
    assert any(name.startswith("patchify: CuPy's") for name in rows)
    assert not is_watched()


def test_the_table_of_kernels() -> None:
    kernels = {
        "product 64×64×64": Spent(2, 3e-3, 3_000_000, 6_000_000_000),
        "gelu_forward": Spent(1, 1e-3, 2_000_000),
        "tiny": Spent(5, 4e-6),
    }
    profile = GpuProfile(kernels, 5e-3)
    lines = kernel_table(profile, Ceilings(copy=4e9, product=4e12)).splitlines()
    assert lines[1].split() == ["product", "64×64×64", "2", "3.000", "60.0%", "1.00", "25%", "2.00", "50%"]
    assert lines[2].split() == ["gelu_forward", "1", "1.000", "20.0%", "2.00", "50%"]
    assert lines[3].split() == ["1", "others", "5", "0.004", "0.1%"]
    text = gap_text(profile, 4.5e-3)
    assert "All kernels: 4.004 ms. The launched step: 5.000 ms on the GPU, of which 0.996 ms in none" in text
    assert "The captured step: 4.500 ms, so 0.496 ms between its kernels." in text


# ---- benchmarks/ -----------------------------------------------------------------------------------------------------


def script(name: str, *words: str, cwd: Path) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_comparison_runs_dry(tmp_path: Path) -> None:
    out = script("gpu.py", "--dry", "--configs", "digits", "--dtypes", "float32", "--output", "out", cwd=tmp_path)
    assert "| digits | float32 | minivit | " in out
    (row,) = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert row["who"] == "minivit" and len(row["seconds"]) == 2 and row["memory"] > 0 and row["nodes"] > 0
    assert "digits" in (tmp_path / "out" / "gpu.md").read_text()
    assert (tmp_path / "out" / "gpu.svg").read_text().startswith("<svg")


def test_the_checks_run_dry(tmp_path: Path) -> None:
    out = script("gpu_checks.py", "--dry", "--only", "losses", "gradient", "--output", "out", cwd=tmp_path)
    (losses, double), (error,) = (c["rows"] for c in json.loads((tmp_path / "out/checks.json").read_text())["checks"])
    assert losses[0] == "losses, float32" and losses[3] and double[3] and error[0] == "gradient, bfloat16"
    assert "3 rows, 0 failed" in out.splitlines()[-1]


def test_peers_wait_for_their_turn_beside_other_checks(tmp_path: Path) -> None:
    out = script("gpu_checks.py", "--dry", "--only", "resume", "PyTorch", "loader", "--output", "out", cwd=tmp_path)
    resume, peers, loader = json.loads((tmp_path / "out/checks.json").read_text())["checks"]
    assert [row[:2] for row in peers["rows"]] == [[f"speed {name}", "not measured"] for name in FASTER]
    assert peers["code"] == 0 and resume["rows"][0][3] and loader["rows"][0][0] == "loader"
    rows = json.loads((tmp_path / "out" / "against-pytorch" / "gpu.json").read_text())["rows"]
    assert [(row["config"], row["who"], len(row["seconds"])) for row in rows] == [(c, "minivit", 2) for c in FASTER]
    assert "resume: " in out and "5 rows, 4 failed" in out.splitlines()[-1]


def test_verdicts_on_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    def row(who: str, ms: float, memory: int = 2 << 30, config: str = "ti4-1024") -> dict[str, Any]:
        return {"config": config, "dtype": "bfloat16", "who": who, "seconds": [1e-3 * ms] * 10, "memory": memory}

    assert tuple(gpu.FASTER) == FASTER
    died = {"config": "ti4-128", "dtype": "bfloat16", "who": "compile", "why_not": "out of memory"}
    peers = [row("compile", 17.0, 5 << 30), row("reduce-overhead", 16.0), row("eager", 1.0)]
    speed, memory, *rest = gpu.verdicts(
        [row("minivit", 10.0, 4 << 30), *peers, row("minivit", 2.0, config="ti4-128"), died]
    )
    assert speed == ("speed ti4-1024", "×1.60 of reduce-overhead (10.000 against 16.000 ms)", "≥ ×1.55", True)
    assert memory == ("memory ti4-1024", "4.00 GiB", "≤ torch.compile's 5.00", True)
    assert rest == [
        ("speed s16-256", "not measured", "≥ ×1.45", False),
        ("speed ti4-128", "compile: out of memory", "≥ ×1.75", False),
    ]
    assert not gpu.verdicts([row("minivit", 11.0), *peers])[0][3]


def test_a_child_that_dies_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu
    import gpu_checks

    rows = list(gpu.measure_all([("digits", "bfloat16", ["eager"])], sys.executable, tmp_path, 1e12))  # no PyTorch here
    assert rows == [{"config": "digits", "dtype": "bfloat16", "who": "eager", "why_not": rows[0]["why_not"]}]
    assert "No module named" in rows[0]["why_not"] and "No module named" in gpu.table(rows)
    crash = gpu_checks.Check([sys.executable, "-c", "import os; os.abort()"], 20.0)
    hang = gpu_checks.Check([sys.executable, "-c", "import time; print('so far', flush=True); time.sleep(60)"], 1.0)
    found = [gpu_checks.run(name, check, check.most, tmp_path) for name, check in (("crash", crash), ("hang", hang))]
    assert [check["rows"][0][3] for check in found] == [False, False]
    assert found[1]["code"] == "not done within 1 s"
    assert "2 rows, 2 failed" in gpu_checks.table(found, ["tests"]) and "skipped" in gpu_checks.table(found, ["tests"])
