"""All GPU checks, tests and benchmarks of the project in one call.

    python benchmarks/gpu_checks.py [--output FOLDER] [--budget SECONDS] [--python PYTHON_WITH_TORCH] [--only NAME …]
                                    [--dry]

The GPU's machine needs CuPy, ml_dtypes, pytest and PyTorch, and is better off with pytest-xdist. Where it has no
compiler of kernels, they are compiled before on one that has (pip install -e '.[cuda-test]'), from the same
checkout, into a folder that is taken along; any Python does on either side:

    XDG_CACHE_HOME=$PWD/build/cache python benchmarks/gpu_kernels.py sm_90
    XDG_CACHE_HOME=$PWD/build/cache python benchmarks/gpu_checks.py --output gpu-checks

Each check is a process of its own with a time of its own, so that a crash loses that one alone. They run one after the
other, the most important first; what does not fit into the budget is skipped, and named. PyTorch's steps compile beside
checks that measure no time, and are measured when these are done. A short table is printed last, however the checks
end; the folder has checks.json, and of each check all that it has printed. ``--dry`` runs those that can run on the
tests' stand-in for CuPy, tiny: it shows that they work, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import gpu
from turns import Child

HERE = Path(__file__).parent
ROOT = HERE.parent


class Check(NamedTuple):
    """A command, how many seconds it may take at the most and needs at least, and whether it can run dry."""

    command: list[str]
    most: float
    least: float = 10.0
    dry: bool = False


PEERS = "PyTorch"
BEGIN = "resume"  # the check before which PyTorch begins to compile: those from here to PEERS measure no time
READY, MEASURED = 30.0, 90.0  # seconds kept for it: to get ready when all beside it is done, and to be measured


def checks(python: str, output: Path, dry: bool) -> dict[str, Check]:
    """Return the checks by name, the most important first."""

    def probe(name: str, *more: str, most: float = 60.0) -> Check:
        return Check([sys.executable, str(HERE / "gpu_probes.py"), name, *more, *["--dry"] * dry], most, dry=True)

    def command(*words: str, most: float = 60.0) -> Check:
        return Check([sys.executable, "-m", "minivit", *words], most)

    several = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *several, str(ROOT / "tests")]
    peers = [sys.executable, str(HERE / "gpu.py"), "--python", python, "--output", str(output / "against-pytorch")]
    peers += ["--configs", *gpu.FASTER, "--dtypes", "bfloat16", "--together", str(len(gpu.FASTER)), "--wait"]
    compiled = ["--engines", *(engine for engine in gpu.ENGINES if engine != "eager")]
    peers += ["--dry"] if dry else compiled
    kernels = ["--device", "cuda", "--dtype", "bfloat16", "--profile"]
    return {
        "doctor": command("doctor", most=40.0),
        "step ti4-1024": probe("step", "ti4-1024"),
        "step s16-256": probe("step", "s16-256"),
        "step ti4-128": probe("step", "ti4-128"),
        "step digits": probe("step", "digits"),
        "gradient": probe("gradient", str(output / "gradient.npz")),
        "autocast": Check([python, str(HERE / "torch_gradient.py"), str(output / "gradient.npz")], 60.0),
        "losses": probe("losses"),
        "resume": probe("resume"),
        "bits": probe("bits"),
        "ulps": probe("ulps"),
        "tests": Check(tests, 150.0, 30.0),
        PEERS: Check(peers, 180.0, dry=True),
        "loader": probe("loader"),
        "profile S": command("bench", "vit_small_patch16_224", "-b", "256", *kernels),
        "profile digits": command("bench", "vit_digits", "-b", "64", *kernels),
    }


def environment() -> dict[str, str]:
    """Return what checks are given to find minivit by, which need not be installed."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)}


