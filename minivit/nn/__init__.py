"""Parameters and layers."""

from minivit.nn.attention import EncoderBlock, MultiHeadAttention
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, PatchEmbed
from minivit.nn.module import Module, Parameter, RowSize
from minivit.nn.random import random_key

__all__ = [
    "MLP",
    "DropPath",
    "Dropout",
    "EncoderBlock",
    "LayerNorm",
    "Linear",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "PatchEmbed",
    "RowSize",
    "random_key",
]
