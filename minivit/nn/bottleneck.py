"""The ResNet that hybrids have before their encoder (ViT section 3.1; Kolesnikov et al. 2020, BiT, arXiv 1912.11370).

Weights are standardised and groups of 32 channels' normalised in the place of a batch's; all is padded as "same".
Parameters have timm's names below ``patch_embed.backbone`` of its ``vit_*_r*`` models. ``like`` says whose eps are
added to variances, "timm" or "google": as weights were trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from minivit import ops
from minivit.nn.convolution import GroupNorm, MaxPool2d, StdConv2d
from minivit.nn.module import Module
from minivit.nn.rules import Size, count

GROUPS = 32
WIDTHS = (256, 512, 1024, 2048)
"""Channels after each stage."""


class _Pair(NamedTuple):
    conv: Any
    norm: Any


LIKE = {
    "timm": _Pair(StdConv2d, partial(GroupNorm, GROUPS)),
    "google": _Pair(partial(StdConv2d, eps=1e-5, of_deviation=True), partial(GroupNorm, GROUPS, eps=1e-6)),
}
"""Convolutions and norms by whose eps they have."""


class ResNetRoot(Module):
    """Images (B, C, H, W) → (B, channels, ⌈H/4⌉, ⌈W/4⌉): a convolution of 7 by 7, then the largest of 3 by 3."""

    def __init__(self, in_channels: int, channels: int = 64, like: str = "timm") -> None:
        conv, norm = LIKE[like]
        self.conv = conv(in_channels, channels, 7, stride=2)
        self.norm = norm(channels)
        self.pool = MaxPool2d(3, stride=2, padding="same")

    def forward(self, x: Any) -> Any:
        """Return the map of features."""
        return self.pool(ops.relu(self.norm(self.conv(x))))


class Projection(Module):
    """What a bottleneck adds to, where that needs other channels or a stride: (B, in, H, W) → (B, out, …)."""

    def __init__(self, in_channels: int, out_channels: int, stride: Size, like: str = "timm") -> None:
        conv, norm = LIKE[like]
        self.conv = conv(in_channels, out_channels, 1, stride)
        self.conv.weight.matrices = 1
        self.norm = norm(out_channels)

    def forward(self, x: Any) -> Any:
        """Return the projected x."""
        return self.norm(self.conv(x))


class Bottleneck(Module):
    """relu(x + f(x)), f three convolutions through a quarter of the channels, the second with the stride.

    The last norm's weight starts at 0, and so does f.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, like: str = "timm") -> None:
        conv, norm = LIKE[like]
        within = count("out_channels // 4", out_channels // 4)
        projects = stride != 1 or in_channels != out_channels
        self.downsample = Projection(in_channels, out_channels, stride, like) if projects else None
        self.conv1, self.norm1 = conv(in_channels, within, 1), norm(within)
        self.conv2, self.norm2 = conv(within, within, 3, stride), norm(within)
        self.conv3, self.norm3 = conv(within, out_channels, 1), norm(out_channels, starts_at_zero=True)
        for layer in (self.conv1, self.conv2, self.conv3):
            layer.weight.matrices = 1

    def forward(self, x: Any) -> Any:
        """Return (B, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        inner = ops.relu(self.norm1(self.conv1(x)))  # (B, in, H, W) → (B, out/4, H, W)
        inner = ops.relu(self.norm2(self.conv2(inner)))  # → (B, out/4, ⌈H/stride⌉, ⌈W/stride⌉)
        inner = self.norm3(self.conv3(inner))  # → (B, out, …)
        return ops.relu(inner + (x if self.downsample is None else self.downsample(x)))


class ResNetStage(Module):
    """Bottlenecks of as many channels, the first with the stride."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, stride: int, like: str = "timm") -> None:
        depth = count("depth", depth, 1000)
        self.blocks = [
            Bottleneck(out_channels if i else in_channels, out_channels, 1 if i else stride, like) for i in range(depth)
        ]

    def forward(self, x: Any) -> Any:
        """Return what comes out of the last."""
        for block in self.blocks:
            x = block(x)
        return x


def resnet_stride(depths: Sequence[int]) -> int:
    """Return how many pixels, along a side, there are for each place of a ResNetBackbone's features."""
    return 4 << max(len(depths) - 1, 0)  # the root's 4; each stage after the first halves the map


class ResNetBackbone(Module):
    """Images (B, C, H, W) → features (B, 256 · 2ˢ⁻¹, …), s stages, each but the first of which halves the map's sides.

    ``depths`` says how many bottlenecks each stage has: (3, 4, 9) in R50+ViT-B/16, (2, 2, 2, 2) in R26+ViT-S/32. The
    root alone is all of R+ViT-Ti/16. ``widths`` are the channels after each stage, ``width`` those after the root.
    """

    def __init__(
        self,
        in_channels: int,
        depths: Sequence[int],
        widths: Sequence[int] = WIDTHS,
        width: int = 64,
        like: str = "timm",
    ) -> None:
        self.stem = ResNetRoot(in_channels, width, like)
        self.stages = [
            ResNetStage(before, after, depth, 1 if i == 0 else 2, like)
            for i, (before, after, depth) in enumerate(zip((width, *widths), widths, depths, strict=False))
        ]

    def forward(self, x: Any) -> Any:
        """Return the last stage's features."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x
