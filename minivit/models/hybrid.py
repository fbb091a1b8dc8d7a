"""The hybrid: a ViT whose patches are of a ResNet's features (Dosovitskiy et al. 2020, section 3.1, "Hybrid")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivit import ops
from minivit.models.registry import register, setting
from minivit.models.vit import ViT
from minivit.models.vit_settings import ViTSettings
from minivit.nn.bottleneck import GROUPS, LIKE, ResNetBackbone, ResNetRoot, resnet_stride
from minivit.nn.layers import PatchEmbed, PatchProjection, checked_images
from minivit.nn.module import RowSize
from minivit.nn.rules import choice, count, depths, pair


@dataclass(frozen=True)
class HybridSettings(ViTSettings):
    """Settings of a :class:`Hybrid`: a ViT's, and its ResNet's."""

    stages: tuple[int, ...] = setting(
        (),
        depths,
        "bottlenecks in each stage of the ResNet, each but the first of which halves the map; [] is its root",
    )
    width: int = setting(64, count, "channels of the ResNet's root; a stage has 4 times as many, the next twice that")
    stem_eps: str = setting("timm", choice(*LIKE), "what the ResNet adds to variances, timm's or google's")

    @property
    def stride(self) -> int:
        """Pixels of the image, along a side, for each place of the map of features."""
        return resnet_stride(self.stages)

    @property
    def channels(self) -> int:
        """Features of each place."""
        return self.width * 4 << len(self.stages) - 1 if self.stages else self.width

    def contradictions(self) -> list[tuple[bool, str, str]]:
        """Return what cannot be together, as a ViT's settings do."""
        sides, stride = pair("patch_size", self.patch_size), self.stride
        found = f"patch_size is {self.patch_size}, and a place of the map of features is {stride} by {stride} pixels"
        return [
            (any(side % stride for side in sides), found, f"use a patch_size that {stride} divides, or other stages"),
            (self.width % GROUPS > 0,
             f"width is {self.width}, and norms have {GROUPS} groups", f"use a width that {GROUPS} divides"),
            (self.tokenizer != "patch",
             f"a hybrid's tokens are of its ResNet's features, and tokenizer is {self.tokenizer!r}",
             "leave tokenizer out"),
            *super().contradictions(),
        ]  # fmt: skip

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of the largest array that one image makes: attention, or the root's features."""
        _, height, width = self.image_shape
        root = -(-height // 2) * -(-width // 2) * self.width
        return max(super().largest_array(), (root, f"{self.width} features of every other pixel, an array that"))


class HybridEmbed(PatchEmbed):
    """Images (B, C, H, W) → tokens (B, N, dim), a linear map of patches of a ResNet's features.

    ``patch_size`` is in pixels of the image, ``places`` in places of the map: (1, 1) in most, (8, 8) in R+ViT-Ti/16.
    """

    def __init__(self, s: HybridSettings) -> None:
        super().__init__(s.image_size, s.patch_size, s.in_channels, s.dim)
        height, width = self.patch_size
        self.places = height // s.stride, width // s.stride
        if s.stages:
            widths = [4 * s.width << i for i in range(len(s.stages))]
            self.backbone: Any = ResNetBackbone(s.in_channels, s.stages, widths, s.width, s.stem_eps)
        else:
            self.backbone = ResNetRoot(s.in_channels, s.width, s.stem_eps)
        self.proj = PatchProjection(s.dim, s.channels, self.places)

    @property
    def filters(self) -> Any:
        """The filters that see the image, (width, C, 7, 7): those of the ResNet's root."""
        return (self.backbone if isinstance(self.backbone, ResNetRoot) else self.backbone.stem).conv.weight

    def features(self, images: Any) -> Any:
        """Return what the linear map sees of each patch: (B, C, H, W) → (B, N, channels · places)."""
        expected = (self.in_channels, *self.image_size)
        images, dtype = checked_images(images, expected, self.proj.weight.dtype)
        x = self.backbone(images if dtype is None else ops.convert(images, dtype))  # → (B, channels, h, w)
        return ops.patchify(x, self.places)  # (B, channels, h, w) → (B, N, …)

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W) in the model's dtype."""
        return self.proj(self.features(images))


@register("hybrid")
class Hybrid(ViT):
    """Images (B, C, H, W) → logits, as a :class:`ViT`, whose patches are of a ResNet's features and not of pixels.

    The ResNet standardises its weights and normalises groups of channels (:mod:`minivit.nn.bottleneck`). Parameters
    bear timm's names. ``patch_size`` counts pixels: R50+ViT-B/16, whose map of features has a place for every 16 by 16
    of them, has one place in a patch. What can be set:
    """

    Settings = HybridSettings
    encoder = (*ViT.encoder, "stages", "width", "stem_eps")

    def make(self, s: Any) -> None:
        """Make the layers of a ViT, and what embeds patches in the place of its own."""
        super().make(s)
        self.patch_embed = HybridEmbed(s)

    def row_size(self) -> RowSize:
        """Return the numbers of an image's tokens or, if they are more, of its features after the root."""
        s, (_, height, width) = self.settings, self.settings.image_shape
        return RowSize(max(self.num_tokens * self.dim, height * width * s.width // 16), len(self.blocks))
