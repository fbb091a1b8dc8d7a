"""Other systems' weights: what they compute, computed again; what does not fit, told; round trips of the names."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal
from minivit.errors import CheckpointError, ConfigError, MisfitError, ShapeError
from minivit.models import configuration, model_outline
from minivit.models.positions import METHODS, resize_matrix, resize_patches, resize_positions
from minivit.weights import google, huggingface, lucidrains
from minivit.weights.foreign import open_foreign
from minivit.weights.names import Sizes
from minivit.weights.native import read_model, stored_settings
from minivit.weights.transfer import init_from
from tests import test_options as options
from tests.weight_files import peak, safetensors

GOLDENS = Path(__file__).parent / "goldens" / "other_systems.npz"
LUCIDRAINS = {
    "image_size": 16, "patch_size": 4, "num_classes": 5, "dim": 12, "depth": 2, "heads": 3, "mlp_dim": 20,
    "dim_head": 6, "qkv_bias": False, "norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays, np.load(GOLDENS.with_name("lucidrains.npz")) as more:
        return dict(arrays) | dict(more)


@pytest.fixture
def case(goldens, tmp_path):
    """Return what a system computed, and the path of its file, made anew."""

    def make(name):
        found = {key.removeprefix(f"{name}/"): a for key, a in goldens.items() if key.startswith(f"{name}/")}
        for key, a in found.items():
            if key.startswith("file/"):
                (tmp_path / key.removeprefix("file/")).write_bytes(a.tobytes())
        arrays = under(found, "array/")
        if arrays:
            np.savez(tmp_path / "arrays.npz", **arrays)
        return found, tmp_path / ("arrays.npz" if arrays else "model.safetensors")

    return make


def under(arrays, prefix):
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def loaded(name, path):
    if name in NOW:  # the file says all but what has no shape
        return mv.create_model("vit_tiny_patch16_224", weights=path, **SMALL | {"dim_head": 6}).eval()
    if name not in ("lucidrains", "simple_vit"):
        return mv.load_model(path)
    simple = {"pool": "mean", "fc_norm": True, "position": "sincos_2d"}
    model = mv.ViT(**LUCIDRAINS | (simple if name == "simple_vit" else {}))
    mv.load_weights(model, path)
    return model.eval()


NOW = ["lucidrains_now", "lucidrains_mean", "simple_vit_now"]
CASES = [
    *NOW,
    "hugging_face", "deit", "timm", "timm_avg", "google", "big_vision", "big_vision_map", "lucidrains", "simple_vit",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_the_systems(case, tmp_path, name):
    golden, path = case(name)
    model = loaded(name, path)
    logits = model(golden["images"])
    assert logits.dtype == np.float32
    scale = np.abs(golden["logits"]).max()
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=1e-5, atol=1e-6 * scale)
    model.to(np.float64)
    logits = model(golden["images"].astype(np.float64))
    most = 1e-6 if "simple_vit" in name else 1e-10  # whose fixed positions both have in float32, each rounded its way
    np.testing.assert_allclose(logits.numpy(), golden["logits"], rtol=most, atol=0.1 * most * scale)
    mv.ops.cross_entropy(logits, golden["labels"]).backward()
    np.savez(tmp_path / "gradients.npz", **under(golden, "grad/"))
    gradients = open_foreign(tmp_path / "gradients.npz").read(
        {n: p.shape for n, p in model.named_parameters()}, model.settings.heads
    )
    for n, p in model.named_parameters():
        if "simple_vit" in name and n.endswith("attn.proj.bias"):
            continue  # which is 0: it has none
        at_most = 10 * most * np.abs(gradients[n]).max() + 1e-15
        np.testing.assert_allclose(p.grad, gradients[n], rtol=10 * most, atol=at_most, err_msg=n)


def test_google_with_the_other_gelu(case):
    golden, path = case("google")
    model = mv.create_model("vit_tiny_patch16_224", weights=path, activation="gelu", tell=(told := []).append, **SMALL)
    assert told == ["activation: gelu_tanh in the file, gelu here"]
    logits = model.to(np.float64)(golden["images"].astype(np.float64)).numpy()
    np.testing.assert_allclose(logits, golden["erf/logits"], rtol=1e-10, atol=1e-10)
    assert np.abs(logits - golden["logits"]).max() > 1e-6


SMALL = {"image_size": 16, "patch_size": 4, "dim": 12, "depth": 2, "heads": 3, "mlp_dim": 20}


# ---- the same weights under other names ------------------------------------------------------------------------------


def renamed(arrays, *changes):
    for old, new in changes:
        arrays = {name.replace(old, new): a for name, a in arrays.items()}
    return arrays


LINEN = [("Attention_1", "Attention_0"), ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0")]


def scanned(arrays, depth=2):
    out = {n: a for n, a in arrays.items() if "encoderblock" not in n}
    return out | {
        f"Transformer/encoderblock/{n}": np.stack([arrays[f"Transformer/encoderblock_{i}/{n}"] for i in range(depth)])
        for n in under(arrays, "Transformer/encoderblock_0/")
    }


@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/", "params/img/"])
@pytest.mark.parametrize("numbering", ["old", "linen", "scan"])
def test_googles_names(case, tmp_path, prefix, numbering):
    _, path = case("google")
    expected = mv.load_model(path).state_dict()
    arrays = dict(np.load(path))
    if numbering != "old":
        arrays = renamed(arrays, *LINEN, ("Transformer/posembed_input/pos_embedding", "pos_embedding"))
    if numbering == "scan":
        arrays = scanned(arrays)
    arrays = {f"{prefix}{name}": a for name, a in arrays.items()}
    if prefix == "opt/target/":
        arrays["opt/state/step"] = np.array(3)
        arrays["opt/state/param_states/cls/momentum"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "other.npz", **arrays)
    state = mv.load_model(tmp_path / "other.npz").state_dict()
    assert expected.keys() == state.keys() and all((state[n] == a).all() for n, a in expected.items())


@pytest.mark.parametrize("dtype", ["f2", ">f4", "f8", ">f8", "bfloat16"])
def test_numbers_of_other_kinds(case, tmp_path, dtype):
    _, path = case("google")
    arrays = {n: a.astype(np.float16) for n, a in np.load(path).items()}  # so that all kinds but bfloat16 hold them
    if dtype == "bfloat16":  # the upper half of a float32, which NumPy saves as two bytes of anything
        stored = {
            n: (a.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).view("V2") for n, a in arrays.items()
        }
        arrays = {n: (a.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32) for n, a in arrays.items()}
    else:
        stored = {n: np.asfortranarray(a.astype(dtype)) for n, a in arrays.items()}
    np.savez(tmp_path / "plain.npz", **{n: a.astype(np.float64) for n, a in arrays.items()})
    np.savez_compressed(tmp_path / "other.npz", **stored)
    expected, model = mv.load_model(tmp_path / "plain.npz"), mv.load_model(tmp_path / "other.npz")
    assert {p.dtype for p in model.parameters()} == {np.dtype("f8" if "8" in dtype else "f4")}
    assert all((model.state_dict()[n] == a).all() for n, a in expected.state_dict().items())


def test_hugging_faces_names_in_memory(case, tmp_path, goldens):
    golden, path = case("hugging_face")
    hub = open_foreign(path)
    names = list(golden["in_memory"])
    layers = [n for n in names if ".layers." in n]
    assert layers and any("q_proj" in n for n in layers), "version 5's"
    assert set(huggingface.entries_of(dict.fromkeys(names))) == set(hub.entries)
    bare = [n.removeprefix("vit.") for n in names if n.startswith("vit.")]
    assert set(huggingface.entries_of(dict.fromkeys(bare))) == set(hub.entries) - {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("module, tokenizer", [
    (google, "patch"), (huggingface, "patch"), (lucidrains, "patch"), (lucidrains, "normed"),
])  # fmt: skip
def test_the_tables_go_both_ways(module, tokenizer):
    layout = module.LAYOUT
    ours, theirs = [row.ours for row in layout.rows], [name for row in layout.rows for name in row.theirs]
    twice = {"conv_root/kernel", "gn_root/scale", "gn_root/bias"}  # of a ResNet with stages, or of its root alone
    assert len(set(ours)) == len(ours) and len(theirs) - len(set(theirs)) == len(twice & set(theirs))
    model = mv.ViT(
        **LUCIDRAINS | {"qkv_bias": module is not lucidrains, "head": "mlp" if module is google else "linear"},
        tokenizer=tokenizer,
    )
    state = model.state_dict()
    written = layout.written(state, Sizes(3, (4, 4)))
    assert {name for name in written if "{" in name} == set()
    shapes = {n: a.shape for n, a in state.items()}
    entries = {n: mv_entry(n, np.array(a)) for n, a in written.items()}
    found = layout.entries_of(entries)
    assert set(found) == set(written)
    for name, shape in shapes.items():
        out = np.empty(shape, np.float32)
        layout.row(name).read(found, out, Sizes(3, (4, 4)))
        assert (out == state[name]).all(), name


def mv_entry(name, array):
    from minivit.weights.stored import Entry

    return Entry(name, array.shape, array.dtype.str, lambda: array)


OPTIONS = ["layer_scale", "qk_norm", "registers", "registers_apart", "avg", "avg_norm_first", "map", "distilled",
           "swiglu", "rms"]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_what_timms_file_holds_says_which_model_it_is(tmp_path, name):
    of = {key.partition("/")[2]: a for key, a in np.load(options.GOLDENS).items() if key.partition("/")[0] == name}
    settings = options.SMALL | options.TIMM[name]
    shapes = {n: p.shape for n, p in mv.ViT(**settings).named_parameters()}
    ends = np.cumsum([math.prod(shapes[n]) for n in of["names"]])[:-1]
    state = {str(n): a.reshape(shapes[n]) for n, a in zip(of["names"], np.split(of["weights"], ends), strict=True)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(state))
    pool = {"cls": "token", "mean": "avg", "map": "map"}[settings.get("pool", "cls")]
    config = {"architecture": "vit_x.y", "global_pool": pool, "model_args": {"img_size": [12, 8], "num_heads": 2}}
    path.with_name("config.json").write_text(json.dumps(config))
    model = mv.load_model(path)
    act = {"activation": "silu"} if name == "swiglu" else {}
    expected = mv.ViT(**settings).settings.written_out() | act
    got = model.settings.written_out()
    alike = {"class_token", "layer_scale", "activation"}  # which may be said in other words, or only begins with
    assert {k: v for k, v in got.items() if k not in alike} == {k: v for k, v in expected.items() if k not in alike}
    logits = model.to(np.float64)(of["images"].astype(np.float64)).numpy()
    np.testing.assert_allclose(logits, of["logits"], rtol=1e-10, atol=1e-10 * np.abs(of["logits"]).max())
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


# ---- what is read beside the weights ---------------------------------------------------------------------------------


def test_config_json_gives_settings_and_classes(case):
    _, path = case("hugging_face")
    model, meta = read_model(path)
    s = model.settings
    assert (s.image_size, s.patch_size, s.heads, s.norm_eps, s.activation) == (16, 4, 3, 1e-3, "gelu")
    assert meta["data"]["classes"] == [f"kind {i}" for i in range(5)] and meta["data"]["mean"] == [0.5] * 3
    assert stored_settings(path) == s


def test_a_preprocessors_mean(case):
    _, path = case("hugging_face")
    table = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    path.with_name("preprocessor_config.json").write_text(json.dumps(table))
    assert read_model(path)[1]["data"]["mean"] == [0.1, 0.2, 0.3]


def test_timms_config_gives_a_rectangle(case):
    _, path = case("timm")
    model, meta = read_model(path)
    assert model.settings.image_shape == (3, 12, 16) and model.settings.heads == 3
    assert meta["data"]["mean"] == [0.5] * 3
    path.with_name("config.json").unlink()
    with pytest.raises(CheckpointError, match="does not say heads and image_size"):
        mv.load_model(path)
    again = mv.ViT(**model.config)
    mv.load_weights(again, path)
    assert all((a == again.state_dict()[n]).all() for n, a in model.state_dict().items())


@pytest.mark.parametrize(
    "change, match",
    [
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"num_attention_heads": "3"}, "heads is '3'"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"image_size": 32}, "17 positions, but images of 32 make 65"),
        ({"image_size": [1 << 40, 4]}, "image_size"),
        ({"layer_norm_eps": "x"}, "norm_eps is 'x'"),
        ({"id2label": {"0": 3}, "num_attention_heads": 3}, None),
    ],
)
def test_a_config_that_misleads(case, change, match):
    _, path = case("hugging_face")
    place = path.with_name("config.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    if match is None:
        assert "classes" not in read_model(path)[1]["data"]
        return
    with pytest.raises(CheckpointError, match=match.replace("[", r"\[")):
        mv.load_model(path)


@pytest.mark.parametrize("text", ["{", "[1]", "null", "[" * 100_000])
def test_a_config_that_is_none(case, text):
    _, path = case("hugging_face")
    path.with_name("config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        mv.load_model(path)


# ---- another model than the file's -----------------------------------------------------------------------------------


def test_another_number_of_classes_and_size(case):
    _, path = case("google")
    told = []
    model = mv.create_model(
        "vit_tiny_patch16_224", weights=path, tell=told.append, **SMALL | {"num_classes": 9, "image_size": (8, 24)}
    )
    assert told == ["pos_embed: 4 × 4 patches → 2 × 6", "head: new, for 9 classes"]
    whole = mv.load_model(path)
    expected = resize_positions(whole.state_dict()["pos_embed"], (4, 4), (2, 6), prefix=1)
    assert (model.state_dict()["pos_embed"] == expected).all() and model.pre_logits is None
    assert model(np.zeros((2, 3, 8, 24), np.float32)).shape == (2, 9)
    with pytest.warns(UserWarning, match="head: new, for 9 classes"):
        mv.create_model("vit_tiny_patch16_224", weights=path, **SMALL | {"num_classes": 9})


def test_heads_of_another_number_are_told(case, tmp_path):
    """Their arrays have equal shapes: the model would answer, and answer wrongly."""
    _, path = case("hugging_face")
    mv.save(mv.ViT(**SMALL | {"num_classes": 5}), tmp_path / "own.npz")
    for place in (path, tmp_path / "own.npz"):
        with pytest.raises(MisfitError, match="heads is 3 in the file, 2 here"):
            mv.create_model("vit_tiny_patch16_224", weights=place, **SMALL | {"heads": 2})
        with pytest.raises(MisfitError, match="heads is 3 in the file, 2 here"):
            mv.load_weights(mv.ViT(**SMALL | {"heads": 2, "num_classes": 5}), place)


def test_as_it_is_nothing_is_told(case):
    _, path = case("hugging_face")
    model = mv.create_model("vit_tiny_patch16_224", weights=path, tell=(told := []).append, **SMALL)
    assert told == [] and model.settings.num_classes == 5 and model.settings.norm_eps == 1e-3


def for_channels(weight, channels):
    """What timm's adapt_input_conv makes of filters (D, 3, P, Q): their sum, or these in turn, 3 / channels of each."""
    if channels == 1:
        return weight[:, :1] + weight[:, 1:2] + weight[:, 2:3]
    return np.stack([weight[:, i % 3] for i in range(channels)], axis=1) * np.float32(3 / channels)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["timm", "google", "lucidrains", "own"])
