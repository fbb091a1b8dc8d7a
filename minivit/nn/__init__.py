"""Parameters and layers."""

from minivit.nn.attention import EncoderBlock, MultiHeadAttention
from minivit.nn.bottleneck import Bottleneck, ResNetBackbone, ResNetRoot
from minivit.nn.convolution import Conv2d, GroupNorm, MaxPool2d, StdConv2d
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, PatchEmbed
from minivit.nn.module import Module, Parameter, RowSize
from minivit.nn.random import random_key

__all__ = [
    "MLP",
    "Bottleneck",
    "Conv2d",
    "DropPath",
    "Dropout",
    "EncoderBlock",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "MaxPool2d",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "PatchEmbed",
    "ResNetBackbone",
    "ResNetRoot",
    "RowSize",
    "StdConv2d",
    "random_key",
]
