"""Runs and saves killed with SIGKILL at random moments, and processes that want the same folder.

This file is also the child process that gets killed. For the counts that are promised: MINIVIT_KILLS=500 kills while
saving, MINIVIT_RESUMES=20 kills of the command, MINIVIT_RACES=200 races.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit.backend import random_bits
from minivit.cli.main import main
from minivit.data import Affine, Dataset, Loader
from minivit.errors import CheckpointError, ConfigError, Stopped
from minivit.files import unfinished
from minivit.runs.folder import make_folder
from minivit.train import AdamW, Trainer, load_checkpoint, parameters_hash, save_checkpoint, warmup_cosine
from minivit.train.lock import RunLock
from minivit.weights.checkpoint import sweep

EPOCHS, BATCHES = 4, 7
KILLS, RESUMES, RACES = (
    int(os.environ.get(f"MINIVIT_{name}", default)) for name, default in [("KILLS", 20), ("RESUMES", 1), ("RACES", 10)]
)
FEATURES = [
    *("--grad-accum-steps=2", "--model-ema=0.9", "--mixup=0.8", "--cutmix=1.0", "--smoothing=0.1"),
    *("--drop-path=0.1", "--dropout=0.1", "--set=data.randaugment=9", "--set=data.erasing=0.3", "--set=data.crop=1"),
    *("--set=data.flip=true", "--set=data.degrees=10", "--set=data.shift=0.5", "--set=data.jitter=0.2"),
]
"""All that a resumed run of the command has to continue exactly."""


def small_run(folder, **settings):
    """Return (trainer, train, valid) of a run with everything random switched on; resumed if ``folder`` holds one."""
    key = mv.Key(5)
    images = (random_bits(key.child(0), (150, 1, 8, 8)) >> np.uint32(26)).astype(np.uint8)  # noise …
    labels = (random_bits(key.child(1), (150,)) % np.uint32(4)).astype(np.int64)
    for c in range(4):
        images[labels == c, :, c // 2 :: 2, c % 2 :: 2] += np.uint8(100)  # … under a pattern that tells the class
    data = Dataset(images, labels, ("a", "b", "c", "d"), "patterns")
    train_set, valid_set = data.subset(range(100)), data.subset(range(100, 150))
    train = Loader(train_set, 16, key.child(2), augment=Affine(2.0, 0.02, 0.02, 0.1))
    valid = Loader(valid_set, 32, key.child(3), mean=train.mean, std=train.std, shuffle=False)
    model = mv.ViT(
        8, 2, 1, 4, dim=16, depth=2, heads=2, dropout=0.1, attention_dropout=0.1, embed_dropout=0.1, drop_path=0.2
    )
    opt = AdamW(model.named_parameters())
    schedule = warmup_cosine(1e-2, EPOCHS * BATCHES, BATCHES)
    defaults = {"schedule": schedule, "epochs": EPOCHS, "seed": 3, "clip_norm": 1.0, "threads": 2, "micro_batch": 9}
    trainer = Trainer(model, opt, folder=folder, **{**defaults, "save_every": 1, **settings})
    if folder is not None and (last := Path(folder) / "checkpoints" / "last.npz").exists():
        trainer.resume(last)
    return trainer, train, valid


def start_child(*args):
    """Start this file as a program; return once it has said that its imports are done."""
    command = [sys.executable, "-m", "tests.test_kill", *map(str, args)]
    root = Path(__file__).parent.parent
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n", child.communicate()
    return child


def finish(child, kill_signal=None, timeout=60):
    """Send the signal, if any; return (return code, stdout, stderr)."""
    if kill_signal is not None:
        child.send_signal(kill_signal)
    out, err = child.communicate(timeout=timeout)
    return child.returncode, out, err


def timeless(rows):
    """Return rows of a record without what differs from run to run."""
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


def saved_at(path):
    return path.stat().st_mtime_ns if path.exists() else None


@pytest.fixture(scope="module")
def whole():
    """The trainer of a run that nothing has disturbed."""
    trainer, train, valid = small_run(None)
    trainer.fit(train, valid)
    return trainer


def test_a_run_killed_again_and_again_ends_with_the_uninterrupted_runs_parameters(whole, tmp_path):
    code, out, err = finish(start_child("train_killed", tmp_path), timeout=120)
    assert code == 0, err
    steps = json.loads(out)
    assert len(set(steps)) >= 2, f"the kills were not spread over the run: {steps}"
    for folder in tmp_path.iterdir():
        resumed = small_run(folder)[0]
        assert parameters_hash(resumed.model) == parameters_hash(whole.model), steps
        assert timeless(resumed.progress.history) == timeless(whole.progress.history)


def test_no_checkpoint_is_unreadable_after_kills_while_saving(tmp_path):
    code, out, err = finish(start_child("save", tmp_path), timeout=30 + KILLS)
    assert code == 0, err
    kills, temporaries, unreadable = map(int, out.split())
    print(f"{kills} kills, {temporaries} of them during a save, {unreadable} checkpoints unreadable")
    assert kills == KILLS and unreadable == 0
    assert temporaries >= kills // 6, "most kills should have hit a save under way"


def test_sigterm_and_sigint_save_and_end_with_their_codes(whole, tmp_path):
    last, seen = tmp_path / "checkpoints" / "last.npz", None
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = start_child("train", tmp_path)
        while saved_at(last) == seen:  # a step has not yet been saved
            assert child.poll() is None, child.communicate()
            time.sleep(0.002)
        code, _, err = finish(child, number)
        assert code == expected, err
        assert f"  → continue with Trainer.resume({str(last)!r}), and fit\n" in err
        assert "Traceback" not in err
        seen = saved_at(last)
    resumed, train, valid = small_run(tmp_path)
    resumed.fit(train, valid)
    assert parameters_hash(resumed.model) == parameters_hash(whole.model)


# ---- the real command ------------------------------------------------------------------------------------------------


def command(*args, cwd):
    """Start ``minivit train``."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "minivit", "train", *map(str, args), "--quiet"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(program, cwd=cwd, env=environment, text=True, **pipes)