def test_images_of_other_channels(case, tmp_path, name, channels):
    _, path = case("timm" if name == "own" else name)
    whole = loaded(name, path)
    if name == "own":
        mv.save(whole, path := tmp_path / "own.npz")
    settings = {k: whole.config[k] for k in (*SMALL, "dim_head")} | {"in_channels": channels}
    model = mv.create_model("vit_tiny_patch16_224", weights=path, tell=(told := []).append, **settings).eval()
    assert told == [f"patch_embed.proj.weight: 3 image channels → {channels}"]
    weight = whole.state_dict()["patch_embed.proj.weight"]
    np.testing.assert_allclose(
        model.state_dict()["patch_embed.proj.weight"], for_channels(weight, channels), rtol=1e-6, atol=1e-8
    )
    if channels == 1:
        grey = normal(mv.Key(1), (2, 1, *whole.settings.image_shape[1:])).astype(np.float32)
        logits = whole(np.repeat(grey, 3, axis=1)).numpy()
        np.testing.assert_allclose(model(grey).numpy(), logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max())
    if name != "lucidrains":
        assert model.preparation == whole.preparation.of_channels(channels) and len(model.preparation.std) == channels
    again = mv.ViT(**model.config | {"num_classes": 9})
    with pytest.warns(UserWarning, match=f"3 image channels → {channels}"):
        mv.load_weights(again, path, new_head=True)


