"""What a parameter says of itself, and the flat store: layout, groups, views, spans, copies."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal
from minivit.errors import ConfigError, GraphError
from minivit.nn import Parameter
from minivit.nn.module import set_layer
from minivit.train import parameters
from minivit.train.ema import EMA
from minivit.train.optim import SGD, AdamW, FlatParameters, Muon, layer_scales
from minivit.train.parameters import chunks, overlaps

SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 3, "heads": 2}


# ---- what a parameter says -------------------------------------------------------------------------------------------


def rules(name: str, p: Parameter, depth: int) -> tuple[bool, int, int]:
    """Return (decays, layer, matrices) of a ViT's parameter, by its name and shape."""
    parts = name.split(".")
    decays = p.ndim > 1 and parts[-1] not in ("cls_token", "pos_embed")
    if parts[0] == "blocks":
        layer = int(parts[1]) + 1
    else:
        layer = 0 if parts[0] in ("patch_embed", "cls_token", "pos_embed") else depth + 1
    matrices = 0
    if parts[0] == "blocks" and p.ndim == 2:
        matrices = 3 if name.endswith("qkv.weight") else 1
    return decays, layer, matrices


@pytest.mark.parametrize(
    "settings",
    [{}, {"pool": "mean"}, {"position": "none"}, {"head": "mlp", "qkv_bias": False}, {"depth": 1, "dim_head": 3}],
    ids=str,
)
@pytest.mark.parametrize("again", [False, True], ids=["made", "reset_head"])
def test_a_vits_parameters_say_what_the_rules_by_name_said(settings, again):
    model = mv.ViT(**{**SMALL, **settings})
    if again:
        model.reset_head(7)
    depth = model.config["depth"]
    said = {n: (p.decays, p.layer, p.matrices) for n, p in model.named_parameters()}
    assert said == {n: rules(n, p, depth) for n, p in model.named_parameters()}
    above = {n: depth + 1 - rules(n, p, depth)[1] for n, p in model.named_parameters()}
    assert layer_scales(model.named_parameters(), 0.75) == {n: 0.75**k for n, k in above.items()}


def test_a_plain_parameter_decays_if_it_has_several_axes_and_is_of_no_layer_and_no_matrix():
    for shape, decays in (((3,), False), ((3, 2), True), ((1, 1, 4), True), ((), False)):
        p = Parameter(np.zeros(shape))
        assert (p.decays, p.layer, p.matrices) == (decays, None, 0)
    told = Parameter(np.zeros((6, 2)), decays=False, layer=4, matrices=3)
    assert (told.decays, told.layer, told.matrices) == (False, 4, 3)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_what_a_parameter_says(copied):
    p = Parameter(np.arange(6.0).reshape(3, 2), decays=False, layer=4, matrices=3)
    p.requires_grad = False
    q = copied(p)
    assert type(q) is Parameter and (q.decays, q.layer, q.matrices, q.requires_grad) == (False, 4, 3, False)
    np.testing.assert_array_equal(q.data, p.data)
    model = copied(mv.ViT(**SMALL))
    for name, p in model.to(np.float64).named_parameters():
        assert (p.decays, p.layer, p.matrices) == rules(name, p, 3) and p.dtype == np.float64


class Own(mv.nn.Module):
    """A user's model: plain parameters and layers, a matrix among them that is none of a ViT's."""

    def __init__(self):
        with mv.random_key(mv.Key(1)):
            self.first = mv.nn.Linear(4, 6)
            self.mixing = Parameter(normal(mv.Key(2), (6, 6)))
            self.last = mv.nn.Linear(6, 3)
        self.to(np.float64)

    def forward(self, x):
        return self.last(mv.ops.tanh(self.first(x) @ self.mixing))


def trained(opt_of):
    """Return a model's state after two steps of the optimizer made for it."""
    model = Own()
    step = mv.TrainStep(model, opt_of(model), threads=1)
    for t in range(2):
        step(normal(mv.Key(3, t), (5, 4)), np.arange(5) % 3)
    return model.state_dict()


def same(a, b):
    return {n for n in a if (a[n] == b[n]).all()}


def test_a_users_own_model_trains_by_muon_as_it_says():
    rest = {"first.weight", "first.bias", "last.weight", "last.bias"}
    adam = trained(lambda model: AdamW(model.named_parameters(), lr=0.01))
    assert same(trained(lambda model: Muon(model.named_parameters(), lr=0.01)), adam) == {*rest, "mixing"}

    def stacked(count):
        def opt(model):
            model.mixing.matrices = count
            return Muon(model.named_parameters(), lr=0.01)

        return opt

    one, two = trained(stacked(1)), trained(stacked(2))
    assert (one["mixing"] != adam["mixing"]).all() and (one["mixing"] != two["mixing"]).all()
    for count in (4, -1):
        with pytest.raises(ConfigError, match=rf"mixing of shape \(6, 6\) cannot be {count} matrices"):
            trained(stacked(count))


