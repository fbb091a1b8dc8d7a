"""Yitu's T2T-ViT: its published state dicts, with performers or full attention while tokens are made.

Yuan et al. 2021, arXiv 2101.11986. Fixed positions are in the file; where they are the sines and cosines that they
should be, the model makes its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from minivit.weights.names import Layout, collected, layers_of, position_of, rows, shape_of, unwrapped
from minivit.weights.stored import Entry

_MARK = "tokens_to_token.project.weight"
_MAKES = "tokens_to_token.attention"
_SAME = [
    "cls_token", "pos_embed", "blocks.{i}.attn.qkv.weight", "blocks.{i}.attn.qkv.bias",
    *(f"blocks.{{i}}.{name}.{kind}" for name in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
      for kind in ("weight", "bias")),
    *(f"{name}.{kind}" for name in ("norm", "head") for kind in ("weight", "bias")),
]  # fmt: skip
_PARTS = {
    "norm1": "norm1", "kqv": "kqv", "qkv": "attn.qkv", "proj": "proj", "norm2": "norm2", "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
}  # fmt: skip
ROWS = rows(
    "\n".join(
        [
            *(f"{name} {name}" for name in _SAME),
            *(
                f"patch_embed.attention{n}.{ours}.{kind} {_MAKES}{n}.{theirs}.{kind}"
                for n in (1, 2)
                for ours, theirs in _PARTS.items()
                for kind in ("weight", "bias")
            ),
            *(f"patch_embed.attention{n}.w {_MAKES}{n}.w" for n in (1, 2)),
            *(f"patch_embed.project.{kind} tokens_to_token.project.{kind}" for kind in ("weight", "bias")),
        ]
    )
)


def entries_of(found: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the entries under the names of those with performers, of which the others' differ in places."""
    entries = unwrapped(found, (_MARK,))
    if entries is None:
        return None

    def performers(name: str) -> str:
        name = re.sub(r"^(tokens_to_token\.attention[12])\.attn\.proj\.", r"\1.proj.", name)
        return re.sub(
            r"^(tokens_to_token\.attention[12]\.mlp)\.fc([12])\.", lambda m: f"{m[1]}.{2 * int(m[2]) - 2}.", name
        )

    return collected((performers(name), entry) for name, entry in entries.items())


def sizes_of(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the sizes of a T2T-ViT; of its images as positions tell, which are those of a square and a class token."""
    (wide,) = shape_of(entries, f"{_MAKES}1.norm1.weight", 1)
    if wide % 49:
        raise ValueError(f"its first windows have {wide} numbers, which are not those of 7 by 7 pixels")
    dim, hidden = shape_of(entries, "blocks.0.mlp.fc2.weight", 2)
    patches = shape_of(entries, "pos_embed", 3)[1] - 1
    out = {
        "tokenizer": "t2t" if f"{_MAKES}1.kqv.weight" in entries else "t2t_transformer", "patch_size": 16,
        "in_channels": wide // 49, "dim": dim, "mlp_dim": hidden, "depth": layers_of(entries, "blocks.{}.norm1.weight"),
        "qkv_bias": "blocks.0.attn.qkv.bias" in entries, "num_classes": shape_of(entries, "head.weight", 2)[0],
    }  # fmt: skip
    if dim % 64 == 0:
        out["heads"] = dim // 64  # as in all of the published ones but T2T-ViT-14-resnext, which has 32
    if (side := math.isqrt(patches)) ** 2 == patches and side:
        out["image_size"] = 16 * side
    return out


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return PyTorch's eps, and which positions are added: sines and cosines, unless they were resized or learned."""
    return {"activation": "gelu", "norm_eps": 1e-5, "position": position_of(entries, "pos_embed")}


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return nothing: the file does not say it."""
    return {}


LAYOUT = Layout(
    "T2T-ViT", ROWS, entries_of, settings_of, data_of,
    lacking={
        "tokens_to_token": "tokens made of tokens (T2T)",
        "pos_embed": "learned positions",
    },
    sizes_of=sizes_of, named=True,
)  # fmt: skip
