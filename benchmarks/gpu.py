"""minivit's training step on a GPU beside PyTorch's: eager, torch.compile, and compiled with CUDA graphs.

    python benchmarks/gpu.py [--python PYTHON_WITH_TORCH] [--configs ti4-1024 …] [--dtypes bfloat16 …]
                             [--engines eager compile …] [--budget SECONDS] [--output FOLDER] [--dry]

Each measurement is a process of its own. Those of one configuration compile side by side, then are measured one by one:
blocks of steps at whose end alone the GPU is waited for, on images that lie there. The most important come first; what
does not fit into the budget is skipped, and named. Leaves gpu.json with all numbers, gpu.md with the table, gpu.svg
with its picture, and a log of each process. ``--dry`` runs minivit's side only, tiny, on the tests' stand-in for CuPy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import chart
from configs import DTYPES, GPU_CONFIGS
from turns import Child

HERE = Path(__file__).parent
ENGINES = ("compile", "reduce-overhead", "eager", "compile-bf16-residual")
OURS = "minivit"
COMPILING, MEASURING = 110.0, 30.0  # seconds that getting ready, and one measurement, may take


def jobs(configs: list[str], dtypes: list[str], engines: list[str]) -> list[tuple[str, str, list[str]]]:
    """Return (configuration, dtype, who takes part), the most important first: all of one dtype before the next."""
    found = []
    for dtype in dtypes:
        for config in configs:
            peers = [e for e in engines if dtype == "bfloat16" or not e.endswith("-bf16-residual")]
            found.append((config, dtype, [OURS, *peers]))
    return found


def command(python: str, config: str, dtype: str, who: str, dry: bool) -> list[str]:
    if who == OURS:
        return [sys.executable, str(HERE / "gpu_step.py"), config, dtype, *["--dry"] * dry]
    return [python, str(HERE / "torch_gpu.py"), config, dtype, who]


def measure_all(wave: tuple[str, str, list[str]], python: str, folder: Path, until: float, dry: bool) -> list[dict]:
    """Measure one configuration; return a row for each who takes part, with ``why_not`` where there are no numbers."""
    config, dtype, names = wave
    compilers = str(max(2, (os.cpu_count() or 4) // max(1, len(names) - 1)))
    environment = {
        "TORCHINDUCTOR_COMPILE_THREADS": compilers,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    children = {
        who: Child(command(python, config, dtype, who, dry), folder / f"{config}-{dtype}-{who}.log", environment)
        for who in names
    }
    try:
        limit = min(time.monotonic() + COMPILING, until)
        for child in children.values():
            child.wait_ready(limit)
        rows = []
        for who, child in children.items():
            if not child.why_not:
                child.measure(min(time.monotonic() + MEASURING, until + MEASURING))
            row = {"config": config, "dtype": dtype, "who": who, **child.about, **child.found}
            rows.append(row | ({"why_not": child.why_not} if child.why_not else {}))
        return rows
    finally:
        for child in children.values():
            child.end()


# ---- what is shown ---------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown: median and quartiles of a step, memory, and both as ratios to minivit's."""
    lines = ["| | | | ms | middle half | img/s | MB | minivit's speed ÷ its | minivit's memory ÷ its |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    ours = {(row["config"], row["dtype"]): row for row in rows if row["who"] == OURS and "seconds" in row}
    for row in rows:
        start = f"| {row['config']} | {row['dtype']} | {row['who']} |"
        if "seconds" not in row:
            lines.append(f"{start} {row.get('why_not', 'no result')} | | | | | |")
            continue
        low, middle, high = quartiles(row["seconds"])
        cells = [f"{1e3 * middle:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}", f"{row['batch'] / middle:,.0f}"]
        cells.append(f"{row['memory'] / 2**20:,.0f}")
        own = ours.get((row["config"], row["dtype"]))
        if own is None or row["who"] == OURS:
            cells += ["", ""]
        else:
            cells.append(f"{middle / quartiles(own['seconds'])[1]:.2f}")
            cells.append(f"{own['memory'] / row['memory']:.2f}" if row["memory"] else "")
        lines.append(f"{start} {' | '.join(cells)} |")
    return "\n".join(lines)


def quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel for each configuration and dtype: images a second, and memory."""
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    for row in rows:
        if "seconds" in row:
            c = GPU_CONFIGS[row["config"]]
            title = f"{c.image}² images, patch {c.patch}, dim {c.dim}, depth {c.depth}, batch {c.batch}, {row['dtype']}"
            speed = row["batch"] / quartiles(row["seconds"])[1]
            panels.setdefault(title, {})[row["who"]] = (speed, max(row["memory"], 1) / 2**20)
    if panels:
        chart.bars(str(path), ["images a second (more is better)", "memory, MB (less is better)"], panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--configs", nargs="+", choices=GPU_CONFIGS, default=list(GPU_CONFIGS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--engines", nargs="*", default=list(ENGINES))
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of it")
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark"))
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + args.budget
    rows: list[dict[str, Any]] = []
    skipped = []
    for wave in jobs(args.configs, args.dtypes, [] if args.dry else args.engines):
        if time.monotonic() + MEASURING * (1 + bool(rows)) > until:
            skipped.append(f"{wave[0]} {wave[1]}")
            continue
        for row in measure_all(wave, args.python, args.output, until - 10.0, args.dry):
            rows.append(row)
            print(json.dumps({key: x for key, x in row.items() if key != "seconds"}), flush=True)
        (args.output / "gpu.json").write_text(json.dumps({"rows": rows, "skipped": skipped}, indent=1))
    text = table(rows)
    if skipped:
        text += f"\n\nSkipped, for want of time: {', '.join(skipped)}."
    (args.output / "gpu.md").write_text(text + "\n")
    (args.output / "gpu.json").write_text(json.dumps({"rows": rows, "skipped": skipped}, indent=1))
    picture(rows, args.output / "gpu.svg")
    print("\n" + text)


if __name__ == "__main__":
    main()
