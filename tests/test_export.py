"""Weights out: bit for bit through each layout and back, and the same answers in the systems that are installed."""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal
from minivit.cli import export as command
from minivit.cli.main import main
from minivit.data import Preparation
from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.models import build, described_settings
from minivit.weights import export as exporting
from minivit.weights import expressed
from minivit.weights.card import Facts, code
from minivit.weights.export import FILES, write_export
from minivit.weights.expressed import FEATURES, GOOGLE, HF, KINDS, ONNX, SYSTEMS, TIMM, check_expressible
from minivit.weights.foreign import open_foreign
from minivit.weights.safetensors import write_safetensors
from minivit.weights.stored import open_stored
from tests.test_hybrid import CASES as HYBRIDS
from tests.test_hybrid import SMALL as HYBRID
from tests.test_options import OPTIONS, SMALL, disturbed, small
from tests.test_tokenizers import CASES as CASES_OF_TOKENIZERS
from tests.test_tokenizers import LITTLE
from tests.test_weights import GOLDENS

IMAGES = normal(mv.Key(4), (7, 2, 12, 8)).astype(np.float32)
FACTS = Facts(Preparation("centre bicubic 0.5", (0.25, 0.5), (0.5, 0.75)), ("cat", "dog", "a `b` <i>"), "digits")
CASES: dict[str, dict[str, Any]] = {
    **OPTIONS,
    "square": {"image_size": 8},
    "mean": {"pool": "mean"},
    "map over all tokens": {"pool": "map_all", "class_token": True},
    "map over patches": {"pool": "map", "class_token": True},
    "no positions": {"position": "none"},
    "distillation": {"distilled": True},
    "no bias": {"qkv_bias": False},
    "tanh GELU": {"activation": "gelu_tanh"},
    "relu": {"activation": "relu"},
    "silu": {"activation": "silu"},
    "tanh": {"activation": "tanh"},
    "another eps": {"norm_eps": 1e-3},
    "hidden head": {"head": "mlp", "activation": "gelu_tanh"},
    "odd MLP": {"mlp_dim": 13, "dim": 6, "heads": 3},
    "timm's": {"layer_scale": 0.1, "qk_norm": True, "registers": 2, "no_embed_class": True},
    "RMSNorm before": {"norm": "rms"},
    "class token, norm after": {"fc_norm": True},
}


def can(case: str, to: str) -> bool:
    s = mv.ViT(**SMALL | CASES[case]).settings
    return to == ONNX or all(to in f.layouts for f in FEATURES if f.of(s))


def pairs(*systems: str) -> list[Any]:
    return [pytest.param(case, to, id=f"{to}-{case}") for to in systems for case in CASES if can(case, to)]


def written(tmp_path: Any, model: Any, to: str, facts: Facts = FACTS) -> Any:
    path = tmp_path / "out"
    write_export(model, path, to, facts)
    return path / "model.safetensors" if to in (TIMM, HF) else path


