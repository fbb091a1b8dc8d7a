"""Convolution and pooling: their twins in every cut of a batch, ties, padding, layers, costs, and timm's ResNet."""

from __future__ import annotations

import contextlib
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import nn, ops
from minivit.autograd.graph import propagate
from minivit.backend import Key, normal, to_device, to_numpy
from minivit.backend.outline import Outline, outline
from minivit.errors import ConfigError, DTypeError, ShapeError
from minivit.measure.costs import layer_costs
from minivit.measure.speed import flops
from minivit.nn.random import random_key
from minivit.ops.conv import windows
from minivit.ops.cpu import conv as cpu_conv
from minivit.ops.cpu import normalize as cpu_normalize
from minivit.ops.samples import SAMPLES
from tests.test_ops import assert_near, backward, of_twin, places


def wave(shape: tuple[int, ...], number: int) -> np.ndarray:
    """Return the numbers that goldens/make_resnet.py computes with."""
    n = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    return (np.sin(n * n * 0.37 + 1.3 * number) + (len(shape) == 1)).reshape(shape)


WAYS = pytest.mark.parametrize("way", [backward, of_twin], ids=["plain", "twin"])
ON_IMAGES = [s for s in SAMPLES if s.op in ("conv2d", "max_pool2d")]


# ---- the twins -------------------------------------------------------------------------------------------------------


EXTRA: list[tuple[Any, Any]] = [
    (ops.conv2d, (normal(Key(1), (5, 2, 12, 8)), normal(Key(2), (3, 2, 3, 3)), None, 1, 1)),
    (ops.conv2d, (normal(Key(1), (3, 9, 7, 6)), normal(Key(2), (17, 9, 3, 2)), normal(Key(3), (17,)), 1, 0)),
    (ops.conv2d, (normal(Key(1), (2, 3, 9, 8)), normal(Key(2), (2, 3, 4, 3)), None, (3, 2), ((0, 3), (5, 1)))),
    (ops.conv2d, (normal(Key(1), (2, 1, 1, 1)), normal(Key(2), (2, 1, 2, 2)), None, 2, ((2, 0), (2, 0)))),
    (ops.conv2d, (normal(Key(1), (2, 17, 5, 4)), normal(Key(2), (3, 17, 1, 1)), None, 1, 0)),
    (ops.conv2d, (normal(Key(1), (0, 2, 5, 4)), normal(Key(2), (3, 2, 3, 3)), None, 1, 1)),
]
"""Other cuts, windows of many and of few numbers, a padding that whole windows lie in, and none of images."""


@pytest.mark.parametrize(("places", "block"), [(1, 1), (20, 400), (100, 1000), (1000, 20_000)])
def test_twins_in_pieces_equal_the_plain_operations(monkeypatch, places, block):
    """One row at a time, some, some images; images whose pixels or whose channels are next to each other in memory."""
    monkeypatch.setattr(cpu_conv, "PLACES", places)
    monkeypatch.setattr(cpu_conv, "BLOCK", block)
    for function, args in [(s.function, s.build()) for s in ON_IMAGES] + EXTRA:
        at = [i for i in (0, 1, 2) if i < len(args) and isinstance(args[i], np.ndarray)]
        out, gradients = backward(function, args, at, cotangent := wave(function(*args).shape, 1))
        for memory in (np.ascontiguousarray, channels_last):
            ours, our_gradients = of_twin(function, [memory(args[0]), *args[1:]], at, memory(cotangent))
            for a, e in zip([ours.data, *our_gradients], [out.data, *gradients], strict=True):
                assert_near(a, e, 1e-12)


