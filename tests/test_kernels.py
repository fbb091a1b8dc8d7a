"""Which kernels a step needs: what is planned without a GPU is what is launched on one; doctor compiles it."""

import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from minivit.backend import compiling, cubins, tile, to_device
from minivit.cli.bars import compiling_shown
from minivit.cli.main import main
from minivit.errors import ConfigError, KernelError
from minivit.measure.kernels import kernels_of
from minivit.models import build, configuration, model_outline
from minivit.ops.cuda.sums import Arena
from minivit.runs.recipes import recipe_model, recipes_with_models
from minivit.train.ema import EMA
from minivit.train.optim import AdamW
from minivit.train.step import TrainStep
from tests import compile_kernels


def launched(kind, values, batch, precision, monkeypatch):
    """Return the kernels that steps on the stand-in for CuPy load, and how often they launch each."""
    counts, device = Counter(), object()
    monkeypatch.setattr(tile, "_load", lambda plan: counts.update({plan: 0}) or (lambda *_: counts.update([plan])))
    monkeypatch.setattr(tile, "_device", lambda: device)
    model = build(kind, values).to("cuda")
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    average = EMA(optimizer.store, 0.999)
    images = np.zeros((batch, *model.settings.image_shape), np.float32)
    classes = model.settings.num_classes
    for labels in (np.zeros(batch, np.int64), np.full((batch, classes), 1 / classes, np.float32)):
        for clip_norm, ema, pieces in ((None, None, 1), (1.0, average, 2)):
            micro_batch = -(-batch // pieces)
            step = TrainStep(
                model, optimizer, micro_batch=micro_batch, clip_norm=clip_norm, precision=precision, ema=ema
            )
            on_gpu = step._batch(*(to_device(x, "cuda") for x in (images, labels)))
            step._work(replace(on_gpu, sums=Arena(optimizer.store.grad)))
    return counts


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("batch", [3, 65])
@pytest.mark.parametrize("settings", [{}, {"pool": "mean", "qkv_bias": False, "dim": 40, "heads": 2, "mlp_dim": 88}])
def test_what_is_planned_is_what_is_launched(strict_cupy, monkeypatch, settings, batch, precision):
    """By steps on the stand-in for CuPy: the same kernels, with the same promises of the same arrays, as often."""
    kind, usual = configuration("vit_digits")
    values = {**usual, **settings, "depth": 2}
    planned = kernels_of(kind, values, precision)
    assert launched(kind, values, batch, precision, monkeypatch) == planned
    assert {"layer_norm_backward", "gelu_backward", "adamw", "average"} <= {plan.factory for plan in planned}


@pytest.mark.parametrize("number", [2, 6, 7, 34])
def test_a_kernel_serves_batches_of_all_sizes_and_models_of_all_depths(monkeypatch, number):
    kind, values = configuration("vit_digits")
    few = kernels_of(kind, values, "bfloat16")
    monkeypatch.setattr("minivit.measure.kernels.IMAGES", number)
    assert few.keys() == kernels_of(kind, {**values, "depth": 40}, "bfloat16").keys()


def test_recipes_models():
    for name in recipes_with_models():
        kind, values = recipe_model(name)
        assert model_outline(kind, values).num_parameters() > 0
    assert recipe_model("mnist")[1]["patch_size"] == 7
    assert "finetune@2" not in recipes_with_models()
    with pytest.raises(ConfigError, match="no model"):
        recipe_model("finetune")


# ---- minivit doctor --------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that only counts, and an empty cache."""
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiling, "compiler", lambda: ("tileiras", "1.0+2.0"))
    monkeypatch.setattr(compiling, "compiled", lambda plan, arch: made.append((plan, arch)) or b"cubin")
    return made


