"""The checks of gpu_checks.py that are not commands of their own: ``python benchmarks/gpu_probes.py NAME [--dry]``.

A check prints RESULT and a list of rows: what was looked at, what was found, what was to be found, and whether it was
(null where nothing is asked for). ``--dry`` runs it tiny on the tests' stand-in for CuPy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable
from typing import Any

import gpu_step
import numpy as np

import minivit as mv
from minivit.backend import Key, normal, random_bits, to_numpy
from minivit.backend.clock import wait_for
from minivit.data import Crop, Flip
from minivit.data.augment import Chain
from minivit.data.dataset import Dataset
from minivit.data.loader import Loader
from minivit.measure.ulps import measure_ulps, twins_on
from minivit.weights.checkpoint import load_checkpoint

Row = tuple[str, str, str, bool | None]

STEPS = {"ti4-1024": 10.0, "ti4-128": 2.5, "s16-256": 19.0, "digits": 0.5}
"""Milliseconds that a step in bfloat16 may take on an H200."""

NODES, IMAGES_A_SECOND = 300, 200_000
SMALL: dict[str, Any] = {"image_size": 8, "patch_size": 2, "in_channels": 1, "dim": 64, "depth": 4, "heads": 4}
TINY = SMALL | {"patch_size": 4, "dim": 32, "depth": 1, "heads": 2}
TI4: dict[str, Any] = {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 12, "heads": 3}


def small_model(dry: bool, device: str, **settings: Any) -> mv.ViT:
    return mv.ViT(**{**(TINY if dry else SMALL), **settings}, num_classes=10, seed=3).to(device)


def batch(i: int, count: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return images (count, C, H, W) of standard normal numbers, and labels that depend on them."""
    images = normal(Key(i, stream=5), (count, *shape)).astype(np.float32)
    return images, (images.mean(axis=(1, 2, 3)) > 0).astype(np.int64) + 2 * (images[:, 0, 0, 0] > 0)


def new_step(model: mv.ViT, dtype: str, **settings: Any) -> mv.TrainStep:
    return mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=1e-3), precision=dtype, **settings)


# ---- the checks ------------------------------------------------------------------------------------------------------


def step_time(name: str, dry: bool) -> list[Row]:
    """Time a step in bfloat16, and count the nodes of its graph."""
    found = gpu_step.prepared(name, "bfloat16", dry)()
    low, middle, high = np.percentile(found["seconds"], [25, 50, 75]) * 1e3
    memory = f"{found['memory'] / 2**30:.2f} GiB"
    rows: list[Row] = [
        (f"step {name}", f"{middle:.3f} ms ({low:.3f} to {high:.3f}), {memory}", f"≤ {STEPS[name]} ms",
         bool(middle <= STEPS[name])),
        (f"captured {name}", found["why_launched"] or f"{found['nodes']} nodes",
         f"≤ {NODES} nodes" if name.startswith("ti4") else "captured",
         found["nodes"] is not None and (found["nodes"] <= NODES or not name.startswith("ti4"))),
    ]  # fmt: skip
    before, after = found["losses"]
    return [*rows, (f"loss {name}", f"{before:.3f} to {after:.3f}", "falls", after < before)]


def losses(dry: bool) -> list[Row]:
    """Compare the losses of 20 steps with the CPU's, in float32 and float64."""
    rows: list[Row] = []
    for name, bound in (("float32", 1e-4), ("float64", 1e-10)):
        found = []
        for device in ("cpu", "cuda"):
            model = small_model(dry, device)
            step = new_step(model.to(np.dtype(name)), "float32", seed=1)
            given = [batch(i, 64 if not dry else 4, model.settings.image_shape) for i in range(2 if dry else 20)]
            found.append([step(images.astype(name), labels) for images, labels in given])
        worst = float(np.abs(np.subtract(*found)).max())
        rows.append((f"losses, {name}", f"{worst:.1e} from the CPU's", f"≤ {bound:.0e}", worst <= bound))
    return rows


def equal_bits(dry: bool) -> list[Row]:
    """Train the same twice, with dropout and drop path, and compare every bit."""
    rows: list[Row] = []
    for dtype in ("bfloat16", "float32"):
        found = []
        for _ in range(2):
            model = small_model(dry, "cuda", dropout=0.1, drop_path=0.1)
            step = new_step(model, dtype, clip_norm=1.0)
            for i in range(3 if dry else 20):
                step(*batch(i, 4 if dry else 64, model.settings.image_shape))
            found.append(to_numpy(step.opt.store.values).tobytes())
        same = found[0] == found[1]
        rows.append((f"two runs, {dtype}", "equal bits" if same else "other bits", "equal bits", same))
    return rows


