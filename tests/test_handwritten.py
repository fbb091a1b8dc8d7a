"""Gradients written by hand in NumPy: right ones pass, whatever their style, and each kind of fault has its error."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import Key, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, NonFiniteError, UndecidedError

X, W, B = normal(Key(0), (3, 4)), normal(Key(1), (4, 2)), normal(Key(2), (2,))


def linear(x, w, b):
    return x @ w + b


def linear_back(g, x, w, b):
    return g @ w.T, x.T @ g, g.sum(0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_back(g, x):
    p = softmax(x)
    return p * (g - (p * g).sum(-1, keepdims=True))


def layer_norm(x, w, b, eps):
    c = x - x.mean(-1, keepdims=True)
    return c / np.sqrt((c * c).mean(-1, keepdims=True) + eps) * w + b


def layer_norm_back(g, x, w, b, eps):
    c = x - x.mean(-1, keepdims=True)
    r = 1 / np.sqrt((c * c).mean(-1, keepdims=True) + eps)
    gw, h = g * w, c * r
    return r * (gw - gw.mean(-1, keepdims=True) - h * (gw * h).mean(-1, keepdims=True)), (g * h).sum(0), g.sum(0)


def picked(x, i):
    return x[i]


def picked_back(g, x, i):
    dx = np.zeros_like(x)
    np.add.at(dx, i, g)
    return dx, None


def largest(x):
    return x.max(-1), x.argmax(-1)


def largest_back(g, x):
    dx = np.zeros_like(x)
    np.put_along_axis(dx, x.argmax(-1)[:, None], g[0][:, None], -1)
    return dx


def masked(x):
    kept = np.random.default_rng(3).random(x.shape) > 0.5  # the same in every call
    return x * kept, kept


def root(x):
    assert x.dtype == np.float64 and (x > 0).all()
    return np.sqrt(x)


class Layer:
    """As people write them: what backward needs is kept in the layer."""

    def __init__(self, w):
        self.w, self.dw = w, 0.0

    def forward(self, x):
        self.x = x
        return np.tanh(x @ self.w)

    def backward(self, g):
        g = g * (1 - np.tanh(self.x @ self.w) ** 2)
        self.dw = self.dw + self.x.T @ g
        return g @ self.w.T


def in_layer(x, w):
    layer = Layer(w)
    return layer.forward(x), layer


RIGHT: dict[str, tuple[Any, ...]] = {
    "three arguments": (linear, linear_back, [X, W, B]),
    "float32 arguments are checked as float64": (linear, linear_back, [a.astype(np.float32) for a in (X, W, B)]),
    "arrays that may not be written": (linear, linear_back, [np.broadcast_to(X[0], (3, 4)), W[::-1], B[::-1]]),
    "a number that cannot be complex": (
        lambda x, f: x * math.exp(f), lambda g, x, f: (g * math.exp(f), (g * x).sum() * math.exp(f)), [X, 0.3]
    ),
    "two outputs of other sizes": (
        lambda x: (1e9 * x, 1e-9 * x * x), lambda g, x: 1e9 * g[0] + 2e-9 * g[1] * x, [X]
    ),
    "a Tensor among the arguments": (linear, linear_back, [mv.tensor(X), W, B]),
    "a forward of minivit's": (ops.softmax, softmax_back, [X]),
    "views": (lambda x: x.reshape(-1), lambda g, x: g.reshape(3, 4), [X]),
    "the argument itself": (lambda x: x, lambda g, x: g, [X]),
    "a kink beside": (lambda x: np.maximum(x, 0), lambda g, x: g * (x > 0), [X]),
    "not analytic": (np.abs, lambda g, x: g * np.sign(x), [X]),
    "a real part": (lambda x: np.tanh(np.real(x)), lambda g, x: g * (1 - np.tanh(x) ** 2), [X]),
    "math's functions": (math.exp, lambda g, x: g * math.exp(x), [0.3]),
    "a NumPy scalar": (np.exp, lambda g, x: g * np.exp(x), [np.float32(0.3)]),
    "0-d": (np.exp, lambda g, x: g * np.exp(x), [np.array(0.3)]),
    "nothing in it": (lambda x: x.sum(), lambda g, x: g * np.ones_like(x), [np.zeros((0, 3))]),
    "saturated": (softmax, softmax_back, [300.0 * X]),
    "huge": (lambda x: x * x, lambda g, x: 2 * g * x, [1e150 * X]),
    "tiny": (lambda x: x * x, lambda g, x: 2 * g * x, [1e-100 * X]),
    "indices": (picked, picked_back, [X, np.array([0, 2, 2])]),
    "a bound setting": (
        functools.partial(layer_norm, eps=1e-6), functools.partial(layer_norm_back, eps=1e-6), [X, X[0] + 2, X[1]]
    ),
    "two outputs": (lambda x, y: (x * y, x.sum()), lambda g, x, y: (g[0] * y + g[1], g[0] * x), [X, X + 1]),
    "a list of outputs": (lambda x: np.split(x, 2, -1), lambda g, x: np.concatenate(g, -1), [X]),
    "an output of integers": (largest, largest_back, [X]),
    "a list of gradients": (linear, lambda *a: list(linear_back(*a)), [X, W, B]),
    "float64 and positive only": (root, lambda g, x: g / 2 / np.sqrt(x), [np.abs(X)]),
    "an argument not used": (lambda x, y: x * 2, lambda g, x, y: (g * 2, np.zeros_like(y)), [X, W]),
    "NaN that is not taken": (
        lambda x: np.where(x > 0, np.log(x), 0), lambda g, x: np.where(x > 0, g / (x * (x > 0)), 0), [X]
    ),
    "sorted": (
        lambda x: np.sort(x, -1), lambda g, x: np.take_along_axis(g, x.argsort(-1).argsort(-1), -1), [X]
    ),
    "steps": (np.floor, lambda g, x: g * 0, [X + 0.3]),
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_right_gradients_pass(what):
    forward, backward, args = RIGHT[what]
    report = mv.check_vjp(forward, backward, args)
    assert report.passed and report.checks and all(c.order == 1 for c in report.checks)


@pytest.mark.parametrize(
    ("forward", "backward", "args"),
    [(masked, lambda g, kept: g * kept, [X]), (in_layer, lambda g, layer: (layer.backward(g), layer.dw), [X, W])],
)
def test_a_cache(forward, backward, args):
    assert mv.check_vjp(forward, backward, args, cache=True).worst.error < 1e-14


@pytest.mark.parametrize("what", [what for what in RIGHT if what not in ("nothing in it", "steps", "saturated")])
def test_every_one_of_them_off_by_a_little_is_refused(what):
    forward, backward, args = RIGHT[what]

    def off(g, *args):
        result = backward(g, *args)
        first, *others = result if isinstance(result, tuple | list) else [result]
        return first * (1 + 1e-6), *others

    with pytest.raises(GradientError, match="wrong gradient of order 1"):
        mv.check_vjp(forward, off, args)


def in_place(x):
    x -= x.max(-1, keepdims=True)
    return softmax(x)


def cotangent_in_place(g, x):
    g *= 1 - np.tanh(x) ** 2
    return g


def argument_in_place(g, x):
    x[...] = np.tanh(x)
    return g * (1 - x * x)


WRONG: dict[str, tuple[Any, ...]] = {
    "not summed where broadcast": (
        linear, lambda g, x, w, b: (g @ w.T, x.T @ g, g), [X, W, B],
        GradientError, r"gradient for b has shape \(3, 2\), b \(2,\)\n  → sum it over the axes .* broadcast: 0",
    ),
    "transposed": (
        linear, lambda g, x, w, b: (g @ w.T, g.T @ x, g.sum(0)), [X, W, B], GradientError, "transpose it"
    ),
    "too few": (linear, lambda g, *a: linear_back(g, *a)[:2], [X, W, B], GradientError, r"2 gradients for 3 .*x, w, b"),
    "none for the indices": (
        picked, lambda g, *a: picked_back(g, *a)[0], [X, np.array([1])],
        GradientError, "1 gradient for 2 .*\n.*None for i",
    ),
    "one for the indices": (
        picked, lambda g, x, i: (picked_back(g, x, i)[0], np.zeros(1)), [X, np.array([1])],
        GradientError, "a gradient for i, which holds no floating numbers",
    ),
    "None for floats": (np.tanh, lambda g, x: None, [X], GradientError, r"None for argument 0|None for x"),
    "None for a setting": (
        layer_norm, lambda g, *a: (*layer_norm_back(g, *a), None), [X, X[0], X[1], 1e-6],
        GradientError, r"functools\.partial\(forward, eps=…\)",
    ),
    "a dict": (np.tanh, lambda g, x: {"x": g}, [X], GradientError, "is a dict"),
    "complex": (np.tanh, lambda g, x: g * 1j, [X], GradientError, "complex128"),
    "indices added once": (
        picked, lambda g, x, i: (np.eye(3)[:, i] @ g * 0 + np.eye(3)[:, [2]] * g[0], None), [X, np.array([2, 2])],
        GradientError, "wrong gradient",
    ),
    "only the diagonal": (softmax, lambda g, x: g * softmax(x) * (1 - softmax(x)), [X], GradientError, "worst entry"),
    "an output forgotten": (
        lambda x: (x * x, x.sum()), lambda g, x: 2 * g[0] * x, [X], GradientError, "wrong gradient",
    ),
    "a small output forgotten": (
        lambda x: (1e9 * x, 1e-9 * x * x), lambda g, x: 1e9 * g[0], [X], GradientError, "wrong gradient",
    ),
    "a masked array": (np.tanh, lambda g, x: g, [np.ma.masked_less(X, 0)], DTypeError, "a MaskedArray, .* of its own"),
    "clipped": (np.tanh, lambda g, x: np.clip(g * (1 - np.tanh(x) ** 2), -9, 9), [X], GradientError, "linear in g"),
    "float32 in backward": (
        np.tanh, lambda g, x: (g * (1 - np.tanh(x) ** 2)).astype(np.float32), [X],
        GradientError, "backward returns float32, rounded to 6 digits: rtol=1e-5 allows",
    ),
    "float32 in forward": (
        lambda x: np.tanh(x.astype(np.float32)), lambda g, x: g * (1 - np.tanh(x) ** 2), [X],
        UndecidedError, "forward returns float32 for float64 arguments",
    ),
    "float32 in a forward with a wrong gradient": (
        lambda x: np.tanh(x.astype(np.float32)), lambda g, x: 1.5 * g * (1 - np.tanh(x) ** 2), [X],
        GradientError, "forward returns float32 for float64 arguments",
    ),
    "a kink": (
        lambda x: np.maximum(x, 0), lambda g, x: g * (x > 0), [np.array([0.0, 1.0])],
        UndecidedError, r"1 of its entries, the first \[0\], stands on a kink",
    ),
    "wrong beside a kink": (
        lambda x: np.maximum(x, 0), lambda g, x: g * (x > 0) * 1.5, [np.array([0.0, 1.0])],
        GradientError, r"worst entry \[1\]",
    ),
    "too small for a number": (lambda x: x * x, lambda g, x: 2 * g * x, [1e-200 * X], UndecidedError, "cannot tell"),
    "an argument changed in forward": (in_place, softmax_back, [X], ConfigError, r"forward\(x\) changes x in place"),
    "an argument changed in backward": (np.tanh, argument_in_place, [X], ConfigError, r"backward\(g, .*\) changes"),
    "the cotangent changed": (np.tanh, cotangent_in_place, [X], ConfigError, "changes g in place"),
    "complex arguments": (np.tanh, lambda g, x: g, [1j * X], DTypeError, "is complex"),
    "complex outputs": (lambda x: x * 1j, lambda g, x: g, [X], DTypeError, "complex numbers for real ones"),
    "NaN in backward": (np.tanh, lambda g, x: g * np.nan, [X], NonFiniteError, "gradient of order 1"),
    "NaN in forward": (np.log, lambda g, x: g / x, [X], NonFiniteError, "the output of forward has"),
    "NaN in an argument": (np.tanh, lambda g, x: g, [X * np.nan], NonFiniteError, "the argument"),
    "an array for the list of arguments": (np.tanh, lambda g, x: g, X, ConfigError, r"pass a list: \[x\]"),
    "integers": (np.tanh, lambda g, x: g, [np.arange(3)], GraphError, "no argument holds floating numbers"),
    "an output of integers": (lambda x: x > 0, lambda g, x: g, [X], GraphError, "no floating numbers"),
    "an output of words": (lambda x: "a", lambda g, x: g, [X], ConfigError, "forward returns a str"),
    "a cache, unsaid": (lambda x: (x, {}), lambda g, c: g, [X], ConfigError, r"a dict in place 1\n.*cache=True"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_each_fault_has_its_error(what):
    forward, backward, args, error, said = WRONG[what]
    with pytest.raises(error, match=said):
        mv.check_vjp(forward, backward, args)


def test_what_takes_complex_numbers_has_a_complex_step_though_another_argument_does_not():
    report = mv.check_vjp(*RIGHT["a number that cannot be complex"])
    assert [(c.name, c.method) for c in report.checks] == [("x", "complex"), ("f", "central")]


def test_what_depends_on_earlier_calls():
    layer, total = Layer(W), [0.0]
    shared = Layer(W)

    def added(g, x):
        total[0] = total[0] + 2 * g
        return total[0]

    def drawn(x):
        total[0] = total[0] + 1
        return x * total[0]

    for forward, backward, settings, said in (
        (layer.forward, lambda g, x: layer.backward(g), {}, "it reads what forward left behind\n  → .*cache=True"),
        (
            lambda x: (shared.forward(x), shared),
            lambda g, s: s.backward(g),
            {"cache": True},
            "what forward left behind",
        ),
        (lambda x: 2 * x, added, {}, "backward gives another result each time"),
        (drawn, lambda g, x: g, {}, "forward gives another result each time .*\n  → .* the same seed in every call"),
    ):
        total[0] = 0.0
        with pytest.raises(ConfigError, match=said):
            mv.check_vjp(forward, backward, [X], **settings)


def test_with_cache_both_are_returned():
    for forward, said in ((np.tanh, "not a ndarray"), (lambda x: (x, x, x), "not 3 things")):
        with pytest.raises(ConfigError, match=said):
            mv.check_vjp(forward, lambda g, cache: g, [X], cache=True)


def test_what_the_functions_raise_comes_out_with_a_note_of_the_call():
    with pytest.raises(ZeroDivisionError) as caught:
        mv.check_vjp(lambda x, y: (x, y), lambda g, x, y: 1 // 0, [X, W])
    assert caught.value.__notes__[0].startswith("check_vjp called backward(g, x, y) with g a tuple of 2, one for each")
    with pytest.raises(AssertionError) as caught:
        mv.check_vjp(root, lambda g, x: g, [-np.abs(X)])
    assert "check_vjp called forward(x)" in caught.value.__notes__[0]


def test_the_arguments_stay_as_they_are_and_settings_are_heeded():
    x = X.copy()
    off = lambda g, x: g * (1 - np.tanh(x) ** 2) * 1.001
    assert mv.check_vjp(np.tanh, off, [x], rtol=1e-2).passed and mv.check_vjp(np.tanh, off, [x], atol=1.0).passed
    np.testing.assert_array_equal(x, X)
    assert mv.check_vjp(np.tanh, lambda g, x: off(g, x) / 1.001, [x], method="central").worst.method == "central"
    first, other = (mv.check_vjp(softmax, softmax_back, [x], seed=s).checks[0].analytic for s in (0, 1))
    assert first != other
    with pytest.raises(ConfigError, match="method"):
        mv.check_vjp(np.tanh, off, [x], method="forward")


def test_one_wrong_entry_of_many_is_found():
    def square_back(g, x):
        dx = 2 * g * x
        dx[211, 7] *= 1.001
        return dx

    with pytest.raises(GradientError, match=r"worst entry \[211, 7\]"):
        mv.check_vjp(lambda x: x * x, square_back, [normal(Key(0), (300, 40))])


def test_an_error_names_every_argument_that_is_wrong_and_reads_well_under_pytest(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import minivit as mv\nimport numpy as np\n\n\ndef test_linear():\n"
        "    back = lambda g, x, w, b: (2 * g @ w.T, 2 * x.T @ g, g.sum(0))\n"
        "    mv.check_vjp(lambda x, w, b: x @ w + b, back, [np.ones((2, 3)), np.ones((3, 4)), np.ones(4)])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "test_mine.py"]
    environment = {**os.environ, "PYTHONPATH": str(Path(mv.__file__).parents[1])}
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False).stdout
    said = [line for line in out.splitlines() if line.startswith("E ")]
    assert said[0].startswith(
        "E   minivit.errors.GradientError: wrong gradient of order 1 for x (2, 3): relative error"
    )
    assert [line.split()[1] for line in said[1:]] == ["along", "worst", "also", "right:", "→"]
    assert "also wrong: w (" in said[3] and said[4].endswith("right: b")
    assert all(len(line) <= 120 for line in said) and "handwritten.py" not in out
