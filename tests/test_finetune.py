"""Pre-train, then fine-tune: positions on another grid against PyTorch, and what a model takes from a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal, uniform
from minivit.errors import CheckpointError, MisfitError, ShapeError
from minivit.models.positions import resize_matrix, resize_positions
from minivit.runs.settings import assignments
from minivit.train import load_checkpoint, save_checkpoint
from minivit.train.ema import EMA
from minivit.train.optim import SGD, AdamW
from minivit.weights.load import load_weights
from minivit.weights.native import model_config, read_model
from minivit.weights.transfer import init_from

SMALL = {
    "image_size": (12, 8), "patch_size": 4, "dim": 16, "depth": 2, "heads": 4, "mlp_dim": 24, "num_classes": 5,
    "seed": 3,
}  # fmt: skip
HEAD = {"head.weight", "head.bias"}


def disturbed(model):
    """Give every parameter a random part, the head of zeros included."""
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * 0.1
    return model


def saved(path, model, config=None, **averages):
    arrays = {f"model/{n}": a for n, a in model.state_dict().items()} | {f"ema/{n}": a for n, a in averages.items()}
    save_checkpoint(path, arrays, {"model": model.config if config is None else config})
    return path


@pytest.fixture
def trained():
    return disturbed(mv.ViT(**SMALL))


@pytest.fixture
def path(tmp_path, trained):
    return saved(tmp_path / "a.npz", trained)


def images(n=3, channels=3, size=(12, 8)):
    return uniform(mv.Key(5), (n, channels, *size))


# ---- positions -------------------------------------------------------------------------------------------------------

# Made by PyTorch 2.13.0:
#   F.interpolate(torch.eye(old, dtype=torch.float64)[None, None], size=(new, old), mode="bicubic", antialias=True)
FOUR_TO_SIX = [
    [1.065789473684, -0.065789473684, 0, 0],
    [0.529411764706, 0.529411764706, -0.058823529412, 0],
    [-0.057870370370, 0.937500000000, 0.131944444444, -0.011574074074],
    [-0.011574074074, 0.131944444444, 0.937500000000, -0.057870370370],
    [0, -0.058823529412, 0.529411764706, 0.529411764706],
    [0, 0, -0.065789473684, 1.065789473684],
]
SEVEN_TO_THREE = [
    [0.3830645161290, 0.4395161290323, 0.2137096774194, 0, -0.03225806451613, -0.004032258064516, 0],
    [-0.03052503052503, 0.04517704517705, 0.2759462759463, 0.4188034188034, 0.2759462759463, 0.04517704517705,
     -0.03052503052503],
    [0, -0.004032258064516, -0.03225806451613, 0, 0.2137096774194, 0.4395161290323, 0.3830645161290],
]  # fmt: skip
# x = torch.sin(1.7 * torch.arange(12, dtype=torch.float64)).reshape(1, 2, 3, 2).permute(0, 3, 1, 2)
# F.interpolate(x, size=(4, 2), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(8, 2)
TWO_BY_THREE_TO_FOUR_BY_TWO = [
    [-0.122873710113, 0.294973778834],
    [0.264186427463, 0.121305319579],
    [-0.111584228494, 0.149464860345],
    [0.121422431451, 0.110824415726],
    [-0.089197973335, -0.139069182862],
    [-0.161668621808, 0.090041513917],
    [-0.077908491715, -0.284578101351],
    [-0.304432617820, 0.079560610064],
]


def test_the_weights_are_pytorchs():
    np.testing.assert_allclose(resize_matrix(4, 6), FOUR_TO_SIX, rtol=0, atol=1e-12)
    np.testing.assert_allclose(resize_matrix(7, 3), SEVEN_TO_THREE, rtol=0, atol=1e-12)


def test_a_rectangle_becomes_another_as_pytorchs_does():
    pos = np.sin(1.7 * np.arange(12.0)).reshape(1, 6, 2)
    resized = resize_positions(pos, (2, 3), (4, 2))
    assert resized.shape == (1, 8, 2)
    np.testing.assert_allclose(resized[0], TWO_BY_THREE_TO_FOUR_BY_TWO, rtol=0, atol=1e-12)


@pytest.mark.parametrize("old, new", [((3, 5), (7, 4)), ((5, 5), (2, 9)), ((1, 6), (3, 3)), ((4, 4), (1, 1))])
def test_what_does_not_depend_on_the_filter(old, new):
    pos = normal(mv.Key(1), (1, 1 + old[0] * old[1], 6)).astype(np.float32)
    resized = resize_positions(pos, old, new, prefix=1)
    assert resized.shape == (1, 1 + new[0] * new[1], 6) and resized.dtype == np.float32
    assert (resized[:, 0] == pos[:, 0]).all(), "the class token's own is copied"
    np.testing.assert_array_equal(resized[:, 1:], resize_positions(pos[:, 1:], old, new))
    flat = resize_positions(np.full_like(pos, 0.3), old, new, prefix=1)
    np.testing.assert_allclose(flat, 0.3, rtol=1e-6)
    turned = pos[:, 1:].reshape(*old, 6).swapaxes(0, 1).reshape(1, -1, 6)  # rows and columns exchanged
    again = resize_positions(turned, old[::-1], new[::-1]).reshape(*new[::-1], 6).swapaxes(0, 1).reshape(1, -1, 6)
    np.testing.assert_allclose(again, resized[:, 1:], rtol=0, atol=1e-6)


def test_the_same_grid_gives_the_same_bits():
    pos = normal(mv.Key(1), (1, 13, 4))
    same = resize_positions(pos, (4, 3), (4, 3), prefix=1)
    assert (same == pos).all() and same is not pos


@pytest.mark.parametrize("shape, prefix", [((1, 12, 4), 1), ((1, 13, 4), 0), ((2, 12, 4), 0), ((12, 4), 0)])
def test_positions_that_are_not_of_the_grid(shape, prefix):
    with pytest.raises(ShapeError, match="4 × 3 patches"):
        resize_positions(np.zeros(shape), (4, 3), (5, 5), prefix)


# ---- what is loaded --------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_evaluated(tmp_path, trained):
    average = {n: a + 1 for n, a in trained.state_dict().items() if n != "norm.bias"}  # which was frozen
    path = saved(tmp_path / "a.npz", trained, **average)
    expected = trained.state_dict() | average
    loaded, other, fine = read_model(path)[0], mv.ViT(**SMALL), mv.ViT(**SMALL)
    load_weights(other, path)
    init_from(fine, path)
    for model, names in ((loaded, expected), (other, expected), (fine, expected.keys() - HEAD)):
        assert all((model.state_dict()[n] == expected[n]).all() for n in names)


def test_the_config_of_a_checkpoint_has_every_setting(tmp_path, trained, path):
    assert model_config(path) == trained.config
    partly = {"image_size": 8, "dim": 8, "depth": 1, "heads": 2}
    small = saved(tmp_path / "b.npz", mv.ViT(**partly), config=partly)
    assert model_config(small) == mv.ViT(**partly).config
    assert read_model(small)[0].config == mv.ViT(**partly).config


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def test_other_classes_at_the_same_size(path, trained):
    model = disturbed(mv.ViT(**SMALL | {"num_classes": 7, "seed": 8}))  # nothing of its own may stay
    assert init_from(model, path) == ["head: new, for 7 classes"]
    state = trained.state_dict()
    assert all((a == state[n]).all() for n, a in model.state_dict().items() if n not in HEAD)
    np.testing.assert_array_equal(model.features(images()).numpy(), trained.features(images()).numpy())
    logits = model(images())
    assert logits.shape == (3, 7) and not logits.numpy().any(), "a head of zeros"


@pytest.mark.parametrize("size", [(20, 16), (8, 24), 4])
def test_another_resolution(path, trained, size):
    model = mv.ViT(**SMALL | {"image_size": size})
    h, w = (n // 4 for n in model.patch_embed.image_size)
    assert init_from(model, path) == [f"pos_embed: 3 × 2 patches → {h} × {w}", "head: new, for 5 classes"]
    state, own = trained.state_dict(), model.state_dict()
    expected = resize_positions(state["pos_embed"], (3, 2), (h, w), prefix=1)
    np.testing.assert_array_equal(own["pos_embed"], expected)
    assert all((own[n] == state[n]).all() for n in own.keys() - HEAD - {"pos_embed"})
    assert model(images(size=model.patch_embed.image_size)).shape == (3, 5)


def test_as_many_patches_in_another_rectangle_are_resized_too(path, trained):
    model = mv.ViT(**SMALL | {"image_size": (8, 12)})
    assert init_from(model, path)[0] == "pos_embed: 3 × 2 patches → 2 × 3"
    assert (model.pos_embed.data[:, 1:] != trained.pos_embed.data[:, 1:]).any()


def test_the_hidden_layer_of_the_pre_training_head_goes(tmp_path):
    path = saved(tmp_path / "a.npz", disturbed(mv.ViT(**SMALL, head="mlp")))
    for head in ("linear", "mlp"):
        model = mv.ViT(**SMALL, head=head)
        init_from(model, path)
        assert model.pre_logits is None and model.config["head"] == "linear"
        assert not model(images()).numpy().any()


def test_the_models_dtype_stays(path):
    model = mv.ViT(**SMALL | {"image_size": 16}).to(np.float64)
    init_from(model, path)
    assert {str(p.dtype) for p in model.parameters()} == {"float64"}


@pytest.mark.parametrize("before, after", [(3, 1), (1, 3), (1, 4)])
def test_grey_images_give_the_same_tokens_with_other_channels(tmp_path, before, after):
    old, new = disturbed(mv.ViT(**SMALL, in_channels=before)), mv.ViT(**SMALL, in_channels=after)
    notes = init_from(new, saved(tmp_path / "a.npz", old))
    assert f"patch_embed.proj.weight: {before} image channels → {after}" in notes
    grey = images(channels=1)
    tokens = [m.features(grey.repeat(m.config["in_channels"], axis=1)).numpy() for m in (old, new)]
    np.testing.assert_allclose(tokens[0], tokens[1], atol=1e-5)


def test_from_class_token_to_mean_and_back(tmp_path, path, trained):
    mean = mv.ViT(**SMALL, pool="mean")
    assert init_from(mean, path)[0] == "cls_token: left out"
    assert (mean.pos_embed.data == trained.pos_embed.data[:, 1:]).all()
    fresh = mv.ViT(**SMALL | {"seed": 11})
    own = fresh.state_dict()
    assert init_from(fresh, saved(tmp_path / "mean.npz", mean))[0] == "cls_token: new"
    assert (fresh.cls_token.data == own["cls_token"]).all()
    assert (fresh.pos_embed.data[:, 0] == own["pos_embed"][:, 0]).all()
    assert (fresh.pos_embed.data[:, 1:] == mean.pos_embed.data).all()


def test_what_computes_otherwise_is_said(path):
    notes = init_from(mv.ViT(**SMALL, activation="gelu_tanh", norm_eps=1e-5), path)
    assert notes[:2] == ["activation: gelu → gelu_tanh", "norm_eps: 1e-06 → 1e-05"]


@pytest.mark.parametrize(
    ("settings", "says", "needed"),
    [
        ({"dim": 32}, r"dim is 16 there, 32 here\n  cls_token: \(1, 1, 16\) there, \(1, 1, 32\)", {"dim": 16}),
        ({"depth": 3}, "depth is 2 there, 3 here", {"depth": 2}),
        ({"heads": 2}, "heads is 4 there, 2 here", {"heads": 4}),  # of the very same shapes
        ({"mlp_dim": None}, r"mlp_dim is 24 there, 64 here\n.*fc1\.weight: \(24, 16\) there, \(64, 16\)",
         {"mlp_dim": 24}),
        ({"patch_size": (4, 2)}, r"patch_size is 4 there, \[4, 2\] here", {"patch_size": 4}),
        ({"dim_head": 8}, "dim_head is 4 there, 8 here", {"dim_head": 4}),
        ({"qkv_bias": False}, "qkv_bias is True there, False here", {"qkv_bias": True}),
        ({"position": "none"}, "position is learned there, none here", {"position": "learned"}),
        ({"in_channels": 4}, "in_channels is 3 there, 4 here", {"in_channels": 3}),
        ({"dim": 32, "depth": 1}, r"dim is 16 there, 32 here; depth is 2 there, 1 here\n.*… and 14 more parameters",
         {"dim": 16, "depth": 2}),
    ],
)  # fmt: skip
def test_an_encoder_of_another_size(path, settings, says, needed):
    model = disturbed(mv.ViT(**SMALL | settings))
    before = model.state_dict()
    with pytest.raises(MisfitError, match=rf"(?s)a\.npz cannot start this model: {says}") as caught:
        init_from(model, path)
    assert caught.value.settings == needed
    told = ", ".join(f"{key}={value!r}" for key, value in needed.items())
    assert caught.value.remedy == f"make the model with the checkpoint's {told}"
    init_from(mv.ViT(**SMALL | settings | needed), path)  # which then does
    after = model.state_dict()
    assert after.keys() == before.keys() and all((after[n] == before[n]).all() for n in before)


def test_a_rectangular_patch_is_quoted_for_the_shell(tmp_path):
    path = saved(tmp_path / "a.npz", mv.ViT(**SMALL | {"patch_size": (4, 2)}))
    with pytest.raises(MisfitError, match=r"with the checkpoint's patch_size=\(4, 2\)") as caught:
        init_from(mv.ViT(**SMALL), path)
    assert assignments(caught.value.settings) == "--set 'model.patch_size=[4, 2]'"
    several = assignments({"dim": 16, "qkv_bias": True, "position": "learned"})
    assert several == "--set model.dim=16 --set model.qkv_bias=true --set model.position=learned"


@pytest.mark.parametrize(
    "config",
    [
        {"image_size": 16}, {"image_size": "big"}, {"patch_size": 0}, {"heads": 0}, {"heads": None}, {"dim": "x"},
        {"dim": None}, {"mlp_dim": []}, {"in_channels": {}}, {"pool": 7, "dim": 1e300}, {"image_size": [12, 8, 4]},
    ],
)  # fmt: skip
def test_settings_that_are_not_the_arrays_own(tmp_path, config):
    trained = mv.ViT(**SMALL)
    path, model = saved(tmp_path / "a.npz", trained, config=trained.config | config), disturbed(mv.ViT(**SMALL))
    before = model.state_dict()
    with pytest.raises(CheckpointError):
        init_from(model, path)
    assert all((a == before[n]).all() for n, a in model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["pos_embed", "patch_embed.proj.weight", "cls_token", "blocks.1.norm1.bias", "norm.bias"]
)
@pytest.mark.parametrize("array", [None, np.zeros(3, np.float32), np.zeros((2, 1, 2, 1), np.float32)])
def test_arrays_that_are_not_the_settings_own(tmp_path, trained, name, array):
    state = {f"model/{n}": a for n, a in trained.state_dict().items() if n != name or array is not None}
    if array is not None:
        state[f"model/{name}"] = array
    path = tmp_path / "a.npz"
    save_checkpoint(path, state, {"model": trained.config})
    model = disturbed(mv.ViT(**SMALL))
    before = model.state_dict()
    with pytest.raises(CheckpointError, match=f"settings are not those of its arrays: .* asks for {name} "):
        init_from(model, path)
    assert all((a == before[n]).all() for n, a in model.state_dict().items())


def test_a_checkpoint_that_does_not_say_what_it_holds(tmp_path, trained):
    path = tmp_path / "a.npz"
    save_checkpoint(path, {"model/head.bias": np.zeros(3)}, {})
    for use in (lambda: init_from(trained, path), lambda: model_config(path), lambda: read_model(path)):
        with pytest.raises(CheckpointError, match="does not say which model"):
            use()


# ---- the whole flow --------------------------------------------------------------------------------------------------


def stripes(n, size, key):
    """Return images (N, 1, size, size) of stripes in one of 4 directions, and which (N,): what position has to tell."""
    labels = (uniform(mv.Key(key, 1), (n,)) * 4).astype(np.int64)
    angle, phase = labels * np.pi / 4, uniform(mv.Key(key, 2), (n,)) * 2 * np.pi
    y, x = np.meshgrid(*[(np.arange(size) + 0.5) / size] * 2, indexing="ij")
    waves = np.sin(12 * (np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y) + phase[:, None, None])
    return (waves + normal(mv.Key(key, 3), waves.shape))[:, None].astype(np.float32), labels


def accuracy(model, size):
    x, labels = stripes(400, size, key=1000 + size)
    return (mv.predict_logits(model, x).argmax(-1) == labels).mean()


def fit(model, opt, size, steps, ema=None):
    step = mv.TrainStep(model, opt, clip_norm=1.0)
    for t in range(steps):
        step(*stripes(64, size, key=t))
        if ema is not None:
            ema.update()


def test_fine_tuning_at_another_size_starts_ahead(tmp_path):
    config = {"image_size": 16, "patch_size": 4, "in_channels": 1, "num_classes": 4, "dim": 24, "depth": 2, "heads": 2}
    model = mv.ViT(**config)
    opt = AdamW(model.named_parameters(), lr=3e-3)
    ema = EMA(opt.store, 0.95)
    fit(model, opt, 16, 200, ema)
    path = saved(tmp_path / "a.npz", model, **ema.state_dict())
    assert accuracy(read_model(path)[0], 16) > 0.9
    assert load_checkpoint(path).under("ema").keys() == dict(model.named_parameters()).keys()
    reached = []
    for start in (path, None):
        fine = mv.ViT(**config | {"image_size": 24})
        if start:
            init_from(fine, start)
        scales = mv.optim.layer_scales(fine.named_parameters(), 0.75)
        fit(fine, SGD(fine.named_parameters(), lr=0.03, lr_scales=scales), 24, 15)
        reached.append(accuracy(fine, 24))
    assert reached[0] > 0.85 and reached[1] < 0.6, reached
