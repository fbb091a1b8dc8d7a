"""Compiles, without a GPU, the kernels that gpu_checks.py needs: ``python benchmarks/gpu_kernels.py [ARCH …]``.

They go into the cache of compiled kernels, of which a copy serves a machine that has no compiler: ``XDG_CACHE_HOME``
says where it is. Needs the extra minivit[cuda-test]. Kernels of whole steps are found by going through
one; those of the table of errors and of the tests by running these on the tests' stand-in for CuPy, and noting which
kernels they ask for. A few that tests make up on purpose cannot be compiled.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from configs import GPU_CONFIGS
from gpu_probes import SMALL, TI4

from minivit.backend import cubins, tile
from minivit.backend.compiling import Plan
from minivit.measure.kernels import kernels_of
from minivit.measure.ulps import measure_ulps, twins_on
from minivit.models import configuration
from minivit.runs.recipes import recipe_model
from tests import strict

TESTS = Path(__file__).parent.parent / "tests"


def of_steps() -> set[Plan]:
    """Return the kernels of all steps that are timed or looked at, and of the GPU's part of ``minivit doctor``."""
    steps: list[tuple[str, dict[str, Any], int]] = [
        (
            "vit",
            {"image_size": c.image, "patch_size": c.patch, "dim": c.dim, "depth": c.depth, "heads": c.heads},
            c.batch,
        )
        for c in GPU_CONFIGS.values()
    ]
    steps += [("vit", SMALL, 64), ("vit", SMALL | {"dropout": 0.1, "drop_path": 0.1}, 64), ("vit", TI4, 128)]
    steps += [(*recipe_model("digits"), 64), (*recipe_model("digits"), 1), (*recipe_model("cifar10"), 128)]
    steps += [(*configuration("vit_small_patch16_224"), 256)]
    plans: set[Plan] = set()
    for kind, values, batch in steps:
        for dtype in ("bfloat16", "float16", "float32"):
            plans |= set(kernels_of(kind, values, batch, dtype))
    return plans


@contextlib.contextmanager
def noted(plans: set[Plan]) -> Iterator[None]:
    """Add to ``plans`` each kernel that is asked for in this block."""
    plan_of = tile.Kernel._plan

    def plan(*args: Any) -> Any:
        found = plan_of(*args)
        if not found[2]:
            plans.add(found[0])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile.Kernel, "_plan", plan)
        yield


def of_checks() -> set[Plan]:
    """Return the kernels of the table of errors, and of the tests that run on a GPU as well."""
    plans: set[Plan] = set()
    with noted(plans):
        with strict.installed():
            for dtype in ("float32", "tf32", "bfloat16", "float16"):
                for name in twins_on("cuda"):
                    measure_ulps(name, "cuda", dtype)
        options = ["-q", "-p", "no:cacheprovider", "-k", "strict] or strict- or stand-in", "-m", "not gpu", str(TESTS)]
        if code := pytest.main(options):
            print(f"minivit: the tests ended with {code}: some kernels may be missing", file=sys.stderr)
    return {plan for plan in plans if not plan.file.startswith("tests.")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=["sm_90"], metavar="ARCH")
    args = parser.parse_args()
    for what, find in (("steps", of_steps), ("checks and tests", of_checks)):  # the first are the most important
        plans = sorted(find(), key=str)
        for arch in args.architectures:
            built, cached, failed = cubins.build(plans, arch)
            size = sum(path.stat().st_size for path in (cubins.folder() / arch).glob("*.cubin"))
            counts = f"{built} compiled, {cached} were there, {len(failed)} failed"
            print(f"{arch}, of {what}: {counts}; {size / 2**20:.1f} MB in all", flush=True)
            for error in failed:
                print(f"minivit: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
