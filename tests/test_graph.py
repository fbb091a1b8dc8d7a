"""The engine: recording, the walk back, freeing, second order, threads, and errors that say what to do."""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import os
import pickle
import random
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.autograd.graph import first_order, propagate
from minivit.autograd.needs import Slot, SoFar
from minivit.autograd.op import OPS, op
from minivit.backend import Array, Key, normal, to_device, to_numpy
from minivit.errors import ConfigError, DTypeError, GraphError, ShapeError


def leaf(*shape: int, seed: int = 0, dtype: Any = np.float64) -> mv.Tensor:
    return mv.tensor(np.asarray(normal(Key(seed), shape)).astype(dtype), requires_grad=True)


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


# ---- the walk --------------------------------------------------------------------------------------------------------


def test_a_diamond_is_walked_once_per_node():
    x = y = leaf(2)
    start = time.perf_counter()
    for _ in range(60):
        y = y + y  # 2⁶⁰ paths
    y.backward(np.ones(2))
    np.testing.assert_array_equal(x.grad, [2.0**60] * 2)
    assert time.perf_counter() - start < 60  # by paths it would take centuries


def test_gradients_of_all_uses_add_up():
    x = leaf(3)
    y = x * 2.0
    z = y * x + ops.exp(y) + y
    z.backward(np.ones(3))
    np.testing.assert_allclose(x.grad, 4 * x.data + 2 * np.exp(2 * x.data) + 2, rtol=1e-14)


def test_a_node_waits_for_all_its_uses():
    x = leaf()
    a = x * 3.0
    b = ops.sin(a)
    c = b * a  # a is used early and late
    (c * c + a).backward()
    d = 3 * x.data
    np.testing.assert_allclose(x.grad, 3 * (2 * np.sin(d) * d * (np.cos(d) * d + np.sin(d)) + 1), rtol=1e-13)


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_deep_graphs_work_and_are_freed(depth, no_collector):
    x = y = leaf(1)
    for _ in range(depth):
        y = y + 1.0
    last = weakref.ref(y.node)
    y.backward(np.ones(1))
    np.testing.assert_array_equal(x.grad, [1.0])
    del y
    assert last() is None


def test_a_deep_graph_is_freed_without_a_backward(no_collector):
    x = y = leaf(1)
    for _ in range(5_000):
        y = y + x
    last = weakref.ref(y.node)
    del y
    assert last() is None


# ---- freeing ---------------------------------------------------------------------------------------------------------


def test_the_graph_is_freed_by_reference_counts(toys, no_collector):
    arrays: list[weakref.ref] = []

    @op(save=("x", "out"))
    def watched(x: Array) -> Array:
        arrays.append(weakref.ref(out := np.tanh(x)))
        return out

    watched.vjps(lambda g, out, x: g * (1.0 - out * out))
    y = watched(watched(leaf(4, 3)) * 2.0)
    loss = ops.softmax(y).sum()
    nodes = [weakref.ref(y.node), weakref.ref(loss.node)]
    del y
    assert all(r() is not None for r in arrays + nodes)
    loss.backward()  # drops the arrays while the loss is still there …
    assert all(r() is None for r in arrays)
    del loss  # … and the nodes with it
    assert all(r() is None for r in nodes)


def test_what_a_twin_keeps_is_freed(no_collector):
    with mv.first_order():
        y = ops.gelu(leaf(4, 3))
    (derivative,) = y.node.args
    kept = weakref.ref(derivative)
    del derivative
    y.backward(np.ones((4, 3)))
    assert kept() is None


def test_a_graph_that_nobody_walks_is_freed_too(no_collector):
    y = ops.gelu(leaf(4) * 2.0)
    node = weakref.ref(y.node)
    del y
    assert node() is None


def test_second_order_leaves_nothing_behind(no_collector):
    x = leaf(4)
    y = ops.tanh(x).sum()
    (g,) = mv.grad(y, [x], create_graph=True)
    nodes = [weakref.ref(y.node), weakref.ref(g.node)]
    mv.grad((g * g).sum(), [x])
    del y, g
    assert all(r() is None for r in nodes)


def test_a_dead_leaf_gets_no_gradient():
    x = leaf(3)
    y = x * leaf(3, seed=1)
    y.backward(np.ones(3))
    assert x.grad is not None


# ---- a second backward -----------------------------------------------------------------------------------------------

FREED = r"backward reached a result of \w+ whose graph is already freed\n  → run the forward pass again"


def test_a_second_backward_says_what_to_do():
    x = leaf(3)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(GraphError, match=FREED):
        y.backward()


def test_a_second_grad_does_not_give_zeros():
    x = leaf(3)
    y = (x * x).sum()
    mv.grad(y, [x])
    with pytest.raises(GraphError, match=FREED):
        mv.grad(y, [x])


