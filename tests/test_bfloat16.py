"""bfloat16, to NumPy a foreign dtype: every operation in it, forward and gradient, is as near as its digits."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.backend import is_bfloat16, is_floating, is_half, largest, named_dtype, normal, spelled, to_numpy
from minivit.errors import ConfigError, DTypeError
from minivit.ops.samples import SAMPLES, Sample
from tests.test_ops import as_type, backward, cotangent_for, mapped, of_twin, places

BF16 = named_dtype("bfloat16")
EPSILON = 2.0**-7  # one unit of the last place, as a share of the number
SMALL = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2}

rows = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def exact(x: Any) -> np.ndarray:
    return np.asarray(to_numpy(x)).astype(np.float64)


def assert_as_near_as_its_digits(actual: Any, expected: Any) -> None:
    """Hold an array against a float64 one: two units of the last place of the largest number."""
    expected = exact(expected)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    assert actual.shape == expected.shape
    np.testing.assert_allclose(exact(actual), expected, rtol=2 * EPSILON, atol=2 * EPSILON * scale)


def check(sample: Sample, args: Any, way: Any) -> None:
    """Hold an operation on bfloat16 arrays against the same on the same numbers in float64, on a CPU."""
    at = places(sample, args)
    wide = mapped(lambda a: exact(a) if is_bfloat16(a.dtype) else to_numpy(a), args)
    out = sample.function(*wide)
    dtype = np.float32 if sample.op == "cross_entropy" else BF16
    cotangent = cotangent_for(out).astype(dtype)
    expected, gradients = backward(sample.function, wide, at, cotangent.astype(np.float64))
    first = next(args[i] for i in at)
    if not isinstance(first, np.ndarray):
        import cupy

        cotangent = cupy.asarray(cotangent)
    actual, found = way(sample.function, args, at, cotangent)
    assert actual.dtype == dtype and all(g.dtype == BF16 for g in found)
    for a, e in zip([actual.data, *found], [expected.data, *gradients], strict=True):
        assert_as_near_as_its_digits(a, e)


@pytest.mark.parametrize("way", [backward, of_twin], ids=["plain", "twin"])
@rows
def test_every_operation(sample, way):
    check(sample, as_type(BF16, sample.build()), way)


@rows
def test_every_operation_on_a_gpu(strict_cupy, sample):
    args = mapped(lambda a: strict_cupy.asarray(a) if is_floating(a.dtype) else a, as_type(BF16, sample.build()))
    check(sample, args, backward)


@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "twins"])
def test_a_whole_model(first_order):
    """The text of the engine: a step in bfloat16 on a CPU, of which --dtype has none, is as near as its digits."""
    images, labels = normal(mv.Key(7), (5, 1, 8, 8)), np.array([0, 1, 2, 1, 0])
    found = {}
    for dtype in ("bfloat16", "float64"):
        model = mv.ViT(**SMALL).to("bfloat16").to(dtype)  # the same numbers
        with mv.first_order() if first_order else contextlib.nullcontext():
            loss = ops.cross_entropy(model(images.astype(BF16).astype(named_dtype(dtype))), labels)
        loss.backward()
        found[dtype] = loss, [p.grad for p in model.parameters()]
    (loss, gradients), (expected, exact_gradients) = found["bfloat16"], found["float64"]
    assert loss.dtype == np.float32 and abs(loss.item() - expected.item()) < 0.01
    assert all(is_bfloat16(g.dtype) for g in gradients)
    error = sum(float(((exact(g) - e) ** 2).sum()) for g, e in zip(gradients, exact_gradients, strict=True))
    assert error < 0.02**2 * sum(float((e**2).sum()) for e in exact_gradients)


def test_a_second_order():
    for dtype in (BF16, np.dtype(np.float64)):
        x = mv.tensor(np.array([0.5, -1.0, 2.0]), dtype, requires_grad=True)
        (first,) = mv.grad((ops.gelu(x) * 2.0).sum(), [x], create_graph=True)
        (second,) = mv.grad((first * first).sum(), [x])
        assert first.dtype == second.dtype == dtype
        if dtype == BF16:
            ours = second.data
    assert_as_near_as_its_digits(ours, second.data)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_a_loss_is_not_rounded_to_half(name):
    dtype = named_dtype(name)
    logits = normal(mv.Key(3), (6, 4)).astype(dtype)
    soft = np.full((6, 4), 0.25, np.float32)
    for labels in (np.array([0, 1, 2, 3, 0, 1]), soft, soft.astype(dtype)):
        x, wide = mv.tensor(logits, requires_grad=True), mv.tensor(logits.astype(np.float32), requires_grad=True)
        loss, expected = ops.cross_entropy(x, labels, 0.1), ops.cross_entropy(wide, as_wide(labels), 0.1)
        loss.backward()
        expected.backward()
        assert loss.dtype == np.float32 and loss.item() == expected.item()
        assert x.grad.dtype == dtype and (x.grad == wide.grad.astype(dtype)).all()
    with pytest.raises(DTypeError, match="soft labels are float64"):
        ops.cross_entropy(logits, soft.astype(np.float64))


def as_wide(labels: np.ndarray) -> np.ndarray:
    return labels if labels.dtype.kind == "i" else labels.astype(np.float32)


def test_a_sum_of_ones_goes_on():
    ones = mv.tensor(np.ones(1000, BF16), requires_grad=True)
    assert ops.sum(ones).item() == 1000.0 and ops.mean(ones).item() == 1.0
    bias = mv.tensor(np.ones(1, BF16), requires_grad=True)
    (ones.detach() + bias).backward(np.ones(1000, BF16))
    assert bias.grad == 1000.0
    assert ops.scatter(np.ones(1000, BF16), np.zeros(1000, np.int64), (2,))[0] == 1000.0


def test_what_a_dtype_is():
    halves = {BF16: True, np.dtype("f2"): True, np.dtype("f4"): False, np.dtype("c16"): False}
    for dtype, half in halves.items():
        assert is_floating(dtype) and is_half(dtype) == half
    assert not any(is_floating(np.dtype(dtype)) or is_half(np.dtype(dtype)) for dtype in ("i4", "?", "V2"))
    assert largest(BF16) == float(np.array(largest(BF16)).astype(BF16)) and np.isinf(np.array(3.4e38).astype(BF16))
    assert (spelled(BF16), spelled(np.dtype("f4"))) == ("'bfloat16'", "np.float32")
    assert named_dtype("float64") == np.float64


def test_it_is_converted_and_mixed_up_like_any_other():
    x = mv.tensor([1.0, 2.0], requires_grad=True)
    y = x.to("bfloat16")
    y.backward(np.ones(2, BF16))
    assert is_bfloat16(y.dtype) and x.grad.dtype == np.float32
    with pytest.raises(DTypeError, match=r"convert one side: \.to\('bfloat16'\)"):
        ops.add(y, x)
    with pytest.raises(DTypeError, match="the model takes bfloat16 images"):
        mv.ViT(**SMALL).to("bfloat16")(np.zeros((1, 1, 8, 8), np.float64))


def test_without_ml_dtypes(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(DTypeError, match=r"pip install 'minivit\[tile\]'"):
        named_dtype("bfloat16")
    with pytest.raises(DTypeError, match="ml_dtypes"):
        mv.ViT(**SMALL).to("bfloat16")
    with pytest.raises(ConfigError, match="neither a device nor a dtype"):
        mv.ViT(**SMALL).to("bfloat17")


def test_parameters_that_are_optimized_are_no_bfloat16():
    model = mv.ViT(**SMALL).to("bfloat16")
    with pytest.raises(ConfigError, match="bfloat16"):
        mv.optim.AdamW(model.named_parameters())
