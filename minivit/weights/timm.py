"""timm's state dicts, and DeiT's, which bear the same names: minivit's own names and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minivit.data.fit import is_fit
from minivit.models import MODELS, read_settings
from minivit.models.preparations import PREPARATIONS
from minivit.weights.names import Layout, unwrapped
from minivit.weights.stored import Entry

ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
"""Our activations by what timm and Hugging Face call them."""


def entries_of(found: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the entries under timm's names."""
    return unwrapped(found, ("blocks.0.norm1.weight", "patch_embed.proj.weight"))


def architecture(config: Mapping[str, Any]) -> str:
    """Return the name of the model that a config.json speaks of, without the tag of its weights."""
    return str(config.get("architecture")).partition(".")[0]


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json of timm's says: heads and image size by the architecture's name or its arguments."""
    given = config.get("model_args")
    args: Mapping[str, Any] = given if isinstance(given, dict) else {}
    name = architecture(config)
    out: dict[str, Any] = {"activation": "gelu", "norm_eps": 1e-6}
    if name in MODELS:
        known = read_settings(*MODELS[name]).config
        out |= {key: known[key] for key in ("heads", "image_size") if key in known}
        if known.get("pool") == "map_all":  # whose arrays are those of "map"
            out["pool"] = "map_all"
    about = config.get("pretrained_cfg")
    size = about.get("input_size") if isinstance(about, dict) else None
    if isinstance(size, list) and len(size) == 3:
        out["image_size"] = size[1:]
    for theirs, ours in (("img_size", "image_size"), ("num_heads", "heads"), ("act_layer", "activation")):
        if args.get(theirs) is not None:
            out[ours] = args[theirs]
    pool = config.get("global_pool", "")
    if pool == "map" and args.get("pool_include_prefix") is True:
        out["pool"] = "map_all"
    elif pool and not (pool == "map" and "pool" in out):
        out["pool"] = {"token": "cls", "avg": "mean"}.get(str(pool), pool)
    out["activation"] = ACTIVATIONS.get(str(out["activation"]), out["activation"])
    return out


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return how images are prepared and the classes, of a config.json of timm's or of the model that it names."""
    about = config.get("pretrained_cfg")
    found: Mapping[str, Any] = about if isinstance(about, dict) else {}
    name = architecture(config)
    out: dict[str, Any] = PREPARATIONS[name].meta() if name in PREPARATIONS else {}
    if "mean" in found and "std" in found:
        how = {"center": "centre"}.get(mode := str(found.get("crop_mode") or "center"), mode)
        part = found.get("crop_pct") or 0.875
        fit = f"{how} {found.get('interpolation', 'bicubic')} {part:.12g}" if type(part) in (int, float) else ""
        # what we cannot do is left out: then nobody knows how, and says so
        out = {"mean": found["mean"], "std": found["std"], "fit": fit} if is_fit(fit) else {}
    names = config.get("label_names", found.get("label_names"))
    return out | ({} if names is None else {"classes": names})


LAYOUT = Layout(
    "timm", (), entries_of, settings_of, data_of,
    passed=("pre_logits.fc.", "attn_mask", "mask_token"),
    lacking={
        "dist_token": "a distillation token", "head_dist": "the head of a distillation token",
        "reg_token": "register tokens",
        ".ls1.": "LayerScale", ".ls2.": "LayerScale", "q_norm": "norms of queries and keys",
        "k_norm": "norms of queries and keys", "fc_norm": "a norm after pooling", "norm_pre": "a norm before them",
        "attn_pool": "attention pooling (MAP)",
        "patch_embed.backbone": "a convolutional network before the blocks",
    },
    named=True,
)  # fmt: skip