def channels_last(x: np.ndarray) -> np.ndarray:
    """Return images (B, C, H, W) with their channels next to each other in memory."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("few", [True, False])
def test_the_cuts_of_a_batch_hold_every_window_once(few):
    most = cpu_conv.SMALL_PLACES[1] if few else cpu_conv.PLACES
    for images, size, kernel, stride in [(9, 32, 3, 1), (3, 31, 3, 2), (170, 7, 3, 1), (2, 112, 3, 1), (1, 1, 1, 1)]:
        w = windows("conv2d", (images, 1, size, size), kernel, stride, 1)
        found = np.zeros((images, *w.grid), int)
        sizes = []
        for piece in cpu_conv._pieces(w, images, few):
            found[piece] += 1
            sizes.append(found[piece].size)
        assert (found == 1).all() and sizes[0] == max(sizes)
        assert sizes[0] <= most + w.grid[1]


def test_a_convolution_makes_no_large_copies():
    """Of 40 images no more columns are made at a time than of a few."""
    x, weight = normal(Key(1), (40, 8, 32, 32)).astype(np.float32), normal(Key(2), (8, 8, 3, 3)).astype(np.float32)
    leaves = [mv.tensor(a, requires_grad=True) for a in (x, weight)]
    tracemalloc.start()
    with mv.first_order():
        out = ops.conv2d(*leaves, None, 1, 1)
    assert tracemalloc.get_traced_memory()[1] < out.data.nbytes + 2.5e6
    list(propagate(out.node, np.ones_like(out.data)))
    assert tracemalloc.get_traced_memory()[1] < 2 * out.data.nbytes + x.nbytes + 2.5e6  # all columns are 9 times x
    tracemalloc.stop()


@pytest.mark.parametrize("block", [1, 100, 1 << 17])
def test_group_norm_wherever_its_channels_lie(monkeypatch, block):
    monkeypatch.setattr(cpu_normalize, "BLOCK", block)
    x, along = normal(Key(1), (3, 6, 4, 5)), wave((3, 6, 4, 5), 2)
    x[1] += 1e4  # far from zero: a square less a square would lose its digits
    args = [x, 3, normal(Key(2), (6,)), normal(Key(3), (6,))]
    out, gradients = backward(ops.group_norm, args, [0, 2, 3], along)
    for memory in (np.ascontiguousarray, channels_last):
        for g in (along, channels_last(along)):
            ours, our_gradients = of_twin(ops.group_norm, [memory(x), *args[1:]], [0, 2, 3], g)
            assert ours.data.strides == memory(x).strides
            for a, e in zip([ours.data, *our_gradients], [out.data, *gradients], strict=True):
                assert_near(a, e, 1e-11)
    args = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in args]
    in_float32, _ = of_twin(ops.group_norm, args, [0])
    rounded = ops.group_norm(*[a.astype(np.float64) if isinstance(a, np.ndarray) else a for a in args])
    assert_near(in_float32.data, rounded, 2e-6)


def test_a_gradient_that_is_not_finite_stays_where_it_is():
    """What ReLU and pooling do not let through is 0, not 0 · ∞."""
    x, g = np.array([[[[-1.0, 2.0], [3.0, 1.0]]]], np.float32), np.full((1, 1, 2, 2), np.inf, np.float32)
    _, (ours,) = of_twin(ops.relu, [x], [0], g)
    np.testing.assert_array_equal(ours, [[[[0, np.inf], [np.inf, np.inf]]]])
    _, (ours,) = of_twin(ops.max_pool2d, [x, 2], [0], g[:, :, :1, :1])
    np.testing.assert_array_equal(ours, [[[[0, 0], [np.inf, 0]]]])


@WAYS
def test_of_equal_pixels_the_first_gets_the_gradient(way):
    x = np.zeros((1, 1, 4, 4))
    _, (g,) = way(ops.max_pool2d, [x, 2], [0], np.array([[[[1.0, 2.0], [3.0, 4.0]]]]))
    np.testing.assert_array_equal(g[0, 0], [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])
    x[0, 0, 1, 2] = x[0, 0, 2, 1] = 5.0  # in all windows of 3: the one in the upper row comes first
    _, (g,) = way(ops.max_pool2d, [x, 3, 1], [0], np.array([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert g[0, 0, 1, 2] == 10.0 and g.sum() == 10.0


@WAYS
def test_what_is_around_is_never_the_largest(way):
    out, (g,) = way(ops.max_pool2d, [np.full((1, 1, 3, 3), -7.0), 3, 2, 1], [0], np.ones((1, 1, 2, 2)))
    assert (out.data == -7.0).all() and g.sum() == 4.0


def test_a_third_order():
    """The gradient of a gradient's gradient is the change of the latter."""
    weight, kernel = normal(Key(1), (4,)), mv.tensor(normal(Key(2), (4, 4, 2, 2)), requires_grad=True)
    x, along = normal(Key(3), (1, 4, 3, 3)), normal(Key(4), (1, 4, 3, 3))

    def second(values: np.ndarray) -> tuple[Any, Any]:
        x = mv.tensor(values, requires_grad=True)
        out = ops.group_norm(ops.conv2d(x, kernel, None, 1, ((0, 1), (1, 0))), 2, weight, np.zeros(4))
        total = (ops.avg_pool2d(out, 2) * ops.max_pool2d(out * out, 2)).sum()
        (first,) = mv.grad(total, [x], create_graph=True)
        (again,) = mv.grad((first * along).sum(), [x], create_graph=True)
        return x, (again * along).sum()

    leaf, contracted = second(x)
    (third,) = mv.grad(contracted, [leaf])
    change = (second(x + 1e-5 * along)[1].item() - second(x - 1e-5 * along)[1].item()) / 2e-5
    assert (third.data * along).sum() == pytest.approx(change, rel=1e-6) and abs(change) > 0.1