def wait_for(path, child):
    while not path.exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)


def state(folder):
    """Return a run's parameters, optimizer state and records, but for its times."""
    last = load_checkpoint(folder / "checkpoints" / "last.npz")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: array.tobytes() for name, array in last.arrays.items()}, timeless(rows)


@pytest.fixture(scope="module")
def settings(archive):
    """The arguments for a run, on few digits, with all features."""
    size = [f"--set=model.{name}" for name in ("dim=16", "depth=2", "heads=2", "mlp_dim=32")]
    return [str(archive), *size, *FEATURES, "--epochs=2", "--batch-size=16", "--save-every=1"]


def test_the_command_killed_anywhere_is_resumed_to_the_same_bits(settings, tmp_path):
    started = time.time()
    assert main(["train", *settings, "--name", "whole", "-o", str(tmp_path), "--quiet"]) == 0
    seconds = (tmp_path / "whole" / "checkpoints" / "last.npz").stat().st_mtime - started  # of training
    expected, moments, steps = state(tmp_path / "whole"), random.Random(3), []
    while len(steps) < RESUMES:
        folder = tmp_path / f"killed{len(steps)}"
        shutil.rmtree(folder, ignore_errors=True)
        child = command(*settings, "--name", folder.name, "-o", tmp_path, cwd=tmp_path)
        wait_for(folder / "checkpoints" / "last.npz", child)
        time.sleep(moments.uniform(0, seconds))
        code, _, err = finish(child, signal.SIGKILL)
        if code == 0:  # it was over already
            continue
        assert code == -signal.SIGKILL, err
        steps.append(int(load_checkpoint(folder / "checkpoints" / "last.npz").arrays["optimizer/steps"]))
        assert main(["train", "--resume", str(folder), "--quiet"]) == 0
        assert state(folder) == expected, f"killed after step {steps[-1]}"
    print(f"killed after steps {sorted(steps)}: all resumed to the same bits")


