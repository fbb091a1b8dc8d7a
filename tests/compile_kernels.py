"""Compiles the kernels of several models' training steps without a GPU, and holds their spills to a table.

    python -m tests.compile_kernels                    for sm_90, as .ci/run does
    python -m tests.compile_kernels --all              for sm_80, sm_90, sm_100 and sm_120
    python -m tests.compile_kernels --write            and makes its part of tests/goldens/kernels.json anew

Needs the extra minivit[cuda-test]. A kernel that does not compile, or spills more registers to memory than the table
says (none, if it is not there), makes it fail.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from minivit.backend import compiling, cubins
from minivit.backend.compiling import Plan
from minivit.backend.promises import ArrayPromise
from minivit.measure.kernels import kernels_of
from minivit.models import configuration
from minivit.runs.recipes import recipe_model

GOLDEN = Path(__file__).with_name("goldens") / "kernels.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
TINY = {"image_size": 32, "patch_size": 4, "dim": 192, "heads": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": recipe_model("digits"),
    "cifar": recipe_model("cifar10"),
    "Ti/4": ("vit", TINY),
    "S/16": configuration("vit_small_patch16_224"),
    "RMSNorm": ("vit", {**TINY, "depth": 1, "norm": "rms", "qk_norm": True}),
}
PRECISIONS = ("bfloat16", "float32")


def plans_of(names: list[str]) -> dict[Plan, str]:
    """Return the kernels of the models' steps, and whose each is."""
    plans: dict[Plan, str] = {}
    for name in names:
        kind, values = MODELS[name]
        for precision in PRECISIONS:
            plans |= dict.fromkeys(kernels_of(kind, values, precision), name)
    return plans


def title(plan: Plan) -> str:
    """Return a kernel's name in the table: its constants, hints and dtypes; not its arrays' alignments."""
    dtypes = [promise.dtype if isinstance(promise, ArrayPromise) else promise for promise in plan.promises]
    hints = "".join(f" {name}={value}" for name, value in plan.hints)
    return f"{plan}{hints}: {' '.join(dtypes)}"


def usage(cubin: bytes) -> dict[str, int]:
    """Return a cubin's registers and the bytes of memory that each thread spills to."""
    tool = compiling.find_tool("cuobjdump")
    if tool is None:
        raise SystemExit("cuobjdump is missing: pip install 'minivit[cuda-test]'")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return parse_usage(said)


def parse_usage(said: str) -> dict[str, int]:
    """Read what ``cuobjdump -res-usage`` says."""
    most = {key: max(map(int, re.findall(rf"\b{key}:(\d+)", said)), default=0) for key in ("REG", "STACK", "LOCAL")}
    if not most["REG"]:
        raise ValueError(f"cuobjdump says nothing of registers: {said[:200]!r}")
    return {"registers": most["REG"], "spilled": most["STACK"] + most["LOCAL"]}


def compile_for(arch: str, plans: dict[Plan, str]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Return for each kernel what it uses, the worst of its variants, and what did not compile."""
    _, _, failed = cubins.build(list(plans), arch)
    found: dict[str, dict[str, int]] = {}
    for plan in plans:
        if (cubin := cubins.cached(plan, arch)) is not None:
            used, before = usage(cubin), found.get(title(plan), {})
            found[title(plan)] = {key: max(value, before.get(key, 0)) for key, value in used.items()}
    return dict(sorted(found.items())), [str(error) for error in failed]


def worse(found: dict[str, dict[str, int]], golden: dict[str, dict[str, int]]) -> list[str]:
    """Return which kernels spill more than the table says."""
    allowed = {name: golden.get(name, {}).get("spilled", 0) for name in found}
    return [
        f"{name} spills {used['spilled']} bytes, {allowed[name]} at most were known"
        for name, used in found.items()
        if used["spilled"] > allowed[name]
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help=f"for {', '.join(ARCHITECTURES)}")
    parser.add_argument("--write", action="store_true", help=f"make its part of {GOLDEN.name} anew")
    args = parser.parse_args(argv)
    plans = plans_of(list(MODELS))
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    wrong: list[str] = []
    for arch in ARCHITECTURES if args.all else ("sm_90",):
        started = time.perf_counter()
        found, failed = compile_for(arch, plans)
        spills = sum(used["spilled"] > 0 for used in found.values())
        seconds = time.perf_counter() - started
        print(f"{arch}: {len(plans)} variants of {len(found)} kernels compiled, {spills} spill ({seconds:.0f} s)")
        wrong += [f"{arch}: {line}" for line in failed]
        if args.write:
            golden[arch] = found
        else:
            wrong += [f"{arch}: {line}" for line in worse(found, golden.get(arch, {}))]
    if args.write:
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