def test_a_users_own_model_has_rates_by_layer_as_it_says():
    model = Own()
    with pytest.raises(ConfigError, match=r"no parameter says which it belongs to\n  → set parameter\.layer"):
        layer_scales(model.named_parameters(), 0.5)
    set_layer(0, model.first)
    set_layer(2, model.mixing, None)
    expected = {"first.weight": 0.25, "first.bias": 0.25, "mixing": 1.0, "last.weight": 1.0, "last.bias": 1.0}
    assert layer_scales(model.named_parameters(), 0.5) == expected

    def opt(model):
        set_layer(0, model.first)
        set_layer(1, model.last)
        return SGD(model.named_parameters(), lr=0.01, lr_scales=layer_scales(model.named_parameters(), 0.0))

    assert same(trained(opt), Own().state_dict()) == {"first.weight", "first.bias"}


def test_what_decays_is_asked_of_the_parameter():
    model = Own()
    model.mixing.decays, model.last.bias.decays = False, True
    before = model.state_dict()
    AdamW(model.named_parameters(), lr=0.1, weight_decay=0.5).update()  # by gradients of zero
    for name, value in model.state_dict().items():
        factor = 0.95 if name in ("first.weight", "last.weight", "last.bias") else 1.0
        np.testing.assert_allclose(value, before[name] * factor, rtol=1e-12, err_msg=name)


# ---- the flat store --------------------------------------------------------------------------------------------------


def three():
    shapes = {"a": (2, 3), "b": (4,), "c": (5, 1)}
    return {n: Parameter(normal(mv.Key(i), shape)) for i, (n, shape) in enumerate(shapes.items())}


def test_parameters_become_views_in_the_order_of_their_groups():
    named = three()
    before = {n: p.data.copy() for n, p in named.items()}
    store = FlatParameters(named.items(), {"a": 0.5})
    assert store.names == ["c", "a", "b"] and store.spans == [(0, 5), (5, 11), (11, 15)]
    assert [tuple(g) for g in store.groups] == [(0, 5, True, 1.0), (5, 11, True, 0.5), (11, 15, False, 1.0)]
    assert store.values.size == store.grad.size == 15 and not store.grad.any()
    for name, p in named.items():
        np.testing.assert_array_equal(p.data, before[name])
        assert np.shares_memory(p.data, store.values)
    store.values[...] = np.arange(15)
    np.testing.assert_array_equal(named["b"].data, [11, 12, 13, 14])
    views = store.by_name(store.grad)
    views["c"][...] = 1.0
    assert list(views) == store.names and store.grad.tolist() == [1.0] * 5 + [0.0] * 10


def test_gradients_are_gathered_of_those_that_have_one():
    named = three()
    store = FlatParameters(named.items())
    assert store.names == ["a", "c", "b"]
    with pytest.raises(GraphError, match="no parameter has a gradient"):
        store.gather()
    named["a"].grad, named["b"].grad = np.full((2, 3), 2.0), np.full(4, 3.0)
    assert store.gather() == [(0, 6), (11, 15)]
    assert store.grad.tolist() == [2.0] * 6 + [0.0] * 5 + [3.0] * 4
    named["b"].requires_grad = False
    assert store.gather() == [(0, 6)]


def test_spans_are_joined_where_they_touch():
    store = FlatParameters(three().items())
    assert store.spans_of([1, 0]) == [(0, 11)]
    assert store.spans_of({0, 2}) == [(0, 6), (11, 15)]
    assert store.spans_of([]) == []


def test_on_a_gpu_parameters_are_aligned_and_a_group_is_one_stretch_all_the_same(strict_cupy):
    named = {n: Parameter(strict_cupy.asarray(p.data)) for n, p in three().items()}
    store = FlatParameters(named.items(), {"a": 0.5})
    assert store.names == ["c", "a", "b"] and store.spans == [(0, 5), (64, 70), (128, 132)]
    assert [tuple(g) for g in store.groups] == [(0, 64, True, 1.0), (64, 128, True, 0.5), (128, 192, False, 1.0)]
    assert store.values.size == store.grad.size == 192
    assert store.spans_of([0, 1, 2]) == [(0, 192)] and store.spans_of([2, 0]) == [(0, 64), (128, 192)]
    assert [store.learned_before(g.stop) for g in store.groups] == [5, 11, 15]
    for name, p in three().items():
        assert (named[name].numpy() == p.data).all()
    named["a"].grad, named["c"].grad = strict_cupy.ones((2, 3)), strict_cupy.ones((5, 1))
    assert store.gather() == [(0, 128)] and float(store.grad.sum()) == 11.0


