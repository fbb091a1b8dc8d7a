"""A model as an ONNX graph: tokens of images, an encoder and a head, in nodes of :mod:`minivit.weights.onnx_nodes`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minivit.backend import to_numpy
from minivit.errors import ConfigError
from minivit.nn.attention import table
from minivit.weights.onnx_images import embedding, pooled_features
from minivit.weights.onnx_nodes import (
    INPUT,
    OUTPUT,
    Graph,
    attention,
    first_token,
    linear,
    mlp,
    norm,
    pooled_by_attention,
)  # fmt: skip

OPSET, IR_VERSION = 23, 11
"""The set of operations, and the version of the file format that came with it (ONNX 1.18, 2025)."""

MOST_BYTES = (1 << 31) - (1 << 20)
"""What a file may hold: Protocol Buffers end at 2 GiB."""


# ---- the encoder -----------------------------------------------------------------------------------------------------


def scaled(g: Graph, x: str, scale: Any, name: str) -> str:
    """Write LayerScale, or nothing where there is none."""
    return x if scale is None else g.node("Mul", [x, f"{name}.gamma"], name)


def block(g: Graph, x: str, layer: Any, name: str, kind: str, tokens: int, masked: bool) -> str:
    """Write an encoder block, with its norms where its kind has them: :mod:`minivit.nn.blocks`."""

    def branch(part: str, x: str, normed: bool = True) -> str:
        number = {"attn": 1, "mlp": 2}[part]
        x = norm(g, x, getattr(layer, f"norm{number}"), f"{name}.norm{number}") if normed else x
        module = getattr(layer, part)
        args = (g, x, module, f"{name}.{part}")
        out = attention(*args, tokens, masked) if part == "attn" else mlp(*args)
        if kind == "res_post":
            out = norm(g, out, getattr(layer, f"norm{number}"), f"{name}.norm{number}")
        return scaled(g, out, getattr(layer, f"ls{number}"), f"{name}.ls{number}")

    if layer.pos_embed is not None:
        x = g.node("Add", [x, placed(g, layer, name, tokens)], f"{name}.placed")
    if kind == "parallel":
        read = norm(g, x, layer.norm1, f"{name}.norm1")
        x = g.node("Add", [x, branch("attn", read, False)], f"{name}.attended")
        return g.node("Add", [x, branch("mlp", read, False)], f"{name}.out")
    before = kind == "pre"
    x = g.node("Add", [x, branch("attn", x, before or kind == "between")], f"{name}.attended")
    x = norm(g, x, layer.norm1, f"{name}.norm1") if kind == "post" else x
    x = norm(g, x, layer.norm2, f"{name}.norm2") if kind == "between" else x
    x = g.node("Add", [x, branch("mlp", x, before)], f"{name}.out")
    return norm(g, x, layer.norm2, f"{name}.norm2") if kind == "post" else x


def placed(g: Graph, layer: Any, name: str, tokens: int) -> str:
    """Enter the positions that a block adds, (1, T, D): those of patches only are 0 before them."""
    found = to_numpy(table(layer.pos_embed, layer.norm1.weight).data)
    pad = tokens - found.shape[1]
    return g.constant(f"{name}.positions", np.pad(found, [(0, 0), (pad, 0), (0, 0)]))


# ---- the head --------------------------------------------------------------------------------------------------------


def classifier(g: Graph, x: str, model: Any) -> None:
    """Write what comes after the final norm: (B, T, D) → logits (B, K), or of each patch (B, N, K)."""
    if getattr(model, "head_dist", None) is not None:
        both = [linear(g, first_token(g, x, i, n), getattr(model, n), n) for i, n in enumerate(("head", "head_dist"))]
        total = g.node("Add", both, "heads")
        g.node("Mul", [total, g.constant("half", np.float32(0.5))], OUTPUT, OUTPUT)
        return
    if model.pool == "cls":
        x = first_token(g, x, 0, "cls")
    elif model.pool == "seq":
        x = first_token(g, weighed(g, x, model.attn_pool, "attn_pool"), 0, "pooled")
    else:
        if model.prefix and model.pool != "map_all":
            ends = [g.constant(f"patches.{n}", [at], np.int64) for n, at in
                    (("start", model.prefix), ("end", np.iinfo(np.int64).max), ("axis", 1))]  # fmt: skip
            x = g.node("Slice", [x, *ends], "patches")  # (B, T, D) → (B, N, D)
        if model.attn_pool is not None:
            x = pooled_by_attention(g, x, model.attn_pool, "attn_pool")
        elif model.pool == "mean":
            x = g.node("ReduceMean", [x, g.constant("mean.axis", [1], np.int64)], "mean", keepdims=0)  # → (B, D)
    x = norm(g, x, getattr(model, "fc_norm", None), "fc_norm")
    if getattr(model, "pre_logits", None) is not None:
        x = g.node("Tanh", [linear(g, x, model.pre_logits, "pre_logits")], "pre_logits.tanh")
    linear(g, x, model.head, "head", OUTPUT)


def weighed(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write :class:`minivit.nn.SequencePool`: (B, N, D) → (B, 1, D)."""
    scores = g.transpose(linear(g, x, layer.weigh, f"{name}.weigh"), (0, 2, 1), f"{name}.scores")  # → (B, 1, N)
    return g.node("MatMul", [g.node("Softmax", [scores], f"{name}.weights", axis=-1), x], name)


