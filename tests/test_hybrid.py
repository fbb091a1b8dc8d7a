"""Hybrids of a ResNet and a ViT: other systems' numbers, their own derivatives, weights, sizes, and their study."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops, study
from minivit.backend import normal, permutation, tile
from minivit.data import Dataset, Preparation
from minivit.errors import CheckpointError, ConfigError, DTypeError, MisfitError, ShapeError
from minivit.models import Hybrid, build, configuration, count_parameters, model_outline
from minivit.models.registry import read_settings
from minivit.runs.explaining import image_of_file, write_page
from minivit.runs.settings import parse_assignment, resolve
from minivit.runs.trained import open_trained
from minivit.study.account import account
from minivit.train import capture
from minivit.train.optim import AdamW
from minivit.weights import google
from minivit.weights.card import Facts
from minivit.weights.configs import TIMM_STAGES
from minivit.weights.export import write_export
from minivit.weights.foreign import open_foreign
from minivit.weights.names import Sizes
from minivit.weights.native import load_model
from minivit.weights.transfer import init_from
from tests import strict
from tests.browser import CHROMIUM, Page
from tests.test_options import disturbed, relative
from tests.weight_files import safetensors

any_cupy = strict.any_cupy

GOLDENS = Path(__file__).parent / "goldens"
SMALL: dict[str, Any] = {
    "image_size": (16, 24), "in_channels": 2, "num_classes": 3, "dim": 12, "depth": 2, "heads": 2, "mlp_dim": 20,
    "width": 32, "patch_size": 8,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "timm_r": {},
    "timm_stages": {"stages": (1, 2)},
    "google": {"stages": (2, 1), "stem_eps": "google", "activation": "gelu_tanh"},
}


def wave(shape: tuple[int, ...], number: int, centre: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Return the numbers that goldens/make_hybrid.py computes with."""
    n = np.arange(math.prod(shape), dtype=np.float64)
    return (np.sin(n * n * 0.37 + 1.3 * number) * scale + centre).reshape(shape)


IMAGES = wave((2, 2, 16, 24), 900).astype(np.float32)


def small(kind: str = "hybrid", dtype: Any = np.float64, **settings: Any) -> Any:
    return disturbed(build(kind, settings)).to(dtype).eval()


def state_of(case: str) -> dict[str, np.ndarray]:
    """Return the arrays of a golden's file."""
    golden, found = np.load(GOLDENS / "hybrid.npz"), {}
    for i, (name, sizes) in enumerate(zip(golden[f"{case}/names"], golden[f"{case}/shapes"], strict=True)):
        shape = tuple(int(n) for n in sizes if n)
        norm = name.endswith("/scale") or (name.endswith("weight") and len(shape) == 1)
        found[str(name)] = wave(shape, i, float(norm), 0.3).astype(np.float32)
    return found


def write(case: str, folder: Path, config: bool = True) -> Path:
    """Write the file that a system would, and return its path."""
    if case == "google":
        np.savez(folder / "google.npz", **state_of(case))
        return folder / "google.npz"
    path = folder / "model.safetensors"
    path.write_bytes(safetensors(state_of(case)))
    if config:
        about = {"architecture": "vit_x_r", "model_args": {"num_heads": 2, "img_size": [16, 24]}}
        (folder / "config.json").write_text(json.dumps(about))
    return path


# ---- against timm and Google -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_the_systems(case, tmp_path):
    golden = {name.partition("/")[2]: a for name, a in np.load(GOLDENS / "hybrid.npz").items() if case in name}
    model, path = Hybrid(**SMALL | CASES[case]), write(case, tmp_path)
    mv.load_weights(model, path)
    model.to(np.float64).eval()
    logits = model(IMAGES.astype(np.float64))
    assert relative(logits.numpy(), golden["logits"]) < 1e-10
    ops.cross_entropy(logits, np.array([2, 0])).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if case == "google":
        gradients = google.LAYOUT.written(gradients, Sizes(2, (1, 1)))
    assert gradients.keys() == set(golden["names"])
    for name, along in zip(golden["names"].tolist(), golden["along"], strict=True):
        for i, expected in enumerate(along):
            direction = wave(gradients[name].shape, 500 + i)
            # of a bias of keys the gradient is nothing but rounding
            least = 1e-9 * np.sqrt(np.square(gradients[name]).sum()) + 1e-15
            assert abs((gradients[name] * direction).sum() - expected) <= least, name


