"""A residual network of convolutions, to compare a ViT with (He et al. 2016, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivit import ops
from minivit.errors import ConfigError
from minivit.models.registry import Model, Settings, register, setting
from minivit.nn import init
from minivit.nn.convolution import Conv2d, GroupNorm
from minivit.nn.layers import Linear, checked_images
from minivit.nn.module import Module, RowSize
from minivit.nn.rules import Size, count, depths, seed, size


@dataclass(frozen=True)
class ResNetSettings(Settings):
    """Settings of a :class:`ResNet`."""

    image_size: Size = setting(32, size, "height and width of the images, an int or (height, width)")
    in_channels: int = setting(3, count, "channels of the images")
    num_classes: int = setting(10, count, "classes, the length of the logits")
    depths: tuple[int, ...] = setting((2, 2, 2, 2), depths, "residual blocks of each stage")
    width: int = setting(32, count, "channels of the first stage; each next one has twice as many, on half the sides")
    group: int = setting(16, count, "channels that are normalised together; it divides width")
    seed: int = setting(0, seed, "what the parameters are drawn from")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.depths:
            raise ConfigError("depths is [], a network of no blocks", "give a number for each stage, such as [2, 2, 2]")
        if self.width % self.group:
            raise ConfigError(f"group is {self.group}, which does not divide width {self.width}", "choose another")

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of one image's features in the first stage, each 9 times before a product."""
        _, height, rows = self.image_shape
        return 9 * self.width * height * rows, f"the windows of {self.width} channels, an array that"


class ResidualBlock(Module):
    """relu(s(x) + f(x)): f two convolutions of 3 by 3, each normalised; s is x, or a 1 by 1 where its shape changes.

    (B, in, H, W) → (B, out, ⌈H/stride⌉, ⌈W/stride⌉). The second norm's weight starts at 0, and so does f.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = GroupNorm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = GroupNorm(groups, out_channels, starts_at_zero=True)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = Conv2d(in_channels, out_channels, 1, stride, bias=False)
        for conv in filter(None, (self.conv1, self.conv2, self.shortcut)):
            conv.weight.matrices = 1

    def forward(self, x: Any) -> Any:
        """Return the features after the block."""
        inner = ops.relu(self.norm1(self.conv1(x)))  # (B, in, H, W) → (B, out, ⌈H/stride⌉, ⌈W/stride⌉)
        inner = self.norm2(self.conv2(inner))
        return ops.relu(inner + (x if self.shortcut is None else self.shortcut(x)))


@register("resnet")
class ResNet(Model):
    """Images (B, C, H, W) → logits (B, num_classes): a convolution, stages of residual blocks, the mean over places.

    As for CIFAR-10 in the paper: the first convolution is 3 by 3 and keeps the images' size. Groups of channels are
    normalised, and not a batch (Wu and He 2018, "Group normalization", arXiv 1803.08494): then an image's logits do
    not depend on what else is in its batch, a batch may be worked on in pieces and on several machines with equal
    results, as a ViT's is, and there are no running means to keep beside the parameters. What can be set:
    """

    Settings = ResNetSettings
    encoder = ("in_channels", "depths", "width", "group")  # images may be of any size

    def make(self, s: ResNetSettings) -> None:
        """Make the layers."""
        self.conv = Conv2d(s.in_channels, s.width, 3, padding=1, bias=False)
        self.norm = GroupNorm(s.width // s.group, s.width)
        self.stages: list[list[ResidualBlock]] = []
        channels = s.width
        for i, depth in enumerate(s.depths):
            out = s.width << i
            self.stages.append(
                [
                    ResidualBlock(out if j else channels, out, 2 if i and not j else 1, out // s.group)
                    for j in range(depth)
                ]
            )
            channels = out
        self.head = Linear(channels, s.num_classes, weight_init=init.zeros)

    def layers(self) -> list[list[Any]]:
        """Return the first convolution, the blocks one by one, and the head."""
        return [[self.conv, self.norm], *([block] for stage in self.stages for block in stage), [self.head]]

    def row_size(self) -> RowSize:
        """Return the numbers of an image's features in a later stage, and how many times as many are kept.

        Of the first there are four times as many; but what works on those cuts them for the cache itself, and in each
        micro-batch all weights are laid out anew for their products.
        """
        (_, height, width), s = self.settings.image_shape, self.settings
        return RowSize(max(1, s.width * height * width // 4), len(s.depths))

    def forward(self, images: Any) -> Any:
        """Return logits (B, num_classes)."""
        images, dtype = checked_images(images, self.settings.image_shape, self.conv.weight.dtype)
        x = images if dtype is None else ops.convert(images, dtype)
        x = ops.relu(self.norm(self.conv(x)))  # (B, C, H, W) → (B, width, H, W)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(ops.mean(x, axis=(2, 3)))  # → (B, channels) → (B, num_classes)
