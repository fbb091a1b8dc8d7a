"""What makes tokens of images, as nodes of an ONNX graph: patches, convolutions, windows, a ResNet before them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import to_numpy
from minivit.nn.attention import table
from minivit.nn.bottleneck import ResNetRoot
from minivit.nn.convolution import StdConv2d
from minivit.nn.layers import PatchEmbed
from minivit.nn.token_attention import TokenPerformer, TokensToToken
from minivit.nn.tokenizers import ConvStem, ConvTokenizer, NormedPatchEmbed, ShiftedPatchEmbed
from minivit.weights.onnx_nodes import INPUT, Graph, linear, mlp, norm

Size = tuple[int, int]


# ---- layers on images ------------------------------------------------------------------------------------------------


def conv(g: Graph, x: str, layer: Any, name: str, size: Size) -> tuple[str, Size]:
    """Write a convolution of images of ``size``; return its value, and the size of what comes out.

    A standardised weight is entered as what the layer makes of it.
    """
    weight = f"{name}.weight"
    if isinstance(layer, StdConv2d):
        single = copy.deepcopy(layer).to(np.float32)
        weight = g.constant(f"{weight}.standardised", to_numpy(single.applied().data))
    inputs = [x, weight] + ([] if layer.bias is None else [f"{name}.bias"])
    return windowed(g, "Conv", inputs, layer, name, size)


def windowed(g: Graph, op: str, inputs: list[str], layer: Any, name: str, size: Size) -> tuple[str, Size]:
    """Write an operation on windows; return its value, and how many windows there are down and across."""
    padding = ops.same_padding(size, layer.kernel, layer.stride) if layer.padding == "same" else layer.padding
    (top, bottom), (left, right) = padding
    down, across = (
        (n + sum(sides) - k) // step + 1
        for n, sides, k, step in zip(size, padding, layer.kernel, layer.stride, strict=True)
    )
    sides = [top, left, bottom, right]
    x = g.node(op, inputs, name, kernel_shape=list(layer.kernel), strides=list(layer.stride), pads=sides)
    return x, (down, across)


def group_norm(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write the norm of groups of channels."""
    inputs = [x, f"{name}.weight", f"{name}.bias"]
    return g.node("GroupNormalization", inputs, name, num_groups=layer.groups, epsilon=layer.eps)


def relu(g: Graph, x: str, name: str) -> str:
    """Write max(x, 0)."""
    return g.node("Relu", [x], f"{name}.relu")


def flat(g: Graph, x: str, dim: int, name: str) -> str:
    """Write a map of features as tokens: (B, D, h, w) → (B, N, D)."""
    return g.transpose(g.reshape(x, (0, dim, -1), f"{name}.flat"), (0, 2, 1), f"{name}.tokens")


def bottleneck(g: Graph, x: str, layer: Any, name: str, size: Size) -> tuple[str, Size]:
    """Write three convolutions and what they are added to: :class:`minivit.nn.bottleneck.Bottleneck`."""
    inner, inside = x, size
    for n in (1, 2, 3):
        inner, inside = conv(g, inner, getattr(layer, f"conv{n}"), f"{name}.conv{n}", inside)
        inner = group_norm(g, inner, getattr(layer, f"norm{n}"), f"{name}.norm{n}")
        inner = relu(g, inner, f"{name}.{n}") if n < 3 else inner
    if (down := layer.downsample) is not None:
        x, _ = conv(g, x, down.conv, f"{name}.downsample.conv", size)
        x = group_norm(g, x, down.norm, f"{name}.downsample.norm")
    return relu(g, g.node("Add", [inner, x], f"{name}.sum"), name), inside


def resnet(g: Graph, x: str, backbone: Any, name: str, size: Size) -> str:
    """Write the ResNet before the patches of a hybrid, or its root alone."""
    alone = isinstance(backbone, ResNetRoot)
    root, at = (backbone, name) if alone else (backbone.stem, f"{name}.stem")
    x, size = conv(g, x, root.conv, f"{at}.conv", size)
    x = relu(g, group_norm(g, x, root.norm, f"{at}.norm"), at)
    x, size = windowed(g, "MaxPool", [x], root.pool, f"{at}.pool", size)
    for s, stage in enumerate([] if alone else backbone.stages):
        for u, block in enumerate(stage.blocks):
            x, size = bottleneck(g, x, block, f"{name}.stages.{s}.blocks.{u}", size)
    return x