@pytest.mark.parametrize("case", ["timm_r", "timm_stages"])
def test_a_file_says_which_hybrid_it_holds(case, tmp_path):
    model = mv.load_model(write(case, tmp_path))
    assert type(model) is Hybrid
    assert model.config == Hybrid(**SMALL | CASES[case] | {"dim_head": 6, "class_token": True}).config
    assert model.num_parameters() == sum(a.size for a in state_of(case).values())


def test_googles_file_says_all_but_a_rectangle(tmp_path):
    state = {name: a.reshape(1, 1, 1, -1) if "/gn" in name else a for name, a in state_of("google").items()}
    positions = "Transformer/posembed_input/pos_embedding"
    state[positions] = state[positions][:, :5]  # of 2 × 2 patches
    state = {name.replace("unit", "unit0"): a for name, a in state.items()}  # as BiT's are counted
    np.savez(tmp_path / "google.npz", **state)
    model = mv.load_model(tmp_path / "google.npz")
    s = model.settings
    assert (s.stages, s.width, s.patch_size, s.image_size, s.stem_eps) == ((2, 1), 32, 8, 16, "google")
    assert model.preparation.fit == "squash bilinear 1"
    other = Hybrid(**SMALL | CASES["google"] | {"image_size": (16, 24)})
    with pytest.warns(UserWarning, match="pos_embed: 2 × 2 patches → 2 × 3"):
        mv.load_weights(other, tmp_path / "google.npz")
    other = Hybrid(**SMALL | CASES["google"] | {"image_size": 16, "stem_eps": "timm"})
    with pytest.warns(UserWarning, match="stem_eps: google in the file, timm here"):
        mv.load_weights(other, tmp_path / "google.npz")


def test_what_does_not_fit_is_told(tmp_path):
    path = write("timm_stages", tmp_path)
    with pytest.raises(MisfitError, match=r"stages.0.blocks.1.conv1.weight .*\n(.*\n)*.*stages=\(1, 2\)"):
        mv.load_weights(Hybrid(**SMALL | {"stages": (2, 2)}), path)
    with pytest.raises(MisfitError, match="a convolutional network before the blocks, which the model has not"):
        mv.load_weights(mv.ViT((16, 24), 8, 2, 3, 12, 2, 2, 20), path)
    with pytest.raises(CheckpointError, match="holds a model of the kind hybrid, vit_digits is a vit"):
        mv.create_model("vit_digits", weights=path)
    state = state_of("timm_stages")
    state["patch_embed.backbone.stem.conv.weight"] = np.zeros((32, 7), np.float32)
    path.write_bytes(safetensors(state))
    with pytest.raises(CheckpointError, match=r"the root of its ResNet is of shape \(32, 7\)"):
        mv.load_model(path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"backbone.stem.conv.weight": (33, 2, 7, 7)}, "width is 33, and norms have 32 groups"),
        ({"backbone.stem.conv.weight": (0, 2, 7, 7)}, "width is 0"),
        ({"backbone.stem.conv.weight": (32, 2, 5, 5)}, r"misshapen   .*stem.conv.weight: \(32, 2, 5, 5\)"),
        ({"proj.weight": (12, 256, 0, 0)}, "patch height 0"),
        ({"proj.weight": (12, 1, 7000, 1)}, "patch_size is .56000, 8."),
        ({"proj.weight": None}, "it has no patch_embed.proj.weight"),
        ({f"backbone.stages.{i}.blocks.0.conv1.weight": (1, 1, 1, 1) for i in range(20)}, "patch_size is 2097152"),
    ],
)
def test_a_file_made_to_mislead(changed, says, tmp_path):
    path, state = write("timm_stages", tmp_path), state_of("timm_stages")
    for name, shape in changed.items():
        state.pop(f"patch_embed.{name}", None)
        state |= {} if shape is None else {f"patch_embed.{name}": np.zeros(shape, np.float32)}
    path.write_bytes(safetensors(state))
    with pytest.raises(CheckpointError, match=says):
        mv.load_model(path)


