"""The Vision Transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words", arXiv 2010.11929, section 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from minivit import ops
from minivit.models.adapt import adapt_tokens, resize
from minivit.models.registry import Model, Settings, register, setting
from minivit.models.trace import Change, Trace, trace
from minivit.nn import init, rules
from minivit.nn.attention import EncoderBlock, attention_mask
from minivit.nn.layers import Dropout, LayerNorm, Linear, PatchEmbed
from minivit.nn.module import Parameter, RowSize
from minivit.nn.rules import Size, choice, count, flag, optional, pair, rate, size


@dataclass(frozen=True)
class ViTSettings(Settings):
    """Settings of a :class:`ViT`."""

    divisor = "patch_size"
    image_size: Size = setting(32, size, "height and width of the images, an int or (height, width)")
    patch_size: Size = setting(4, size, "height and width of a patch; it divides the image's")
    in_channels: int = setting(3, count, "channels of the images")
    num_classes: int = setting(10, count, "classes, the length of the logits")
    dim: int = setting(192, count, "length of a token")
    depth: int = setting(6, rules.depth, "encoder blocks")
    heads: int = setting(3, count, "heads of the attention")
    mlp_dim: int | None = setting(None, optional(count), "hidden numbers of the MLP, 4·dim unless given")
    dim_head: int | None = setting(None, optional(count), "numbers of a head, dim/heads unless given")
    qkv_bias: bool = setting(True, flag, "whether queries, keys and values have a bias")
    activation: str = setting("gelu", rules.named(ops.ACTIVATIONS), "of the MLP: gelu, gelu_tanh, relu, silu, tanh")
    norm_eps: float = setting(1e-6, rules.epsilon, "what layer normalisation adds to the variance")
    dropout: float = setting(0.0, rate, "dropout after the attention's projection and in the MLP")
    attention_dropout: float = setting(0.0, rate, "dropout of the attention probabilities")
    embed_dropout: float = setting(0.0, rate, "dropout after the positions are added")
    drop_path: float = setting(0.0, rate, "drop path of the last block; it rises linearly from 0")
    pool: str = setting("cls", choice("cls", "mean", "none"), "cls, a token; mean, of patches; none, logits for each")
    position: str = setting("learned", choice("learned", "none"), "learned or none")
    head: str = setting("linear", choice("linear", "mlp"), "linear or, for pre-training, mlp: one hidden tanh layer")
    weight_init: str = setting("paper", choice("paper", "mimetic"), "as the paper's code; mimetic is for few images")
    seed: int = setting(0, rules.seed, "what the parameters are drawn from")
    recompute: bool = setting(False, flag, "blocks keep their input only and run again on the way back", kept=False)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        (h, w), (p, q) = pair("image_size", self.image_size), pair("patch_size", self.patch_size)
        return h // p, w // q

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of the attention probabilities of one image."""
        patches = math.prod(self.grid)
        return self.heads * patches**2, f"{patches:,} patches, whose attention"

    def written_out(self) -> dict[str, Any]:
        """Return ``config`` with the sizes of MLP and heads that follow from dim."""
        patch = pair("patch_size", self.patch_size)
        return self.config | {
            "patch_size": patch[0] if patch[0] == patch[1] else patch,
            "mlp_dim": self.mlp_dim or 4 * self.dim,
            "dim_head": self.dim_head or self.dim // self.heads,
        }


