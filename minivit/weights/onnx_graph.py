"""A Vision Transformer as an ONNX graph: a node or a few for each layer, the parameters under minivit's own names.

Operations are those of the standard's operation set 23 (github.com/onnx/onnx, docs/Operators.md), of which the whole
graph keeps to one data type, float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.backend import to_numpy
from minivit.errors import ConfigError
from minivit.nn.attention import table
from minivit.nn.layers import LayerNorm
from minivit.nn.refined import Identity, SwiGLU

OPSET, IR_VERSION = 23, 11
"""The set of operations, and the version of the file format that came with it (ONNX 1.18, 2025)."""

MOST_BYTES = (1 << 31) - (1 << 20)
"""What a file may hold: Protocol Buffers end at 2 GiB."""

INPUT, OUTPUT = "images", "logits"


class Graph:
    """Nodes and the arrays they use, written one after the other; values go by their names.

    ``scope`` is the name of the layer being written: what it makes begins with it.
    """

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        import onnx

        self.onnx = onnx
        self.nodes: list[Any] = []
        self.arrays = {name: np.ascontiguousarray(a, np.float32) for name, a in state.items()}
        self.made: set[str] = set(self.arrays) | {INPUT, OUTPUT}

    def new_name(self, wanted: str) -> str:
        """Return a name that no value has yet."""
        name, number = wanted, 1
        while name in self.made:
            number += 1
            name = f"{wanted}_{number}"
        self.made.add(name)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Enter an array that is no parameter, and return its name."""
        name = self.new_name(name)
        self.arrays[name] = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        return name

    def node(self, op: str, inputs: Sequence[str], name: str, out: str | None = None, **attributes: Any) -> str:
        """Write an operation of one output, and return the name of that."""
        out = out or self.new_name(name)
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [out], name=out, **attributes))
        return out

    def split(self, x: str, parts: int, axis: int, name: str) -> list[str]:
        """Write a division into equal parts, and return their names."""
        outs = [self.new_name(f"{name}.{i}") for i in range(parts)]
        self.nodes.append(
            self.onnx.helper.make_node("Split", [x], outs, name=f"{name}.split", axis=axis, num_outputs=parts)
        )
        return outs

    def reshape(self, x: str, shape: Sequence[int], name: str) -> str:
        """Write a change of shape: 0 stays what it is, -1 follows."""
        return self.node("Reshape", [x, self.constant(f"{name}.shape", shape, np.int64)], name)

    def transpose(self, x: str, axes: Sequence[int], name: str) -> str:
        """Write a change of the order of the axes."""
        return self.node("Transpose", [x], name, perm=list(axes))


# ---- layers ----------------------------------------------------------------------------------------------------------


def linear(g: Graph, x: str, layer: Any, name: str, out: str | None = None) -> str:
    """Write x·Wᵀ + b. The weight stays as minivit has it, (out, in): what runs the graph turns it once."""
    weight = g.transpose(f"{name}.weight", (1, 0), f"{name}.weight.T")
    if layer.bias is None:
        return g.node("MatMul", [x, weight], name, out)
    product = g.node("MatMul", [x, weight], f"{name}.product")
    return g.node("Add", [product, f"{name}.bias"], name, out)


