"""Runs and saves killed with SIGKILL at random moments. This file is also the child process that gets killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import minivit as mv
from minivit.backend import random_bits
from minivit.data import Affine, Dataset, Loader
from minivit.errors import CheckpointError
from minivit.train import AdamW, Trainer, load_checkpoint, parameters_hash, save_checkpoint, warmup_cosine

EPOCHS, BATCHES = 4, 7


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
    trainer = Trainer(model, opt, folder=folder, **{**defaults, "save_every": 1, "quiet": True, **settings})
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


def finish(child, kill_signal=None):
    """Send the signal, if any; return (return code, stdout, stderr)."""
    if kill_signal is not None:
        child.send_signal(kill_signal)
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err


def test_a_run_killed_ten_times_ends_with_the_uninterrupted_runs_parameters(tmp_path):
    trainer, train, valid = small_run(tmp_path / "whole")
    started = time.perf_counter()
    history = trainer.fit(train, valid)
    seconds = time.perf_counter() - started
    expected = parameters_hash(trainer.model)

    kills, runs, steps, moments = 0, 0, [], random.Random(1)
    while kills < 10 or code != 0:  # noqa: F821  (set below)
        folder = tmp_path / f"killed{runs}"
        child = start_child("train", folder)
        if kills < 10:
            time.sleep(moments.uniform(0.0, seconds / 3))
        code, out, err = finish(child, signal.SIGKILL if kills < 10 else None)
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
        if code == 0:
            assert out == f"{expected}\n"
            runs += 1
        elif (last := folder / "checkpoints" / "last.npz").exists():
            steps.append(int(load_checkpoint(last).arrays["optimizer/steps"]))
    assert runs >= 1 and len(set(steps)) >= 2, f"the kills were not spread over the run: {steps}"
    resumed = small_run(folder)[0].progress.history
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in resumed]
    assert timeless == [{k: v for k, v in row.items() if "second" not in k} for row in history]


def test_no_checkpoint_is_unreadable_after_thirty_kills_while_saving(tmp_path):
    code, out, err = finish(start_child("save", tmp_path))
    assert code == 0, err
    kills, temporaries, unreadable = map(int, out.split())
    assert kills == 30 and unreadable == 0
    assert temporaries >= 5, "most kills should have hit a save under way"


def test_sigterm_and_sigint_save_and_end_with_their_codes(tmp_path):
    trainer, train, valid = small_run(None)
    trainer.fit(train, valid)
    last, seen = tmp_path / "checkpoints" / "last.npz", None
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        child = start_child("train", tmp_path)
        while not last.exists() or last.stat().st_ino == seen:  # a step has not yet been saved
            assert child.poll() is None, child.communicate()
            time.sleep(0.002)
        code, _, err = finish(child, number)
        assert code == expected, err
        assert f"continue with\n  Trainer.resume({str(last)!r})\n" in err  # no command has made this run
        assert "Traceback" not in err
        seen = last.stat().st_ino
    code, out, err = finish(start_child("train", tmp_path))
    assert (code, out) == (0, f"{parameters_hash(trainer.model)}\n"), err


# ---- what the children do --------------------------------------------------------------------------------------------


def _train(folder: Path) -> None:
    trainer, train, valid = small_run(folder)
    trainer.fit(train, valid)
    print(parameters_hash(trainer.model))


def _save(folder: Path) -> None:
    """Kill 30 forks of this process that save without pause; print kills, temporary files left, unreadable files."""
    path, moments = folder / "last.npz", random.Random(2)
    save_checkpoint(path, {"a": np.zeros(1 << 17)}, {"n": -1})
    temporaries = unreadable = 0
    for _ in range(30):
        child = os.fork()
        if child == 0:
            for n in range(1 << 30):
                save_checkpoint(path, {"a": np.full(1 << 17, float(n))}, {"n": n})
        time.sleep(moments.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        temporaries += path.with_name("last.npz.tmp").exists()
        try:
            checkpoint = load_checkpoint(path)
            unreadable += not (checkpoint.arrays["a"] == max(checkpoint.meta["n"], 0)).all()
        except CheckpointError:
            unreadable += 1
    print(30, temporaries, unreadable)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    print("ready", flush=True)
    {"train": _train, "save": _save}[sys.argv[1]](Path(sys.argv[2]))