@pytest.mark.parametrize("again", [lambda loss, x: loss.backward(), lambda loss, x: mv.grad(loss, [x])])
def test_a_shared_part_that_is_freed_is_noticed(again):
    x = leaf(3)
    shared = ops.exp(x)
    first, second = (shared * 2.0).sum(), (shared * 3.0).sum()
    first.backward()
    with pytest.raises(GraphError, match=FREED):
        again(second, x)


def test_losses_added_up_need_one_backward():
    x = leaf(3)
    shared = ops.exp(x)
    ((shared * 2.0).sum() + (shared * 3.0).sum()).backward()
    np.testing.assert_allclose(x.grad, 5 * np.exp(x.data), rtol=1e-14)


def test_create_graph_keeps_the_graph():
    x = leaf(3)
    y = (x * x * x).sum()
    (g,) = mv.grad(y, [x], create_graph=True)
    (again,) = mv.grad(y, [x], create_graph=True)
    np.testing.assert_array_equal(g.data, again.data)
    y.backward()
    np.testing.assert_allclose(x.grad, 3 * x.data**2, rtol=1e-14)


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_no_grad_records_nothing():
    x = leaf(3)

    @mv.no_grad()
    def decorated() -> mv.Tensor:
        return x * 2.0

    with mv.no_grad():
        inside = x * 2.0
        with mv.no_grad():
            pass
        assert not (x * 2.0).requires_grad  # the inner block has not switched it on
    for y in (inside, decorated()):
        assert not y.requires_grad and y.is_leaf
    assert (x * 2.0).requires_grad
    with pytest.raises(RuntimeError, match="stop"), mv.no_grad():
        raise RuntimeError("stop")
    assert (x * 2.0).requires_grad
    with mv.no_grad(), pytest.raises(GraphError, match="computed under no_grad"):
        (x * 2.0).sum().backward()


def test_each_thread_records_for_itself():
    x = leaf(3)
    entered, checked = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def silent() -> None:
        with mv.no_grad(), mv.first_order():
            entered.set()
            checked.wait(10)
            seen["silent"] = (x * 2.0).requires_grad

    thread = threading.Thread(target=silent)
    thread.start()
    assert entered.wait(10)
    y = (ops.softmax(x) * 2.0).sum()
    seen["here"] = y.requires_grad
    mv.grad(y, [x], create_graph=True)
    checked.set()
    thread.join()
    assert seen == {"silent": False, "here": True}


