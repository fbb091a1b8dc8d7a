"""Named models: sizes and parameters as published and as timm counts them, and how images are prepared for them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit.backend import normal
from minivit.cli.main import main
from minivit.data import Preparation, read_image
from minivit.data.file_array import ImageFiles
from minivit.data.fit import fitted, is_fit, read_fit
from minivit.errors import CheckpointError, ConfigError, DataError
from minivit.models import MODELS, configuration, count_parameters, names_alike, read_settings, t2t
from minivit.models.preparations import PREPARATIONS, prepare
from minivit.runs.trained import open_trained
from minivit.weights import huggingface
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from tests.weight_files import safetensors

GOLDENS = Path(__file__).parent / "goldens"
TIMM: dict[str, list[Any]] = json.loads((GOLDENS / "timm_models.json").read_text())
PICTURES = np.load(GOLDENS / "preparation.npz")
TINY = {"image_size": 32, "patch_size": 16, "dim": 8, "depth": 1, "heads": 2, "num_classes": 3}
PREPARED = Preparation("centre bicubic 0.9", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def counted(name: str, **changed: Any) -> int:
    kind, settings = configuration(name)
    return count_parameters(kind, {**settings, **changed})


# ---- sizes -----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "vit_tiny_patch16": (5_717_416, 5_790_376), "vit_small_patch16": (22_050_664, 22_196_584),
    "vit_small_patch32": (22_878_952, 22_915_432), "vit_base_patch8": (86_576_872, 87_744_232),
    "vit_base_patch16": (86_567_656, 86_859_496), "vit_base_patch32": (88_224_232, 88_297_192),
    "vit_large_patch16": (304_326_632, 304_715_752), "vit_large_patch32": (306_535_400, 306_632_680),
    "vit_huge_patch14": (632_045_800, 633_470_440), "vit_giant_patch14": (1_012_611_432,),
    "vit_gigantic_patch14": (1_844_440_680,),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_papers_models(name: str) -> None:
    images = (224, 518 if name == "vit_huge_patch14" else 384)
    assert (
        tuple(counted(f"{name}_{image}") for image, _ in zip(images, PUBLISHED[name], strict=False)) == PUBLISHED[name]
    )


@pytest.mark.parametrize(
    ("name", "changed", "parameters"),
    [
        ("vit_base_patch16_384", {"num_classes": 10}, 86_098_186),
        ("vit_base_patch16_224", {"num_classes": 21_843, "head": "mlp"}, 103_186_515),
        ("vit_base_patch16_224", {"image_size": (224, 384)}, 86_675_176),
        ("vit_lite_7_4", {}, 3_716_874),
        ("vit_lite_6_4", {}, 3_190_538),
        ("vit_cifar", {"dim": 384, "depth": 7, "heads": 12, "mlp_dim": 384}, 6_268_810),  # ViT-CIFAR
        ("vit_cifar", {"depth": 9, "heads": 12, "mlp_dim": 384, "qkv_bias": False}, 2_692_426),  # of SPT and LSA
        ("vit_cifar", {"dim": 512, "heads": 8, "mlp_dim": 512, "qkv_bias": False}, 9_523_722),
        ("vit_cifar", {"depth": 12}, 5_362_762),  # Ti/4
        ("deit_tiny_distilled_patch16_224", {}, 5_910_800),
        ("deit_small_distilled_patch16_224", {}, 22_436_432),
        ("deit_base_distilled_patch16_224", {}, 87_338_192),
    ],
)
def test_parameters_of_other_configurations(name: str, changed: dict[str, Any], parameters: int) -> None:
    assert counted(name, **changed) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_tiny_patch16_224", 5_524_416), ("vit_small_patch16_224", 21_665_664),
        ("vit_base_patch16_224", 85_798_656), ("vit_base_patch32_224", 87_455_232),
        ("vit_large_patch16_224", 303_301_632), ("vit_large_patch32_224", 305_510_400),
        ("vit_huge_patch14_224", 630_764_800),
    ],
)  # fmt: skip
def test_parameters_without_the_head(name: str, parameters: int) -> None:
    s = read_settings(*MODELS[name]).config
    assert counted(name) - (s["dim"] + 1) * s["num_classes"] == parameters


@pytest.mark.parametrize("name", [name for name in MODELS if name in TIMM])
def test_a_name_of_timms_is_timms_model(name: str) -> None:
    parameters, classes, image, patch, dim, depth, heads, hidden, eps, activation, pool, *_ = TIMM[name]
    s = read_settings(*MODELS[name]).written_out()
    patch *= getattr(read_settings(*MODELS[name]), "stride", 1)  # timm counts places of a ResNet's map
    assert (s["image_size"], s["patch_size"], s["dim"], s["depth"]) == (image, patch, dim, depth)
    gated = s["mlp"] == "swiglu"
    assert (s["heads"], s["mlp_dim"] * (1 + gated), s["norm_eps"]) == (heads, hidden, eps)
    assert ("SiLU" if gated else {"gelu": "GELU", "gelu_tanh": "GELUTanh"}[s["activation"]]) == activation
    assert {"cls": "token", "mean": "avg", "map": "map", "map_all": "map"}[s["pool"]] == pool
    if classes:
        assert s["num_classes"] == classes
    per_class = (dim + 1) * (1 + s["distilled"])
    without = counted(name) - per_class * s["num_classes"]  # some of timm's have no head unless one is asked for
    assert without + per_class * classes == parameters


@pytest.mark.parametrize("name", [name for name in PREPARATIONS if name in TIMM])
def test_images_are_prepared_as_timm_does(name: str) -> None:
    *_, mean, std, interpolation, part, mode = TIMM[name]
    how = {"center": "centre", "squash": "squash"}[mode]
    assert mv.preparation(name) == Preparation(f"{how} {interpolation} {part:g}", tuple(mean), tuple(std))


def test_every_name_of_timms_has_a_preparation_and_ones_own_have_none() -> None:
    assert PREPARATIONS.keys() == {name for name in MODELS if name in TIMM} | {
        "vit_base_patch8_384", "vit_huge_patch14_518", *t2t.NAMES, *mv.list_models("cct_*"),
    }  # fmt: skip
    assert mv.preparation("cct_7_3x1_32").fit == "centre bicubic 1"
    assert mv.preparation("cct_14_7x2_384").mean == (0.485, 0.456, 0.406)
    with pytest.raises(ConfigError, match="vit_digits is known for no weights"):
        mv.preparation("vit_digits")
    with pytest.raises(ConfigError, match="unknown model 'vit_x'"):
        prepare({"vit_x": PREPARED})


def test_attention_pools_the_registers_too_where_it_is_said() -> None:
    settings = {**TINY, "image_size": 16, "patch_size": 4, "registers": 1, "weight_init": "paper"}
    patches, all_tokens = mv.ViT(**settings, pool="map"), mv.ViT(**settings, pool="map_all")
    all_tokens.load_state_dict(patches.state_dict())
    x = normal(mv.Key(1), (2, 17, 8))
    for model, first in ((patches, 1), (all_tokens, 0)):
        model = model.to(np.float64)
        assert np.array_equal(model.read(x).numpy(), model.attn_pool(x[:, first:]).numpy())
    assert np.abs(patches.read(x).numpy() - all_tokens.read(x).numpy()).max() > 1e-6


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_by_pattern() -> None:
    assert mv.list_models("deit_*_patch16_384") == ["deit_base_distilled_patch16_384", "deit_base_patch16_384"]
    assert mv.list_models("vit_*_patch14_224") == [
        f"vit_{size}_patch14_224" for size in ("giant", "gigantic", "huge", "large")
    ]
    assert mv.list_models("resnet5*") == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vit_base_patch16_224.augreg_in21k", "'augreg_in21k' names weights, .*\n.*create_model('vit_base_patch16"),
        ("vit_base_patch16_225", "did you mean 'vit_base_patch16_224'"),
        ("vit_base_patch16_225.augreg", "did you mean 'vit_base_patch16_224'"),
        ("deit_tinny_patch16_224", "did you mean 'deit_tiny_patch16_224'"),
        (7, "unknown model 7"),
    ],
)  # fmt: skip
def test_what_an_unknown_name_may_have_meant(name: Any, said: str) -> None:
    for asked in (mv.create_model, mv.preparation, configuration):
        with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
            asked(name)


def test_the_summary_of_a_name_says_how_images_are_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "deit_tiny_patch16_224", "-b", "1"]) == 0
    assert (
        "prepared: shorter side to 248, bicubic, the middle 224 × 224; mean 0.485 0.456 0.406, std 0.229 0.224 0.225\n"
    ) in capsys.readouterr().out
    assert main(["summary", "deit_tiny_patch16_224", "-b", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preparation"]["fit"] == "centre bicubic 0.9"
    assert main(["summary", "vit_digits.best", "-b", "1"]) == 1
    assert "'best' names weights" in capsys.readouterr().err


def test_a_preparation_in_words() -> None:
    for fit, size, said in [
        ("squash bilinear 1", (224, 224), "squashed to 224 × 224, bilinear; mean"),
        ("squash bicubic 0.95", (224, 224), "squashed to 235 × 235, bicubic, the middle 224 × 224; mean"),
        ("centre bicubic 1", (20, 30), "to cover 20 × 30, bicubic, the middle 20 × 30; mean"),
        ("stretch", (8, 8), "stretched; mean"),
        ("crop", (8, 8), "the middle, scaled; mean"),
    ]:
        assert Preparation(fit, (0.5,), (0.25,)).text(*size).startswith(said)
    assert Preparation("crop", (0.5, 0.4, 0.5), (0.2,) * 3).text(8, 8).endswith("mean 0.5 0.4 0.5, std 0.2")


# ---- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", [name for name in PICTURES.files if name.startswith("pixels/")])
def test_pixels_are_those_of_the_other_system(golden: str) -> None:
    _, name, _, fit, size = golden.split("/")
    height, width = map(int, size.split("x"))
    mine = fitted(Image.fromarray(PICTURES[f"page/{name}"]), (height, width), fit)
    assert np.array_equal(mine.transpose(1, 2, 0), PICTURES[golden])


@pytest.mark.parametrize("golden", [name for name in PICTURES.files if name.startswith("numbers/")])
def test_numbers_are_those_of_the_other_system(golden: str) -> None:
    _, name, system, fit, _ = golden.split("/")
    like = "vit_tiny_patch16_224" if system == "huggingface" else "deit_tiny_patch16_224"
    prepared = Preparation(fit, mv.preparation(like).mean, mv.preparation(like).std)
    mine = prepared.read(png(PICTURES[f"page/{name}"]), (3, 32, 32))
    assert mine.dtype == np.float32
    np.testing.assert_allclose(mine, PICTURES[golden], rtol=0, atol=5e-7)


def png(pixels: np.ndarray) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "fit",
    ["centre", "centre bicubic", "centre nearest 1", "centre bicubic 0.09", "centre bicubic 1.1", "squash bicubic nan",
     "", "centre  bicubic 1", "crop bicubic 1", "stretch ", "centre bicubic 1 ", "Centre bicubic 1", None, 7, ["crop"]],
)  # fmt: skip
def test_what_is_no_fit(fit: Any) -> None:
    assert not is_fit(fit)
    for use in (read_fit, lambda fit: Preparation(fit, (0.5,), (0.5,))):
        with pytest.raises(ConfigError, match="unknown fit"):
            use(fit)


def test_a_strip_too_long_to_be_scaled_is_refused() -> None:
    strip = png(np.zeros((1, 20_000, 3), np.uint8))
    with pytest.raises(DataError, match=r"image: 20000 × 1 is a strip that would be scaled to 4,960,000 × 248"):
        read_image(strip, (224, 224), 3, "centre bicubic 0.9")
    assert read_image(strip, (4, 4), 1, "squash bilinear 1").shape == (1, 4, 4)


def test_image_files_keep_their_fit_and_decode_every_pixel(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(PICTURES["page/wide"]).resize((590, 375)).save(path, quality=90)
    files = ImageFiles([path, path], (20, 28), 3, "centre bicubic 0.9")
    expected = read_image(path, (20, 28), 3, "centre bicubic 0.9")  # not from a JPEG decoded smaller
    assert np.array_equal(files.take(np.array([1]))[0], expected)
    assert not np.array_equal(ImageFiles([path], (20, 28), 3)[0], expected)


# ---- checkpoints, predict and eval -----------------------------------------------------------------------------------


@pytest.fixture
def photos(here: Path) -> Path:
    """Photos of three classes, none square."""
    for k, name in enumerate(("wide", "tall", "small")):
        for i in range(2):
            place = here / "photos" / f"{'abc'[k]}" / f"{i}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(PICTURES[f"page/{name}"][:: 1 - 2 * i]).save(place)
    return here / "photos"


def given(**changed: Any) -> mv.ViT:
    """A model whose weights came from elsewhere."""
    model = mv.ViT(**{**TINY, **changed})
    model.head.weight.data[...] = 3.0 * normal(mv.Key(3), model.head.weight.shape)
    model.preparation, model.class_names = PREPARED, ("a", "b", "c")
    return model


def probabilities(model: mv.ViT, path: Path, prepared: Preparation) -> np.ndarray:
    x = prepared.read(path, model.settings.image_shape)[None]
    return np.asarray(mv.ops.softmax(mv.predict_logits(model, x)))[0]


def predicted(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["predict", *args, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_predict_and_eval_prepare_as_the_checkpoint_says(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = given()
    mv.save(model, "m.npz")
    assert load_checkpoint("m.npz").meta["data"] == PREPARED.meta() | {"classes": ["a", "b", "c"]}
    rows = predicted(capsys, "m.npz", "photos")
    p = np.stack([probabilities(model, photos / row["file"].removeprefix("photos/"), PREPARED) for row in rows])
    assert [row["class"] for row in rows] == ["abc"[k] for k in p.argmax(1)]
    np.testing.assert_allclose([row["probability"] for row in rows], p.max(1), atol=2e-6)
    assert main(["eval", "m.npz", "--data", "photos", "--split", "all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    labels = np.array(["abc".index(row["file"].split("/")[1]) for row in rows])
    assert result["loss"] == pytest.approx(-np.log(p[np.arange(6), labels]).mean(), abs=1e-5)
    other = Preparation("crop", PREPARED.mean, PREPARED.std)
    assert np.abs(probabilities(model, photos / "a/0.png", other) - p[0]).max() > 1e-4


def test_like_says_it_for_a_file_that_does_not(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = given()
    model.preparation = None
    mv.save(model, "m.npz")
    assert main(["predict", "m.npz", "photos/a/0.png"]) == 1
    assert "holds no classes, mean, std of the images" in capsys.readouterr().err
    like = "vit_base_patch16_224_miil"  # black is 0 for it: that says nothing of how dark the images were
    (row,) = predicted(capsys, "m.npz", "photos/a/0.png", "--like", like)
    assert row["probability"] == pytest.approx(
        probabilities(model, photos / "a/0.png", mv.preparation(like)).max(), abs=2e-6
    )
    assert row["class"].startswith("class ")
    Image.new("RGB", (50, 40), "white").save("white.png")
    predicted(capsys, "m.npz", "white.png", "--like", like)
    assert main(["eval", "m.npz", "--data", "photos", "--split", "all", "--like", like, "--by-position"]) == 0
    for wrong, said in [("vit_digits", "known for no weights"), ("vit_tiny", "unknown model 'vit_tiny'")]:
        assert main(["predict", "m.npz", "white.png", "--like", wrong]) == 1
        assert said in capsys.readouterr().err


def test_the_names_that_a_file_is_like_are_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_alike(read_settings("vit", configuration("vit_tiny_patch16_224").settings)) == [
        "vit_tiny_patch16_224", "deit_tiny_patch16_224",
    ]  # fmt: skip
    assert names_alike(read_settings("vit", {**MODELS["test_vit"].settings, "num_classes": 7, "seed": 2})) == [
        "test_vit"
    ]
    assert names_alike(read_settings("vit", TINY)) == []
    mv.save(mv.create_model("test_vit", depth=6), "t.npz")
    with pytest.raises(CheckpointError, match="holds no classes, mean, std") as found:
        open_trained("t.npz")
    assert found.value.remedy.endswith("--like test_vit")
    assert open_trained("t.npz", like="test_vit").preparation == mv.preparation("test_vit")


def test_a_preparation_of_other_channels_is_refused(here: Path) -> None:
    mv.save(mv.ViT(**TINY, in_channels=1), "grey.npz")
    with pytest.raises(CheckpointError, match=r"test_vit takes images of 3 channels, the model in grey\.npz of 1"):
        open_trained("grey.npz", like="test_vit")


def test_a_model_keeps_its_preparation_until_it_learns_other_things(here: Path) -> None:
    mv.save(given(), "a.npz")
    again = mv.load_model("a.npz")
    assert (again.preparation, again.class_names) == (PREPARED, ("a", "b", "c"))
    mv.save(again, "b.npz")
    assert Path("a.npz").read_bytes() == Path("b.npz").read_bytes()
    again.reset_head(5)
    assert (again.preparation, again.class_names) == (None, ())
    mv.save(again, "c.npz")
    assert "data" not in load_checkpoint("c.npz").meta
    digits = mv.data.load("digits")
    model = mv.create_model("vit_digits", depth=1)
    mv.save(model, "d.npz", data=digits)  # trained here: whoever goes on says on what
    assert mv.load_model("d.npz").preparation is None


def test_checkpoints_of_before_prepare_as_before(here: Path) -> None:
    mv.save(mv.ViT(**TINY), "a.npz")
    kept = load_checkpoint("a.npz")
    numbers = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    squash = "squash bilinear 1"
    for fit, takes, folders in [
        ({}, "stretch", "crop"), ({"fit": "stretch"}, "stretch", "crop"), ({"fit": "crop"}, "crop", "crop"),
        ({"fit": squash}, squash, squash),
    ]:  # fmt: skip
        save_checkpoint("a.npz", kept.arrays, kept.meta | {"data": {"name": "mine", **numbers, **fit}})
        trained = open_trained("a.npz")
        assert (trained.preparation.fit, trained.folder_fit) == (takes, folders)
    save_checkpoint("a.npz", kept.arrays, kept.meta | {"data": {**numbers, "fit": "centre bicubic 1e-9"}})
    with pytest.raises(CheckpointError, match=r"data\.fit is 'centre bicubic 1e-9', not 'stretch', 'crop' or as"):
        mv.load_model("a.npz")


# ---- other systems' files --------------------------------------------------------------------------------------------

SIZES = {"image_size": 32, "patch_size": 16, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 24}


def timm_file(path: Path, model: mv.ViT, config: dict[str, Any] | None = None) -> Path:
    path.write_bytes(safetensors(model.state_dict()))
    if config is not None:
        path.with_name("config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "name",
    ["test_vit2", "test_vit3", "test_vit4", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
     "flexivit_base", "eva_large_patch14_336", "vit_giant_patch14_dinov2", "vit_base_patch14_reg4_dinov2",
     "vit_base_patch16_rpn_224",
     "vit_medium_patch16_gap_384", "vit_wee_patch16_reg1_gap_256", "vit_so150m_patch16_reg4_map_256",
     "vit_base_patch16_224_miil"],
)  # fmt: skip
def test_a_file_of_timms_is_the_named_model_whatever_it_says(name: str, tmp_path: Path) -> None:
    model = mv.create_model(name, **SIZES, num_classes=5).eval()
    for i, p in enumerate(model.parameters()):
        p.data += 0.3 * normal(mv.Key(i), p.shape).astype(np.float32)
    path = timm_file(tmp_path / "model.safetensors", model)
    same = mv.create_model(name, weights=path, **SIZES).eval()
    assert {**same.settings.written_out(), "layer_scale": None, "seed": 0} == {
        **model.settings.written_out(), "layer_scale": None, "class_token": same.settings.class_token,
        "no_embed_class": same.settings.no_embed_class,
    }  # fmt: skip
    x = normal(mv.Key(9), (2, 3, 32, 32)).astype(np.float32)
    assert np.array_equal(mv.predict_logits(same, x), mv.predict_logits(model, x))
    assert same.preparation == mv.preparation(name)
    with pytest.warns(UserWarning, match="head: new"):
        assert mv.create_model(name, weights=path, **SIZES, num_classes=4).preparation is None


CONFIGS: dict[str, tuple[dict[str, Any], Preparation | None]] = {
    "all": ({"architecture": "x", "pretrained_cfg": {
        "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1],
        "interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "squash",
    }}, Preparation("squash bilinear 0.875", (0.1, 0.2, 0.3), (1, 1, 1))),
    "a name with a tag": ({"architecture": "deit_tiny_patch16_224.fb_in1k"}, mv.preparation("deit_tiny_patch16_224")),
    "timm's defaults": ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}, Preparation(
        "centre bicubic 0.875", (0.5,) * 3, (0.5,) * 3)),
    "a border": ({"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {
        "mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "border"}}, None),
    "another filter": ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "lanczos"}}, None),
    "no number": ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": "all"}}, None),
    "nothing": ({}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_timms_config_says_how_images_are_prepared(case: str, tmp_path: Path) -> None:
    config, expected = CONFIGS[case]
    config = config | {"model_args": {"img_size": 32, "num_heads": 1}}
    path = timm_file(tmp_path / "model.safetensors", mv.ViT(**{**TINY, "dim": 64, "heads": 1}), config)
    assert mv.load_model(path).preparation == expected
    if expected is None:
        with pytest.raises(CheckpointError, match="holds no classes, mean, std"):
            open_trained(str(path))
    else:
        assert open_trained(str(path)).preparation == expected


def test_a_bare_file_of_timms_is_like_the_model_that_is_named(tmp_path: Path) -> None:
    model = mv.create_model("test_vit4", num_classes=3)
    path = timm_file(tmp_path / "model.safetensors", model)
    with pytest.raises(CheckpointError, match="does not say heads"):
        open_trained(str(path))
    trained = open_trained(str(path), like="test_vit4")
    assert trained.model.settings.written_out()["heads"] == 3 and not trained.model.training
    assert trained.preparation == mv.preparation("test_vit4") and trained.from_elsewhere
    with pytest.raises(CheckpointError, match="does not fit the model"):
        open_trained(str(path), like="test_vit")


def test_explain_and_study_take_a_bare_file_by_the_name_that_it_is_like(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timm_file(Path("bare.safetensors"), mv.create_model("test_vit4", num_classes=3))
    like, photo = ["--like", "test_vit4"], "photos/a/0.png"
    for command in (["explain", "bare.safetensors", photo], ["study", "bare.safetensors", "photos", "--split", "all"]):
        assert main(command) == 1
        assert "does not say heads" in capsys.readouterr().err
    prepared = mv.preparation("test_vit4").text(160, 160)
    assert main(["explain", "bare.safetensors", photo, *like]) == 0
    assert f"prepared    {prepared}" in capsys.readouterr().err and Path("explain.html").exists()
    some = ["--split", "all", "-n", "2", "--only", "distance,entropy", "--by-position"]
    assert main(["study", "bare.safetensors", "photos", *some, *like, "-o", "out"]) == 0
    assert f"prepared: {prepared}" in capsys.readouterr().out and Path("out/study.html").exists()
    assert main(["study", "bare.safetensors", "photos", *some, "--like", "test_vit", "-o", "other"]) == 1
    assert "does not fit the model" in capsys.readouterr().err and not Path("other").exists()


HALF = {"mean": 0.5, "std": 0.5}
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {**HALF, "fit": "squash bilinear 1"}),
    "google's": ({"do_resize": True, "resample": 2, "size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
                 {"mean": [0.5] * 3, "std": [0.5] * 3, "fit": "squash bilinear 1"}),
    "deit's": ({"size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3},
               {**HALF, "fit": "squash bicubic 0.875"}),
    "an edge": ({"size": {"shortest_edge": 232}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
                {**HALF, "fit": "centre bilinear 0.965517241379"}),
    "no normalising": ({"do_normalize": False}, {"mean": 0.0, "std": 1.0, "fit": "squash bilinear 1"}),
    "to 2": ({"rescale_factor": 2 / 255, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
             {"mean": [0.5] * 3, "std": [0.5] * 3, "fit": "squash bilinear 1"}),
    "another filter": ({"resample": 1}, {}), "no filter": ({"resample": [2]}, {}),
    "no factor": ({"rescale_factor": 0}, {}),
    "a crop beyond": ({"size": 224, "crop_size": 256, "do_center_crop": True}, {}),
    "a crop of nothing": ({"size": {"shortest_edge": "x"}, "crop_size": 0, "do_center_crop": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_preprocessor_config_says_how_images_are_prepared(case: str) -> None:
    about, expected = PROCESSORS[case]
    found = huggingface.prepared(about)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == (value if key == "fit" else pytest.approx(value))
    if "shortest_edge" in str(about) and found:
        part = read_fit(found["fit"]).part
        assert int(224 / part) == 232
