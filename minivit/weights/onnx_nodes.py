"""What ONNX graphs are made of: nodes, one or a few for each layer, under minivit's own names of its parameters.

Operations are those of the standard's operation set 23 (github.com/onnx/onnx, docs/Operators.md), of which the whole
graph keeps to one data type, float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.backend import to_numpy
from minivit.nn.layers import LayerNorm
from minivit.nn.refined import Identity, SwiGLU

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


def first_token(g: Graph, x: str, at: int, name: str) -> str:
    """Write the choice of one token: (B, T, D) → (B, D)."""
    return g.node("Gather", [x, g.constant(f"{name}.at", np.int64(at), np.int64)], f"{name}.token", axis=1)
