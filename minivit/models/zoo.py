"""Named configurations: the paper's (Table 1, and Ti and S of Touvron et al. 2021), and small ones for small images."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from minivit.errors import unknown_name
from minivit.models.vit import ViT
from minivit.nn.rules import pair

_SIZES = {  # dim, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_PATCHES = {"tiny": (16,), "small": (32, 16), "base": (32, 16, 8), "large": (32, 16), "huge": (14,)}
LARGE_IMAGE = {14: 518}  # for patches that do not divide the usual 384 pixels

MODELS: dict[str, dict[str, Any]] = {
    f"vit_{size}_patch{patch}_{image}": {
        "image_size": image,
        "patch_size": patch,
        "num_classes": 1000,
        **dict(zip(("dim", "depth", "heads"), _SIZES[size], strict=True)),
    }
    for size, patches in _PATCHES.items()
    for patch in patches
    for image in (224, LARGE_IMAGE.get(patch, 384))
}
MODELS |= {
    "vit_digits": {
        "image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 64, "depth": 4, "heads": 4, "mlp_dim": 128,
    },
    "vit_mnist": {"image_size": 28, "patch_size": 4, "in_channels": 1, "dim": 64, "depth": 6, "heads": 4},
    "vit_cifar": {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 6, "heads": 3},
    # ViT-Lite-7/4 of Hassani et al. 2021, "Escaping the big data paradigm with compact transformers", arXiv 2104.05704
    "vit_lite_7_4": {
        "image_size": 32, "patch_size": 4, "dim": 256, "depth": 7, "heads": 4, "mlp_dim": 512, "qkv_bias": False,
    },
}  # fmt: skip


def list_models(pattern: str = "*") -> list[str]:
    """Return the names that match a shell pattern such as ``"vit_*_224"``."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **settings: Any) -> ViT:
    """Return a freshly initialised model by name; ``settings`` override its configuration."""
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    known = inspect.signature(ViT).parameters
    for setting in settings:
        if setting not in known:
            raise unknown_name("setting", setting, known)
    return ViT(**{**MODELS[name], **settings})


def parameter_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield (name, shape, the settings that it follows from) of each parameter of ``ViT(**config)``; nothing is made.

    ``config`` has every setting, each such as it may be (:func:`minivit.nn.rules.check_settings`).
    """
    dim, heads, depth = config["dim"], config["heads"], config["depth"]
    inner, hidden = heads * (config["dim_head"] or dim // heads), config["mlp_dim"] or 4 * dim
    (height, width), (p, q) = pair("image_size", config["image_size"]), pair("patch_size", config["patch_size"])
    yield "patch_embed.proj.weight", (dim, config["in_channels"], p, q), "dim, in_channels, patch_size"
    yield "patch_embed.proj.bias", (dim,), "dim"
    tokens = (height // p) * (width // q)
    if config["pool"] == "cls":
        tokens += 1
        yield "cls_token", (1, 1, dim), "pool, dim"
    if config["position"] == "learned":
        yield "pos_embed", (1, tokens, dim), "position, image_size, patch_size, pool, dim"
    attention = "heads, dim_head, dim"
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            yield f"blocks.{i}.{norm}.weight", (dim,), "depth, dim"
            yield f"blocks.{i}.{norm}.bias", (dim,), "depth, dim"
        yield f"blocks.{i}.attn.qkv.weight", (3 * inner, dim), attention
        if config["qkv_bias"]:
            yield f"blocks.{i}.attn.qkv.bias", (3 * inner,), f"qkv_bias, {attention}"
        yield f"blocks.{i}.attn.proj.weight", (dim, inner), attention
        yield f"blocks.{i}.attn.proj.bias", (dim,), "dim"
        yield f"blocks.{i}.mlp.fc1.weight", (hidden, dim), "mlp_dim, dim"
        yield f"blocks.{i}.mlp.fc1.bias", (hidden,), "mlp_dim, dim"
        yield f"blocks.{i}.mlp.fc2.weight", (dim, hidden), "mlp_dim, dim"
        yield f"blocks.{i}.mlp.fc2.bias", (dim,), "dim"
    yield "norm.weight", (dim,), "dim"
    yield "norm.bias", (dim,), "dim"
    if config["head"] == "mlp":
        yield "pre_logits.weight", (dim, dim), "head, dim"
        yield "pre_logits.bias", (dim,), "head, dim"
    yield "head.weight", (config["num_classes"], dim), "num_classes, dim"
    yield "head.bias", (config["num_classes"],), "num_classes"


def count_parameters(config: Mapping[str, Any]) -> int:
    """Return the number of parameters of ``ViT(**config)``, without making it, however many blocks it has."""
    filled = {p.name: p.default for p in inspect.signature(ViT).parameters.values()} | dict(config)
    none, one = (
        sum(math.prod(shape) for _, shape, _ in parameter_shapes(filled | {"depth": depth})) for depth in (0, 1)
    )
    return int(none + filled["depth"] * (one - none))
