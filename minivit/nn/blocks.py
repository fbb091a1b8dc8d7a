"""Encoder blocks that put their norms elsewhere, or work in parallel; and whatever module stands in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minivit.errors import ConfigError, ShapeError
from minivit.nn.attention import EncoderBlock, Heads
from minivit.nn.module import Module
from minivit.nn.recompute import recompute


class PostNormBlock(EncoderBlock):
    """x = norm(x + attention(x)), then norm(x + MLP(x)) (Vaswani et al. 2017, arXiv 1706.03762, section 3.1).

    What a trace says attention and the MLP add is what either step changes of x, its norm included.
    """

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        rest = x if queries is None else x[:, :queries]
        x = self.norm1(self._onto(rest, lambda onto: self.attn(x, mask, queries, onto), self.ls1))
        return self.norm2(self._onto(x, lambda onto: self.mlp(x, onto), self.ls2))

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return the tokens after the block, its heads, and what either step changed: :meth:`EncoderBlock.traced`."""
        attended, heads = self.attn.traced(x, mask, change)
        between = self.norm1(x + self._scaled(attended, self.ls1))
        out = self.norm2(between + self._scaled(self.mlp(between), self.ls2))
        return out, heads, between - x, out - between


class BetweenNormBlock(EncoderBlock):
    """x = norm(x + attention(norm(x))), then x + MLP(x): the second norm is on the stream, between the two.

    So the code of Hassani et al. 2021, arXiv 2104.05704, has it. What a trace says attention adds has that norm in it.
    """

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        rest = x if queries is None else x[:, :queries]
        x = self.norm2(self._onto(rest, lambda onto: self.attn(self.norm1(x), mask, queries, onto), self.ls1))
        return self._onto(x, lambda onto: self.mlp(x, onto), self.ls2)

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return the tokens after the block, its heads, and what either step changed: :meth:`EncoderBlock.traced`."""
        attended, heads = self.attn.traced(self.norm1(x), mask, change)
        between = self.norm2(x + self._scaled(attended, self.ls1))
        mlp = self._scaled(self.mlp(between), self.ls2)
        return between + mlp, heads, between - x, mlp


class ResidualPostNormBlock(EncoderBlock):
    """x + norm(attention(x)), then x + norm(MLP(x)) (Liu et al. 2022, Swin V2, arXiv 2111.09883, section 3.2)."""

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        rest = x if queries is None else x[:, :queries]
        x = rest + self._scaled(self.norm1(self.attn(x, mask, queries)), self.ls1)
        return x + self._scaled(self.norm2(self.mlp(x)), self.ls2)

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return the tokens after the block, its heads, and what is added to x: :meth:`EncoderBlock.traced`."""
        attended, heads = self.attn.traced(x, mask, change)
        attended = self._scaled(self.norm1(attended), self.ls1)
        x = x + attended
        mlp = self._scaled(self.norm2(self.mlp(x)), self.ls2)
        return x + mlp, heads, attended, mlp


class ParallelBlock(EncoderBlock):
    """x + attention(norm(x)) + MLP(norm(x)), one norm for both (Dehghani et al. 2023, ViT-22B, arXiv 2302.05442, 2)."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.norm2 = None

    def _encode(self, x: Any, mask: Any, queries: int | None) -> Any:
        normed = self.norm1(x)
        rest, read = (x, normed) if queries is None else (x[:, :queries], normed[:, :queries])
        x = self._onto(rest, lambda onto: self.attn(normed, mask, queries, onto), self.ls1)
        return self._onto(x, lambda onto: self.mlp(read, onto), self.ls2)

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return the tokens after the block, its heads, and what is added to x: :meth:`EncoderBlock.traced`."""
        normed = self.norm1(x)
        attended, heads = self.attn.traced(normed, mask, change)
        attended, mlp = self._scaled(attended, self.ls1), self._scaled(self.mlp(normed), self.ls2)
        return x + attended + mlp, heads, attended, mlp


class Plugged(Module):
    """Any module of tokens (B, T, dim) → (B, T, dim) in the place of blocks.

    It gets a mask, (T, T) or (B, 1, T, T), only where there is one: ``module(x, mask)``. A ``traced`` of its own is
    what a trace calls, see :meth:`EncoderBlock.traced`.
    """

    def __init__(self, module: Module, recompute: bool = False) -> None:
        self.module, self.recompute = module, recompute

    def positions(self, x: Any) -> Any:
        """Return None: what it adds is its own affair."""
        return None

    def forward(self, x: Any, mask: Any = None, queries: int | None = None) -> Any:
        """Return the tokens after it, or the first ``queries`` of them only."""
        out: Any = recompute(lambda x: self._run(x, mask), x, self) if self.recompute else self._run(x, mask)
        return out if queries is None else out[:, :queries]

    def _run(self, x: Any, mask: Any) -> Any:
        out = self.module(x) if mask is None else self.module(x, mask)
        if getattr(out, "shape", None) != x.shape:
            got = getattr(out, "shape", type(out).__name__)
            what = f"the encoder {type(self.module).__name__} was given tokens {x.shape}, and returned {got}"
            raise ShapeError(what, "return tokens of the same shape, (B, T, dim)")
        return out

    def traced(
        self, x: Any, mask: Any = None, change: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Heads, Any, Any]:
        """Return what the module's own ``traced`` gives; ConfigError if it has none."""
        if not callable(own := getattr(self.module, "traced", None)):
            what = f"the encoder {type(self.module).__name__} cannot be traced: it does not say what its attention is"
            raise ConfigError(what, "give it a traced(x, mask, change), as minivit.nn.EncoderBlock has")
        found: tuple[Any, Heads, Any, Any] = own(x, mask, change)
        return found