# ---- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case, to", pairs(TIMM, HF, GOOGLE))
def test_back_bit_for_bit(tmp_path, case, to):
    model = small(np.float32, **CASES[case]).eval()
    path = written(tmp_path, model, to)
    s = model.settings
    size_told = to != GOOGLE or (s.image_shape[1] == s.image_shape[2] and s.position != "none")
    if size_told:
        back = mv.load_model(path)
    else:  # Google's file does not say the size of its images
        rewritten = s.position in ("sincos_1d", "sincos_2d", "learned_2d")
        placed = {"position": "learned", "no_embed_class": False} if rewritten or s.no_embed_class else {}
        back = mv.ViT(**SMALL | CASES[case] | {"activation": "gelu_tanh"} | placed).eval()
        mv.load_weights(back, path)
    state, again, images = model.state_dict(), back.state_dict(), images_of(model)
    if to != GOOGLE or s.activation == "gelu_tanh":
        assert np.array_equal(back(images).numpy(), model(images).numpy())
    made = again.keys() - state.keys() | {
        n for n in state if n.split(".")[0] == "pos_embed" and s.position != "learned"
    }
    if s.no_embed_class and (to != TIMM or s.distilled):  # the tokens beside the patches have positions of 0 then
        made |= {"pos_embed"}
        patches = state["pos_embed"].shape[1]
        assert np.array_equal(again["pos_embed"][:, -patches:], state["pos_embed"])
    assert made <= {"pos_embed", "pos_embed.rows", "pos_embed.columns", "pos_embed.prefix"}
    assert again.keys() - made == state.keys() - made
    assert all(again[n].dtype == a.dtype and np.array_equal(again[n], a) for n, a in state.items() if n not in made)
    if to in (TIMM, HF):
        cut = to == TIMM or case == "square"  # transformers' processors know no rectangle to cut
        assert back.preparation == replace(FACTS.preparation, fit=f"{'centre' if cut else 'squash'} bicubic 0.5")
        assert back.class_names == FACTS.classes


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("to", [TIMM, HF, GOOGLE])
def test_dtypes_keep_their_numbers(tmp_path, to, dtype):
    pytest.importorskip("ml_dtypes")
    model = small(np.float32, image_size=8, activation="gelu_tanh").to(dtype)
    state = {n: np.asarray(a) for n, a in model.state_dict().items()}
    back = mv.load_model(written(tmp_path, model, to)).state_dict()
    for name, a in state.items():
        assert back[name].dtype == (np.float64 if dtype == "float64" else np.float32)
        assert np.array_equal(back[name], a.astype(back[name].dtype))
    if to != GOOGLE:
        kinds = {entry.dtype for entry in open_stored(tmp_path / "out" / "model.safetensors").entries.values()}
        assert kinds == {{"float64": "<f8", "float16": "<f2", "bfloat16": "bfloat16"}[dtype]}


@pytest.mark.parametrize(
    "system, to",
    [("timm", TIMM), ("timm_avg", TIMM), ("hugging_face", HF), ("deit", HF), ("google", GOOGLE), ("big_vision", GOOGLE),
     ("big_vision_map", GOOGLE)],
)  # fmt: skip
def test_a_systems_own_file_comes_out_as_it_came_in(tmp_path, system, to):
    with np.load(GOLDENS) as golden:
        found = {key.removeprefix(f"{system}/"): golden[key] for key in golden.files if key.startswith(f"{system}/")}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / ("x.npz" if to == GOOGLE else "model.safetensors")
    for key in [key for key in found if key.startswith("file/")]:
        (path.parent / key.removeprefix("file/")).write_bytes(found[key].tobytes())
    if to == GOOGLE:
        np.savez(path, **{key.removeprefix("array/"): a for key, a in found.items() if key.startswith("array/")})
    model = mv.load_model(path)
    facts = Facts(Preparation("squash bilinear 1", (0.5,) * 3, (0.5,) * 3), model.class_names)
    before, after = open_foreign(path), open_foreign(written(tmp_path, model, to, facts))
    assert after.layout is before.layout
    wanted = {n: e for n, e in before.entries.items() if not n.startswith(before.layout.passed or ("-",))}
    assert after.entries.keys() == wanted.keys()
    assert all(np.array_equal(after.entries[n].read(), entry.read()) for n, entry in wanted.items())
    here, there = (f.settings() for f in (before, after))
    assert here == there


# ---- what cannot be said ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [TIMM, HF, GOOGLE])
def test_what_a_layout_lacks_is_an_error_that_names_one_that_has_it(tmp_path, to):
    lacking = [case for case in CASES if not can(case, to)]
    assert len(lacking) >= 10
    for case in lacking:
        with pytest.raises(ConfigError) as error:
            write_export(small(np.float32, **CASES[case]), tmp_path / "out", to, FACTS)
        able = error.value.remedy.removeprefix("export it --to ").removesuffix(", which can say it").split(" or ")
        assert ONNX in able and to not in able and set(able) <= set(SYSTEMS)
        assert all(can(case, other) for other in able)
    assert not os.listdir(tmp_path)
    with pytest.raises(ConfigError, match=r"register tokens.*\n.*--to timm or onnx"):
        check_expressible(mv.ViT(**SMALL, registers=1).settings, HF)


