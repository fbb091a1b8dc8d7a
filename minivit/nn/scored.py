"""Attention whose scores are made in another way than q·kᵀ/√d, and attention that pools tokens into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivit import ops
from minivit.errors import ConfigError
from minivit.nn import init
from minivit.nn.attention import MultiHeadAttention
from minivit.nn.layers import MLP, LayerNorm, Linear, added
from minivit.nn.module import Module, Parameter, shape_text
from minivit.nn.random import next_key
from minivit.nn.refined import log_scale
from minivit.ops.attention import attention_scores, masked_softmax, merge_heads, split_heads
from minivit.ops.reduce import narrow, wide


class RelativePositions(Module):
    """A number for every head and every way from one patch to another: the bias of the scores, (heads, T, T).

    Of patches of ``grid`` (rows, columns) the bias is table[Δrow, Δcolumn]. T are ``prefix`` tokens and then the
    patches; a way to, from or between those tokens has a number of its own (Bao et al. 2022, BEiT, arXiv 2106.08254,
    section 2.2; Liu et al. 2021, Swin, arXiv 2103.14030, eq. 4). The parameter is timm's:
    ((2·rows - 1)·(2·columns - 1) + 3, heads), without the 3 if there is no prefix; zeros at first.
    """

    def __init__(self, grid: tuple[int, int], heads: int, prefix: int) -> None:
        self.grid, self.prefix = grid, prefix
        self.ways = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        numbers = self.ways + (3 if prefix else 0)
        self.relative_position_bias_table = Parameter(init.zeros(numbers, heads), decays=False)

    def extra_repr(self) -> str:
        """Return the patches, and the heads."""
        return f"{shape_text(self.grid)} patches, {self.relative_position_bias_table.shape[1]} heads"

    def forward(self) -> Any:
        """Return the bias (heads, T, T)."""
        (rows, columns), p = self.grid, self.prefix
        table: Any = self.relative_position_bias_table
        heads, patches = table.shape[1], rows * columns
        ways = table[: self.ways].transpose(1, 0).reshape((heads, 2 * rows - 1, 2 * columns - 1))
        bias = of_pairs(ways, columns).transpose((0, 2, 3, 1))  # → (H, 2r - 1, c, c') → (H, c, c', 2r - 1)
        bias = of_pairs(bias, rows).transpose((0, 3, 1, 4, 2))  # → (H, c, c', r, r') → (H, r, c, r', c')
        bias = bias.reshape((heads, patches, patches))
        if not p:
            return bias
        leaving, arriving, between = (
            ops.broadcast_to(table[self.ways + i].reshape((heads, 1, 1)), (heads, *shape))
            for i, shape in enumerate([(p, patches), (patches, p), (p, p)])
        )
        first = ops.concat([between, leaving], axis=2)  # (heads, prefix, T)
        return ops.concat([first, ops.concat([arriving, bias], axis=2)], axis=1)  # → (heads, T, T)


def of_pairs(x: Any, n: int) -> Any:
    """Return x (…, 2n - 1), a number for each way -(n - 1) to n - 1, as (…, n, n): [a, b] is that of the way a - b.

    No place is looked up: rows of 2n, read n times with a stride of 2n - 1, begin one place earlier each time. So the
    gradient is a sum in a fixed order.
    """
    lead = x.shape[:-1]
    x = ops.pad(x, [(0, 0)] * len(lead) + [(0, 1)]).reshape((*lead, 1, 2 * n))
    x = ops.broadcast_to(x, (*lead, n, 2 * n)).reshape((*lead, 2 * n * n))
    x = x[..., : n * (2 * n - 1)].reshape((*lead, n, 2 * n - 1))[..., n - 1 :]  # → (…, n, n), of the way b - a
    return ops.swapaxes(x, -1, -2)


class ScoredAttention(MultiHeadAttention):
    """Self-attention whose scores differ from q·kᵀ/√d by any of three:

    - ``qk_norm``, a kind of norm: queries and keys are normalised, each head's by itself, before the product (Henry et
      al. 2020, arXiv 2010.04245; Dehghani et al. 2023, ViT-22B, arXiv 2302.05442, section 2);
    - ``temperature``: each head learns what its product is multiplied by, e^temperature, which starts at 1/√d (Lee, Lee
      and Song 2021, arXiv 2112.13492, section 3.2);
    - ``rel_pos``, :class:`RelativePositions`, whose bias is added.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int | None = None,
        qkv_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        qk_norm: Callable[[int], Module] | None = None,
        temperature: bool = False,
        rel_pos: RelativePositions | None = None,
    ) -> None:
        super().__init__(dim, heads, dim_head, qkv_bias, attention_dropout, dropout)
        self.q_norm = None if qk_norm is None else qk_norm(self.dim_head)
        self.k_norm = None if qk_norm is None else qk_norm(self.dim_head)
        self.temperature = Parameter(log_scale(heads, self.dim_head)) if temperature else None
        self.rel_pos = rel_pos

    def parts(self, x: Any) -> tuple[Any, Any, Any]:
        """Return queries and keys, normalised if they are, and values: (B, H, T, d) of tokens (B, T, dim)."""
        q, k, v = super().parts(x)
        return (q if self.q_norm is None else self.q_norm(q)), (k if self.k_norm is None else self.k_norm(k)), v

    def heated(self, q: Any) -> tuple[Any, float | None]:
        """Return the queries with the temperature in them, and the scale that is left to the product."""
        if self.temperature is None:
            return q, None
        return q * ops.exp(self.temperature).reshape((self.heads, 1, 1)), 1.0

    def scores(self, q: Any, k: Any) -> Any:
        """Return what the softmax is taken of: (B, H, T or fewer, d), (B, H, T, d) → (B, H, T or fewer, T)."""
        q, scale = self.heated(q)
        scores = attention_scores(q, k, scale)
        return scores if self.rel_pos is None else scores + wide(self.rel_pos()[:, : q.shape[2]])

    def forward(self, x: Any, mask: Any = None, queries: int | None = None, onto: Any = None) -> Any:
        """Return the attended tokens, as :meth:`MultiHeadAttention.forward` does."""
        p = self.attention_dropout if self.training else 0.0
        key = next_key() if p > 0 else None
        q, k, v = self.parts(x)
        if queries is not None:
            q, mask = q[:, :, :queries], None if mask is None else mask[..., :queries, :]
        if self.rel_pos is None:
            q, scale = self.heated(q)
            out = ops.attention(q, k, v, mask, scale, p, key)
        else:
            weights = narrow(masked_softmax(self.scores(q, k), mask), q)
            out = (weights if key is None else ops.dropout(weights, p, key)) @ v  # (B, H, T, T) → (B, H, T, d)
        return added(self.proj, self.drop, merge_heads(out[None]), onto)  # → (B, T or queries, dim)


