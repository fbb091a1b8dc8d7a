"""Dropout and drop path on a GPU: the masks are those of the CPU, whose numbers a kernel draws where it uses them."""

from __future__ import annotations

import numpy as np
import pytest

from minivit.autograd.graph import first_order, propagate
from minivit.autograd.tensor import Tensor
from minivit.backend import Key, named_dtype, normal, to_device, to_numpy
from minivit.ops.cuda import sums
from minivit.ops.cuda.sums import collecting
from minivit.ops.dropout import drop_path, dropout
from tests import strict

any_cupy = strict.any_cupy
CASES = [
    ((5, 3, 24), Key(3, 0xFFFF_FFFF_FFFF_FFFF, 7), 0.1),
    ((300, 17), Key(-1, 5, (1 << 63) + 11, row=1_000_003), 0.6),
    ((3, 2, 2, 5), Key(0), 0.0),
]


def learned(x):
    leaf = Tensor(to_device(x, "cuda"))
    leaf.requires_grad = True
    return leaf


def on_gpu(key, cupy):
    return Key(key.seed, key.stream, cupy.full((), key.step, cupy.uint64), key.row)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", [dropout, drop_path])
@pytest.mark.parametrize(("shape", "key", "p"), CASES, ids=["tokens", "rows", "nothing"])
def test_a_kernel_drops_what_the_cpu_drops(any_cupy, op, name, shape, key, p):
    dtype = named_dtype(name)
    x, g = (normal(Key(1, i), shape).astype(np.float32).astype(dtype) for i in range(2))
    leaf = learned(x)
    with first_order():
        out = op(leaf, p, on_gpu(key, any_cupy))
    assert out.node.op.kind == "cuda"
    [(_, gx)] = propagate(out.node, to_device(g, "cuda"))
    keep, scale = op.forward(np.ones(shape, np.float32), p, key) != 0, np.float32(1.0 / (1.0 - p))
    for ours, given in ((out.data, x), (gx, g)):
        expected = np.where(keep, given.astype(np.float32) * scale, np.float32(0.0)).astype(dtype)
        np.testing.assert_array_equal(to_numpy(ours), expected)


def test_a_drop_is_one_launch_and_leaves_the_sums_of_its_gradients_columns(strict_cupy):
    x, g = (normal(Key(2, i), (6, 5, 40)).astype(np.float32) for i in range(2))
    flat = to_device(np.zeros(8, np.float32), "cuda")
    leaf, cotangent = learned(x), to_device(g, "cuda")
    with first_order(), collecting(sums.Arena(flat)):
        strict_cupy.counters.reset()
        out = drop_path(leaf, 0.4, on_gpu(Key(1, 2, 3), strict_cupy))
        assert strict_cupy.counters.launched.pop("full") == 1  # the key's step, made here
        assert strict_cupy.counters.launched == {"drop": 1}
        [(_, gx)] = propagate(out.node, cotangent)
        assert strict_cupy.counters.launched == {"drop": 2}
        found = to_numpy(sums.of(gx)).sum(axis=0)
        assert strict_cupy.counters.launched == {"drop": 2}
    np.testing.assert_allclose(found, to_numpy(gx).reshape(-1, 40).sum(axis=0), rtol=1e-5, atol=1e-5)


def test_a_step_that_is_a_number_is_left_to_the_plain_operation(strict_cupy):
    leaf = learned(np.ones((4, 8), np.float32))
    strict_cupy.counters.reset()
    with first_order():
        dropout(leaf, 0.5, Key(1, 2, 3))
    assert strict_cupy.counters.launched["drop"] == 0
