"""Layers of a Vision Transformer, initialised as the paper's reference code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.op import raw
from minivit.autograd.tensor import Tensor
from minivit.backend import is_array, is_half, spelled
from minivit.errors import DTypeError, ShapeError
from minivit.nn import init
from minivit.nn.module import Module, Parameter, shape_text
from minivit.nn.random import next_key
from minivit.nn.rules import Size, count, epsilon, named, pair, rate


class Linear(Module):
    """y = x·Wᵀ + b: x (…, in_features) → (…, out_features); weight (out, in), Xavier-uniform unless told, bias zero."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_init: Callable[[int, int], np.ndarray] = init.xavier_uniform,
    ) -> None:
        in_features, out_features = count("in_features", in_features), count("out_features", out_features)
        self.weight = Parameter(weight_init(out_features, in_features))
        self.bias = Parameter(init.zeros(out_features)) if bias else None

    def extra_repr(self) -> str:
        """Return what comes in and goes out."""
        out_features, in_features = self.weight.shape
        return f"{in_features} → {out_features}" + ("" if self.bias is not None else ", no bias")

    def forward(self, x: Any, onto: Any = None) -> Any:
        """Return x·Wᵀ + b, added to ``onto`` (…, out_features) if that is given."""
        return ops.linear(x, self.weight, self.bias, onto)


class LayerNorm(Module):
    """Normalise over the last axis, of length ``dim``; weight one, bias zero."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        dim, self.eps = count("dim", dim), epsilon("eps", eps)
        self.weight = Parameter(init.ones(dim))
        self.bias = Parameter(init.zeros(dim))

    def extra_repr(self) -> str:
        """Return the length of the axis."""
        return shape_text(self.weight.shape)

    def forward(self, x: Any) -> Any:
        """Return the normalised x, of the same shape."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Dropout(Module):
    """Zero each element with probability p while training; see :func:`minivit.ops.dropout`."""

    def __init__(self, p: float) -> None:
        self.p = rate("p", p)

    def extra_repr(self) -> str:
        """Return the rate; DropPath does not: it has another in each block, which are shown as one otherwise."""
        return f"p={self.p:g}"

    @property
    def active(self) -> bool:
        """Whether it drops anything now."""
        return self.training and self.p > 0

    def forward(self, x: Any) -> Any:
        """Return x with elements dropped, or x itself in eval mode."""
        return ops.dropout(x, self.p, next_key()) if self.active else x


class DropPath(Module):
    """Zero a sample's whole branch with probability p while training; see :func:`minivit.ops.drop_path`."""

    def __init__(self, p: float) -> None:
        self.p = rate("p", p)

    @property
    def active(self) -> bool:
        """Whether it drops anything now."""
        return self.training and self.p > 0

    def forward(self, x: Any) -> Any:
        """Return x with samples dropped, or x itself in eval mode."""
        return ops.drop_path(x, self.p, next_key()) if self.active else x


