"""Ranks of MPI that share the rows of a batch: equal results, what they are told, and what becomes of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minivit as mv
from minivit.errors import ConfigError
from minivit.train import crew, mpi
from minivit.train.mpi import take_part
from minivit.train.ranks import place_among_ranks
from tests.test_workers import lives, new_step, trained

ROOT = Path(__file__).parent.parent
MPIEXEC = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
needs_mpi = pytest.mark.skipif(
    MPIEXEC is None or find_spec("mpi4py") is None, reason="MPI is not installed: pip install mpi4py mpich"
)

SCRIPT = """
import json, os, signal, sys
sys.path.insert(0, {root!r})
from minivit.train import mpi, peer, relay
from minivit.train.ranks import place_among_ranks, world
relay.SILENCE = peer.SILENCE = 2
if (place := place_among_ranks()) is not None:
    sys.exit(mpi.take_part(*place, [sys.executable, *sys.argv], lambda text: print(text, file=sys.stderr)))
import numpy as np
from minivit.errors import MinivitError
from tests.test_workers import batch, new_step, trained
count = world().count
{work}
"""


def ranks(count, work, folder, wait=True):
    """Run ``work``, whose last line prints JSON, in the process that has so many ranks; return what it prints."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT), work=work), encoding="utf-8")
    return mpiexec(count, [str(script)], folder, wait)


def mpiexec(count, arguments, folder, wait=True):
    process = subprocess.Popen(
        [MPIEXEC, "-n", str(count), sys.executable, *arguments], cwd=folder, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


# ---- equal results ---------------------------------------------------------------------------------------------------

LOSSES = """
step = new_step(count, dropout=0.1, drop_path=0.2)
found, weights = trained(step, 100)
assert type(step.crew.workers or 0) is int
print(json.dumps([[float(x).hex() for x in row] for row in found]))
"""


@needs_mpi
def test_any_number_of_ranks_makes_the_same_steps(tmp_path):
    """With dropout, drop path and clipping; and one number of them the same bits."""
    alone, _ = trained(new_step(1, dropout=0.1, drop_path=0.2), 100)
    found = {}
    for count in (2, 4, 2):
        printed = ranks(count, LOSSES, tmp_path)
        rows = np.array([[float.fromhex(x) for x in row] for row in json.loads(printed)])
        np.testing.assert_allclose(rows, alone, rtol=1e-10)
        assert found.setdefault(count, printed) == printed


CHANGES = """
from functools import partial
from minivit import ops
step, found = new_step(count), []
def work(rows=12, number=0, images=None, labels=None):
    ours, theirs = batch(rows, number)
    try:
        found.append(step(ours, theirs if labels is None else labels))
    except MinivitError as error:
        found.append(f"{type(error).__name__}: {error.what}")
work(), work(1), work(2)
step.model.blocks[0].mlp.fc1.weight.requires_grad = False
work()
step.model.blocks[0].mlp.fc1.weight.data[...] *= 2
work()
step.loss = partial(ops.cross_entropy, smoothing=0.3)
work()
for place in (-1, 0, slice(None)):
    wrong = batch()[1]
    wrong[place] = 11
    work(labels=wrong)
    work()
found.append(step.crew.count)
print(json.dumps(found))
"""


@needs_mpi
def test_what_changes_reaches_the_ranks_and_errors_come_back(tmp_path):
    """Small batches, a frozen parameter, another value, another loss, labels that cannot be: as in one process."""
    one, three = {}, json.loads(ranks(3, CHANGES, tmp_path))
    exec(SCRIPT.format(root=str(ROOT), work=CHANGES).replace("world().count", "1").replace("print(", "list("), one)
    assert three[-1] == 3 and len(three) == len(one["found"])
    for ours, theirs in zip(three[:-1], one["found"][:-1], strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-12) if isinstance(theirs, float) else theirs)
    assert sum("DataError" in str(entry) for entry in three) == 3


# ---- what becomes of them --------------------------------------------------------------------------------------------

ENDLESS = """
step = new_step(count)
step(*batch())
print(json.dumps({"leader": os.getpid(), "ranks": [pid for pid, _ in world().processes]}), flush=True)
from minivit.errors import WorkerError
try:
    while True:
        steps = step.opt.steps
        step(*batch())
except WorkerError as error:
    assert step.opt.steps == steps
    sys.exit(f"saved: {error.what}")
"""


