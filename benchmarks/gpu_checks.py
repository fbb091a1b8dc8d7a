"""All GPU checks, tests and benchmarks of the project in one call.

    python benchmarks/gpu_checks.py [--output FOLDER] [--budget SECONDS] [--python PYTHON_WITH_TORCH] [--only NAME …]
                                    [--dry]

Each check is a process of its own with a time of its own, so that a crash loses that one alone. They run one after the
other, the most important first; what does not fit into the budget is skipped, and named. A short table is printed last;
the folder has checks.json, and of each check all that it has printed. ``--dry`` runs those that can run on the tests'
stand-in for CuPy, tiny: it shows that they work, and measures nothing.
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

HERE = Path(__file__).parent
ROOT = HERE.parent


class Check(NamedTuple):
    """A command, how many seconds it may take at the most and needs at least, and whether it can run dry."""

    command: list[str]
    most: float
    least: float = 10.0
    dry: bool = False


def checks(python: str, output: Path, dry: bool) -> dict[str, Check]:
    """Return the checks by name, the most important first. ``{left}`` stands for the seconds that are left."""

    def probe(name: str, *more: str, most: float = 60.0) -> Check:
        return Check([sys.executable, str(HERE / "gpu_probes.py"), name, *more, *["--dry"] * dry], most, dry=True)

    def command(*words: str, most: float = 60.0) -> Check:
        return Check([sys.executable, "-m", "minivit", *words], most)

    several = ["-n", "4"] if importlib.util.find_spec("xdist") else []
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *several, str(ROOT / "tests")]
    peers = [sys.executable, str(HERE / "gpu.py"), "--python", python, "--output", str(output / "against-pytorch")]
    kernels = ["--device", "cuda", "--dtype", "bfloat16", "--profile"]
    return {
        "doctor": command("doctor", most=40.0),
        "step ti4-1024": probe("step", "ti4-1024"),
        "losses": probe("losses"),
        "bits": probe("bits"),
        "ulps": probe("ulps"),
        "step s16-256": probe("step", "s16-256"),
        "step ti4-128": probe("step", "ti4-128"),
        "step digits": probe("step", "digits"),
        "resume": probe("resume", most=90.0),
        "gradient": probe("gradient", str(output / "gradient.npz")),
        "autocast": Check([python, str(HERE / "torch_gradient.py"), str(output / "gradient.npz")], 60.0),
        "loader": probe("loader"),
        "tests": Check(tests, 150.0, 40.0),
        "profile S": command("bench", "vit_small_patch16_224", "-b", "256", *kernels),
        "PyTorch": Check([*peers, "--dtypes", "bfloat16", "--budget", "{left}"], 400.0, 120.0),
        "profile digits": command("bench", "vit_digits", "-b", "64", *kernels),
    }


def run(name: str, check: Check, seconds: float, output: Path) -> dict[str, Any]:
    """Run a check for so many seconds at the most; return its rows and how it ended."""
    started, log = time.monotonic(), output / f"{name.replace(' ', '-')}.log"
    words = [str(max(30, int(seconds) - 40)) if word == "{left}" else word for word in check.command]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as f:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, cwd=output,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
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
    rows = json.loads(found[-1].removeprefix("RESULT ")) if found and code == 0 else []
    if not rows:
        rows = [[name, lines[-1][:70] if isinstance(code, int) else code, "ends well", code == 0]]
    return {"name": name, "code": code, "seconds": time.monotonic() - started, "rows": rows}


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
    until, done, skipped = time.monotonic() + args.budget, [], []
    for name, check in chosen.items():
        left = until - time.monotonic()
        if left < check.least:
            skipped.append(name)
            continue
        done.append(run(name, check, min(check.most, left), output))
        (output / "checks.json").write_text(json.dumps({"checks": done, "skipped": skipped}, indent=1))
        print(f"{name}: {done[-1]['seconds']:.0f} s", flush=True)
    (output / "checks.json").write_text(json.dumps({"checks": done, "skipped": skipped}, indent=1))
    print("\n" + table(done, skipped))
    return int(any(row[3] is False for check in done for row in check["rows"]) and not args.dry)


if __name__ == "__main__":
    raise SystemExit(main())