def norm(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write LayerNorm or RMSNorm over the last axis, or nothing for a layer that is left out."""
    if layer is None or isinstance(layer, Identity):
        return x
    if isinstance(layer, LayerNorm):
        inputs = [x, f"{name}.weight", f"{name}.bias"]
        return g.node("LayerNormalization", inputs, name, axis=-1, epsilon=layer.eps)
    return g.node("RMSNormalization", [x, f"{name}.weight"], name, axis=-1, epsilon=layer.eps)


def silu(g: Graph, x: str, name: str) -> str:
    """Write x·σ(x)."""
    return g.node("Mul", [x, g.node("Sigmoid", [x], f"{name}.sigmoid")], name)


def activation(g: Graph, x: str, kind: str, name: str) -> str:
    """Write one of minivit's activations."""
    if kind in ("gelu", "gelu_tanh"):
        return g.node("Gelu", [x], name, approximate={"gelu": "none", "gelu_tanh": "tanh"}[kind])
    if kind == "silu":
        return silu(g, x, name)
    return g.node({"relu": "Relu", "tanh": "Tanh"}[kind], [x], name)


def mlp(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write two linear layers and what lies between, or the gated one."""
    hidden = linear(g, x, layer.fc1, f"{name}.fc1")
    if isinstance(layer, SwiGLU):
        gate, value = g.split(hidden, 2, -1, f"{name}.halves")
        hidden = g.node("Mul", [silu(g, gate, f"{name}.gate"), value], f"{name}.gated")
    else:
        hidden = activation(g, hidden, layer.activation, f"{name}.act")
    return linear(g, hidden, layer.fc2, f"{name}.fc2")


def attend(g: Graph, q: str, k: str, v: str, name: str, bias: str | None = None) -> str:
    """Write softmax(q·kᵀ + bias)·v of scaled queries: (B, H, T, d) each → (B, T, H·d)."""
    scores = g.node("MatMul", [q, g.transpose(k, (0, 1, 3, 2), f"{name}.k.T")], f"{name}.scores")  # → (B, H, T, T)
    if bias is not None:
        scores = g.node("Add", [scores, bias], f"{name}.biased")
    weights = g.node("Softmax", [scores], f"{name}.weights", axis=-1)
    heads = g.node("MatMul", [weights, v], f"{name}.heads")  # → (B, H, T, d)
    return g.reshape(g.transpose(heads, (0, 2, 1, 3), f"{name}.tokens"), (0, 0, -1), f"{name}.merged")


def split_heads(g: Graph, x: str, parts: int, heads: int, width: int, name: str) -> list[str]:
    """Write (B, T, parts·H·d) → that many (B, H, T, d)."""
    x = g.reshape(x, (0, 0, parts, heads, width), f"{name}.in_heads")
    x = g.transpose(x, (2, 0, 3, 1, 4), f"{name}.by_part")  # → (parts, B, H, T, d)
    axis = g.constant(f"{name}.axis", [0], np.int64)
    return [g.node("Squeeze", [part, axis], f"{name}.part") for part in g.split(x, parts, 0, f"{name}.parts")]


def attention(g: Graph, x: str, layer: Any, name: str, tokens: int, masked: bool) -> str:
    """Write multi-head self-attention, with what its scores have besides; ``masked``: no token attends to itself."""
    qkv = linear(g, x, layer.qkv, f"{name}.qkv")
    q, k, v = split_heads(g, qkv, 3, layer.heads, layer.dim_head, name)
    q = norm(g, q, getattr(layer, "q_norm", None), f"{name}.q_norm")
    k = norm(g, k, getattr(layer, "k_norm", None), f"{name}.k_norm")
    temperature, relative = getattr(layer, "temperature", None), getattr(layer, "rel_pos", None)
    if temperature is None:
        scale = g.constant(f"{name}.scale", np.float32(layer.dim_head**-0.5))
    else:
        learned = g.node("Exp", [f"{name}.temperature"], f"{name}.heat")  # (H,)
        scale = g.reshape(learned, (layer.heads, 1, 1), f"{name}.scale")
    q = g.node("Mul", [q, scale], f"{name}.q")
    bias = None if relative is None else to_numpy(relative().data)  # (H, T, T)
    if masked:
        own = np.where(np.eye(tokens, dtype=bool), np.float32(-math.inf), np.float32(0))
        bias = own if bias is None else bias + own
    entered = None if bias is None else g.constant(f"{name}.bias", bias)
    return linear(g, attend(g, q, k, v, name, entered), layer.proj, f"{name}.proj")


def pooled_by_attention(g: Graph, x: str, layer: Any, name: str) -> str:
    """Write attention pooling: (B, N, D) → (B, D)."""
    dim = layer.proj.weight.shape[0]
    width = dim // layer.heads
    query = linear(g, f"{name}.latent", layer.q, f"{name}.q")  # (1, 1, D)
    (q,) = split_heads(g, query, 1, layer.heads, width, f"{name}.q")
    q = g.node("Mul", [q, g.constant(f"{name}.scale", np.float32(width**-0.5))], f"{name}.scaled")
    k, v = split_heads(g, linear(g, x, layer.kv, f"{name}.kv"), 2, layer.heads, width, f"{name}.kv")
    x = linear(g, attend(g, q, k, v, name), layer.proj, f"{name}.proj")  # → (B, 1, D)
    x = g.node("Add", [x, mlp(g, norm(g, x, layer.norm, f"{name}.norm"), layer.mlp, f"{name}.mlp")], f"{name}.out")
    return first_token(g, x, 0, name)


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
    x = g.node("Add", [x, branch("attn", x, before)], f"{name}.attended")
    x = norm(g, x, layer.norm1, f"{name}.norm1") if kind == "post" else x
    x = g.node("Add", [x, branch("mlp", x, before)], f"{name}.out")
    return norm(g, x, layer.norm2, f"{name}.norm2") if kind == "post" else x


def placed(g: Graph, layer: Any, name: str, tokens: int) -> str:
    """Enter the positions that a block adds, (1, T, D): those of patches only are 0 before them."""
    found = to_numpy(table(layer.pos_embed, layer.norm1.weight).data)
    pad = tokens - found.shape[1]
    return g.constant(f"{name}.positions", np.pad(found, [(0, 0), (pad, 0), (0, 0)]))


def embedding(g: Graph, model: Any) -> str:
    """Write the tokens that enter the encoder: images (B, C, H, W) → (B, T, D)."""
    side, dim = list(model.patch_embed.patch_size), model.dim
    inputs = [INPUT, "patch_embed.proj.weight", "patch_embed.proj.bias"]
    x = g.node("Conv", inputs, "patch_embed.proj", kernel_shape=side, strides=side)  # → (B, D, h, w)
    x = g.reshape(x, (0, dim, -1), "patch_embed.flat")
    x = g.transpose(x, (0, 2, 1), "patch_embed")  # (B, D, N) → (B, N, D)
    positions = table(model.pos_embed, model.patch_embed.proj.weight)
    made = None if positions is None else to_numpy(positions.data)
    if made is not None and made.shape[1] == model.patch_embed.num_patches:
        x, made = g.node("Add", [x, _positions(g, made)], "patch_embed.placed"), None
    tokens = [name for name in ("cls_token", "dist_token", "reg_token") if getattr(model, name) is not None]
    if tokens:
        first = tokens[0] if len(tokens) == 1 else g.node("Concat", tokens, "prefix", axis=1)  # (1, P, D)
        batch = g.node("Shape", [INPUT], "batch", start=0, end=1)
        sizes = g.node("Concat", [batch, g.constant("prefix.shape", [model.prefix, dim], np.int64)], "sizes", axis=0)
        x = g.node("Concat", [g.node("Expand", [first, sizes], "prefix.all"), x], "tokens", axis=1)  # → (B, T, D)
    return x if made is None else g.node("Add", [x, _positions(g, made)], "placed")


def _positions(g: Graph, made: np.ndarray) -> str:
    """Return the name of the positions: the parameter's, or of the numbers that they come from."""
    return "pos_embed" if "pos_embed" in g.arrays else g.constant("positions", made)


# ---- the head --------------------------------------------------------------------------------------------------------


def first_token(g: Graph, x: str, at: int, name: str) -> str:
    """Write the choice of one token: (B, T, D) → (B, D)."""
    return g.node("Gather", [x, g.constant(f"{name}.at", np.int64(at), np.int64)], f"{name}.token", axis=1)


def classifier(g: Graph, x: str, model: Any) -> None:
    """Write what comes after the final norm: (B, T, D) → logits (B, K), or of each patch (B, N, K)."""
    if model.head_dist is not None:
        both = [linear(g, first_token(g, x, i, n), getattr(model, n), n) for i, n in enumerate(("head", "head_dist"))]
        total = g.node("Add", both, "heads")
        g.node("Mul", [total, g.constant("half", np.float32(0.5))], OUTPUT, OUTPUT)
        return
    if model.pool == "cls":
        x = first_token(g, x, 0, "cls")
    else:
        if model.prefix and model.pool != "map_all":
            ends = [g.constant(f"patches.{n}", [at], np.int64) for n, at in
                    (("start", model.prefix), ("end", np.iinfo(np.int64).max), ("axis", 1))]  # fmt: skip
            x = g.node("Slice", [x, *ends], "patches")  # (B, T, D) → (B, N, D)
        if model.attn_pool is not None:
            x = pooled_by_attention(g, x, model.attn_pool, "attn_pool")
        elif model.pool == "mean":
            x = g.node("ReduceMean", [x, g.constant("mean.axis", [1], np.int64)], "mean", keepdims=0)  # → (B, D)
    x = norm(g, x, model.fc_norm, "fc_norm")
    if model.pre_logits is not None:
        x = g.node("Tanh", [linear(g, x, model.pre_logits, "pre_logits")], "pre_logits.tanh")
    linear(g, x, model.head, "head", OUTPUT)


def build_graph(model: Any, about: Mapping[str, str], doc: str) -> Any:
    """Return a ViT as an ONNX ModelProto, checked: ``images`` (batch, C, H, W) → ``logits``, float32.

    Batches may be of any size. The parameters are initializers under their names and in their shapes here; ``about``
    is the file's metadata, ``doc`` its description. Raises ConfigError without the package onnx, and for a model that
    no file can hold or whose only token may not attend to itself.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigError("ONNX files need the package onnx", "pip install 'minivit[onnx]'") from None
    s, state = model.settings, model.state_dict()
    if (size := 4 * sum(a.size for a in state.values())) > MOST_BYTES:
        what = f"an ONNX file holds 2 GiB, and the model's numbers take {size:,} bytes"
        raise ConfigError(what, "export it --to timm or huggingface")
    if s.lsa and model.num_tokens == 1:
        raise ConfigError("the model's only token may attend to nothing (lsa)", "make a model of more patches")
    g = Graph(state)
    x = embedding(g, model)
    for i, layer in enumerate(model.blocks):
        x = block(g, x, layer, f"blocks.{i}", s.block, model.num_tokens, s.lsa)
    classifier(g, norm(g, x, model.norm, "norm"), model)
    shape = ["batch", *s.image_shape]
    out = ["batch", *([model.patch_embed.num_patches] if model.pool == "none" else []), s.num_classes]
    value = lambda name, shape: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    arrays: Any = (onnx.numpy_helper.from_array(a, name) for name, a in used(g).items())  # copied one by one
    graph = onnx.helper.make_graph(g.nodes, "vit", [value(INPUT, shape)], [value(OUTPUT, out)], arrays)
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
