"""Parameters and layers."""

from minivit.nn.attention import EncoderBlock, MultiHeadAttention
from minivit.nn.blocks import ParallelBlock, PostNormBlock, ResidualPostNormBlock
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, PatchEmbed
from minivit.nn.module import Module, Parameter, RowSize
from minivit.nn.random import random_key
from minivit.nn.refined import LayerScale, PatchDropout, RMSNorm, SwiGLU
from minivit.nn.scored import AttentionPool, RelativePositions, ScoredAttention

__all__ = [
    "MLP",
    "AttentionPool",
    "DropPath",
    "Dropout",
    "EncoderBlock",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "Module",
    "MultiHeadAttention",
    "ParallelBlock",
    "Parameter",
    "PatchDropout",
    "PatchEmbed",
    "PostNormBlock",
    "RMSNorm",
    "RelativePositions",
    "ResidualPostNormBlock",
    "RowSize",
    "ScoredAttention",
    "SwiGLU",
    "random_key",
]
