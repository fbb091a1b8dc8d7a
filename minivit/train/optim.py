"""``mv.optim``: optimizers, clipping, and what sets their learning rates. Names only; each file has one purpose."""

from minivit.train.clip import clip_grad_norm, gradient_norm
from minivit.train.muon import Muon, orthogonalized
from minivit.train.optimizer import SGD, AdamW, Optimizer
from minivit.train.parameters import FlatParameters, layer_scales
from minivit.train.schedule import warmup_cosine, warmup_linear

__all__ = [
    "SGD",
    "AdamW",
    "FlatParameters",
    "Muon",
    "Optimizer",
    "clip_grad_norm",
    "gradient_norm",
    "layer_scales",
    "orthogonalized",
    "warmup_cosine",
    "warmup_linear",
]
