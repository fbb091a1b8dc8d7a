"""What later exercises are given, what only they can get wrong, and what their right answers are worth."""

from __future__ import annotations

import numpy as np
import pytest

from minivit.backend import Key
from minivit.errors import ShapeError
from minivit.learn import given
from minivit.learn.calling import call
from minivit.learn.ladder import arguments_of, e13_hvp, e14_blockwise, e15_adamw, ladder
from minivit.learn.marking import mark_function
from minivit.learn.workbook import mark_file

BLOCK = next(exercise for exercise in ladder() if exercise.slug == "block")


def marked(tmp_path, source):
    path = tmp_path / BLOCK.file
    path.write_text(source + "\n\ndef backward(g, x, *p):\n    raise NotImplementedError\n")
    return mark_file(BLOCK, path)


def test_only_the_given_pieces_can_be_imported_by_a_learner(tmp_path):
    """The others are what the exercise asks for."""
    source = "from minivit.learn.given import {}\n\n\ndef forward(x, *p):\n    raise NotImplementedError\n"
    assert marked(tmp_path, source.format("linear_backward")).state == "unwritten"
    mark = marked(tmp_path, source.format("block_backward"))
    assert mark.state == "wrong" and "block_backward" in mark.finding.says[0]


def test_the_pieces_work_in_the_learners_process(tmp_path):
    """There minivit is not to be had: none of them may import any of it late. The last line is a mistake."""
    source = """
import numpy as np
from minivit.learn.given import *


def forward(x, *p):
    ones = np.ones
    linear_backward(ones((2, 3)), ones((2, 4)), ones((3, 4)), ones(3))
    gelu_backward(ones((2, 9)), ones((2, 9)))
    layer_norm_backward(ones((2, 3)), ones((2, 3)), ones(3), ones(3))
    self_attention_backward(ones((1, 2, 2)), ones((1, 2, 6)), 1)
    return linear(ones((5, 4)), ones((3, 5)), ones(3))
"""
    finding = marked(tmp_path, source).finding
    assert "linear: an input of shape (5, 4) does not fit a weight of (3, 5)" in "\n".join(finding.says)


def test_a_g_of_another_shape_is_refused():
    x = np.ones((2, 3))
    with pytest.raises(ShapeError, match=r"layer_norm_backward: g has shape \(3,\), but .* returns \(2, 3\)"):
        given.layer_norm_backward(np.ones(3), x, np.ones(3), np.ones(3))