@register("vit")
class ViT(Model):
    """Images (B, C, H, W) → logits (B, num_classes), or with pool "none" (B, N, num_classes) for every patch.

    Parameters bear timm's names. Mimetic weights start attention like trained attention (Trockman and Kolter 2023,
    arXiv 2305.09828) and positions as sines and cosines. What can be set:
    """

    Settings = ViTSettings
    replaced = ("head.", "pre_logits.")
    encoder = ("in_channels", "patch_size", "dim", "depth", "heads", "dim_head", "mlp_dim", "qkv_bias", "position")
    adapt, resize = adapt_tokens, resize

    def make(self, s: ViTSettings) -> None:
        """Make the layers."""
        self.dim, self.pool = s.dim, s.pool
        self.patch_embed = PatchEmbed(s.image_size, s.patch_size, s.in_channels, s.dim)
        self.cls_token = Parameter(init.zeros(1, 1, s.dim), decays=False) if s.pool == "cls" else None
        self.pos_embed = None
        if s.position == "learned":
            self.pos_embed = Parameter(init.normal(1, self.num_tokens, s.dim, std=0.02), decays=False)
        self.embed_drop = Dropout(s.embed_dropout)
        self.blocks = [
            EncoderBlock(s.dim, s.heads, s.mlp_dim or 4 * s.dim, s.dim_head, s.qkv_bias, s.activation, s.norm_eps,
                         s.dropout, s.attention_dropout, s.drop_path * i / max(s.depth - 1, 1), s.recompute)
            for i in range(s.depth)
        ]  # fmt: skip
        self.norm = LayerNorm(s.dim, s.norm_eps)
        # the hidden layer of the pre-training head; the linear head after it is all that fine-tuning keeps
        self.pre_logits = Linear(s.dim, s.dim) if s.head == "mlp" else None
        self.head = Linear(s.dim, s.num_classes, weight_init=init.zeros)
        if s.weight_init == "mimetic":
            for block in self.blocks:
                block.attn.init_mimetic()
            if self.pos_embed is not None:
                self.pos_embed.data[0, -self.patch_embed.num_patches :] = init.sincos_2d(self.patch_embed.grid, s.dim)

    def layers(self) -> list[list[Any]]:
        """Return the embedding, the blocks one by one, and what comes after them."""
        first, last = [self.patch_embed, self.cls_token, self.pos_embed], [self.norm, self.pre_logits, self.head]
        return [first, *([block] for block in self.blocks), last]

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by one linear layer of zeros, as for fine-tuning (section 3.2), and drop a hidden layer."""
        self.settings, self.pre_logits = replace(self.settings, head="linear"), None
        super().reset_head(num_classes)

    @property
    def num_tokens(self) -> int:
        """Length of the encoder's sequence: patches, and the class token if there is one."""
        return self.patch_embed.num_patches + (self.cls_token is not None)

    def row_size(self) -> RowSize:
        """Return the numbers of an image's tokens, and in how many blocks they are kept."""
        return RowSize(self.num_tokens * self.dim, len(self.blocks))

    def embed(self, images: Any) -> Any:
        """Return the tokens that enter the encoder (eq. 1): (B, C, H, W) → (B, T, dim)."""
        x = self.patch_embed(images)  # (B, C, H, W) → (B, N, dim)
        return self.embed_drop(ops.embed_tokens(x, self.cls_token, self.pos_embed))  # → (B, T, dim)

    def features(self, images: Any, mask: Any = None, tokens: int | None = None) -> Any:
        """Return the tokens after the final norm (eq. 4): (B, C, H, W) → (B, T, dim), or only the first ``tokens``."""
        x = self.embed(images)
        mask = attention_mask(mask, x.shape[1], x.shape[0])
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        return self.norm(last(x, mask, queries=tokens))

    def classify(self, x: Any) -> Any:
        """Return the logits of tokens after the final norm, of which pool "cls" reads the first only."""
        if self.pool != "none":
            x = x[:, 0] if self.pool == "cls" else ops.mean(x, axis=1)  # (B, T, dim) → (B, dim)
        return self.head(x if self.pre_logits is None else ops.tanh(self.pre_logits(x)))

    def forward(self, images: Any, mask: Any = None) -> Any:
        """Return logits (B, num_classes); ``mask`` (T, T) or (B, T, T) bool, True = may not attend."""
        return self.classify(self.features(images, mask, tokens=1 if self.pool == "cls" else None))

    def trace(self, images: Any, mask: Any = None, change: Change | None = None) -> Trace:
        """Return logits, the tokens after every block and every attention on the path: :mod:`minivit.models.trace`."""
        return trace(self, images, mask, change)

    def attention_maps(self, images: Any, mask: Any = None) -> list[Any]:
        """Return each block's attention probabilities, (B, heads, T, T): row i is what token i attends to."""
        return self.trace(images, mask).attention