def test_threads_run_backward_side_by_side():
    weight = leaf(5, 5, seed=9)
    results: dict[int, np.ndarray] = {}

    def shard(i: int) -> None:
        for _ in range(20):
            (results[i],) = [g.data for g in mv.grad((leaf(3, 5, seed=i) @ weight).sum(), [weight])]

    threads = [threading.Thread(target=shard, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, g in results.items():
        np.testing.assert_array_equal(g, mv.grad((leaf(3, 5, seed=i) @ weight).sum(), [weight])[0].data)


class Slow(np.ndarray):
    """An array whose in-place sum reads, lets other threads run, and writes."""

    def __iadd__(self, other: Any) -> Slow:  # type: ignore[override]
        read = np.array(self)
        time.sleep(0.05)
        self[...] = read + other
        return self


def test_threads_that_share_a_leaf_lose_no_gradient():
    x = leaf(3)
    x.grad = np.zeros(3).view(Slow)
    losses = [(x * float(i)).sum() for i in range(1, 5)]
    threads = [threading.Thread(target=loss.backward) for loss in losses]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    np.testing.assert_array_equal(x.grad, [10.0] * 3)


def test_the_first_gradients_of_threads_add_up():
    start = threading.Barrier(4)

    def work(loss: mv.Tensor) -> None:
        start.wait(10)
        loss.backward()

    for _ in range(20):
        x = mv.tensor(np.ones(300_000, np.float32), requires_grad=True)
        threads = [threading.Thread(target=work, args=((x * 1.0).sum(),)) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert (x.grad == 4.0).all()


@pytest.mark.parametrize("first_order", [False, True])
def test_a_node_that_another_thread_frees_meanwhile_is_noticed(monkeypatch, first_order):
    x = leaf(3)
    with mv.first_order() if first_order else contextlib.nullcontext():
        y = ops.softmax(x)
    gradient = y.node.op.gradient  # the operation's, or its twin's

    def late(node: Any, *rest: Any) -> Any:
        node.free()  # what another thread's walk does between this walk's look at the node and its reading of it
        return gradient(node, *rest)

    monkeypatch.setattr(y.node.op, "gradient", late)
    with pytest.raises(GraphError, match=FREED):
        y.backward(np.ones(3))
    assert x.grad is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12: it forks with threads running
def test_a_child_forked_while_gradients_are_added_does_not_hang():
    x = leaf(3)
    x.grad = np.zeros(3).view(Slow)
    thread = threading.Thread(target=(x * 2.0).sum().backward)
    thread.start()
    time.sleep(0.01)  # it is in the sum now
    if (child := os.fork()) == 0:
        y = leaf(2)
        (y * 3.0).sum().backward()
        os._exit(0 if (y.grad == 3.0).all() else 1)
    deadline = time.monotonic() + 20
    while (state := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join()
    if state == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert state == (child, 0)


def test_frozen_inputs_cost_nothing():
    x, frozen = leaf(3), mv.tensor(np.ones(3))
    y = x * frozen + frozen * frozen
    assert not (frozen * frozen).requires_grad
    y.backward(np.ones(3))
    assert frozen.grad is None
    np.testing.assert_array_equal(x.grad, np.ones(3))


# ---- arrays, numbers, dtypes -----------------------------------------------------------------------------------------


def test_arrays_and_numbers_mix_in_as_constants():
    array = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    x = leaf(3)
    for result, expected in [(array + x, array + x.data), (array @ x, array @ x.data), (array / x, array / x.data)]:
        assert isinstance(result, mv.Tensor) and result.requires_grad
        np.testing.assert_allclose(result.data, expected, rtol=1e-15)
    (array * x).backward(np.ones((2, 3)))
    np.testing.assert_array_equal(x.grad, [5.0, 7.0, 9.0])


@pytest.mark.parametrize("number", [2, 2.0, True, np.float64(2), np.float32(2), np.int64(2)])
def test_numbers_keep_float32(number):
    x = leaf(3, dtype=np.float32)
    for y in (x + number, number + x, number * x, x / number, number - x, ops.exp(x) ** number, ops.maximum(x, number)):
        assert y.dtype == np.float32
        x.grad = None
        y.backward(np.ones(3, np.float32))
        assert x.grad.dtype == np.float32


def test_broadcasting_both_ways():
    a, b = leaf(4, 1, 3), leaf(5, 1, seed=1)
    (a * b).backward(np.ones((4, 5, 3)))
    np.testing.assert_allclose(a.grad, np.full((4, 1, 3), b.data.sum()), rtol=1e-13)
    np.testing.assert_allclose(b.grad, np.full((5, 1), a.data.sum()), rtol=1e-13)


def test_mixed_dtypes_name_the_operation_and_both_sides():
    with pytest.raises(DTypeError, match=r"mul: float64\(3,\) and float32\(2, 3\) have different dtypes\n  → convert"):
        leaf(3) * np.ones((2, 3), np.float32)
    with pytest.raises(ShapeError, match=r"add\(float64\(3,\), float64\(4,\)\): .*broadcast.*\n  → check the shapes"):
        leaf(3) + leaf(4)


def test_tensors_of_everything():
    assert mv.tensor([1.0, 2.0]).dtype == mv.tensor(3.5).dtype == np.float32
    assert mv.tensor([1, 2]).dtype == np.int64 and mv.tensor([True]).dtype == bool
    assert mv.tensor(np.float64(2)).dtype == np.float64
    array = np.ones((2, 3))
    assert mv.tensor(array).data is array and mv.tensor(mv.tensor(array)).data is array
    x = mv.tensor(array, dtype=np.float32, device="cpu")
    assert (x.shape, x.ndim, x.size, x.dtype, x.device, len(x)) == ((2, 3), 2, 6, np.float32, "cpu", 2)
    assert x.numpy() is x.data and x.to("cpu").data is x.data
    assert bool(mv.tensor(1.0)) and float(mv.tensor(2.5)) == mv.tensor([[2.5]]).item() == 2.5
    with pytest.raises(ShapeError, match="item"):
        x.item()
    assert repr(mv.tensor([1.0, 2.0])) == "Tensor([1., 2.])"
    assert repr(leaf() * 0.0 + 1.0) == "Tensor(1., from add)"
    assert repr(mv.tensor(1.0, requires_grad=True)) == "Tensor(1., requires_grad=True)"
    with pytest.raises(DTypeError):
        mv.tensor(["text"])


def test_tensors_compare_elementwise_and_hash_by_identity():
    x, y = mv.tensor([1.0, 2.0]), mv.tensor([1.0, 3.0])
    np.testing.assert_array_equal(x == y, [True, False])
    np.testing.assert_array_equal(x != y, [False, True])
    assert not np.any(x == None)  # noqa: E711
    twin = x.detach()
    assert len({x, y, twin}) == 3 and {x: "x", twin: "twin"}[x] == "x"
    parameter = mv.nn.Parameter(np.ones(2))
    assert {parameter: 1}[parameter] == 1


def test_detach_to_and_astype():
    x = leaf(3)
    y = x * 2.0
    cut = y.detach()
    assert cut.data is y.data and not cut.requires_grad and cut.is_leaf and y.requires_grad and not y.is_leaf
    half = y.astype(np.float32)
    assert half.dtype == np.float32 and half.requires_grad
    (half * 3.0).backward(np.ones(3, np.float32))
    np.testing.assert_array_equal(x.grad, [6.0, 6.0, 6.0])
    assert x.grad.dtype == np.float64


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copy_gets_its_own_gradient(copied):
    x = leaf(3)
    x.grad = np.ones(3)
    y = copied(x)
    (y * 2.0).sum().backward()
    np.testing.assert_array_equal(y.grad, [3.0] * 3)
    assert np.shares_memory(x.data, y.data) == (copied is copy.copy)
    assert type(copied(mv.nn.Parameter(np.ones(2)))) is mv.nn.Parameter
    with pytest.raises(GraphError, match=r"\n  → copy x.detach\(\)"):
        copied(x * 2.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_module_learns_by_itself(copied):
    model = mv.nn.Linear(2, 3)
    twin = copied(model)
    twin(np.ones((1, 2), np.float32)).sum().backward()
    assert model.weight.grad is None
    np.testing.assert_array_equal(twin.weight.grad, np.ones((3, 2)))
    np.testing.assert_array_equal(twin.weight.data, model.weight.data)
    assert not np.shares_memory(twin.weight.data, model.weight.data)


def test_requires_grad_is_for_floating_leaves():
    with pytest.raises(DTypeError, match="int64 cannot require a gradient"):
        mv.tensor([1, 2], requires_grad=True)
    y = leaf(3) * 2.0
    with pytest.raises(GraphError, match=r"leaf Tensors only\n  → use detach\(\)"):
        y.requires_grad = False
    x = leaf(3)
    x.requires_grad = False
    assert not (x * 2.0).requires_grad
    x.requires_grad = True
    assert (x * 2.0).requires_grad


# ---- backward and grad -----------------------------------------------------------------------------------------------


def test_grad_fields_add_up_over_backwards():
    x, w = leaf(3), leaf()
    for n in (1, 2, 3):
        (x * 2.0 * w).sum().backward()
        np.testing.assert_allclose(x.grad, np.full(3, n * 2.0 * w.data), rtol=1e-14)
        np.testing.assert_allclose(w.grad, n * 2.0 * x.data.sum(), rtol=1e-14)
        assert isinstance(w.grad, np.ndarray) and w.grad.shape == ()


def test_grad_fields_share_no_memory():
    x, z = leaf(3), leaf(3, seed=1)
    cotangent = np.ones(3)
    (x + z).backward(cotangent)
    x.grad += 5.0
    np.testing.assert_array_equal(z.grad, np.ones(3))
    np.testing.assert_array_equal(cotangent, np.ones(3))
    same = leaf(3)
    gradients = mv.grad(same + z, [same, z], cotangent)
    gradients[0].data[:] = 7.0
    np.testing.assert_array_equal(gradients[1].data, np.ones(3))
    np.testing.assert_array_equal(cotangent, np.ones(3))


def test_backward_on_a_leaf():
    x = leaf(3)
    x.backward(np.array([1.0, 2.0, 3.0]))
    x.backward(2.0 * np.ones(3))
    np.testing.assert_array_equal(x.grad, [3.0, 4.0, 5.0])
    np.testing.assert_array_equal(mv.grad(x, [x], np.ones(3))[0].data, np.ones(3))


def test_grad_leaves_the_fields_alone():
    x, w = leaf(3), leaf(3, seed=1)
    gx, gw = mv.grad((x * w).sum(), [x, w])
    assert x.grad is None and w.grad is None
    np.testing.assert_array_equal(gx.data, w.data)
    np.testing.assert_array_equal(gw.data, x.data)
    assert not gx.requires_grad


UNUSED = r"was not computed from input 1 of shape \(2, 2\)\n  → .* allow_unused=True to get None"


@pytest.mark.parametrize("create_graph", [False, True])
def test_grad_refuses_what_the_output_was_not_computed_from(create_graph):
    x, other = leaf(3), leaf(2, 2)
    with pytest.raises(GraphError, match=UNUSED):
        mv.grad((x * x).sum(), [x, other], create_graph=create_graph)
    gx, nothing = mv.grad((x * x).sum(), [x, other], create_graph=create_graph, allow_unused=True)
    assert nothing is None
    np.testing.assert_array_equal(gx.data, 2 * x.data)
    with pytest.raises(GraphError, match="not computed from input 0"):
        mv.grad(x, [other], np.ones(3))


def test_grad_refuses_the_results_of_another_pass():
    w = leaf(3)
    first, second = ops.exp(w), ops.exp(w)
    with pytest.raises(GraphError, match=r"not computed from input 0 of shape \(3,\)\n  → .*very forward pass"):
        mv.grad(first.sum(), [second])


def test_a_gradient_that_is_zero_stays_zeros():
    x = leaf(3)
    (g,) = mv.grad((x * 0.0).sum(), [x])
    np.testing.assert_array_equal(g.data, np.zeros(3))
    (g,) = mv.grad((leaf(2) * x[:2]).sum() * 0.0, [x], allow_unused=True)
    np.testing.assert_array_equal(g.data, np.zeros(3))


def test_grad_of_results_in_the_middle():
    x = leaf(3)
    h = ops.exp(x)
    k = h * 2.0
    y = (k * h).sum()
    gk, gh, gx = mv.grad(y, [k, h, x])
    np.testing.assert_allclose(gk.data, h.data, rtol=1e-14)
    np.testing.assert_allclose(gh.data, 4 * h.data, rtol=1e-14)
    np.testing.assert_allclose(gx.data, 4 * h.data**2, rtol=1e-14)
    (alone,) = mv.grad((ops.exp(x) * 3.0).sum(), x)  # one input need not be in a list
    np.testing.assert_allclose(alone.data, 3 * h.data, rtol=1e-14)


def test_grad_asked_for_twice():
    x = leaf(3)
    a, b = mv.grad((x * 3.0).sum(), [x, x])
    np.testing.assert_array_equal(a.data, b.data)
    assert not np.shares_memory(a.data, b.data)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x, y: y.backward(), ShapeError, r"shape \(3,\) needs a cotangent of that shape\n  → pass grad="),
        (lambda x, y: y.backward(np.ones(4)), ShapeError, r"cotangent has shape \(4,\), the output \(3,\)"),
        (lambda x, y: y.backward(np.ones((1, 3))), ShapeError, "give equal shapes"),
        (lambda x, y: y.backward(np.ones(3, np.float32)), DTypeError, "cotangent is float32, the output float64"),
        (lambda x, y: mv.grad(y, [x], np.ones(4)), ShapeError, "cotangent"),
        (lambda x, y: mv.grad(y, [mv.tensor(np.ones(3))], np.ones(3)), GraphError, r"input 0 of shape \(3,\) does not"),
        (lambda x, y: mv.tensor(np.ones(1)).backward(), GraphError, "has no graph.*\n  → make an input with requires_"),
        (lambda x, y: y.detach().backward(np.ones(3)), GraphError, "has no graph"),
    ],
)
def test_what_backward_refuses(call, error, words):
    x = leaf(3)
    with pytest.raises(error, match=words):
        call(x, x * 2.0)


def test_cotangents_may_be_lists_and_tensors():
    for cotangent in ([1.0, 2.0, 3.0], np.array([1.0, 2.0, 3.0]), mv.tensor(np.array([1.0, 2.0, 3.0]))):
        x = leaf(3)
        (x * 2.0).backward(cotangent)
        np.testing.assert_array_equal(x.grad, [2.0, 4.0, 6.0])


# ---- second and third order ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "derivatives"),
    [
        (lambda x: x**5, [lambda x: 5 * x**4, lambda x: 20 * x**3, lambda x: 60 * x**2]),
        (lambda x: x * x * x * x * x, [lambda x: 5 * x**4, lambda x: 20 * x**3, lambda x: 60 * x**2]),
        (
            ops.tanh,
            [
                lambda x: 1 - np.tanh(x) ** 2,
                lambda x: -2 * np.tanh(x) * (1 - np.tanh(x) ** 2),
                lambda x: (1 - np.tanh(x) ** 2) * (6 * np.tanh(x) ** 2 - 2),
            ],
        ),
        (lambda x: ops.sin(x), [np.cos, lambda x: -np.sin(x), lambda x: -np.cos(x)]),
    ],
    ids=["x**5", "x·x·x·x·x", "tanh", "sin"],
)
def test_derivatives_up_to_the_third(fn, derivatives):
    x = leaf(7)
    y = fn(x)
    for expected in derivatives:
        (y,) = mv.grad(y.sum(), [x], create_graph=True)
        np.testing.assert_allclose(y.data, expected(x.data), rtol=1e-12, atol=1e-14)


def test_a_hessian_vector_product_is_the_hessian_times_the_vector():
    a = np.asarray(normal(Key(4), (3, 3)))
    x = leaf(3)
    (g,) = mv.grad(ops.exp(a @ x).sum(), [x], create_graph=True)
    v = np.array([1.0, -2.0, 0.5])
    (product,) = mv.grad(g, [x], v)
    np.testing.assert_allclose(product.data, a.T @ np.diag(np.exp(a @ x.data)) @ a @ v, rtol=1e-12)


def test_the_cotangent_can_be_differentiated_too():
    x, c = leaf(3), leaf(3, seed=1)
    (g,) = mv.grad(x * x, [x], c, create_graph=True)
    gx, gc = mv.grad(g, [x, c], np.ones(3))
    np.testing.assert_allclose(gx.data, 2 * c.data, rtol=1e-14)
    np.testing.assert_allclose(gc.data, 2 * x.data, rtol=1e-14)


# ---- what an operation's author can get wrong ------------------------------------------------------------------------


def test_first_order_recording_refuses_create_graph(toys):
    @op(save=("x",))
    def cube(x: Array) -> Array:
        return x * x * x

    cube.vjps(lambda g, out, x: g * 3.0 * x * x)

    @cube.twin("cpu")
    def _(x: np.ndarray) -> Any:
        return x * x * x, 3.0 * x * x

    @cube.twin("cpu").vjp
    def _(g: np.ndarray, kept: Any, needs: Any) -> Any:
        return (g * kept,)

    x = leaf(3)
    with mv.first_order():
        y = cube(x)
    with pytest.raises(GraphError, match=r"cube was recorded for first-order.*\n  → run the forward pass outside"):
        mv.grad(y, [x], np.ones(3), create_graph=True)
    with mv.first_order():
        y = cube(x)
    y.backward(np.ones(3))
    np.testing.assert_allclose(x.grad, 3 * x.data**2, rtol=1e-15)
    with pytest.raises(GraphError, match=FREED):
        y.backward(np.ones(3))


def test_the_kind_of_the_arrays_chooses_the_twin(toys, strict_cupy):
    @op(save=("x",))
    def double(x: Array) -> Array:
        return x * 2.0

    double.vjps(lambda g, out, x: g * 2.0)
    ran: list[str] = []

    def attach(kind: str) -> None:
        @double.twin(kind)
        def _(x: Array) -> Any:
            ran.append(f"forward on {kind}")
            return x * 2.0, None  # keeps nothing

        @double.twin(kind).vjp
        def _(g: Array, kept: Any, needs: Any) -> Any:
            ran.append(f"back on {kind}")
            return (g * 2.0,)

    def what_runs(device: str, recording: Any) -> list[str]:
        ran.clear()
        x = leaf(3).to(device).detach()
        x.requires_grad = True
        with recording:
            y = double(x)
        y.backward(to_device(np.ones(3), device))
        np.testing.assert_array_equal(to_numpy(x.grad), np.full(3, 2.0))
        return list(ran)

    for kind, other in [("cuda", "cpu"), ("cpu", "cuda")]:  # first with one twin, then with both
        before = what_runs(other, mv.first_order())
        attach(kind)
        assert what_runs(other, mv.first_order()) == before
        assert what_runs(kind, mv.first_order()) == [f"forward on {kind}", f"back on {kind}"]
        assert what_runs(kind, contextlib.nullcontext()) == []
    assert repr(double.twin("cpu")) == "<cpu twin of op double>"


def test_a_twin_that_is_not_whole(toys):
    @op()
    def same(x: Array) -> Array:
        return x

    same.vjps(lambda g, out, x: g)
    with pytest.raises(ConfigError, match=r"same: a twin on arrays of kind 'tpu'\n  → the kinds are cpu, cuda"):
        same.twin("tpu")
    assert same.twins == {}  # to ask for one attaches none
    same.twin("cpu")(lambda x: (x * 1.0, ()))
    with mv.first_order():
        y = same(leaf(3))
    with pytest.raises(GraphError, match=r"the cpu twin of same has no gradient\n  → define one with .vjp"):
        y.backward(np.ones(3))


def test_reading_what_was_not_saved_says_so(toys):
    @op()
    def square(x: Array) -> Array:
        return x * x

    square.vjps(lambda g, out, x: g * x.mean() * 2.0)
    with pytest.raises(GraphError, match=r"reads 'mean' of an input of shape \(3,\) .*\n  → name that input in @op"):
        square(leaf(3)).backward(np.ones(3))


def test_an_unsaved_input_has_a_shape_and_a_dtype(toys):
    seen = []

    @op()
    def same(x: Array) -> Array:
        return x + 0.0

    same.vjps(lambda g, out, x: seen.append((x.shape, x.ndim, x.dtype, x.device, out)) or g)
    same(leaf(2, 3)).backward(np.ones((2, 3)))
    assert seen == [((2, 3), 2, np.float64, "cpu", None)]


@pytest.mark.parametrize(
    "wrong", [lambda g: g.T, lambda g: g[0], lambda g: g[None, :1], lambda g: g.astype(np.float32)]
)
def test_a_gradient_of_the_wrong_shape_or_dtype_is_refused(toys, wrong):
    @op()
    def same(x: Array) -> Array:
        return x + 0.0

    same.vjps(lambda g, out, x: wrong(g))
    with pytest.raises(GraphError, match="a gradient of same is float"):
        same(leaf(2, 3)).backward(np.ones((2, 3)))


def test_an_operation_without_a_gradient(toys):
    @op()
    def opaque(x: Array) -> Array:
        return x + 0.0

    with pytest.raises(GraphError, match="opaque has no gradient\n  → detach its input"):
        opaque(leaf(3)).backward(np.ones(3))
    assert opaque(np.ones(3)).sum() == 3


def test_a_wrong_declaration_is_refused(toys):
    with pytest.raises(ConfigError, match=r"save names \['y'\]"):

        @op(save=("y",))
        def square(x: Array) -> Array:
            return x * x


ARRAY = np.asarray(normal(Key(3), (3, 3)))
SETTING = r"{} has no gradient in {}, which is a Tensor that requires one\n  → give {}.detach\(\)"


@pytest.mark.parametrize(
    ("call", "op", "argument"),
    [
        (lambda x: ops.attention(ARRAY, ARRAY, ARRAY, scale=x[0, 0]), "attention", "scale"),
        (lambda x: ops.attention(x, x, x, scale=x[0, 0]), "attention", "scale"),
        (lambda x: ops.clip(x, x[0, 0]), "clip", "low"),
        (lambda x: ops.where(x, ARRAY, 0.0), "where", "condition"),
        (lambda x: ops.dropout(x, x[0, 0], Key(0)), "dropout", "p"),
        (lambda x: ops.layer_norm(x, x[0], x[0], eps=x[0, 0]), "layer_norm", "eps"),
        (lambda x: ops.pad(x, [(1, 0), (0, 0)], x[0, 0]), "pad", "value"),
        (lambda x: mv.tensor(ARRAY)[x], "getitem", "index"),
    ],
)
def test_a_recorded_tensor_where_there_is_no_gradient_is_refused(call, op, argument):
    x = leaf(3, 3)
    with pytest.raises(GraphError, match=SETTING.format(op, argument, argument)):
        call(x)
    with mv.first_order(), pytest.raises(GraphError, match=SETTING.format(op, argument, argument)):
        call(x)


def test_a_constant_tensor_is_fine_there():
    x = leaf(3, 3)
    half = mv.tensor(np.array(0.5))
    expected = ops.attention(x, x, x, scale=0.5)
    np.testing.assert_array_equal(ops.attention(x, x, x, scale=half).data, expected.data)
    half.requires_grad = True
    with mv.no_grad():
        np.testing.assert_array_equal(ops.attention(x, x, x, scale=half).data, expected.data)


# ---- own operations --------------------------------------------------------------------------------------------------

CELL = """
import minivit as mv
from minivit.backend import Array

@mv.op()
def softmax(x: Array) -> Array:
    return x + {}

softmax.vjps(lambda g, out, x: g)
"""


def define(value: float, module: str) -> Any:
    scope = {"__name__": module}
    exec(CELL.format(value), scope)
    return scope["softmax"]


def test_names_of_own_operations_are_free(toys):
    mine, other = define(1.0, "mine"), define(2.0, "other")
    assert OPS["softmax"] is ops.softmax and OPS["mine.softmax"] is mine and OPS["other.softmax"] is other
    x = leaf(3)
    for own, number in ((mine, 1.0), (other, 2.0)):
        np.testing.assert_array_equal(own(x).data, x.data + number)
    np.testing.assert_allclose(ops.softmax(x).data.sum(), 1.0, rtol=1e-12)


def test_a_cell_that_runs_again_replaces_its_operation(toys):
    define(1.0, "__main__")
    again = define(2.0, "__main__")
    assert OPS["__main__.softmax"] is again and sum("__main__" in name for name in OPS) == 1


def test_two_operations_of_the_package_cannot_share_a_name(toys):
    before = ops.softmax
    with pytest.raises(ConfigError, match=r"softmax is there twice: minivit\.ops\.normalize\.softmax, minivit\.ops\.x"):
        define(1.0, "minivit.ops.x")
    assert OPS["softmax"] is before


def test_the_example_in_the_documentation_of_op_runs(toys):
    text = inspect.cleandoc(mv.op.__doc__).split("::\n")[1].split("\n\nThe gradient")[0]
    scope: dict[str, Any] = {"np": np, "__name__": "example"}
    exec(textwrap.dedent(text), scope)
    np.testing.assert_allclose(scope["softplus"](np.zeros(2)), np.log([2.0, 2.0]), rtol=1e-15)


def test_op_without_its_parentheses_says_so(toys):
    with pytest.raises(ConfigError, match=r"without its parentheses\n  → write @op\(\)"):

        @mv.op
        def square(x: Array) -> Array:
            return x * x


# ---- any expression --------------------------------------------------------------------------------------------------

UNARY = [ops.tanh, ops.sin, ops.gelu, ops.sigmoid, ops.softmax, lambda x: x * x, lambda x: ops.exp(x * 0.3),
         lambda x: x.T, lambda x: x[::-1], lambda x: ops.mean(x, 0, True), lambda x: ops.sum(x, 1, True)]  # fmt: skip
BINARY = [ops.add, ops.sub, ops.mul, lambda a, b: a / (b * b + 1.0), lambda a, b: (a + b * 0.0) @ (b + a * 0.0)]


@pytest.mark.parametrize("seed", range(40))
def test_any_graph_agrees_with_the_complex_step(seed):
    r = random.Random(seed)
    program = [(r.randrange(16), r.randrange(100), r.randrange(100)) for _ in range(r.randint(1, 8))]

    def run(x: Any, y: Any) -> Any:
        values = [x, y]  # each step takes any two results so far
        for which, i, j in program:
            a, b = values[i % len(values)], values[j % len(values)]
            values.append(UNARY[which](a) if which < len(UNARY) else BINARY[which - len(UNARY)](a, b))
        return values[-1] + x * 0.1

    report = mv.check_grads(run, [normal(Key(0), (3, 3)), normal(Key(1), (3, 3))])
    assert {c.method for c in report.checks} == {"complex"}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_a_copied_operation_is_the_operation(copied):
    assert copied(mv.ops.gelu) is mv.ops.gelu


def test_one_number_is_formatted_as_a_number():
    loss = mv.tensor([1.0, 2.0], requires_grad=True).sum()
    assert f"{loss:.3f}" == "3.000"
    assert f"{loss}" == str(loss)
    with pytest.raises(ShapeError, match="needs one element"):
        f"{leaf(3):.3f}"


def test_the_remedy_for_a_mask_is_to_make_numbers_of_it():
    with pytest.raises(DTypeError, match=r"have different dtypes\n  → convert one side: .to\(np.float64\)"):
        np.ones(3, bool) * leaf(3)


# ---- places for gradients: what a twin may do with its needs ---------------------------------------------------------


def product_with_a_twin():
    """Return an operation a·b whose twin keeps both, and has no gradient as yet."""

    @mv.op(save=("a", "b"))
    def times(a: Array, b: Array) -> Array:
        return a * b

    times.vjps(lambda g, out, a, b: g * b, lambda g, out, a, b: g * a)

    @times.twin("cpu")
    def _(a, b):
        return a * b, (a, b)

    return times


def test_a_twin_writes_a_leafs_gradient_into_its_slot_and_adds_what_had_reached_an_input(toys):
    seen, scaled = [], product_with_a_twin()

    @scaled.twin("cpu").vjp
    def _(g, kept, needs):
        x, w = kept
        seen.append([type(need).__name__ for need in needs])
        gx = g * w
        if isinstance(needs[0], SoFar):
            gx = needs[0].total(gx + needs[0].array)
        needs[1].add(g * x)
        return gx, needs[1].done()

    x, w = (mv.tensor(np.array(v), requires_grad=True) for v in ([1.0, 2.0], [3.0, 5.0]))
    with first_order():
        h = x * 2.0
        y = mv.ops.sum(h * 10.0 + scaled(h, w) + scaled(h, w))  # 20x + 4xw
    slots = {w.node: Slot(np.full(2, np.nan))}
    parts = list(propagate(y.node, np.ones(()), slots=slots))
    assert [node for node, _ in parts] == [x.node]
    np.testing.assert_array_equal(parts[0][1], 20.0 + 4.0 * w.data)
    np.testing.assert_array_equal(slots[w.node].array, 4.0 * x.data)
    assert slots[w.node].filled and seen == [["bool", "Slot"], ["SoFar", "Slot"]]


def test_an_input_that_is_there_twice_has_no_sum_to_add_to(toys):
    times = product_with_a_twin()

    @times.twin("cpu").vjp
    def _(g, kept, needs):
        assert needs == (True, True)
        return g * kept[1], g * kept[0]

    x = mv.tensor(np.array([3.0]), requires_grad=True)
    with first_order():
        h = x * 1.0
        y = mv.ops.sum(h + times(h, h))
    ((_, part),) = propagate(y.node, np.ones(()), slots={})
    np.testing.assert_array_equal(part, [7.0])
