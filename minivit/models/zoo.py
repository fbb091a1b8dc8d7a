"""Named configurations, with timm's names where it has one, and how images are prepared for their weights.

Sizes are those of Dosovitskiy et al. 2020 (Table 1), of Zhai et al. 2022 ("Scaling vision transformers", arXiv
2106.04560, Table 2: giant, gigantic) and of Touvron et al. 2021 ("Training data-efficient image transformers", arXiv
2012.12877, Table 1: tiny, small). All have 1,000 classes, timm's LayerNorm eps of 1e-6 and the GELU of the error
function unless they say otherwise. A name stands for no weights: of timm's tags behind a dot it has none.
"""

from __future__ import annotations

from typing import Any

from minivit.data import Preparation
from minivit.models.hybrid import Hybrid
from minivit.models.preparations import prepare
from minivit.models.registry import MODELS, configure
from minivit.models.resnet import ResNet
from minivit.models.vit import ViT

_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # mean and std of Google's models, which see −1 to 1
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_NONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 192, "depth": 12, "heads": 3},
    "small": {"dim": 384, "depth": 12, "heads": 6},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "wee": {"dim": 256, "depth": 14, "heads": 4, "mlp_dim": 1280},
    "little": {"dim": 320, "depth": 14, "heads": 5, "mlp_dim": 1792},
    "medium": {"dim": 512, "depth": 12, "heads": 8},
    "mediumd": {"dim": 512, "depth": 20, "heads": 8},
    "betwixt": {"dim": 640, "depth": 12, "heads": 10},
    "plus": {"dim": 896, "depth": 12, "heads": 14},
    "so150m": {"dim": 896, "depth": 18, "heads": 14, "mlp_dim": 2304},
    "so150m2": {"dim": 832, "depth": 21, "heads": 13, "mlp_dim": 2176},
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
_DISTILLED = {
    f"deit_{size}_distilled_patch16_{image}": _sized(size, 16, image, distilled=True)
    for size, image in (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
}
# Touvron et al. 2022, "DeiT III", arXiv 2204.07118
_DEIT3 = {
    f"deit3_{size}_patch{patch}_{image}": _sized(size, patch, image, no_embed_class=True, layer_scale=1e-6)
    for size, patch, image in (
        ("small", 16, 224), ("small", 16, 384), ("medium", 16, 224), ("base", 16, 224), ("base", 16, 384),
        ("large", 16, 224), ("large", 16, 384), ("huge", 14, 224),
    )
}  # fmt: skip
# without class token, of which I-JEPA's (Assran et al. 2023, arXiv 2301.08243) are all but the first
_GAP = {
    "vit_base_patch16_gap_224": _sized("base", 16, 224, heads=16, pool="mean"),
    "vit_huge_patch14_gap_224": _sized("huge", 14, 224, pool="mean"),
    "vit_huge_patch16_gap_448": _sized("huge", 16, 448, pool="mean"),
    "vit_giant_patch16_gap_224": _sized("giant", 16, 224, pool="mean"),
}
# Oquab et al. 2023, "DINOv2", arXiv 2304.07193; Darcet et al. 2023, "Vision transformers need registers", 2309.16588
_GATED = {"dim": 1536, "heads": 24, "mlp": "swiglu", "mlp_dim": 4096}
_DINOV2 = {
    f"vit_{size}_patch14_{'reg4_' if n else ''}dinov2": _sized(
        size, 14, 518, layer_scale=1e-5, registers=n, no_embed_class=n > 0, **(_GATED if size == "giant" else {})
    )
    for size in ("small", "base", "large", "giant")
    for n in (0, 4)
}
# Beyer et al. 2023, "FlexiViT", arXiv 2212.08013
_FLEXI = {f"flexivit_{size}": _sized(size, 16, 240, no_embed_class=True) for size in ("small", "base", "large")}

# timm's own, whose sizes no paper says. Registers take part in no positions where they stand apart.
_LS = {"layer_scale": 1e-5}
_NORM_FIRST = {"pool": "mean", "qkv_bias": False, "layer_scale": 1e-6}
_TEST = {"image_size": 160, "patch_size": 16, "num_classes": 1000, "mlp_dim": 192, "registers": 1, **_LS}
_TEST96 = {**_TEST, "dim": 96, "depth": 9, "heads": 3}


def _gap(size: str, image: int, registers: int, apart: bool = True, **more: Any) -> dict[str, Any]:
    """Return a model that takes the mean of its patches, and norms that, with registers beside them."""
    more = {"pool": "mean", "fc_norm": True, "no_embed_class": apart, **_LS, **more}
    return _sized(size, 16, image, registers=registers, **more)


_OTHERS: dict[str, dict[str, dict[str, Any]]] = {  # by the part of an image that they see
    "0.95": {
        "test_vit": {**_TEST, "dim": 64, "depth": 6, "heads": 2, "registers": 0, "layer_scale": None},
        "test_vit2": {**_TEST, "dim": 64, "depth": 8, "heads": 2, "pool": "mean", "fc_norm": True},
        "test_vit3": {**_TEST96, "pool": "map_all"},
        "test_vit4": {**_TEST96, "mlp_dim": 288, "norm": "rms", "pool": "mean", "fc_norm": True},
        "vit_base_patch16_plus_240": _sized("plus", 16, 240, **_LS),
        "vit_base_patch32_plus_256": _sized("plus", 32, 256, **_LS),
        "vit_medium_patch16_gap_240": _sized("medium", 16, 240, num_classes=11821, **_NORM_FIRST),
        "vit_medium_patch16_gap_256": _sized("medium", 16, 256, **_NORM_FIRST),
        "vit_betwixt_patch16_gap_256": _sized("betwixt", 16, 256, **_NORM_FIRST),
        **{
            f"vit_{size}_patch16_reg{n}_gap_256": _gap(size, 256, n)
            for size in ("wee", "little", "medium", "mediumd", "betwixt")
            for n in {"wee": (1,), "mediumd": (4,)}.get(size, (1, 4))
        },
        "vit_so150m_patch16_reg4_gap_256": _sized("so150m", 16, 256, registers=4, pool="mean"),
    },
    "0.9": {
        "vit_small_patch16_36x1_224": _sized("small", 16, 224, depth=36, **_LS),
        "vit_base_patch16_rpn_224": _gap("base", 224, 0, False, layer_scale=None, qkv_bias=False, block="res_post"),
        "vit_base_patch16_reg4_gap_256": _gap("base", 256, 4, layer_scale=None),
        "vit_so150m_patch16_reg4_map_256": _sized("so150m", 16, 256, registers=4, pool="map"),
    },
    "1": {
        "vit_mediumd_patch16_reg4_gap_384": _gap("mediumd", 384, 4),
        "vit_betwixt_patch16_reg4_gap_384": _gap("betwixt", 384, 4),
        "vit_so150m_patch16_reg4_gap_384": _sized("so150m", 16, 384, registers=4, pool="mean"),
        "vit_so150m2_patch16_reg1_gap_256": _gap("so150m2", 256, 1, apart=False, qkv_bias=False),
        "vit_so150m2_patch16_reg1_gap_384": _gap("so150m2", 384, 1, apart=False, qkv_bias=False),
    },
}  # fmt: skip
_EVA = {"pool": "mean", "class_token": True, "fc_norm": True}  # Fang et al. 2022, "EVA", arXiv 2211.07636
_IN_THEIR_WAY: dict[str, tuple[dict[str, Any], str, tuple[Any, Any]]] = {
    "vit_base_patch16_224_miil": (
        _sized("base", 16, 224, num_classes=11221, qkv_bias=False), "centre bilinear 0.875", _NONE,
    ),
    "vit_medium_patch16_gap_384": (_sized("medium", 16, 384, **_NORM_FIRST), "squash bicubic 0.95", _HALF),
    "vit_so150m2_patch16_reg1_gap_448": (
        _gap("so150m2", 448, 1, apart=False, qkv_bias=False), "squash bicubic 1", _HALF,
    ),
    "eva_large_patch14_196": (_sized("large", 14, 196, **_EVA), "centre bicubic 1", _CLIP),
    "eva_large_patch14_336": (_sized("large", 14, 336, **_EVA), "squash bicubic 1", _CLIP),
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

# Steiner et al. 2021, "How to train your ViT?", arXiv 2106.10270, section 3.3; patches in pixels of the image
_R = {
    f"vit_{name}_{image}": _sized(name.partition("_")[0], patch, image, stages=stages)
    for name, patch, stages in (
        ("tiny_r_s16_p8", 32, ()), ("small_r26_s32", 32, (2, 2, 2, 2)), ("base_r26_s32", 32, (2, 2, 2, 2)),
        ("base_r50_s16", 16, (3, 4, 9)), ("large_r50_s32", 32, (3, 4, 6, 3)),
    )
    for image in (224, 384)
    if (name, image) != ("base_r26_s32", 384)
}  # fmt: skip
# as large as vit_cifar: of 2.7 million parameters
_SMALL_R = {"hybrid_cifar": {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 6, "heads": 3, "stages": (1,)}}
_RESNETS = {
    "resnet_cifar": {"image_size": 32, "depths": (2, 2, 2, 2), "width": 32},
    "resnet_digits": {"image_size": 8, "in_channels": 1, "depths": (1, 1), "width": 16},
}

_IMAGENETS = _DEIT | _DISTILLED | _DEIT3 | _GAP | _DINOV2
configure(ViT.kind, _PAPER | _IMAGENETS | _FLEXI | _SMALL)
prepare({name: _prepared(s["image_size"], _HALF) for name, s in _PAPER.items()})
prepare({name: _prepared(s["image_size"], _IMAGENET) for name, s in _IMAGENETS.items()})
prepare({name: Preparation("centre bicubic 0.95", *_HALF) for name in _FLEXI})
for part, models in _OTHERS.items():
    configure(ViT.kind, models)
    prepare({name: Preparation(f"centre bicubic {part}", *_HALF) for name in models})
for name, (values, fit, numbers) in _IN_THEIR_WAY.items():
    configure(ViT.kind, {name: values})
    prepare({name: Preparation(fit, *numbers)})
prepare(
    {
        "vit_base_patch16_gap_224": _prepared(224, _HALF),
        "vit_small_patch8_224": _prepared(224, _IMAGENET),  # DINO's (Caron et al. 2021, arXiv 2104.14294)
    }
)

configure(Hybrid.kind, _SMALL_R | _R)
prepare({name: _prepared(s["image_size"], _HALF) for name, s in _R.items()})
configure(ResNet.kind, _RESNETS)

USUAL_MODELS = {12: "vit_digits", 28: "vit_mnist", 1 << 15: "vit_cifar"}
"""The model for images of at most so many pixels a side, where none is named."""


def usual_model(side: int, kind: str = ViT.kind) -> str:
    """Return the name of the model for images of ``side`` pixels; of another kind than those, its first one's."""
    name = next((name for most, name in USUAL_MODELS.items() if side <= most), "vit_cifar")
    return name if MODELS[name].kind == kind else next(n for n, model in MODELS.items() if model.kind == kind)
