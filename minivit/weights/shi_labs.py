"""SHI Labs' Compact-Transformers: state dicts of CCT, whose names vit-pytorch's CCT has, too.

Hassani et al. 2021, arXiv 2104.05704. A file does not say the stride of its convolutions: it is that of their kernel,
as in all of the published models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minivit.weights.names import Layout, layers_of, position_of, rows, shape_of, unwrapped
from minivit.weights.stored import Entry

_BLOCK = "classifier.blocks.{i}."
_FIRST, _POSITIONS = "tokenizer.conv_layers.0.0.weight", "classifier.positional_emb"

ROWS = rows(
    f"""
    patch_embed.convs.{{c}}.conv.weight tokenizer.conv_layers.{{c}}.0.weight
    pos_embed                     {_POSITIONS}
    blocks.{{i}}.norm1.weight     {_BLOCK}pre_norm.weight
    blocks.{{i}}.norm1.bias       {_BLOCK}pre_norm.bias
    blocks.{{i}}.attn.qkv.weight  {_BLOCK}self_attn.qkv.weight
    blocks.{{i}}.attn.proj.weight {_BLOCK}self_attn.proj.weight
    blocks.{{i}}.attn.proj.bias   {_BLOCK}self_attn.proj.bias
    blocks.{{i}}.norm2.weight     {_BLOCK}norm1.weight
    blocks.{{i}}.norm2.bias       {_BLOCK}norm1.bias
    blocks.{{i}}.mlp.fc1.weight   {_BLOCK}linear1.weight
    blocks.{{i}}.mlp.fc1.bias     {_BLOCK}linear1.bias
    blocks.{{i}}.mlp.fc2.weight   {_BLOCK}linear2.weight
    blocks.{{i}}.mlp.fc2.bias     {_BLOCK}linear2.bias
    norm.weight                   classifier.norm.weight
    norm.bias                     classifier.norm.bias
    attn_pool.weigh.weight        classifier.attention_pool.weight
    attn_pool.weigh.bias          classifier.attention_pool.bias
    head.weight                   classifier.fc.weight
    head.bias                     classifier.fc.bias
    """
)


def entries_of(found: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the entries without what training's wrappers put before their names."""
    return unwrapped(found, (_FIRST,))


def sizes_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the sizes of a CCT: of its images as far as positions tell, which are those of a square."""
    if "classifier.class_emb" in entries:
        raise ValueError("it has a class token, as ViT-Lite and CVT have")
    _, channels, kernel, across = shape_of(entries, _FIRST, 4)
    if kernel != across:
        raise ValueError(f"its kernels are of {kernel} by {across}")
    dim, hidden = shape_of(entries, f"{_BLOCK.replace('{i}', '0')}linear2.weight", 2)
    convs = layers_of(entries, "tokenizer.conv_layers.{}.0.weight")
    out = {
        "in_channels": channels, "kernel": kernel, "convs": convs, "dim": dim, "mlp_dim": hidden,
        "depth": layers_of(entries, "classifier.blocks.{}.pre_norm.weight"),
        "num_classes": shape_of(entries, "classifier.fc.weight", 2)[0],
    }  # fmt: skip
    if dim % 64 == 0:
        out["heads"] = dim // 64  # as in all of the published ones
    if _POSITIONS in entries:
        places = shape_of(entries, _POSITIONS, 3)[1]
        if (side := math.isqrt(places)) ** 2 == places:
            out["image_size"] = side * (2 * max(1, kernel // 2 - 1)) ** min(convs, 8)
    return out


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which positions are added: learned ones, sines and cosines, or none."""
    return {"position": position_of(entries, _POSITIONS)}


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return nothing: the file does not say it."""
    return {}


LAYOUT = Layout(
    "CCT", ROWS, entries_of, settings_of, data_of,
    lacking={
        "class_emb": "a class token", "positional_emb": "learned positions",
    },
    kind="cct", sizes_of=sizes_of, named=True,
)  # fmt: skip
