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


def audited(*commands, cwd, path=ROOT):
    """Run commands in a child under the hook; return the (offences, number of events) of each."""
    environment = os.environ | {"PYTHONPATH": str(path), "OPENBLAS_NUM_THREADS": "1"}
    program = [sys.executable, str(ROOT / "tests" / "audited.py"), "report.json", json.dumps(commands)]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((cwd / "report.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each command did, one after the other in a child."""
    folder = tmp_path_factory.mktemp("audited")
    Image.fromarray(data.load("digits").images[0, 0]).save(folder / "digit.png")
    last = str(folder / "run" / "checkpoints" / "last.npz")
    small = ["--set=model.depth=1", "--set=model.dim=16", "--set=model.mlp_dim=32"]
    commands = {
        "train": ["train", "digits", "--epochs=2", *small, "--on-nan=rollback", "--name=run", "-o", str(folder)],
        "eval": ["eval", last],
        "predict": ["predict", last, "digit.png"],
        "study": ["study", last, "--images=2"],
        "resume": ["train", "--resume", str(folder / "run"), "--epochs=3"],
    }
    return dict(zip(commands, audited(*commands.values(), cwd=folder), strict=True))


@pytest.mark.parametrize("command", ["train", "eval", "predict", "study", "resume"])
def test_a_command_is_clean(found, command):
    offences, events = found[command]
    print(f"{events} events")
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


def other_minivit(folder, source):
    """Write a package called minivit, the command of which is ``source``."""
    (folder / "minivit" / "cli").mkdir(parents=True)
    (folder / "minivit" / "cli" / "main.py").write_text(source)


def test_the_hook_sees_each_offence(tmp_path):
    lines = "".join(f"    if command == [{event!r}]: {statement}\n" for event, statement in BAD.items())
    other_minivit(tmp_path, f"def main(command):\n{lines}    return 0\n")
    reports = audited(*([event] for event in BAD), cwd=tmp_path, path=tmp_path)
    for event, (offences, _) in zip(BAD, reports, strict=True):
        assert any(offence.startswith(f"{event}(") for offence in offences), event
        assert all("in main\n" in offence for offence in offences), event


def test_what_an_import_does_is_no_offence(tmp_path):
    other_minivit(
        tmp_path,
        "import dataclasses, numpy\nexec('1')\ndef main(command):\n    __import__(command[0])\n    return 0\n",
    )
    (tmp_path / "harmless.py").write_text("eval('1')\n")
    (tmp_path / "harmful.py").write_text("import os; os.system('true')\n")
    (harmless, _), (harmful, _) = audited(["harmless"], ["harmful"], cwd=tmp_path, path=tmp_path)
    assert harmless == [] and len(harmful) == 1