def test_means_of_other_channels_and_what_no_filters_can_be_made_of(case, tmp_path):
    _, path = case("timm")
    place = path.with_name("config.json")
    table = json.loads(place.read_text())
    table["pretrained_cfg"] |= {"mean": [0.25, 0.5, 0.75], "std": [0.5, 0.25, 0.75]}
    place.write_text(json.dumps(table))
    rgb = mv.load_model(path)
    mv.save(rgb, tmp_path / "own.npz")
    for file in (path, tmp_path / "own.npz", tmp_path):  # a folder with a model.safetensors
        settings = SMALL | {"image_size": (12, 16), "in_channels": 1}
        with pytest.warns(UserWarning, match="3 image channels → 1"):
            model = mv.create_model("vit_tiny_patch16_224", weights=file, **settings)
        assert (model.preparation.mean, model.preparation.std) == ((0.5,), (0.5,))
    shifted = mv.ViT(**SMALL | {"image_size": (12, 16), "num_classes": 5, "tokenizer": "shifted"})
    mv.save(shifted, tmp_path / "shifted.npz")
    with pytest.raises(CheckpointError, match=r"patch_embed\.norm\.weight"):
        mv.create_model("vit_tiny_patch16_224", weights=tmp_path / "shifted.npz", **SMALL | {"in_channels": 1})