# ---- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "sides"),
    [
        ((5, 6), 3, 2, ((1, 1), (0, 1))),  # as TensorFlow's documentation has it: the odd one goes to the end
        ((224, 224), 7, 2, ((2, 3), (2, 3))),
        ((112, 112), 3, 2, ((0, 1), (0, 1))),
        ((4, 7), (2, 3), (1, 3), ((0, 1), (1, 1))),
        ((8, 8), 1, 2, ((0, 0), (0, 0))),
    ],
)  # fmt: skip
def test_same_padding(size, kernel, stride, sides):
    assert ops.same_padding(size, kernel, stride) == sides
    step = stride if isinstance(stride, tuple) else (stride, stride)
    grid = windows("conv2d", (1, 1, *size), kernel, stride, sides).grid
    assert grid == tuple(-(-n // s) for n, s in zip(size, step, strict=True))


def test_unfold_and_fold_are_adjoints():
    x, settings = normal(Key(1), (2, 3, 9, 7)), ((3, 2), (2, 1), ((0, 2), (1, 0)))
    columns = ops.unfold(x, *settings)
    y = normal(Key(2), columns.shape)
    assert np.vdot(columns, y) == pytest.approx(np.vdot(x, ops.fold(y, (9, 7), *settings)), rel=1e-12)
    tiles = normal(Key(3), (2, 3, 8, 6))
    np.testing.assert_array_equal(ops.fold(ops.unfold(tiles, 2, 2), (8, 6), 2, 2), tiles)
    rows = ops.swapaxes(ops.unfold(tiles, 2, 2), 1, 2)
    np.testing.assert_array_equal(rows, ops.patchify(tiles, (2, 2)))


@WAYS
def test_no_images(way):
    empty = np.zeros((0, 4, 5, 4))
    given: list[tuple[Any, Any, tuple[int, ...]]] = [
        (ops.conv2d, [empty, np.ones((2, 4, 3, 3)), np.ones(2)], (0, 2, 3, 2)),
        (ops.max_pool2d, [empty, 2], (0, 4, 2, 2)),
        (ops.avg_pool2d, [empty, 2], (0, 4, 2, 2)),
        (ops.group_norm, [empty, 2, np.ones(4), np.ones(4)], empty.shape),
    ]
    for function, args, shape in given:
        at = [i for i, a in enumerate(args) if isinstance(a, np.ndarray)]
        out, gradients = way(function, args, at)
        assert out.shape == shape
        for i, g in zip(at, gradients, strict=True):
            assert_near(g, np.zeros(args[i].shape))
    with pytest.raises(ShapeError, match="does not fit into an image of 0x4"):
        ops.conv2d(np.zeros((1, 3, 0, 4)), np.ones((2, 3, 1, 1)))


X, W = np.ones((2, 3, 5, 5)), np.ones((4, 3, 3, 3))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "channels": (lambda: ops.conv2d(X, np.ones((4, 2, 3, 3))), ShapeError, "conv2d"),
    "no batch": (lambda: ops.conv2d(X[0], W), ShapeError, "conv2d"),
    "bias": (lambda: ops.conv2d(X, W, np.ones(3)), ShapeError, "bias"),
    "a large kernel": (lambda: ops.conv2d(X, np.ones((4, 3, 6, 3))), ShapeError, "6x3 does not fit"),
    "stride 0": (lambda: ops.conv2d(X, W, None, 0), ConfigError, "stride=0"),
    "half a stride": (lambda: ops.conv2d(X, W, None, 1.5), ConfigError, "stride=1.5"),
    "padding below 0": (lambda: ops.conv2d(X, W, None, 1, -1), ConfigError, "padding=-1"),
    "padding by name": (lambda: ops.conv2d(X, W, None, 1, "valid"), ConfigError, "padding='valid'"),
    "padding of three": (lambda: ops.unfold(X, 3, 1, (1, 1, 1)), ConfigError, "padding=(1, 1, 1)"),
    "windows in the padding": (lambda: ops.max_pool2d(X, 2, 2, 2), ConfigError, "lie in a padding"),
    "integers": (lambda: ops.max_pool2d(X.astype(np.int64), 3, 1, 1), DTypeError, "int64"),
    "dtypes": (lambda: ops.conv2d(mv.tensor(X), W.astype(np.float32)), DTypeError, "conv2d"),
    "columns": (lambda: ops.fold(np.ones((2, 27, 8)), (5, 5), 3), ShapeError, "a multiple of 9, 9"),
    "columns of two axes": (lambda: ops.fold(np.ones((27, 9)), (5, 5), 3), ShapeError, "fold"),
    "groups": (lambda: ops.group_norm(X, 2, np.ones(3), np.ones(3)), ShapeError, "3 channels"),
    "no groups": (lambda: ops.group_norm(X, 0, np.ones(3), np.ones(3)), ConfigError, "groups=0"),
    "a group's weight": (lambda: ops.group_norm(X, 3, np.ones(5), np.ones(3)), ShapeError, "(5,)"),
    "a layer's kernel": (lambda: nn.Conv2d(3, 4, 0), ConfigError, "kernel_size is 0"),
    "a layer's padding": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), ConfigError, "padding is 'valid'"),
    "a layer's groups": (lambda: nn.GroupNorm(4, 6), ConfigError, "6 channels do not make 4 groups"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "twin"])
