"""Named configurations: the paper's (Table 1, and Ti and S of Touvron et al. 2021), and small ones for small images."""

from __future__ import annotations

from minivit.models.registry import MODELS, configure
from minivit.models.vit import ViT

_SIZES = {  # dim, depth, heads
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_PATCHES = {"tiny": (16,), "small": (32, 16), "base": (32, 16, 8), "large": (32, 16), "huge": (14,)}
LARGE_IMAGE = {14: 518}  # for patches that do not divide the usual 384 pixels

_PAPER = {
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
_SMALL = {
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

configure(ViT.kind, _PAPER | _SMALL)

USUAL_MODELS = {12: "vit_digits", 28: "vit_mnist", 1 << 15: "vit_cifar"}
"""The model for images of at most so many pixels a side, where none is named."""


def usual_model(side: int, kind: str = ViT.kind) -> str:
    """Return the name of the model for images of ``side`` pixels; of another kind than those, its first one's."""
    name = next((name for most, name in USUAL_MODELS.items() if side <= most), "vit_cifar")
    return name if MODELS[name].kind == kind else next(n for n, model in MODELS.items() if model.kind == kind)