def test_a_folder_in_the_place_of_a_file(case, tmp_path):
    _, path = case("hugging_face")
    expected = mv.load_model(path)
    run = tmp_path / "runs" / "x"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").touch()
    mv.save(expected, run / "checkpoints" / "last.npz")
    for folder in (tmp_path, str(tmp_path), run):
        models = [mv.load_model(folder), mv.create_model("vit_tiny_patch16_224", weights=folder, **SMALL)]
        models.append(mv.ViT(**expected.config))
        mv.load_weights(models[-1], folder)
        assert stored_settings(folder) == expected.settings
        for model in models:
            assert all((a == model.state_dict()[n]).all() for n, a in expected.state_dict().items())
        assert models[0].class_names == expected.class_names
    (run / "checkpoints" / "last.npz").unlink()
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        mv.load_model(run)
    with pytest.raises(CheckpointError, match="is no run folder"):
        mv.load_weights(expected, tmp_path / "runs")


def test_minivits_own(tmp_path):
    model = mv.ViT(**SMALL | {"num_classes": 5})
    model.pos_embed.data += 1
    mv.save(model, tmp_path / "a.npz")
    again = mv.create_model("vit_tiny_patch16_224", weights=tmp_path / "a.npz", **SMALL)
    assert again.settings.num_classes == 5
    assert all((a == again.state_dict()[n]).all() for n, a in model.state_dict().items())
    told = []
    big = mv.ViT(**SMALL | {"image_size": (24, 8), "num_classes": 3})
    mv.load_weights(big, tmp_path / "a.npz", new_head=True, tell=told.append)
    assert told == ["pos_embed: 4 × 4 patches → 6 × 2", "head: new, for 3 classes"]