def named_memory():
    return {name for name in os.listdir("/dev/shm") if "mpich" in name} if os.path.isdir("/dev/shm") else set()


@needs_mpi
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only /proc tells whether a process is a zombie")
@pytest.mark.parametrize(
    ("who", "number", "said"),
    [
        ("rank 2", signal.SIGKILL, "saved: rank 2 of 3, process {pid}, has ended"),
        ("rank 0", signal.SIGKILL, "saved: rank 0 of 3, process {pid}, has ended"),
        ("rank 1", signal.SIGSTOP, "saved: rank 1 of 3, process {pid} on .*, has shown no sign of life for 2 seconds"),
        ("leader", signal.SIGKILL, "process {pid}, which trained, was ended by SIGKILL"),
        ("mpiexec", signal.SIGKILL, ""),
    ],
)
def test_whichever_is_ended_all_end_and_nothing_is_left(who, number, said, tmp_path):
    before = named_memory()
    process = ranks(3, ENDLESS, tmp_path, wait=False)
    pids = json.loads(process.stdout.readline())
    everyone = [pids["leader"], *pids["ranks"], process.pid]
    assert all(map(lives, everyone))
    place = int(who.split()[1]) if who.startswith("rank") else None
    pid = process.pid if who == "mpiexec" else pids["leader"] if place is None else pids["ranks"][place]
    started = time.monotonic()
    os.kill(pid, number)
    _, err = process.communicate(timeout=60)
    while any(map(lives, everyone)) and time.monotonic() - started < 10:
        time.sleep(0.05)
    assert not any(map(lives, everyone)), f"alive after 10 s: {err}"
    assert process.returncode != 0 and named_memory() <= before
    assert re.search(said.format(pid=pid), err), err


# ---- runs ------------------------------------------------------------------------------------------------------------

TRAIN = [
    "-m",
    "minivit",
    "train",
    "--set",
    "data.overfit=64",
    "--set",
    "model.depth=1",
    "--epochs",
    "3",
    "--batch-size",
    "16",
]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@needs_mpi
def test_a_run_of_ranks_is_the_run_of_one_process(tmp_path):
    out = mpiexec(3, [*TRAIN, "--name", "three"], tmp_path)
    assert "3 ranks" in out and out.count("run folder") == 1
    mpiexec(1, [*TRAIN, "--name", "one", "-q"], tmp_path)
    assert "workers = 3" in (tmp_path / "runs/three/config.toml").read_text()
    one, three = rows_of(tmp_path / "runs/one"), rows_of(tmp_path / "runs/three")
    assert len(one) == len(three) > 3
    for ours, theirs in zip(three, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


@needs_mpi
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--workers", "5"], "--workers 5, and mpiexec has started 2 processes"),
        (["--device", "cuda"], "CuPy is not installed"),
    ],
)
def test_what_cannot_be_is_said_once(more, says, tmp_path):
    process = mpiexec(2, [*TRAIN, *more], tmp_path, wait=False)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count(says) == 1
    assert not (tmp_path / "runs").exists()


def test_the_place_among_ranks():
    place = lambda **environ: place_among_ranks(environ)
    assert place() is None
    assert place(PMI_RANK="0", PMI_SIZE="1") is None
    assert place(PMI_RANK="1", PMI_SIZE="4") == (1, 4)
    assert place(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="2") == (0, 2)
    assert place(PMI_RANK="0", PMI_SIZE="4", MINIVIT_RANKS="7") is None
    assert place(PMI_RANK="x", PMI_SIZE="4") is None


def test_a_number_of_workers_that_is_not_that_of_the_ranks(monkeypatch):
    monkeypatch.setattr(crew, "world", lambda: SimpleNamespace(count=3))
    assert crew.Crew(3, mv.TrainStep).called == "ranks" and crew.Crew(1, mv.TrainStep).count == 1
    with pytest.raises(ConfigError, match="workers=2 among 3 ranks"):
        crew.Crew(2, mv.TrainStep)


def test_without_mpi4py(monkeypatch):
    monkeypatch.setattr(mpi, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mpi4py(?s:.*)minivit\[mpi\]"):
        take_part(0, 2, [], print)
