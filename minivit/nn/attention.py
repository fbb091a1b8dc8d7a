"""Multi-head self-attention and the encoder block around it (ViT appendix A and eq. 2 and 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minivit import ops
from minivit.autograd.graph import recording
from minivit.autograd.tensor import Tensor, tensor
from minivit.backend import is_floating, is_half
from minivit.errors import ConfigError, ShapeError
from minivit.nn import init
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, added
from minivit.nn.module import Constant, Module
from minivit.nn.random import next_key
from minivit.nn.recompute import recompute
from minivit.nn.refined import LayerScale
from minivit.nn.rules import count, optional, rate
from minivit.ops.attention import attention_scores, bool_mask, masked_softmax, merge_heads, split_heads
from minivit.ops.reduce import narrow


@dataclass(frozen=True)
class Heads:
    """What passes through the heads of one attention, Tensors on the path to what comes after.

    Queries ``q``, keys ``k`` and values ``v``, (B, H, T, d); ``scores`` = q·kᵀ/√d, (B, H, T, T), before a mask;
    ``weights`` = P, their softmax over the keys: row i is what token i attends to, and sums to 1 (that of a token that
    may attend to nothing is zero); ``out`` = P·v, (B, H, T, d). Of :class:`~minivit.nn.scored.ScoredAttention` the
    queries and keys are the normalised ones, and the scores have its temperature and its bias in them.
    """

    q: Any
    k: Any
    v: Any
    scores: Any
    weights: Any
    out: Any


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

    def parts(self, x: Any) -> tuple[Any, Any, Any]:
        """Return queries, keys and values (B, H, T, d) of tokens (B, T, dim)."""
        q, k, v = split_heads(self.qkv(x), 3, self.heads)  # (B, T, 3·H·d) → (3, B, H, T, d)
        return q, k, v

    def scores(self, q: Any, k: Any) -> Any:
        """Return what the softmax is taken of: (B, H, T, d) → (B, H, T, T)."""
        return attention_scores(q, k)

    def traced(self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None) -> tuple[Any, Heads]:
        """Return the attended tokens (B, T, dim), and what passed through the heads.

        ``change(p)`` returns what is used in the place of the probabilities p (B, H, T, T), a Tensor or an array.
        """
        q, k, v = self.parts(x)
        scores = self.scores(q, k)
        p = narrow(masked_softmax(scores, mask), q)
        if change is not None:
            before, p = p.shape, watched(change(p))
            if p.shape != before:
                raise ShapeError(f"change was given attention {before}, and returned {p.shape}", "keep its shape")
        rate = self.attention_dropout if self.training else 0.0
        out = (ops.dropout(p, rate, next_key()) if rate > 0 else p) @ v  # (B, H, T, T) → (B, H, T, d)
        heads = merge_heads(out[None])  # → (B, T, H·d)
        return self.drop(self.proj(heads)), Heads(q, k, v, scores, p, out)  # → (B, T, dim)


class EncoderBlock(Module):
    """Pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)) (ViT eq. 2 and 3).

    With ``recompute`` it keeps no more than x while training, and runs again in the backward pass. ``norm`` makes its
    norms; ``attn`` and ``mlp`` stand in the place of those that the sizes make; ``layer_scale`` is the first value of
    the factors that scale what either adds. ``positions`` (1, T, dim), if there are some, are added to x first.
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
        *,
        norm: Callable[[int, float], Module] = LayerNorm,
        attn: MultiHeadAttention | None = None,
        mlp: Module | None = None,
        layer_scale: float | None = None,
    ) -> None:
        self.recompute = recompute
        self.pos_embed: Any = None
        self.norm1 = norm(dim, norm_eps)
        self.attn = attn or MultiHeadAttention(dim, heads, dim_head, qkv_bias, attention_dropout, dropout)
        self.ls1 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.norm2: Any = norm(dim, norm_eps)
        self.mlp = mlp or MLP(dim, mlp_dim, activation, dropout)
        self.ls2 = None if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def positions(self, x: Any) -> Any:
        """Return what is added to tokens like x (B, T, dim) before anything else: (1, T, dim), or None.

        Positions of the patches only, (1, N, dim), are 0 for the tokens before them.
        """
        made = table(self.pos_embed, x)
        if made is None or made.shape[1] == x.shape[1]:
            return made
        return ops.pad(made, [(0, 0), (x.shape[1] - made.shape[1], 0), (0, 0)])  # (1, N, dim) → (1, T, dim)

    def forward(self, x: Any, mask: Any = None, queries: int | None = None) -> Any:
        """Return the tokens after the block, (B, T, dim) → (B, T, dim), or the first ``queries`` of them only."""
        if self.recompute:
            return recompute(lambda x: self._encode(self._placed(x), mask, queries), x, self)
        return self._encode(self._placed(x), mask, queries)

    def _placed(self, x: Any) -> Any:
        return x if self.pos_embed is None else x + self.positions(x)

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        rest = x if queries is None else x[:, :queries]
        attended = self._onto(rest, lambda onto: self.attn(self.norm1(x), mask, queries, onto), self.ls1)
        return self._onto(attended, lambda onto: self.mlp(self.norm2(attended), onto), self.ls2)

    def _onto(self, x: Any, branch: Callable[[Any], Any], scale: Any = None) -> Any:
        """Return x + drop_path(scale(branch)); where the branch is as it is, its last layer adds x on the way."""
        if self.drop_path.active or scale is not None:
            return x + self._scaled(branch(None), scale)
        return self.drop_path(branch(x))

    def _scaled(self, branch: Any, scale: Any) -> Any:
        return self.drop_path(branch if scale is None else scale(branch))

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return the tokens after the block, what passed through its heads, and what attention and the MLP added to x.

        All but the heads are (B, T, dim); x comes with the block's positions, and the three add up to what is returned.
        See :meth:`MultiHeadAttention.traced`.
        """
        attended, heads = self.attn.traced(self.norm1(x), mask, change)
        attended = self._scaled(attended, self.ls1)
        x = x + attended
        mlp = self._scaled(self.mlp(self.norm2(x)), self.ls2)
        return x + mlp, heads, attended, mlp


def table(positions: Any, x: Any) -> Any:
    """Return positions, a Tensor or a Module that makes them, (1, T, dim), for tokens x of a dtype; None for None."""
    if positions is None:
        return None
    made = positions() if isinstance(positions, Module) else positions
    # fixed ones stay in float32 where a model computes in half precision
    return ops.convert(made, x.dtype) if isinstance(made, Constant) and is_half(x.dtype) else made


def watched(x: Any) -> Any:
    """Return x, an array or a Tensor, as a Tensor that gradients reach, though nothing that it came from needs one."""
    x = x if isinstance(x, Tensor) else tensor(x)
    if x.node is None and recording.enabled and is_floating(x.dtype):
        x = x.detach()  # another: the caller's own stays as it is
        x.requires_grad = True
    return x


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
