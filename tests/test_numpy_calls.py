"""NumPy's functions and a Tensor: operators record, all else raises where it would cut the graph, and names a way."""

from __future__ import annotations

import inspect
from collections import deque
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.errors import DTypeError, GraphError
from minivit.ops.numpy_calls import EQUIVALENTS, READ_NO_VALUES

ARRAY = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def recorded() -> mv.Tensor:
    return mv.tensor(ARRAY.copy(), requires_grad=True) * 2.0


def functions() -> dict[str, Any]:
    """Return every function that follows NumPy's array-function protocol, by its name."""
    found = {}
    for module in (np, np.linalg, np.fft, np.ma, np.random, np.lib.stride_tricks, np.lib.scimath):
        for name, function in vars(module).items():
            if type(function).__name__ == "_ArrayFunctionDispatcher":
                found[f"{module.__name__}.{name}"] = function
    return found


def required(function: Any) -> int:
    """Return how many arguments a function must have; 1 for those written in C, which do not tell."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        return 1
    return max(
        1, sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    )


@pytest.mark.parametrize("name", sorted(functions()))
def test_no_numpy_function_cuts_the_graph(name):
    function, x = functions()[name], recorded()
    outcome: Any = None
    for number in range(required(function), 5):
        try:
            outcome = function(*[x] * number)
            break
        except GraphError as error:
            outcome = error
            break
        except TypeError:  # too few arguments
            continue
    if function in READ_NO_VALUES:
        assert not isinstance(outcome, mv.Tensor | Exception | None)
    else:
        assert isinstance(outcome, GraphError) and "detach()" in str(outcome)


def test_the_protocol_is_really_covered():
    names = set(functions())
    assert len(names) > 200 and {"numpy.where", "numpy.concatenate", "numpy.dot", "numpy.linalg.norm"} <= names


@pytest.mark.parametrize(
    ("call", "use"),
    [
        (lambda x: np.where(ARRAY > 0, x, 0.0), "mv.ops.where"),
        (lambda x: np.concatenate([ARRAY, x]), "mv.ops.concat"),
        (lambda x: np.stack((x, x)), "mv.ops.stack"),
        (lambda x: np.dot(ARRAY.T, x), "mv.ops.matmul"),
        (lambda x: np.linalg.matmul(ARRAY.T, x), "mv.ops.matmul"),
        (lambda x: np.sum(x), "mv.ops.sum"),
        (lambda x: np.exp(x), "mv.ops.exp"),
        (lambda x: np.maximum(x, 0.0), "mv.ops.maximum"),
        (lambda x: np.linalg.norm(x), "operations of mv.ops"),
        (lambda x: np.block([[ARRAY, x]]), "operations of mv.ops"),
        (lambda x: np.add.reduce(x), "operations of mv.ops"),
        (lambda x: np.argmax(x, axis=1), "x.numpy()"),
        (lambda x: np.asarray(x), "mv.ops"),
        (lambda x: np.array([x, x]), "mv.ops.stack"),
        (lambda x: np.float32(x), "detach()"),
        (lambda x: mv.tensor([x, x]), "mv.ops.stack"),
        (lambda x: mv.tensor(x, dtype=np.float32), "x.to("),
        (lambda x: np.testing.assert_allclose(x, ARRAY), "x.numpy()"),
        (lambda x: np.copyto(ARRAY.copy(), x), "detach()"),
        (lambda x: ARRAY.copy().__setitem__(..., x), "detach()"),
        (lambda x: ARRAY.copy().__iadd__(x), "mv.ops.add"),
        (lambda x: np.add(ARRAY, x, out=ARRAY.copy()), "mv.ops.add"),
        (lambda x: np.add(ARRAY, ARRAY, out=x), "mv.ops.add"),
        (lambda x: ARRAY.dot(x), "detach()"),
        (lambda x: ARRAY // x, "operations of mv.ops"),
    ],
)  # fmt: skip
def test_the_error_names_what_to_use(call, use):
    with pytest.raises(GraphError) as caught:
        call(recorded())
    assert use in str(caught.value).split("→")[1] and "gra" in str(caught.value).split("→")[0]


def test_equivalents_exist():
    assert {name for name in EQUIVALENTS.values() if not callable(getattr(ops, name, None))} == set()
    shared = {name for name in ops.__all__ if hasattr(np, name)}
    assert shared <= EQUIVALENTS.keys()


@pytest.mark.parametrize("number", [np.float64(2), np.float32(2), np.int64(2), np.array(2.0)])
def test_operators_with_numpy_on_the_left_record(number):
    x = mv.tensor(ARRAY.copy(), requires_grad=True)
    for fn, slope in [
        (lambda: number + x, 1.0), (lambda: number - x, -1.0), (lambda: number * x, 2.0),
        (lambda: number / x, -2.0 / ARRAY**2), (lambda: number**x, 2.0**ARRAY * np.log(2.0)),
        (lambda: np.add(number, x), 1.0), (lambda: np.multiply(x, number), 2.0),
    ]:  # fmt: skip
        y = fn()
        assert isinstance(y, mv.Tensor)
        x.grad = None
        y.backward(np.ones_like(ARRAY))
        np.testing.assert_allclose(x.grad, np.broadcast_to(slope, x.shape), rtol=1e-14)
    product = ARRAY.T @ x
    assert isinstance(product, mv.Tensor) and product.requires_grad
    for less in (number < x, np.less(number, x)):
        np.testing.assert_array_equal(less, float(number) < ARRAY)
    np.testing.assert_array_equal(np.equal(ARRAY, x), np.ones((2, 3), bool))
    assert ARRAY.__eq__(x).all()


def test_without_a_graph_a_tensor_is_an_array():
    x = mv.tensor(ARRAY)
    for plain in (np.asarray(x), np.where(ARRAY > 0, x, 0.0), np.concatenate([x[:1], x[1:]]), np.add(x, 0.0, out=None)):
        np.testing.assert_array_equal(mv.ops.add(plain, 0.0) if isinstance(plain, mv.Tensor) else plain, ARRAY)
    np.testing.assert_array_equal(np.exp(x), np.exp(ARRAY))
    np.testing.assert_array_equal(np.add.reduce(x, axis=1), ARRAY.sum(axis=1))
    assert np.sum(x, axis=None) == 21.0 and np.linalg.norm(x) == np.linalg.norm(ARRAY)
    total = np.zeros((2, 3))
    total += x
    np.testing.assert_array_equal(total, ARRAY)


def test_under_no_grad_nothing_is_cut():
    x = mv.tensor(ARRAY, requires_grad=True)
    with mv.no_grad():
        np.testing.assert_array_equal(np.exp(x), np.exp(ARRAY))
        np.testing.assert_array_equal(np.asarray(x), ARRAY)
        assert mv.tensor(x).data is ARRAY
    with pytest.raises(GraphError):
        np.exp(x)


def test_shapes_and_single_numbers_can_be_asked_for():
    x = recorded()
    assert (np.shape(x), np.ndim(x), np.size(x)) == ((2, 3), 2, 6)
    assert np.result_type(x, np.float32) == np.float64
    np.testing.assert_array_equal(np.zeros_like(x), np.zeros((2, 3)))
    one = x[0, 0]
    assert (float(one), int(one), bool(one), one.item()) == (2.0, 2, True, 2.0)
    np.testing.assert_array_equal(x.numpy(), 2.0 * ARRAY)


def test_tensors_hidden_in_other_containers_are_refused():
    with pytest.raises(DTypeError, match="no list\n  → give a list"):
        np.concatenate(deque([recorded(), recorded()]))


def test_cupy_leaves_its_operators_to_the_tensor(strict_cupy):
    x = mv.tensor(strict_cupy.asarray(ARRAY), requires_grad=True)
    a = strict_cupy.asarray(ARRAY)
    for y in (a + x, a * x, a - x, a / x, a @ x.T):
        assert isinstance(y, mv.Tensor) and y.requires_grad and y.device == "cuda:0"
    with pytest.raises(GraphError, match="detach"):
        strict_cupy.asarray(x)
