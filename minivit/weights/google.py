"""Google's archives (.npz): those of vit_jax, with its old numbering or flax linen's, and big_vision's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from minivit.weights.names import HEADS_BIAS, HEADS_IN, HEADS_OUT, KERNEL, PATCH_LAST, Layout, collected, rows
from minivit.weights.stored import Entry

_BLOCK = "Transformer/encoderblock_{i}/"
_MAP = "MAPHead_0/MultiHeadDotProductAttention_0/"
_ATTENTION = f"{_BLOCK}MultiHeadDotProductAttention_1/"
_QKV = ",".join(f"{_ATTENTION}{part}/{{kind}}" for part in ("query", "key", "value"))

_ROOT_ALONE, _STEM = "patch_embed.backbone.", "patch_embed.backbone.stem."
_UNIT = "block{s+1}/unit{u+1}/"
_OURS = "patch_embed.backbone.stages.{s}.blocks.{u}."

ROWS = rows(
    f"""
    cls_token                    cls
    pos_embed                    Transformer/posembed_input/pos_embedding
    patch_embed.proj.weight      embedding/kernel                                  patch
    patch_embed.proj.bias        embedding/bias
    blocks.{{i}}.norm1.weight    {_BLOCK}LayerNorm_0/scale
    blocks.{{i}}.norm1.bias      {_BLOCK}LayerNorm_0/bias
    blocks.{{i}}.attn.qkv.weight {_QKV.format(kind="kernel", i="{i}")}                                 heads_in
    blocks.{{i}}.attn.qkv.bias   {_QKV.format(kind="bias", i="{i}")}                                   heads_bias
    blocks.{{i}}.attn.proj.weight {_ATTENTION}out/kernel                           heads_out
    blocks.{{i}}.attn.proj.bias  {_ATTENTION}out/bias
    blocks.{{i}}.norm2.weight    {_BLOCK}LayerNorm_2/scale
    blocks.{{i}}.norm2.bias      {_BLOCK}LayerNorm_2/bias
    blocks.{{i}}.mlp.fc1.weight  {_BLOCK}MlpBlock_3/Dense_0/kernel                 kernel
    blocks.{{i}}.mlp.fc1.bias    {_BLOCK}MlpBlock_3/Dense_0/bias
    blocks.{{i}}.mlp.fc2.weight  {_BLOCK}MlpBlock_3/Dense_1/kernel                 kernel
    blocks.{{i}}.mlp.fc2.bias    {_BLOCK}MlpBlock_3/Dense_1/bias
    norm.weight                  Transformer/encoder_norm/scale
    norm.bias                    Transformer/encoder_norm/bias
    pre_logits.weight            pre_logits/kernel                                 kernel
    pre_logits.bias              pre_logits/bias
    attn_pool.latent             MAPHead_0/probe
    attn_pool.q.weight           {_MAP}query/kernel                                heads_in
    attn_pool.q.bias             {_MAP}query/bias                                  heads_bias
    attn_pool.kv.weight          {_MAP}key/kernel,{_MAP}value/kernel               heads_in
    attn_pool.kv.bias            {_MAP}key/bias,{_MAP}value/bias                   heads_bias
    attn_pool.proj.weight        {_MAP}out/kernel                                  heads_out
    attn_pool.proj.bias          {_MAP}out/bias
    attn_pool.norm.weight        MAPHead_0/LayerNorm_0/scale
    attn_pool.norm.bias          MAPHead_0/LayerNorm_0/bias
    attn_pool.mlp.fc1.weight     MAPHead_0/MlpBlock_0/Dense_0/kernel               kernel
    attn_pool.mlp.fc1.bias       MAPHead_0/MlpBlock_0/Dense_0/bias
    attn_pool.mlp.fc2.weight     MAPHead_0/MlpBlock_0/Dense_1/kernel               kernel
    attn_pool.mlp.fc2.bias       MAPHead_0/MlpBlock_0/Dense_1/bias
    head.weight                  head/kernel                                       kernel
    head.bias                    head/bias
    {_STEM}conv.weight           conv_root/kernel                                  patch
    {_STEM}norm.weight           gn_root/scale
    {_STEM}norm.bias             gn_root/bias
    {_ROOT_ALONE}conv.weight     conv_root/kernel                                  patch
    {_ROOT_ALONE}norm.weight     gn_root/scale
    {_ROOT_ALONE}norm.bias       gn_root/bias
    {_OURS}downsample.conv.weight {_UNIT}conv_proj/kernel                          patch
    {_OURS}downsample.norm.weight {_UNIT}gn_proj/scale
    {_OURS}downsample.norm.bias  {_UNIT}gn_proj/bias
    {_OURS}conv1.weight          {_UNIT}conv1/kernel                               patch
    {_OURS}norm1.weight          {_UNIT}gn1/scale
    {_OURS}norm1.bias            {_UNIT}gn1/bias
    {_OURS}conv2.weight          {_UNIT}conv2/kernel                               patch
    {_OURS}norm2.weight          {_UNIT}gn2/scale
    {_OURS}norm2.bias            {_UNIT}gn2/bias
    {_OURS}conv3.weight          {_UNIT}conv3/kernel                               patch
    {_OURS}norm3.weight          {_UNIT}gn3/scale
    {_OURS}norm3.bias            {_UNIT}gn3/bias
    """,
    patch=PATCH_LAST,
    heads_in=HEADS_IN,
    heads_bias=HEADS_BIAS,
    heads_out=HEADS_OUT,
    kernel=KERNEL,
)

_PREFIXES = ("opt/target/", "target/", "params/img/", "params/", "img/", "")
_ROOT = "embedding/kernel"
_NUMBERS = {  # big_vision's and linen's count each kind of layer for itself, vit_jax's first files all together
    "MultiHeadDotProductAttention_0/": "MultiHeadDotProductAttention_1/",
    "LayerNorm_1/": "LayerNorm_2/",
    "MlpBlock_0/": "MlpBlock_3/",
}
_SCANNED = "Transformer/encoderblock/"


def entries_of(found: Mapping[str, Entry]) -> dict[str, Entry] | None:
    """Return the entries under vit_jax's first names; what lies beside the model (an optimizer's state) is left out."""
    prefix = next((p for p in _PREFIXES if p + _ROOT in found), None)
    if prefix is None:
        return None
    named: list[tuple[str, Entry]] = []
    for name, entry in found.items():
        inner = name.removeprefix(prefix)
        if inner.startswith(_SCANNED):
            named += _slices(inner.removeprefix(_SCANNED), entry).items()
        elif name.startswith(prefix):
            named.append((_first_name(inner), entry))
    return collected(named)


def _first_name(name: str) -> str:
    if name == "pos_embedding":
        return "Transformer/posembed_input/pos_embedding"
    if match := re.match(r"Transformer/encoderblock_\d+/", name):
        for here, there in _NUMBERS.items():
            if name.startswith(here, match.end()):
                return match[0] + there + name[match.end() + len(here) :]
    return re.sub(r"^(block\d+/unit)0+(?=[1-9])", r"\1", name)  # BiT's files write unit01


class _Stack:
    """An array of all layers: read once while layer after layer is asked for."""

    def __init__(self, entry: Entry) -> None:
        self.entry, self.left = entry, entry.shape[0]
        self.array: np.ndarray | None = None

    def layer(self, i: int) -> np.ndarray:
        """Return layer ``i``'s."""
        whole = self.array = self.entry.read() if self.array is None else self.array
        self.left -= 1
        if self.left <= 0:  # nobody asks again
            self.array, self.left = None, self.entry.shape[0]
        return whole[i]


