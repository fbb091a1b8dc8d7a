"""Layers that later Vision Transformers put in the place of the paper's: RMSNorm, SwiGLU, LayerScale, patch dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.op import raw
from minivit.backend import Key, array_module, device_of, on_device_of, to_device, uniform
from minivit.nn import init
from minivit.nn.layers import Dropout, Linear, added
from minivit.nn.module import Module, Parameter, shape_text
from minivit.nn.random import next_key
from minivit.nn.rules import count, epsilon, positive, rate


class RMSNorm(Module):
    """x / √(mean x² + eps) · weight over the last axis, of length ``dim``; weight one.

    Zhang and Sennrich 2019, "Root mean square layer normalization", arXiv 1910.07467, eq. 4.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        dim, self.eps = count("dim", dim), epsilon("eps", eps)
        self.weight = Parameter(init.ones(dim))

    def extra_repr(self) -> str:
        """Return the length of the axis."""
        return shape_text(self.weight.shape)

    def forward(self, x: Any) -> Any:
        """Return the normalised x, of the same shape."""
        return ops.rms_norm(x, self.weight, self.eps)


class Identity(Module):
    """x as it is: what stands where a layer is left out."""

    def forward(self, x: Any) -> Any:
        """Return x."""
        return x


class SwiGLU(Module):
    """An MLP gated by silu: (…, dim) → silu(x·W₁ᵀ + b₁) ∘ (x·W₂ᵀ + b₂) (…, hidden) → (…, dim).

    Shazeer 2020, "GLU variants improve transformer", arXiv 2002.05202, eq. 6. ``fc1`` (2·hidden, dim) holds W₁, the
    gate, and W₂ under it, as timm's SwiGLUPacked does.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0) -> None:
        hidden = count("hidden", hidden)
        self.fc1 = Linear(dim, 2 * hidden, weight_init=init.xavier_uniform_pair)
        self.fc2 = Linear(hidden, dim)
        self.fc1.weight.matrices, self.fc2.weight.matrices = 2, 1
        self.drop = Dropout(dropout)

    def extra_repr(self) -> str:
        """Return how it is gated."""
        return "gated by silu"

    def forward(self, x: Any, onto: Any = None) -> Any:
        """Return the MLP's tokens, with dropout after either layer, added to ``onto`` if that is given."""
        gate, value = ops.split(self.fc1(x), 2, axis=-1)  # (…, dim) → (…, 2·hidden) → (…, hidden) each
        return added(self.fc2, self.drop, self.drop(ops.silu(gate) * value), onto)  # → (…, dim)


class LayerScale(Module):
    """γ ∘ x: a factor for each number of a token, small at first (Touvron et al. 2021, CaiT, arXiv 2103.17239, eq. 4).

    With it deep encoders start as the identity. ``value`` is what γ begins with.
    """

    def __init__(self, dim: int, value: float) -> None:
        self.gamma = Parameter(init.ones(count("dim", dim)) * np.float32(positive("value", value)))

    def extra_repr(self) -> str:
        """Return the number of factors."""
        return shape_text(self.gamma.shape)

    def forward(self, x: Any) -> Any:
        """Return γ ∘ x, x (…, dim)."""
        return x * self.gamma


class PatchDropout(Module):
    """Leave out a share p of each image's patches while training: the blocks have fewer tokens to work on.

    Liu et al. 2023, "PatchDropout", arXiv 2208.07220. Of N patches N - round(p·N) stay, one at least, in random order;
    the ``prefix`` tokens before them all stay.
    """

    def __init__(self, p: float, prefix: int) -> None:
        self.p, self.prefix = rate("p", p), prefix

    def extra_repr(self) -> str:
        """Return the rate."""
        return f"p={self.p:g}"

    def apart(self, x: Any, mask: Any = None) -> tuple[Any, Any]:
        """Return the tokens that are left, (B, T, dim) → (B, T', dim), and the mask over them: in eval mode all.

        ``mask`` is (T, T) or (B, 1, T, T) bool, or None. An image draws by its place in the batch.
        """
        if not (self.training and self.p > 0):
            return x, mask
        s = selection(raw(x), self.prefix, self.p, next_key())  # (B, T', T)
        return ops.matmul(s, x), None if mask is None else select_mask(s, mask)

    def forward(self, x: Any) -> Any:
        """Return the tokens that are left, (B, T, dim) → (B, T', dim)."""
        return self.apart(x)[0]


def selection(x: Any, prefix: int, p: float, key: Key) -> Any:
    """Return a matrix S (B, T', T) of 0 and 1, whose product S·x are the tokens left of an array x (B, T, dim).

    Row k of an image picks the patch of the k-th smallest of N random numbers. Nothing is sorted: a GPU would wait.
    """
    xp, (batch, tokens) = array_module(x), x.shape[:2]
    patches = tokens - prefix
    kept = max(1, patches - round(p * patches))
    with on_device_of(x):
        u = uniform(key, (batch, patches), start=key.row * patches, device=device_of(x))
        place = xp.arange(patches)
        # how many come before each, equal ones in their order: (B, N, N) → (B, N)
        before = (u[:, None] < u[:, :, None]) | ((u[:, None] == u[:, :, None]) & (place < place[:, None]))
        rank = before.sum(axis=-1)
        out = xp.zeros((batch, prefix + kept, tokens), x.dtype)
        out[:, :prefix, :prefix] = xp.eye(prefix, dtype=x.dtype)
        out[:, prefix:, prefix:] = rank[:, None] == xp.arange(kept)[:, None]  # (B, kept, N)
        return out


def select_mask(s: Any, mask: Any) -> Any:
    """Return the mask (B, 1, T', T') over the tokens that S (B, T', T) leaves, of one (T, T) or (B, 1, T, T)."""
    s = s[:, None]  # → (B, 1, T', T)
    mask = to_device(raw(mask), device_of(s)).astype(s.dtype)
    return ops.matmul(ops.matmul(s, mask), s.swapaxes(-1, -2)) > 0.5


def masked_diagonal(mask: Any, x: Any) -> Any:
    """Return the mask of tokens x (B, T, dim), (T, T) or (B, 1, T, T), in which none attends to itself either.

    Lee, Lee and Song 2021, arXiv 2112.13492, section 3.2 ("diagonal masking").
    """
    xp = array_module(raw(x))
    with on_device_of(raw(x)):
        place = xp.arange(x.shape[1])
        own = place[:, None] == place  # (T, T)
        return own if mask is None else own | to_device(raw(mask), device_of(raw(x)))


def log_scale(heads: int, dim_head: int) -> np.ndarray:
    """Return log(1/√d) for each head, (heads,): what a learned temperature starts with."""
    return init.ones(heads) * np.float32(-0.5 * math.log(dim_head))
