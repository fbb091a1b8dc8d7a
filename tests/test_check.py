"""The gradient check itself: it accepts right gradients, refuses wrong ones and says where they are wrong."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.mutate import check_op
from minivit.autograd.op import OPS, Op, op, raw
from minivit.backend import Array, Key, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, NonFiniteError, UndecidedError
from minivit.ops.samples import SAMPLES

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
    table = report.table().splitlines()
    assert len(table) == 6 and "relative error" in table[0] and "complex" in table[1] and "WRONG" not in str(report)
    assert re.fullmatch(
        r"x, w: right to order 2, worst relative error \S+e-1\d \(\w+, order \d, complex step\)", str(report)
    )


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


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "gelu", "attention"])
def test_order_3_of_the_operations_of_a_vit(name):
    for sample in (s for s in SAMPLES if s.op == name):
        report = check_op(sample.function, sample.build(), order=3)
        third = [c for c in report.checks if c.order == 3]
        assert {c.method for c in third} == {"complex"} and max(c.error for c in third) <= 1e-12
        assert len(third) == 2 * sum(c.order == 1 for c in report.checks) + 1  # arguments, cotangent, a direction each


def test_order_3_of_the_whole_table():
    for sample in SAMPLES:
        assert check_op(sample.function, sample.build(), order=3).passed


def test_order_4_and_the_names_of_what_is_differentiated():
    report = mv.check_grads(lambda x: ops.sin(x) * x, [X], order=4)
    assert report.worst.error < 1e-13 and str(report).startswith("x: right to order 4, worst relative error ")
    assert [c.name for c in report.checks if c.order == 4] == [
        "x", "the cotangent", "the direction of x, order 2",
        "the direction of x, order 3", "the direction of the cotangent, order 3",
    ]  # fmt: skip


def sine(factor: float) -> Op:
    """Return sin x with gradients that are right to the second order; those of the third are times ``factor``."""
    third = toy(np.sin, lambda g, out, x: g * ops.cos(x) * factor)
    second = toy(np.cos, lambda g, out, x: -g * third(x))
    return toy(np.sin, lambda g, out, x: g * second(x))


def test_finds_what_is_wrong_in_the_third_order_only():
    for order in (1, 2, 3):
        assert mv.check_grads(sine(1.0), [X], order=order).passed
    for factor in (1.0 + 1e-9, 0.0, -1.0, 1e6):
        assert mv.check_grads(sine(factor), [X]).passed
        for method in ("auto", "central")[: 1 if abs(factor - 1.0) < 1e-6 else 2]:
            with pytest.raises(GradientError, match="wrong gradient of order 3 for x"):
                mv.check_grads(sine(factor), [X], order=3, method=method)


def test_finds_a_direction_treated_as_a_constant():
    @op()
    def doubled(x: Array) -> Array:
        return x * 2.0

    doubled.vjps(lambda g, out, x: halved(g) * 4.0)

    @op()
    def halved(x: Array) -> Array:
        return x * 0.5

    halved.vjps(lambda g, out, x: mv.tensor(raw(g) * 0.5) if isinstance(g, mv.Tensor) else g * 0.5)
    assert mv.check_grads(doubled, [X], order=2).passed
    with pytest.raises(GradientError, match="order 3 for the direction of x, order 2"):
        mv.check_grads(doubled, [X], order=3)


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
    for settings in ({"method": "forward"}, {"order": 0}, {"order": 1.5}, {"order": True}):
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


class Halves(mv.nn.Module):
    """Three layers, of which one is used and one cut off."""

    def __init__(self, cut: Any) -> None:
        self.used, self.cut_off, self.idle = (mv.nn.Linear(4, 2) for _ in range(3))
        self.cut = cut

    def forward(self, x: Any) -> Any:
        return self.used(x) + self.cut(self.cut_off(x))


def test_parameters_that_the_output_does_not_reach_are_named():
    module = Halves(lambda x: x).to(np.float64)
    said = r"does not depend on 2 of 6 parameters: idle\.weight, idle\.bias\n  → .* freeze them: p\.requires_grad"
    with pytest.raises(GraphError, match=said):
        mv.check_module(module, X)
    for p in module.idle.parameters():
        p.requires_grad = False
    assert mv.check_module(module, X, order=2).unreached == []
    module.cut = lambda x: x.detach()  # the output depends on it, and no gradient does
    with pytest.raises(GradientError, match=r"for cut_off\.weight (.|\n)*no graph leads to cut_off\.weight"):
        mv.check_module(module, X)


def test_a_report_says_of_what_nothing_was_seen():
    report = mv.check_grads(lambda x, y: x * 2.0, [X, X[0]])
    assert report.passed and report.unreached == ["y"] and "the output does not depend on y" in str(report)
    head = mv.nn.Linear(2, 3).to(np.float64)
    head.weight.data[...] = 0.0
    report = mv.check_grads(lambda x: head(ops.tanh(x)), [X[:, :2]], order=1)
    assert report.unreached == [] and "the gradient for x is 0 throughout" in str(report)
    assert "\n" not in str(mv.check_grads(lambda x, y: x + y, [X, X[0]]))  # nothing of it has a second order: fine


def test_a_report_shows_what_is_wrong_and_no_more():
    right, wrong = (mv.check_grads(scaled(1.0 + off), [X], order=1, rtol=1e-3).checks[0] for off in (0.0, 1e-4))
    report = mv.GradientReport([right, dataclasses.replace(wrong, name="w", tolerance=0.0)])
    assert not report.passed and report.worst.name == "w"
    lines = str(report).splitlines()
    assert len(lines) == 2 and lines[1].startswith("w ") and lines[1].endswith("WRONG")
    assert len(report.table().splitlines()) == 3
    many = mv.check_grads(lambda *xs: functools.reduce(ops.mul, xs), [X] * 20, order=1)
    assert str(many).startswith("argument 0, argument 1, argument 2, argument 3, argument 4 and 15 more: right, worst")


def test_what_else_is_wrong_is_named_too():
    with pytest.raises(GradientError, match=r"for x \(3, 4\)(.|\n)*\n  also wrong: z \(\S+\)\n  right: y\n  → mend"):
        mv.check_grads(lambda x, y, z: scaled(2.0)(x) + y + scaled(3.0)(z), [X, X, X])


def test_numpy_scalars_are_checked():
    assert [c.name for c in mv.check_grads(lambda x, f: x * f, [X, np.float32(2.0)], order=1).checks] == ["x", "f"]
    with pytest.raises(GradientError, match="for f"):
        mv.check_grads(lambda x, f: x * scaled(2.0)(f), [X, np.float32(2.0)])


def test_an_array_is_no_list_of_arguments():
    for args in (X, mv.tensor(X)):
        with pytest.raises(ConfigError, match=r"pass a list: \[x\]"):
            mv.check_grads(ops.exp, args)


@pytest.mark.parametrize("entries", [5, 2000])
def test_the_wrong_entry_is_found_among_many_and_kinks_are_not_blamed(entries):
    step = toy(lambda x: np.maximum(x, 0.0), lambda g, out, x: g * np.heaviside(raw(x), 0.25) * factor)
    x = np.asarray(normal(Key(9), (entries,)))
    x[3] = 0.0
    factor = np.ones(entries)
    with pytest.raises(UndecidedError, match=r"1 of its entries, the first \[3\], stands on a kink"):
        mv.check_grads(step, [x], order=1)
    x[entries - 1], factor[entries - 1] = 1.0, 1.5
    with pytest.raises(GradientError, match=rf"worst entry \[{entries - 1}\]: "):
        mv.check_grads(step, [x], order=1)


def test_a_frozen_parameter_is_left_out():
    layer = mv.nn.Linear(3, 2).to(np.float64)
    layer.bias.requires_grad = False
    report = mv.check_module(layer, np.ones((2, 3)))
    assert [c.name for c in report.checks] == ["weight"] and report.frozen == ["bias"]
    assert str(report).endswith("\n  frozen, and not checked: bias")
    layer.weight.requires_grad = False
    with pytest.raises(GraphError, match="no parameter requires"):
        mv.check_module(layer, np.ones((2, 3)))


def test_a_function_that_returns_no_tensor():
    with pytest.raises(GraphError, match="returned float"):
        mv.check_grads(lambda x: 3.0, [np.ones(3)])


# ---- scales ----------------------------------------------------------------------------------------------------------


def toy(forward: Any, gradient: Any, save: tuple[str, ...] = ("x",)) -> Op:
    """Return ``forward``, an operation of one argument, with this gradient."""

    @op(save=save)
    def toy(x: Array) -> Array:
        return forward(x)

    toy.vjps(gradient)
    return toy


def modulus(factor: float) -> Op:
    """Return |x|, by a function that is not analytic, with a gradient times ``factor``."""
    return toy(np.abs, lambda g, out, x: g * np.sign(raw(x)) * factor)


def norm(factor: float) -> Op:
    """Return ‖x‖, by a function that is not analytic, with a gradient times ``factor``."""
    return toy(lambda x: np.sqrt(np.sum(np.abs(x) ** 2)), lambda g, out, x: g * x / out * factor, ("x", "out"))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_small_gradients_of_a_function_that_is_not_analytic(scale):
    w = scale * normal(Key(5), (128, 128))
    report = mv.check_grads(lambda w: modulus(1.0)(w).mean() * 1e-4, [w], order=1)
    assert report.checks[0].method == "central" and report.worst.error < 1e-8
    for factor in (0.0, 1.001, 2.0):  # with 0, the complex step says the same as the wrong gradient
        with pytest.raises(GradientError, match="the central step"):
            mv.check_grads(lambda w, f=factor: modulus(f)(w).mean() * 1e-4, [w], order=1)


@pytest.mark.parametrize("scale", [1e-100, 1e-9, 1e-3, 1.0, 1e6, 1e100])
@pytest.mark.parametrize("method", ["auto", "central"])
def test_steps_follow_the_size_of_the_argument(scale, method):
    report = mv.check_grads(norm(1.0), [X * scale], method=method)
    assert report.passed and report.worst.method == "central"
    with pytest.raises(GradientError, match="wrong gradient of order 1"):
        mv.check_grads(norm(1.00001), [X * scale], method=method)


@pytest.mark.parametrize("beside", [1e6, 1e14, 1e15])
@pytest.mark.parametrize("method", ["auto", "complex"])
def test_a_wrong_gradient_is_not_drowned_by_a_large_argument_beside_it(beside, method):
    double = toy(lambda x: x + 0.0, lambda g, out, x: 2.0 * g)
    with pytest.raises(GradientError, match="wrong gradient of order 1 for x"):
        mv.check_grads(lambda x, y: double(x) + y, [X, beside * X], order=1, method=method)
    with pytest.raises(GradientError, match="wrong gradient of order 1 for x"):  # and where others cannot be tried
        mv.check_grads(lambda x, y: double(x) + ops.sqrt(y), [X, np.abs(beside**2 * X)], order=1, method=method)


@pytest.mark.parametrize("beside", [1.0, 1e6, 1e12])
def test_a_function_that_is_not_analytic_is_not_hidden_by_a_large_argument_beside_it(beside):
    wrong = toy(lambda x: x * np.abs(x), lambda g, out, x: g * ops.abs(x))  # just what a complex step says
    with pytest.raises((GradientError, UndecidedError)):
        mv.check_grads(lambda x, y: wrong(x).sum() + (y * y).sum(), [X, beside * X], order=1)


@pytest.mark.parametrize("beside", [1e-3, 1e-14, 1e-20])
def test_a_wrong_second_order_is_not_drowned_by_a_small_argument_beside_it(beside):
    twice = toy(lambda x: 2.0 * x, lambda g, out, x: 3.0 * g)
    square = toy(lambda x: x * x, lambda g, out, x: g * twice(x), ("x",))
    with pytest.raises(GradientError, match="wrong gradient of order 2 for x"):
        mv.check_grads(lambda x, y: square(x) + y, [X, beside * X])


def test_steps_follow_the_size_of_each_entry():
    x = np.concatenate([X[0] * 1e6, X[1] * 1e-3, X[2] * 1e-9])
    assert mv.check_grads(norm(1.0), [x]).passed and mv.check_grads(norm(1.0), [x], method="central").passed
    assert mv.check_grads(ops.log, [np.abs(x)], method="central").passed

    def square(factor: float) -> Op:
        return toy(lambda x: x * x, lambda g, out, x: g * x * 2.0 * np.where(np.abs(raw(x)) < 1e-2, factor, 1.0))

    assert mv.check_grads(square(1.0), [x], order=1, method="central").passed
    with pytest.raises(GradientError, match=r"worst entry \[[4-7]\]|worst entry \[\d+\]"):
        mv.check_grads(square(1.01), [x], order=1, method="central")  # 10⁻¹⁸ of the whole derivative
    with pytest.raises(GradientError):
        mv.check_grads(square(1.01), [x], order=1)


@pytest.mark.parametrize("method", ["auto", "central"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e12])
def test_an_error_is_relative_to_the_gradient(size, method):
    def cube(factor: float) -> Op:
        return toy(lambda x: x * x * x * size, lambda g, out, x: g * x * x * (3.0 * size * factor))

    assert mv.check_grads(cube(1.0), [X], method=method).passed
    for factor in (0.0, 1.00001, 2.0):
        with pytest.raises(GradientError, match="wrong gradient of order 1"):
            mv.check_grads(cube(factor), [X], method=method)


def saturated(factor: float) -> Op:
    """Return tanh(x), x > 0, with a gradient times ``factor`` that is right even where it is tiny."""
    return toy(np.tanh, lambda g, out, x: g * 4.0 * factor * ops.exp(-2.0 * x) / (1.0 + ops.exp(-2.0 * x)) ** 2.0)


@pytest.mark.parametrize("at", [10.0, 12.0, 15.0])  # derivatives from 10⁻⁸ to 10⁻¹³, of numbers of size 1
def test_tiny_beside_the_function_the_complex_step_still_decides(at):
    x = np.array([at, at + 0.1])
    assert mv.check_grads(saturated(1.0), [x], order=1).worst.method == "complex"
    for factor in (0.0, 1.1, 2.0):
        with pytest.raises(GradientError, match="the complex step"):
            mv.check_grads(saturated(factor), [x], order=1)


@pytest.mark.parametrize("at", [15.0, 17.5, 25.0, 300.0])
def test_what_is_as_exact_as_rounding_lets_it_be_is_right(at):
    x = np.array([[at, -at, 0.0], [0.0, at, at]])
    for fn in (ops.tanh, ops.softmax, ops.log_softmax, ops.sigmoid):
        mv.check_grads(lambda x, fn=fn: fn(x), [x])
        with pytest.raises(GradientError):  # but of numbers that are not saturated it still sees what is wrong
            mv.check_grads(lambda x, fn=fn: scaled(1.01)(fn(x) + x), [x])


def test_what_a_difference_cannot_decide_neither_passes_nor_is_blamed():
    for at, factor in ((10.0, 1.0), (12.0, 1.0), (15.0, 1.0), (15.0, 1.1), (15.0, 2.0)):
        with pytest.raises(UndecidedError, match=r"rounding alone may make \S+\n  → .*rtol=1e"):
            mv.check_grads(saturated(factor), [np.array([at, at + 0.1])], order=1, method="central")
    for factor in (0.0, 2.0):  # but 10⁻⁸ is seen well enough to refuse these
        with pytest.raises(GradientError):
            mv.check_grads(saturated(factor), [np.array([10.0, 10.1])], order=1, method="central")
    assert mv.check_grads(saturated(1.0), [np.array([10.0, 10.1])], order=1, method="central", rtol=1e-2).passed
    kink = lambda x: ops.maximum(x, 1.0)  # where equal each gets half: that is what central differences give, too
    assert mv.check_grads(kink, [np.ones(3)], order=1).worst.method == "central"
    with pytest.raises(UndecidedError):
        mv.check_grads(kink, [np.ones(3)], order=1, method="complex")


@pytest.mark.parametrize("method", ["auto", "central"])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: ops.softmax(x).sum(-1),  # zero, but for rounding
        lambda x: ops.softmax(x * 200.0).sum(-1),
        lambda x: x - x,
        lambda x: x * 0.0 + 1e9,
        lambda x: ops.var(x * 0.0 + 0.1, -1),
        lambda x: ops.softmax(x.sum(-1, keepdims=True)),
    ],
)
def test_a_gradient_that_is_zero_passes(fn, method):
    for x in (X, np.zeros((3, 4)), np.full((3, 4), 0.1)):
        assert mv.check_grads(fn, [x], method=method).passed


def test_a_kink_where_relu_stands_does_not_matter_to_the_complex_step():
    assert mv.check_grads(ops.relu, [np.maximum(X, 0.0)]).worst.error < 1e-14


def test_a_complex_step_is_not_believed_of_a_function_that_is_not_analytic():
    for factor in (0.0, 1.0):
        with pytest.raises(GradientError, match='it is not analytic\n  → use method="central"'):
            mv.check_grads(modulus(factor), [X], method="complex")


# ---- what is not a wrong gradient ------------------------------------------------------------------------------------


def test_tolerances_can_be_given():
    off = scaled(1.0001)
    for method in ("complex", "central"):
        report = mv.check_grads(off, [X], method=method, order=1, rtol=1e-3)
        assert report.passed and report.worst.tolerance == 1e-3 and 1e-6 < report.worst.error < 1e-3
        with pytest.raises(GradientError, match="allowed 1e-06"):
            mv.check_grads(off, [X], method=method, rtol=1e-6)
        assert mv.check_grads(off, [X], method=method, order=1, atol=1.0).passed
        with pytest.raises(GradientError):
            mv.check_grads(off, [X], method=method, order=1, atol=1e-8)
    for wrong in ({"rtol": -1.0}, {"atol": np.nan}, {"rtol": np.inf}):
        with pytest.raises(ConfigError, match="a number from 0 up"):
            mv.check_grads(off, [X], **wrong)
    module = Affine(np.float64)
    module.wrong = 1.001
    assert mv.check_module(module, X, rtol=1e-2).passed and mv.check_module(module, X, atol=1.0).passed


def test_what_changes_from_call_to_call_is_not_a_wrong_gradient():
    calls: list[int] = []

    def drawn(x: mv.Tensor) -> mv.Tensor:
        calls.append(0)
        return ops.dropout(x, 0.5, Key(len(calls)))

    def later(x: mv.Tensor) -> mv.Tensor:
        calls.append(0)
        return x * (1.0 if len(calls) < 5 else 1.5)

    for fn in (drawn, later, lambda x: x * float(calls.append(0) or len(calls))):
        calls.clear()
        with pytest.raises(ConfigError, match=r"another result each time.*\n  → take the randomness out"):
            mv.check_grads(fn, [X])
    layer = mv.nn.Dropout(0.5)
    with pytest.raises(ConfigError, match=r"module\.eval\(\)"):
        mv.check_grads(lambda x: layer(x), [X])


def test_nan_and_infinity_are_named():
    bad = X.copy()
    bad[1, 2] = np.nan
    for fn, x, said in (
        (ops.tanh, bad, r"the argument x has 1 of 12 entries that are NaN or infinite, the first at \[1, 2\]: nan"),
        (lambda x: ops.log(x), X, r"the output of the function to check has \d of 12 .*: nan"),
        (lambda x: ops.exp(x * 1e3 + 1e3), X, r"the output of the function to check has \d+ of 12 .*: inf"),
        (scaled(np.nan), X, r"finite, but its gradient of order 1 for x has 12 of 12 .*\[0, 0\]: nan"),
        (ops.sqrt, np.zeros(3), r"finite, but its gradient of order 1 for x has 3 of 3 .*inf"),
    ):
        with pytest.raises(NonFiniteError, match=said):
            mv.check_grads(fn, [x])
    with pytest.raises(NonFiniteError, match="not around x"):
        mv.check_grads(toy(lambda x: np.where(x == 1.0, x, np.nan), lambda g, out, x: g), [np.ones(3)], order=1)


def _in_place(g: Any, out: Any, x: Any) -> Any:
    sine = x.copy()
    sine[...] = np.sin(sine)
    return g * -sine


@pytest.mark.parametrize(
    "gradient",
    [
        lambda g, out, x: -g * np.sin(x),
        lambda g, out, x: np.where(x > 9.0, 0.0, -g * ops.sin(x)),
        lambda g, out, x: np.multiply(np.asarray(g), -np.sin(np.asarray(x))),
        _in_place,
    ],
)
def test_a_gradient_written_in_numpy_has_order_1(gradient):
    cosine = toy(np.cos, gradient)
    assert mv.check_grads(cosine, [X], order=1).passed
    with pytest.raises(GraphError, match=r"the gradient of toy cannot itself .* order 1: (.|\n)*order=1"):
        mv.check_grads(cosine, [X])
    x = mv.tensor(X, requires_grad=True)
    with pytest.raises(GraphError, match="toy"):
        mv.grad(cosine(x).sum(), [x], create_graph=True)


@pytest.mark.parametrize("scale", [1.0, 3e3])
def test_what_is_not_analytic_in_one_argument_does_not_hide_behind_another(scale):
    @op()
    def odd(x: Array) -> Array:  # to a complex step its derivative is 0.99, and so says its gradient
        return x.real + 0.99j * x.imag if x.dtype.kind == "c" else x.copy()

    odd.vjps(lambda g, out, x: g * 0.99)

    def fn(large: mv.Tensor, small: mv.Tensor, other: mv.Tensor) -> mv.Tensor:
        return ops.exp(large) * scale + odd(small) + ops.sin(other)

    with pytest.raises(GradientError, match=r"(?s)wrong gradient of order 1 for small .* the central step"):
        mv.check_grads(fn, [X, X + 1.0, X - 1.0])


def test_one_difference_confirms_the_complex_steps_of_all_arguments():
    calls: list[str] = []

    def fn(*xs: mv.Tensor) -> mv.Tensor:
        calls.append("complex" if any(x.dtype.kind == "c" for x in xs) else "real")
        return functools.reduce(ops.mul, xs)

    def count(n: int) -> tuple[int, int]:
        calls.clear()
        assert mv.check_grads(fn, [X + 3.0 + i for i in range(n)], order=1).passed
        return calls.count("complex"), calls.count("real")

    (few, before), (many, after) = count(2), count(9)
    assert (few, many) == (2, 9) and before == after


def test_the_traceback_under_pytest_ends_at_the_line_that_called_the_check(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import numpy as np\nimport minivit as mv\nfrom minivit.autograd.op import op\n"
        "from minivit.backend import Array\n"
        "@op(save=('x',))\ndef mine(x: Array) -> Array:\n    return np.cos(x)\n"
        "mine.vjps(lambda g, out, x: g * FACTOR * np.sin(x))\nFACTOR = 1.0\n"
        "def test_wrong():\n    mv.check_grads(mine, [np.ones(3)])\n"
        "def test_numpy():\n    global FACTOR\n    FACTOR = -1.0\n    mv.check_grads(mine, [np.ones(3)])\n"
        "def test_nan():\n    mv.check_grads(mine, [np.full(3, np.nan)])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_mine.py")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment(), check=False).stdout
    assert "3 failed" in out
    places = re.findall(r"^(\S+\.py):(\d+):", out, re.MULTILINE)
    assert [(name, int(line)) for name, line in places if name == "test_mine.py"]
    inner = ("check.py", "judge.py", "locate.py", "orders.py", "derivative.py", "graph.py", "tensor.py")
    assert not [name for name, _ in places if name.endswith(inner)], out


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(mv.__file__).parents[1])}


@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (ops.sigmoid, np.array([30.0, -30.0, 31.0])),  # 1 - sigmoid(x) swallows small steps
        (ops.softmax, np.array([[30.0, 0.0, -30.0], [33.0, 0.0, 1.0]])),
        (lambda x: (x + 1e8) - 1e8, X),
        (ops.sigmoid, 1e-24 * X),  # too small to be seen beside 0.5
        (lambda x: ops.maximum(x, 0.0), np.array([0.0, 1.0, -1.0])),  # a kink, where the gradient is the mean of both
        (ops.abs, np.array([0.0, 1.0, -1.0])),
        (lambda x: ops.sigmoid(ops.sigmoid(ops.maximum(x, 0.0))), 1e-5 * X),
    ],
)
def test_neither_swallowed_steps_nor_kinks_are_blamed_on_a_right_gradient(fn, x):
    assert mv.check_grads(fn, [x]).passed


@pytest.mark.parametrize(("scale", "factor"), [(1e-6, 1.0 + 1e-9), (1e-12, 1.01)])
def test_small_arguments_do_not_hide_a_wrong_gradient(scale, factor):
    @op(save=("out",))
    def exp(x: Array) -> Array:
        return np.exp(x)

    exp.vjps(lambda g, out, x: g * out * factor)
    with pytest.raises(GradientError, match="wrong gradient of order 1"):
        mv.check_grads(exp, [scale * X])
