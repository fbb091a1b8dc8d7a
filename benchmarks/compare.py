"""minivit beside PyTorch and JAX, in turns, so that a drift of the machine's speed reaches all alike.

    python benchmarks/compare.py [ROUNDS] [--python PYTHON_WITH_PEERS] [--configs digits cifar ti16 infer] [--save FILE]
                                    [--peers 'PyTorch eager' …] [--device cuda | --workers N]

Training steps of three configurations, and inference of one. Each measurement is a process of its own, on all cores.
Prints a table in Markdown: medians over the rounds; minivit's speed as a ratio to the peer's in the same round, with
the smallest and the largest; minivit's memory as a ratio to the peer's. ``--save`` draws it as SVG. A peer that the
Python cannot run is left out. On a GPU the memory is the device's, all is float32, and JAX does not take part. With
``--workers`` minivit's training steps are those of so many processes, and its own, of one process on threads, are a
peer; the processes' memory is as step.py says.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

import chart  # nothing heavy: Linux counts the memory of the process that starts another into the other's peak
from configs import CONFIGS

WORKLOADS = {name: (name, "train") for name in CONFIGS} | {"infer": ("cifar", "infer")}
PEERS = {
    "PyTorch eager": ("torch_step.py", "eager"),
    "torch.compile": ("torch_step.py", "compile"),
    "JAX jit": ("jax_step.py",),
}

Measured = tuple[float, float]  # images a second, peak MB


def measure(python: str, script: str, *words: str) -> Measured:
    """Return what one run in a process of its own measures; raise RuntimeError with the last line of its error."""
    command = [python, str(Path(__file__).parent / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"img/s ([\d.]+)  rss_mb ([\d.]+)(?:  loss ([\d.]+) to ([\d.]+))?", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"{script} {' '.join(words)}: {(done.stderr.strip() or 'nothing printed').splitlines()[-1]}")
    if found[3] and float(found[4]) >= float(found[3]):
        raise RuntimeError(f"{script} {' '.join(words)}: does not train: {done.stdout.strip()}")
    return float(found[1]), float(found[2])


def compare(
    workload: str, rounds: int, python: str, peers: dict[str, tuple[str, ...]], device: str, workers: int
) -> dict[str, list[Measured]]:
    """Return what each round measured of minivit, first, and of every peer; take out of ``peers`` who cannot run."""
    ours = f"minivit, {workers} workers" if workers > 1 else "minivit"
    rows: dict[str, list[Measured]] = {ours: [], **{peer: [] for peer in peers}}
    for _ in range(rounds):
        own = [*WORKLOADS[workload], "--device", device, "--workers", str(workers)]
        rows[ours].append(measure(sys.executable, "step.py", *own))
        for peer, (script, *engine) in list(peers.items()):
            try:
                its = sys.executable if script == "step.py" else python
                rows[peer].append(measure(its, script, *WORKLOADS[workload], *engine, "--device", device))
            except RuntimeError as error:
                print(f"{peer} is left out: {error}", flush=True)
                del peers[peer], rows[peer]
    return rows


def medians(measured: list[Measured]) -> Measured:
    speeds, memories = zip(*measured, strict=True)
    return statistics.median(speeds), statistics.median(memories)


def print_rows(workload: str, rows: dict[str, list[Measured]]) -> None:
    ours = rows[next(iter(rows))]
    for name, measured in rows.items():
        speed, memory = medians(measured)
        ratios = [a[0] / b[0] for a, b in zip(ours, measured, strict=True)]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        compared = f"{ratio} | {medians(ours)[1] / memory:.2f}" if measured is not ours else "|"
        print(f"| {workload} | {name} | {speed:,.1f} | {memory:,.0f} | {compared} |", flush=True)


def heading(workload: str) -> str:
    name, mode = WORKLOADS[workload]
    c = CONFIGS[name]
    what = f"training step, batch {c.batch}" if mode == "train" else f"inference, batch {2 * c.batch}"
    return f"{c.image}² images, patch {c.patch}, dim {c.dim}, depth {c.depth}: {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch and JAX")
    parser.add_argument("--configs", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--save", metavar="FILE.svg")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    peers = {peer: PEERS[peer] for peer in args.peers if args.device == "cpu" or peer != "JAX jit"}
    if args.workers > 1:
        peers = {"minivit, one process": ("step.py",), **peers}
    panels = {}
    print("| | | img/s | MB | minivit's speed ÷ its (min to max) | minivit's memory ÷ its |\n|---|---|---|---|---|---|")
    for workload in args.configs:
        rows = compare(workload, args.rounds, args.python, peers, args.device, args.workers)
        print_rows(workload, rows)
        panels[heading(workload)] = {name: medians(measured) for name, measured in rows.items()}
    if args.save:
        chart.bars(args.save, ["images a second (more is better)", "peak memory, MB (less is better)"], panels)


if __name__ == "__main__":
    main()