def test_bad_input(name, first_order):
    fn, error, words = BAD[name]
    with mv.first_order() if first_order else contextlib.nullcontext(), pytest.raises(error) as caught:
        fn()
    assert words in str(caught.value).splitlines()[0] + str(caught.value).splitlines()[1]


# ---- layers ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A stem, a norm, a pool and a head."""

    def __init__(self) -> None:
        self.conv, self.std = nn.Conv2d(2, 4, 3, padding="same"), nn.StdConv2d(4, 6, 3, stride=2)
        self.norm, self.pool = nn.GroupNorm(3, 6), nn.MaxPool2d(3, 2, padding="same")
        self.head = nn.Linear(6, 5)

    def forward(self, images: Any) -> Any:
        x = ops.relu(self.norm(self.std(ops.relu(self.conv(images)))))
        return self.head(ops.mean(self.pool(x), (2, 3)))


def small(dtype: Any = np.float64) -> Small:
    with random_key(Key(3)):
        return Small().to(dtype)


def test_layers_say_what_they_are_and_what_their_parameters_are():
    model = small()
    assert {name: p.decays for name, p in model.named_parameters()} == {
        "conv.weight": True, "conv.bias": False, "std.weight": True, "norm.weight": False, "norm.bias": False,
        "head.weight": True, "head.bias": False,
    }  # fmt: skip
    text = str(model)
    for words in ("Conv2d(2 → 4, 3 × 3)", "StdConv2d(4 → 6, 3 × 3, stride 2 × 2, no bias)", "3 groups of 2"):
        assert words in text
    with random_key(Key(1)):
        weight = nn.Conv2d(64, 64, 3).weight.numpy()
    assert weight.std() == pytest.approx((2 / 576) ** 0.5, rel=0.02)


def test_the_gradient_of_every_layer():
    report = mv.check_module(small(), normal(Key(5), (2, 2, 7, 9)), order=2)
    assert report.worst.error < 1e-12 and {c.method for c in report.checks} == {"complex"}


