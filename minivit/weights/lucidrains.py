"""lucidrains' vit-pytorch: state dicts of its ViT and SimpleViT, saved as .npz or safetensors.

The first versions (before 0.36) have no norms around the patch projection. SimpleViT's attention has no bias after it:
the model's is 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from minivit.weights.names import PATCH_FLAT, PATCH_VECTOR, Layout, collected, rows
from minivit.weights.stored import Entry

_BLOCK = "transformer.layers.{i}."

ROWS = rows(
    f"""
    cls_token                     cls_token
    pos_embed                     pos_embedding
    patch_embed.proj.weight       to_patch_embedding.1.weight            patch
    patch_embed.proj.bias         to_patch_embedding.1.bias
    patch_embed.norm1.weight      to_patch_embedding.norm_before.weight  patch_vector
    patch_embed.norm1.bias        to_patch_embedding.norm_before.bias    patch_vector
    patch_embed.norm2.weight      to_patch_embedding.norm_after.weight
    patch_embed.norm2.bias        to_patch_embedding.norm_after.bias
    blocks.{{i}}.norm1.weight     {_BLOCK}0.norm.weight
    blocks.{{i}}.norm1.bias       {_BLOCK}0.norm.bias
    blocks.{{i}}.attn.qkv.weight  {_BLOCK}0.to_qkv.weight
    blocks.{{i}}.attn.proj.weight {_BLOCK}0.to_out.0.weight
    blocks.{{i}}.attn.proj.bias   {_BLOCK}0.to_out.0.bias
    blocks.{{i}}.norm2.weight     {_BLOCK}1.norm.weight
    blocks.{{i}}.norm2.bias       {_BLOCK}1.norm.bias
    blocks.{{i}}.mlp.fc1.weight   {_BLOCK}1.net.0.weight
    blocks.{{i}}.mlp.fc1.bias     {_BLOCK}1.net.0.bias
    blocks.{{i}}.mlp.fc2.weight   {_BLOCK}1.net.3.weight
    blocks.{{i}}.mlp.fc2.bias     {_BLOCK}1.net.3.bias
    norm.weight                   mlp_head.0.weight
    norm.bias                     mlp_head.0.bias
    fc_norm.weight                linear_head.0.weight
    fc_norm.bias                  linear_head.0.bias
    head.weight                   mlp_head.1.weight
    head.bias                     mlp_head.1.bias
    """,
    patch=PATCH_FLAT,
    patch_vector=PATCH_VECTOR,
)


def entries_of(found: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the entries under the names of the first versions, in which norms wrap attention and MLP (``fn``)."""
    if not any(name.startswith("to_patch_embedding.") for name in found):
        return None
    normed = "to_patch_embedding.2.weight" in found  # norm, projection, norm
    inner = found.get("transformer.layers.0.1.net.0.weight")
    later = inner is not None and len(inner.shape) == 1  # the MLP's norm is its first layer

    def first_name(name: str) -> str:
        name = re.sub(r"^(transformer\.layers\.\d+\.[01])\.fn\.", r"\1.", name)
        name = re.sub(r"^(transformer\.layers\.\d+\.0)\.to_out\.(?=weight|bias)", r"\1.to_out.0.", name)
        name = re.sub(r"^(mlp_head|linear_head)\.(?=weight|bias)", "mlp_head.1.", name)
        name = re.sub(r"^linear_head\.1\.", "mlp_head.1.", name)
        name = re.sub(r"^transformer\.norm\.", "mlp_head.0.", name)
        if later:
            name = re.sub(r"^(transformer\.layers\.\d+\.1)\.net\.(\d+)\.", _mlp, name)
        if normed:
            name = re.sub(r"^to_patch_embedding\.([123])\.", lambda m: f"to_patch_embedding.{_NORMED[m[1]]}.", name)
        return name

    return collected((first_name(name), entry) for name, entry in found.items())


_NORMED = {"1": "norm_before", "2": "1", "3": "norm_after"}


def _mlp(match: re.Match[str]) -> str:
    return match[1] + {"0": ".norm.", "1": ".net.0.", "3": ".net.3.", "4": ".net.3."}.get(match[2], ".net.other.")


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PyTorch's eps, vit-pytorch's default, and the side of patches, which are square and of 3 or 1 channels."""
    out: dict[str, Any] = {"activation": "gelu", "norm_eps": 1e-5}
    weight = entries.get("to_patch_embedding.1.weight")
    if weight is not None and len(weight.shape) == 2:
        for channels in (3, 1):
            side = math.isqrt(weight.shape[1] // channels)
            if side and channels * side * side == weight.shape[1]:
                out["patch_size"] = side
                break
    out["tokenizer"] = "normed" if "to_patch_embedding.norm_before.weight" in entries else "patch"
    if "pos_embedding" not in entries:  # SimpleViT
        out["position"] = "sincos_2d"
    return out


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return nothing: the file does not say it, and nobody else knows."""
    return {}


LAYOUT = Layout(
    "lucidrains", ROWS, entries_of, settings_of, data_of, zero=("blocks.{i}.attn.proj.bias",),
    lacking={
        "to_patch_embedding.norm_": "norms on both sides of the patch projection",
        "register_tokens": "register tokens",
    },
)  # fmt: skip