def resumed(dry: bool) -> list[Row]:
    """Train two epochs, and one and then another in a resumed run, and compare every bit."""
    settings: dict[str, Any] = {"train.schedule_epochs": 2, "train.dtype": "bfloat16", "train.device": "cuda"}
    if dry:
        settings |= {f"model.{key}": TINY[key] for key in ("patch_size", "dim", "depth", "heads")}
        settings |= {"data.overfit": 8, "train.batch_size": 4}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        whole = mv.runs.train(settings=settings, epochs=2, output=folder, name="whole")
        half = mv.runs.train(settings=settings, epochs=1, output=folder, name="half")
        for run in (whole, mv.runs.resume(half.folder, epochs=2)):
            arrays = load_checkpoint(run.folder / "checkpoints" / "last.npz").arrays
            found.append({name: array.tobytes() for name, array in arrays.items()})
    other = [name for name in found[0] if found[0][name] != found[1].get(name)]
    text = f"{len(other)} of {len(found[0])} arrays differ" if other else "equal bits"
    return [("a resumed run", text, "equal bits", not other)]


def errors_in_ulps(dry: bool) -> list[Row]:
    """Measure the twins against float64."""
    rows: list[Row] = []
    for dtype in ("bfloat16",) if dry else ("float32", "tf32", "bfloat16", "float16"):
        for name in twins_on("cuda"):
            one = measure_ulps(name, "cuda", dtype)
            worst = max([one.output, *one.gradients.values()])
            rows.append((f"{name}, {dtype} ({one.ran})", f"{worst:.2f} ulps", f"≤ {one.allowed:g}", one.passed))
    return rows


def gradient(dry: bool, path: str) -> list[Row]:
    """Measure the error of the whole gradient in bfloat16, and leave the model for torch_gradient.py to do the same."""
    model = mv.ViT(**(TINY | {"in_channels": 3} if dry else TI4), num_classes=10, seed=3)
    model.head.weight.data[...] = 0.05 * normal(Key(9), model.head.weight.shape)  # zero, it would hide all else
    images, labels = batch(0, 4 if dry else 128, model.settings.image_shape)
    start = model.state_dict()
    found, exact = [], dict[str, np.ndarray]()
    for dtype in ("float32", "bfloat16"):
        model.load_state_dict(start)
        step = new_step(model.to("cuda"), dtype)
        step(images, labels)
        store = step.opt.store
        found.append(to_numpy(store.grad).astype(np.float64))
        if dtype == "float32":
            exact = {f"gradient of {name}": to_numpy(g).copy() for name, g in store.by_name(store.grad).items()}
        model = model.to("cpu")
    error = float(np.linalg.norm(found[1] - found[0]) / np.linalg.norm(found[0]))
    with open(path, "wb") as f:
        np.savez(f, images=images, labels=labels, error=error, **start, **exact)
    return [("gradient, bfloat16", f"{error:.2e} of float32's", "PyTorch's · 1.2, see autocast", None)]


def loader(dry: bool) -> list[Row]:
    """Count the images a second that are cropped, flipped and standardised on the GPU."""
    count = 64 if dry else 50_000
    pixels = (random_bits(Key(0), (count, 3, 32, 32)) >> 24).astype(np.uint8)
    made = Dataset(pixels, np.arange(count) % 10, tuple("abcdefghij"), "random")
    loaded = Loader(made, 16 if dry else 1024, Key(1), Chain((Crop(4), Flip())), device="cuda")
    times = []
    for epoch in range(2 if dry else 5):
        wait_for("cuda")
        start = time.perf_counter()
        for _ in loaded.batches(epoch):
            pass
        wait_for("cuda")
        times.append(time.perf_counter() - start)
    rate = count / float(np.median(times[1:]))
    return [("loader", f"{rate:,.0f} images/s", f"≥ {IMAGES_A_SECOND:,}", rate >= IMAGES_A_SECOND)]


CHECKS: dict[str, Callable[..., list[Row]]] = {
    "step": step_time, "losses": losses, "bits": equal_bits, "resume": resumed, "ulps": errors_in_ulps,
    "gradient": gradient, "loader": loader,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("more", nargs="?", help="of step: the configuration; of gradient: the file to leave")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if args.dry:
            from tests import strict

            stack.enter_context(strict.installed())
        check = CHECKS[args.name]
        found = {"step": lambda: check(args.more, args.dry), "gradient": lambda: check(args.dry, args.more)}
        rows = found.get(args.name, lambda: check(args.dry))()
    print("RESULT", json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
