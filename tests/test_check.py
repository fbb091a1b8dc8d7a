"""The gradient check itself: it accepts right gradients, refuses wrong ones and says where they are wrong."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.op import OPS, Op, op, raw
from minivit.backend import Array, Key, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError

X = np.asarray(normal(Key(0), (3, 4)))


def scaled(factor: Any) -> Op:
    """Return x³ with a gradient times ``factor`` (a number or an array)."""

    @op(save=("x",))
    def cube(x: Array) -> Array:
        return x * x * x

    cube.vjps(lambda g, out, x: g * x * x * 3.0 * factor)
    return cube


pytestmark = pytest.mark.usefixtures("toys")


def test_accepts_right_gradients_to_the_last_bits():
    report = mv.check_grads(lambda x, w: ops.gelu(x @ w).sum(0) * x[0, 0], [X, X.T.copy()])
    assert report.passed and report.worst.error < 1e-14
    assert [(c.name, c.order) for c in report.checks] == [
        ("x", 1), ("w", 1), ("x", 2), ("w", 2), ("the cotangent", 2),
    ]  # fmt: skip
    table = str(report).splitlines()
    assert len(table) == 6 and "relative error" in table[0] and "complex" in table[1] and "WRONG" not in str(report)


@pytest.mark.parametrize(("off", "method"), [(1e-9, "complex"), (1e-11, "auto"), (1e-5, "central")])
def test_refuses_a_gradient_that_is_a_little_off(off, method):
    mv.check_grads(scaled(1.0), [X], method=method)
    with pytest.raises(GradientError, match="wrong gradient of order 1 for x"):
        mv.check_grads(scaled(1.0 + off), [X], method=method)


def test_names_the_worst_entry():
    factor = np.ones((3, 4))
    factor[0, 3], factor[2, 1] = 1.01, 1.5
    x = np.ones((3, 4))
    with pytest.raises(GradientError) as caught:
        mv.check_grads(scaled(factor), [x])
    found = re.search(r"worst entry \[2, 1\]: (\S+), should be (\S+)", str(caught.value))
    assert found is not None
    assert float(found[1]) == pytest.approx(1.5 * float(found[2]))
    assert "(3, 4)" in str(caught.value) and "mend the gradient" in str(caught.value)


def test_finds_one_wrong_entry_among_many():
    factor = np.ones(400)
    factor[7] = 1.001
    with pytest.raises(GradientError):
        mv.check_grads(scaled(factor), [np.ones(400)])


def test_a_nan_is_wrong():
    with pytest.raises(GradientError):
        mv.check_grads(scaled(np.nan), [X])


@pytest.mark.parametrize("method", ["auto", "complex", "central"])
def test_methods(method):
    report = mv.check_grads(lambda x: ops.exp(x) * 2.0, [X], method=method)
    expected = "complex" if method == "auto" else method
    assert {(c.method, c.tolerance) for c in report.checks if c.order == 1} == {
        (expected, 1e-12 if expected == "complex" else 1e-7)
    }


@op()
def _modulus(x: Array) -> Array:  # |x| of complex numbers is not analytic
    return np.abs(x)


_modulus.vjps(lambda g, out, x: g)
OPS.popitem()  # the table has no rows for it


def test_falls_back_to_differences_where_a_function_is_not_analytic():
    report = mv.check_grads(_modulus, [np.abs(X) + 1.0])
    assert report.passed and {c.method for c in report.checks if c.order == 1} == {"central"}
    with pytest.raises(GradientError, match="the central step"):
        mv.check_grads(lambda x: _modulus(x) * 1.0, [-np.abs(X) - 1.0])
    with pytest.raises(GradientError):
        mv.check_grads(_modulus, [np.abs(X) + 1.0], method="complex")


def test_falls_back_to_differences_where_a_function_cannot_take_complex_numbers():
    @op(save=("x",))
    def strict(x: Array) -> Array:
        if x.dtype.kind == "c":
            raise TypeError("real numbers only")
        return x * x

    strict.vjps(lambda g, out, x: g * x * 2.0)
    assert {c.method for c in mv.check_grads(strict, [X], order=1).checks} == {"central"}
    with pytest.raises(GradientError, match='use method="central"'):
        mv.check_grads(strict, [X], method="complex")


def test_sees_what_a_cotangent_of_ones_cannot():
    for factor in (0.0, 7.0):  # with ones the true gradient of a softmax is zero, and so are these two

        @op(save=("out",))
        def wrong(x: Array) -> Array:
            return ops.softmax.forward(x, -1)

        wrong.vjps(lambda g, out, x, factor=factor: out * (g - ops.sum(g * out, -1, True)) * factor)
        x = mv.tensor(X, requires_grad=True)
        (blind,) = mv.grad(wrong(x), [x], np.ones((3, 4)))
        np.testing.assert_allclose(blind.data, 0.0, atol=1e-15)
        with pytest.raises(GradientError):
            mv.check_grads(wrong, [X])


def test_finds_what_is_wrong_in_the_second_order_only():
    @op(save=("x", "out"))
    def kept(x: Array) -> Array:
        return np.tanh(x)

    kept.vjps(lambda g, out, x: g * (1.0 - raw(out) * raw(out)))  # the saved result, treated as a constant
    assert mv.check_grads(kept, [X], order=1).passed
    with pytest.raises(GradientError, match="wrong gradient of order 2 for x"):
        mv.check_grads(kept, [X], order=2)


def test_finds_a_cotangent_treated_as_a_constant():
    @op()
    def doubled(x: Array) -> Array:
        return x * 2.0

    doubled.vjps(lambda g, out, x: mv.tensor(raw(g) * 2.0) if isinstance(g, mv.Tensor) else g * 2.0)
    assert mv.check_grads(doubled, [X], order=1).passed
    with pytest.raises(GradientError, match="order 2 for the cotangent"):
        mv.check_grads(doubled, [X], order=2)


def test_arguments_of_every_kind():
    labels = np.array([1, 0, 3])
    report = mv.check_grads(
        lambda x, y, f, n: ops.cross_entropy(x * f, n) * y,
        [mv.tensor(X.astype(np.float32)), np.float64(2.0), 0.5, labels],
    )
    assert {c.name for c in report.checks} == {"x", "y", "f", "the cotangent"}
    assert report.passed


def test_leaves_its_arguments_alone_and_repeats_itself():
    x = mv.tensor(X.copy(), requires_grad=True)
    first, second = (mv.check_grads(ops.tanh, [x], seed=3) for _ in range(2))
    np.testing.assert_array_equal(x.data, X)
    assert x.grad is None and first.checks == second.checks
    assert first.checks != mv.check_grads(ops.tanh, [x], seed=4).checks


def test_arguments_bear_the_names_of_the_signature():
    def names(fn: Any, *args: Any) -> list[str]:
        return [c.name for c in mv.check_grads(fn, args, order=1).checks]

    assert names(lambda x, *rest: x + rest[0], X, X) == ["x", "argument 1"]
    assert names(ops.layer_norm, X, X[0], X[1]) == ["x", "weight", "bias"]
    assert names(mv.nn.LayerNorm(4).to(np.float64), X) == ["argument 0"]  # __call__(*args, **kwargs)
    report = mv.check_grads(lambda cotangent: cotangent * cotangent, [X])
    assert [(c.name, c.order) for c in report.checks] == [("cotangent", 1), ("cotangent", 2), ("the cotangent", 2)]


def test_refuses_what_it_cannot_check():
    with pytest.raises(GraphError, match="no argument holds floating numbers"):
        mv.check_grads(ops.exp, [np.array([1, 2])])
    for settings in ({"method": "forward"}, {"order": 3}):
        with pytest.raises(ConfigError):
            mv.check_grads(ops.exp, [X], **settings)


class Affine:
    """As little of a module as check_module needs."""

    def __init__(self, dtype: Any) -> None:
        self.weight = mv.tensor(X.astype(dtype), requires_grad=True)
        self.bias = mv.tensor(np.ones(3, dtype), requires_grad=True)
        self.wrong = 1.0

    def named_parameters(self) -> list[tuple[str, mv.Tensor]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def __call__(self, x: Any) -> Any:
        return ops.linear(x, self.weight, scaled(self.wrong)(self.bias))


def test_check_module_checks_every_parameter_by_name():
    module = Affine(np.float64)
    for order in (1, 2):
        report = mv.check_module(module, X, order=order)
        assert report.passed and [c.name for c in report.checks][:2] == ["weight", "bias"]
    module.wrong = 1.001
    with pytest.raises(GradientError, match=r"order 1 for bias \(3,\)"):
        mv.check_module(module, X)
    assert module.bias.grad is None and module.bias.dtype == np.float64


def test_check_module_wants_float64():
    with pytest.raises(DTypeError, match=r"weight is float32\n  → check in float64"):
        mv.check_module(Affine(np.float32), X.astype(np.float32))


def test_a_frozen_parameter_is_left_out():
    layer = mv.nn.Linear(3, 2).to(np.float64)
    layer.bias.requires_grad = False
    assert [c.name for c in mv.check_module(layer, np.ones((2, 3))).checks] == ["weight"]
    layer.weight.requires_grad = False
    with pytest.raises(GraphError, match="no parameter requires"):
        mv.check_module(layer, np.ones((2, 3)))


def test_a_function_that_returns_no_tensor():
    with pytest.raises(GraphError, match="returned float"):
        mv.check_grads(lambda x: 3.0, [np.ones(3)])