# ---- tokens ----------------------------------------------------------------------------------------------------------


def patches(g: Graph, x: str, layer: Any, name: str, places: Size) -> str:
    """Write the linear map of patches as the convolution that it is: (B, C, H, W) → (B, N, D)."""
    inputs = [x, f"{name}.proj.weight", f"{name}.proj.bias"]
    x = g.node("Conv", inputs, f"{name}.proj", kernel_shape=list(places), strides=list(places))  # → (B, D, h, w)
    return flat(g, x, layer.proj.weight.shape[0], name)


def cut(g: Graph, x: str, channels: int, grid: Size, patch: Size, name: str) -> str:
    """Write the patches themselves: (B, C, H, W) → (B, N, C·P·Q)."""
    (rows, columns), (p, q) = grid, patch
    x = g.reshape(x, (0, channels, rows, p, columns, q), f"{name}.cut")
    x = g.transpose(x, (0, 2, 4, 1, 3, 5), f"{name}.in_patches")  # → (B, rows, columns, C, P, Q)
    return g.reshape(x, (0, rows * columns, channels * p * q), f"{name}.patches")


def projected(g: Graph, x: str, name: str) -> str:
    """Write the linear map of patches that are there as such: (B, N, C·P·Q) → (B, N, D)."""
    weight = g.transpose(g.reshape(f"{name}.weight", (0, -1), f"{name}.rows"), (1, 0), f"{name}.weight.T")
    return g.node("Add", [g.node("MatMul", [x, weight], f"{name}.product"), f"{name}.bias"], name)


def normed(g: Graph, x: str, layer: NormedPatchEmbed, name: str) -> str:
    """Write :class:`minivit.nn.NormedPatchEmbed`."""
    x = cut(g, x, layer.in_channels, layer.grid, layer.patch_size, name)
    x = projected(g, norm(g, x, layer.norm1, f"{name}.norm1"), f"{name}.proj")
    return norm(g, x, layer.norm2, f"{name}.norm2")


