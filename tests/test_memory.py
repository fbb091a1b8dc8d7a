"""Memory: a long run does not grow, and a step for which there is none left changes nothing.

MINIVIT_STEPS=3000 takes as many steps as are promised not to leak, of a larger model than the 100 of the default.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit.autograd.op import OPS
from minivit.backend import memory_in_use, uniform
from minivit.train import AdamW, TrainStep
from tests.test_kill import FEATURES

STEPS = int(os.environ.get("MINIVIT_STEPS", "100"))
ROOT = Path(__file__).parents[1]


def child(name, *arguments, cwd):
    """Run a function of this file in a process of its own; return what it returns."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    program = [sys.executable, "-m", "tests.test_memory", name, *map(str, arguments)]
    done = subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# ---- no drift --------------------------------------------------------------------------------------------------------


def drift(steps, folder, archive):
    """Run the command for some steps with the collector off; return the memory in use after each step, in bytes."""
    from minivit.cli.main import main

    used, real = [], TrainStep.submit

    def submit(self, images, labels):
        submitted = real(self, images, labels)
        used.append(memory_in_use())
        return submitted

    TrainStep.submit = submit
    gc.disable()
    name, epoch = "digits", 27  # steps, of two batches of 64 from 3,441 digits
    sizes = []
    if int(steps) < 1000:  # the suite should be quick
        name, epoch, sizes = archive, 6, ["--batch-size=16"]  # from 180 of its 200
        sizes += ["--set=model.depth=1", "--set=model.dim=16", "--set=model.mlp_dim=32"]
    command = ["train", name, "--quiet", *FEATURES, *sizes, "--epochs", str(-(-int(steps) // epoch)), "-o", folder]
    assert main([*command, "--save-every", "20"]) == 0
    return used


def test_a_long_run_does_not_grow(archive, tmp_path):
    used = np.array(child("drift", STEPS, tmp_path, archive, cwd=tmp_path)) / 1e6
    third = len(used) // 3  # the first epochs, evaluations and saves bring memory into use
    grown = np.median(used[-third // 2 :]) - np.median(used[third : third + third // 2])
    print(f"{len(used)} steps: {used[0]:.1f} MB, {used[third]:.1f} MB after a third, {used[-1]:.1f} MB at the end")
    print(f"drift {grown:.2f} MB")
    assert len(used) >= STEPS
    assert grown < 3.0


# ---- none left -------------------------------------------------------------------------------------------------------


def small():
    settings = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.2}
    model = mv.ViT(8, 4, 1, 4, dim=8, depth=1, heads=2, seed=1, **settings)
    return model, AdamW(model.named_parameters(), lr=1e-2)


def everything(model, opt):
    """Return the bits of parameters and optimizer state."""
    arrays = model.state_dict() | opt.state_dict()
    return {name: array.tobytes() for name, array in arrays.items()}


IMAGES, LABELS = uniform(mv.Key(1), (6, 1, 8, 8)), np.arange(6) % 4


class Scarce:
    """Makes the N-th call of any operation's forward or gradient fail as an allocation does."""

    def __init__(self, monkeypatch):
        self.left = 0
        for op in OPS.values():
            for it in (op, *op.twins.values()):
                for name in ("forward", "_vjp"):
                    if (function := getattr(it, name)) is not None:
                        monkeypatch.setattr(it, name, self.counted(function))
            monkeypatch.setattr(op, "_vjps", tuple(map(self.counted, op._vjps)))

    def counted(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no memory left")
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("threads", [1, 2])
def test_the_nth_allocation_of_a_step_may_fail(monkeypatch, threads):
    """Parameters and optimizer stay as they were, to the bit, and the next step is the one that it would have been."""
    model, opt = small()
    step = TrainStep(model, opt, threads=threads, micro_batch=3, clip_norm=1.0)
    step(IMAGES, LABELS)
    before = everything(model, opt)
    scarce, n = Scarce(monkeypatch), 0
    while True:
        n += 1
        scarce.left = n
        try:
            step(IMAGES, LABELS)
        except MemoryError:
            assert everything(model, opt) == before, f"allocation {n}"
            continue
        break
    scarce.left = 0  # no more failures
    assert n > 50
    fresh, fresh_opt = small()
    again = TrainStep(fresh, fresh_opt, threads=threads, micro_batch=3, clip_norm=1.0)
    for _ in range(2):
        again(IMAGES, LABELS)
    assert everything(model, opt) == everything(fresh, fresh_opt)


def scarce(folder):
    """Take steps while the system refuses more memory, ever later in the step; return how many failed, and how well."""
    model = mv.ViT(32, 4, 3, 10, dim=48, depth=2, heads=2, seed=1)
    opt = AdamW(model.named_parameters())
    step = TrainStep(model, opt, threads=1, micro_batch=256)
    images, labels = uniform(mv.Key(1), (256, 3, 32, 32)), np.arange(256) % 10
    step(images[:1], labels[:1])  # what BLAS, threads and modules need they have
    before, steps, failed, changed = everything(model, opt), opt.steps, 0, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for more in range(0, 1 << 30, 8_000_000):
        with open("/proc/self/statm") as f:
            in_use = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (in_use + more, hard))
        try:
            step(images, labels)
            break
        except MemoryError:
            failed += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        changed += everything(model, opt) != before
    return {"failed": failed, "changed": changed, "steps": opt.steps - steps}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on the address space")
def test_a_step_that_the_system_refuses_memory_changes_nothing(tmp_path):
    found = child("scarce", tmp_path, cwd=tmp_path)
    print(f"{found['failed']} steps failed for want of memory")
    assert found["failed"] >= 5 and found["changed"] == 0 and found["steps"] == 1


if __name__ == "__main__":
    print(json.dumps({"drift": drift, "scarce": scarce}[sys.argv[1]](*sys.argv[2:])))