def test_second_order_is_the_complex_step_of_first_order():
    for _, (g, *inputs) in e13_hvp.with_g(Key(3)):
        moved = [x + 1e-30j * t for x, t in zip(inputs[:3], inputs[3:], strict=True)]
        first = e13_hvp.gradients()(g, *moved)
        for right, stepped in zip(e13_hvp.hvp(g, *inputs), first, strict=True):
            np.testing.assert_allclose(stepped.imag / 1e-30, right, rtol=0, atol=1e-12 * max(1.0, np.abs(right).max()))
        tangent = e13_hvp.attended()(*moved).imag / 1e-30
        np.testing.assert_allclose(tangent, e13_hvp.EXERCISE.asked[0].right(*inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", e14_blockwise.EXERCISE.asked, ids=lambda asked: asked.name)
def test_a_whole_matrix_of_scores_is_too_much(asked):
    """The plain way has every number right, even if its scores are in single precision."""
    lines = {"forward": plain_forward, "backward": e14_blockwise.from_lines()}
    run = lambda name, many, measured: [call(lines[name], args, "", measured) for args in many]
    finding = mark_function(asked, arguments_of(e14_blockwise.EXERCISE)[asked.name], run, Key(0))
    assert (finding.state, finding.mistake) == ("wrong", "too much memory")
    assert asked.limit.peak <= e14_blockwise.LARGE**2 * np.dtype(np.float32).itemsize


def plain_forward(q, k, v, block):
    s = q @ k.T / np.sqrt(q.shape[1])
    e = np.exp(s - s.max(1, keepdims=True))
    return e @ v / e.sum(1, keepdims=True), s.max(1) + np.log(e.sum(1))


def test_adamw_is_its_closed_form():
    for _, (p, g, m, v, t, lr, beta1, beta2, eps, decay) in e15_adamw.samples(Key(1)):
        new, m1, v1 = e15_adamw.step(p, g, m, v, t, lr, beta1, beta2, eps, decay)
        np.testing.assert_allclose(m1, beta1 * m + (1 - beta1) * g, rtol=1e-12)
        np.testing.assert_allclose(v1, beta2 * v + (1 - beta2) * g**2, rtol=1e-12)
        moved = lr * (m1 / (1 - beta1**t)) / (np.sqrt(v1 / (1 - beta2**t)) + eps)
        np.testing.assert_allclose(new, p - lr * decay * p - moved, rtol=0, atol=1e-14)


# ---- what the texts tell the learner is true ------------------------------------------------------------------------


def asked_of(number, name):
    exercise = next(exercise for exercise in ladder() if exercise.number == number)
    return next(asked for asked in exercise.asked if asked.name == name)


def right(number, name):
    return asked_of(number, name).right


def samples_of(number, name):
    return [list(args) for _, args in asked_of(number, name).samples(Key(2))]


def test_a_block_without_branches_is_the_identity():
    g, x, *p = samples_of(10, "backward")[0]
    for place in (4, 5, 10, 11):  # proj's and fc2's parameters
        p[place] = 0.0 * p[place]
    dx, *_ = right(10, "backward")(g, x, *p)
    assert np.array_equal(right(10, "forward")(x, *p), x) and np.array_equal(dx, g)


def test_the_patches_of_two_rows_of_four_pixels():
    images, eye = np.arange(8.0).reshape(1, 1, 2, 4), np.eye(4).reshape(4, 1, 2, 2)
    tokens = right(11, "forward")(images, eye, np.zeros(4), np.ones(4), np.zeros((3, 4)))
    assert tokens.tolist() == [[[1, 1, 1, 1], [0, 1, 4, 5], [2, 3, 6, 7]]]


def test_what_must_hold_of_a_whole_vits_gradients():
    for args in samples_of(12, "backward"):
        _, _, dcls, dpositions, _, _, _, dhead_bias, *_ = right(12, "backward")(*args)
        assert np.allclose(dcls, dpositions[0], rtol=0, atol=1e-14) and abs(dhead_bias.sum()) < 1e-14


def test_a_vit_learns_by_what_the_exercises_have_made():
    """The gradients of exercise 12 and the steps of exercise 15: a model that tells two images apart."""
    images, labels, heads, *parameters = samples_of(12, "forward")[0]
    labels, states = np.array([0, 1]), [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    before = right(12, "forward")(images, labels, heads, *parameters)
    for t in range(1, 11):
        found = right(12, "backward")(1.0, images, labels, heads, *parameters)
        steps = [right(15, "step")(p, g, m, v, t, 0.02, 0.9, 0.999, 1e-8, 0.05)
                 for p, g, (m, v) in zip(parameters, found, states, strict=True)]  # fmt: skip
        parameters, states = [p for p, _, _ in steps], [(m, v) for _, m, v in steps]
    assert right(12, "forward")(images, labels, heads, *parameters) < 0.3 * before


def test_the_hessian_is_symmetric():
    for g, q, k, v, *t in samples_of(13, "hvp"):
        s = [x[::-1] for x in t] if q.ndim == 2 else [x**2 for x in t]
        ht, hs = right(13, "hvp")(g, q, k, v, *t), right(13, "hvp")(g, q, k, v, *s)
        one, other = (sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((s, ht), (t, hs)))
        assert abs(one - other) <= 1e-11 * max(1.0, abs(one))


def test_a_first_step_of_adam_is_lr_long():
    p, g = np.array([1.0, 2.0, 3.0]), np.array([1e-3, -5.0, 7e4])
    zero = np.zeros(3)
    for beta1, beta2 in ((0.9, 0.999), (0.5, 0.7)):
        moved, _, _ = right(15, "step")(p, g, zero, zero, 1, 0.25, beta1, beta2, 1e-300, 0.0)
        assert np.allclose(moved, p - 0.25 * np.sign(g), rtol=1e-13)
    assert np.allclose(right(15, "step")(p, zero, zero, zero, 1, 0.25, 0.9, 0.999, 1e-8, 0.1)[0], p * (1 - 0.025))