class MLP(Module):
    """Two linear layers with an activation between: (…, dim) → (…, hidden) → (…, dim)."""

    def __init__(self, dim: int, hidden: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        activation = named(ops.ACTIVATIONS)("activation", activation)
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            layer.bias = Parameter(init.normal(layer.weight.shape[0], std=1e-6))
            layer.weight.matrices = 1
        self.activation = activation
        self.drop = Dropout(dropout)

    def extra_repr(self) -> str:
        """Return the activation."""
        return self.activation

    def forward(self, x: Any, onto: Any = None) -> Any:
        """Return fc2(activation(fc1(x))), with dropout after either layer, added to ``onto`` if that is given."""
        hidden = self.drop(ops.ACTIVATIONS[self.activation](self.fc1(x)))  # (…, dim) → (…, hidden)
        return added(self.fc2, self.drop, hidden, onto)  # (…, hidden) → (…, dim)


def added(last: Linear, drop: Dropout, x: Any, onto: Any) -> Any:
    """Return drop(last(x)), added to ``onto`` if that is given: within the layer's product if nothing is dropped."""
    if onto is None or not drop.active:
        return drop(last(x, onto))
    return onto + drop(last(x))


class PatchProjection(Module):
    """Weight and bias that turn a patch into a token, kept in the shape of the convolution they amount to."""

    def __init__(self, dim: int, channels: int, patch: tuple[int, int]) -> None:
        fan_in = channels * patch[0] * patch[1]
        self.weight = Parameter(init.lecun_normal(dim, fan_in).reshape(dim, channels, *patch))
        self.bias = Parameter(init.zeros(dim))

    def extra_repr(self) -> str:
        """Return what comes in, a patch, and goes out, a token."""
        return f"{shape_text(self.weight.shape[1:])} → {self.weight.shape[0]}"

    def forward(self, patches: Any) -> Any:
        """Return tokens (B, N, dim) of patches (B, N, C·P·Q)."""
        return ops.linear(patches, self.weight, self.bias)


def checked_images(images: Any, expected: tuple[int, int, int], dtype: Any) -> tuple[Any, Any]:
    """Return images (B, C, H, W) as a Tensor, and the dtype to round them to, None if they have the model's ``dtype``.

    Raises ShapeError for others than ``expected``, (C, H, W), and DTypeError for others than the model's.
    """
    if not is_array(raw(images)):
        remedy = "make an array of them: np.asarray(images, np.float32)"
        raise DTypeError(f"the model takes images as an array or a Tensor, got a {type(images).__name__}", remedy)
    if len(images.shape) != 4 or images.shape[1:] != expected:
        raise ShapeError(
            f"the model takes images of shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}",
            "axes are batch, channel, height, width; resize the images or build the model for them",
        )
    alike = images.dtype == dtype or {images.dtype.char, dtype.char} == {"d", "D"}  # or a gradient check's step
    rounds = is_half(dtype) and images.dtype == np.float32
    if not (alike or rounds):
        remedy = "scale and standardise them: mv.data.standardize(images, mean, std), as in training"
        if images.dtype.kind not in "iub":
            remedy = f"convert the images: images.{'astype' if is_array(images) else 'to'}({spelled(dtype)})"
        raise DTypeError(f"the model takes {dtype} images, got {images.dtype}", remedy)
    return images if isinstance(images, Tensor) else Tensor(images), dtype if rounds else None  # a twin may run then


class Tokenizer(Module):
    """Base of what makes tokens (B, N, dim) of images (B, C, H, W), of a grid over the image, row by row.

    ``patch_size`` is how many pixels the tokens are apart, down and across; ``says`` is in words how they are made, if
    not as a linear map of each patch's own pixels.
    """

    says = ""

    def __init__(self, image_size: Size, patch_size: Size, in_channels: int) -> None:
        self.in_channels = count("in_channels", in_channels)
        self.image_size, self.patch_size = pair("image_size", image_size), pair("patch_size", patch_size)

    def extra_repr(self) -> str:
        """Return the image, and the patches that it is cut into."""
        return f"{shape_text((self.in_channels, *self.image_size))} in {shape_text(self.grid)} patches"

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along height and width."""
        (h, w), (p, q) = self.image_size, self.patch_size
        return -(-h // p), -(-w // q)

    @property
    def num_patches(self) -> int:
        """Number of tokens that an image gives."""
        return self.grid[0] * self.grid[1]

    @property
    def filters(self) -> Any:
        """The filters that see the image, (D, C, P, Q)."""
        raise NotImplementedError(f"{type(self).__name__} has no filters")

    def rounded(self, images: Any) -> Any:
        """Return images (B, C, H, W) in the model's dtype; float32 will do for a half."""
        images, dtype = checked_images(images, (self.in_channels, *self.image_size), next(self.parameters()).dtype)
        return images if dtype is None else ops.convert(images, dtype)


class PatchEmbed(Tokenizer):
    """Images (B, C, H, W) → tokens (B, N, dim), one for each patch of P by Q pixels, row by row (ViT eq. 1)."""

    def __init__(self, image_size: Size, patch_size: Size, in_channels: int, dim: int) -> None:
        super().__init__(image_size, patch_size, in_channels)
        for size, patch, axis in zip(self.image_size, self.patch_size, ("height", "width"), strict=True):
            if patch < 1 or size < patch or size % patch:
                near = sorted({max(size // patch, 1) * patch, -(-size // patch) * patch}) if patch > 0 else []
                raise ShapeError(
                    f"image {axis} {size} is not divided by patch {axis} {patch}",
                    f"use an image {axis} of {' or '.join(map(str, near))}, or another patch size",
                )
        self.proj = PatchProjection(count("dim", dim), self.planes, self.patch_size)

    @property
    def planes(self) -> int:
        """Channels of the patches."""
        return self.in_channels

    @property
    def filters(self) -> Any:
        """The filters that see the image, (D, C, P, Q)."""
        return self.proj.weight

    def forward(self, images: Any) -> Any:
        """Return the tokens (B, N, dim) of images (B, C, H, W) in the model's dtype; float32 will do for a half."""
        images, dtype = checked_images(images, (self.in_channels, *self.image_size), self.proj.weight.dtype)
        patches = ops.patchify(images, self.patch_size, dtype)  # (B, C, H, W) → (B, N, C·P·Q)
        return self.proj(patches)  # → (B, N, dim)
