"""Tokens-to-Token ViT by its paper's names: a ViT whose tokens are made so, with fixed positions.

Yuan et al. 2021, "Tokens-to-Token ViT: training vision transformers from scratch on ImageNet", arXiv 2101.11986, Table
1; those with ``_t`` attend fully while tokens are made, the others by performers (:mod:`minivit.nn.token_attention`).
Parameters of the paper, 4.3 to 64 million, count the fixed positions, too.
"""

from __future__ import annotations

from typing import Any

from minivit.data import Preparation
from minivit.models.preparations import prepare
from minivit.models.registry import configure
from minivit.models.vit import ViT

_SIZES = {  # dim, depth, heads, the MLP's hidden numbers over dim
    "7": (256, 7, 4, 2), "10": (256, 10, 4, 2), "12": (256, 12, 4, 2), "14": (384, 14, 6, 3), "19": (448, 19, 7, 3),
    "24": (512, 24, 8, 3),
}  # fmt: skip


def _sized(size: str, tokenizer: str) -> dict[str, Any]:
    dim, depth, heads, times = _SIZES[size]
    return {
        "image_size": 224, "patch_size": 16, "tokenizer": tokenizer, "num_classes": 1000, "dim": dim, "depth": depth,
        "heads": heads, "mlp_dim": times * dim, "qkv_bias": False, "norm_eps": 1e-5, "position": "sincos_1d",
    }  # fmt: skip


NAMES = {f"t2t_vit_{size}": _sized(size, "t2t") for size in _SIZES} | {
    f"t2t_vit_t_{size}": _sized(size, "t2t_transformer") for size in ("14", "19", "24")
}
"""The configurations by their names."""

configure(ViT.kind, NAMES)
prepare(dict.fromkeys(NAMES, Preparation("centre bicubic 0.9", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))))