def test_matrices_and_what_lies_between_them_are_one_stretch(strict_cupy):
    named = [(n, Parameter(strict_cupy.ones((3, 5)))) for n in "abc"]
    for _, p in named:
        p.matrices = 1
    muon, pieces = Muon(named), []
    muon.update_piece = lambda piece, group: pieces.append(piece)
    muon.update()
    assert pieces == []  # nothing but matrices, and zeros between them


def test_an_update_is_counted_and_says_what_it_changes():
    named = three()
    store = FlatParameters(named.items())
    store.begin_update([(0, 6)])
    assert (store.steps, store.updated) == (1, [(0, 6)])
    store.begin_update()
    assert (store.steps, store.updated) == (2, [(0, 15)])
    named["c"].data = named["c"].data.copy()
    with pytest.raises(GraphError, match=r"c\.data was replaced"):
        store.begin_update([(0, 6)])
    assert (store.steps, store.updated) == (2, [(0, 15)])
    with pytest.raises(GraphError, match=r"c\.data was replaced"):
        copy.deepcopy(store)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_store_has_views_of_its_own(copied):
    store = FlatParameters(three().items(), {"a": 0.5})
    twin = copied(store)
    twin.begin_update()
    twin.values[...] = 7.0
    assert all((p.data == 7.0).all() for p in twin.parameters) and not (store.values == 7.0).any()
    assert (twin.names, twin.spans, twin.groups, twin.steps) == (store.names, store.spans, store.groups, 1)


def test_a_store_serves_an_optimizer_and_an_average_and_is_nobodys():
    states = []
    for given in (False, True):
        model = mv.ViT(**SMALL)
        scales = layer_scales(model.named_parameters(), 0.5)
        if given:
            store = FlatParameters(model.named_parameters(), scales)
            opt, ema = Muon(store, lr=0.01), EMA(store, 0.9)
            assert opt.store is ema.store is store
        else:
            opt = Muon(model.named_parameters(), lr=0.01, lr_scales=scales)
            ema = EMA(opt.store, 0.9)
        for t in range(3):
            opt.store.grad[...] = normal(mv.Key(1, t), opt.store.grad.shape)
            opt.update()
            ema.update()
        assert opt.steps == opt.store.steps == 3
        states.append(model.state_dict() | opt.state_dict() | {f"ema/{n}": a for n, a in ema.state_dict().items()})
    assert states[0].keys() == states[1].keys() and same(*states) == states[0].keys()
    with pytest.raises(ConfigError, match="give them to FlatParameters"):
        AdamW(store, lr_scales={"norm.bias": 0.5})


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_plain_tensor_can_be_trained(kind):
    """As an image that is changed until a model sees something else in it."""
    x = mv.tensor(np.ones((2, 3)), requires_grad=True)
    opt = kind([("x", x)], lr=0.1, weight_decay=0.5)
    (x * x).sum().backward()
    opt.step()
    np.testing.assert_allclose(x.numpy(), 0.95 - 0.1, rtol=1e-6)  # decayed, then a step of the rate's length


def test_rates_are_checked_before_anything_is_laid_out():
    p = Parameter(np.ones(2))
    before = p.data
    for wrong in ({"lr": -1.0}, {"weight_decay": math.nan}, {"eps": 0.0}, {"betas": 0.9}, {"betas": (0.9, 1.0)}):
        with pytest.raises(ConfigError):
            AdamW([("p", p)], **wrong)
        assert p.data is before


def test_what_is_no_parameter_is_refused():
    with pytest.raises(ConfigError, match=r"got a str, not a pair \(name, parameter\)"):
        FlatParameters(["norm.bias"])
    with pytest.raises(ConfigError, match=r"'w' is a ndarray, not a Parameter\n  → make it one: mv\.nn\.Parameter"):
        FlatParameters([("w", np.ones(3))])
    with pytest.raises(ConfigError, match="got a str, not a pair"):
        layer_scales(["norm.bias"], 0.5)
    with pytest.raises(ConfigError, match="several kinds"):
        FlatParameters([("a", Parameter(np.ones(2))), ("b", Parameter(np.ones(2, np.float32)))])


def test_overlaps_and_chunks(monkeypatch):
    assert overlaps([(0, 5), (7, 9)], [(3, 8), (8, 20)]) == [(3, 5), (7, 8), (8, 9)]
    assert overlaps([(0, 5)], [(5, 6)]) == []
    monkeypatch.setattr(parameters, "CHUNK", 4)
    assert list(chunks(np.zeros(20), [(1, 10), (12, 13)])) == [(1, 5), (5, 9), (9, 10), (12, 13)]