def test_two_commands_at_once_get_folders_of_their_own(settings, tmp_path):
    for race in range(max(1, RACES // 20)):
        runs = tmp_path / str(race)
        both = [command(*settings, "--epochs=1", "-o", runs, cwd=tmp_path) for _ in range(2)]
        assert [finish(child)[0] for child in both] == [0, 0]
        assert sorted(path.name for path in runs.iterdir()) == ["few-1", "few-2"]
        assert state(runs / "few-1") == state(runs / "few-2")


# ---- one folder, one process -----------------------------------------------------------------------------------------


def test_no_race_for_a_folder_has_two_winners(tmp_path):
    code, out, err = finish(start_child("race", tmp_path), timeout=60 + RACES)
    assert code == 0, err
    print(out, end="")
    races, double, unnamed, shared = map(int, out.split()[1::2])
    assert (races, double, shared) == (RACES, 0, 0)
    assert unnamed < races, "the refused process should learn who has the folder"  # but just before it is signed


def test_a_folder_in_use_is_refused_and_its_owner_named(tmp_path):
    with RunLock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == str(os.getpid())
        with pytest.raises(ConfigError, match=rf"run is in use by process {os.getpid()}\n") as caught:
            RunLock(tmp_path / "run").__enter__()
        assert caught.value.remedy
        code, _, err = finish(start_child("train", tmp_path / "run"))
        assert code == 1 and f"run is in use by process {os.getpid()}" in err
        with RunLock(tmp_path / "other"), RunLock(None):
            pass
    assert not list(tmp_path.rglob(".lock"))


def test_a_file_of_somebody_elses_is_no_lock(tmp_path):
    mine, lock = tmp_path / "mine", tmp_path / ".lock"
    mine.write_text("my notes")
    for make in (lock.symlink_to, lambda mine: lock.write_bytes(mine.read_bytes())):
        make(mine)
        with pytest.raises(CheckpointError, match="cannot lock"), RunLock(tmp_path):
            pass
        assert lock.read_text() == mine.read_text() == "my notes"
        lock.unlink()


def test_a_lock_can_be_entered_again_by_its_holder_only(tmp_path):
    with (lock := RunLock(tmp_path)):
        with lock:
            pass
        with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_killed_owner_locks_nobody_out(tmp_path):
    child = start_child("hold", tmp_path)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {child.pid}"), RunLock(tmp_path):
        pass
    finish(child, signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with RunLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_without_flock_the_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("minivit.train.lock.fcntl", None)
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}") as caught, RunLock(tmp_path):
            pass
        assert f"remove {tmp_path / '.lock'}" in caught.value.remedy
        assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_trained_on(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("minivit.train.lock.fcntl.flock", flock)
    with RunLock(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_one(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "run"):
        with pytest.raises(CheckpointError, match="cannot lock"), RunLock(folder):
            pass


# ---- what the children do --------------------------------------------------------------------------------------------


def _train(folder: Path) -> None:
    trainer, train, valid = small_run(folder)
    try:
        trainer.fit(train, valid)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.code)


def _train_killed(folder: Path) -> None:
    """Train, and again where a run is over, until five processes have been killed; print the steps saved by then.

    Every other process may not even have saved a step.
    """
    steps, kills, runs, over, moments = [], 0, 0, False, random.Random(1)
    while kills < 5 or not over:
        last = folder / str(runs) / "checkpoints" / "last.npz"
        before = saved_at(last)
        child = multiprocessing.get_context("fork").Process(target=_train, args=(folder / str(runs),))
        child.start()
        if kills < 5:
            while kills % 2 == 0 and saved_at(last) == before and child.is_alive():
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.1))
            child.kill()
        child.join()
        over = child.exitcode == 0
        assert over or child.exitcode == -signal.SIGKILL
        runs, kills = runs + over, kills + (not over)
        if not over and last.exists():
            steps.append(int(load_checkpoint(last).arrays["optimizer/steps"]))
    print(json.dumps(steps))


def _save(folder: Path) -> None:
    """Kill forks of this process that save without pause; print kills, temporary files left, unreadable files."""
    path, moments = folder / "last.npz", random.Random(2)
    save_checkpoint(path, {"a": np.zeros(1 << 17)}, {"n": -1})
    temporaries = unreadable = 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            (folder / "begun").touch()
            for n in range(1 << 30):
                save_checkpoint(path, {"a": np.full(1 << 17, float(n))}, {"n": n})
        while not (folder / "begun").exists():
            time.sleep(0.001)
        (folder / "begun").unlink()
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        temporaries += bool(unfinished(folder))
        sweep(folder)
        try:
            checkpoint = load_checkpoint(path)
            unreadable += not (checkpoint.arrays["a"] == max(checkpoint.meta["n"], 0)).all()
        except CheckpointError:
            unreadable += 1
    print(KILLS, temporaries, unreadable)


def _hold(folder: Path) -> None:
    with RunLock(folder):
        print("held", flush=True)
        time.sleep(60)


OWNED, REFUSED, UNNAMED, DOUBLE = range(10, 14)


def _race(folder: Path) -> None:
    """Let two forks want the same folder at once, again and again; print how often what went wrong."""
    double = unnamed = shared = 0
    for race in range(RACES):
        go, refused = os.pipe(), os.pipe()
        children = []
        for _ in range(2):
            children.append(os.fork())
            if children[-1] == 0:
                signal.alarm(20)  # two owners would wait for ever
                os.read(go[0], 1)
                os._exit(_contend(folder / str(race), refused))
        os.write(go[1], b"ab")
        codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        double += codes not in ([OWNED, REFUSED], [OWNED, UNNAMED])
        unnamed += UNNAMED in codes
        shared += sorted(p.name for p in (folder / str(race)).iterdir()) != ["few-1", "few-2"]
        for end in (*go, *refused):
            os.close(end)
    print(f"races {RACES} double {double} unnamed {unnamed} shared {shared}")


def _contend(folder: Path, refused: tuple[int, int]) -> int:
    try:
        with RunLock(folder):
            os.read(refused[0], 1)  # held until the other one has been refused
        code = OWNED
    except ConfigError as error:
        code = REFUSED if "by process" in error.what else UNNAMED
        os.write(refused[1], b"x")
    for _ in range(50):  # and now with locks that come and go
        with contextlib.suppress(ConfigError), RunLock(folder):
            try:
                os.close(os.open(folder / "owner", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return DOUBLE
            os.unlink(folder / "owner")
    make_folder(folder, None, "few")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    print("ready", flush=True)
    what = {"train": _train, "train_killed": _train_killed, "save": _save, "hold": _hold, "race": _race}
    what[sys.argv[1]](Path(sys.argv[2]))