def test_what_is_no_vit_of_its_own_blocks(tmp_path):
    from minivit import nn

    for model in (nn.Linear(2, 2), mv.ViT(**SMALL, transformer=nn.Dropout(0.0))):
        for to in SYSTEMS:
            with pytest.raises(ConfigError, match=r"mv\.save"):
                write_export(model, tmp_path / "out", to, FACTS)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_nothing_is_replaced_unless_told(tmp_path):
    model, path = small(np.float32, image_size=8), tmp_path / "out"
    for to in (TIMM, GOOGLE):
        write_export(model, path, to, FACTS)
        with pytest.raises(ConfigError, match="there already"):
            write_export(model, path, to, FACTS)
        write_export(model, path, to, FACTS, overwrite=True)
        with pytest.raises(
            ConfigError, match="is a folder" if to == TIMM else "is a file, and huggingface is a folder"
        ):
            write_export(model, path, GOOGLE if to == TIMM else HF, FACTS, overwrite=True)
        path = tmp_path / "file"
    strange = tmp_path / "out" / "thesis.txt"
    strange.write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        write_export(model, tmp_path / "out", HF, FACTS, overwrite=True)
    assert strange.read_text() == "years of work"
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for to in (TIMM, GOOGLE):
        with pytest.raises(ConfigError, match="there already"):
            write_export(model, link, to, FACTS)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "out"]


@pytest.mark.parametrize("to", [TIMM, GOOGLE])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, to):
    model, path = small(np.float32, image_size=8), tmp_path / "out"
    write_export(model, path, to, FACTS)
    file = path / "model.safetensors" if to == TIMM else path
    before = file.read_bytes()
    write_export(model, tmp_path / "again", to, FACTS)
    again = tmp_path / "again" / "model.safetensors" if to == TIMM else tmp_path / "again"
    assert again.read_bytes() == before  # equal arrays, equal bytes
    wrong = "differing" if to == TIMM else "_not_in_archive"
    monkeypatch.setattr(exporting, wrong, lambda *args: "head.bias")
    with pytest.raises(CheckpointError, match=r"head\.bias did not come back"):
        write_export(small(np.float32, image_size=8, seed=2), path, to, FACTS, overwrite=True)
    assert file.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["again", "out"]


def test_the_format_of_safetensors(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=">f4").reshape(2, 3).T, "a": np.float64(1.5).reshape(()), "c": np.ones(3, np.float16),
        "none": np.ones((0, 2), np.float32),
    }  # fmt: skip
    with open(tmp_path / "x", "wb") as f:
        write_safetensors(f, arrays, {"format": "pt"})
    found = (tmp_path / "x").read_bytes()
    length = struct.unpack("<Q", found[:8])[0]
    header = json.loads(found[8 : 8 + length])
    assert length % 8 == 0 and list(header) == ["__metadata__", "a", "b", "none", "c"]
    assert all(
        entry["data_offsets"][0] % arrays[name].itemsize == 0 for name, entry in header.items() if name in arrays
    )
    for name, entry in open_stored(tmp_path / "x").entries.items():
        assert np.array_equal(entry.load(), arrays[name]) and entry.shape == arrays[name].shape


def test_a_setting_that_is_not_known_here(tmp_path, monkeypatch):
    model = small(np.float32, drop_path=0.1)
    monkeypatch.setattr(expressed, "KNOWN", expressed.KNOWN - {"drop_path"})
    for to in SYSTEMS:
        with pytest.raises(ConfigError, match=r"drop_path is 0\.1 cannot be exported"):
            write_export(model, tmp_path / "out", to, FACTS)
    assert {name for kind in KINDS[ONNX] for name in described_settings(kind)} >= expressed.KNOWN


def test_other_kinds_of_models_know_where_they_can_go(tmp_path):
    cct = build("cct", {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8})
    for to in (TIMM, HF, GOOGLE):
        with pytest.raises(
            ConfigError, match=r"the model is a cct, for which .* has no place\n.*--to onnx, or keep it"
        ):
            write_export(cct, tmp_path / "out", to, FACTS)
        with pytest.raises(ConfigError, match=r"\(tokenizer 't2t'\)\n.*--to onnx, which can say it"):
            check_expressible(mv.ViT(patch_size=4, tokenizer="t2t").settings, to)


def test_tokens_that_are_no_patches_are_refused_by_all_but_onnx():
    with pytest.raises(ConfigError, match="use one of 'patch', ") as error:
        mv.ViT(tokenizer="")
    names = re.findall(r"'(\w+)'", error.value.remedy)
    assert {"normed", "shifted", "conv_stem", "t2t"} < set(names)
    for tokenizer in names[1:]:
        settings = mv.ViT(patch_size=4, tokenizer=tokenizer).settings
        for to in (TIMM, HF, GOOGLE):
            with pytest.raises(ConfigError, match=f"tokenizer '{tokenizer[:3]}"):
                check_expressible(settings, to)


