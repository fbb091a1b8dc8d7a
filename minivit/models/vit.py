"""The Vision Transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words", arXiv 2010.11929, section 3.1)."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from minivit import ops
from minivit.models.adapt import adapt_tokens, resize
from minivit.models.embedding import make_patches, make_positions, make_relative, make_token, put_together
from minivit.models.encoder import NORMS, make_blocks
from minivit.models.registry import Model, register
from minivit.models.trace import Change, Trace, trace
from minivit.models.vit_settings import ViTSettings
from minivit.nn import init
from minivit.nn.attention import attention_mask, table
from minivit.nn.layers import Dropout, Linear
from minivit.nn.module import RowSize
from minivit.nn.refined import Identity, PatchDropout, masked_diagonal
from minivit.nn.scored import AttentionPool


@register("vit")
class ViT(Model):
    """Images (B, C, H, W) → logits (B, num_classes), or with pool "none" (B, N, num_classes) for every patch.

    Parameters bear timm's names. Mimetic weights start attention like trained attention (Trockman and Kolter 2023,
    arXiv 2305.09828) and positions as sines and cosines. What can be set:
    """

    Settings = ViTSettings
    replaced = ("head.", "head_dist.", "pre_logits.")
    encoder: ClassVar[tuple[str, ...]] = (
        "in_channels", "patch_size", "tokenizer", "dim", "depth", "heads", "dim_head", "mlp_dim", "qkv_bias",
        "position", "position_at", "no_embed_class", "fc_norm", "block", "norm", "mlp", "layer_scale", "qk_norm",
        "lsa", "transformer",
    )  # fmt: skip
    adapt, resize = adapt_tokens, resize

    def make(self, s: ViTSettings) -> None:
        """Make the layers."""
        self.dim, self.pool, self.prefix = s.dim, s.pool, sum(s.prefix.values())
        norm = partial(NORMS[s.norm], eps=s.norm_eps)
        self.patch_embed = make_patches(s)
        self.cls_token, self.dist_token, self.reg_token = (
            make_token(s, name) for name in ("cls_token", "dist_token", "reg_token")
        )
        self.pos_embed = make_positions(s)
        self.shared_rel_pos = make_relative(s) if s.position_at == "shared" else None
        self.embed_drop = Dropout(s.embed_dropout)
        self.patch_drop = PatchDropout(s.patch_drop, self.prefix) if s.patch_drop else None
        self.blocks = make_blocks(s, self.pos_embed, self.shared_rel_pos)
        self.norm = Identity() if s.fc_norm else norm(s.dim)
        self.attn_pool = None
        if s.pool in ("map", "map_all"):
            self.attn_pool = AttentionPool(s.dim, s.heads, s.mlp_dim or 4 * s.dim, s.activation, norm, s.qkv_bias)
        self.fc_norm = norm(s.dim) if s.fc_norm else None
        # the hidden layer of the pre-training head; the linear head after it is all that fine-tuning keeps
        self.pre_logits = Linear(s.dim, s.dim) if s.head == "mlp" else None
        self.head = Linear(s.dim, s.num_classes, weight_init=init.zeros)
        self.head_dist = Linear(s.dim, s.num_classes, weight_init=init.zeros) if s.distilled else None
        if s.weight_init == "mimetic":
            for block in self.blocks:
                block.attn.init_mimetic()
            if self.pos_embed is not None:
                self.pos_embed.data[0, -self.patch_embed.num_patches :] = init.sincos_2d(self.patch_embed.grid, s.dim)

    def layers(self) -> list[list[Any]]:
        """Return the embedding, the blocks one by one, and what comes after them."""
        tokens = [self.cls_token, self.dist_token, self.reg_token]
        first = [self.patch_embed, *tokens, self.shared_rel_pos, self.pos_embed]
        last = [self.norm, self.attn_pool, self.fc_norm, self.pre_logits, self.head, self.head_dist]
        return [first, *([block] for block in self.blocks), last]

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by one linear layer of zeros, as for fine-tuning (section 3.2), and drop a hidden layer."""
        self.settings, self.pre_logits = replace(self.settings, head="linear"), None
        super().reset_head(num_classes)
        if self.head_dist is not None:
            self.head_dist = copy.deepcopy(self.head)

    @property
    def num_tokens(self) -> int:
        """Length of the encoder's sequence: patches, and the tokens before them."""
        return self.patch_embed.num_patches + self.prefix

    def row_size(self) -> RowSize:
        """Return the numbers of an image's tokens, and in how many blocks they are kept."""
        return RowSize(self.num_tokens * self.dim, len(self.blocks))

    def embed(self, images: Any) -> Any:
        """Return the tokens that enter the encoder (eq. 1): (B, C, H, W) → (B, T, dim)."""
        x = self.patch_embed(images)  # (B, C, H, W) → (B, N, dim)
        tokens = [self.cls_token, self.dist_token, self.reg_token]
        return self.embed_drop(put_together(x, tokens, table(self.pos_embed, x)))  # → (B, T, dim)

    def masked(self, mask: Any, x: Any) -> Any:
        """Return what tokens x (B, T, dim) may not attend to: ``mask``, (T, T) or (B, 1, T, T) or None, or more."""
        return masked_diagonal(mask, x) if self.settings.lsa else mask

    def features(self, images: Any, mask: Any = None, tokens: int | None = None) -> Any:
        """Return the tokens after the final norm (eq. 4): (B, C, H, W) → (B, T, dim), or only the first ``tokens``."""
        x = self.embed(images)
        mask = attention_mask(mask, x.shape[1], x.shape[0])
        if self.patch_drop is not None:
            x, mask = self.patch_drop.apart(x, mask)
        mask = self.masked(mask, x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        return self.norm(last(x, mask, queries=tokens))

    def read(self, x: Any) -> Any:
        """Return what the head reads of tokens after the final norm: (B, T, dim) → (B, dim), or each, (B, N, dim)."""
        if self.pool == "cls":
            x = x[:, 0]  # (B, T, dim) → (B, dim)
        else:
            x = x[:, self.prefix :] if self.prefix and self.pool != "map_all" else x  # (B, T, dim) → (B, N, dim)
            if self.pool != "none":
                x = ops.mean(x, axis=1) if self.attn_pool is None else self.attn_pool(x)  # → (B, dim)
        x = x if self.fc_norm is None else self.fc_norm(x)
        return x if self.pre_logits is None else ops.tanh(self.pre_logits(x))

    def classify(self, x: Any) -> Any:
        """Return the logits of tokens after the final norm, of which pool "cls" reads the first only."""
        if self.head_dist is not None:  # DeiT, section 4: the mean of what the two tokens say
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) * 0.5
        return self.head(self.read(x))

    def forward(self, images: Any, mask: Any = None) -> Any:
        """Return logits (B, num_classes); ``mask`` (T, T) or (B, T, T) bool, True = may not attend."""
        return self.classify(self.features(images, mask, self.num_read))

    def logits_apart(self, images: Any) -> Any:
        """Return the logits of the class and of the distillation token, (B, 2, K), or None without one (DeiT)."""
        if self.head_dist is None:
            return None
        x = self.features(images, tokens=2)  # (B, C, H, W) → (B, 2, dim)
        return ops.stack([self.head(x[:, 0]), self.head_dist(x[:, 1])], axis=1)  # → (B, 2, K)

    @property
    def num_read(self) -> int | None:
        """How many tokens the heads read, from the first on; None: all."""
        return 1 + self.settings.distilled if self.pool == "cls" else None

    def trace(self, images: Any, mask: Any = None, change: Change | None = None) -> Trace:
        """Return logits, the tokens after every block and every attention on the path: :mod:`minivit.models.trace`."""
        return trace(self, images, mask, change)

    def attention_maps(self, images: Any, mask: Any = None) -> list[Any]:
        """Return each block's attention probabilities, (B, heads, T, T): row i is what token i attends to."""
        return self.trace(images, mask).attention
