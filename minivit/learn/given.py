"""The pieces that later exercises are given: what earlier ones asked for, each with its backward, on NumPy arrays.

``out = piece(x, weight, …)`` has a ``dx, dweight, … = piece_backward(g, x, weight, …)``, g the gradient in ``out``.
They are minivit's operations and the engine's gradients, float64; a learner's own functions do as well in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.errors import ShapeError
from minivit.learn.exercise import backward_of


def with_backwards(*names: str) -> tuple[str, ...]:
    """Return the names of pieces, and those of their backwards."""
    return tuple(name for piece in names for name in (piece, f"{piece}_backward"))


def _gradients(piece: Callable[..., Any], count: int, g: Any, *args: Any) -> Any:
    """Return the gradients of the first ``count`` arguments; ShapeError for a g that is not of the output's shape."""
    name, shape = piece.__name__, np.shape(piece(*args))
    if np.shape(g) != shape:
        what = f"{name}_backward: g has shape {np.shape(g)}, but {name} of these arguments returns {shape}"
        raise ShapeError(what, f"g is the gradient of what {name} returned")
    return backward_of(piece, count)(np.asarray(g, np.float64), *args)


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """Return x·Wᵀ + b: x (…, in), weight (out, in), bias (out,) → (…, out)."""
    return ops.linear(x, weight, bias)


def linear_backward(g: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Return (dx, dweight, dbias) for g (…, out)."""
    return _gradients(linear, 3, g, x, weight, bias)


def gelu(x: Any) -> Any:
    """Return x·Φ(x), the exact GELU, of every number."""
    return ops.gelu(x)


def gelu_backward(g: Any, x: Any) -> Any:
    """Return dx for g of the shape of x."""
    return _gradients(gelu, 1, g, x)


def layer_norm(x: Any, weight: Any, bias: Any) -> Any:
    """Return (x - μ)/√(σ² + 1e-6)·weight + bias over the last axis: x (…, D), weight and bias (D,) → (…, D)."""
    return ops.layer_norm(x, weight, bias)


def layer_norm_backward(g: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Return (dx, dweight, dbias) for g (…, D)."""
    return _gradients(layer_norm, 3, g, x, weight, bias)


def self_attention(qkv: Any, heads: int) -> Any:
    """Return the attention of every head, merged: qkv (B, T, 3D), queries, keys and values of a token → (B, T, D)."""
    return ops.self_attention(qkv, heads)


def self_attention_backward(g: Any, qkv: Any, heads: int) -> Any:
    """Return dqkv (B, T, 3D) for g (B, T, D)."""
    return _gradients(self_attention, 1, g, qkv, heads)


def block(
    x: Any, norm1_weight: Any, norm1_bias: Any, qkv_weight: Any, qkv_bias: Any, proj_weight: Any, proj_bias: Any,
    norm2_weight: Any, norm2_bias: Any, fc1_weight: Any, fc1_bias: Any, fc2_weight: Any, fc2_bias: Any, heads: int,
) -> Any:  # fmt: skip
    """Return the tokens after a pre-norm encoder block (ViT eq. 2 and 3): x (B, T, D) → (B, T, D)."""
    attended = self_attention(linear(layer_norm(x, norm1_weight, norm1_bias), qkv_weight, qkv_bias), heads)
    x = x + linear(attended, proj_weight, proj_bias)
    hidden = gelu(linear(layer_norm(x, norm2_weight, norm2_bias), fc1_weight, fc1_bias))  # (B, T, D) → (B, T, M)
    return x + linear(hidden, fc2_weight, fc2_bias)


def block_backward(g: Any, x: Any, *parameters: Any) -> Any:
    """Return (dx, dnorm1_weight, …, dfc2_bias), thirteen, for g (B, T, D); arguments as those of :func:`block`."""
    return _gradients(block, 13, g, x, *parameters)


def embed(images: Any, weight: Any, bias: Any, cls: Any, positions: Any) -> Any:
    """Return tokens (B, T, D), the class token first, then the patches row by row; positions added (ViT eq. 1).

    images (B, C, H, W), weight (D, C, P, Q), bias (D,), cls (D,), positions (T, D), T = 1 + (H/P)·(W/Q).
    """
    patches = linear(ops.patchify(images, weight.shape[2:]), weight, bias)  # (B, C, H, W) → (B, N, C·P·Q) → (B, N, D)
    return ops.embed_tokens(patches, cls.reshape((1, 1, -1)), positions[None])


def embed_backward(g: Any, images: Any, weight: Any, bias: Any, cls: Any, positions: Any) -> Any:
    """Return (dimages, dweight, dbias, dcls, dpositions) for g (B, T, D)."""
    return _gradients(embed, 5, g, images, weight, bias, cls, positions)


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Return the mean over rows of -log softmax(logits)[label], a number: logits (B, K), labels (B,) of integers."""
    return ops.cross_entropy(logits, labels)


def cross_entropy_backward(g: Any, logits: Any, labels: Any) -> Any:
    """Return dlogits (B, K) for g, a number."""
    return _gradients(cross_entropy, 1, g, logits, labels)