def test_hybrids_with_batch_norm_are_told_apart(tmp_path):
    """timm's of a ResNet-D: by their names, and by what their files hold."""
    assert "vit_small_r26_s32_224" in mv.list_models("vit_*_r*")
    for name in ("vit_small_resnet26d_224", "vit_small_resnet50d_s16_224", "vit_base_resnet50d_224.untrained"):
        with pytest.raises(ConfigError, match="BatchNorm before its blocks, and minivit has no BatchNorm"):
            mv.create_model(name)
    state = {n: a for n, a in state_of("timm_stages").items() if "backbone" not in n}
    state["patch_embed.proj.weight"] = np.zeros((12, 2048, 1, 1), np.float32)
    for name in ("conv1.0.weight", "conv1.1.running_mean", "bn1.weight", "bn1.running_var"):
        state[f"patch_embed.backbone.{name}"] = np.zeros(4, np.float32)
    (tmp_path / "model.safetensors").write_bytes(safetensors(state))
    for load in (mv.load_model, lambda path: mv.load_weights(Hybrid(**SMALL), path)):
        with pytest.raises(CheckpointError, match="holds a network with BatchNorm, which minivit has not"):
            load(tmp_path / "model.safetensors")


def test_a_named_hybrid_takes_a_file(tmp_path):
    """The weights of a named one, as both systems write them, give the same model, in Google's eps and in timm's."""
    settings = {"dim": 8, "depth": 1, "heads": 2, "mlp_dim": 8, "image_size": 64, "width": 32, "num_classes": 4}
    model = small(dtype=np.float32, **dict(configuration("vit_small_r26_s32_224").settings) | settings)
    arrays = {name: np.array(p.data) for name, p in model.named_parameters()}
    np.savez(tmp_path / "google.npz", **google.LAYOUT.written(arrays, Sizes(2, (1, 1))))
    (tmp_path / "model.safetensors").write_bytes(safetensors(arrays))
    images = normal(mv.Key(3), (1, 3, 64, 64)).astype(np.float32)
    for name, eps in (("model.safetensors", "timm"), ("google.npz", "google")):
        notes: list[str] = []
        again = mv.create_model(
            "vit_small_r26_s32_224", weights=tmp_path / name, tell=notes.append, **settings | {"activation": "gelu"}
        )
        assert again.settings.stem_eps == eps
        error = relative(again.eval()(images).numpy(), model(images).numpy())
        assert error == 0 if eps == "timm" else 0 < error < 1e-2
        assert again.preparation.fit == ("centre bicubic 0.9" if eps == "timm" else "squash bilinear 1")
    found = open_foreign(tmp_path / "google.npz")
    assert found is not None and found.kind == "hybrid"


