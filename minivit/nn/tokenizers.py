"""Tokens of images in other ways than the paper's: of shifted patches, and by overlapping convolutions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from minivit import ops
from minivit.errors import ConfigError, ShapeError
from minivit.nn.convolution import Conv2d, GroupNorm, MaxPool2d
from minivit.nn.layers import LayerNorm, Linear, PatchEmbed, Tokenizer
from minivit.nn.module import Module, Parameter, shape_text
from minivit.nn.rules import Size, count


class NormedPatchEmbed(PatchEmbed):
    """A patch of the image, normalised, → a token, normalised (B, N, dim).

    Kumar, Dehghani and Houlsby 2023, "Dual PatchNorm", arXiv 2302.01327, section 3.2.
    """

    says = "a linear map of the patch, normalised before and after it"

    def __init__(self, image_size: Size, patch_size: Size, in_channels: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__(image_size, patch_size, in_channels, dim)
        self.norm1 = LayerNorm(self.in_channels * self.patch_size[0] * self.patch_size[1], eps)
        self.norm2 = LayerNorm(dim, eps)

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W)."""
        patches = ops.patchify(self.rounded(images), self.patch_size)  # (B, C, H, W) → (B, N, C·P·Q)
        return self.norm2(self.proj(self.norm1(patches)))  # → (B, N, dim)


class ShiftedPatchEmbed(PatchEmbed):
    """A patch of the image and of four images shifted by half a patch, normalised, → a token (B, N, dim).

    Lee, Lee and Song 2021, "Vision transformer for small-size datasets", arXiv 2112.13492, section 3.1, eq. 9: it is
    shifted towards each corner, with zeros coming in, and a token knows what is around its patch.
    """

    says = "a linear map of the patch and of those half a patch up or down and left or right of it, normalised"

    def __init__(self, image_size: Size, patch_size: Size, in_channels: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__(image_size, patch_size, in_channels, dim)
        self.norm = LayerNorm(self.planes * self.patch_size[0] * self.patch_size[1], eps)

    @property
    def planes(self) -> int:
        """Channels of the patches: those of the image, and of the four beside it."""
        return 5 * self.in_channels

    @property
    def filters(self) -> Any:
        """The filters that see the image as it is, (D, C, P, Q); those of the shifted ones come after them."""
        weight: Any = self.proj.weight
        return weight[:, : self.in_channels]

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W)."""
        images = self.rounded(images)
        (h, w), (down, right) = self.image_size, (side // 2 for side in self.patch_size)
        around = ops.pad(images, [(0, 0), (0, 0), (down, down), (right, right)])
        # up and left, up and right, down and left, down and right: where the image is looked at instead moves the other
        # way
        shifted = [around[:, :, y : y + h, x : x + w] for y in (2 * down, 0) for x in (2 * right, 0)]
        patches = ops.patchify(ops.concat([images, *shifted], axis=1), self.patch_size)  # (B, 5·C, H, W) → (B, N, …)
        return self.proj(self.norm(patches))  # → (B, N, dim)


class ConvLayer(Module):
    """Convolution without a bias, ReLU, and the largest of 3×3 at every other place: (B, C, H, W) → (B, D, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        self.conv = Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.pool = MaxPool2d(3, 2, 1)

    def forward(self, x: Any) -> Any:
        """Return what the layer makes of x."""
        return ops.relu(self.pool(self.conv(x)))  # the ReLU of the largest is the largest ReLU, and of a quarter


class Convolutions(Tokenizer):
    """Base of those whose tokens are what comes out of layers with a ``conv`` each, at every place."""

    convs: list[Any]

    def make_convs(self, layers: list[Any]) -> None:
        """Take the layers; the filters of all but the first, which sees pixels, are hidden matrices."""
        self.convs = layers
        for layer in layers[1:]:
            layer.conv.weight.matrices = 1

    @property
    def filters(self) -> Parameter:
        """The weight of the first convolution, (D, C, kernel, kernel)."""
        weight: Parameter = self.convs[0].conv.weight
        return weight

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, D) of images (B, C, H, W), D the channels of the last layer."""
        x = self.rounded(images)
        for conv in self.convs:
            x = conv(x)  # → (B, D, rows, columns)
        return ops.swapaxes(x.reshape((*x.shape[:2], self.num_patches)), 1, 2)  # → (B, N, D)


class ConvTokenizer(Convolutions):
    """Images (B, C, H, W) → tokens (B, N, dim) by layers of overlapping convolutions, a token for every place.

    Hassani et al. 2021, "Escaping the big data paradigm with compact transformers", arXiv 2104.05704, section 3.3, eq.
    4, with the strides and the 64 channels between layers of the authors' code.
    """

    says = "overlapping convolutions, each with ReLU and max-pooling: a token is what comes out at its place"

    def __init__(self, image_size: Size, in_channels: int, dim: int, kernel: int = 3, convs: int = 1) -> None:
        kernel, convs = count("kernel", kernel), count("convs", convs)
        if kernel % 2 == 0:
            raise ConfigError(f"kernel is {kernel}", "choose an odd one, which has a middle")
        stride = max(1, kernel // 2 - 1)
        super().__init__(image_size, (2 * stride) ** convs, in_channels)
        widths = [self.in_channels, *[64] * (convs - 1), count("dim", dim)]
        self.make_convs([ConvLayer(a, b, kernel, stride) for a, b in pairwise(widths)])

    def extra_repr(self) -> str:
        """Return the image, and the tokens that it gives."""
        return f"{shape_text((self.in_channels, *self.image_size))} in {shape_text(self.grid)} tokens"


STEM_PATCHES = (2, 4, 8, 16, 32)
"""The patch sizes of a :class:`ConvStem`: each of its convolutions halves the image's sides."""