def test_a_model_that_its_settings_do_not_describe(tmp_path):
    model = small(np.float32)
    model.head = mv.nn.Linear(8, 4)
    for to in SYSTEMS:
        with pytest.raises(ConfigError, match="not those of its settings"):
            write_export(model, tmp_path / "out", to, FACTS)


def test_cards_and_configs_quote_what_is_hostile(tmp_path):
    names = ("``` \n# Owned", "\ud800<script>", "---\nlicense: mine")
    facts = Facts(FACTS.preparation, names, "/home/me/secret/cats.npz", "")
    write_export(small(np.float32), tmp_path / "out", TIMM, facts)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\n# Owned" not in text and "\nlicense" not in text and "secret" not in text and "`cats.npz`" in text
    assert "<script>" in text and code("``` x") == "```` ``` x ````"
    assert mv.load_model(tmp_path / "out" / "model.safetensors").class_names == names
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors"]


def test_the_function(tmp_path):
    data = mv.data.load("digits")
    model = mv.create_model("vit_digits")
    with pytest.raises(ConfigError, match="prepared"):
        mv.export(model, tmp_path / "out", "timm")
    with pytest.raises(ConfigError, match="did you mean 'huggingface'"):
        mv.export(model, tmp_path / "out", "hugingface", data=data)
    with pytest.raises(DataError):
        mv.export(mv.ViT(**SMALL), tmp_path / "out", "timm", data=data)
    mv.export(model, tmp_path / "out", "huggingface", data=data, tell=(told := []).append)
    back = mv.load_model(tmp_path / "out" / "model.safetensors")
    assert back.class_names == tuple(data.classes) and back.preparation.mean == tuple(data.mean)
    assert any("areas" in line for line in told)


def test_the_command(tmp_path, monkeypatch, capsys):
    assert command.SYSTEMS == SYSTEMS
    monkeypatch.chdir(tmp_path)
    model = small(np.float32, image_size=8, activation="gelu_tanh")
    model.preparation, model.class_names = FACTS.preparation, FACTS.classes
    mv.save(model, "mine.npz")
    for to, name in (("timm", "mine-timm"), ("huggingface", "mine-huggingface"), ("google", "mine-google.npz")):
        assert main(["export", "mine.npz", "--to", to]) == 0
        assert name in capsys.readouterr().out and os.path.exists(name)
        assert main(["export", "mine.npz", "--to", to]) == 1
        assert "there already" in capsys.readouterr().err
        assert main(["export", "mine.npz", "--to", to, "--overwrite"]) == 0
    assert set(os.listdir("mine-huggingface")) == set(FILES)
    assert main(["export", "mine-timm", "--to", "huggingface", "-o", "again"]) == 0
    assert Path("again/config.json").read_text() == Path("mine-huggingface/config.json").read_text()
    before = Path("mine.npz").read_bytes()
    assert main(["export", "mine.npz", "--to", "google", "-o", "mine.npz", "--overwrite"]) == 1
    assert Path("mine.npz").read_bytes() == before
    assert main(["export", "mine-timm", "--to", "timm", "-o", "mine-timm", "--overwrite"]) == 1
    assert main(["export", "mine.npz", "--to", "timm", "-o", ""]) == 1
    assert main(["export", "mine.npz", "--to", "timmm"]) == 2
    assert main(["predict", "mine-timm", "none.png"]) == 3


# ---- in the systems themselves ---------------------------------------------------------------------------------------


def close(theirs: Any, ours: Any) -> None:
    np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5 * np.abs(ours).max())


def images_of(model: Any) -> np.ndarray:
    c, h, w = model.settings.image_shape
    return np.ascontiguousarray(IMAGES[:, :c, :h, :w])


