"""minivit's training step on a GPU beside PyTorch's: eager, torch.compile, and compiled with CUDA graphs.

    python benchmarks/gpu.py [--python PYTHON_WITH_TORCH] [--configs ti4-1024 …] [--dtypes bfloat16 …]
                             [--engines eager compile …] [--together CONFIGURATIONS] [--budget SECONDS]
                             [--output FOLDER] [--wait] [--dry]

Each measurement is a process of its own. Those of one configuration, or of ``--together`` so many, compile side by
side, then are measured one by one: blocks of steps at whose end alone the GPU is waited for, on images that lie there.
The most important come first; what does not fit into the budget is skipped, and named. Leaves gpu.json with all
numbers, gpu.md with the table, gpu.svg with its picture, and a log of each process. ``--wait`` is for whoever starts
this beside other work: the first are measured when a line comes in. ``--dry`` runs tiny steps, minivit's on the tests'
stand-in for CuPy, and PyTorch's on the CPU where ``--engines`` are named.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chart
from configs import DTYPES, GPU_CONFIGS
from turns import Child, ready, result

HERE = Path(__file__).parent
ENGINES = ("compile", "reduce-overhead", "eager", "compile-bf16-residual")
OURS = "minivit"
COMPILING, MEASURING = 180.0, 30.0  # seconds that getting ready, and one measurement, may take

FASTER = {"ti4-1024": 1.55, "s16-256": 1.45, "ti4-128": 1.75}
"""How many times as fast as the best of torch.compile's modes a step in bfloat16 has to be."""

Wave = tuple[str, str, list[str]]  # configuration, dtype, who takes part


def jobs(configs: list[str], dtypes: list[str], engines: list[str]) -> list[Wave]:
    """Return what is to be measured, the most important first: all of one dtype before the next."""
    found = []
    for dtype in dtypes:
        for config in configs:
            peers = [e for e in engines if dtype == "bfloat16" or not e.endswith("-bf16-residual")]
            found.append((config, dtype, [OURS, *peers]))
    return found


def command(python: str, config: str, dtype: str, who: str, dry: bool) -> list[str]:
    if who == OURS:
        return [sys.executable, str(HERE / "gpu_step.py"), config, dtype, *["--dry"] * dry]
    return [python, str(HERE / "torch_gpu.py"), config, dtype, who, *["--dry"] * dry]


def measure_all(
    waves: list[Wave], python: str, folder: Path, until: float, dry: bool = False, wait: bool = False
) -> Iterator[dict[str, Any]]:
    """Measure some configurations; yield a row for each who takes part, with ``why_not`` where there are no numbers."""
    compilers = str(max(2, (os.cpu_count() or 4) // max(1, sum(len(names) - 1 for *_, names in waves))))
    environment = {
        "TORCHINDUCTOR_COMPILE_THREADS": compilers,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    children = {
        (config, dtype, who): Child(
            command(python, config, dtype, who, dry), folder / f"{config}-{dtype}-{who}.log", environment
        )
        for config, dtype, names in waves
        for who in names
    }
    try:
        limit = min(time.monotonic() + COMPILING, until)
        for child in children.values():
            child.wait_ready(limit)
        if wait:
            ready()
            until = max(until, time.monotonic())
        for (config, dtype, who), child in children.items():
            if not child.why_not:
                child.measure(min(time.monotonic() + MEASURING, until + MEASURING))
            row = {"config": config, "dtype": dtype, "who": who, **child.about, **child.found}
            yield row | ({"why_not": child.why_not} if child.why_not else {})
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


def verdicts(rows: list[dict[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Return for each of :data:`FASTER` what was found, what was to be found, and whether it was: speed and memory.

    The best of torch.compile's modes is the fastest that has numbers, a residual stream of bfloat16 included; memory is
    held to that of torch.compile as it is.
    """
    found = []
    for config, least in FASTER.items():
        measured = {row["who"]: row for row in rows if (row["config"], row["dtype"]) == (config, "bfloat16")}
        seconds = {who: quartiles(row["seconds"])[1] for who, row in measured.items() if "seconds" in row}
        compiled = {who: x for who, x in seconds.items() if who not in (OURS, "eager")}
        if OURS not in seconds or not compiled:
            why_not = [f"{who}: {row['why_not']}" for who, row in measured.items() if "why_not" in row]
            found.append((f"speed {config}", "; ".join(why_not)[:100] or "not measured", f"≥ ×{least}", False))
            continue
        best = min(compiled, key=lambda who: compiled[who])
        ratio = compiled[best] / seconds[OURS]
        text = f"×{ratio:.2f} of {best} ({1e3 * seconds[OURS]:.3f} against {1e3 * compiled[best]:.3f} ms)"
        found.append((f"speed {config}", text, f"≥ ×{least}", ratio >= least))
        if "compile" in compiled:
            ours, theirs = (measured[who]["memory"] / 2**30 for who in (OURS, "compile"))
            found.append((f"memory {config}", f"{ours:.2f} GiB", f"≤ torch.compile's {theirs:.2f}", ours <= theirs))
    return found


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
    parser.add_argument("--engines", nargs="*", help=f"of PyTorch ({' '.join(ENGINES)}; with --dry none)")
    parser.add_argument("--together", type=int, default=1, help="how many configurations compile side by side")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all of it")
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark"))
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("it was ended"))  # and so are the processes that it has started
    until = time.monotonic() + args.budget
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    engines = ([] if args.dry else list(ENGINES)) if args.engines is None else args.engines
    waves = jobs(args.configs, args.dtypes, engines)
    for i in range(0, len(waves), args.together):
        group = waves[i : i + args.together]
        if rows and time.monotonic() + 2 * MEASURING > until:
            skipped += [f"{config} {dtype}" for config, dtype, _ in group]
        else:
            for row in measure_all(group, args.python, args.output, until - 10.0, args.dry, args.wait and i == 0):
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
    if args.wait:
        result()


if __name__ == "__main__":
    main()
