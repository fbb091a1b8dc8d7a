"""Every example runs as it stands, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def test_the_examples_are_there():
    assert [e.name[:2] for e in EXAMPLES] == [f"{i:02}" for i in range(1, 13)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.stem)
def test_example_runs(example, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(example.parent.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert len(example.read_text().splitlines()) <= 120


def test_the_example_of_a_test_passes_under_pytest(tmp_path):
    example = ROOT / "examples" / "test_your_gradients.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(example)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


def test_the_readmes_lines_run(tmp_path, monkeypatch):
    """The first two Python blocks, word for word but for a single epoch; what it promises in passing is there."""
    block, study, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names: dict = {}
    monkeypatch.chdir(tmp_path)  # they save a model
    exec(block.replace("range(10)", "range(1)"), names)
    assert "range(10)" in block
    exec(study, names)
    assert names["seen"].shape == (*names["images"].shape[:1], 2, 2)
    assert len(names["terms"]) > 4 * 4 + 4  # heads and MLPs of four layers, and more
    assert names["logits"].shape == (1797, 10)
    assert (names["logits"].argmax(1) == names["test"].labels).mean() > 0.5
