"""Learning rates by parameter, against updates written out parameter by parameter; spans, order and state."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal
from minivit.errors import ConfigError
from minivit.train import muon, parameters
from minivit.train.optim import SGD, AdamW, Muon, layer_scales, orthogonalized

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2}
KINDS = {
    "adamw": lambda model, **more: AdamW(model.named_parameters(), lr=0.01, weight_decay=0.3, **more),
    "muon": lambda model, **more: Muon(model.named_parameters(), lr=0.01, weight_decay=0.3, **more),
    "sgd": lambda model, **more: SGD(model.named_parameters(), lr=0.01, weight_decay=0.3, **more),
}


def make(kind, decay=0.5, dtype=np.float64):
    model = mv.ViT(**SMALL).to(dtype)
    scales = None if decay is None else layer_scales(model.named_parameters(), decay)
    return model, KINDS[kind](model, lr_scales=scales)


def is_decayed(name, p):
    """Tell whether weight decay should apply to a ViT's parameter: not to biases, norms, class token and positions."""
    return p.ndim > 1 and name not in ("cls_token", "pos_embed")


def gradient(opt, step):
    """Return a gradient by name, whatever the order in the optimizer."""
    return {n: normal(mv.Key(step, len(n)), p.shape) for n, p in zip(opt.names, opt.parameters, strict=True)}


def give(opt, gradients):
    for name, view in zip(opt.names, opt.store.split(opt.store.grad), strict=True):
        view[...] = gradients[name]


