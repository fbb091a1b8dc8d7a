"""Convolution, pooling and group normalisation beside PyTorch, forward and backward, in turns.

    python benchmarks/conv.py [ROUNDS] [--python PYTHON_WITH_PEERS] [--threads N]

Each measurement is a process of its own; minivit cuts a batch as its training step does, PyTorch has it whole and in
its usual layout. Prints a table in Markdown: median milliseconds, and minivit's speed as a ratio to PyTorch's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from configs import time_steps


class Case(NamedTuple):
    """A convolution to ``out`` channels; without these, groups to normalise or, without those, windows to pool."""

    batch: int
    channels: int
    size: int
    out: int = 0
    kernel: int = 3
    stride: int = 1
    images: bool = True  # whether their gradient is wanted
    groups: int = 0


CASES = {
    "3x3 stem, 3 → 64, 32²": Case(128, 3, 32, 64, images=False),
    "3x3 stem, stride 2": Case(128, 3, 32, 64, stride=2, images=False),
    "3x3 stem and its images": Case(128, 3, 32, 64),
    "3x3, 64 → 64, 16²": Case(128, 64, 16, 64),
    "3x3, 64 → 128, 16²": Case(128, 64, 16, 128),
    "3x3, 128 → 128, 8²": Case(128, 128, 8, 128),
    "3x3, 64 → 128, stride 2": Case(128, 64, 16, 128, stride=2),
    "1x1, 256 → 64, 16²": Case(64, 256, 16, 64, 1),
    "max_pool2d 3, stride 2, 64, 32²": Case(128, 64, 32, stride=2),
    "group_norm, 2 groups of 32, 32²": Case(64, 32, 32, groups=2),
}


def call(case: Case, library: Any, x: Any, *weights: Any) -> Any:
    """Return the operation's result; both libraries' functions have the same names and arguments."""
    if case.out:
        return library.conv2d(x, *weights, case.stride, case.kernel // 2)
    if case.groups:
        return library.group_norm(x, case.groups, *weights)
    return library.max_pool2d(x, case.kernel, case.stride, case.kernel // 2)


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Return the shapes of the images and of the weights."""
    weights = [(case.out, case.channels, case.kernel, case.kernel), (case.out,)] if case.out else []
    return [(case.batch, case.channels, case.size, case.size), *weights, *[(case.channels,)] * 2 * bool(case.groups)]


def in_minivit(case: Case, threads: int) -> Callable[..., Any]:
    """Return a function that goes forward and backward once; its arrays lie as in a model that is trained."""
    import numpy as np

    import minivit as mv
    from minivit.autograd.graph import propagate
    from minivit.backend import Team, keep_freed_memory, normal

    keep_freed_memory()
    team = Team(threads, 16)
    x, *weights = (normal(mv.Key(i), shape).astype(np.float32) for i, shape in enumerate(shapes(case)))
    if case.channels > 3:  # what comes from a convolution has its channels next to each other
        x = x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)
    with mv.first_order():
        g = call(case, mv.ops, *map(mv.tensor, (x, *weights))).data

    def work(thread: int, start: int, stop: int) -> None:
        leaves = [mv.tensor(a, requires_grad=True) for a in weights]
        with mv.first_order():
            out = call(case, mv.ops, mv.tensor(x[start:stop], requires_grad=case.images), *leaves)
        list(propagate(out.node, g[start:stop]))

    return lambda *_: team.run(work, case.batch)


def in_torch(case: Case, threads: int) -> Callable[..., Any]:
    """Return the same of PyTorch."""
    import torch

    torch.set_num_threads(threads)
    leaves = [torch.randn(shape, requires_grad=i > 0 or case.images) for i, shape in enumerate(shapes(case))]
    g = call(case, torch.nn.functional, *leaves).detach().clone()
    needed = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda *_: torch.autograd.grad(call(case, torch.nn.functional, *leaves), needed, g)


def measure(python: str, who: str, threads: int) -> dict[str, float]:
    """Return the milliseconds of each case, the median of ten, as a process of its own measures them."""
    command = [python, __file__, "--measure", who, "--threads", str(threads)]
    kept = dict.fromkeys(["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"], str(2**30))  # as minivit tells malloc
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **kept})
    if done.returncode:
        raise SystemExit(f"{who}: {(done.stderr.strip() or 'nothing printed').splitlines()[-1]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--measure", choices=["minivit", "torch"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        make = in_minivit if args.measure == "minivit" else in_torch
        runs = {name: make(case, args.threads) for name, case in CASES.items()}
        print(json.dumps({name: 1e3 * statistics.median(time_steps(run, 0, 0, 10)) for name, run in runs.items()}))
        return
    turn = [(sys.executable, "minivit"), (args.python, "torch")]
    rounds = [[measure(*who, args.threads) for who in turn] for _ in range(args.rounds)]
    print("| | minivit, ms | PyTorch, ms | minivit's speed ÷ its (best ÷ best) |\n|---|---|---|---|")
    for name in CASES:
        ours, theirs = ([r[i][name] for r in rounds] for i in (0, 1))
        ratio = f"{statistics.median(theirs) / statistics.median(ours):.2f} ({min(theirs) / min(ours):.2f})"
        print(f"| {name} | {statistics.median(ours):.1f} | {statistics.median(theirs):.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
