"""CCT, shifted patches and tokens to tokens: against other systems' numbers, and against their own derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import nn, ops, study
from minivit.backend import normal, tile
from minivit.data import Dataset
from minivit.errors import CheckpointError, ConfigError, MinivitError, MisfitError, ShapeError
from minivit.measure.costs import layer_costs, model_costs
from minivit.measure.tape import read_tape
from minivit.models import MODELS, build, configuration, count_parameters, list_models, model_outline, read_settings
from minivit.nn.module import Constant
from minivit.runs.explaining import image_of_file, write_page
from minivit.runs.trained import open_trained
from minivit.train import capture
from minivit.train.optim import AdamW, Muon
from minivit.weights import shi_labs, yitu
from minivit.weights.foreign import open_foreign
from minivit.weights.names import Sizes
from minivit.weights.native import load_model
from minivit.weights.stored import Entry
from minivit.weights.transfer import init_from
from tests import strict
from tests.browser import CHROMIUM, Page
from tests.weight_files import safetensors

GOLDENS = Path(__file__).parent / "goldens" / "tokenizers.npz"
SIZES: dict[str, Any] = {"in_channels": 2, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2, "mlp_dim": 12}
PLAIN = SIZES | {"image_size": (12, 8), "patch_size": 4, "qkv_bias": False}
T2T = SIZES | {
    "image_size": (48, 32), "patch_size": 16, "qkv_bias": False, "norm_eps": 1e-5, "position": "sincos_1d",
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "cct_3x1": ("cct", SIZES | {"image_size": (10, 7)}),
    "cct_7x2": ("cct", SIZES | {"image_size": (32, 48), "kernel": 7, "convs": 2, "position": "none"}),
    "shifted": ("vit", PLAIN | {"tokenizer": "shifted"}),
    "shifted_lsa": ("vit", PLAIN | {"tokenizer": "shifted", "lsa": True}),
    "t2t": ("vit", T2T | {"tokenizer": "t2t"}),
    "t2t_transformer": ("vit", T2T | {"tokenizer": "t2t_transformer"}),
}
LITTLE = {  # as above, on smaller images
    "normed": ("vit", PLAIN | {"tokenizer": "normed", "image_size": (8, 4)}),
    "cct_3x2": ("cct", SIZES | {"image_size": (6, 5), "convs": 2, "position": "sincos_1d"}),
    "cct_3x1": CASES["cct_3x1"],
    "shifted_lsa": CASES["shifted_lsa"],
    "conv_stem": ("vit", PLAIN | {"image_size": (8, 12), "tokenizer": "conv_stem"}),
    "t2t": ("vit", T2T | {"image_size": (8, 4), "patch_size": 4, "tokenizer": "t2t"}),
    "t2t_transformer": ("vit", T2T | {"image_size": (16, 8), "patch_size": 8, "tokenizer": "t2t_transformer"}),
}


def wave(shape: tuple[int, ...], phase: int) -> np.ndarray:
    """The numbers of tests/goldens/make_tokenizers.py, which says what they are."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return np.sin(np.sqrt(2.0) * np.mod(i * i, 1000003.0) + phase).reshape(shape).astype(np.float32)


def small(case: str, dtype: Any = np.float64, **settings: Any) -> Any:
    """A model of which nothing is neutral."""
    kind, values = LITTLE[case]
    model: Any = build(kind, values | settings)
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * (0.3 if p.requires_grad else 0.0)
    return model.to(dtype)


def images_of(model: Any, count: int = 3) -> np.ndarray:
    return normal(mv.Key(4), (count, *model.settings.image_shape))


