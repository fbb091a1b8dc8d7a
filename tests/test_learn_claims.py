"""What the texts of exercises 5 to 9 tell the learner is true: the values to hold against, the identities, the erf."""

from __future__ import annotations

import importlib.util
import math
from importlib import resources

import numpy as np
import pytest

from minivit.backend import Key
from minivit.learn.exercise import backward_of
from minivit.learn.ladder import e05_gelu, e06_layer_norm, e07_heads, e08_attention, e09_self_attention
from minivit.ops.samples import Draw

ONES = np.ones(5)


@pytest.fixture
def draw() -> Draw:
    return Draw(Key(5))


@pytest.fixture(scope="module")
def erf():
    with resources.as_file(resources.files("minivit.learn") / "texts" / "05_gelu.py") as path:
        spec = importlib.util.spec_from_file_location("text", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module.erf


def test_erf_of_real_numbers_is_the_c_librarys(erf):
    x = np.linspace(-7, 7, 57).reshape(3, 19)
    assert np.array_equal(erf(x), np.reshape([math.erf(t) for t in x.flat], x.shape))
    assert erf(0.3) == math.erf(0.3) and erf(np.zeros((0, 2))).shape == (0, 2)


def test_erf_of_complex_numbers(erf):
    x = np.linspace(-7, 7, 57)
    moved = erf(x + 1e-20j)
    assert np.abs(moved.real - erf(x)).max() < 1e-14
    assert np.abs(moved.imag / 1e-20 - 2 / math.sqrt(math.pi) * np.exp(-x * x)).max() < 1e-14
    # tables: Abramowitz and Stegun 7.9 has w(z) = e^(-z²) erfc(-iz), and w(1 + i) = 0.304744 + 0.208219i
    z = 1 + 1j
    assert np.exp(-z * z) * (1 - erf(-1j * z)) == pytest.approx(0.304744 + 0.208219j, abs=1e-6)


def test_gelu_has_the_values_of_the_text():
    slope = lambda *x: backward_of(e05_gelu.forward, 1)(np.ones(len(x)), np.array(x))
    assert e05_gelu.gate(np.array([0.0, 1.0])) == pytest.approx([0.5, 0.8413447460685429], abs=1e-15)
    assert slope(0.0, 1.0) == pytest.approx([0.5, 1.0833154705876863], rel=1e-15)
    x = np.linspace(0, 9, 40)
    assert slope(*x) + slope(*-x) == pytest.approx(1.0, abs=1e-15)
    assert slope(-0.7518, -0.7517)[0] < 0 < slope(-0.7518, -0.7517)[1]
    assert slope(1.41, 2**0.5, 1.42).argmax() == 1
    assert e05_gelu.forward(np.array([-0.75])) == pytest.approx(-0.17, abs=1e-3)


def test_layer_norm_has_the_identities_of_the_text(draw):
    x, weight, g = draw(3, 5), draw(5), draw(3, 5)
    dx, _, _ = e06_layer_norm.right(g, x, weight, 0 * ONES, 1e-14)
    x_hat = e06_layer_norm.forward(x, ONES, 0 * ONES, 1e-14)
    assert np.abs(dx.sum(axis=-1)).max() < 1e-14 and np.abs((x_hat * dx).sum(axis=-1)).max() < 1e-12
    assert np.abs(e06_layer_norm.right(np.ones_like(x), x, ONES, 0 * ONES, 1e-6)[0]).max() < 1e-14
    assert not e06_layer_norm.right(g[:, :1], x[:, :1], weight[:1], ONES[:1], 1e-6)[0].any()


def test_the_rows_far_from_zero_do_what_they_are_drawn_for(draw):
    x = e06_layer_norm.far_from_zero(draw(50, 8))
    mean = x.mean(axis=-1)
    assert np.array_equal(x.sum(axis=-1), x[:, ::-1].cumsum(axis=-1)[:, -1])
    off = (x * x).mean(axis=-1) - mean * mean - ((x - mean[:, None]) ** 2).mean(axis=-1)
    assert np.abs(off).min() > 1e-5  # of a variance of about 1, in every row


def test_heads_lie_as_the_table_of_the_text_says(draw):
    features = np.arange(18.0).reshape(1, 1, 18)
    apart = e07_heads.split(features, 2)  # (3, 1, 2, 1, 3)
    for f in range(18):
        p, h, i = f // 6, f // 3 % 2, f % 3
        assert apart[p, 0, h, 0, i] == f == (p * 2 + h) * 3 + i
    x = draw(2, 4, 18)
    backward = next(a.right for a in e07_heads.EXERCISE.asked if a.name == "split_backward")
    assert np.array_equal(backward(e07_heads.split(x, 2), x, 2), x)


def test_attention_has_the_identities_of_the_text(draw):
    q, k, v = draw(4, 3), draw(4, 3), draw(4, 2)
    _, _, dv = e08_attention.right(np.ones((4, 2)), q, k, v)
    received = e08_attention.forward(q, k, np.eye(4)).sum(axis=0)  # of V = 1 the output is P
    assert dv == pytest.approx(np.stack([received, received], axis=1), rel=1e-14)
    dq, dk, dv = e08_attention.right(v[:1], q[:1], k[:1], v[1:2])
    assert not dq.any() and not dk.any() and np.array_equal(dv, v[:1])


def test_masked_tokens_get_the_gradient_that_the_text_says(draw):
    mask = np.zeros((4, 4), bool)
    mask[1] = mask[:, 2] = True  # token 1 may attend to nothing, and nobody to token 2
    out = e09_self_attention.forward(qkv := draw(2, 4, 3 * 2 * 3), 2, mask)
    dqkv = e09_self_attention.right(draw(2, 4, 6), qkv, 2, mask).reshape(2, 4, 3, 6)
    assert not out[:, 1].any() and not dqkv[:, 1, 0].any() and dqkv[:, 1, 1:].all()
    assert not dqkv[:, 2, 1:].any() and dqkv[:, 2, 0].all()
