"""What lies beside exported weights: config.json and preprocessor_config.json, as timm and transformers read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minivit.data import Preparation
from minivit.data.fit import Fit, read_fit
from minivit.nn.rules import pair

Table = dict[str, Any]

_TIMM_POOLS = {"cls": "token", "mean": "avg", "map": "map", "map_all": "map"}
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "tanh": "tanh"}


TIMM_STAGES = {
    (): "vit_tiny_r_s16_p8_224", (2, 2, 2, 2): "vit_small_r26_s32_224", (3, 4, 9): "vit_base_r50_s16_224",
    (3, 4, 6, 3): "vit_large_r50_s32_224",
}  # fmt: skip
"""The ResNets that timm has before a ViT: a model with each, by their bottlenecks."""


def foreign_fit(preparation: Preparation) -> tuple[Fit, str]:
    """Return how other systems are told to bring pictures to the model's size, and what is not quite as minivit's."""
    fit = read_fit(preparation.fit)
    if fit.how == "crop":
        return Fit(
            "centre"
        ), "minivit cuts pictures before it scales them ('crop'), here after: up to a pixel elsewhere"
    if fit.how == "stretch":
        return Fit("squash"), "larger pictures are averaged over areas in minivit ('stretch'), here bicubic"
    return fit, ""


def _side(size: Any) -> Any:
    height, width = pair("size", size)
    return height if height == width else [height, width]


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm_config(s: Any, preparation: Preparation, classes: Sequence[str], no_embed_class: bool) -> Table:
    """Return the config.json that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` builds the model from.

    The architecture is one that all sizes can be given to, as ``model_args``.
    """
    fit, _ = foreign_fit(preparation)
    hidden, pool = s.mlp_dim or 4 * s.dim, _TIMM_POOLS[s.pool]
    ratio = hidden / s.dim if int(s.dim * (hidden / s.dim)) == hidden else (hidden + 0.5) / s.dim  # it rounds down
    args: Table = {
        "img_size": _side(s.image_size), "patch_size": _side(s.patch_size), "in_chans": s.in_channels,
        "embed_dim": s.dim, "depth": s.depth, "num_heads": s.heads, "mlp_ratio": ratio, "qkv_bias": s.qkv_bias,
        "qk_norm": s.qk_norm, "init_values": s.layer_scale, "act_layer": s.activation, "global_pool": pool,
        "pos_embed": "none" if s.position == "none" else "learn", "fc_norm": s.fc_norm,
    }  # fmt: skip
    if s.norm == "rms":
        args["norm_layer"] = "rmsnorm"
    first, architecture = "proj", "deit_base_distilled_patch16_224" if s.distilled else "vit_base_patch16_224"
    if (stages := getattr(s, "stages", None)) is not None:
        first, architecture = "backbone.stem.conv" if stages else "backbone.conv", TIMM_STAGES[stages]
        args["patch_size"] = _side([side // s.stride for side in pair("patch_size", s.patch_size)])
    if not s.distilled:
        args |= {
            "class_token": "cls_token" in s.prefix, "reg_tokens": s.registers, "no_embed_class": no_embed_class,
            "pool_include_prefix": s.pool == "map_all",
        }  # fmt: skip
    return {
        "architecture": architecture,
        "num_classes": s.num_classes,
        "num_features": s.dim,
        "global_pool": pool,
        "label_names": list(classes),
        "model_args": args,
        "pretrained_cfg": {
            "custom_load": False, "input_size": list(s.image_shape), "fixed_input_size": True, "pool_size": None,
            "interpolation": fit.interpolation, "crop_pct": fit.part,
            "crop_mode": {"centre": "center"}.get(fit.how, fit.how),
            "mean": list(preparation.mean), "std": list(preparation.std), "num_classes": s.num_classes,
            "first_conv": f"patch_embed.{first}", "classifier": ["head", "head_dist"] if s.distilled else "head",
        },
    }  # fmt: skip


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hf_config(s: Any, dtype: str, classes: Sequence[str]) -> Table:
    """Return the config.json of a ``ViTForImageClassification``, or of DeiT's with a distillation token."""
    labels = {str(i): name for i, name in enumerate(classes)}
    kind = "DeiTForImageClassificationWithTeacher" if s.distilled else "ViTForImageClassification"
    return {
        "architectures": [kind], "model_type": "deit" if s.distilled else "vit",
        "hidden_size": s.dim, "num_hidden_layers": s.depth, "num_attention_heads": s.heads,
        "intermediate_size": s.mlp_dim or 4 * s.dim, "hidden_act": _HF_ACTIVATIONS[s.activation],
        "hidden_dropout_prob": s.dropout, "attention_probs_dropout_prob": s.attention_dropout,
        "initializer_range": 0.02, "layer_norm_eps": s.norm_eps, "qkv_bias": s.qkv_bias,
        "image_size": _side(s.image_size), "patch_size": _side(s.patch_size), "num_channels": s.in_channels,
        "id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}, "torch_dtype": dtype,
    }  # fmt: skip


def hf_preparation(s: Any, preparation: Preparation) -> tuple[Table, str]:
    """Return the preprocessor_config.json, and what of the preparation it could not say, "" for nothing."""
    fit, untold = foreign_fit(preparation)
    height, width = pair("image_size", s.image_size)
    high, wide = math.floor(height / fit.part), math.floor(width / fit.part)
    size: Table = {"height": high, "width": wide}
    kind = "ViTImageProcessor" if (high, wide) == (height, width) else "DeiTImageProcessor"
    if fit.how == "centre" and height == width:
        kind, size = "BitImageProcessor", {"shortest_edge": high}  # the one that scales the shorter side and cuts
        untold = untold or ("its cut lies half a pixel elsewhere" if (high - height) % 2 else "")
    elif fit.how == "centre":
        untold = "pictures are squashed to the model's rectangle here, where minivit cuts its proportions out"
    crops = kind != "ViTImageProcessor"
    crop: Table = {"do_center_crop": True, "crop_size": {"height": height, "width": width}} if crops else {}
    return {
        "image_processor_type": kind, "do_resize": True, "size": size,
        "resample": 3 if fit.interpolation == "bicubic" else 2, **crop,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(preparation.mean), "image_std": list(preparation.std),
    }, untold  # fmt: skip