def stem_widths(patch_size: int, dim: int) -> list[int]:
    """Return the channels after each convolution of a :class:`ConvStem`; they double, up to ``dim``."""
    convs = patch_size.bit_length() - 1
    return [dim >> (convs - 1 - i) for i in range(convs)]


class StemLayer(Module):
    """3 by 3 convolution of stride 2 without a bias, a norm, and ReLU: (B, C, H, W) → (B, D, H/2, W/2).

    Channels are normalised in groups of 16, or all together where 16 does not divide them.
    """

    def __init__(self, in_channels: int, out_channels: int, eps: float) -> None:
        self.conv = Conv2d(in_channels, out_channels, 3, 2, 1, bias=False)
        self.norm = GroupNorm(1 if out_channels % 16 else out_channels // 16, out_channels, eps)

    def forward(self, x: Any) -> Any:
        """Return what the layer makes of x."""
        return ops.relu(self.norm(self.conv(x)))


class ConvStem(Convolutions):
    """Images (B, C, H, W) → tokens (B, N, dim) by convolutions that halve the image until patches are places.

    Xiao et al. 2021, "Early convolutions help transformers see better", arXiv 2106.14881, section 4: a convolution for
    each factor 2 of ``patch_size``, the last with ``dim`` channels and each before with half of the next one's, then
    one of 1 by 1. The paper normalises batches; here it is groups of channels (Wu and He 2018, arXiv 1803.08494), so
    that an image's tokens do not depend on the rest of its batch.
    """

    says = "convolutions of 3 by 3 that halve the image, each normalised and with ReLU, and a linear map of each place"

    def __init__(self, image_size: Size, patch_size: Size, in_channels: int, dim: int, eps: float = 1e-6) -> None:
        super().__init__(image_size, patch_size, in_channels)
        patch, dim = self.patch_size[0], count("dim", dim)
        if self.patch_size not in [(n, n) for n in STEM_PATCHES] or any(side % patch for side in self.image_size):
            what = f"a convolutional stem for images {self.image_size} with patch_size {patch_size}"
            raise ShapeError(what, f"patch_size is one of {STEM_PATCHES}, and divides height and width")
        widths = stem_widths(patch, dim)
        if widths[0] << (len(widths) - 1) != dim:
            what = f"a convolutional stem of {len(widths)} convolutions doubles its channels up to dim, which is {dim}"
            raise ConfigError(what, f"choose a dim that {1 << (len(widths) - 1)} divides")
        self.make_convs([StemLayer(a, b, eps) for a, b in pairwise([self.in_channels, *widths])])
        self.proj = Linear(dim, dim)
        self.proj.weight.matrices = 1

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W)."""
        return self.proj(super().forward(images))
