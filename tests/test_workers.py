"""Processes that share the rows of a batch: equal results, whatever they are told, and what becomes of them."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import normal, random_bits
from minivit.backend.children import CAN_INHERIT
from minivit.errors import ConfigError, DataError, WorkerError
from minivit.train import crew, peer

pytestmark = pytest.mark.skipif(not CAN_INHERIT, reason="this system has no processes that inherit memory")
SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 10, "dim": 16, "depth": 2, "heads": 2}


def batch(rows=12, step=0):
    images = normal(mv.Key(1, step), (rows, 1, 8, 8))
    return images, (random_bits(mv.Key(2, step), (rows,)) % 10).astype(np.int64)


def new_step(count, loss=ops.cross_entropy, kind=mv.TrainStep, **settings):
    model = mv.ViT(**SMALL, **settings).to(np.float64)
    opt = mv.optim.AdamW(model.named_parameters(), lr=1e-2)
    return kind(model, opt, loss, clip_norm=1.0, threads=1, micro_batch=2, workers=count)


def trained(step, steps, rows=12):
    """Return (loss, norm, right) of each step, and the parameters at the end; end the workers."""
    try:
        found = []
        for i in range(steps):
            found.append((step(*batch(rows, i)), step.grad_norm, step.right))
        return np.array(found), step.model.state_dict()
    finally:
        step.crew.close()


def processes(step):
    return [follower.process for follower in step.crew.workers.followers]


def lives(pid):
    """Tell whether a process is there, and no zombie where /proc tells."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # there is no /proc, or it has just ended: the next look tells
        return True


@pytest.fixture
def two(request):
    """Return a step of two processes that has begun to work; end them after the test."""
    step = new_step(2)
    step(*batch())
    yield step
    step.crew.close()


# ---- equal results ---------------------------------------------------------------------------------------------------


def test_any_number_of_workers_makes_the_same_steps():
    """With dropout, drop path and clipping; and one number of them the same bits."""
    settings = {"dropout": 0.1, "drop_path": 0.2}
    loss = partial(ops.cross_entropy, smoothing=0.1)
    alone, weights = trained(new_step(1, loss, **settings), 100)
    for count in (2, 4):
        found, theirs = trained(new_step(count, loss, **settings), 100)
        np.testing.assert_allclose(found, alone, rtol=1e-10)
        for name, p in weights.items():
            np.testing.assert_allclose(theirs[name], p, rtol=1e-7, atol=1e-9, err_msg=name)
        if count == 2:
            again, bits = trained(new_step(2, loss, **settings), 100)
            assert (again == found).all() and all((bits[name] == theirs[name]).all() for name in bits)


def test_batches_smaller_than_the_crew_and_labels_that_are_shares():
    one, three = new_step(1), new_step(3)
    try:
        for rows in (5, 1, 2):
            images, labels = batch(rows)
            for given in (labels, np.eye(10)[labels] * 0.9 + 0.01):
                assert three(images, given) == pytest.approx(one(images, given), rel=1e-12)
                assert three.right == one.right
    finally:
        three.crew.close()


def test_what_changes_about_the_model_reaches_the_workers(two):
    """What is frozen, what is in eval mode, another loss: they are started anew; a frozen value: they share it."""
    one = new_step(1)
    one(*batch())

    def both(change=None):
        for step in (one, two):
            if change is not None:
                change(step)
        assert two(*batch(12, 7)) == pytest.approx(one(*batch(12, 7)), rel=1e-12)
        ours, theirs = one.model.state_dict(), two.model.state_dict()
        assert all(np.allclose(ours[name], theirs[name], rtol=1e-7, atol=1e-9) for name in ours)

    def freeze(step):
        step.model.blocks[0].mlp.fc1.weight.requires_grad = False

    def spoil(step):
        step.model.blocks[0].mlp.fc1.weight.data[...] *= 2

    def smooth(step):
        step.loss = partial(ops.cross_entropy, smoothing=0.3)

    before = processes(two)
    both()
    assert processes(two) == before
    both(freeze)
    assert processes(two) != before and all(process.poll() is not None for process in before)
    before = processes(two)
    both(spoil)
    assert processes(two) == before
    both(smooth)


def test_frozen_parameters_are_shared_from_the_start():
    steps = []
    for count in (1, 2):
        model = mv.ViT(**SMALL).to(np.float64)
        model.patch_embed.proj.weight.requires_grad = False
        steps.append(mv.TrainStep(model, mv.optim.AdamW(model.named_parameters()), threads=1, workers=count))
    one, two = steps
    try:
        for i in range(3):
            assert two(*batch(12, i)) == pytest.approx(one(*batch(12, i)), rel=1e-12)
            for step in steps:
                step.model.patch_embed.proj.weight.data[...] += 0.1
    finally:
        two.crew.close()


# ---- what cannot be told to another process --------------------------------------------------------------------------