@pytest.mark.parametrize("case, to", pairs(ONNX))
def test_onnxruntime_gives_the_same_logits(tmp_path, case, to):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = small(np.float32, **CASES[case]).eval()
    path, images = written(tmp_path, model, to), images_of(model)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        (logits,) = session.run(["logits"], {"images": images[:batch]})
        close(logits, model(images[:batch]).numpy())
    made = onnx.load(path)
    about = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(about["mean"]) == [0.25, 0.5] and json.loads(about["classes"]) == list(FACTS.classes)
    arrays = {a.name: onnx.numpy_helper.to_array(a) for a in made.graph.initializer}
    lost = {name for name in model.state_dict() if name not in arrays}
    assert all(name.startswith("pos_embed.") or "relative_position" in name or ".pos_embed" in name for name in lost)
    assert all(np.array_equal(arrays[n], a) for n, a in model.state_dict().items() if n in arrays)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "normed": LITTLE["normed"],
    "conv_stem": LITTLE["conv_stem"],
    **CASES_OF_TOKENIZERS,
    **{f"hybrid, {case}": ("hybrid", HYBRID | settings) for case, settings in HYBRIDS.items()},
    "resnet": ("resnet", {"image_size": (9, 12), "in_channels": 2, "num_classes": 3, "depths": (1, 2), "width": 8,
                          "group": 4}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_onnxruntime_gives_the_same_logits_of_other_models(tmp_path, case):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model: Any = disturbed(build(*OTHERS[case])).eval()
    path = written(tmp_path, model, ONNX)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = normal(mv.Key(4), (7, *model.settings.image_shape)).astype(np.float32)
    for batch in (1, 7):
        (logits,) = session.run(["logits"], {"images": images[:batch]})
        close(logits, model(images[:batch]).numpy())
    made = onnx.load(path)
    about = {entry.key: entry.value for entry in made.metadata_props}
    assert json.loads(about["mean"]) == [0.25, 0.5] and json.loads(about["std"]) == [0.5, 0.75] and about["preparation"]
    arrays = {a.name: onnx.numpy_helper.to_array(a) for a in made.graph.initializer}
    lost = {name for name in model.state_dict() if name not in arrays}
    assert all("conv" in name and f"{name}.standardised" in arrays for name in lost)
    assert all(np.array_equal(arrays[n], a) for n, a in model.state_dict().items() if n in arrays)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_onnx_is_float32(tmp_path, dtype):
    pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = small(np.float32).to(dtype)
    (note,) = write_export(model, tmp_path / "out", ONNX, FACTS)
    assert dtype in note and "float32" in note
    session = runtime.InferenceSession(str(tmp_path / "out"), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": IMAGES})
    close(logits, model.to(np.float32).eval()(IMAGES).numpy())


@pytest.mark.parametrize("case, to", pairs(TIMM))
def test_timm_gives_the_same_logits(tmp_path, case, to):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = small(np.float32, **CASES[case]).eval()
    path = written(tmp_path, model, to)
    theirs = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    state = {n: torch.from_numpy(np.array(e.load())) for n, e in open_stored(path).entries.items()}
    theirs.load_state_dict(state, strict=True)
    images = images_of(model)
    with torch.no_grad():
        close(theirs(torch.from_numpy(images)).numpy(), model(images).numpy())
    config = timm.data.resolve_model_data_config(theirs)
    assert (
        tuple(config["mean"]) == FACTS.preparation.mean
        and config["crop_pct"] == 0.5
        and config["crop_mode"] == "center"
    )
    assert tuple(config["input_size"]) == model.settings.image_shape and config["interpolation"] == "bicubic"
    assert theirs.pretrained_cfg["label_names"] == list(FACTS.classes)


@pytest.mark.parametrize("case, to", pairs(HF))
def test_transformers_gives_the_same_logits(tmp_path, case, to):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = small(np.float32, **CASES[case]).eval()
    path = written(tmp_path, model, to)
    kind = json.loads((path.parent / "config.json").read_text())["architectures"][0]
    theirs, said = getattr(transformers, kind).from_pretrained(path.parent, output_loading_info=True)
    assert not any(said.values()), said
    images = images_of(model)
    with torch.no_grad():
        close(theirs.eval()(torch.from_numpy(images)).logits.numpy(), model(images).numpy())
    assert theirs.config.id2label == dict(enumerate(FACTS.classes))


def test_the_safetensors_package_reads_it(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    model = small(np.float32)
    found = numpy.load_file(written(tmp_path, model, TIMM))
    state = model.state_dict()
    assert found.keys() == state.keys() and all(np.array_equal(found[n], a) for n, a in state.items())
