"""minivit: a Vision Transformer framework in pure NumPy and CuPy, every gradient proven."""

from __future__ import annotations

from minivit import nn, ops
from minivit.autograd.check import GradientReport, check_grads, check_module
from minivit.autograd.graph import first_order, no_grad
from minivit.autograd.tensor import Tensor, grad, tensor
from minivit.backend import Key
from minivit.errors import GradientError, MinivitError
from minivit.models.vit import ViT
from minivit.models.zoo import create_model, list_models
from minivit.nn.random import random_key
from minivit.train import optim
from minivit.train.step import TrainStep, predict_logits

__version__ = "0.1.0"
