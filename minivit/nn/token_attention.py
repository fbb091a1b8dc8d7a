"""Tokens to tokens: attention that makes fewer, richer tokens of the windows of an image, again and again.

Yuan et al. 2021, "Tokens-to-Token ViT: training vision transformers from scratch on ImageNet", arXiv 2101.11986,
section 3.1. Where the paper leaves something open (the scale of the scores, what is added to v, the biases, the
constant of the division) it is as in the authors' released models.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import normal
from minivit.errors import ShapeError
from minivit.nn import init
from minivit.nn.layers import MLP, LayerNorm, Linear, Tokenizer
from minivit.nn.module import Module, Parameter
from minivit.nn.random import next_key
from minivit.nn.rules import Size, count
from minivit.ops.reduce import narrow, wide

FEATURES = 0.5
"""Random features of a performer, for each number of a token."""


class TokenTransformer(Module):
    """Windows (B, T, wide) → tokens (B, T, dim): v + attention of one head, then an MLP on its norm.

    A window has more numbers than a token, so that it is v, not the window, that attention is added to. Scores are
    divided by √wide.
    """

    def __init__(self, width: int, dim: int, eps: float) -> None:
        self.norm1 = LayerNorm(width, eps)
        self.qkv = Linear(width, 3 * dim, bias=False, weight_init=init.xavier_uniform_qkv)
        self.proj = Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = MLP(dim, dim)
        self.qkv.weight.matrices, self.proj.weight.matrices = 3, 1
        self.scale = width**-0.5

    def forward(self, x: Any) -> Any:
        """Return the tokens."""
        q, k, v = ops.split(self.qkv(self.norm1(x)), 3, axis=-1)  # (B, T, wide) → (B, T, dim) each
        attended = ops.attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0]  # one head
        x = self.proj(attended, v)
        return self.mlp(self.norm2(x), x)


class TokenPerformer(Module):
    """As :class:`TokenTransformer`, with attention whose cost grows with T, not with T².

    e^(q·k) is about φ(q)·φ(k), with φ(x) = e^(w·x - |x|²/2)/√m for m random rows w, orthogonal and of length √m, which
    are not learned: then Σ_j φ(k_j)·v_jᵀ serves all queries (Choromanski et al. 2020, "Rethinking attention with
    Performers", arXiv 2009.14794, lemma 1 and section 2.4).
    """

    def __init__(self, width: int, dim: int, eps: float) -> None:
        self.norm1 = LayerNorm(width, eps)
        self.kqv = Linear(width, 3 * dim, weight_init=init.xavier_uniform_qkv)
        self.proj = Linear(dim, dim)
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = MLP(dim, dim)
        self.kqv.weight.matrices, self.proj.weight.matrices = 3, 1
        self.w = Parameter(orthogonal_rows(max(1, int(dim * FEATURES)), dim), decays=False)
        self.w.requires_grad = False

    def features(self, x: Any) -> Any:
        """Return φ(x), (B, T, dim) → (B, T, m)."""
        m = self.w.shape[0]
        half = ops.sum(x * x, axis=-1, keepdims=True) * 0.5  # (B, T, 1)
        return ops.exp(x @ wide(self.w).transpose(1, 0) - half) * m**-0.5

    def forward(self, x: Any) -> Any:
        """Return the tokens."""
        k, q, v = ops.split(self.kqv(self.norm1(x)), 3, axis=-1)  # (B, T, wide) → (B, T, dim) each
        q, k = self.features(wide(q)), self.features(wide(k))  # (B, T, m): float16's range is too small for their sums
        over = q @ ops.swapaxes(ops.sum(k, axis=1, keepdims=True), 1, 2)  # (B, T, m)·(B, m, 1) → (B, T, 1)
        mixed = q @ (ops.swapaxes(k, 1, 2) @ wide(v)) / (over + 1e-8)  # (B, m, T)·(B, T, dim) → (B, m, dim) → …
        x = self.proj(narrow(mixed, v), v)  # (B, T, dim)
        return self.mlp(self.norm2(x), x)


def orthogonal_rows(rows: int, columns: int) -> np.ndarray:
    """Return ``rows`` orthogonal rows of length √rows, at random, (rows, columns) with rows ≤ columns."""
    if init.outlined() or init.is_undrawn():
        return init.zeros(rows, columns)
    q, r = np.linalg.qr(normal(next_key(), (columns, rows)))
    return np.ascontiguousarray((q * np.sign(np.diagonal(r))).T * rows**0.5, np.float32)


class TokensToToken(Tokenizer):
    """Images (B, C, H, W) → tokens (B, N, dim): overlapping windows, attention among them, and windows of those, twice.

    Windows of 7 pixels stand 4 apart, then twice those of 3 tokens 2 apart, which makes tokens 16 pixels apart; with
    ``patch_size`` 8 or 4 the first are of 3 and 2 or 1 apart. Between, tokens have ``token_dim`` numbers.
    """

    says = "overlapping windows, attention among them, and windows of what comes of that, twice"

    def __init__(
        self, image_size: Size, patch_size: Size, in_channels: int, dim: int, kind: Any = TokenPerformer,
        token_dim: int = 64, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__(image_size, patch_size, in_channels)
        apart = self.patch_size[0]
        if self.patch_size not in ((4, 4), (8, 8), (16, 16)) or any(side % apart for side in self.image_size):
            what = f"tokens to tokens of images {self.image_size} with patch_size {patch_size}"
            raise ShapeError(what, "patch_size is 16, as in the paper, 8 or 4, and divides height and width")
        self.splits = [(7, 4, 2) if apart == 16 else (3, apart // 4, 1), (3, 2, 1), (3, 2, 1)]
        self.first = self.splits[0][0]
        token_dim = count("token_dim", token_dim)
        self.attention1 = kind(self.in_channels * self.first**2, token_dim, eps)
        self.attention2 = kind(token_dim * 9, token_dim, eps)
        self.project = Linear(token_dim * 9, count("dim", dim))

    @property
    def filters(self) -> Any:
        """The filters that see the image, those of the first queries, keys and values: (3·token_dim, C, P, P)."""
        first = self.attention1
        layer: Any = first.kqv if isinstance(first, TokenPerformer) else first.qkv
        return layer.weight.reshape((-1, self.in_channels, self.first, self.first))

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W)."""
        (h, w), apart = self.image_size, 1
        x = self.rounded(images)
        for layer, (kernel, stride, padding) in zip(
            (self.attention1, self.attention2, self.project), self.splits, strict=True
        ):
            windows = ops.unfold(x.reshape((*x.shape[:2], h // apart, w // apart)), kernel, stride, padding)
            x, apart = layer(ops.swapaxes(windows, 1, 2)), apart * stride  # (B, C·k·k, T) → (B, T, C·k·k) → (B, T, D)
            x = x if layer is self.project else ops.swapaxes(x, 1, 2)  # → (B, D, T)
        return x  # (B, N, dim)