def run(name: str, check: Check, seconds: float, output: Path) -> dict[str, Any]:
    """Run a check for so many seconds at the most; return its rows and how it ended."""
    started, log = time.monotonic(), output / f"{name.replace(' ', '-')}.log"
    with log.open("w") as f:
        process = subprocess.Popen(
            check.command, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, cwd=output,
            env={**os.environ, **environment()}, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"not done within {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # a session of its own: with all that it has started
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
    found = [line for line in lines if line.startswith("RESULT ")]
    rows = json.loads(found[-1].removeprefix("RESULT ")) if found else []
    if not rows or code != 0:
        rows += [[name, lines[-1][:70] if isinstance(code, int) else code, "ends well", code == 0]]
    return {"name": name, "code": code, "seconds": time.monotonic() - started, "rows": rows}


def measure_peers(child: Child, most: float, output: Path) -> dict[str, Any]:
    """Let PyTorch's steps and minivit's be measured, which are ready or soon will be; return as :func:`run` does."""
    started = time.monotonic()
    if child.wait_ready(started + most - MEASURED):
        child.measure(started + most)
    child.end()
    rows: list[Any] = []
    with contextlib.suppress(OSError, ValueError):
        rows = list(gpu.verdicts(json.loads((output / "against-pytorch" / "gpu.json").read_text())["rows"]))
    if child.why_not or not rows:
        rows.append([PEERS, child.why_not or "it left nothing", "ends well", False])
    return {"name": PEERS, "code": child.why_not or 0, "seconds": time.monotonic() - started, "rows": rows}


def table(done: list[dict[str, Any]], skipped: list[str]) -> str:
    """Return a line for each row of each check."""
    rows = [row for check in done for row in check["rows"]]
    widths = [max(len(str(row[i])) for row in rows) for i in range(3)] if rows else [0, 0, 0]
    lines = []
    for what, found, wanted, passed in rows:
        verdict = "" if passed is None else "ok" if passed else "FAIL"
        lines.append(f"{what:{widths[0]}}  {found:{widths[1]}}  {wanted:{widths[2]}}  {verdict}".rstrip())
    failed = sum(row[3] is False for row in rows)
    lines.append(f"\n{len(rows)} rows, {failed} failed, {sum(check['seconds'] for check in done):.0f} s")
    if skipped:
        lines.append(f"skipped, for want of time: {', '.join(skipped)}")
    return "\n".join(lines)


def keep(output: Path, done: list[dict[str, Any]], skipped: list[str]) -> None:
    (output / "checks.json").write_text(json.dumps({"checks": done, "skipped": skipped}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-checks"))
    parser.add_argument("--budget", type=float, default=460.0, help="seconds for all of it")
    parser.add_argument("--python", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these checks alone")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    every = checks(args.python, output, args.dry)
    chosen = {name: check for name, check in every.items() if check.dry or not args.dry}
    if args.only:
        if unknown := [name for name in args.only if name not in chosen]:
            parser.error(f"unknown check {unknown[0]!r}; known: {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in args.only}
    until = time.monotonic() + args.budget
    done: list[dict[str, Any]] = []
    skipped: list[str] = []
    peers: Child | None = None

    try:
        for name, check in chosen.items():
            left = until - time.monotonic()
            if PEERS in chosen and name in (BEGIN, PEERS) and peers is None:
                peers = Child(chosen[PEERS].command, output / f"{PEERS}.log", environment(), output)
            if peers is not None and peers.state != "ended" and name != PEERS:
                left -= READY + MEASURED
            if left < check.least:
                skipped.append(name)
                continue
            most = min(check.most, left)
            if name == PEERS and peers is not None:
                done.append(measure_peers(peers, most, output))
            else:
                done.append(run(name, check, most, output))
            print(f"{name}: {done[-1]['seconds']:.0f} s", flush=True)
            keep(output, done, skipped)
    finally:
        if peers is not None:
            peers.end()
        keep(output, done, skipped)
        print("\n" + table(done, skipped), flush=True)
    return int(any(row[3] is False for check in done for row in check["rows"]) and not args.dry)


if __name__ == "__main__":
    raise SystemExit(main())
