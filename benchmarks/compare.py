"""minivit's training step beside PyTorch's, in turns, so that a drift of the machine reaches both alike.

    python benchmarks/compare.py [ROUNDS] [PYTHON_WITH_TORCH]

Prints for each configuration the medians, and the ratios of speed and memory with their spread over the rounds.
"""

import re
import statistics
import subprocess
import sys
from pathlib import Path

from configs import CONFIGS

HERE = Path(__file__).parent


def measure(python: str, script: str, config: str) -> tuple[float, float]:
    """Return (images a second, peak MB) of one run in a process of its own."""
    done = subprocess.run([python, str(HERE / script), config], capture_output=True, text=True)
    found = re.search(r"img/s ([\d.]+)\s+rss_mb ([\d.]+)", done.stdout)
    if found is None:
        sys.exit(f"{script} {config} failed:\n{done.stderr[-2000:]}")
    return float(found[1]), float(found[2])


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch_python = sys.argv[2] if len(sys.argv) > 2 else sys.executable
    print("config    minivit img/s     MB   torch img/s     MB   speed ratio (min to max)   memory ratio")
    for config in CONFIGS:
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(measure(sys.executable, "step.py", config))
            theirs.append(measure(torch_python, "torch_step.py", config))
        ratios = sorted(a[0] / b[0] for a, b in zip(ours, theirs, strict=True))
        speed, memory, torch_speed, torch_memory = (
            statistics.median(row[i] for row in rows) for rows in (ours, theirs) for i in (0, 1)
        )
        print(f"{config:8} {speed:14.1f} {memory:6.0f} {torch_speed:13.1f} {torch_memory:6.0f} "
              f"{statistics.median(ratios):13.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
              f"{memory / torch_memory:15.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
