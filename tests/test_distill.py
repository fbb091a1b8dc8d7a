"""Learning from a teacher: DeiT's losses, a student and its teacher, and a run with one."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import normal
from minivit.cli.main import main
from minivit.errors import ConfigError, ShapeError
from minivit.nn.module import mode
from minivit.train.distill import Student, distillation
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from tests.test_options import IMAGES, relative, small


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_is_deits_formula(kind):
    logits, labels, t, share = normal(mv.Key(3), (4, 3, 5)) * 2, np.array([0, 4, 2, 2]), 3.0, 0.3
    p = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    own, taught, teacher = logits.transpose(1, 0, 2)
    expected = -(1 - share) * np.mean([math.log(row[label]) for row, label in zip(p(own), labels, strict=True)])
    if kind == "hard":
        choices = teacher.argmax(axis=1)
        expected -= share * np.mean([math.log(row[c]) for row, c in zip(p(taught), choices, strict=True)])
    else:
        a, b = p(teacher / t), p(taught / t)
        expected += share * t**2 * np.mean(np.sum(a * np.log(a / b), axis=1))
    settings = {"kind": kind, "share": share, "temperature": t}
    assert distillation(mv.tensor(logits), labels, **settings).item() == pytest.approx(expected, rel=1e-12)
    teach = mv.tensor(logits[:, 2:])  # it is held constant: only what the student says has a gradient
    loss = lambda student: distillation(ops.concat([student, teach], axis=1), labels, **settings)
    assert mv.check_grads(loss, [logits[:, :2]]).worst.error <= 1e-12
    with pytest.raises(ConfigError, match="'hard', 'soft'"):
        distillation(mv.tensor(logits), labels, kind="firm")
    with pytest.raises(ShapeError, match="Student"):
        distillation(mv.tensor(own), labels)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_student_gives_three_logits_and_its_teacher_stays_as_it_is(distilled):
    model, teacher = small(distilled=distilled, dropout=0.5), small(pool="mean", dropout=0.9, drop_path=0.9)
    student = Student(model, teacher, scale=[2.0, 0.5], shift=[0.1, -0.2])
    moved = IMAGES * np.reshape([2.0, 0.5], (1, 2, 1, 1)) + np.reshape(np.float32([0.1, -0.2]), (1, 2, 1, 1))
    logits = student(IMAGES)  # in training mode, and the teacher without its dropout
    with mode(False):
        np.testing.assert_allclose(logits[:, 2].numpy(), teacher(moved).numpy(), rtol=1e-12)
        logits = student(IMAGES)
        np.testing.assert_allclose(logits[:, :2].mean(axis=1).numpy(), model(IMAGES).numpy(), rtol=1e-12)
    assert (relative(logits[:, 0].numpy(), logits[:, 1].numpy()) > 1e-3) == distilled
    before = teacher.state_dict()
    distillation(student(IMAGES), np.arange(3)).backward()
    assert all(p.grad is not None for p in model.parameters()) and all(p.grad is None for p in teacher.parameters())
    assert all(np.array_equal(a, before[name]) for name, a in teacher.state_dict().items())
    for wrong in ({"num_classes": 4}, {"in_channels": 3}):
        with pytest.raises(ConfigError, match="the teacher's"):
            Student(model, small(**wrong))


@pytest.mark.usefixtures("small_pictures")
def test_a_run_learns_from_a_teacher(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", str(archive), "--threads", "1", "-q", "--set", "model.depth=1", "--set", "model.dim=16"]
    teacher = Path("runs/teacher/checkpoints/best.npz")
    assert main([*train, "-e", "1", "--name", "teacher"]) == 0
    kept = load_checkpoint(teacher)
    kept.meta["data"] |= {"mean": [0.1], "std": [0.9]}  # as if its images had been standardised otherwise
    save_checkpoint(teacher, kept.arrays, kept.meta)
    taught = [*train, "--teacher", "runs/teacher", "--set", "model.distilled=true", "--distill", "soft"]
    assert main([*taught, "-e", "2", "--name", "whole"]) == 0
    assert main([*taught, "-e", "1", "--set", "train.schedule_epochs=2", "--name", "half"]) == 0
    save_checkpoint(teacher, kept.arrays | {"model/head.bias": kept.arrays["model/head.bias"] + 1}, kept.meta)
    capsys.readouterr()
    assert main(["train", "--resume", "runs/half", "-e", "2", "-q"]) == 1
    assert "other teacher" in capsys.readouterr().err
    save_checkpoint(teacher, kept.arrays, kept.meta)
    assert main(["train", "--resume", "runs/half", "-e", "2", "-q"]) == 0
    whole, half = (load_checkpoint(f"runs/{name}/checkpoints/last.npz").under("model") for name in ("whole", "half"))
    assert whole["dist_token"].any() and whole["head_dist.weight"].any()
    for name, array in whole.items():
        assert np.array_equal(array, half[name]), name

    kept.meta["data"]["classes"] = kept.meta["data"]["classes"][::-1]
    save_checkpoint(teacher, kept.arrays, kept.meta)
    capsys.readouterr()
    assert main([*taught, "-e", "1", "--name", "other"]) == 1
    assert "the teacher" in (told := capsys.readouterr().err) and "has other classes" in told
    assert not Path("runs/other").exists()