def encoded(g: Graph, model: Any) -> None:
    """Write a model of tokens: what makes them, the encoder, and the head."""
    s = model.settings
    masked = getattr(s, "lsa", False)
    if masked and model.num_tokens == 1:
        raise ConfigError("the model's only token may attend to nothing (lsa)", "make a model of more patches")
    x = embedding(g, model)
    for i, layer in enumerate(model.blocks):
        x = block(g, x, layer, f"blocks.{i}", s.block, model.num_tokens, masked)
    classifier(g, norm(g, x, model.norm, "norm"), model)


def build_graph(model: Any, about: Mapping[str, str], doc: str) -> Any:
    """Return a model as an ONNX ModelProto, checked: ``images`` (batch, C, H, W) → ``logits``, float32.

    Batches may be of any size. The parameters are initializers under their names and in their shapes here, but that
    standardised weights and tables of relative positions are what is made of them; ``about`` is the file's metadata,
    ``doc`` its description. Raises ConfigError without the package onnx, and for a model that no file can hold or whose
    only token may not attend to itself.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigError("ONNX files need the package onnx", "pip install 'minivit[onnx]'") from None
    s, state = model.settings, model.state_dict()
    if (size := 4 * sum(a.size for a in state.values())) > MOST_BYTES:
        what = f"an ONNX file holds 2 GiB, and the model's numbers take {size:,} bytes"
        raise ConfigError(
            what, "keep it in another layout, which has no such bound: timm's, Hugging Face's or Google's"
        )
    g = Graph(state)
    if hasattr(model, "blocks"):
        encoded(g, model)
    else:
        linear(g, pooled_features(g, model), model.head, "head", OUTPUT)
    shape = ["batch", *s.image_shape]
    out = ["batch", *([model.patch_embed.num_patches] if getattr(model, "pool", "") == "none" else []), s.num_classes]
    value = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    arrays: Any = (onnx.numpy_helper.from_array(a, name) for name, a in used(g).items())  # copied one by one
    graph = onnx.helper.make_graph(g.nodes, model.kind, [value(INPUT, shape)], [value(OUTPUT, out)], arrays)
    made = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="minivit",
        doc_string=doc,
    )  # fmt: skip
    onnx.helper.set_model_props(made, dict(about))
    onnx.checker.check_model(made, full_check=True)
    return made


def used(g: Graph) -> dict[str, np.ndarray]:
    """Return the arrays that a node of the graph reads: a table of relative positions is read as what it makes."""
    read = {name for node in g.nodes for name in node.input}
    return {name: array for name, array in g.arrays.items() if name in read}