def _slices(name: str, entry: Entry) -> dict[str, Entry]:
    """Return the entries of a scan, whose arrays have a leading axis of layers, one for each layer."""
    if not entry.shape or entry.shape[0] > 4096:
        return {_SCANNED + name: entry}
    stack = _Stack(entry)
    dtype = "<f8" if entry.is_double else "<f4"  # as read
    return {
        _first_name(f"Transformer/encoderblock_{i}/{name}"): Entry(
            entry.name,
            entry.shape[1:],
            dtype,
            lambda i=i: stack.layer(i),  # type: ignore[misc]
        )
        for i in range(entry.shape[0])
    }


def settings_of(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return heads, from the shape of the queries; GELU is that of tanh, and eps of a ResNet are flax's."""
    query = entries.get(f"{_ATTENTION.replace('{i}', '0')}query/kernel")
    heads = {"heads": query.shape[1]} if query is not None and len(query.shape) == 3 else {}
    stem = {"stem_eps": "google"} if "conv_root/kernel" in entries else {}
    return heads | {"activation": "gelu_tanh", "norm_eps": 1e-6} | stem


def data_of(config: Mapping[str, Any], preparation: Mapping[str, Any]) -> dict[str, Any]:
    """Return that images are squashed to the model's size and scaled to ±1, as vit_jax does it."""
    return {"mean": 0.5, "std": 0.5, "fit": "squash bilinear 1"}


LAYOUT = Layout(
    "Google", ROWS, entries_of, settings_of, data_of,
    lacking={"MAPHead_0": "attention pooling (MAP)", "conv_root": "a ResNet before the blocks", "block1/": "a ResNet"},
)  # fmt: skip