def test_a_file_of_another_system_starts_a_model(case):
    _, path = case("timm")
    model = mv.ViT(**SMALL | {"image_size": 24, "num_classes": 2})
    assert init_from(model, path) == ["pos_embed: 3 × 4 patches → 6 × 6", "head: new, for 2 classes"]


def test_every_name_that_does_not_fit_is_told(case):
    _, path = case("google")
    arrays = dict(np.load(path))
    arrays["Transformer/encoderblock_0/LayerNorm_00/scale"] = arrays.pop("Transformer/encoderblock_0/LayerNorm_0/scale")
    arrays["MAPHead_0/probe"] = np.zeros((1, 1, 12), np.float32)
    arrays["cls"] = np.zeros((1, 1, 13), np.float32)
    np.savez(path, **arrays)
    model = mv.ViT(**SMALL | {"num_classes": 7, "head": "mlp"})
    before = model.state_dict()
    with pytest.raises(CheckpointError) as caught:
        mv.load_weights(model, path)
    lines = {line.strip() for line in str(caught.value).splitlines()}
    missing = "missing     Transformer/encoderblock_0/LayerNorm_0/scale (12,), the model's blocks.0.norm1.weight"
    assert f"{missing}; nearest: Transformer/encoderblock_0/LayerNorm_00/scale" in lines
    unexpected = "unexpected  Transformer/encoderblock_0/LayerNorm_00/scale (12,)"
    assert f"{unexpected}; nearest: Transformer/encoderblock_0/LayerNorm_0/scale" in lines
    assert "misshapen   cls: (1, 1, 13) in the file, (1, 1, 12) in the model's cls_token" in lines
    assert "misshapen   head/kernel: (12, 5) in the file, (12, 7) in the model's head.weight" in lines
    assert "misshapen   head/bias: (5,) in the file, (7,) in the model's head.bias" in lines
    assert "unexpected  MAPHead_0/probe (1, 1, 12): attention pooling (MAP), which the model has not" in lines
    assert all((a == before[n]).all() for n, a in model.state_dict().items())