@pytest.mark.parametrize("case", ["timm_r", "timm_stages"])
def test_images_of_other_channels(case, tmp_path):
    """The filters are summed before they are standardised, as timm does it: features of grey images in proportion."""
    path = write(case, tmp_path)
    whole = mv.load_model(path)
    sizes = {k: v for k, v in whole.config.items() if k in SMALL or k == "stages"}
    told: list[str] = []
    model = mv.create_model("vit_tiny_r_s16_p8_224", weights=path, tell=told.append, **sizes | {"in_channels": 1})
    name = next(n for n in model.state_dict() if n.startswith("patch_embed.backbone") and "conv" in n)
    assert told == [f"{name}: 2 image channels → 1"]
    before, after = whole.state_dict()[name], model.state_dict()[name]
    np.testing.assert_array_equal(after, before[:, :1] + before[:, 1:])
    grey = IMAGES[:, :1]
    root = [m.patch_embed.backbone if case == "timm_r" else m.patch_embed.backbone.stem for m in (whole, model)]
    two, one = (r.conv(mv.tensor(x)).numpy() for r, x in zip(root, (np.repeat(grey, 2, axis=1), grey), strict=True))
    rate = (two * one).sum((0, 2, 3)) / (one * one).sum((0, 2, 3))  # of each channel
    np.testing.assert_allclose(two, one * rate[:, None, None], atol=1e-4 * np.abs(two).max())


def test_googles_file_of_a_root_alone(tmp_path):
    model = small(dtype=np.float32, **SMALL | {"image_size": 16, "stem_eps": "google", "activation": "gelu_tanh"})
    arrays = {name: np.array(p.data) for name, p in model.named_parameters()}
    np.savez(tmp_path / "google.npz", **google.LAYOUT.written(arrays, Sizes(2, (2, 2))))
    again = mv.load_model(tmp_path / "google.npz")
    assert (again.settings.stages, again.settings.patch_size, again.settings.grid) == ((), 8, (2, 2))
    images = np.ascontiguousarray(IMAGES[:, :, :, :16])
    assert np.array_equal(again(images).data, model(images).data)


def exported(tmp_path: Path, to: str, **settings: Any) -> tuple[Any, Any]:
    """Return a hybrid and what comes back of it through another system's layout."""
    model = small(dtype=np.float32, **SMALL | {"image_size": 64, "patch_size": 32} | settings)
    facts = Facts(Preparation("centre bicubic 0.5", (0.25, 0.5), (0.5, 0.75)), ("cat", "dog", "cow"), "digits")
    write_export(model, tmp_path / "out", to, facts)
    return model, mv.load_model(tmp_path / "out").eval()


@pytest.mark.parametrize(
    ("to", "settings"),
    [
        ("timm", {"width": 64}), ("timm", {"width": 64, "pool": "mean"}),
        ("google", {"stem_eps": "google", "activation": "gelu_tanh", "patch_size": 16}),
        ("google", {"stem_eps": "google", "activation": "gelu_tanh", "stages": (2, 1)}),
    ],
)  # fmt: skip
def test_out_and_back_bit_for_bit(tmp_path, to, settings):
    model, back = exported(tmp_path, to, **settings)
    state = model.state_dict()
    assert back.state_dict().keys() == state.keys()
    assert all(np.array_equal(back.state_dict()[n], a) for n, a in state.items())
    followed = {"dim_head": 6, "class_token": settings.get("pool") != "mean", "seed": 0}
    assert back.config | followed == model.config | followed
    images = normal(mv.Key(3), (2, 2, 64, 64)).astype(np.float32)
    assert np.array_equal(back(images).data, model(images).data)


@pytest.mark.parametrize(
    ("to", "settings", "says"),
    [
        ("timm", {"width": 32}, "a ResNet whose width is not 64"), ("huggingface", {}, "a ResNet before the patches"),
        ("timm", {"width": 64, "stages": (1, 2)}, "a ResNet of other stages than timm's"),
        ("timm", {"width": 64, "stem_eps": "google"}, "stem_eps 'google'"), ("google", {}, "stem_eps 'timm'"),
        ("timm", {"width": 64, "distilled": True}, "a distillation token after a ResNet"),
    ],
)  # fmt: skip
def test_what_cannot_go_out(tmp_path, to, settings, says):
    with pytest.raises(ConfigError, match=rf"{says}.*\n.*onnx, which can say it"):
        exported(tmp_path, to, **settings)