def with_values_near_1(u):
    """Return the matrix ``u`` with each singular value put through Muon's polynomial: an SVD in place of products."""
    left, values, right = np.linalg.svd(u, full_matrices=False)
    values = values / (np.linalg.norm(u) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left * values @ right


def by_hand(kind, name, p, grads, lr, weight_decay):
    """Return a parameter after updates by ``grads``."""
    p, m, v = p.copy(), 0.0, 0.0
    matrices = 3 if name.endswith("attn.qkv.weight") else int(name.startswith("blocks.") and p.ndim == 2)
    for t, g in enumerate(grads, start=1):
        if kind == "muon" and matrices:
            m = 0.95 * m + 0.05 * g
            pieces = np.split(0.95 * m + 0.05 * g, matrices)
            step = np.concatenate([0.2 * max(u.shape) ** 0.5 * with_values_near_1(u) for u in pieces])
            p = (1 - lr * weight_decay) * p - lr * step
        elif kind == "sgd":
            m = 0.9 * m + g + weight_decay * p
            p = p - lr * m
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            p = (1 - lr * weight_decay) * p - lr * m_hat / (np.sqrt(v_hat) + 1e-8)
    return p


def test_the_scales_fall_from_the_head_to_the_patches():
    scales = layer_scales(mv.ViT(**SMALL, head="mlp").named_parameters(), 0.5)
    of = {name.rpartition(".")[0] or name: scale for name, scale in scales.items()}
    assert of.pop("patch_embed.proj") == of.pop("cls_token") == of.pop("pos_embed") == 0.125
    assert of.pop("head") == of.pop("pre_logits") == of.pop("norm") == 1.0
    blocks = {name.split(".")[1]: scale for name, scale in of.items()}
    assert blocks == {"0": 0.25, "1": 0.5} and all(name.startswith("blocks.") for name in of)


@pytest.mark.parametrize("chunk", [5, 1 << 16])
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_moves_by_its_own_rate(kind, chunk, monkeypatch):
    monkeypatch.setattr(parameters, "CHUNK", chunk)
    model, opt = make(kind)
    before, scales = model.state_dict(), layer_scales(model.named_parameters(), 0.5)
    gradients = [gradient(opt, t) for t in range(4)]
    for t, g in enumerate(gradients):
        give(opt, g)
        edges = sorted(
            {0, 1 + t, opt.store.values.size // 3, opt.store.values.size}
        )  # shares as threads have them: any
        opt.update(list(itertools.pairwise(edges)))
    for name, p in model.named_parameters():
        weight_decay = 0.3 if is_decayed(name, p) else 0.0
        expected = by_hand(kind, name, before[name], [g[name] for g in gradients], 0.01 * scales[name], weight_decay)
        np.testing.assert_allclose(p.data, expected, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_steps_and_missing_gradients(kind):
    model, opt = make(kind)
    before, gradients = model.state_dict(), gradient(opt, 1)
    some = opt.names[::2]
    for name, p in model.named_parameters():
        p.grad = gradients[name] if name in some else None
    opt.step()
    scales = layer_scales(model.named_parameters(), 0.5)
    for name, p in model.named_parameters():
        weight_decay = 0.3 if is_decayed(name, p) else 0.0
        expected = by_hand(kind, name, before[name], [gradients[name]], 0.01 * scales[name], weight_decay)
        np.testing.assert_allclose(p.data, expected if name in some else before[name], rtol=1e-12, err_msg=name)


def test_the_groups_are_as_few_as_can_be_and_cover_everything():
    model, opt = make("adamw")
    assert [g.start for g in opt.groups] == [0, *[g.stop for g in opt.groups[:-1]]]
    assert opt.groups[-1].stop == opt.store.values.size == model.num_parameters()
    assert [(g.decayed, g.scale) for g in opt.groups] == [(d, s) for d in (True, False) for s in (1, 0.5, 0.25, 0.125)]
    for name, p, (start, stop) in zip(opt.names, opt.parameters, opt.store.spans, strict=True):
        (group,) = [g for g in opt.groups if g.start <= start and stop <= g.stop]
        assert group.decayed == is_decayed(name, p)


def test_without_scales_the_decayed_ones_are_first_and_the_order_stays():
    model, opt = make("adamw", decay=None)
    names = [n for n, _ in model.named_parameters()]
    decayed = [n for n, p in model.named_parameters() if is_decayed(n, p)]
    assert opt.names == decayed + [n for n in names if n not in decayed]
    assert [(g.decayed, g.scale) for g in opt.groups] == [(True, 1.0), (False, 1.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_one_change_no_bit(kind):
    states = []
    for decay in (None, 1.0):
        model, opt = make(kind, decay, np.float32)
        for t in range(3):
            give(opt, gradient(opt, t))
            opt.update()
        states.append(model.state_dict())
    assert all((states[0][n] == states[1][n]).all() for n in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_by_name_whatever_the_order(kind):
    (a, opt_a), (b, opt_b) = make(kind, 0.5), make(kind, None)
    assert opt_a.names != opt_b.names
    give(opt_a, gradient(opt_a, 1))
    opt_a.update()
    state = opt_a.state_dict()
    opt_b.load_state_dict(state)
    again = opt_b.state_dict()
    assert state.keys() == again.keys() and opt_b.steps == 1
    assert all((state[k] == again[k]).all() for k in state)
    b.load_state_dict(a.state_dict())
    c, opt_c = make(kind, 0.5)  # and an optimizer like the first goes on as the first does
    c.load_state_dict(b.state_dict())
    opt_c.load_state_dict(again)
    for opt in (opt_a, opt_c):
        give(opt, gradient(opt, 2))
        opt.update()
    assert (opt_a.store.values == opt_c.store.values).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_threads_share_the_update_of_scaled_groups(kind, clip_norm):
    images, labels = normal(mv.Key(1), (6, 1, 8, 8)), np.arange(6) % 3
    flats = []
    for threads in (1, 3):
        model, opt = make(kind)
        step = mv.TrainStep(model, opt, threads=threads, micro_batch=2, clip_norm=clip_norm)
        step.team.spread = lambda work, length: [work(a, b) for a, b in ((0, 100), (100, 777), (777, length))]
        for _ in range(3):
            step(images, labels)
        flats.append(opt.store.values)
    np.testing.assert_allclose(flats[0], flats[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (3, 7), (9, 4), (2, 5, 3), (3, 1, 8)])
def test_orthogonalized_keeps_the_singular_vectors_and_brings_the_values_near_1(shape):
    x = normal(mv.Key(3), shape).astype(np.float64) * 1e3
    y = orthogonalized(x)
    assert y.shape == shape
    for before, after in zip(x.reshape(-1, *shape[-2:]), y.reshape(-1, *shape[-2:]), strict=True):
        np.testing.assert_allclose(after, with_values_near_1(before), rtol=0, atol=1e-12)
        values = np.linalg.svd(after, compute_uv=False)
        assert values.min() > 0.65 and values.max() < 1.25
    assert orthogonalized(x.astype(np.float32)).dtype == np.float32
    assert not orthogonalized(np.zeros(shape)).any()


def test_muon_takes_the_matrices_of_the_blocks_and_no_others():
    _, opt = make("muon")
    names = [
        n for n, (start, _) in zip(opt.names, opt.store.spans, strict=True) if start in {m[0] for m in opt.matrices}
    ]
    of_block = ["attn.proj.weight", "attn.qkv.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    assert sorted(names) == [f"blocks.{i}.{name}" for i in (0, 1) for name in of_block]
    assert {shape for _, _, shape in opt.matrices} == {(3, 8, 8), (1, 8, 8), (1, 32, 8), (1, 8, 32)}
    give(opt, gradient(opt, 1))
    opt.update()
    size = {n: float(np.abs(a).max()) for n, a in zip(opt.names, opt.store.split(opt.state["v"]), strict=True)}
    assert {n for n, most in size.items() if most == 0.0} == set(names)  # no second moments: Adam left them alone


@pytest.mark.parametrize(
    ("name", "settings", "sees_images"),
    [
        ("cct_2_3x2_32", {"image_size": 8, "dim": 8, "depth": 1}, "patch_embed.convs.0.conv.weight"),
        ("resnet_digits", {}, "conv.weight"),
        ("vit_digits", {"tokenizer": "conv_stem", "patch_size": 4, "dim": 16, "depth": 1, "heads": 1},
         "patch_embed.convs.0.conv.weight"),
        ("hybrid_cifar", {"image_size": 8, "dim": 8, "depth": 1, "heads": 1, "width": 32},
         "patch_embed.backbone.stem.conv.weight"),
    ],
)  # fmt: skip
def test_muon_takes_the_filters_of_all_convolutions_but_the_first(name, settings, sees_images):
    model = mv.create_model(name, **settings).to(np.float64)
    opt = muon.Muon(model.named_parameters(), lr=0.01, weight_decay=0.0)
    taken = {a: shape for a, _, shape in opt.matrices}
    spans = dict(zip(opt.names, opt.store.spans, strict=True))
    filters = {n: p for n, p in model.named_parameters() if p.ndim == 4 and "conv" in n and n != sees_images}
    assert len(filters) > 0 and spans[sees_images][0] not in taken
    before, g = model.state_dict(), gradient(opt, 1)
    give(opt, g)
    opt.update()
    for n, p in filters.items():
        rows = p.shape[0], p[0].size  # one row is a filter, and the image's gradient through it a sum over the row
        assert taken[spans[n][0]] == (1, *rows)
        u = 0.05 * g[n].reshape(rows)  # b is zero before: u = 0.95 · 0.05 · g + 0.05 · g
        moved = 0.01 * 0.2 * max(rows) ** 0.5 * with_values_near_1(0.95 * u + u)
        np.testing.assert_allclose(p.data, before[n] - moved.reshape(p.shape), rtol=1e-11, atol=1e-13)


def test_matrices_in_batches_move_as_each_would_alone(monkeypatch):
    """By the formula, one matrix at a time; and to the bit however many are in a batch, and after a resume."""
    ends = []
    for chunk in (1, 200, 1 << 16):
        monkeypatch.setattr(muon, "CHUNK", chunk)
        model = mv.ViT(**{**SMALL, "depth": 5}).to(np.float64)
        opt = muon.Muon(model.named_parameters(), lr=0.01, weight_decay=0.3)
        sizes = [len(batch) for batch in muon.batches(opt.matrices, chunk, opt.store.values.size)]
        assert sorted(sizes) == {1: [1] * 20, 200: [1] * 15 + [2, 3], 1 << 16: [5, 5, 5]}[chunk]
        before, gradients = model.state_dict(), [gradient(opt, t) for t in range(3)]
        for g in gradients:
            give(opt, g)
            opt.update()
            again = muon.Muon(model.named_parameters(), lr=0.01, weight_decay=0.3)
            again.load_state_dict(opt.state_dict())
            opt = again
        ends.append(model.state_dict())
    for name, p in ends[-1].items():
        assert all((end[name] == p).all() for end in ends), name
        expected = by_hand("muon", name, before[name], [g[name] for g in gradients], 0.01, 0.3 * is_decayed(name, p))
        np.testing.assert_allclose(p, expected, rtol=1e-12, atol=1e-15, err_msg=name)


def test_a_batch_is_a_view_of_matrices_at_even_distances():
    flat = np.arange(40)
    of = lambda *starts: [muon.Matrices(start, start + 6, (1, 2, 3)) for start in starts]
    for expected in ([[0, 10, 20, 30]], [[3, 13, 23], [34]], [[0], [34]], [[4, 24]], [[1, 9], [16]]):
        found = muon.batches(of(*itertools.chain(*expected)), 24, flat.size)
        assert [[one.start for one in batch] for batch in found] == expected
        for batch in found:
            view = muon.laid_over(flat, batch)
            assert np.shares_memory(view, flat) and view.shape == (len(batch), 1, 2, 3)
            for one, matrices in zip(batch, view, strict=True):
                assert (matrices.ravel() == flat[one.start : one.stop]).all()
    [[joined]] = muon.batches([muon.Matrices(0, 12, (2, 2, 3)), *of(12)], 24, flat.size)
    assert joined == (0, 18, (3, 2, 3))
    assert max(len(batch) for batch in muon.batches(of(0, 10, 20, 30), 12, flat.size)) == 2


def test_a_decay_of_zero_trains_head_and_norm_only():
    model, opt = make("sgd", 0.0)
    before = model.state_dict()
    give(opt, gradient(opt, 1))
    opt.update()
    changed = {n for n, a in model.state_dict().items() if (a != before[n]).any()}
    assert changed == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_bad_scales():
    model = mv.ViT(**SMALL)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="layer decay"):
            layer_scales(model.named_parameters(), decay)
    for scale in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="finite and at least 0"):
            AdamW(model.named_parameters(), lr_scales={"norm.bias": scale})
    with pytest.raises(ConfigError, match=r"unknown parameters: norm\.bais"):
        AdamW(model.named_parameters(), lr_scales={"norm.bais": 0.5})
    model.norm.bias.requires_grad = False  # a frozen one may have a scale
    assert "norm.bias" not in AdamW(model.named_parameters(), lr_scales={"norm.bias": 0.5}).names
