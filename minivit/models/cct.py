"""The Compact Convolutional Transformer (Hassani et al. 2021, "Escaping the big data paradigm", arXiv 2104.05704)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from minivit.data import Preparation
from minivit.errors import ConfigError
from minivit.models.adapt import check_encoder, fit_tokens, resize
from minivit.models.embedding import make_positions, put_together
from minivit.models.preparations import prepare
from minivit.models.registry import Model, Settings, register, setting
from minivit.models.trace import Change, Trace, trace
from minivit.nn import init, rules
from minivit.nn.attention import attention_mask, table
from minivit.nn.blocks import BetweenNormBlock
from minivit.nn.layers import Dropout, LayerNorm, Linear
from minivit.nn.module import RowSize
from minivit.nn.rules import Size, choice, count, flag, pair, rate, size
from minivit.nn.scored import SequencePool
from minivit.nn.tokenizers import ConvTokenizer


@dataclass(frozen=True)
class CCTSettings(Settings):
    """Settings of a :class:`CCT`; ``pool`` and ``block`` say what others can choose of."""

    pool: ClassVar[str] = "seq"
    block: ClassVar[str] = "between"
    no_embed_class: ClassVar[bool] = True
    image_size: Size = setting(32, size, "height and width of the images, an int or (height, width)")
    in_channels: int = setting(3, count, "channels of the images")
    num_classes: int = setting(10, count, "classes, the length of the logits")
    kernel: int = setting(
        3, count, "side of the convolutions' kernels, odd; their stride is kernel // 2 - 1, at least 1"
    )
    convs: int = setting(1, count, "convolutions that make the tokens; each with its pooling halves the image's sides")
    dim: int = setting(256, count, "length of a token")
    depth: int = setting(7, rules.depth, "encoder blocks")
    heads: int = setting(4, count, "heads of the attention")
    mlp_dim: int = setting(512, count, "hidden numbers of the MLP")
    position: str = setting("learned", choice("learned", "sincos_1d", "none"), "learned; sincos_1d, fixed; none")
    dropout: float = setting(0.0, rate, "dropout after the positions, after the attention's projection and in the MLP")
    attention_dropout: float = setting(0.0, rate, "dropout of the attention probabilities")
    drop_path: float = setting(0.0, rate, "drop path of the last block; it rises linearly from 0")
    seed: int = setting(0, rules.seed, "what the parameters are drawn from")
    recompute: bool = setting(False, flag, "blocks keep their input only and run again on the way back", kept=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0 or self.kernel > 63:
            raise ConfigError(f"kernel is {self.kernel}", "choose an odd one, which has a middle, of at most 63")
        if self.convs > 8:  # each would halve what is left
            raise ConfigError(f"convs is {self.convs}", "choose 1 to 8: the images would be a single token before")

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along height and width."""
        apart = (2 * max(1, self.kernel // 2 - 1)) ** self.convs
        h, w = pair("image_size", self.image_size)
        return -(-h // apart), -(-w // apart)

    @property
    def prefix(self) -> dict[str, int]:
        """Tokens before those of the image: none."""
        return {}

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of the attention probabilities of one image, or of the first convolution."""
        tokens = math.prod(self.grid)
        channels, h, w = self.image_shape
        stride = max(1, self.kernel // 2 - 1)
        places = -(-h // stride) * -(-w // stride)
        numbers = max(self.dim if self.convs == 1 else 64, channels * self.kernel**2)
        made = places * numbers, f"the windows of {places:,} places, an array that"
        return max((self.heads * tokens**2, f"{tokens:,} tokens, whose attention"), made)


_SMALL = (3, 1, 32), (3, 2, 32)  # kernel, convolutions, image
_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"cct_{depth}_{kernel}x{convs}_{image}": {
        "image_size": image, "kernel": kernel, "convs": convs, "depth": depth, "dim": dim, "heads": heads,
        "mlp_dim": mlp * dim, "num_classes": 10 if image == 32 else 1000,
    }
    for depth, dim, heads, mlp, made in (
        (2, 128, 2, 1, _SMALL), (4, 128, 2, 1, _SMALL), (6, 256, 4, 2, _SMALL), (7, 256, 4, 2, (*_SMALL, (7, 2, 224))),
        (14, 384, 6, 3, ((7, 2, 224), (7, 2, 384))),
    )
    for kernel, convs, image in made
}  # fmt: skip


@register("cct", _CONFIGURATIONS)
class CCT(Model):
    """Images (B, C, H, W) → logits (B, num_classes): convolutions make tokens, and what pools them weighs them.

    No class token; the blocks are those of the authors' code (:class:`minivit.nn.BetweenNormBlock`), without a bias of
    queries, keys and values, and LayerNorms add 1e-5. What can be set:
    """

    Settings = CCTSettings
    encoder = ("in_channels", "kernel", "convs", "dim", "depth", "heads", "mlp_dim", "position")
    resize = resize

    def make(self, s: CCTSettings) -> None:
        """Make the layers."""
        self.pool = s.pool
        self.patch_embed = ConvTokenizer(s.image_size, s.in_channels, s.dim, s.kernel, s.convs)
        self.pos_embed = make_positions(s)
        self.embed_drop = Dropout(s.dropout)
        self.blocks = [
            BetweenNormBlock(
                s.dim, s.heads, s.mlp_dim, qkv_bias=False, norm_eps=1e-5, dropout=s.dropout,
                attention_dropout=s.attention_dropout, drop_path=s.drop_path * i / max(s.depth - 1, 1),
                recompute=s.recompute,
            )
            for i in range(s.depth)
        ]  # fmt: skip
        self.norm = LayerNorm(s.dim, 1e-5)
        self.attn_pool = SequencePool(s.dim)
        self.head = Linear(s.dim, s.num_classes, weight_init=init.zeros)

    def layers(self) -> list[list[Any]]:
        """Return the embedding, the blocks one by one, and what comes after them."""
        first = [self.patch_embed, self.pos_embed]
        return [first, *([block] for block in self.blocks), [self.norm, self.attn_pool, self.head]]

    @property
    def num_tokens(self) -> int:
        """Length of the encoder's sequence."""
        return self.patch_embed.num_patches

    def row_size(self) -> RowSize:
        """Return the numbers of an image's tokens, and in how many blocks they are kept."""
        return RowSize(self.num_tokens * self.settings.dim, len(self.blocks))

    def embed(self, images: Any) -> Any:
        """Return the tokens that enter the encoder: (B, C, H, W) → (B, N, dim)."""
        x = self.patch_embed(images)
        return self.embed_drop(put_together(x, [], table(self.pos_embed, x)))

    def read(self, x: Any) -> Any:
        """Return what the head reads of tokens after the final norm: (B, N, dim) → (B, dim)."""
        return self.attn_pool(x)

    def classify(self, x: Any) -> Any:
        """Return the logits of tokens after the final norm."""
        return self.head(self.read(x))

    def forward(self, images: Any, mask: Any = None) -> Any:
        """Return logits (B, num_classes); ``mask`` (N, N) or (B, N, N) bool, True = may not attend."""
        x = self.embed(images)
        mask = attention_mask(mask, x.shape[1], x.shape[0])
        for block in self.blocks:
            x = block(x, mask)
        return self.classify(self.norm(x))

    def trace(self, images: Any, mask: Any = None, change: Change | None = None) -> Trace:
        """Return logits, the tokens after every block and every attention on the path: :mod:`minivit.models.trace`."""
        return trace(self, images, mask, change)

    def adapt(self, state: dict[str, Any], old: Any) -> list[str]:
        """Make a checkpoint's positions fit this model's grid of tokens: :meth:`Model.adapt`."""
        check_encoder(self, state, old, self.encoder)
        return fit_tokens(state, self.state_dict(), old, self.settings)


_IMAGENET = Preparation("centre bicubic 0.9", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OF_WEIGHTS = {  # of the authors' weights, by what they were trained on
    "32": Preparation("centre bicubic 1", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),  # CIFAR-10
    "7_7x2_224": Preparation("centre bicubic 1", (0.4353, 0.3773, 0.2872), (0.2966, 0.2455, 0.2698)),  # Flowers-102
}
prepare(
    {name: next((p for end, p in _OF_WEIGHTS.items() if name.endswith(end)), _IMAGENET) for name in _CONFIGURATIONS}
)