@pytest.mark.parametrize("settings", [{}, {"pool": "mean", "registers": 1}])
def test_timm_gives_the_same_logits(tmp_path, settings):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model, _ = exported(tmp_path, "timm", width=64, **settings)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = normal(mv.Key(3), (2, 2, 64, 64)).astype(np.float32)
    with torch.no_grad():
        assert relative(theirs(torch.from_numpy(images)).numpy(), model(images).numpy()) < 1e-5
    for stages, name in TIMM_STAGES.items():
        assert dict(configuration(name).settings).get("stages", ()) == stages


# ---- what it is ------------------------------------------------------------------------------------------------------


def test_the_smallest_named_hybrid_runs():
    model = mv.create_model("vit_tiny_r_s16_p8_224").eval()
    assert model.num_parameters() == 6_337_704
    assert model(np.zeros((1, 3, 224, 224), np.float32)).shape == (1, 1000)


def test_small_models_are_as_large_as_the_vit_for_cifar():
    sizes = {name: count_parameters(*configuration(name)) for name in ("vit_cifar", "hybrid_cifar", "resnet_cifar")}
    assert sizes == {"vit_cifar": 2_693_578, "hybrid_cifar": 2_818_058, "resnet_cifar": 2_796_714}


RESNET = {"image_size": (6, 8), "in_channels": 2, "num_classes": 3, "depths": (1, 2), "width": 4, "group": 2}
CHECKED: dict[str, tuple[str, dict[str, Any]]] = {
    "root": ("hybrid", SMALL | {"depth": 1}),
    "stages": ("hybrid", SMALL | {"image_size": 16, "depth": 1, "stages": (1, 1)}),
    "google's eps": ("hybrid", SMALL | {"image_size": 16, "depth": 1, "stages": (1,), "stem_eps": "google"}),
    "resnet": ("resnet", RESNET),
}


@pytest.mark.parametrize("case", CHECKED)
def test_every_gradient_by_a_complex_step(case):
    kind, settings = CHECKED[case]
    model = small(kind, **settings)
    images = normal(mv.Key(6), (2, *model.settings.image_shape))
    report = mv.check_module(model, images, order=1)
    assert report.worst.method == "complex" and report.worst.error <= 1e-12
    assert len(report.checks) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        ("hybrid", {"stages": (1, 1), "patch_size": 4}, "patch_size is 4, and a place .* is 8 by 8 pixels"),
        ("hybrid", {"width": 48}, "width is 48, and norms have 32 groups"),
        ("hybrid", {"stages": 3}, "stages is 3"),
        ("hybrid", {"stages": (1,) * 9}, "stages is"),
        ("hybrid", {"stages": (0,)}, "stages is 0"),
        ("hybrid", {"stem_eps": "jax"}, "stem_eps is 'jax'"),
        ("resnet", {"depths": ()}, "depths is \\[\\], a network of no blocks"),
        ("resnet", {"width": 24}, "group is 16, which does not divide width 24"),
    ],
)
def test_settings_that_cannot_be(kind, settings, says):
    with pytest.raises(ConfigError, match=says):
        read_settings(kind, settings)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("model.stages=2", "model.stages = 2 (command line) is not a list of whole numbers"),
        ('model.stages=[1,"a"]', "is not a list of whole numbers"),
        ("model.stages=[1,0]", "model.stages is 0 (command line)"),
        ("model.image_size=[8,8,8]", "is not a whole number or [height, width]"),
    ],
)
def test_a_list_on_the_command_line(given, says):
    with pytest.raises(ConfigError) as caught:
        resolve({"model.name": "hybrid_cifar"} | dict([parse_assignment(given)]))
    assert says in str(caught.value)


def test_a_list_is_as_long_as_one_likes():
    found = resolve({"model.name": "resnet_digits"} | dict([parse_assignment("model.depths=[1,2,1]")]))
    assert found.model_values()["depths"] == (1, 2, 1)


