"""Named configurations, with timm's names where it has one, and how images are prepared for their weights.

Sizes are those of Dosovitskiy et al. 2020 (Table 1), of Zhai et al. 2022 ("Scaling vision transformers", arXiv
2106.04560, Table 2: giant, gigantic) and of Touvron et al. 2021 ("Training data-efficient image transformers", arXiv
2012.12877, Table 1: tiny, small). All have 1,000 classes, timm's LayerNorm eps of 1e-6 and the GELU of the error
function unless they say otherwise. A name stands for no weights: of timm's tags behind a dot it has none.
"""

from __future__ import annotations

from typing import Any

from minivit.data import Preparation
from minivit.models.preparations import prepare
from minivit.models.registry import MODELS, configure
from minivit.models.vit import ViT

_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and std of Google's models, which see −1 to 1
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "huge": {"dim": 1280, "depth": 32, "heads": 16},
    "giant": {"dim": 1408, "depth": 40, "heads": 16, "mlp_dim": 6144},
    "gigantic": {"dim": 1664, "depth": 48, "heads": 16, "mlp_dim": 8192},
}
_USUAL = (  # size, patch, images
    ("tiny", 16, (224, 384)), ("small", 32, (224, 384)), ("small", 16, (224, 384)), ("small", 8, (224,)),
    ("base", 32, (224, 384)), ("base", 16, (224, 384)), ("base", 8, (224, 384)),
    ("large", 32, (224, 384)), ("large", 16, (224, 384)), ("large", 14, (224,)),
    ("huge", 14, (224, 518)), ("giant", 14, (224,)), ("gigantic", 14, (224,)),
)  # fmt: skip


def _sized(size: str, patch: int, image: int, **more: Any) -> dict[str, Any]:
    return {"image_size": image, "patch_size": patch, "num_classes": 1000, **_SIZES[size], **more}


def _prepared(image: int, numbers: tuple[Any, Any]) -> Preparation:
    """Return timm's way: of small images a tenth is cut off, of large ones nothing."""
    return Preparation(f"centre bicubic {0.9 if image == 224 else 1}", *numbers)


_PAPER = {f"vit_{s}_patch{p}_{image}": _sized(s, p, image) for s, p, images in _USUAL for image in images}
_DEIT = {
    f"deit_{size}_patch16_{image}": _sized(size, 16, image)
    for size, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
}
# without class token, of which I-JEPA's (Assran et al. 2023, arXiv 2301.08243) are all but the first
_GAP = {
    "vit_base_patch16_gap_224": _sized("base", 16, 224, heads=16, pool="mean"),
    "vit_huge_patch14_gap_224": _sized("huge", 14, 224, pool="mean"),
    "vit_huge_patch16_gap_448": _sized("huge", 16, 448, pool="mean"),
    "vit_giant_patch16_gap_224": _sized("giant", 16, 224, pool="mean"),
}
_OTHERS = {
    "vit_base_patch16_224_miil": _sized("base", 16, 224, num_classes=11221, qkv_bias=False),
    "test_vit": {
        "image_size": 160, "patch_size": 16, "num_classes": 1000, "dim": 64, "depth": 6, "heads": 2, "mlp_dim": 192,
    },
}  # fmt: skip
_SMALL = {
    "vit_digits": {
        "image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 64, "depth": 4, "heads": 4, "mlp_dim": 128,
    },
    "vit_mnist": {"image_size": 28, "patch_size": 4, "in_channels": 1, "dim": 64, "depth": 6, "heads": 4},
    "vit_cifar": {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 6, "heads": 3},
    # ViT-Lite of Hassani et al. 2021, "Escaping the big data paradigm with compact transformers", arXiv 2104.05704
    "vit_lite_6_4": {
        "image_size": 32, "patch_size": 4, "dim": 256, "depth": 6, "heads": 4, "mlp_dim": 512, "qkv_bias": False,
    },
    "vit_lite_7_4": {
        "image_size": 32, "patch_size": 4, "dim": 256, "depth": 7, "heads": 4, "mlp_dim": 512, "qkv_bias": False,
    },
}  # fmt: skip

configure(ViT.kind, _PAPER | _DEIT | _GAP | _OTHERS | _SMALL)
prepare(
    {name: _prepared(s["image_size"], _HALF) for name, s in _PAPER.items()}
    | {name: _prepared(s["image_size"], _IMAGENET) for name, s in (_DEIT | _GAP).items()}
    | {
        "vit_base_patch16_gap_224": _prepared(224, _HALF),
        "vit_small_patch8_224": _prepared(224, _IMAGENET),  # DINO's (Caron et al. 2021, arXiv 2104.14294)
        "vit_base_patch16_224_miil": Preparation("centre bilinear 0.875", *_NONE),
        "test_vit": Preparation("centre bicubic 0.95", *_HALF),
    }
)

USUAL_MODELS = {12: "vit_digits", 28: "vit_mnist", 1 << 15: "vit_cifar"}
"""The model for images of at most so many pixels a side, where none is named."""


def usual_model(side: int, kind: str = ViT.kind) -> str:
    """Return the name of the model for images of ``side`` pixels; of another kind than those, its first one's."""
    name = next((name for most, name in USUAL_MODELS.items() if side <= most), "vit_cifar")
    return name if MODELS[name].kind == kind else next(n for n, model in MODELS.items() if model.kind == kind)
