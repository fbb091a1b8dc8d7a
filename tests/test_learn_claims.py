"""What the texts tell the learner is true: the values to hold against, the identities, the erf; and what samples do."""

from __future__ import annotations

import importlib.util
import math
from importlib import resources

import numpy as np
import pytest

from minivit.backend import Key
from minivit.learn.exercise import Exercise, backward_of
from minivit.learn.ladder import (
    e03_softmax,
    e04_cross_entropy,
    e05_gelu,
    e06_layer_norm,
    e07_heads,
    e08_attention,
    e09_self_attention,
    e10_block,
    e12_vit,
    e13_hvp,
    e15_adamw,
)
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


def finite(s: np.ndarray, shift) -> np.ndarray:
    """Return in which rows no e^(s - shift) is infinite."""
    with np.errstate(over="ignore"):
        return np.isfinite(np.exp(s - shift(s, axis=-1, keepdims=True))).all(axis=-1)


def test_only_the_largest_of_a_row_saves_the_rows_that_are_drawn_far_apart(draw):
    by_label = dict(e03_softmax.samples(Key(5)))
    [near], [far] = by_label["rows that span 1000"], by_label["a row of ten, one of them near 3000"]
    assert finite(near, np.mean).all() and not finite(near, np.min).any() and not finite(far, np.mean).any()
    s = e08_attention.scores(*e08_attention.spanning(draw, 10))
    assert finite(s, np.max).all() and not finite(s, np.min).any()
    assert not finite(s[::2], np.mean).any() and finite(s[1::2], np.mean).all()
    qkv, heads, mask = dict(e09_self_attention.samples(Key(5)))["a masked score 3000 above the others"]
    q, k, _ = e07_heads.split(qkv, heads)
    s = e08_attention.scores(q, k)
    assert (s.argmax(axis=-1) == 3).all() and mask[:3, 3].all() and s[..., 3].min() > 745 + s[..., :3].max()


def test_a_small_number_in_the_logarithm_makes_28_of_900():
    [args] = [args for label, args in e04_cross_entropy.samples(Key(5)) if label.startswith("surely wrong")]
    assert e04_cross_entropy.forward(*args) == pytest.approx(900, abs=5)
    assert e04_cross_entropy.of_probability(lambda p: p + 1e-12)(*args) == pytest.approx(28, abs=0.5)


def backward(exercise: Exercise, *args):
    return exercise.asked[1].right(*args)


def test_a_block_whose_branches_add_nothing_passes_g_on(draw):
    x, *parameters, heads = e10_block.samples(Key(5))[0][1]
    names = dict(zip(e10_block.NAMES, parameters, strict=True))
    for name in ("proj_weight", "proj_bias", "fc2_weight", "fc2_bias"):
        names[name] = 0.0 * names[name]
    g = draw(*x.shape)
    assert np.array_equal(e10_block.EXERCISE.asked[0].right(x, *names.values(), heads), x)
    assert np.array_equal(backward(e10_block.EXERCISE, g, x, *names.values(), heads)[0], g)


def test_a_vits_gradients_have_the_identities_of_the_text():
    _, _, dcls, dpositions, _, _, _, dhead_bias, *_ = backward(
        e12_vit.EXERCISE, np.array(0.7), *e12_vit.samples(Key(5))[0][1]
    )
    assert abs(dhead_bias.sum()) < 1e-15 and np.abs(dcls - dpositions[0]).max() < 1e-15 < np.abs(dcls).max()


def test_the_hessian_is_symmetric_and_quotients_have_the_digits_of_the_text(draw):
    g, q, k, v, *t = e13_hvp.with_g(Key(5))[0][1]
    s = [draw(*x.shape) for x in t]
    dot = lambda a, b: sum((x * y).sum() for x, y in zip(a, b, strict=True))
    along = e13_hvp.hvp(g, q, k, v, *t)
    assert dot(s, along) == pytest.approx(dot(t, e13_hvp.hvp(g, q, k, v, *s)), rel=1e-12)
    at = lambda h: backward_of(e08_attention.forward, 3)(g, *(x + h * y for x, y in zip((q, k, v), t, strict=True)))
    off = lambda h, low, step: max(
        np.abs((a - b) / step - x).max() / np.abs(x).max() for a, b, x in zip(at(h), at(low), along, strict=True)
    )
    assert 1e-12 < off(1e-5, -1e-5, 2e-5) < 1e-9 < off(1e-8, 0.0, 1e-8) < 1e-6


def test_adamw_has_the_sizes_of_the_text(draw):
    p, g = draw(3), draw(3)
    zero = np.zeros(3)
    moved = lambda step, t=1, beta1=0.9, beta2=0.999: p - step(p, g, zero, zero, t, 0.01, beta1, beta2, 1e-300, 0.0)[0]
    assert moved(e15_adamw.step) == pytest.approx(0.01 * np.sign(g), rel=1e-12)
    assert moved(e15_adamw.step, beta1=0.3, beta2=0.5) == pytest.approx(0.01 * np.sign(g), rel=1e-12)
    uncorrected, late = (moved(e15_adamw.step, t) / moved(e15_adamw.step) for t in (e15_adamw.NEVER, 2))
    assert uncorrected == pytest.approx(0.1 / 0.001**0.5, rel=1e-6) and late == pytest.approx(0.75, abs=0.01)