def test_doctor_compiles_a_models_kernels(compiler, capsys, monkeypatch):
    assert main(["doctor", "--build-kernels", "sm_90", "sm_80", "--for", "vit_digits", "mnist"]) == 0
    first = capsys.readouterr().out
    plans = {plan for plan, arch in compiler if arch == "sm_90"}
    assert plans == {plan for plan, arch in compiler if arch == "sm_80"}
    wanted = kernels_of(*configuration("vit_digits"), "bfloat16")
    assert wanted.keys() <= plans
    assert f"sm_90: {len(plans):,} kernels compiled, 0 were there, 0 failed" in first
    assert main(["doctor", "--build-kernels", "sm_90", "--for", "vit_digits", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["built"][0]["built"] == 0 and found["built"][0]["cached"] == found["kernels"] <= len(plans)
    assert found["built"][0]["folder"] == str(cubins.folder() / "sm_90")
    assert main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels"))
    assert "compiler 1.0+2.0" in line and f"{len(plans):,} for sm_90" in line


def test_doctor_names_a_kernel_that_does_not_compile(compiler, capsys, monkeypatch):
    def compiled(plan, arch):
        if plan.factory.startswith("layer_norm"):
            raise KernelError(f"the kernel {plan} is broken", "mend it")
        return b"cubin"

    monkeypatch.setattr(compiling, "compiled", compiled)
    assert main(["doctor", "--build-kernels", "sm_90", "--for", "vit_digits", "--dtype", "float32"]) == 1
    out, err = capsys.readouterr()
    assert "layer_norm_forward" in err and "→ mend it" in err
    assert " 0 failed" not in out


def test_doctor_without_a_compiler(compiler, capsys, monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: ("", ""))
    assert main(["doctor", "--build-kernels", "sm_90"]) == 1
    assert "pip install 'minivit[tile]'" in capsys.readouterr().err
    assert main(["doctor"]) == 0
    assert "no compiler" in capsys.readouterr().out


def test_doctor_tells_whether_kernels_run_here(compiler, capsys, strict_cupy, monkeypatch):
    for why_not, said in ((None, "they run here, on sm_90"), ("this GPU is too old", "this GPU is too old")):
        monkeypatch.setattr(tile, "why_not", lambda why_not=why_not: why_not)
        assert main(["doctor"]) == 0
        assert said in capsys.readouterr().out


@pytest.mark.parametrize("words", [["sm_70"], ["sm_90", "--for", "vit_digit"], ["sm_90", "--dtype", "int8"]])
def test_doctor_refuses_what_it_does_not_know(compiler, capsys, words):
    assert main(["doctor", "--build-kernels", *words]) != 0
    assert "error" in capsys.readouterr().err
    assert not compiler


def test_a_bar_tells_what_is_compiled(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", screen := Terminal())
    with compiling_shown():
        tell = compiling._watched.tell
        assert screen.getvalue() == "", "nothing, as long as nothing is compiled"
        for plan in list(kernels_of(*configuration("vit_digits"), "float32"))[:3]:
            tell(plan)
    assert "compiling kernels" in screen.getvalue() and "3kernel" in screen.getvalue()
    assert compiling._watched.tell is None


# ---- the table of spills ---------------------------------------------------------------------------------------------

SAID = """
Resource usage:
 Common:
  GLOBAL:0
 Function gelu_forward:
  REG:80 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_spills_are_read_and_held_to_the_table():
    assert compile_kernels.parse_usage(SAID) == {"registers": 80, "spilled": 24}
    with pytest.raises(ValueError, match="registers"):
        compile_kernels.parse_usage("cuobjdump info: File 'x' does not contain device code")
    found = {"a": {"registers": 80, "spilled": 24}, "b": {"registers": 80, "spilled": 0}}
    assert compile_kernels.worse(found, {"a": found["a"]}) == []
    assert len(compile_kernels.worse(found, {})) == len(compile_kernels.worse(found, {"a": found["b"]})) == 1


def test_the_script_has_kernels_to_compile():
    plans = compile_kernels.plans_of(["digits"])
    assert {"adamw", "layer_norm_forward"} <= {plan.factory for plan in plans}
    table = json.loads(compile_kernels.GOLDEN.read_text())
    assert all(used.keys() == {"registers", "spilled"} for kernels in table.values() for used in kernels.values())
