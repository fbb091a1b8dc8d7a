"""Layers on images (B, C, H, W): convolutions, group normalisation, pooling; their weights are in PyTorch's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.op import raw
from minivit.backend import array_module, on_device_of
from minivit.errors import ConfigError, value_text
from minivit.nn import init
from minivit.nn.module import Module, Parameter, shape_text
from minivit.nn.rules import Size, count, epsilon, pair
from minivit.ops.conv import sides_of


def _kernel(name: str, value: Any) -> tuple[int, int]:
    """Return (height, width) of a kernel or a stride, both at least 1; raise ConfigError if it is none."""
    height, width = pair(name, value)
    return count(name, height), count(name, width)


def _padding(value: Any) -> Any:
    """Return "same", or ((top, bottom), (left, right)); raise ConfigError for anything else."""
    if isinstance(value, str) and value == "same":
        return value
    sides = sides_of(value)
    if sides is None or min(*sides[0], *sides[1]) < 0:
        remedy = 'it must be "same", a whole number from 0 on, (height, width) or ((top, bottom), (left, right))'
        raise ConfigError(f"padding is {value_text(value)}", remedy)
    return sides


def _around(padding: Any, x: Any, kernel: tuple[int, int], stride: tuple[int, int]) -> Any:
    """Return the padding of these images; that of "same" follows from their size."""
    return ops.same_padding(x.shape[2:], kernel, stride) if padding == "same" else padding


class Conv2d(Module):
    """Convolution: (B, in, H, W) → (B, out, down, across); weight (out, in, kh, kw), He-normal unless told, bias zero.

    ``padding`` is as in :func:`minivit.ops.conv2d`, or "same": then there are ⌈size / stride⌉ places a side, and what
    is put around follows from the images' size, as in TensorFlow (:func:`minivit.ops.same_padding`).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Any = 0,
        bias: bool = True,
        weight_init: Callable[[int, int], np.ndarray] = init.he_normal,
    ) -> None:
        in_channels, out_channels = count("in_channels", in_channels), count("out_channels", out_channels)
        self.kernel, self.stride = _kernel("kernel_size", kernel_size), _kernel("stride", stride)
        self.padding = _padding(padding)
        fan_in = in_channels * self.kernel[0] * self.kernel[1]
        self.weight = Parameter(weight_init(out_channels, fan_in).reshape(out_channels, in_channels, *self.kernel))
        self.bias = Parameter(init.zeros(out_channels)) if bias else None

    def extra_repr(self) -> str:
        """Return the channels that come in and go out, the kernel, and its stride."""
        out_channels, in_channels = self.weight.shape[:2]
        stride = "" if self.stride == (1, 1) else f", stride {shape_text(self.stride)}"
        bias = "" if self.bias is not None else ", no bias"
        return f"{in_channels} → {out_channels}, {shape_text(self.kernel)}{stride}{bias}"

    def forward(self, x: Any) -> Any:
        """Return the convolution of x."""
        around = _around(self.padding, x, self.kernel, self.stride)
        return ops.conv2d(x, self.applied(), self.bias, self.stride, around)

    def applied(self) -> Any:
        """Return the weight that x is convolved with."""
        return self.weight


class StdConv2d(Conv2d):
    """Convolution without a bias, by a standardised weight: each output channel's has mean 0 and variance 1.

    Qiao et al. 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", arXiv
    1903.10520, eq. 5; ``eps`` is added to the variance, or with ``of_deviation``, as Google's code has it, to its root.
    It pads as "same" unless told.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Any = "same",
        eps: float = 1e-8,
        of_deviation: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.eps, self.of_deviation = epsilon("eps", eps), of_deviation

    def applied(self) -> Any:
        """Return the standardised weight."""
        return ops.reshape(self._standardized(), self.weight.shape)

    def _standardized(self) -> Any:
        rows = ops.reshape(self.weight, (self.weight.shape[0], -1))  # (out, in, kh, kw) → (out, in·kh·kw)
        if self.of_deviation:
            rows = rows - ops.mean(rows, axis=1, keepdims=True)
            return rows / (ops.sqrt(ops.mean(rows * rows, axis=1, keepdims=True)) + self.eps)
        xp = array_module(raw(rows))
        with on_device_of(raw(rows)):
            one, zero = (make(rows.shape[1], self.weight.dtype) for make in (xp.ones, xp.zeros))
        return ops.layer_norm(rows, one, zero, self.eps)


class GroupNorm(Module):
    """Normalise groups of channels over all their pixels: (B, C, …) → the same; bias zero, weight one.

    Or zero: a residual branch that ends so is none at first (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, starts_at_zero: bool = False) -> None:
        self.groups, channels = count("groups", groups), count("channels", channels)
        if channels % self.groups:
            remedy = "use a number of groups that divides the channels"
            raise ConfigError(f"{channels} channels do not make {self.groups} groups", remedy)
        self.eps = epsilon("eps", eps)
        self.weight = Parameter((init.zeros if starts_at_zero else init.ones)(channels))
        self.bias = Parameter(init.zeros(channels))

    def extra_repr(self) -> str:
        """Return how many groups of how many channels."""
        return f"{self.groups} groups of {self.weight.shape[0] // self.groups}"

    def forward(self, x: Any) -> Any:
        """Return the normalised x."""
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class MaxPool2d(Module):
    """The largest pixel of each window: (B, C, H, W) → (B, C, down, across); ``padding`` is as in :class:`Conv2d`."""

    def __init__(self, kernel_size: Size, stride: Size | None = None, padding: Any = 0) -> None:
        self.kernel = _kernel("kernel_size", kernel_size)
        self.stride = self.kernel if stride is None else _kernel("stride", stride)
        self.padding = _padding(padding)

    def extra_repr(self) -> str:
        """Return the window and its stride."""
        return f"{shape_text(self.kernel)}, stride {shape_text(self.stride)}"

    def forward(self, x: Any) -> Any:
        """Return the pooled x."""
        return ops.max_pool2d(x, self.kernel, self.stride, _around(self.padding, x, self.kernel, self.stride))