def test_images_of_another_kind_are_refused():
    for model in (small(**SMALL, dtype=np.float32), small("resnet", np.float32, **RESNET)):
        height = model.settings.image_size[0]
        with pytest.raises(ShapeError, match=rf"takes images of shape \(B, 2, {height}"):
            model(np.zeros((1, 2, 8, 8), np.float32))
        with pytest.raises(DTypeError, match="takes float32 images, got uint8"):
            model(np.zeros((1, *model.settings.image_shape), np.uint8))


@pytest.mark.parametrize(("kind", "settings"), [("hybrid", SMALL | {"stages": (1,)}), ("resnet", RESNET)])
def test_it_trains_saves_and_loads_in_half_precision_too(kind, settings, tmp_path):
    model = build(kind, settings)
    outlined = model_outline(kind, settings)
    assert {n: p.shape for n, p in outlined.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), threads=2, micro_batch=2)
    images, labels = normal(mv.Key(1), (4, *model.settings.image_shape)).astype(np.float32), np.arange(4) % 3
    losses = [step(images, labels) for _ in range(40)]
    assert losses[-1] < 0.5 * losses[0]
    mv.save(model, tmp_path / "a.npz")
    again = load_model(tmp_path / "a.npz")
    assert type(again) is type(model) and again.config == model.config
    np.testing.assert_array_equal(again(images).data, model.eval()(images).data)
    half = again.to(np.float16)(images)
    assert half.dtype == np.float16 and relative(half.numpy().astype(float), model(images).numpy()) < 0.05


def test_a_resnet_learns_digits():
    train, test = mv.data.load("digits"), mv.data.load("digits", "test")
    (of_train, labels), (of_test, right) = ((x.images.astype(np.float32) / 255 - 0.3, x.labels) for x in (train, test))
    model = mv.create_model("resnet_digits")
    step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), threads=2)
    for epoch in range(3):
        order = permutation(mv.Key(0, epoch), 1920)
        for start in range(0, len(order), 64):
            rows = order[start : start + 64]
            step(of_train[rows], labels[rows])
    model.eval()
    assert (model(of_test).numpy().argmax(axis=1) == right).mean() > 0.85


def test_another_image_size_and_other_channels(tmp_path):
    model = small(**SMALL, dtype=np.float32)
    mv.save(model, tmp_path / "a.npz")
    images = normal(mv.Key(2), (1, 1, 16, 24)).astype(np.float32)
    grey = Hybrid(**SMALL | {"in_channels": 1, "num_classes": 5})
    init_from(grey, tmp_path / "a.npz")
    colours = np.concatenate([images, images], axis=1)
    np.testing.assert_allclose(grey.embed(images).numpy(), model.embed(colours).numpy(), rtol=1e-4, atol=1e-5)
    before = model.patch_embed.backbone.conv.weight.data.copy()
    model.resize((24, 32), 8)
    assert model.settings.grid == model.patch_embed.grid == (3, 4) and model.pos_embed.shape == (1, 13, 12)
    assert np.array_equal(model.patch_embed.backbone.conv.weight.data, before)
    assert model(np.zeros((1, 2, 24, 32), np.float32)).shape == (1, 3)
    model.resize((24, 32), 4)
    assert model.patch_embed.proj.weight.shape == (12, 32, 1, 1) and model.num_tokens == 49
    with pytest.raises(ConfigError, match="patch_size is 2"):
        model.resize((24, 32), 2)


def test_a_resnet_goes_on_with_larger_images(tmp_path):
    model = small("resnet", np.float32, **RESNET)
    mv.save(model, tmp_path / "a.npz")
    larger = build("resnet", RESNET | {"image_size": (12, 16), "num_classes": 5})
    init_from(larger, tmp_path / "a.npz")
    assert np.array_equal(larger.stages[1][0].conv1.weight.data, model.stages[1][0].conv1.weight.data)
    with pytest.raises(MisfitError, match="depths is \\[1, 2\\] there, \\[2, 2\\] here"):
        init_from(build("resnet", RESNET | {"depths": (2, 2)}), tmp_path / "a.npz")