class AttentionPool(Module):
    """Tokens (B, N, dim) → one (B, dim): what a learned query attends to, and an MLP on it.

    Zhai et al. 2022, "Scaling Vision Transformers", arXiv 2106.04560, section 2.2 (the MAP head; Lee et al. 2019, Set
    Transformer). Parameters bear the names of timm's AttentionPoolLatent.
    """

    def __init__(
        self, dim: int, heads: int, mlp_dim: int, activation: str = "gelu",
        norm: Callable[[int], Module] = LayerNorm, qkv_bias: bool = True,
    ) -> None:  # fmt: skip
        if dim % heads:
            raise ConfigError(
                f"dim {dim} is not divided by the {heads} heads that pool", "choose heads that divide dim"
            )
        self.heads = heads
        self.latent = Parameter(init.normal(1, 1, dim, std=dim**-0.5), decays=False)
        self.q = Linear(dim, dim, qkv_bias)
        self.kv = Linear(dim, 2 * dim, qkv_bias, weight_init=init.xavier_uniform_pair)
        self.proj = Linear(dim, dim)
        self.norm = norm(dim)
        self.mlp = MLP(dim, mlp_dim, activation)
        self.q.weight.matrices, self.kv.weight.matrices, self.proj.weight.matrices = 1, 2, 1

    def extra_repr(self) -> str:
        """Return the heads."""
        return f"{self.heads} heads"

    def forward(self, x: Any) -> Any:
        """Return the pooled token, (B, N, dim) → (B, dim)."""
        q = split_heads(self.q(self.latent), 1, self.heads)[0]  # (1, 1, dim) → (1, H, 1, d)
        k, v = split_heads(self.kv(x), 2, self.heads)  # (B, N, 2·dim) → (2, B, H, N, d)
        q = ops.broadcast_to(q, (x.shape[0], *q.shape[1:]))
        x = self.proj(merge_heads(ops.attention(q, k, v)[None]))  # (B, H, 1, d) → (B, 1, dim)
        return self.mlp(self.norm(x), x)[:, 0]


class SequencePool(Module):
    """Tokens (B, N, dim) → their weighted mean (B, dim); a linear map of each token, and a softmax, weigh it.

    Hassani et al. 2021, arXiv 2104.05704, section 3.2 ("SeqPool").
    """

    def __init__(self, dim: int) -> None:
        self.weigh = Linear(dim, 1)

    def weights(self, x: Any) -> Any:
        """Return the weight of every token, (B, N, dim) → (B, 1, N), of sum 1."""
        return ops.softmax(ops.swapaxes(self.weigh(x), 1, 2))

    def forward(self, x: Any) -> Any:
        """Return the mean, (B, N, dim) → (B, dim)."""
        return (self.weights(x) @ x)[:, 0]  # (B, 1, N)·(B, N, dim) → (B, 1, dim) → (B, dim)
