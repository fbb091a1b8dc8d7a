"""The Vision Transformer (Dosovitskiy et al. 2020, "An image is worth 16x16 words", arXiv 2010.11929, section 3.1)."""

from __future__ import annotations

from typing import Any

from minivit import ops
from minivit.backend import Key
from minivit.nn import init
from minivit.nn.attention import EncoderBlock, attention_mask
from minivit.nn.layers import Dropout, LayerNorm, Linear, PatchEmbed
from minivit.nn.module import Module, Parameter, RowSize, set_layer
from minivit.nn.random import random_key
from minivit.nn.rules import Size, check_settings


class ViT(Module):
    """Images (B, C, H, W) → logits (B, num_classes). Sizes are an int or (height, width).

    ``mlp_dim`` is 4·dim and ``dim_head`` dim/heads unless given. ``dropout`` acts after the attention's projection and
    in the MLP, ``attention_dropout`` on the attention probabilities, ``embed_dropout`` after the positions are added;
    ``drop_path`` is the last block's rate, rising linearly from 0. ``pool`` is "cls" (a class token), "mean" (over the
    patches, no class token) or "none" (logits for every patch, (B, N, num_classes)). ``position`` is "learned" or
    "none". ``head`` is "linear" or, for pre-training, "mlp" (one hidden layer with tanh). Parameters are drawn from
    ``seed`` and bear timm's names. ``weight_init`` is "paper", as the paper's reference code has it, or "mimetic",
    which learns faster from few images: attention starts like trained attention (Trockman and Kolter 2023), positions
    as sines and cosines. ``recompute`` trades time for memory in training: blocks keep no more than their input and run
    again in the backward pass. ``config`` holds all settings but that one, which changes no number: ``ViT(**config)``.
    """

    def __init__(
        self,
        image_size: Size = 32,
        patch_size: Size = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_dim: int | None = None,
        dim_head: int | None = None,
        qkv_bias: bool = True,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        embed_dropout: float = 0.0,
        drop_path: float = 0.0,
        pool: str = "cls",
        position: str = "learned",
        head: str = "linear",
        weight_init: str = "paper",
        seed: int = 0,
        recompute: bool = False,
    ) -> None:
        self.config = check_settings(
            image_size=image_size, patch_size=patch_size, in_channels=in_channels, num_classes=num_classes, dim=dim,
            depth=depth, heads=heads, mlp_dim=mlp_dim, dim_head=dim_head, qkv_bias=qkv_bias, activation=activation,
            norm_eps=norm_eps, dropout=dropout, attention_dropout=attention_dropout, embed_dropout=embed_dropout,
            drop_path=drop_path, pool=pool, position=position, head=head,
            weight_init=weight_init, seed=seed,
        )  # fmt: skip
        self.dim, self.pool = dim, pool
        with random_key(Key(self.config["seed"])):
            self.patch_embed = PatchEmbed(image_size, patch_size, in_channels, dim)
            self.cls_token = Parameter(init.zeros(1, 1, dim), decays=False) if pool == "cls" else None
            self.pos_embed = None
            if position == "learned":
                self.pos_embed = Parameter(init.normal(1, self.num_tokens, dim, std=0.02), decays=False)
            self.embed_drop = Dropout(embed_dropout)
            self.blocks = [
                EncoderBlock(dim, heads, mlp_dim or 4 * dim, dim_head, qkv_bias, activation, norm_eps,
                             dropout, attention_dropout, drop_path * i / max(depth - 1, 1), recompute)
                for i in range(depth)
            ]  # fmt: skip
            self.norm = LayerNorm(dim, norm_eps)
            # the hidden layer of the pre-training head; the linear head after it is all that fine-tuning keeps
            self.pre_logits = Linear(dim, dim) if head == "mlp" else None
            self.reset_head(num_classes)
            if weight_init == "mimetic":
                self._init_mimetic()

    def _init_mimetic(self) -> None:
        for block in self.blocks:
            block.attn.init_mimetic()
        if self.pos_embed is not None:
            self.pos_embed.data[0, -self.patch_embed.num_patches :] = init.sincos_2d(self.patch_embed.grid, self.dim)

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by one linear layer of zeros, as for fine-tuning (section 3.2), and drop a hidden layer."""
        before = getattr(self, "head", None)
        if before is not None:
            self.config |= check_settings(num_classes=num_classes, head="linear")
            self.pre_logits = None
        self.head = Linear(self.dim, num_classes, weight_init=init.zeros)
        if before is not None:
            self.head.to(before.weight.dtype).to(before.weight.device)
        set_layer(0, self.patch_embed, self.cls_token, self.pos_embed)
        for i, block in enumerate(self.blocks, 1):
            set_layer(i, block)
        set_layer(len(self.blocks) + 1, self.norm, self.pre_logits, self.head)

    def row_size(self) -> RowSize:
        """Return what an image is in every block: tokens · dim numbers."""
        return RowSize(self.num_tokens * self.dim, len(self.blocks))

    @property
    def num_tokens(self) -> int:
        """Length of the encoder's sequence: patches, and the class token if there is one."""
        return self.patch_embed.num_patches + (self.cls_token is not None)

    def embed(self, images: Any) -> Any:
        """Return the tokens that enter the encoder (eq. 1): (B, C, H, W) → (B, T, dim)."""
        x = self.patch_embed(images)  # (B, C, H, W) → (B, N, dim)
        if self.cls_token is not None:
            cls = ops.broadcast_to(self.cls_token, (x.shape[0], 1, self.dim))
            x = ops.concat([cls, x], axis=1)  # (B, N, dim) → (B, 1 + N, dim)
        return self.embed_drop(x if self.pos_embed is None else x + self.pos_embed)

    def features(self, images: Any, mask: Any = None, tokens: int | None = None) -> Any:
        """Return the tokens after the final norm (eq. 4): (B, C, H, W) → (B, T, dim), or only the first ``tokens``."""
        x = self.embed(images)
        mask = attention_mask(mask, x.shape[1], x.shape[0])
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, mask)
        return self.norm(last(x, mask, queries=tokens))

    def forward(self, images: Any, mask: Any = None) -> Any:
        """Return logits (B, num_classes); ``mask`` (T, T) or (B, T, T) bool, True = may not attend."""
        if self.pool == "cls":
            x = self.features(images, mask, tokens=1)[:, 0]  # no more than is read: (B, 1, dim) → (B, dim)
        else:
            x = self.features(images, mask)
            x = ops.mean(x, axis=1) if self.pool == "mean" else x  # (B, N, dim) → (B, dim)
        if self.pre_logits is not None:
            x = ops.tanh(self.pre_logits(x))
        return self.head(x)

    def attention_maps(self, images: Any, mask: Any = None) -> list[Any]:
        """Return each block's attention probabilities, (B, heads, T, T): row i is what token i attends to."""
        x = self.embed(images)
        mask = attention_mask(mask, x.shape[1], x.shape[0])
        maps = []
        for block in self.blocks:
            maps.append(block.attn.weights(block.norm1(x), mask))
            x = block(x, mask)
        return maps
