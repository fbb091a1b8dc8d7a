"""Hugging Face transformers' ViT: the names that files on its hub have, and those that its version 5 has in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from minivit.data.fit import is_fit
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
    return prepared(preparation) | classes_of(config)


def deit_data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same, but for the default: DeiT's images were prepared in another way."""
    return (prepared(preparation) if preparation else {}) | classes_of(config)


def classes_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names of the classes."""
    labels = config.get("id2label")
    return {"classes": [labels.get(str(i)) for i in range(len(labels))]} if isinstance(labels, dict) else {}


def prepared(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return how images are prepared: what preprocessor_config.json says, {} for what we cannot do.

    What it leaves out is as in the file of google/vit-base-patch16-224.
    """
    mean, std = (0.5 if about.get(key) is None else about[key] for key in ("image_mean", "image_std"))
    if not about.get("do_normalize", True):
        mean, std = 0.0, 1.0
    factor = about.get("rescale_factor", 1 / 255) if about.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or not 1e-6 < factor < 1e6:
        return {}
    if abs((times := 255 * factor) - 1) > 1e-9:  # (x · factor − mean) / std as (x / 255 − m) / s
        mean, std = _divided(mean, times), _divided(std, times)
    fit = _fit(about)
    return {"mean": mean, "std": std, "fit": fit} if is_fit(fit) else {}


def _divided(values: Any, by: float) -> Any:
    """Return a number, or each of a list of numbers, divided; what is neither is told by whoever reads it."""
    if isinstance(values, list):
        return [_divided(value, by) for value in values]
    return values / by if type(values) in (int, float) else values


def _fit(about: Mapping[str, Any]) -> str:
    """Return the fit of a preprocessor_config.json: of the sides that it names their proportion matters."""
    size, crop = about.get("size", 1), about.get("crop_size", 224)
    how = "squash"
    if isinstance(size, dict) and "shortest_edge" in size:
        size, how = size["shortest_edge"], "centre"
    size, crop = (x.get("height") if isinstance(x, dict) else x for x in (size, crop))
    part = 1.0
    if about.get("do_center_crop", False):
        if type(size) is not int or type(crop) is not int or not 0 < crop <= size:
            return ""
        part = float(f"{crop / size:.12g}")  # as it is written below
        if math.floor(crop / part) != size:  # rounding took the last pixel
            part = crop / (size + 0.5)
    interpolation = {"2": "bilinear", "3": "bicubic"}.get(str(about.get("resample", 2)), "")  # Pillow's numbers
    return f"{how} {interpolation} {part:.12g}"


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
    lambda found: entries_of(found, ("deit.",)), settings_of, deit_data_of,
    passed=("deit.pooler.", "deit.embeddings.mask_token", "decoder."),
    lacking={"classifier.": "a head of the class token alone, beside a distillation token"},
)  # fmt: skip
"""DeiT with a distillation token, of which the heads' mean is the answer."""
