"""A ViT's options: against timm's numbers, against a ViT written out in NumPy, and against their own derivatives."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops, study
from minivit.backend import normal, tile
from minivit.errors import CheckpointError, ConfigError, MinivitError, MisfitError, ShapeError
from minivit.measure.costs import layer_costs, model_costs
from minivit.models import build, model_outline
from minivit.models.encoder import ENCODERS
from minivit.nn.refined import selection
from minivit.train import capture
from minivit.train.distill import Student, distillation
from minivit.train.optim import AdamW, Muon
from minivit.weights.native import load_model
from minivit.weights.transfer import init_from
from tests import strict

GOLDENS = Path(__file__).parent / "goldens" / "options_timm.npz"
SMALL: dict[str, Any] = {
    "image_size": (12, 8), "patch_size": 4, "in_channels": 2, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2,
    "mlp_dim": 12,
}  # fmt: skip
IMAGES = normal(mv.Key(4), (3, 2, 12, 8))

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "map": {"pool": "map"},
    "mean beside a class token and registers": {"pool": "mean", "class_token": True, "registers": 2},
    "norm after the mean": {"pool": "mean", "fc_norm": True, "class_token": True},
    "logits of patches beside a register": {"pool": "none", "registers": 1, "fc_norm": True},
    "distilled": {"distilled": True, "registers": 1},
    "learned 2-D": {"position": "learned_2d", "registers": 1},
    "learned 2-D, shared": {"position": "learned_2d", "position_at": "shared", "no_embed_class": True},
    "positions in every layer": {"position_at": "layers", "registers": 1, "no_embed_class": True},
    "shared positions": {"position_at": "shared", "pool": "mean"},
    "relative": {"position": "relative", "registers": 1},
    "relative, shared, no token beside": {"position": "relative", "position_at": "shared", "pool": "mean"},
    "sincos 1-D": {"position": "sincos_1d"},
    "sincos 2-D in every layer": {"position": "sincos_2d", "position_at": "layers"},
    "patches only": {"no_embed_class": True, "distilled": True},
    "post-norm": {"block": "post", "layer_scale": 0.5},
    "residual post-norm": {"block": "res_post"},
    "parallel": {"block": "parallel", "layer_scale": 0.5, "mlp": "swiglu"},
    "RMSNorm": {"norm": "rms", "pool": "mean", "fc_norm": True},
    "SwiGLU": {"mlp": "swiglu"},
    "LayerScale": {"layer_scale": 0.5, "head": "mlp"},
    "qk-norm": {"qk_norm": True, "dim_head": 3},
    "LSA": {"lsa": True},
    "all of the attention": {"lsa": True, "qk_norm": True, "norm": "rms", "position": "relative", "qkv_bias": False},
}


def disturbed(model: Any, scale: float = 0.3) -> Any:
    """Give every parameter a random part: nothing is neutral then."""
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * scale
    return model


def small(dtype: Any = np.float64, **settings: Any) -> Any:
    return disturbed(mv.ViT(**SMALL | settings)).to(dtype)


def relative(a: Any, b: Any) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---- against timm ----------------------------------------------------------------------------------------------------

TIMM: dict[str, dict[str, Any]] = {
    "layer_scale": {"layer_scale": 0.1},
    "qk_norm": {"qk_norm": True},
    "registers": {"registers": 2},
    "registers_apart": {"registers": 2, "no_embed_class": True},
    "avg": {"pool": "mean", "class_token": True, "fc_norm": True},
    "avg_norm_first": {"pool": "mean"},
    "map": {"pool": "map"},
    "distilled": {"distilled": True},
    "swiglu": {"mlp": "swiglu", "mlp_dim": 6},
    "rms": {"norm": "rms", "qk_norm": True},
    "res_post": {"block": "res_post"},
    "parallel": {"block": "parallel", "layer_scale": 0.1},
    "relative": {"position": "relative"},
    "relative_shared": {"position": "relative", "position_at": "shared"},
}


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDENS, allow_pickle=False) as file:
        return dict(file)


@pytest.mark.parametrize("case", TIMM)
def test_logits_and_gradients_are_timms(goldens, case):
    model = mv.ViT(**SMALL | TIMM[case]).to(np.float64)
    of = {name.partition("/")[2]: value for name, value in goldens.items() if name.partition("/")[0] == case}
    shapes, own = {name: p.shape for name, p in model.named_parameters()}, dict(model.named_parameters())
    assert sorted(of["names"]) == sorted(shapes)
    ends = np.cumsum([math.prod(shapes[name]) for name in of["names"]])[:-1]
    parts = lambda flat: {n: a.reshape(shapes[n]) for n, a in zip(of["names"], np.split(flat, ends), strict=True)}
    model.load_state_dict(parts(of["weights"]))
    logits = model(of["images"].astype(np.float64))
    assert relative(logits.numpy(), of["logits"]) < 1e-10
    ops.cross_entropy(logits, of["labels"]).backward()
    for name, g in parts(of["grads"]).items():
        found = own[name].grad
        if case == "parallel" and "gamma" in name:  # timm has one for the sum of both
            found = own[name.replace("ls2", "ls1")].grad + own[name.replace("ls1", "ls2")].grad
        # a bias of the keys has no gradient but rounding
        assert np.abs(found - g).max() <= 1e-9 * np.abs(g).max() + 1e-14 * name.endswith("k_norm.bias"), name


# ---- against a ViT written out ---------------------------------------------------------------------------------------


def positions_of(w: dict[str, np.ndarray], s: Any, prefix: int) -> Any:
    """Return the positions (T, D) that are added at the input, 0 where nothing is."""
    (rows, columns), dim = s.grid, s.dim
    places = [(y, x) for y in range(rows) for x in range(columns)]
    first = 0 if s.no_embed_class else prefix
    if s.position == "learned":
        table = w["pos_embed"][0]
    elif s.position == "learned_2d":
        halves = [np.concatenate([w["pos_embed.columns"][x], w["pos_embed.rows"][y]]) for y, x in places]
        table = np.array([*(w["pos_embed.prefix"][0] if first else []), *halves])
    elif s.position == "sincos_1d":
        angle = lambda t, i: t / 10000 ** (2 * (i // 2) / dim)
        number = lambda t, i: math.cos(angle(t, i)) if i % 2 else math.sin(angle(t, i))
        table = np.array([[number(t, i) for i in range(dim)] for t in range(first + len(places))])
    elif s.position == "sincos_2d":
        waves = [10000 ** -(k / (dim // 4 - 1)) for k in range(dim // 4)]
        row = lambda y, x: [f(a * v) for a in (x, y) for f in (math.sin, math.cos) for v in waves]
        table = np.array([row(y, x) for y, x in places])
    else:
        return 0.0
    return np.concatenate([np.zeros((prefix + len(places) - len(table), dim)), table])


def bias_of(table: np.ndarray, grid: tuple[int, int], prefix: int) -> np.ndarray:
    """Return the bias (H, T, T) of relative positions, way by way."""
    rows, columns = grid
    tokens = prefix + rows * columns
    out = np.zeros((table.shape[1], tokens, tokens))
    for i in range(tokens):
        for j in range(tokens):
            if min(i, j) < prefix:  # BEiT's: to a patch, from a patch, between two tokens beside
                out[:, i, j] = table[-1 if max(i, j) < prefix else -3 if i < prefix else -2]
                continue
            (y, x), (v, u) = divmod(i - prefix, columns), divmod(j - prefix, columns)
            out[:, i, j] = table[(y - v + rows - 1) * (2 * columns - 1) + x - u + columns - 1]
    return out


def reference(model: Any, images: np.ndarray) -> np.ndarray:
    """Return the logits of a model in float64, from its settings and numbers alone."""
    s, w = model.settings, {name: a.astype(np.float64) for name, a in model.state_dict().items()}
    erf = np.vectorize(math.erf)
    silu, gelu = lambda x: x / (1 + np.exp(-x)), lambda x: x * (1 + erf(x / 2**0.5)) / 2

    def lin(name: str, x: Any) -> Any:
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(name: str, x: Any) -> Any:
        x = x if s.norm == "rms" else x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + s.norm_eps) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def mlp(name: str, x: Any, kind: str) -> Any:
        h = lin(f"{name}.fc1", x)
        half = h.shape[-1] // 2
        return lin(f"{name}.fc2", silu(h[..., :half]) * h[..., half:] if kind == "swiglu" else gelu(h))

    def softmax(x: Any) -> Any:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def attention(at: str, x: Any) -> Any:  # x (T, D)
        d = s.dim_head or s.dim // s.heads
        q, k, v = lin(f"{at}.attn.qkv", x).reshape(len(x), 3, s.heads, d).transpose(1, 2, 0, 3)  # (H, T, d)
        if s.qk_norm:
            q, k = norm(f"{at}.attn.q_norm", q), norm(f"{at}.attn.k_norm", k)
        scores = q @ k.transpose(0, 2, 1)
        scores *= np.exp(w[f"{at}.attn.temperature"])[:, None, None] if s.lsa else d**-0.5
        if s.position == "relative":
            own, name = f"{at}.attn.rel_pos", "relative_position_bias_table"
            table = w[f"shared_rel_pos.{name}" if s.position_at == "shared" else f"{own}.{name}"]
            scores = scores + bias_of(table, s.grid, prefix)
        if s.lsa:
            scores = np.where(np.eye(len(x), dtype=bool), -np.inf, scores)
        return lin(f"{at}.attn.proj", (softmax(scores) @ v).transpose(1, 0, 2).reshape(len(x), -1))

    def block(at: str, x: Any) -> Any:
        one, two = w.get(f"{at}.ls1.gamma", 1.0), w.get(f"{at}.ls2.gamma", 1.0)
        n1, n2 = (lambda x: norm(f"{at}.norm1", x)), (lambda x: norm(f"{at}.norm2", x))
        if s.block == "parallel":
            return x + one * attention(at, n1(x)) + two * mlp(f"{at}.mlp", n1(x), s.mlp)
        if s.block == "post":
            x = n1(x + one * attention(at, x))
            return n2(x + two * mlp(f"{at}.mlp", x, s.mlp))
        if s.block == "res_post":
            x = x + one * n1(attention(at, x))
            return x + two * n2(mlp(f"{at}.mlp", x, s.mlp))
        x = x + one * attention(at, n1(x))
        return x + two * mlp(f"{at}.mlp", n2(x), s.mlp)

    beside = [w[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in w]
    prefix = sum(map(len, beside))
    logits = []
    for image in images:
        flat = [image[:, y : y + 4, x : x + 4].ravel() for y in range(0, 12, 4) for x in range(0, 8, 4)]
        patches = np.array(flat) @ w["patch_embed.proj.weight"].reshape(s.dim, -1).T + w["patch_embed.proj.bias"]
        table = positions_of(w, s, prefix)
        x = np.concatenate([*beside, patches]) + table
        for i in range(s.depth):
            if i and s.position_at in ("layers", "shared"):
                own = w.get(f"blocks.{i}.pos_embed")
                x = x + (table if own is None else np.pad(own[0], ((len(x) - own.shape[1], 0), (0, 0))))
            x = block(f"blocks.{i}", x)
        x = x if s.fc_norm else norm("norm", x)
        if s.distilled:
            logits.append((lin("head", x[0]) + lin("head_dist", x[1])) / 2)
            continue
        x = x[0] if s.pool == "cls" else x[prefix:]
        if s.pool == "mean":
            x = x.mean(axis=0)
        if s.pool == "map":
            q = lin("attn_pool.q", w["attn_pool.latent"][0]).reshape(s.heads, 1, -1)
            k, v = lin("attn_pool.kv", x).reshape(len(x), 2, s.heads, -1).transpose(1, 2, 0, 3)
            p = softmax(q @ k.transpose(0, 2, 1) / k.shape[-1] ** 0.5)
            x = lin("attn_pool.proj", (p @ v).reshape(-1))
            x = x + mlp("attn_pool.mlp", norm("attn_pool.norm", x), "mlp")
        x = norm("fc_norm", x) if s.fc_norm else x
        logits.append(lin("head", np.tanh(lin("pre_logits", x)) if s.head == "mlp" else x))
    return np.array(logits)


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_is_what_its_formula_says(case):
    """Logits, every gradient by a complex step, and a trace that gives the same numbers and adds up."""
    model = small(**OPTIONS[case]).eval()
    logits = model(IMAGES).numpy()
    # sines are made in float32, and then the rest agrees to that
    assert relative(logits, reference(model, IMAGES)) < (1e-6 if "sincos" in case else 1e-12)
    report = mv.check_module(model, IMAGES[:2], order=1)
    assert report.worst.method == "complex" and report.worst.error <= 1e-12
    assert len(report.checks) == len(list(model.parameters()))

    trace = model.trace(IMAGES)
    assert relative(trace.logits.numpy(), logits) < 1e-12
    assert trace.prefix == model.prefix == trace.tokens[0].shape[1] - 6
    for i, p in enumerate(trace.attention):
        np.testing.assert_allclose(p.numpy().sum(-1), 1.0, rtol=1e-12)
        placed = 0.0 if trace.placed[i] is None else trace.placed[i].numpy()
        whole = trace.tokens[i].numpy() + placed + trace.attended[i].numpy() + trace.mlp[i].numpy()
        np.testing.assert_allclose(whole, trace.tokens[i + 1].numpy(), atol=1e-12)
    assert all(np.abs(g.numpy()).max() > 1e-9 for g in mv.grad(trace.logits[..., 1].sum(), trace.attention))


# ---- what combines ---------------------------------------------------------------------------------------------------

COMBINED: dict[str, dict[str, Any]] = {
    "registers, 2-D, LayerScale, post-norm": {"registers": 2, "position": "learned_2d", "layer_scale": 0.5,
                                              "block": "post", "position_at": "layers"},
    "relative, LSA, map, parallel": {"position": "relative", "lsa": True, "pool": "map", "block": "parallel",
                                     "position_at": "shared"},
    "patch dropout, distilled, SwiGLU, RMSNorm": {"patch_drop": 0.4, "distilled": True, "mlp": "swiglu", "norm": "rms",
                                                  "qk_norm": True, "lsa": True},
}  # fmt: skip
DROPS = {"dropout": 0.2, "attention_dropout": 0.2, "embed_dropout": 0.1, "drop_path": 0.3}


@pytest.mark.parametrize("case", COMBINED)
def test_masks_dropout_and_recomputing(case):
    """A mask acts in the plain forward as in the trace; blocks run again to the bit; all of it in training mode."""
    mask = np.zeros((small(**COMBINED[case]).num_tokens,) * 2, bool)
    mask[:, -1], mask[-1, -1] = True, False
    found = []
    for again in (False, True):
        model = small(np.float32, **COMBINED[case], **DROPS, recompute=again)
        with mv.random_key(mv.Key(5, row=3)):
            model(IMAGES.astype(np.float32), mask).sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    model = small(**COMBINED[case]).eval()
    trace = model.trace(IMAGES, mask)
    assert relative(trace.logits.numpy(), model(IMAGES, mask).numpy()) < 1e-12
    assert relative(model(IMAGES, mask).numpy(), model(IMAGES).numpy()) > 1e-4
    assert not trace.attention[0].numpy()[:, :, :-1, -1].any()


@pytest.mark.parametrize("case", COMBINED)
def test_an_option_trains_saves_and_loads(case, tmp_path):
    model = mv.ViT(**SMALL | COMBINED[case] | DROPS)
    step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), threads=2, micro_batch=4)
    images, labels = IMAGES.astype(np.float32), np.arange(3)
    losses = [step(images, labels) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]
    mv.save(model, tmp_path / "a.npz")
    again = load_model(tmp_path / "a.npz")
    assert again.config == model.config
    np.testing.assert_array_equal(again(images).data, model.eval()(images).data)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert np.array_equal(copied(images).data, again(images).data)
        assert len(list(copied.parameters())) == len(list(model.parameters()))  # what is shared stays shared
    Muon(model.named_parameters(), lr=1e-3)


@pytest.mark.parametrize("case", OPTIONS)
def test_half_precision_and_costs(case):
    """A model in float16 computes in float16; outlines tell the costs of the real thing."""
    settings = SMALL | OPTIONS[case]
    half = mv.ViT(**settings).to(np.float16).eval()
    assert half(IMAGES.astype(np.float16)).dtype == np.float16
    assert np.isfinite(half(IMAGES.astype(np.float16)).numpy()).all()
    model, outlined = mv.ViT(**settings), model_outline("vit", settings)
    assert {n: p.shape for n, p in outlined.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    costs = model_costs(outlined).total
    real = layer_costs(model, IMAGES[:1].astype(np.float32))
    assert costs.parameters == model.num_parameters()
    assert costs.flops == sum(row.flops for row in real.values())
    assert costs.kept == sum(row.kept for row in real.values())
    assert build("vit", settings).config == model.config


# ---- captured on a GPU -----------------------------------------------------------------------------------------------

any_cupy = strict.any_cupy


@pytest.fixture
def plain(monkeypatch):
    """Let the plain operations run: the stand-in for kernels takes a hundred times as long."""
    monkeypatch.setattr(tile.Kernel, "ready", lambda *args, **constants: False)


def steps(device: str, precision: str, settings: dict[str, Any], kind: str | None = None) -> tuple[Any, list[float]]:
    """Return a step on a device, and the losses of six batches; with ``kind`` a teacher stands by."""
    model = disturbed(mv.ViT(**SMALL | settings | DROPS), 0.1).to(device)
    trained, loss = model, ops.cross_entropy
    if kind is not None:
        teacher = small(np.float32).to(device)
        trained, loss = Student(model, teacher, [1.5, 0.5], [0.1, 0.2]), partial(distillation, kind=kind)
    step = mv.TrainStep(trained, AdamW(model.named_parameters(), lr=1e-2), loss, precision=precision, clip_norm=1.0)
    images, labels = np.concatenate([IMAGES, IMAGES[::-1]]).astype(np.float32), np.arange(6) % 3
    return step, [step(images, labels) for _ in range(3)]


@pytest.mark.parametrize(
    ("case", "precision", "kind"),
    [
        ("registers, 2-D, LayerScale, post-norm", "bfloat16", "soft"),
        ("relative, LSA, map, parallel", "float32", None),
        ("patch dropout, distilled, SwiGLU, RMSNorm", "float32", "hard"),
    ],
)
def test_an_option_is_recorded_on_a_gpu_to_the_bit(any_cupy, plain, monkeypatch, case, precision, kind):
    step, recorded = steps("cuda", precision, COMBINED[case], kind)
    assert step.why_launched == "" and len(step.underway.capture.nodes()) == 1
    monkeypatch.setattr(capture, "SHAPES", 0)
    _, launched = steps("cuda", precision, COMBINED[case], kind)
    assert recorded == launched
    if precision == "float32":
        assert recorded == pytest.approx(steps("cpu", precision, COMBINED[case], kind)[1], rel=1e-3)


# ---- one by one ------------------------------------------------------------------------------------------------------


def test_patch_dropout_leaves_so_many_patches_of_every_image():
    x = normal(mv.Key(1), (64, 9, 2))  # a prefix of 3, and 6 patches
    s = selection(x, 3, 0.4, mv.Key(2))
    assert s.shape == (64, 3 + 4, 9) and set(np.unique(s)) == {0.0, 1.0}
    assert (s.sum(axis=2) == 1).all() and (s.sum(axis=1) <= 1).all()  # each row picks one token, and none twice
    np.testing.assert_array_equal(s[:, :3, :3], np.broadcast_to(np.eye(3), (64, 3, 3)))
    kept = s[:, :, 3:].sum(axis=1)  # (64, 6)
    assert kept.mean(axis=0).min() > 0.45 and kept.mean(axis=0).max() < 0.88  # of 2/3
    assert len({tuple(row) for row in kept}) > 10
    np.testing.assert_array_equal(selection(x[5:9], 3, 0.4, mv.Key(2, row=5)), s[5:9])  # an image's place draws
    assert selection(x, 3, 0.99, mv.Key(2)).shape[1] == 4  # one at least
    model = small(patch_drop=0.5)
    seen: list[Any] = []
    model.blocks[0].norm1.forward = lambda x, plain=model.blocks[0].norm1.forward: seen.append(x.shape) or plain(x)
    model(IMAGES), model.eval()(IMAGES)
    assert seen == [(3, 4, 8), (3, 7, 8)]


def test_the_diagonal_is_masked_besides_what_is_masked():
    model = small(lsa=True, depth=1).eval()
    mask = np.zeros((7, 7), bool)
    mask[:, 2] = True
    for given, allowed in ((None, 6), (mask, 5)):
        trace = model.trace(IMAGES, given)
        (p,) = (x.numpy() for x in trace.attention)
        assert not np.diagonal(p, axis1=2, axis2=3).any() and ((p > 0).sum(axis=-1) >= allowed).all()
    assert study.entropy(study.trace_model(model, IMAGES)).largest == pytest.approx(math.log2(6))


CONTRADICTIONS = [
    ({"pool": "cls", "class_token": False}, "there is none"),
    ({"distilled": True, "pool": "mean", "class_token": True}, "pool is 'mean'"),
    ({"distilled": True, "head": "mlp"}, "two linear heads"),
    ({"distilled": True, "fc_norm": True}, "two tokens"),
    ({"position": "none", "position_at": "layers"}, "nothing to add"),
    ({"position": "relative", "position_at": "input"}, "a bias of the attention"),
    ({"position": "relative", "no_embed_class": True}, "adds nothing to tokens"),
    ({"position": "learned_2d", "dim": 9, "heads": 3}, "dim is 9"),
    ({"position": "sincos_2d", "dim": 10, "heads": 2}, "dim 10"),
    ({"position": "sincos_1d", "dim": 9, "heads": 3}, "dim 9"),
    ({"patch_drop": 0.1, "position_at": "shared"}, "patch_drop"),
    ({"patch_drop": 0.1, "pool": "none"}, "patch_drop"),
    ({"mlp": "swiglu", "activation": "relu"}, "activation is 'relu'"),
    ({"position": "learned_2d", "weight_init": "mimetic"}, "mimetic"),
    ({"position": "sincos_1d", "image_size": 1 << 15, "patch_size": 1}, "too many"),
    ({"layer_scale": 0.0}, "layer_scale is 0"),
    ({"layer_scale": "small"}, "layer_scale is 'small'"),
    ({"registers": -1}, "registers is -1"),
    ({"pool": "map", "heads": 3, "dim_head": 2}, "3 heads"),
    ({"class_token": 1}, "class_token is 1"),
    ({"transformer": "nobody's"}, "no encoder is registered so"),
    ({"transformer": 3}, "transformer is 3"),
]


@pytest.mark.parametrize(("settings", "says"), CONTRADICTIONS, ids=lambda x: "")
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ConfigError, match=says) as found:
        mv.ViT(**SMALL | settings)
    assert found.value.remedy


def test_a_parameter_belongs_to_the_first_layer_that_has_it_and_no_token_decays():
    model = mv.ViT(
        **SMALL | {"position_at": "shared", "registers": 2, "distilled": True, "layer_scale": 0.1, "lsa": True}
    )
    layers = {name: p.layer for name, p in model.named_parameters()}
    assert layers["pos_embed"] == layers["reg_token"] == layers["dist_token"] == 0
    assert layers["blocks.1.ls1.gamma"] == 2 and layers["head_dist.weight"] == 3
    kept = {name for name, p in model.named_parameters() if not p.decays and "bias" not in name and "norm" not in name}
    assert kept == {"cls_token", "dist_token", "reg_token", "pos_embed"} | {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("ls1.gamma", "ls2.gamma", "attn.temperature")
    }
    relative = mv.ViT(**SMALL | {"position": "relative"}).blocks[1].attn.rel_pos.relative_position_bias_table
    assert relative.layer == 2 and not relative.decays and relative.shape == (5 * 3 + 3, 2)


def test_fixed_positions_are_no_parameters_and_move_with_the_model():
    model = mv.ViT(**SMALL | {"position": "sincos_2d", "position_at": "layers"})
    assert not [name for name in model.state_dict() if "pos" in name]
    assert model.pos_embed.dtype == np.float32
    assert {c.dtype for c in model.to(np.float64).constants()} == {np.dtype(np.float64)}
    assert model(IMAGES).dtype == np.float64


# ---- somebody else's encoder -----------------------------------------------------------------------------------------


class Averaging(mv.nn.Module):
    """Every token goes half the way to the mean of all, and through a linear layer."""

    def __init__(self, dim: int) -> None:
        self.mix = mv.nn.Linear(dim, dim)

    def forward(self, x: Any, mask: Any = None) -> Any:
        return x + self.mix((x + ops.mean(x, axis=1, keepdims=True)) * 0.5)


@pytest.fixture
def encoders():
    before = dict(ENCODERS)
    yield ENCODERS
    ENCODERS.clear()
    ENCODERS.update(before)


def test_any_module_of_the_right_shapes_is_an_encoder(encoders, tmp_path):
    @mv.register_encoder("averaging")
    def averaging(s: Any) -> list[Any]:
        return [Averaging(s.dim) for _ in range(s.depth)]

    model = small(transformer="averaging", recompute=True)
    assert [n for n in model.state_dict() if "blocks" in n] == [
        f"blocks.{i}.module.mix.{part}" for i in (0, 1) for part in ("weight", "bias")
    ]
    assert mv.check_module(model.eval(), IMAGES).worst.error <= 1e-12
    step = mv.TrainStep(model.to(np.float32), AdamW(model.named_parameters(), lr=1e-2))
    images = IMAGES.astype(np.float32)
    assert step(images, np.arange(3)) > step(images, np.arange(3))
    mv.save(model, tmp_path / "a.npz")
    assert np.array_equal(load_model(tmp_path / "a.npz")(images).data, model.eval()(images).data)
    assert model_costs(model).total.parameters == model.num_parameters()
    with pytest.raises(ConfigError, match="Averaging cannot be traced"):
        model.trace(images)
    with pytest.raises(ConfigError, match="two encoders 'averaging'"):
        mv.register_encoder("averaging")(lambda s: Averaging(s.dim))
    encoders.clear()  # as in a program that does not import the file that registers it
    with pytest.raises(CheckpointError, match="transformer is 'averaging', and no encoder") as found:
        load_model(tmp_path / "a.npz")
    assert "averaging" in str(found.value)


def test_a_module_itself_is_an_encoder_that_no_checkpoint_can_hold(encoders, tmp_path):
    model = small(transformer=Averaging(8))
    assert model(IMAGES).shape == (3, 3) and model.blocks[0].module.mix.weight.dtype == np.float64
    with pytest.raises(ConfigError, match="transformer"):
        mv.save(model, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="transformer"):
        study.untrained_like(model)
    trainer = mv.Trainer(model, AdamW(model.named_parameters(), lr=0.1), folder=tmp_path / "run")
    data = mv.data.Dataset(np.zeros((6, 2, 12, 8), np.uint8), np.arange(6) % 3, ("a", "b", "c"), "x")
    with pytest.raises(ConfigError, match="transformer"):  # before the first epoch, and not after it
        trainer.fit(mv.data.Loader(data, 3, mv.Key(0)))
    block = mv.nn.EncoderBlock(8, 2, 12)
    traced = small(transformer=block).trace(IMAGES)  # the ViT's own kind of block is looked into
    assert len(traced.attention) == 1
    shrinking = type("Shrinking", (mv.nn.Module,), {"forward": lambda self, x: x[:, 1:]})
    with pytest.raises(ShapeError, match="Shrinking was given tokens"):
        small(transformer=shrinking())(IMAGES)
    encoders["none"] = lambda s: "no module"
    with pytest.raises(ConfigError, match="let it return"):
        small(transformer="none")
    for settings in ({"position": "relative"}, {"position_at": "layers"}, {"weight_init": "mimetic"}):
        with pytest.raises(ConfigError, match="takes the place"):
            small(transformer=Averaging(8), **settings)


# ---- started from another one ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "shape"),
    [
        ({}, "pos_embed", (1, 25, 8)),
        ({"registers": 2}, "pos_embed", (1, 27, 8)),
        ({"registers": 2, "no_embed_class": True}, "pos_embed", (1, 24, 8)),
        ({"position_at": "layers", "distilled": True}, "blocks.1.pos_embed", (1, 26, 8)),
        ({"position": "learned_2d", "registers": 1}, "pos_embed.rows", (6, 4)),
        ({"position": "relative"}, "blocks.1.attn.rel_pos.relative_position_bias_table", (11 * 7 + 3, 2)),
        ({"position": "sincos_2d"}, "", ()),
    ],
)
def test_positions_on_another_grid_of_patches(settings, name, shape, tmp_path):
    old = small(np.float32, **settings)
    mv.save(old, tmp_path / "a.npz")
    new = mv.ViT(**SMALL | settings | {"image_size": (24, 16)})
    notes = init_from(new, tmp_path / "a.npz")
    state = new.state_dict()
    if name:
        assert state[name].shape == shape and "pos_embed: 3 × 2 patches → 6 × 4" in notes
        table = old.state_dict()[name]
        beside = {"rows": 0, "table": 3}.get(name[-5:].strip("._"), 0)
        ways = slice(None, -beside or None)
        # a mean of what was there, so of about its size; what is beside the patches is as it was
        assert 0.3 < state[name][..., ways, :].std() / table[..., ways, :].std() < 1.5
        if beside:
            np.testing.assert_array_equal(state[name][-3:], table[-3:])
        elif "rows" not in name:
            prefix = 0 if settings.get("no_embed_class") else old.prefix
            np.testing.assert_array_equal(state[name][:, :prefix], table[:, :prefix])
    again = mv.ViT(**SMALL | settings | {"seed": 5})
    init_from(again, tmp_path / "a.npz")
    same = {n: np.array_equal(a, old.state_dict()[n]) for n, a in again.state_dict().items() if "head" not in n}
    assert all(same.values()), same


def test_what_another_model_may_have_beside_the_patches(tmp_path):
    old = small(np.float32, registers=1)
    mv.save(old, tmp_path / "a.npz")
    new = mv.ViT(**SMALL | {"registers": 2, "distilled": True, "seed": 7})
    own, there = new.state_dict(), old.state_dict()
    notes = init_from(new, tmp_path / "a.npz")
    assert {"dist_token: new", "reg_token: new"} <= set(notes) and new.head_dist.weight.data.any() == np.False_
    pos = new.state_dict()["pos_embed"]  # class, distillation, two registers, six patches
    np.testing.assert_array_equal(pos[:, :1], there["pos_embed"][:, :1])
    np.testing.assert_array_equal(pos[:, 1:4], own["pos_embed"][:, 1:4])
    np.testing.assert_array_equal(pos[:, 4:], there["pos_embed"][:, 2:])
    for other in ({"block": "post"}, {"qk_norm": True}, {"mlp": "swiglu"}, {"position_at": "shared"}, {"norm": "rms"}):
        with pytest.raises(MisfitError, match=next(iter(other))):
            init_from(mv.ViT(**SMALL | other), tmp_path / "a.npz")


# ---- studied ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", OPTIONS)
def test_the_study_of_attention_knows_an_option(case):
    """A logit is the sum of its terms, or it is said why it is not; the lens ends in the model's own logits."""
    model = small(**OPTIONS[case])
    trace = study.trace_model(model, IMAGES)
    no_sum = {"map", "post-norm", "residual post-norm", "LayerScale"}  # the last has a hidden layer in its head
    if case in no_sum:
        with pytest.raises(ConfigError, match="sum"):
            study.direct_attribution(trace, 1)
    else:
        found = study.direct_attribution(trace, 1)
        np.testing.assert_allclose(found.total, found.logit, rtol=1e-10, atol=1e-12)
        in_layers = [name for name, _ in found.terms() if "positions" in name]
        assert in_layers == (
            ["layer 1, positions", "layer 2, positions"] if any(x is not None for x in trace.placed) else []
        )
    np.testing.assert_allclose(study.logit_lens(trace)[-1], trace.logits.numpy(), rtol=1e-10)
    gradient = study.attention_gradient(trace, 1)
    for seen in (study.relevance(trace, gradient), study.rollout(trace)):
        assert study.patch_map(trace, seen).shape == (3, 3, 2)
    assert study.legrad(trace, study.lens_gradient(trace, 1)).shape == (3, 3, 2)
    assert study.attention_distance(trace).shape == study.head_importance(trace, gradient).shape == (2, 2)
    assert study.untrained_like(model).config == model.config
    if "relative" in case or case == "all of the attention":
        with pytest.raises(MinivitError, match="no learned positions"):
            study.position_similarity(model)
    else:
        similar = study.position_similarity(model).reshape(6, 6)
        np.testing.assert_allclose(np.diagonal(similar), 1.0)


def test_a_change_of_attention_is_seen_through_every_block():
    model = small(**COMBINED["relative, LSA, map, parallel"]).eval()
    even = model.trace(IMAGES, change=lambda i, p: p if i else np.full(p.shape, 1 / p.shape[-1]))
    assert np.ptp(even.attention[0].numpy()) == 0.0
    assert relative(even.logits.numpy(), model(IMAGES).numpy()) > 1e-4
