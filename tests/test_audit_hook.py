"""What the commands do, as Python's own audit hook sees it: no network, pickle, other process, or code out of strings.

What counts, and what an import may do, is said in tests/audited.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from minivit import data

ROOT = Path(__file__).parents[1]


def audited(report, *command, cwd, path=ROOT):
    """Run a command in a child under the hook; return its (offences, number of events)."""
    environment = os.environ | {"PYTHONPATH": str(path), "OPENBLAS_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests" / "audited.py"), str(report), *map(str, command)]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    return found["offences"], found["events"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the folder of a run made under the hook, its offences, the number of events)."""
    folder = tmp_path_factory.mktemp("audited")
    command = ["train", "digits", "--epochs", "1", "--set", "model.depth=1", "--name", "run", "-o", folder]
    return folder / "run", *audited(folder / "report.json", *command, cwd=folder)


def test_a_training_run_is_clean(run):
    _, offences, events = run
    assert events > 1000 and not offences, "\n\n".join(offences)


@pytest.mark.parametrize("name", ["eval", "predict", "resume"])
def test_what_reads_a_checkpoint_is_clean(run, tmp_path, name):
    Image.fromarray(data.load("digits").images[0, 0]).save(tmp_path / "digit.png")
    last = run[0] / "checkpoints" / "last.npz"
    commands = {
        "eval": ["eval", last],
        "predict": ["predict", last, "digit.png"],
        "resume": ["train", "--resume", run[0]],
    }
    offences, events = audited(tmp_path / "report.json", *commands[name], cwd=tmp_path)
    assert events > 1000 and not offences, "\n\n".join(offences)


BAD = {
    "socket.__new__": "import socket; socket.socket().close()",
    "pickle.find_class": "import pickle; pickle.loads(b'cos\\nsystem\\n.')",
    "subprocess.Popen": "import subprocess; subprocess.run(['true'])",
    "os.system": "import os; os.system('true')",
    "os.fork": "import os; pid = os.fork(); os._exit(0) if pid == 0 else os.waitpid(pid, 0)",
    "exec": "exec('1')",
    "compile": "compile('1', 'name', 'eval')",
    "marshal.loads": "import marshal; marshal.loads(marshal.dumps(1))",
}


@pytest.mark.parametrize("event", BAD)
def test_the_hook_sees_each_offence(tmp_path, event):
    """A package called minivit does it."""
    (tmp_path / "minivit" / "cli").mkdir(parents=True)
    (tmp_path / "minivit" / "cli" / "main.py").write_text(f"def main(command):\n    {BAD[event]}\n    return 0\n")
    offences, _ = audited(tmp_path / "report.json", cwd=tmp_path, path=tmp_path)
    assert any(offence.startswith(f"{event}(") for offence in offences)
    assert all("in main\n" in offence for offence in offences)


def test_what_an_import_does_is_no_offence(tmp_path):
    (tmp_path / "minivit" / "cli").mkdir(parents=True)
    source = "import dataclasses, numpy\nexec('1')\ndef main(command):\n    import this_is_late\n    return 0\n"
    (tmp_path / "minivit" / "cli" / "main.py").write_text(source)
    (tmp_path / "this_is_late.py").write_text("eval('1')\n")
    assert audited(tmp_path / "report.json", cwd=tmp_path, path=tmp_path)[0] == []
    (tmp_path / "this_is_late.py").write_text("import os; os.system('true')\n")
    assert len(audited(tmp_path / "report.json", cwd=tmp_path, path=tmp_path)[0]) == 1