@pytest.mark.parametrize("name, words", [("dist_token", "a distillation token"), ("blocks.0.ls1.gamma", "LayerScale"),
                                         ("reg_token", "register tokens")])  # fmt: skip
def test_what_a_vit_has_not_is_told_in_words(case, name, words):
    _, path = case("timm")
    arrays = {n: e.read() for n, e in open_foreign(path).entries.items()} | {name: np.ones((1, 1, 12), np.float32)}
    np.savez(path.with_suffix(".npz"), **arrays)
    with pytest.raises(CheckpointError, match=f"unexpected  {name}.*: {words}, which the model has not"):
        mv.load_weights(mv.ViT(**SMALL | {"image_size": (12, 16)}), path.with_suffix(".npz"))


def test_what_lucidrains_later_versions_add_is_told(case):
    _, path = case("simple_vit_now")
    model = mv.ViT(**LUCIDRAINS | {"pool": "mean", "position": "sincos_2d"})
    with pytest.raises(MisfitError) as caught:
        mv.load_weights(model, path)
    assert str(caught.value).count("norms on both sides of the patch projection, which the model has not") == 4
    assert "make the model with the file's tokenizer='normed'" in caught.value.remedy


# ---- time and memory -------------------------------------------------------------------------------------------------


TINY = configuration("vit_tiny_patch16_224").settings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return Ti/16 at 224 pixels, 22 MB, as three systems keep it."""
    folder = tmp_path_factory.mktemp("tiny")
    state = {n: np.full(p.shape, 0.01, np.float32) for n, p in model_outline("vit", TINY).named_parameters()}
    written = google.LAYOUT.written(state, Sizes(3, (16, 16)))
    np.savez(folder / "google.npz", **written)
    np.savez(folder / "scan.npz", **scanned(written, 12))
    (folder / "timm.safetensors").write_bytes(safetensors(state))
    return folder


@pytest.mark.parametrize("name", ["google.npz", "scan.npz", "timm.safetensors"])
def test_the_file_is_in_memory_little_more_than_once(tiny, name):
    size = (tiny / name).stat().st_size
    model, most = peak(lambda: mv.create_model("vit_tiny_patch16_224", weights=tiny / name))
    zeros = 4 * model.num_parameters()  # what the parameters were before, which nobody has written to: no memory
    assert size > 22e6 and most - zeros < 1.2 * size, (most - zeros) / size


def test_a_model_is_built_loaded_and_run_within_a_second(tiny):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model = mv.create_model("vit_tiny_patch16_224", weights=tiny / "timm.safetensors")
        mv.predict_logits(model, np.zeros((1, 3, 224, 224), np.float32))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0, seconds


# ---- another size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("old, new", [((14, 14), (24, 24)), ((7, 7), (12, 20)), ((16, 16), (8, 8))])
def test_positions_are_resized_as_by_each_system(goldens, old, new, method):
    name = f"resized/{old[0]}x{old[1]} {new[0]}x{new[1]}"
    out = resize_positions(goldens[f"{name}/old"], old, new, method=method)
    np.testing.assert_allclose(out, goldens[f"{name}/{method}"], rtol=0, atol=1e-5)


def test_patches_are_resized_as_by_timm(goldens):
    for size in ((6, 8), (3, 2)):
        out = resize_patches(goldens["resized/patches/old"], size)
        np.testing.assert_allclose(out, goldens[f"resized/patches/{size[0]}x{size[1]}"], rtol=0, atol=1e-5)


def test_hugging_face_with_a_rectangular_image(case):
    golden, path = case("hugging_face")
    model = mv.load_model(path).resize((12, 24), method="bicubic-hf").to(np.float64)
    logits = model(golden["wide/images"].astype(np.float64)).numpy()
    np.testing.assert_allclose(logits, golden["wide/logits"], rtol=1e-6, atol=1e-6)  # it resizes in float32
    assert model.settings.image_size == (12, 24) and model.settings.grid == (3, 6)


def test_resize_keeps_what_it_does_not_change(tmp_path):
    model = mv.ViT(**SMALL | {"num_classes": 5}).eval()
    before, order = model.state_dict(), [n for n, _ in model.named_parameters()]
    kept = {n: (p.decays, p.layer, p.matrices) for n, p in model.named_parameters()}
    assert model.resize((8, 24)) is model
    assert [n for n, _ in model.named_parameters()] == order
    assert {n: (p.decays, p.layer, p.matrices) for n, p in model.named_parameters()} == kept
    assert all((a == before[n]).all() for n, a in model.state_dict().items() if n != "pos_embed")
    assert (model.state_dict()["pos_embed"][:, 0] == before["pos_embed"][:, 0]).all()
    assert not any(m.training for _, m in model.named_modules())
    mv.save(model, tmp_path / "a.npz")
    assert mv.load_model(tmp_path / "a.npz").settings == model.settings
    mv.ops.cross_entropy(model(np.ones((2, 3, 8, 24), np.float32)), np.array([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())
    same = mv.ViT(**SMALL)
    state = same.state_dict()
    same.resize(16)
    assert all((a == state[n]).all() for n, a in same.state_dict().items())


@pytest.mark.parametrize("name", [n for n, s in options.OPTIONS.items() if "pos" in "".join(s) or s.get("registers")])
def test_resize_of_positions_of_every_kind(tmp_path, name):
    """As fine-tuning resizes them; fixed ones are those of a new model."""
    settings = options.SMALL | options.OPTIONS[name]
    model = options.disturbed(mv.ViT(**settings)).eval()
    mv.save(model, tmp_path / "a.npz")
    tuned = mv.ViT(**settings | {"image_size": (8, 16)})
    init_from(tuned, tmp_path / "a.npz")
    expected = tuned.state_dict()
    order = list(model.state_dict())
    shared = [n for n, p in model.named_parameters() if n not in expected]
    model.resize((8, 16))
    state = model.state_dict()
    assert list(state) == order and not shared
    assert all((a == expected[n]).all() for n, a in state.items() if not n.startswith(("head", "pre_logits"))), name
    model.reset_head(3)
    other = mv.ViT(**model.config)
    other.load_state_dict(model.state_dict())
    images = normal(mv.Key(3), (2, 2, 8, 16)).astype(np.float32)
    np.testing.assert_array_equal(model.features(images).numpy(), other.features(images).numpy())


def test_resize_of_a_frozen_model_in_float64():
    model = mv.ViT(**SMALL).to(np.float64)
    model.pos_embed.requires_grad = False
    model.resize((8, 24))
    assert model.pos_embed.dtype == np.float64 and not model.pos_embed.requires_grad
    model.reset_head(2)
    assert model.resize(16).pos_embed.shape == (1, 17, 12)


def test_larger_patches_of_larger_images_give_the_same_tokens():
    """The pseudo-inverse undoes a resizing that loses nothing: FlexiViT's equation 5."""
    model = mv.ViT(**SMALL | {"depth": 1}).to(np.float64)
    images = normal(mv.Key(1), (2, 3, 16, 16))
    b = resize_matrix(4, 8)
    patches = images.reshape(2, 3, 4, 4, 4, 4)
    large = np.einsum("ap,bq,ncipjq->nciajb", b, b, patches).reshape(2, 3, 32, 32)
    before = model(images).numpy()
    after = model.resize(32, patch_size=8)(large).numpy()
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)
    assert model.settings.patch_size == 8 and model.settings.grid == (4, 4)


@pytest.mark.parametrize(
    "args, error, match",
    [
        ((18,), ShapeError, "is not divided by patch"),
        (((16, 0),), ShapeError, "is not divided"),
        (("16",), ConfigError, "image_size is '16'"),
        ((16, 5), ShapeError, "is not divided"),
        ((16, 0), ShapeError, "is not divided"),
        ((24, None, "nearest"), ConfigError, "method is 'nearest'"),
    ],
)
def test_a_size_that_cannot_be(args, error, match):
    model = mv.ViT(**SMALL)
    before, settings = model.state_dict(), model.settings
    with pytest.raises(error, match=match):
        model.resize(*args)
    assert model.settings is settings and all((a == before[n]).all() for n, a in model.state_dict().items())
