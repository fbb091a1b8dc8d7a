"""The numbers that a run works in: set, settled where it starts, recorded, and held to when it is resumed."""

from __future__ import annotations

import gc
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.cli.main import main
from minivit.errors import DeviceError
from minivit.measure.gpu_costs import gpu_memory, gpu_step_memory, kept_on_gpu
from minivit.models import model_outline
from minivit.runs import job
from minivit.runs.changes import read_config, settings_of_run
from minivit.runs.job import Job, dtype_on
from minivit.runs.read import read_run
from minivit.runs.settings import resolve

SMALL = ["--set", "model.depth=1", "--set", "model.dim=16", "--set", "model.heads=2", "--set", "model.mlp_dim=32"]
TINY = ["--epochs", "1", "--val-fraction", "0", "-q", *SMALL]


def settled(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "config.toml").read_text())["train"]


@pytest.fixture
def run(here: Path, archive: Path, small_pictures: None) -> Path:
    assert main(["train", str(archive), *TINY, "--epochs", "2", "--name", "run"]) == 0
    return here / "runs" / "run"


# ---- the setting -----------------------------------------------------------------------------------------------------


def test_a_cpu_has_float32(run: Path) -> None:
    assert dtype_on("cpu", "auto") == dtype_on("cpu", "float32") == ("float32", "")
    assert settled(run)["dtype"] == "float32"
    assert 'dtype          = "float32"' in re.sub(" +=", "          =", (run / "config.toml").read_text())


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float16"])
def test_a_cpu_has_nothing_else(archive: Path, here: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert main(["train", str(archive), *TINY, "--dtype", dtype, "--device", "cpu"]) == 1
    assert f"training in {dtype} on a CPU\n  → use float32" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_an_unknown_dtype_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dtype", "bfloat61"]) == 1
    assert "unknown train.dtype 'bfloat61'\n  → did you mean 'bfloat16'" in capsys.readouterr().err


def test_auto_on_a_gpu(strict_cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = lambda text: monkeypatch.setattr(strict_cupy.cuda.Device, "compute_capability", text, raising=False)
    capability("80")
    assert dtype_on("cuda:0", "auto") == ("bfloat16", "")
    assert dtype_on("cuda:0", "float32") == ("float32", "")
    capability("75")
    dtype, why = dtype_on("cuda:0", "auto")
    assert dtype == "float32" and "compute capability 7.5" in why
    with pytest.raises(DeviceError, match="bfloat16 on cuda:0"):
        dtype_on("cuda:0", "bfloat16")


def test_a_run_on_a_gpu_says_what_it_works_in(strict_cupy: Any, archive: Path) -> None:
    typed = {"data.name": str(archive), "train.device": "cuda", "model.depth": 1, "model.dim": 32, "model.heads": 2}
    made = Job(resolve(typed))
    assert made.settings["train.dtype"] == "bfloat16"
    assert made.settings.origins["train.dtype"] == "this machine"
    assert "device      cuda:0, bfloat16" in made.about
    assert made.make_trainer(None).step.precision.name == "bfloat16"


# ---- resuming and reading --------------------------------------------------------------------------------------------


def test_another_dtype_is_a_named_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--dtype", "bfloat16"]) == 1
    assert "train.dtype cannot be set" in capsys.readouterr().err
    config = run / "config.toml"
    config.write_text(re.sub(r'(dtype +=) "float32"', r'\1 "tf32"', config.read_text()))
    assert main(["train", "--resume", str(run)]) == 1
    assert "not as it was when the run began: train.dtype: float32 → tf32" in capsys.readouterr().err


def forget_dtype(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a run one from before there was the setting."""
    from minivit.runs import changes

    config = run / "config.toml"
    config.write_text(re.sub(r"dtype +=.*\n", "", config.read_text()))
    real = changes.kept_settings

    def kept(meta: Any) -> Any:
        found = real(meta)
        found.pop("train.dtype", None)
        return found

    monkeypatch.setattr(changes, "kept_settings", kept)


def test_a_run_from_before_is_float32(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minivit.weights.checkpoint import load_checkpoint

    forget_dtype(run, monkeypatch)
    meta = load_checkpoint(run / "checkpoints" / "last.npz").meta
    settings = settings_of_run(read_config(run / "config.toml"), meta)
    assert (settings["train.dtype"], settings.origins["train.dtype"]) == ("float32", "the run's start")
    assert read_run(run)["settings"]["train.dtype"] == "float32"
    (run / "report.html").unlink()
    assert main(["train", "--resume", str(run), "-q"]) == 0
    config = run / "config.toml"
    config.write_text(config.read_text().replace("[train]", '[train]\ndtype = "bfloat16"'))
    assert main(["train", "--resume", str(run), "-q"]) == 1
    assert "train.dtype: float32 → bfloat16" in capsys.readouterr().err


# ---- memory ----------------------------------------------------------------------------------------------------------

TI4: dict[str, Any] = {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 12, "heads": 3, "num_classes": 10}


def test_memory_of_a_step_by_the_closed_form() -> None:
    model = model_outline("vit", TI4)
    kept = kept_on_gpu(model)
    tokens, dim, mlp = 65, 192, 768
    # of a block: two inputs of a LayerNorm, two of what follows it, q, k and v, the heads' output, gelu's both sides
    block = tokens * (2 * dim + 2 * dim + 3 * dim + dim + 2 * mlp)
    assert kept.values == pytest.approx(12 * block, rel=0.06)  # but the last block's, of which one token is wanted
    assert (kept.again, kept.largest, kept.scores) == (0, tokens * mlp, 3 * tokens**2)
    sizes = gpu_step_memory(model, 64, "bfloat16")
    assert sizes["parameters"] == sizes["gradient"] == 2 * sizes["working copy"] == 4 * model.num_parameters()
    assert sizes["kept"] == 64 * (2 * kept.values + 4 * kept.statistics)
    assert gpu_step_memory(model, 64)["kept"] == 64 * 4 * (kept.values + kept.statistics)


def test_memory_of_a_step_is_that_measured_on_a_gpu() -> None:
    """A captured step of Ti/4 at batch 1,024 held 9.74 GiB in float32; one in bfloat16, its kernels fused, 4.9."""
    model = model_outline("vit", TI4)
    assert gpu_memory(model, 1024) / 2**30 == pytest.approx(9.74, rel=0.1)
    assert gpu_memory(model, 1024, "bfloat16") / 2**30 == pytest.approx(4.9, rel=0.1)
    again = model_outline("vit", TI4 | {"recompute": True})
    assert gpu_memory(again, 1024, "bfloat16") < 0.4 * gpu_memory(model, 1024, "bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("side", "patch", "dim", "heads", "rows"), [(14, 1, 64, 4, 2), (32, 4, 192, 3, 4)])
def test_memory_of_a_step_is_that_counted(
    idle_cupy: Any, dtype: str, side: int, patch: int, dim: int, heads: int, rows: int
) -> None:
    """The stand-in's pools count the arrays that are alive; one batch more is predicted, the next."""
    settings = {"image_size": side, "patch_size": patch, "dim": dim, "heads": heads, "depth": 2, "num_classes": 10}
    outlined, model = model_outline("vit", settings), mv.ViT(**settings).to("cuda")
    gc.collect()  # what other tests have left
    default = idle_cupy.get_default_memory_pool()
    before = default.used_bytes() - 4 * model.num_parameters()
    step = mv.TrainStep(model, mv.optim.AdamW(model.named_parameters(), lr=1e-3), precision=dtype)
    images, labels = idle_cupy.zeros((rows, 3, side, side), np.float32), idle_cupy.zeros(rows, np.int64)
    for _ in range(3):
        step(images, labels)
    assert not step.why_launched
    counted = default.used_bytes() - before + step.underway.capture.memory()
    predicted = gpu_step_memory(outlined, rows, dtype)
    assert sum(predicted.values()) - predicted["workspace"] - images.nbytes == pytest.approx(counted, rel=0.15)


def test_images_to_validate_with_leave_room_for_the_step(
    strict_cupy: Any, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = {"data.name": str(archive), "train.device": "cuda", "model.depth": 1, "model.dim": 32, "model.heads": 2}
    run = Job(resolve(typed | {"data.val_fraction": 0.2}))
    monkeypatch.setattr(job, "available_memory", lambda device="cpu": run.memory + 100)
    valid = run.parts.held_loader(run.parts.valid, "cuda", run.room())
    assert "100 of cuda:0 are for them" in valid.remark and len(list(valid.batches(0))) == 1
    assert Job(resolve(typed | {"train.device": "cpu"})).room() is None


def test_a_run_too_large_for_the_gpu_is_refused(
    strict_cupy: Any, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = {"data.name": str(archive), "train.device": "cuda", "model.depth": 2, "model.dim": 32, "model.heads": 2}
    needed = Job(resolve(typed)).memory
    monkeypatch.setattr(job, "available_memory", lambda device="cpu": needed - (device != "cpu"))
    with pytest.raises(job.ConfigError, match=r"of the memory of cuda:0, .* are free") as error:
        Job(resolve(typed))
    assert "--grad-accum-steps" in error.value.remedy and "model.recompute=true" in error.value.remedy
    assert Job(resolve(typed | {"train.batch_size": 8})).memory < needed
    # as many images in an update, fewer at once
    accumulated = Job(resolve(typed | {"train.batch_size": 8, "train.grad_accum_steps": 8}))
    assert accumulated.loader.batch_size == 64 and accumulated.memory < needed
