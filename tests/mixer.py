"""A second registered model, which is no Vision Transformer: what goes through the registry must not notice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivit import ops
from minivit.models import Model, Settings, register, setting
from minivit.nn import MLP, LayerNorm, Linear, Module, PatchEmbed
from minivit.nn.rules import Size, choice, count, pair, rate, seed, size


@dataclass(frozen=True)
class MixerSettings(Settings):
    divisor = "tile"
    image_size: Size = setting(8, size, "height and width of the images")
    tile: int = setting(2, count, "side of a patch")
    in_channels: int = setting(1, count, "channels of the images")
    num_classes: int = setting(10, count, "classes")
    width: int = setting(16, count, "length of a token")
    layers: int = setting(2, count, "blocks")
    forget: float = setting(0.0, rate, "dropout of the MLPs")
    reads: str = setting("mean", choice("mean", "max"), "how tokens become one")
    seed: int = setting(0, seed, "what the parameters are drawn from")


class MixerBlock(Module):
    """Mix each channel over the tokens, then each token over the channels."""

    def __init__(self, tokens: int, width: int, forget: float) -> None:
        self.norm1, self.tokens = LayerNorm(width), MLP(tokens, 2 * tokens, dropout=forget)
        self.norm2, self.channels = LayerNorm(width), MLP(width, 2 * width, dropout=forget)

    def forward(self, x: Any) -> Any:
        x = x + ops.swapaxes(self.tokens(ops.swapaxes(self.norm1(x), 1, 2)), 1, 2)  # (B, T, D) → (B, D, T) → (B, T, D)
        return x + self.channels(self.norm2(x))


@register("mixer", configurations={"mixer_tiny": {"width": 8, "layers": 3}})
class Mixer(Model):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv 2105.01601, section 2)."""

    Settings = MixerSettings

    def make(self, s: MixerSettings) -> None:
        self.stem = PatchEmbed(pair("image_size", s.image_size), s.tile, s.in_channels, s.width)
        self.mixers = [MixerBlock(self.stem.num_patches, s.width, s.forget) for _ in range(s.layers)]
        self.norm, self.head = LayerNorm(s.width), Linear(s.width, s.num_classes)

    def forward(self, images: Any) -> Any:
        x = self.stem(images)  # (B, C, H, W) → (B, T, D)
        for block in self.mixers:
            x = block(x)
        x = self.norm(x)
        return self.head(ops.mean(x, axis=1) if self.settings.reads == "mean" else ops.max(x, axis=1))
