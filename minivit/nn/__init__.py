"""Parameters and layers."""

from minivit.nn.attention import EncoderBlock, MultiHeadAttention
from minivit.nn.blocks import BetweenNormBlock, ParallelBlock, PostNormBlock, ResidualPostNormBlock
from minivit.nn.bottleneck import Bottleneck, ResNetBackbone, ResNetRoot
from minivit.nn.convolution import Conv2d, GroupNorm, MaxPool2d, StdConv2d
from minivit.nn.layers import MLP, Dropout, DropPath, LayerNorm, Linear, PatchEmbed, Tokenizer
from minivit.nn.module import Module, Parameter, RowSize
from minivit.nn.random import random_key
from minivit.nn.refined import LayerScale, PatchDropout, RMSNorm, SwiGLU
from minivit.nn.scored import AttentionPool, RelativePositions, ScoredAttention, SequencePool
from minivit.nn.token_attention import TokenPerformer, TokensToToken, TokenTransformer
from minivit.nn.tokenizers import ConvStem, ConvTokenizer, NormedPatchEmbed, ShiftedPatchEmbed

__all__ = [
    "MLP",
    "AttentionPool",
    "BetweenNormBlock",
    "Bottleneck",
    "Conv2d",
    "ConvStem",
    "ConvTokenizer",
    "DropPath",
    "Dropout",
    "EncoderBlock",
    "GroupNorm",
    "LayerNorm",
    "LayerScale",
    "Linear",
    "MaxPool2d",
    "Module",
    "MultiHeadAttention",
    "NormedPatchEmbed",
    "ParallelBlock",
    "Parameter",
    "PatchDropout",
    "PatchEmbed",
    "PostNormBlock",
    "RMSNorm",
    "RelativePositions",
    "ResNetBackbone",
    "ResNetRoot",
    "ResidualPostNormBlock",
    "RowSize",
    "ScoredAttention",
    "SequencePool",
    "ShiftedPatchEmbed",
    "StdConv2d",
    "SwiGLU",
    "TokenPerformer",
    "TokenTransformer",
    "Tokenizer",
    "TokensToToken",
    "random_key",
]