def test_a_standardised_weight_knows_neither_scale_nor_shift():
    model, x = small(), normal(Key(5), (2, 4, 5, 6))
    before = model.std(x).data
    model.std.weight.data = model.std.weight.data * 3.0 + 0.7
    assert_near(model.std(x).data, before, 1e-6)  # eps is added to another variance


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_trains_captured_on_cuda_as_on_the_cpu(strict_cupy, precision):
    images, labels = normal(Key(6), (6, 2, 9, 7)).astype(np.float32), np.arange(6) % 5
    found = []
    for device in ("cpu", "cuda"):
        model = small(np.float32).to(device)
        opt = mv.optim.AdamW(model.named_parameters(), lr=1e-2)
        step = mv.TrainStep(model, opt, precision=precision if device == "cuda" else "float32")
        strict_cupy.counters.reset()
        found.append([step(images, labels) for _ in range(4)])
        if device == "cuda":
            assert step.why_launched == "", step.why_launched
            (nodes,) = step.underway.capture.nodes().values()
            assert nodes < 180, nodes  # 140, and 168 in bfloat16
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5 if precision == "float32" else 2e-2)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("sample", ON_IMAGES, ids=str)
def test_on_a_gpu_nobody_waits(strict_cupy, sample):
    args = sample.build()
    at = places(sample, args)
    moved = [to_device(a, "cuda") if isinstance(a, np.ndarray) else a for a in args]
    strict_cupy.counters.reset()
    out, gradients = backward(sample.function, moved, at, strict_cupy.ones(sample.function(*moved).shape))
    assert strict_cupy.counters.syncs == strict_cupy.counters.transfers == 0
    expected, exact = backward(sample.function, args, at, np.ones(out.shape))
    for a, e in zip([out.data, *gradients], [expected.data, *exact], strict=True):
        assert_near(to_numpy(a), e)


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_costs_are_counted_on_an_outline():
    rows = layer_costs(small(np.float32), outline((1, 2, 224, 224)))
    assert (rows["conv"].flops, rows["std"].flops) == (2 * 4 * 224**2 * 18, 2 * 6 * 112**2 * 36)
    assert rows["conv"].shape == (1, 4, 224, 224) and rows["head"].flops == 60
    real = layer_costs(small(np.float32), np.zeros((1, 2, 20, 26), np.float32))
    assert real == layer_costs(small(np.float32), outline((1, 2, 20, 26)))


def test_an_outline_stays_one():
    x, weight = mv.tensor(outline((2, 3, 64, 64))), mv.tensor(outline((8, 3, 3, 3)), requires_grad=True)
    for first_order in (True, False):
        with mv.first_order() if first_order else contextlib.nullcontext():
            y = ops.conv2d(x, weight, None, 2, 1)
            outs = [y, ops.max_pool2d(y, 3, 2, 1), ops.avg_pool2d(y, 2), ops.unfold(y, 7, 4, 2)]
            outs.append(ops.fold(outs[-1], (32, 32), 7, 4, 2))
            outs.append(ops.group_norm(y, 4, outline((8,)), outline((8,))))
        assert [type(out.data) for out in outs] == [Outline] * len(outs)
        assert flops(y.node) == 2 * y.size * 27


# ---- timm's ResNet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_order", [False, True], ids=["plain", "twin"])
def test_the_backbone_is_timms(first_order):
    golden = np.load(Path(__file__).parent / "goldens" / "resnet.npz")
    model = nn.ResNetBackbone(2, (1, 1), (128, 256), 32).to(np.float64)
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == sorted(golden["names"].tolist())
    for i, name in enumerate(golden["names"].tolist()):
        parameters[name].data = wave(parameters[name].shape, i)
    images = mv.tensor(wave((2, 2, 21, 30), 100), requires_grad=True)
    with mv.first_order() if first_order else contextlib.nullcontext():
        features = model(images)
    assert_near(features.data, golden["features"], 1e-11)
    features.backward(wave(features.shape, 200))
    assert_near(images.grad, golden["image_gradient"], 1e-10)
    along = [(parameters[name].grad * wave(parameters[name].shape, 300)).sum() for name in golden["names"].tolist()]
    assert_near(along, golden["along"], 1e-9)


def test_how_many_parameters_the_backbones_have():
    """timm's ``vit_*_r*`` have as many below ``patch_embed.backbone``."""
    assert nn.ResNetRoot(3).num_parameters() == 9_536
    assert nn.ResNetBackbone(3, (2, 2, 2, 2)).num_parameters() == 13_946_176
    assert nn.ResNetBackbone(3, (3, 4, 9)).num_parameters() == 11_894_848
    assert nn.ResNetBackbone(3, (3, 4, 6, 3)).num_parameters() == 23_508_032