def shifted(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write :class:`minivit.nn.ShiftedPatchEmbed`: patches of the image, and of it shifted to each corner."""
    (h, w), (down, right) = layer.image_size, (side // 2 for side in layer.patch_size)
    around = g.node("Pad", [x, g.constant(f"{name}.around", [0, 0, down, right] * 2, np.int64)], f"{name}.padded")
    axes, images = g.constant(f"{name}.axes", [2, 3], np.int64), [x]
    for top in (2 * down, 0):
        for left in (2 * right, 0):
            ends = [
                g.constant(f"{name}.{end}", at, np.int64)
                for end, at in (("start", [top, left]), ("end", [top + h, left + w]))
            ]
            images.append(g.node("Slice", [around, *ends, axes], f"{name}.shifted"))
    x = g.node("Concat", images, f"{name}.planes", axis=1)  # → (B, 5·C, H, W)
    x = cut(g, x, layer.planes, layer.grid, layer.patch_size, name)
    return projected(g, norm(g, x, layer.norm, f"{name}.norm"), f"{name}.proj")


def tokens_by_convolutions(g: Graph, x: str, layer: ConvTokenizer, name: str) -> str:
    """Write :class:`minivit.nn.ConvTokenizer`."""
    size = layer.image_size
    for i, part in enumerate(layer.convs):
        x, size = conv(g, x, part.conv, f"{name}.convs.{i}.conv", size)
        x, size = windowed(g, "MaxPool", [relu(g, x, f"{name}.{i}")], part.pool, f"{name}.convs.{i}.pool", size)
    return flat(g, x, layer.convs[-1].conv.weight.shape[0], name)


def stem(g: Graph, x: str, layer: ConvStem, name: str) -> str:
    """Write :class:`minivit.nn.ConvStem`."""
    size = layer.image_size
    for i, part in enumerate(layer.convs):
        at = f"{name}.convs.{i}"
        x, size = conv(g, x, part.conv, f"{at}.conv", size)
        x = relu(g, group_norm(g, x, part.norm, f"{at}.norm"), at)
    return linear(g, flat(g, x, layer.proj.weight.shape[1], name), layer.proj, f"{name}.proj")


def windows(g: Graph, x: str, channels: int, kernel: int, stride: int, padding: int, name: str) -> str:
    """Write the windows of images as rows, (B, C, H, W) → (B, L, C·k·k): a convolution by ones of a single place."""
    ones = np.tile(np.eye(kernel * kernel, dtype=np.float32).reshape(-1, 1, kernel, kernel), (channels, 1, 1, 1))
    x = g.node(
        "Conv", [x, g.constant(f"{name}.places", ones)], f"{name}.windows", group=channels,
        kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4,
    )  # fmt: skip
    return flat(g, x, channels * kernel * kernel, name)


def features(g: Graph, x: str, layer: TokenPerformer, name: str, which: str) -> str:
    """Write φ of :class:`minivit.nn.TokenPerformer`: (B, T, dim) → (B, T, m)."""
    at = f"{name}.{which}"
    square = g.node("Mul", [x, x], f"{at}.square")
    half = g.node("ReduceSum", [square, g.constant(f"{at}.axis", [-1], np.int64)], f"{at}.length", keepdims=1)
    half = g.node("Mul", [half, g.constant(f"{at}.half", np.float32(0.5))], f"{at}.halved")
    along = g.node("MatMul", [x, g.transpose(f"{name}.w", (1, 0), f"{at}.w.T")], f"{at}.along")
    grown = g.node("Exp", [g.node("Sub", [along, half], f"{at}.exponent")], f"{at}.exp")
    scale = g.constant(f"{at}.scale", np.float32(layer.w.shape[0] ** -0.5))
    return g.node("Mul", [grown, scale], f"{at}.features")


def mixed(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write the attention among windows, and its MLP: :mod:`minivit.nn.token_attention`."""
    x, which = norm(g, x, layer.norm1, f"{name}.norm1"), "kqv" if isinstance(layer, TokenPerformer) else "qkv"
    parts = g.split(linear(g, x, getattr(layer, which), f"{name}.{which}"), 3, -1, f"{name}.parts")
    if isinstance(layer, TokenPerformer):
        k, q, v = parts
        q, k = features(g, q, layer, name, "q"), features(g, k, layer, name, "k")
        axis = g.constant(f"{name}.tokens", [1], np.int64)
        total = g.node("ReduceSum", [k, axis], f"{name}.total", keepdims=1)  # (B, 1, m)
        over = g.node("MatMul", [q, g.transpose(total, (0, 2, 1), f"{name}.total.T")], f"{name}.over")
        over = g.node("Add", [over, g.constant(f"{name}.least", np.float32(1e-8))], f"{name}.divisor")
        kv = g.node("MatMul", [g.transpose(k, (0, 2, 1), f"{name}.k.T"), v], f"{name}.kv")
        x = g.node("Div", [g.node("MatMul", [q, kv], f"{name}.weighted"), over], f"{name}.mixed")
    else:
        q, k, v = parts
        q = g.node("Mul", [q, g.constant(f"{name}.scale", np.float32(layer.scale))], f"{name}.q")
        scores = g.node("MatMul", [q, g.transpose(k, (0, 2, 1), f"{name}.k.T")], f"{name}.scores")
        x = g.node("MatMul", [g.node("Softmax", [scores], f"{name}.weights", axis=-1), v], f"{name}.mixed")
    x = g.node("Add", [v, linear(g, x, layer.proj, f"{name}.proj")], f"{name}.attended")
    return g.node("Add", [x, mlp(g, norm(g, x, layer.norm2, f"{name}.norm2"), layer.mlp, f"{name}.mlp")], f"{name}.out")


def tokens_of_tokens(g: Graph, x: str, layer: TokensToToken, name: str) -> str:
    """Write :class:`minivit.nn.TokensToToken`."""
    (h, w), apart, channels = layer.image_size, 1, layer.in_channels
    for part, (kernel, stride, padding) in zip(("attention1", "attention2", "project"), layer.splits, strict=True):
        x = windows(g, x, channels, kernel, stride, padding, f"{name}.{part}")
        apart *= stride
        if part == "project":
            return linear(g, x, layer.project, f"{name}.project")
        x = mixed(g, x, getattr(layer, part), f"{name}.{part}")
        channels = getattr(layer, part).proj.weight.shape[0]
        x = g.transpose(x, (0, 2, 1), f"{name}.{part}.columns")
        x = g.reshape(x, (0, channels, h // apart, w // apart), f"{name}.{part}.image")
    raise AssertionError  # the last is the projection


def tokens(g: Graph, layer: Any, name: str) -> str:
    """Write what makes tokens of the images: (B, C, H, W) → (B, N, D)."""
    if isinstance(layer, ConvTokenizer):
        return tokens_by_convolutions(g, INPUT, layer, name)
    if isinstance(layer, TokensToToken):
        return tokens_of_tokens(g, INPUT, layer, name)
    if isinstance(layer, ShiftedPatchEmbed):
        return shifted(g, INPUT, layer, name)
    if isinstance(layer, NormedPatchEmbed):
        return normed(g, INPUT, layer, name)
    if isinstance(layer, ConvStem):
        return stem(g, INPUT, layer, name)
    if (backbone := getattr(layer, "backbone", None)) is not None:
        seen = resnet(g, INPUT, backbone, f"{name}.backbone", layer.image_size)
        return patches(g, seen, layer, name, layer.places)
    assert type(layer) is PatchEmbed, type(layer)
    return patches(g, INPUT, layer, name, layer.patch_size)


def embedding(g: Graph, model: Any) -> str:
    """Write the tokens that enter the encoder: images (B, C, H, W) → (B, T, D)."""
    x = tokens(g, model.patch_embed, "patch_embed")
    positions = table(model.pos_embed, next(model.patch_embed.parameters()))
    made = None if positions is None else to_numpy(positions.data)
    if made is not None and made.shape[1] == model.patch_embed.num_patches:
        x, made = g.node("Add", [x, _positions(g, made)], "patch_embed.placed"), None
    before = [n for n in ("cls_token", "dist_token", "reg_token") if getattr(model, n, None) is not None]
    if before:
        first = before[0] if len(before) == 1 else g.node("Concat", before, "prefix", axis=1)  # (1, P, D)
        batch = g.node("Shape", [INPUT], "batch", start=0, end=1)
        shape = g.constant("prefix.shape", [model.prefix, model.settings.dim], np.int64)
        sizes = g.node("Concat", [batch, shape], "sizes", axis=0)
        x = g.node("Concat", [g.node("Expand", [first, sizes], "prefix.all"), x], "tokens", axis=1)  # → (B, T, D)
    return x if made is None else g.node("Add", [x, _positions(g, made)], "placed")


def _positions(g: Graph, made: np.ndarray) -> str:
    """Return the name of the positions: the parameter's, or of the numbers that they come from."""
    return "pos_embed" if "pos_embed" in g.arrays else g.constant("positions", made)


# ---- a network of convolutions only ----------------------------------------------------------------------------------


def pooled_features(g: Graph, model: Any) -> str:
    """Write what the head of a :class:`minivit.models.resnet.ResNet` reads: (B, C, H, W) → (B, channels)."""
    x, size = conv(g, INPUT, model.conv, "conv", model.settings.image_shape[1:])
    x = relu(g, group_norm(g, x, model.norm, "norm"), "norm")
    for s, stage in enumerate(model.stages):
        for u, block in enumerate(stage):
            name, rest, before = f"stages.{s}.{u}", x, size
            x, size = conv(g, x, block.conv1, f"{name}.conv1", before)
            x = relu(g, group_norm(g, x, block.norm1, f"{name}.norm1"), f"{name}.norm1")
            x, size = conv(g, x, block.conv2, f"{name}.conv2", size)
            x = group_norm(g, x, block.norm2, f"{name}.norm2")
            if block.shortcut is not None:
                rest, _ = conv(g, rest, block.shortcut, f"{name}.shortcut", before)
            x = relu(g, g.node("Add", [x, rest], f"{name}.sum"), name)
    return g.node("ReduceMean", [x, g.constant("mean.axes", [2, 3], np.int64)], "mean", keepdims=0)