# ---- captured on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "settings"), [("hybrid", SMALL | {"stages": (1,)}), ("resnet", RESNET)])
def test_it_is_recorded_on_a_gpu_to_the_bit(any_cupy, monkeypatch, kind, settings, precision):
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)

    def losses(device: str) -> tuple[Any, list[float]]:
        model = disturbed(build(kind, settings), 0.1).to(device)
        step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), clip_norm=1.0, precision=precision)
        images = normal(mv.Key(1), (3, *model.settings.image_shape)).astype(np.float32)
        return step, [step(images, np.arange(3)) for _ in range(3)]

    step, recorded = losses("cuda")
    assert step.why_launched == "" and len(step.underway.capture.nodes()) == 1
    monkeypatch.setattr(capture, "SHAPES", 0)
    assert losses("cuda")[1] == recorded
    if precision == "float32":
        assert recorded == pytest.approx(losses("cpu")[1], rel=1e-3)


# ---- studied ---------------------------------------------------------------------------------------------------------


def test_the_study_of_attention_knows_a_hybrid():
    model = small(**SMALL | {"stages": (1,)})
    trace = study.trace_model(model, IMAGES.astype(np.float64))
    found = study.direct_attribution(trace, 1)
    np.testing.assert_allclose(found.total, found.logit, rtol=1e-10, atol=1e-12)
    gradient = study.attention_gradient(trace, 1)
    assert study.patch_map(trace, study.relevance(trace, gradient)).shape == (2, 2, 3)
    assert study.attention_distance(trace).shape == (2, 2)
    assert study.position_similarity(model).shape == (2, 3, 2, 3)
    assert study.filter_components(model, 4).values.shape == (4, 2, 7, 7)
    assert study.untrained_like(model).config == model.config


def explained(folder: Path) -> Path:
    """Return the page of an image, and save its model's checkpoint beside it."""
    model = small(**SMALL | {"stages": (1,), "image_size": 16, "in_channels": 3}, dtype=np.float32)
    pixels = (np.arange(3 * 16 * 16) * 7 % 256).astype(np.uint8).reshape(1, 3, 16, 16)
    mv.save(model, folder / "model.npz", data=Dataset(pixels, np.zeros(1, np.int64), ("a", "b", "c"), "noise"))
    np.save(folder / "image.npy", pixels)
    trained = open_trained(str(folder / "model.npz"))
    write_page(trained, image_of_file(trained, str(folder / "image.npy"), 0), folder / "page.html", "given")
    return folder / "page.html"


def test_the_steps_begin_with_features():
    model = small(**SMALL | {"stages": (1,)})
    told = account(model, IMAGES[0].astype(np.float64)).numbers
    seen = model.patch_embed.features(IMAGES[:1].astype(np.float64)).numpy()[0]
    assert seen.shape == (6, 128 * 4) and np.array_equal(told["seen"], seen[:, :4])
    np.testing.assert_allclose(seen @ told["weight"].ravel() + told["bias"][0], told["embedded"][:, 0], rtol=1e-10)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed: the page was not opened")
def test_the_page_says_what_a_patch_is(tmp_path):
    with Page(explained(tmp_path)) as page:
        assert page.run("check().worst") < 1e-5 and page.run("check().rows") < 0.01
        words = page.run("document.body.innerText")
        assert "A ResNet comes first: 128 features of every 4 × 4 pixels" in words
        assert "3 × 16 × 16 → 128 × 4 × 4 → 4 × 512" in words and "A patch is 2 × 2 places of its map" in words
        assert "(512 terms)" in words and "NaN" not in words
        assert page.errors == []


def test_a_resnet_has_no_attention(tmp_path):
    model = small("resnet", np.float32, **RESNET)
    with pytest.raises(ConfigError, match="a ResNet has no trace"):
        study.trace_model(model, np.zeros((1, 2, 6, 8), np.float32))
