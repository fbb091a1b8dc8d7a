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