def relative(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---- against other systems -------------------------------------------------------------------------------------------


def golden(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return what a system computed, and its state by its own names; minivit's where it has none."""
    with np.load(GOLDENS, allow_pickle=False) as file:
        of = {name.partition("/")[2]: file[name] for name in file.files if name.startswith(f"{case}/")}
    kind, settings = CASES[case]
    own, state = dict(build(kind, settings).named_parameters()), {}
    assert sorted(of["names"]) == sorted(own)
    for i, (name, theirs) in enumerate(zip(of["names"], of["theirs"], strict=True)):
        p = own[name]
        scale = 0.3 if p.ndim < 2 else min(0.5, 1.5 * p.data[0].size ** -0.5)
        added = np.float32("norm" in theirs and name.endswith("weight"))
        state[str(theirs)] = wave(p.shape, i) * np.float32(scale) + added
    if case.startswith("t2t"):  # whose files have their fixed positions, too
        state["pos_embed"] = waves(7, 8)
    return of, state


def waves(tokens: int, dim: int) -> np.ndarray:
    """Sines and cosines in turn, (1, tokens, dim), as T2T-ViT's authors make them."""
    angles = np.array([[t / 10000 ** (2 * (j // 2) / dim) for j in range(dim)] for t in range(tokens)])
    angles[:, 0::2], angles[:, 1::2] = np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])
    return angles[None].astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_the_others(case, tmp_path):
    """Of their own files, by the loader for everybody."""
    of, state = golden(case)
    kind, settings = CASES[case]
    model: Any = build(kind, settings)
    path = tmp_path / "a.npz"
    np.savez(path, **state)
    mv.load_weights(model, path, tell=(told := []).append)
    assert told == []
    model.to(np.float64)
    own = dict(model.named_parameters())
    images = wave((3, *model.settings.image_shape), 100 + list(CASES).index(case))
    logits = model(images.astype(np.float64))
    assert relative(logits.numpy(), of["logits"]) < 1e-10
    ops.cross_entropy(logits, of["labels"]).backward()
    whole = np.split(of["grads"], np.cumsum([own[name].data.size for name in of["of"]])[:-1])
    for name, g in zip(of["of"], whole, strict=True):
        assert np.abs(own[name].grad.ravel() - g).max() <= 1e-9 * np.abs(g).max() + 1e-15, name
    for name, along in zip(of["names"], of["along"], strict=True):
        grad, learned = own[name].grad, own[name].requires_grad
        assert learned == (not name.endswith(".w")) and (grad is not None) == learned, name
        for k in range(3 if learned else 0):
            terms = grad * wave(grad.shape, 300 + k)
            assert abs(terms.sum() - along[k]) <= 1e-9 * np.abs(terms).sum() + 1e-15, name
    single = model.to(np.float32)(images)
    assert single.dtype == np.float32 and relative(single.numpy(), of["logits"]) < 1e-5


@pytest.mark.parametrize("case", LITTLE)
def test_every_gradient_by_a_complex_step_and_a_trace_that_adds_up(case):
    model = small(case).eval()
    images = images_of(model, 2)
    report = mv.check_module(model, images, order=1 if "t2t" in case else 2)
    assert report.worst.method == "complex" and report.worst.error <= 1e-12
    learned = [p for p in model.parameters() if p.requires_grad]
    assert len(report.checks) >= len(learned)

    trace = model.trace(images)
    assert relative(trace.logits.numpy(), model(images).numpy()) < 1e-12
    assert trace.tokens[0].shape[1] == model.num_tokens == math.prod(trace.grid) + trace.prefix
    for i, p in enumerate(trace.attention):
        np.testing.assert_allclose(p.numpy().sum(-1), 1.0, rtol=1e-12)
        whole = trace.tokens[i].numpy() + trace.attended[i].numpy() + trace.mlp[i].numpy()
        np.testing.assert_allclose(whole, trace.tokens[i + 1].numpy(), atol=1e-12)
    assert all(np.abs(g.numpy()).max() > 1e-9 for g in mv.grad(trace.logits[:, 1].sum(), trace.attention))


def test_patches_by_a_linear_map_are_those_of_a_convolution():
    """Equal weights, equal results and gradients: the one is the other with kernel and stride of a patch's size."""
    embed = nn.PatchEmbed((12, 8), (4, 2), 3, 5).to(np.float64)
    conv = nn.Conv2d(3, 5, (4, 2), (4, 2)).to(np.float64)
    conv.load_state_dict(embed.proj.state_dict())
    images, g = normal(mv.Key(1), (2, 3, 12, 8)), normal(mv.Key(2), (2, 12, 5))
    tokens, places = embed(images), conv(mv.tensor(images))  # (B, N, D), (B, D, rows, columns)
    np.testing.assert_allclose(places.numpy().reshape(2, 5, 12).swapaxes(1, 2), tokens.numpy(), rtol=1e-13, atol=1e-14)
    (tokens * g).sum().backward()
    (places * g.swapaxes(1, 2).reshape(places.shape)).sum().backward()
    for a, b in ((embed.proj.weight, conv.weight), (embed.proj.bias, conv.bias)):
        np.testing.assert_allclose(a.grad, b.grad, rtol=1e-12, atol=1e-13)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cct_2_3x2_32", 283_723), ("cct_4_3x2_32", 482_123), ("cct_7_3x1_32", 3_760_139),
        ("cct_14_7x2_224", 22_367_273), ("t2t_vit_7", 4_310_222), ("t2t_vit_14", 21_545_550),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_papers(name: str, parameters: int) -> None:
    """T2T-ViT's count its fixed positions."""
    kind, settings = configuration(name)
    fixed = 197 * settings["dim"] if name.startswith("t2t") else 0
    assert count_parameters(kind, settings) + fixed == parameters


def test_parameters_of_the_others_as_rounded():
    millions = {"10": 5.9, "12": 6.9, "19": 39.2, "24": 64.1, "t_14": 21.5, "t_19": 39.2, "t_24": 64.1}
    for size, printed in millions.items():
        kind, settings = configuration(f"t2t_vit_{size}")
        found = (count_parameters(kind, settings) + 197 * settings["dim"]) / 1e6
        assert abs(found - printed) < 0.06, (size, found)
    assert "cct_7_3x1_32" in list_models("cct_*_32") and MODELS["t2t_vit_7"].kind == "vit"


# ---- trained ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LITTLE)
def test_it_trains_saves_and_loads(case, tmp_path):
    drops = {"dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.1}
    model = build(LITTLE[case][0], LITTLE[case][1] | drops)
    assert len(list(model.layers())) == 4 and all(p.layer is not None for p in model.parameters())
    fixed = {name: p.data.copy() for name, p in model.named_parameters() if not p.requires_grad}
    step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), threads=2, micro_batch=2)
    images, labels = images_of(model).astype(np.float32), np.arange(3)
    losses = [step(images, labels) for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]
    for name, before in fixed.items():
        np.testing.assert_array_equal(dict(model.named_parameters())[name].data, before)
    mv.save(model, tmp_path / "a.npz")
    again = load_model(tmp_path / "a.npz")
    assert again.config == model.config
    np.testing.assert_array_equal(again(images).data, model.eval()(images).data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(copied(images).data, again(images).data)
        assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    Muon(model.named_parameters(), lr=1e-3)


@pytest.mark.parametrize("case", LITTLE)
def test_masks_recomputing_half_precision_and_costs(case):
    model = small(case).eval()
    images = images_of(model)
    mask = np.zeros((model.num_tokens,) * 2, bool)
    mask[:, -1], mask[-1, -1] = True, False
    assert relative(model.trace(images, mask).logits.numpy(), model(images, mask).numpy()) < 1e-12
    assert relative(model(images, mask).numpy(), model(images).numpy()) > 1e-5
    found = []
    for again in (False, True):
        one = small(case, np.float32, recompute=again, dropout=0.2, drop_path=0.2)
        with mv.random_key(mv.Key(5, row=3)):
            one(images.astype(np.float32), mask).sum().backward()
        found.append([p.grad for p in one.parameters() if p.requires_grad])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    half = small(case, np.float16).eval()
    for given in (np.float16, np.float32):  # pixels may be rounded by the model
        out = half(images.astype(given))
        assert out.dtype == np.float16 and relative(out.numpy().astype(float), model(images).numpy()) < 0.1
    kind, settings = LITTLE[case]
    plain, outlined = build(kind, settings), model_outline(kind, settings)
    assert {n: p.shape for n, p in outlined.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    costs, real = model_costs(outlined).total, layer_costs(plain, images[:1].astype(np.float32))
    assert costs.parameters == plain.num_parameters() and costs.flops == sum(row.flops for row in real.values())


any_cupy = strict.any_cupy


def steps(device: str, precision: str, case: str) -> tuple[Any, list[float]]:
    """Return a step on a device, and the losses of three batches."""
    model = small(case, np.float32, dropout=0.2, attention_dropout=0.2, drop_path=0.3).to(device)
    step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), precision=precision, clip_norm=1.0)
    images, labels = images_of(model, 4).astype(np.float32), np.arange(4) % 3
    return step, [step(images, labels) for _ in range(3)]


@pytest.mark.parametrize(
    ("case", "precision"),
    [("cct_3x2", "bfloat16"), ("cct_3x1", "float32"), ("shifted_lsa", "float32"), ("conv_stem", "bfloat16"),
     ("t2t", "bfloat16"), ("t2t_transformer", "float32")],
)  # fmt: skip
def test_it_is_recorded_on_a_gpu_to_the_bit(any_cupy, monkeypatch, case, precision):
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)  # the stand-in for kernels is slow
    step, recorded = steps("cuda", precision, case)
    assert step.why_launched == "" and len(step.underway.capture.nodes()) == 1
    monkeypatch.setattr(capture, "SHAPES", 0)
    _, launched = steps("cuda", precision, case)
    assert recorded == launched
    if precision == "float32":
        assert recorded == pytest.approx(steps("cpu", precision, case)[1], rel=1e-3)


# ---- the authors' files ----------------------------------------------------------------------------------------------

AUTHORS = [case for case in CASES if not case.startswith(("shifted", "conv_stem"))]


def same(model: Any, case: str) -> None:
    """Assert that a model has the numbers of a golden."""
    of, state = golden(case)
    for name, theirs in zip(of["names"], of["theirs"], strict=True):
        np.testing.assert_array_equal(model.state_dict()[name], state[theirs])


@pytest.mark.parametrize("case", AUTHORS)
def test_a_file_says_what_it_holds(case, tmp_path):
    """All but heads, where they are not of 64 numbers, and images that are no squares."""
    _, state = golden(case)
    (tmp_path / "model.safetensors").write_bytes(safetensors({f"module.{n}": a for n, a in state.items()}))
    kind, settings = CASES[case]
    path = tmp_path / "model.safetensors"
    found = open_foreign(path)
    assert found.kind == kind
    made = build(kind, found.settings() | {"heads": 2, "image_size": settings["image_size"]})
    expected = build(kind, settings)
    alike = ("class_token", "mlp_dim", "seed")
    assert {k: v for k, v in made.config.items() if k not in alike} == {
        k: v for k, v in expected.config.items() if k not in alike
    }
    with pytest.raises(
        CheckpointError, match=r"does not say heads and image_size\n.*NAME, weights=path, heads=…, image_size=…"
    ):
        mv.load_model(path)
    name = "cct_2_3x2_32" if kind == "cct" else "t2t_vit_7"
    sizes = {k: v for k, v in settings.items() if k not in ("num_classes", "position", "qkv_bias", "norm_eps")}
    model = mv.create_model(name, weights=tmp_path, **{"kernel": 3, "convs": 1} | sizes if kind == "cct" else sizes)
    same(model, case)
    assert model.settings.position == settings.get("position", "learned")


@pytest.mark.parametrize("case", ["cct_3x1", "t2t"])
def test_of_a_model_and_its_average_it_is_the_average(case, tmp_path):
    _, state = golden(case)
    other = {f"state_dict.{name}": a + 1 for name, a in state.items()}
    other |= {f"state_dict_ema.module.{name}": a for name, a in state.items()} | {"epoch": np.array(310)}
    np.savez(tmp_path / "checkpoint.npz", **other)
    model = build(CASES[case][0], CASES[case][1])
    mv.load_weights(model, tmp_path / "checkpoint.npz")
    same(model, case)


def test_images_of_other_channels(tmp_path):
    _, state = golden("cct_3x1")
    np.savez(tmp_path / "a.npz", **state)
    model = build("cct", CASES["cct_3x1"][1] | {"in_channels": 1})
    mv.load_weights(model, tmp_path / "a.npz", tell=(told := []).append)
    assert told == ["patch_embed.convs.0.conv.weight: 2 image channels → 1"]
    whole = build("cct", CASES["cct_3x1"][1])
    mv.load_weights(whole, tmp_path / "a.npz")
    grey = wave((2, 1, 10, 7), 3)
    assert relative(model(grey).data, whole(grey.repeat(2, axis=1)).data) < 1e-5
    _, state = golden("t2t")
    np.savez(tmp_path / "b.npz", **state)
    with pytest.raises(MisfitError, match=r"misshapen .*attention1\.norm1(.*\n)*.*in_channels=2"):
        mv.load_weights(build("vit", T2T | {"tokenizer": "t2t", "in_channels": 1}), tmp_path / "b.npz")


def test_positions_of_whole_numbers_are_told(tmp_path):
    for case, name in (("t2t", "pos_embed"), ("cct_3x1", "classifier.positional_emb")):
        _, state = golden(case)
        np.savez(tmp_path / "a.npz", **state | {name: state[name].astype(int) if name in state else waves(20, 8)})
        for use in (mv.load_model, lambda path, case=case: mv.load_weights(build(*CASES[case]), path)):
            with pytest.raises(CheckpointError):
                use(tmp_path / "a.npz")


def test_positions_that_are_not_those_that_the_model_makes(tmp_path):
    """They are learned, or were resized: a model with fixed ones would answer wrongly."""
    _, state = golden("t2t")
    state["pos_embed"] = state["pos_embed"] * 0.9
    np.savez(tmp_path / "a.npz", **state)
    fixed, learned = (
        build("vit", T2T | {"tokenizer": "t2t"}),
        build("vit", T2T | {"tokenizer": "t2t", "position": "learned"}),
    )
    with pytest.raises(MisfitError, match=r"unexpected  pos_embed .*: learned positions, which the model has not"):
        mv.load_weights(fixed, tmp_path / "a.npz")
    mv.load_weights(learned, tmp_path / "a.npz")
    np.testing.assert_array_equal(learned.pos_embed.data, state["pos_embed"])
    assert open_foreign(tmp_path / "a.npz").settings()["position"] == "learned"
    _, state = golden("cct_3x1")
    state["classifier.positional_emb"] = waves(20, 8)
    np.savez(tmp_path / "b.npz", **state)
    cct = build("cct", CASES["cct_3x1"][1] | {"position": "sincos_1d", "image_size": (20, 7)})
    mv.load_weights(cct, tmp_path / "b.npz", tell=(told := []).append)
    assert told == ["pos_embed: fixed ones of 20 tokens → 40"]
    for position in ("none", "learned"):
        cct = build("cct", CASES["cct_3x1"][1] | {"position": position})
        if position == "none":
            with pytest.raises(MisfitError, match=r"unexpected  classifier\.positional_emb"):
                mv.load_weights(cct, tmp_path / "b.npz")
        else:
            mv.load_weights(cct, tmp_path / "b.npz", tell=told.append)
            assert told[1:] == ["position: sincos_1d in the file, learned here"]


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        ("cct_3x1", {"classifier.class_emb": (1, 1, 8)}, "has a class token, as ViT-Lite and CVT have"),
        ("cct_3x1", {"tokenizer.conv_layers.0.0.weight": (8, 2, 3, 4)}, "kernels are of 3 by 4"),
        ("cct_3x1", {"tokenizer.conv_layers.0.0.weight": (8, 2, 0, 0)}, r"is of shape \(8, 2, 0, 0\)"),
        ("cct_3x1", {"classifier.blocks.0.linear2.weight": (8,)}, "is of shape"),
        ("cct_3x1", {"classifier.fc.weight": None}, "it has no classifier.fc.weight"),
        ("t2t", {"tokens_to_token.attention1.norm1.weight": (27,)}, "27 numbers, which are not those of 7 by 7 pixels"),
        ("t2t", {"pos_embed": (7, 8)}, "its pos_embed is of shape"), ("t2t", {"pos_embed": (1, 1, 8)}, "image_size"),
        ("t2t", {"head.weight": None}, "it has no head.weight"),
    ],
)  # fmt: skip
def test_files_that_are_none_of_these(case, change, says, tmp_path):
    _, state = golden(case)
    for name, shape in change.items():
        state.pop(name, None)
        state |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    np.savez(tmp_path / "a.npz", **state)
    with pytest.raises(CheckpointError, match=says):
        mv.load_model(tmp_path / "a.npz")
    with pytest.raises(CheckpointError):
        mv.load_weights(build(CASES[case][0], CASES[case][1]), tmp_path / "a.npz")


def test_published_sizes_are_read_off_their_arrays():
    for name, layout in (("t2t_vit_t_14", yitu.LAYOUT), ("t2t_vit_7", yitu.LAYOUT), ("cct_7_7x2_224", shi_labs.LAYOUT)):
        kind, settings = configuration(name)
        shapes = {n: p.shape for n, p in model_outline(kind, settings).named_parameters()}
        written = layout.written({n: np.zeros(shape, np.float32) for n, shape in shapes.items()}, Sizes())
        if kind == "vit":
            written["pos_embed"] = waves(197, settings["dim"])
        entries = {n: Entry(n, a.shape, "<f4", lambda a=a: a) for n, a in written.items()}
        said = layout.sizes_of(layout.entries_of(entries)) | layout.settings_of(entries, {})
        assert read_settings(kind, said).written_out() == read_settings(kind, settings).written_out()


# ---- another size, another task --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LITTLE)
def test_images_of_another_size(case, tmp_path):
    model = small(case).eval()
    h, w = model.settings.image_shape[1:]
    before = model.state_dict()
    model.resize((2 * h, 2 * w))
    images = images_of(model)
    assert model(images).shape == (3, 3) and model.patch_embed.image_size == (2 * h, 2 * w)
    after = model.state_dict()
    for name, value in before.items():
        if name != "pos_embed":
            np.testing.assert_array_equal(after[name], value)
    mv.save(model, tmp_path / "a.npz")
    assert relative(load_model(tmp_path / "a.npz").eval()(images).data, model(images).data) < 1e-12
    if "shifted" in case or "cct" in case or case in ("normed", "conv_stem"):
        with pytest.raises(ConfigError, match="no pictures that could be resized"):
            model.resize((2 * h, 2 * w), 8)
    other = build(LITTLE[case][0], LITTLE[case][1] | {"num_classes": 5, "seed": 3})
    init_from(other, tmp_path / "a.npz")
    own, there = dict(other.named_parameters()), dict(model.named_parameters())
    first = next(name for name in own if name.startswith("patch_embed."))
    np.testing.assert_array_equal(own[first].data, there[first].data.astype(np.float32))
    grey = build(LITTLE[case][0], LITTLE[case][1] | {"in_channels": 1})
    with pytest.raises(MisfitError, match="in_channels"):
        init_from(grey, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("cct", {"kernel": 4}, "odd"), ("cct", {"convs": 9}, "1 to 8"), ("cct", {"position": "relative"}, "position"),
        ("cct", {"dim": 9, "heads": 2}, "heads"), ("vit", {"tokenizer": "t2t", "patch_size": 2}, "16, 8 or 4"),
        ("vit", {"tokenizer": "t2t", "patch_size": 16, "image_size": 40}, "divides height"),
        ("vit", {"tokenizer": "conv_stem", "patch_size": 6, "image_size": 12}, "one of .2, 4, 8"),
        ("vit", {"tokenizer": "conv_stem", "image_size": 30}, "divides height"),
        ("vit", {"tokenizer": "conv_stem", "dim": 9, "heads": 3}, "a dim that 2 divides"),
        ("hybrid", {"tokenizer": "conv_stem"}, "leave tokenizer out"),
        ("vit", {"tokenizer": "shifted", "patch_size": 5}, "not divided"), ("vit", {"tokenizer": "spt"}, "shifted"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(kind, settings, says):
    with pytest.raises(MinivitError, match=says):
        build(kind, SIZES | settings)


def test_images_that_do_not_fit_and_windows_that_would_be_too_many():
    for case in LITTLE:
        model = small(case)
        with pytest.raises(ShapeError, match="images of shape"):
            model(images_of(model)[:, :, 1:])
        with pytest.raises(MinivitError, match="standardise"):
            model((images_of(model) * 255).astype(np.uint8))
        assert model(images_of(model)[:0]).shape == (0, 3)
    for settings in ({"tokenizer": "t2t_transformer"}, {"tokenizer": "t2t"}):
        values = T2T | settings | {"image_size": 224}
        assert build("vit", values | {"depth": 1}).settings.largest_array()[0] >= 196**2 * 2


def test_a_convolutional_stem_halves_images_and_doubles_channels_up_to_a_tokens_numbers():
    """As the paper's ViT_C-1GF: 24, 48, 96, 192 channels for patches of 16, then a convolution of 1 by 1."""
    stem = nn.ConvStem((32, 64), 16, 3, 192)
    assert [layer.conv.weight.shape for layer in stem.convs] == [
        (24, 3, 3, 3), (48, 24, 3, 3), (96, 48, 3, 3), (192, 96, 3, 3),
    ]  # fmt: skip
    assert [layer.norm.groups for layer in stem.convs] == [1, 3, 6, 12] and stem.filters.shape == (24, 3, 3, 3)
    images = np.ones((2, 3, 32, 64), np.float32)
    assert stem.grid == (2, 4) and stem(images).shape == (2, 8, 192)
    images[1, :, :, 40:] = normal(mv.Key(1), (3, 32, 24))
    one, other = stem(images).data.reshape(2, 2, 4, 192)
    assert np.abs(one - other)[:, 3].max() > 1e-3  # each token stands where its patch is
    largest = build("vit", SIZES | {"tokenizer": "conv_stem", "image_size": 512, "patch_size": 32, "dim": 64}).settings
    assert largest.largest_array()[0] == 9 * 2 * 256**2


def test_shifts_go_half_a_patch_to_every_corner():
    """A bright pixel in the middle of a patch comes into the patch's own rows, and into those of its neighbours."""
    embed = nn.ShiftedPatchEmbed(8, 4, 1, 2).to(np.float64)
    seen: list[np.ndarray] = []
    embed.norm.forward = lambda x: seen.append(x.numpy()) or x
    image = np.arange(64.0).reshape(1, 1, 8, 8) + 1
    embed(image)
    patches = seen[0].reshape(2, 2, 5, 4, 4)  # rows, columns, images, P, Q
    whole = patches.transpose(2, 0, 3, 1, 4).reshape(5, 8, 8)
    np.testing.assert_array_equal(whole[0], image[0, 0])
    np.testing.assert_array_equal(whole[1, :6, :6], image[0, 0, 2:, 2:])
    np.testing.assert_array_equal(whole[2, :6, 2:], image[0, 0, 2:, :6])
    np.testing.assert_array_equal(whole[3, 2:, :6], image[0, 0, :6, 2:])
    np.testing.assert_array_equal(whole[4, 2:, 2:], image[0, 0, :6, :6])
    assert (whole[1, 6:] == 0).all() and (whole[4, :, :2] == 0).all()


def test_a_performer_is_near_to_attention():
    """With many random features Σφ(q)φ(k)v comes near what it stands for."""
    with mv.random_key(mv.Key(3)):
        layer = nn.TokenPerformer(6, 4, 1e-5).to(np.float64)
    w = layer.w.data
    np.testing.assert_allclose(w @ w.T, len(w) * np.eye(len(w)), atol=1e-5)
    x = normal(mv.Key(1), (2, 5, 4)) * 0.3
    layer.w.data = normal(mv.Key(2), (20_000, 4))
    near = layer.features(mv.tensor(x)).numpy()
    exact = np.exp(x @ x.swapaxes(1, 2))
    np.testing.assert_allclose(near @ near.swapaxes(1, 2), exact, rtol=0.1)


# ---- studied ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LITTLE)
def test_the_study_of_attention_knows_it(case):
    model = small(case)
    trace = study.trace_model(model, images_of(model))
    rows, columns = trace.grid
    if "cct" in case:
        with pytest.raises(ConfigError, match=r"pool .seq.. makes no logit"):
            study.direct_attribution(trace, 1)
    else:
        found = study.direct_attribution(trace, 1)
        np.testing.assert_allclose(found.total, found.logit, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(study.logit_lens(trace)[-1], trace.logits.numpy(), rtol=1e-10)
    gradient = study.attention_gradient(trace, 1)
    for seen in (study.relevance(trace, gradient), study.rollout(trace)):
        assert study.patch_map(trace, seen).shape == (3, rows, columns)
    assert study.legrad(trace, study.lens_gradient(trace, 1)).shape == (3, rows, columns)
    assert study.attention_distance(trace).shape == study.head_importance(trace, gradient).shape == (2, 2)
    assert study.filter_components(model, 2).values.shape[:2] == (2, 2)
    assert study.feature_components(trace).values.shape == (3, rows, columns, 3)
    similar = study.position_similarity(model).reshape(rows * columns, -1)
    np.testing.assert_allclose(np.diagonal(similar), 1.0)
    assert len(study.class_attention(trace)) == 2 and study.head_statistics(model, images_of(model)).images == 3
    tape = read_tape(model, images_of(model), np.arange(3), gradients=True)
    assert tape is not None


def test_a_model_that_weighs_its_patches_is_read_by_those_weights():
    model = small("cct_3x1")
    trace = study.trace_model(model, images_of(model))
    x = model.norm(trace.tokens[-1])
    weights = model.attn_pool.weights(x).numpy()
    np.testing.assert_allclose(weights.sum(-1), 1.0)
    assert np.ptp(weights) > 0.01
    np.testing.assert_allclose((weights @ x.numpy())[:, 0], model.read(x).numpy(), rtol=1e-12)
    rolled = study.rollout(trace)
    expected = np.einsum("bi,bij->bj", weights[:, 0], rolled).reshape(3, *trace.grid)
    np.testing.assert_allclose(study.patch_map(trace, rolled), expected, rtol=1e-12)
    heads = study.class_attention(trace)[0]
    expected = np.einsum("bi,bhij->bhj", weights[:, 0], trace.attention[0].numpy()).reshape(heads.shape)
    np.testing.assert_allclose(heads, expected, rtol=1e-12)
    with pytest.raises(ShapeError, match="weighs itself"):
        study.patch_map(trace, rolled[0])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: the page was not opened")
@pytest.mark.parametrize(
    ("case", "says"),
    [
        (
            "cct_3x1",
            ["overlapping convolutions", "from a weighted mean of all patches", "norm(x + attention(norm(x)))"],
        ),
        ("t2t", ["overlapping windows, attention among them", "a fixed vector is added"]),
    ],
)
def test_its_page(tmp_path, case, says):
    """What a pocket calculator gives is what the engine has, and the words are of this model."""
    model = small(case, np.float32).eval()
    pixels = (255 * (0.5 + 0.1 * normal(mv.Key(5), (4, *model.settings.image_shape))).clip(0, 1)).astype(np.uint8)
    mv.save(model, tmp_path / "model.npz", data=Dataset(pixels, np.arange(4) % 3, ("a", "b", "c"), "none"))
    np.save(tmp_path / "test.npy", pixels)
    trained = open_trained(str(tmp_path / "model.npz"))
    write_page(trained, image_of_file(trained, str(tmp_path / "test.npy"), 0), tmp_path / "page.html", "given")
    with Page(tmp_path / "page.html") as page:
        assert page.run("check().worst") < 1e-5 and page.run("check().rows") < 0.01
        words = page.run("document.body.innerText").lower()
        assert [text for text in says if text not in words] == [] and "nan" not in words.split()
        assert page.errors == []


def test_fixed_numbers_are_no_part_of_what_is_learned():
    model = small("t2t")
    assert isinstance(model.pos_embed, Constant)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "patch_embed.attention1.w", "patch_embed.attention2.w",
    ]  # fmt: skip
