"""Hugging Face transformers' ViT: the names that files on its hub have, and those that its version 5 has in memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from minivit.weights.names import Layout, Row, collected, rows
from minivit.weights.stored import Entry
from minivit.weights.timm import ACTIVATIONS

_EMBED = "vit.embeddings."
_BLOCK = "vit.encoder.layer.{i}."
_QKV = ",".join(f"{_BLOCK}attention.attention.{part}.{{kind}}" for part in ("query", "key", "value"))

ROWS = rows(
    f"""
    cls_token                     {_EMBED}cls_token
    pos_embed                     {_EMBED}position_embeddings
    patch_embed.proj.weight       {_EMBED}patch_embeddings.projection.weight
    patch_embed.proj.bias         {_EMBED}patch_embeddings.projection.bias
    blocks.{{i}}.norm1.weight     {_BLOCK}layernorm_before.weight
    blocks.{{i}}.norm1.bias       {_BLOCK}layernorm_before.bias
    blocks.{{i}}.attn.qkv.weight  {_QKV.format(kind="weight", i="{i}")}
    blocks.{{i}}.attn.qkv.bias    {_QKV.format(kind="bias", i="{i}")}
    blocks.{{i}}.attn.proj.weight {_BLOCK}attention.output.dense.weight
    blocks.{{i}}.attn.proj.bias   {_BLOCK}attention.output.dense.bias
    blocks.{{i}}.norm2.weight     {_BLOCK}layernorm_after.weight
    blocks.{{i}}.norm2.bias       {_BLOCK}layernorm_after.bias
    blocks.{{i}}.mlp.fc1.weight   {_BLOCK}intermediate.dense.weight
    blocks.{{i}}.mlp.fc1.bias     {_BLOCK}intermediate.dense.bias
    blocks.{{i}}.mlp.fc2.weight   {_BLOCK}output.dense.weight
    blocks.{{i}}.mlp.fc2.bias     {_BLOCK}output.dense.bias
    norm.weight                   vit.layernorm.weight
    norm.bias                     vit.layernorm.bias
    head.weight                   classifier.weight
    head.bias                     classifier.bias
    """
)

_ROOTS = ("vit.", "model.", "")
_IN_MEMORY = [  # version 5's names, and the hub's
    (re.compile(r"^layers\.(?=\d+\.)"), "encoder.layer."),
    (re.compile(r"(?<=\.)attention\.q_proj\."), "attention.attention.query."),
    (re.compile(r"(?<=\.)attention\.k_proj\."), "attention.attention.key."),
    (re.compile(r"(?<=\.)attention\.v_proj\."), "attention.attention.value."),
    (re.compile(r"(?<=\.)attention\.o_proj\."), "attention.output.dense."),
    (re.compile(r"(?<=\.)mlp\.fc1\."), "intermediate.dense."),
    (re.compile(r"(?<=\.)mlp\.fc2\."), "output.dense."),
]


def entries_of(found: Mapping[str, Entry], roots: tuple[str, ...] = _ROOTS) -> dict[str, Entry] | None:
    """Return the entries under the hub's names, with or without ``vit.`` before them."""
    root = next((r for r in roots if f"{r}embeddings.patch_embeddings.projection.weight" in found), None)
    if root is None:
        return None

    def hub_name(name: str) -> str:
        if not name.startswith(root) or name.startswith(("classifier.", "decoder.")):
            return name  # a head
        inner = name.removeprefix(root)
        for theirs, hub in _IN_MEMORY:
            inner = theirs.sub(hub, inner)
        return f"{roots[0]}{inner}"

    return collected((hub_name(name), entry) for name, entry in found.items())


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json of transformers' says; without one, its defaults."""
    out: dict[str, Any] = {"activation": "gelu", "norm_eps": 1e-12}
    names = {
        "num_attention_heads": "heads", "hidden_act": "activation", "layer_norm_eps": "norm_eps",
        "image_size": "image_size",
    }  # fmt: skip
    out |= {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    out["activation"] = ACTIVATIONS.get(str(out["activation"]), out["activation"])
    return out


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of config.json, and how images are prepared, of preprocessor_config.json or as by default."""
    out: dict[str, Any] = {"mean": 0.5, "std": 0.5, "fit": "stretch"}
    if preparation.get("do_normalize", True):
        given = {"mean": "image_mean", "std": "image_std"}
        out |= {ours: preparation[theirs] for ours, theirs in given.items() if preparation.get(theirs) is not None}
    else:
        out |= {"mean": 0.0, "std": 1.0}
    labels = config.get("id2label")
    if isinstance(labels, dict):
        out["classes"] = [labels.get(str(i)) for i in range(len(labels))]
    return out


LAYOUT = Layout(
    "Hugging Face", ROWS, entries_of, settings_of, data_of,
    passed=("vit.pooler.", "vit.embeddings.mask_token", "decoder.", "vit.embeddings.position_ids"),
    lacking={
        "distillation": "a distillation token", "cls_classifier": "a head beside a distillation token's",
        "lambda1": "LayerScale", "register_tokens": "register tokens",
    },
)  # fmt: skip

_HEADS = {"classifier.weight": "cls_classifier.weight", "classifier.bias": "cls_classifier.bias"}
_DISTILLED = """
    dist_token        deit.embeddings.distillation_token
    head_dist.weight  distillation_classifier.weight
    head_dist.bias    distillation_classifier.bias
"""
DEIT = Layout(
    "Hugging Face DeiT",
    tuple(
        Row(row.ours, tuple(_HEADS.get(n, n.replace("vit.", "deit.")) for n in row.theirs), row.form) for row in ROWS
    ) + rows(_DISTILLED),
    lambda found: entries_of(found, ("deit.",)), settings_of, data_of,
    passed=("deit.pooler.", "deit.embeddings.mask_token", "decoder."),
    lacking={"classifier.": "a head of the class token alone, beside a distillation token"},
)  # fmt: skip
"""DeiT with a distillation token, of which the heads' mean is the answer."""