class OwnStep(mv.TrainStep):
    """A step of somebody's own."""


def own_loss(logits, labels):
    return ops.cross_entropy(logits, labels)


def with_another_eps(step):
    step.model.norm.eps = 1e-3
    return step


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: new_step(2, own_loss), "own_loss is a loss of your own"),
        (lambda: new_step(2, kind=OwnStep), "OwnStep is a step of your own"),
        (lambda: with_another_eps(new_step(2)), "the model's norm.eps is not as its settings make it"),
    ],
)
def test_what_is_of_ones_own_is_worked_on_alone(make, why):
    step = make()
    assert step(*batch()) > 0
    assert step.crew.workers is None and re.fullmatch(why, step.crew.why_alone)
    assert step.crew.why_alone in step.crew.remark


@pytest.mark.parametrize("count", [0, -1, 257, 1.5, "2", None])
def test_a_number_of_workers_that_cannot_be(count):
    with pytest.raises(ConfigError, match="workers="):
        crew.Crew(count, mv.TrainStep)


# ---- errors, and ends ------------------------------------------------------------------------------------------------


def test_an_error_in_a_workers_rows_is_as_in_ones_own(two):
    images, labels = batch()
    before = two.model.state_dict()
    wrong = labels.copy()
    wrong[-1] = 11
    with pytest.raises(DataError, match="label 11 at row 11 is outside"):
        two(images, wrong)
    assert all((before[name] == p).all() for name, p in two.model.state_dict().items())
    wrong = labels.copy()
    wrong[0] = 11  # in this process's: the other's answer is left behind, and must not be taken for the next one
    with pytest.raises(DataError, match="11"):
        two(images, wrong)
    wrong = np.full_like(labels, 11)  # in both: this process's error is told, and the other's not with the next batch
    with pytest.raises(DataError, match="11"):
        two(images, wrong)
    one = new_step(1)
    one(images, labels)
    assert two(images, labels) == pytest.approx(one(images, labels), rel=1e-12)


def test_a_worker_that_dies_leaves_the_last_whole_step(two):
    before = two.model.state_dict()
    (process,) = processes(two)
    process.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=rf"worker 2 of 2, process {process.pid}, was ended by SIGKILL"):
        two(*batch())
    assert time.monotonic() - started < 10
    assert all((before[name] == p).all() for name, p in two.model.state_dict().items())


def test_a_worker_that_hangs_is_found_out(two, monkeypatch):
    monkeypatch.setattr(peer, "SILENCE", 1)
    (process,) = processes(two)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(WorkerError, match="has shown no sign of life"):
        two(*batch())
    two.crew.close()
    assert process.poll() is not None


def test_the_crew_leaves_nothing_behind():
    """Neither a process nor a descriptor; and a copy of a step, or a pickle, works by itself."""
    descriptors = lambda: len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    before = descriptors()
    step = new_step(2)
    step(*batch())
    twin = copy.deepcopy(step)
    ended = processes(step)
    assert twin.crew.workers is None and twin.crew.count == 2
    expected = step(*batch(12, 3))
    step.crew.close()
    assert all(process.poll() == 0 for process in ended)
    assert twin(*batch(12, 3)) == expected  # in processes of its own
    alive = processes(twin)
    del twin, step
    assert all(process.poll() == 0 for process in alive)
    assert descriptors() == before


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.test_workers import batch, new_step, processes
step = new_step(2)
step(*batch())
print(*[p.pid for p in processes(step)], flush=True)
while True:
    step(*batch())
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    root = str(Path(__file__).parent.parent)
    script = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(root=root)], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    pid = int(script.stdout.readline())
    script.kill()
    script.wait()
    script.stdout.close()
    end = time.monotonic() + 5
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not lives(pid), f"worker {pid} is still there after 5 s"


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_that_loses_a_worker_is_saved_and_goes_on_with_another_number(tmp_path):
    settings = {"data.overfit": 64, "train.epochs": 3, "train.batch_size": 16, "train.dtype": "float32"}
    model = {"model.name": "vit_digits", "model.depth": 1, "model.dim": 16, "model.heads": 2, "model.mlp_dim": 16}

    class Killer(mv.train.Observer):
        def step(self, trainer, row):
            if row["step"] == 6 and trainer.step.crew.workers is not None:
                processes(trainer.step)[0].kill()

    whole = mv.runs.train(settings=settings | model, output=tmp_path, name="whole")
    with pytest.raises(WorkerError, match="was ended by SIGKILL"):
        mv.runs.train(settings=settings | model, workers=2, output=tmp_path, name="hurt", observers=[Killer()])
    hurt = mv.runs.resume(tmp_path / "hurt", workers=1)
    assert [row["step"] for row in hurt.history] == [row["step"] for row in whole.history]
    for ours, theirs in zip(hurt.history, whole.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
