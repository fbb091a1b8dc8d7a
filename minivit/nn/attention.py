"""Multi-head self-attention and the encoder block around it (ViT appendix A and eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivit import ops
from minivit.autograd.graph import recording
from minivit.errors import ConfigError, ShapeError
from minivit.nn import init
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, added
from minivit.nn.module import Module
from minivit.nn.random import next_key
from minivit.nn.recompute import recompute
from minivit.nn.rules import count, optional, rate
from minivit.ops.attention import bool_mask, merge_heads, split_heads


class MultiHeadAttention(Module):
    """Self-attention of ``heads`` heads over tokens (B, T, dim) → (B, T, dim)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        dim, heads = count("dim", dim), count("heads", heads)
        dim_head = optional(count)("dim_head", dim_head)
        if dim_head is None and dim % heads:
            raise ConfigError(
                f"dim {dim} is not divided by {heads} heads", "choose heads that divide dim, or set dim_head"
            )
        self.heads = heads
        self.dim_head = dim_head or dim // heads
        inner = heads * self.dim_head
        self.qkv = Linear(dim, 3 * inner, qkv_bias, weight_init=init.xavier_uniform_qkv)
        self.proj = Linear(inner, dim)
        self.qkv.weight.matrices, self.proj.weight.matrices = 3, 1
        self.attention_dropout = rate("attention_dropout", attention_dropout)
        self.drop = Dropout(dropout)

    def extra_repr(self) -> str:
        """Return the heads, and the dropout of what they attend to."""
        return f"{self.heads} heads of {self.dim_head}, p={self.attention_dropout:g}"

    def init_mimetic(self) -> None:
        """Draw the weights anew, as :func:`minivit.nn.init.mimetic_pair` has them."""
        if init.outlined() or init.is_undrawn():
            return
        dim, width = self.proj.weight.shape[0], self.dim_head
        weights = self.qkv.weight.data.reshape(3, self.heads * width, dim)
        for start in range(0, self.heads * width, width):
            query, key = init.mimetic_pair(dim, width, 0.7)  # (dim, d), (d, dim)
            weights[0, start : start + width], weights[1, start : start + width] = query.T, key
        value, proj = init.mimetic_pair(dim, self.heads * width, -0.4)
        weights[2], self.proj.weight.data[...] = value.T, proj.T

    def forward(self, x: Any, mask: Any = None, queries: int | None = None, onto: Any = None) -> Any:
        """Return the attended tokens (B, T, dim), or of the first ``queries`` tokens only, (B, queries, dim).

        ``mask`` as :func:`attention_mask` gives it. The result is added to ``onto``, of its shape, if that is given.
        """
        p = self.attention_dropout if self.training else 0.0
        key = next_key() if p > 0 else None
        mask = mask if mask is None or queries is None else mask[..., :queries, :]
        # (B, T, 3·H·d) → (B, T or queries, H·d)
        heads = ops.self_attention(self.qkv(x), self.heads, queries, mask, None, p, key)
        return added(self.proj, self.drop, heads, onto)  # → (B, T or queries, dim)

    def traced(self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
        """Return the attended tokens (B, T, dim), and the attention probabilities (B, heads, T, T) they came by.

        Row i is what token i attends to, and sums to 1; that of a token that may attend to nothing is zero.
        ``change(p)`` returns what is used in the place of the probabilities.
        """
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (B, T, 3·H·d) → (3, B, H, T, d)
        p = ops.attention_weights(q, k, mask)  # (B, H, T, T)
        if p.node is None and recording.enabled:
            p.requires_grad = True  # of a model that is frozen
        p = p if change is None else change(p)
        rate = self.attention_dropout if self.training else 0.0
        dropped = ops.dropout(p, rate, next_key()) if rate > 0 else p
        heads = merge_heads((dropped @ v)[None])  # (B, H, T, d) → (B, T, H·d)
        return self.drop(self.proj(heads)), p  # → (B, T, dim)


class EncoderBlock(Module):
    """Pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)) (ViT eq. 2 and 3).

    With ``recompute`` it keeps no more than x while training, and runs again in the backward pass.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_dim: int,
        dim_head: int | None = None,
        qkv_bias: bool = True,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        recompute: bool = False,
    ) -> None:
        self.recompute = recompute
        self.norm1 = LayerNorm(dim, norm_eps)
        self.attn = MultiHeadAttention(dim, heads, dim_head, qkv_bias, attention_dropout, dropout)
        self.norm2 = LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, mlp_dim, activation, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Any, mask: Any = None, queries: int | None = None) -> Any:
        """Return the tokens after the block, (B, T, dim) → (B, T, dim), or the first ``queries`` of them only."""
        if self.recompute:
            return recompute(lambda x: self._encode(x, mask, queries), x, self)
        return self._encode(x, mask, queries)

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        rest = x if queries is None else x[:, :queries]
        attended = self._onto(rest, lambda onto: self.attn(self.norm1(x), mask, queries, onto))
        return self._onto(attended, lambda onto: self.mlp(self.norm2(attended), onto))

    def _onto(self, x: Any, branch: Callable[[Any], Any]) -> Any:
        """Return x + drop_path(branch); where nothing is dropped, the branch's last layer adds x on the way."""
        if self.drop_path.active:
            return x + self.drop_path(branch(None))
        return self.drop_path(branch(x))

    def traced(self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None) -> tuple[Any, Any]:
        """Return the tokens after the block, (B, T, dim), and its attention: see :meth:`MultiHeadAttention.traced`."""
        attended, p = self.attn.traced(self.norm1(x), mask, change)
        x = x + self.drop_path(attended)
        return self._onto(x, lambda onto: self.mlp(self.norm2(x), onto)), p


def attention_mask(mask: Any, tokens: int, batch: int) -> Any:
    """Return a mask (T, T) or (B, T, T), bool, True = may not attend, as it fits scores (B, heads, T, T)."""
    if mask is None:
        return None
    mask = bool_mask(mask)
    if mask.shape == (tokens, tokens):
        return mask
    if mask.shape == (batch, tokens, tokens):
        return mask[:, None]  # (B, T, T) → (B, 1, T, T)
    raise ShapeError(
        f"an attention mask of shape {tuple(mask.shape)} does not fit {batch} images of {tokens} tokens",
        f"give ({tokens}, {tokens}) or ({batch}, {tokens}, {tokens}), counting the class token if there is one",
    )
