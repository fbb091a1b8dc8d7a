"""Blocks that are computed again in the backward pass: the same numbers, in less memory."""

import tracemalloc

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import normal
from minivit.errors import GraphError
from minivit.nn.module import mode
from minivit.nn.recompute import recompute
from minivit.train.optim import AdamW
from tests.test_vit import SMALL, disturbed

DROPS = {"dropout": 0.2, "attention_dropout": 0.2, "embed_dropout": 0.1, "drop_path": 0.3}


def gradients(model, images, first_order):
    with mv.first_order() if first_order else mv.random_key(mv.Key(9)), mv.random_key(mv.Key(5, row=3)):
        loss = ops.cross_entropy(model(images), np.arange(len(images)) % 5)
    loss.backward()
    return {"loss": loss.data} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_equal_bits_with_every_dropout(pool, first_order):
    images = normal(mv.Key(1), (4, 3, 12, 8)).astype(np.float32)
    settings = {**SMALL, **DROPS, "pool": pool}
    plain = gradients(disturbed(mv.ViT(**settings)), images, first_order)
    again = gradients(disturbed(mv.ViT(**settings, recompute=True)), images, first_order)
    assert plain.keys() == again.keys()
    for name, g in plain.items():
        np.testing.assert_array_equal(again[name], g, err_msg=name)


def test_equal_bits_in_the_step():
    images = normal(mv.Key(1), (7, 3, 12, 8)).astype(np.float32)
    states = []
    for again in (False, True):
        model = disturbed(mv.ViT(**SMALL, **DROPS, recompute=again))
        step = mv.TrainStep(model, AdamW(model.named_parameters(), lr=1e-2), threads=2, micro_batch=2)
        for _ in range(3):
            step(images, np.arange(7) % 5)
        states.append(model.state_dict())
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)


def test_frozen_parameters_and_images():
    images = normal(mv.Key(1), (2, 3, 12, 8)).astype(np.float32)
    results = []
    for again in (False, True):
        model = disturbed(mv.ViT(**SMALL, recompute=again))
        for name, p in model.named_parameters():
            p.requires_grad = name.endswith("mlp.fc1.weight")
        x = mv.tensor(images, requires_grad=True)
        model(x).sum().backward()
        results.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(results[0]) == 1 + SMALL["depth"] and results[0].keys() == results[1].keys()
    for name, g in results[0].items():
        np.testing.assert_array_equal(results[1][name], g, err_msg=name)


def test_the_input_alone_is_kept():
    def held(again):
        model = disturbed(mv.ViT(**{**SMALL, "depth": 8}, recompute=again))
        images = normal(mv.Key(1), (16, 3, 12, 8)).astype(np.float32)
        tracemalloc.start()
        out = model(images)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert out.requires_grad
        return size

    assert held(True) < held(False) / 4


def test_what_it_does_not_depend_on_gets_zeros():
    x, norm = mv.nn.Parameter(np.ones((2, 3), np.float32)), mv.nn.LayerNorm(3)
    recompute(lambda x: x * 2.0, x * 1.0, norm).sum().backward()
    assert (x.grad == 2.0).all() and (norm.weight.grad == 0.0).all()


def test_a_parameter_of_no_module_is_refused():
    x, p = (mv.nn.Parameter(np.ones((2, 3), np.float32)) for _ in range(2))
    for hidden in (p, p * 2.0):
        y = recompute(lambda x, hidden=hidden: x * hidden, x, mv.nn.Module()).sum()
        with pytest.raises(GraphError, match="neither its input nor a parameter of its module"):
            y.backward()


def test_nothing_is_recorded_without_gradients():
    block = mv.nn.EncoderBlock(8, 2, 16, recompute=True)
    with mv.no_grad():
        assert block(mv.tensor(np.ones((1, 2, 8), np.float32))).node is None


def test_second_order_is_refused():
    model = disturbed(mv.ViT(**SMALL, recompute=True))
    loss = model(normal(mv.Key(1), (2, 3, 12, 8)).astype(np.float32)).sum()
    with pytest.raises(GraphError, match="recompute=False"):
        mv.grad(loss, [model.pos_embed], create_graph=True)


@pytest.mark.parametrize("changed", ["model", "block", "thread"])
def test_it_runs_again_in_the_modes_of_the_first_pass(changed):
    """Whatever is set between forward and backward, or holds where backward is called."""
    images = normal(mv.Key(1), (4, 3, 12, 8)).astype(np.float32)
    results = []
    for again in (False, True):
        model = disturbed(mv.ViT(**SMALL, **DROPS, recompute=again))
        model.blocks[1].mlp.eval()
        with mv.random_key(mv.Key(5)), mode(True if changed == "block" else None):
            loss = ops.cross_entropy(model(images), np.arange(4) % 5)
        if changed == "model":
            model.eval()
        with mode(False if changed == "thread" else None):
            loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    for name, g in results[0].items():
        np.testing.assert_array_equal(results[1][name], g, err_msg=name)
