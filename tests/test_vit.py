"""The model against PyTorch's numbers, against the literature's parameter counts, and against its own derivative."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import normal, uniform
from minivit.errors import CheckpointError, ConfigError, DTypeError, ShapeError

GOLDENS = Path(__file__).parent / "goldens" / "vit_small.npz"
SMALL = {
    "image_size": (12, 8), "patch_size": (4, 2), "dim": 16, "depth": 3, "heads": 4, "mlp_dim": 40, "num_classes": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


def golden_model(goldens, dtype=np.float64, **settings):
    model = mv.ViT(**{**SMALL, **settings}).to(dtype)
    model.load_state_dict({k.removeprefix("weight/"): v for k, v in goldens.items() if k.startswith("weight/")})
    return model


def disturbed(model, scale=0.1):
    """Give every parameter a random part: a fresh head of zeros hides the gradients of all that lies before it."""
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * scale
    return model


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# ---- against PyTorch -------------------------------------------------------------------------------------------------


def test_logits_equal_pytorchs(goldens):
    assert relative(golden_model(goldens)(goldens["images"]).numpy(), goldens["logits"]) < 1e-10


def test_masked_logits_equal_pytorchs(goldens):
    logits = golden_model(goldens)(goldens["images"], mask=goldens["mask"]).numpy()
    assert relative(logits, goldens["logits_masked"]) < 1e-10
    assert relative(logits, goldens["logits"]) > 1e-3


def test_tanh_gelu_logits_equal_pytorchs(goldens):
    logits = golden_model(goldens, activation="gelu_tanh")(goldens["images"]).numpy()
    assert relative(logits, goldens["logits_tanh_gelu"]) < 1e-10


def test_all_gradients_equal_pytorchs(goldens):
    model = golden_model(goldens)
    loss = ops.cross_entropy(model(goldens["images"]), goldens["labels"])
    assert abs(loss.item() - goldens["loss"]) < 1e-10
    loss.backward()
    for name, p in model.named_parameters():
        assert relative(p.grad, goldens[f"grad/{name}"]) < 1e-10, name


# ---- shape of things -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_tiny_patch16_224", 5_717_416),
        ("vit_tiny_patch16_384", 5_790_376),
        ("vit_small_patch16_224", 22_050_664),
        ("vit_small_patch32_224", 22_878_952),
        ("vit_base_patch16_224", 86_567_656),
        ("vit_base_patch8_224", 86_576_872),
        ("vit_base_patch32_384", 88_297_192),
        ("vit_large_patch16_224", 304_326_632),
        ("vit_large_patch32_384", 306_632_680),
        ("vit_huge_patch14_224", 632_045_800),
        ("vit_huge_patch14_518", 633_470_440),
    ],
)
def test_parameter_counts(name, count, monkeypatch):
    # the shapes are what is counted: random numbers for ViT-Huge would take half a minute
    monkeypatch.setattr("minivit.backend.uniform", lambda key, shape: np.zeros(shape, np.float32))
    monkeypatch.setattr("minivit.backend.normal", lambda key, shape: np.zeros(shape))
    assert mv.create_model(name).num_parameters() == count


def test_parameter_names_and_shapes_are_timms():
    model = mv.ViT(image_size=(12, 8), patch_size=(4, 2), dim=16, depth=1, heads=4, mlp_dim=40, num_classes=5)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 13, 16),
        "patch_embed.proj.weight": (16, 3, 4, 2),
        "patch_embed.proj.bias": (16,),
        "blocks.0.norm1.weight": (16,),
        "blocks.0.norm1.bias": (16,),
        "blocks.0.attn.qkv.weight": (48, 16),
        "blocks.0.attn.qkv.bias": (48,),
        "blocks.0.attn.proj.weight": (16, 16),
        "blocks.0.attn.proj.bias": (16,),
        "blocks.0.norm2.weight": (16,),
        "blocks.0.norm2.bias": (16,),
        "blocks.0.mlp.fc1.weight": (40, 16),
        "blocks.0.mlp.fc1.bias": (40,),
        "blocks.0.mlp.fc2.weight": (16, 40),
        "blocks.0.mlp.fc2.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (2, 5)),
        ({"pool": "mean"}, (2, 5)),
        ({"pool": "none"}, (2, 12, 5)),
        ({"head": "mlp"}, (2, 5)),
        ({"position": "none"}, (2, 5)),
        ({"dim_head": 7}, (2, 5)),
        ({"qkv_bias": False}, (2, 5)),
        ({"in_channels": 1}, (2, 5)),
        ({"activation": "silu"}, (2, 5)),
    ],
)
def test_every_setting_gives_logits_and_float32_gradients(settings, shape):
    model = disturbed(mv.ViT(**{**SMALL, "depth": 1, **settings}))
    images = uniform(mv.Key(1), (2, model.config["in_channels"], 12, 8))
    logits = model(images)
    assert logits.shape == shape
    assert logits.dtype == np.float32
    logits.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.dtype == np.float32, name


def test_features_and_attention_maps():
    model = disturbed(mv.ViT(**SMALL))
    images = uniform(mv.Key(1), (2, 3, 12, 8))
    assert model.features(images).shape == (2, 13, 16)
    maps = model.attention_maps(images)
    assert [m.shape for m in maps] == [(2, 4, 13, 13)] * 3
    for m in maps:
        np.testing.assert_allclose(m.numpy().sum(-1), 1.0, rtol=1e-5)  # over the keys, not the queries
    assert np.abs(maps[0].numpy().sum(-2) - 1.0).max() > 1e-3


def test_initialisation_is_the_reference_codes():
    model = mv.ViT(image_size=32, patch_size=4, dim=192, depth=2, heads=3)
    state = model.state_dict()
    assert not state["cls_token"].any()
    assert not state["head.weight"].any()
    assert abs(state["pos_embed"].std() - 0.02) < 0.001
    bound = (6 / (192 + 192)) ** 0.5  # each of q, k, v is a projection of its own
    assert 0.99 * bound < np.abs(state["blocks.0.attn.qkv.weight"]).max() <= bound
    assert abs(state["patch_embed.proj.weight"].std() - 48**-0.5) < 0.005
    assert 0 < np.abs(state["blocks.1.mlp.fc1.bias"]).max() < 1e-5
    assert not np.array_equal(state["blocks.0.mlp.fc1.weight"], state["blocks.1.mlp.fc1.weight"])
    assert (mv.ViT(**SMALL).state_dict()["pos_embed"] == mv.ViT(**SMALL).state_dict()["pos_embed"]).all()
    assert (mv.ViT(**SMALL).state_dict()["pos_embed"] != mv.ViT(**SMALL, seed=1).state_dict()["pos_embed"]).any()


def test_reset_head_is_zero_and_drops_the_hidden_layer():
    model = disturbed(mv.ViT(**SMALL, head="mlp"))
    model.reset_head(7)
    assert model.pre_logits is None
    assert not model.head.weight.data.any()
    assert model(uniform(mv.Key(1), (2, 3, 12, 8))).shape == (2, 7)
    assert mv.ViT(**model.config).state_dict().keys() == model.state_dict().keys()


def test_config_holds_every_setting_as_plain_values():
    sizes = {"image_size": np.int64(8), "patch_size": [4, np.int32(2)], "dim": np.int64(16), "heads": np.int64(4)}
    model = mv.ViT(**sizes, depth=1, drop_path=np.float32(0.5), seed=np.int64(1))
    assert [*model.config, "recompute"] == list(inspect.signature(mv.ViT).parameters)
    config = json.loads(json.dumps(model.config))
    assert config["image_size"] == 8 and config["patch_size"] == [4, 2] and config["drop_path"] == 0.5
    again = mv.ViT(**config)
    assert again.config == model.config
    for name, array in again.state_dict().items():
        np.testing.assert_array_equal(array, model.state_dict()[name])


def test_no_images_give_no_logits():
    none = np.zeros((0, 3, 12, 8), np.float32)
    for settings in ({}, {"pool": "mean"}, {"dim_head": 3}):
        model = mv.ViT(**SMALL, **settings)
        assert model(none).shape == (0, 5)
        with mv.first_order():
            assert model(none).shape == (0, 5)


def test_parameters_and_modules_in_lists_and_dicts():
    class Mixed(mv.nn.Module):
        def __init__(self) -> None:
            self.scales = [mv.nn.Parameter(np.ones(2)), None, (mv.nn.Parameter(np.ones(3)),)]
            self.heads = {"a": mv.nn.LayerNorm(2), "b": [mv.nn.Dropout(0.1)], "c": mv.nn.Parameter(np.ones(1))}
            self.again = self.scales[0]
            self.sizes = {"a": 1}

    module = Mixed()
    names = ["scales.0", "scales.2.0", "heads.c", "heads.a.weight", "heads.a.bias"]
    assert [name for name, _ in module.named_parameters()] == names
    assert [name for name, _ in module.named_modules()] == ["", "heads.a", "heads.b.0"]
    assert not module.eval().heads["b"][0].training
    state = {name: array + 1 for name, array in module.state_dict().items()}
    module.to(np.float32).load_state_dict(state)
    assert module.scales[0].data.tolist() == [2.0, 2.0] and module.scales[0].dtype == np.float32


# ---- what others got wrong -------------------------------------------------------------------------------------------


def test_attention_is_over_tokens():
    """Swapping two patches under swapped positions swaps nothing else: attention over heads would not notice tokens."""
    model = disturbed(mv.ViT(**SMALL, position="none")).to(np.float64)
    images = uniform(mv.Key(1), (1, 3, 12, 8)).astype(np.float64)
    swapped = images.copy()
    swapped[..., :4, :2], swapped[..., 8:, 6:] = images[..., 8:, 6:], images[..., :4, :2]
    a, b = model.features(images).numpy(), model.features(swapped).numpy()
    np.testing.assert_allclose(a[:, 0], b[:, 0], atol=1e-12)
    np.testing.assert_allclose(a[:, [1, 12]], b[:, [12, 1]], atol=1e-12)


def test_a_change_in_one_patch_reaches_every_token_and_a_mask_stops_it():
    model = disturbed(mv.ViT(**{**SMALL, "depth": 1})).to(np.float64)
    images = uniform(mv.Key(1), (1, 3, 12, 8)).astype(np.float64)
    changed = images.copy()
    changed[..., 8:, 6:] += 1.0  # the last patch
    moved = np.abs(model.features(changed).numpy() - model.features(images).numpy()).max(-1)[0]
    assert (moved > 1e-6).all()
    mask = np.zeros((13, 13), bool)
    mask[:-1, -1] = True
    moved = np.abs(model.features(changed, mask).numpy() - model.features(images, mask).numpy()).max(-1)[0]
    assert (moved[:-1] == 0).all()
    assert moved[-1] > 1e-6


def test_masks_for_each_image():
    model = disturbed(mv.ViT(**SMALL))
    images = uniform(mv.Key(1), (2, 3, 12, 8))
    mask = np.zeros((2, 13, 13), bool)
    mask[1, :, 3] = True
    both = model(images, mask=mask).numpy()
    np.testing.assert_allclose(both[0], model(images).numpy()[0], rtol=1e-5)
    np.testing.assert_allclose(both[1], model(images, mask=mask[1]).numpy()[1], rtol=1e-5)


def test_patches_are_contiguous_blocks_row_by_row():
    images = np.arange(2 * 3 * 12 * 8, dtype=np.float32).reshape(2, 3, 12, 8)
    patches = ops.patchify(images, (4, 2))
    assert patches.shape == (2, 12, 24)
    np.testing.assert_array_equal(patches[1, 5], images[1, :, 4:8, 2:4].reshape(-1))
    np.testing.assert_array_equal(ops.unpatchify(patches, (4, 2), (12, 8)), images)


def test_full_qkv_projection():
    """Every query feature depends on every input feature: per-head (block-diagonal) projections would not."""
    layer = mv.nn.MultiHeadAttention(8, 2).to(np.float64)
    x = mv.tensor(normal(mv.Key(0), (1, 3, 8)), requires_grad=True)
    (g,) = mv.grad(layer.qkv(x)[0, 1, 0], [x])  # one feature of one head's queries, for token 1
    assert (np.abs(g.numpy()[0, 1]) > 0).all()
    assert not g.numpy()[0, [0, 2]].any()


def test_class_token_and_positions_get_their_gradient_once():
    model = disturbed(mv.ViT(**{**SMALL, "depth": 1})).to(np.float64)
    images = uniform(mv.Key(1), (3, 3, 12, 8)).astype(np.float64)
    model(images).sum().backward()
    np.testing.assert_allclose(model.cls_token.grad[0, 0], model.pos_embed.grad[0, 0], rtol=1e-12)


@pytest.mark.parametrize("queries", [None, 1, 2])
@pytest.mark.parametrize(
    "drops", [{}, {"dropout": 0.5}, {"drop_path": 0.5}, {"dropout": 0.3, "drop_path": 0.3, "attention_dropout": 0.2}]
)
def test_a_residual_that_a_layer_adds_has_the_bits_of_one_added_after(drops, queries):
    block = mv.nn.EncoderBlock(8, 2, 16, **drops)

    def apart(x):
        rest = x if queries is None else x[:, :queries]
        y = rest + block.drop_path(block.attn(block.norm1(x), None, queries))
        return y + block.drop_path(block.mlp(block.norm2(y)))

    for training in (True, False):
        block.train(training)
        found = []
        for function in (lambda x: block(x, None, queries), apart):
            x = mv.tensor(normal(mv.Key(3), (5, 4, 8)).astype(np.float32), requires_grad=True)
            with mv.random_key(mv.Key(1)), mv.first_order():
                out = function(x)
            out.backward(normal(mv.Key(4), out.shape).astype(np.float32))
            found.append([out.data, x.grad, *(p.grad for p in block.parameters())])
            block.zero_grad()
        for a, b in zip(*found, strict=True):
            np.testing.assert_array_equal(a, b)


def test_dropout_acts_in_training_only():
    model = disturbed(mv.ViT(**SMALL, dropout=0.3, attention_dropout=0.2, embed_dropout=0.1, drop_path=0.2))
    images = uniform(mv.Key(1), (4, 3, 12, 8))
    with mv.random_key(mv.Key(1)):
        a = model(images).numpy()
    with mv.random_key(mv.Key(1)):
        b = model(images).numpy()
    with mv.random_key(mv.Key(2)):
        c = model(images).numpy()
    assert (a == b).all()
    assert (a != c).any()
    model.eval()
    assert (model(images).numpy() == model(images).numpy()).all()


# ---- every gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pool": "mean", "head": "mlp", "dim_head": 3, "activation": "gelu_tanh"}])
def test_complex_step_through_a_whole_vit(settings):
    """All parameters, orders 1 and 2, with a mask, in eval mode."""
    model = disturbed(mv.ViT(**{**SMALL, "depth": 2, **settings}).to(np.float64)).eval()
    mask = uniform(mv.Key(3), (model.num_tokens, model.num_tokens)) < 0.2
    images = normal(mv.Key(4), (2, 3, 12, 8))
    report = mv.check_module(model, images, mask, order=2)
    assert len(report.checks) == 2 * len(list(model.parameters())) + 1
    assert report.worst.method == "complex"
    assert report.worst.error <= 1e-12


def test_complex_step_with_every_dropout_on():
    model = disturbed(mv.ViT(**{**SMALL, "depth": 2}, dropout=0.2, attention_dropout=0.2, drop_path=0.3))
    model.to(np.float64)
    images = normal(mv.Key(4), (3, 3, 12, 8))
    plain = model.forward

    def forward(*args):
        with mv.random_key(mv.Key(5)):
            return plain(*args)

    model.forward = forward
    assert mv.check_module(model, images, order=1).worst.error <= 1e-12


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"image_size": 30}, ShapeError, "28 or 32"),
        ({"image_size": (32, 30)}, ShapeError, "width"),
        ({"patch_size": 0}, ShapeError, "patch"),
        ({"heads": 5}, ConfigError, "heads"),
        ({"pool": "max"}, ConfigError, "'cls', 'mean', 'none'"),
        ({"activation": "gellu"}, ConfigError, "did you mean 'gelu'"),
        ({"depth": 0}, ConfigError, "depth"),
        ({"num_classes": 0}, ConfigError, "num_classes"),
    ],
)
def test_bad_settings(settings, error, says):
    with pytest.raises(error, match=says):
        mv.ViT(**{"image_size": 32, "patch_size": 4, "dim": 16, "depth": 1, "heads": 4, **settings})


def test_unknown_model_and_setting():
    with pytest.raises(ConfigError, match="did you mean 'vit_tiny_patch16_224'"):
        mv.create_model("vit_tiny_patch16_225")
    with pytest.raises(ConfigError, match=r"unknown setting 'depht'\n  → did you mean 'depth'"):
        mv.create_model("vit_digits", depht=3)
    assert mv.list_models("vit_*_patch32_384") == [f"vit_{size}_patch32_384" for size in ("base", "large", "small")]


@pytest.mark.parametrize(
    ("images", "error", "says"),
    [
        (np.zeros((2, 3, 8, 12), np.float32), ShapeError, r"\(B, 3, 12, 8\)"),
        (np.zeros((2, 1, 12, 8), np.float32), ShapeError, "resize"),
        (np.zeros((3, 12, 8), np.float32), ShapeError, "batch"),
        (np.zeros((2, 3, 12, 8), np.uint8), DTypeError, "scale"),
        (np.zeros((2, 3, 12, 8), np.float64), DTypeError, "float64"),
    ],
)
def test_bad_images(images, error, says):
    with pytest.raises(error, match=says):
        mv.ViT(**SMALL)(images)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (np.zeros((12, 12), bool), ShapeError),
        (np.zeros((13, 13)), DTypeError),
        (np.zeros((3, 13, 13), bool), ShapeError),
    ],
)
def test_bad_masks(mask, error):
    with pytest.raises(error, match="attention mask"):
        mv.ViT(**SMALL)(np.zeros((2, 3, 12, 8), np.float32), mask=mask)


def test_state_that_does_not_fit():
    model = mv.ViT(**SMALL)
    before = model.state_dict()
    state = {**before, "head.weight": np.zeros((3, 16)), "surplus": np.zeros(1)}
    del state["norm.bias"]
    with pytest.raises(CheckpointError, match=r"head.weight: \(3, 16\)") as caught:
        model.load_state_dict(state)
    assert "norm.bias: missing" in str(caught.value)
    assert "surplus: not in the model" in str(caught.value)
    assert all((before[k] == v).all() for k, v in model.state_dict().items())
    del state["head.weight"]
    model.load_state_dict(state, strict=False)


def test_a_new_head_has_the_models_dtype():
    model = mv.ViT(**SMALL).to(np.float64)
    model.reset_head(3)
    assert model(np.zeros((1, 3, 12, 8))).dtype == np.float64


# ---- mimetic initial weights -----------------------------------------------------------------------------------------


def mimetic(**settings):
    return mv.ViT(16, 4, 3, 5, **{"dim": 48, "depth": 2, "heads": 3, "weight_init": "mimetic", **settings})


def test_mimetic_attention_starts_like_trained_attention():
    for block in mimetic().blocks:
        qkv, proj = (p.data.astype(np.float64) for p in (block.attn.qkv.weight, block.attn.proj.weight))
        q, k, v = qkv.reshape(3, 3, 16, 48)  # heads, numbers of a head, dim
        for head in range(3):  # each a best approximation of rank 16 of 0.7·Z + 0.7·I: its trace has a third and more
            assert np.linalg.matrix_rank(q[head].T @ k[head], tol=1e-4) == 16
            assert 0.7 / 3 < np.trace(q[head].T @ k[head]) / 48 < 0.7
        product = proj @ v.reshape(48, 48)  # of full rank: -0.4·I + 0.4·Z
        assert np.trace(product) / 48 == pytest.approx(-0.4, abs=0.03)
        rest = product + 0.4 * np.eye(48)
        assert rest.std() == pytest.approx(0.4 * 48**-0.5, rel=0.1)
        assert np.allclose(np.linalg.norm(proj, axis=0), np.linalg.norm(v.reshape(48, 48), axis=1), rtol=1e-4)


def test_mimetic_positions_are_sines_and_cosines_of_column_and_row():
    model, paper = mimetic(), mimetic(weight_init="paper")
    positions = model.pos_embed.data[0, 1:].reshape(4, 4, 4, 12)  # row, column, (sin x, cos x, sin y, cos y), wave
    waves = 10_000.0 ** -(np.arange(12) / 11)
    for row, column in [(0, 0), (1, 0), (0, 1), (3, 2)]:
        expected = [np.sin(column * waves), np.cos(column * waves), np.sin(row * waves), np.cos(row * waves)]
        np.testing.assert_allclose(positions[row, column], expected, atol=1e-6)
    assert np.array_equal(model.pos_embed.data[0, 0], paper.pos_embed.data[0, 0])  # the class token's is no place
    changed = {name for name, p in model.state_dict().items() if not np.array_equal(p, paper.state_dict()[name])}
    assert changed == {"pos_embed"} | {f"blocks.{i}.attn.{n}.weight" for i in range(2) for n in ("qkv", "proj")}


def test_mimetic_weights_follow_from_the_seed():
    same, other = mimetic(), mimetic(seed=1)
    for name, p in mimetic().state_dict().items():
        assert np.array_equal(p, same.state_dict()[name])
    assert not np.array_equal(same.blocks[0].attn.qkv.weight.data, other.blocks[0].attn.qkv.weight.data)
    assert mimetic(position="none", pool="mean").pos_embed is None


def test_mimetic_weights_refuse_sizes_that_they_cannot_have():
    with pytest.raises(ConfigError, match="cannot hold sines and cosines"):
        mimetic(dim=50, heads=2)
    with pytest.raises(ConfigError, match="64 numbers in all, more than dim 48"):
        mimetic(heads=2, dim_head=32)
