"""The benchmarks run, print what they promise, and draw well-formed pictures. What they measure is not judged here."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
LINE = r"minivit digits train: img/s ([\d.]+)  rss_mb ([\d.]+)  loss ([\d.]+) to ([\d.]+)\n"
ROW = r"^\| (\d+) \| ([\d.,]+) \| ([\d.,]+) \| ([\d,]+) \| ([\d.]+) \| (\d+)% \|$"


@pytest.fixture
def benchmarks(monkeypatch):
    """Let this test import the benchmarks, and what it runs import minivit."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def texts(path):
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_step_that_trains(benchmarks, workers):
    command = [sys.executable, ROOT / "benchmarks" / "step.py", "digits", "--workers", workers]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    speed, memory, before, after = map(float, re.fullmatch(LINE, done.stdout).groups())
    assert speed > 0 and memory > 10
    assert after < before / 2


def test_comparing_leaves_out_a_peer_that_cannot_run(benchmarks, monkeypatch, capsys, tmp_path):
    import compare

    def measure(python, script, *words):
        if script == "jax_step.py":
            raise RuntimeError("jax_step.py: no module")
        return {"step.py": (200.0, 50.0), "torch_step.py": (100.0, 400.0)}[script]

    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["compare.py", "3", "--configs", "digits", "--save", str(tmp_path / "bars.svg")])
    compare.main()
    printed = capsys.readouterr().out
    assert printed.count("JAX jit") == 1 and "JAX jit is left out: jax_step.py: no module" in printed
    assert "| digits | minivit | 200.0 | 50 | | |" in printed
    assert "| digits | PyTorch eager | 100.0 | 400 | 2.00 (2.00 to 2.00) | 0.12 |" in printed
    assert {"minivit", "PyTorch eager", "torch.compile", "200", "400"} < set(texts(tmp_path / "bars.svg"))
    command = ["compare.py", "1", "--configs", "digits", "--peers", "PyTorch eager", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", command)
    compare.main()
    printed = capsys.readouterr().out
    assert "| digits | minivit, 2 workers | 200.0 | 50 | | |" in printed
    assert "| digits | minivit, one process | 200.0 | 50 | 1.00 (1.00 to 1.00) | 1.00 |" in printed


def test_convolutions_beside_another(benchmarks, monkeypatch, capsys):
    import conv

    def measure(python, who, threads):
        return dict.fromkeys(conv.CASES, 2.0 if who == "minivit" else 3.0)

    for case in (conv.Case(3, 4, 6, 5), conv.Case(3, 4, 6), conv.Case(3, 4, 6, groups=2)):
        conv.in_minivit(case, 1)()
    monkeypatch.setattr(conv, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["conv.py", "2"])
    conv.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(conv.CASES) and rows[2] == "| 3x3 stem, 3 → 64, 32² | 2.0 | 3.0 | 1.50 (1.50) |"


def test_scaling_of_a_tiny_step(benchmarks, monkeypatch, capsys, tmp_path):
    import scaling

    monkeypatch.setattr(scaling, "CENTRE", scaling.Point(batch=2, image=8, dim=8, depth=1, threads=1))
    monkeypatch.setattr(scaling, "SWEEPS", {"image": ("tokens", (8, 16))})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--save", str(tmp_path / "curves.svg")])
    scaling.main()
    rows = re.findall(ROW, capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in rows] == ["5", "17"]  # tokens
    assert all(float(row[1].replace(",", "")) > 0 and int(row[3].replace(",", "")) > 10 for row in rows)
    assert {"tokens", "5", "17"} < set(texts(tmp_path / "curves.svg"))


def test_models_in_equal_time(benchmarks, monkeypatch, capsys, tmp_path):
    import models

    class Here:
        """Runs in this process what a pool would run in others."""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, work, cells, chunksize=1):
            return [work(cell) for cell in cells]

        imap = map

    monkeypatch.setattr(models.multiprocessing, "get_context", lambda _: models)
    monkeypatch.setattr(models, "Pool", lambda jobs, maxtasksperchild: Here(), raising=False)
    monkeypatch.setattr(models, "TIMED", 0.05)
    tiny = {"dim": 8, "depth": 1, "heads": 1, "mlp_dim": 8}
    monkeypatch.setattr(models, "MODELS", {"ViT": ("vit_digits", tiny), "CCT": ("cct_2_3x1_32", tiny)})
    monkeypatch.setattr(sys, "argv", ["models.py", "digits", "--minutes", "0.001", "--save", str(tmp_path / "t")])
    models.main()
    printed = capsys.readouterr().out
    rows = re.findall(
        r"^\| (ViT|CCT) \| [\d,]+ \| ([\d,]+) \| \d+ \|(?: ([\d.]+)% \([^|]*\) \|){3}$", printed, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["ViT", "CCT"]
    assert all(int(row[1].replace(",", "")) >= 128 and 2 < float(row[2]) < 100 for row in rows)
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == printed
    assert {"digits", "1%", "10%", "100%"} < set(texts(tmp_path / "t.svg"))


def test_plans_of_many_gpus(benchmarks, monkeypatch, capsys, tmp_path):
    import plan

    monkeypatch.setattr(plan, "GPUS", [1, 8])
    monkeypatch.setattr(plan, "CURVES", {"digits": "vit_digits"})
    monkeypatch.setattr(plan, "MEASURED", plan.MEASURED[:1])
    monkeypatch.setattr(sys, "argv", ["plan.py", "--save", str(tmp_path / "plan.svg")])
    plan.main()
    printed = capsys.readouterr().out
    assert "| ViT-Ti/4 | 128 | 2.59 | 2.51 | 0.97 |" in printed
    assert "| 1 | 4,096 | " in printed and "| 8 | 512 | " in printed
    assert {"GPUs", "1", "8"} < set(texts(tmp_path / "plan.svg"))


def test_plans_beside_what_is_measured(benchmarks, monkeypatch, capsys):
    import plan
    from configs import TINY

    from minivit.measure import here, teamwork

    monkeypatch.setattr(plan, "CONFIGS", {"tiny": TINY})
    monkeypatch.setattr(teamwork, "STEPS", 1)
    monkeypatch.setattr(here, "SPENT", 0.0)
    monkeypatch.setattr(here, "sgemm_rate", lambda cores: 1e9 * cores)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--here", "1"])
    monkeypatch.setattr(plan, "MPIEXEC", "mpiexec")
    monkeypatch.setattr(plan.subprocess, "run", lambda *command, **how: SimpleNamespace(stdout="0.01"))
    plan.main()
    rows = re.findall(
        r"^\| tiny \| ([\w ]+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \(", capsys.readouterr().out, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["one", "two workers", "two ranks"] and rows[2][1] == "10.0"
    assert all(float(x) > 0 for row in rows for x in row[1:])
