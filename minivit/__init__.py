"""minivit: a Vision Transformer framework in pure NumPy and CuPy, every gradient proven.

Names are imported when they are first used, so that ``minivit --help`` need not wait for NumPy.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, which type checkers know by its name, without the import
if TYPE_CHECKING:
    from typing import Any

    from minivit import data, nn, ops, runs, study, train
    from minivit.autograd.check import GradientReport, check_grads, check_module
    from minivit.autograd.graph import first_order, no_grad
    from minivit.autograd.handwritten import check_vjp
    from minivit.autograd.op import op
    from minivit.autograd.tensor import Tensor, grad, tensor
    from minivit.backend import Key
    from minivit.errors import GradientError, MinivitError
    from minivit.models import ViT, list_models, preparation
    from minivit.models.encoder import register_encoder
    from minivit.nn.random import random_key
    from minivit.train import optim
    from minivit.train.classifier import ViTClassifier
    from minivit.train.inference import predict_logits
    from minivit.train.step import TrainStep
    from minivit.train.trainer import Trainer
    from minivit.weights.export import export
    from minivit.weights.load import create_model, load_weights
    from minivit.weights.native import load_model, save

__version__ = "0.1.0"

_HOMES = {
    "GradientError": "errors",
    "GradientReport": "autograd.check",
    "Key": "backend",
    "MinivitError": "errors",
    "Tensor": "autograd.tensor",
    "TrainStep": "train.step",
    "Trainer": "train.trainer",
    "ViT": "models",
    "ViTClassifier": "train.classifier",
    "check_grads": "autograd.check",
    "check_module": "autograd.check",
    "check_vjp": "autograd.handwritten",
    "create_model": "weights.load",
    "export": "weights.export",
    "first_order": "autograd.graph",
    "grad": "autograd.tensor",
    "list_models": "models",
    "load_model": "weights.native",
    "load_weights": "weights.load",
    "no_grad": "autograd.graph",
    "op": "autograd.op",
    "predict_logits": "train.inference",
    "preparation": "models",
    "random_key": "nn.random",
    "register_encoder": "models.encoder",
    "save": "weights.native",
    "tensor": "autograd.tensor",
}
"""The module, under minivit, that a public name comes from."""

_MODULES = {
    "data": "data",
    "nn": "nn",
    "ops": "ops",
    "optim": "train.optim",
    "runs": "runs",
    "study": "study",
    "train": "train",
}
"""Public modules, by the name they go by here."""

__all__ = [
    "GradientError",
    "GradientReport",
    "Key",
    "MinivitError",
    "Tensor",
    "TrainStep",
    "Trainer",
    "ViT",
    "ViTClassifier",
    "__version__",
    "check_grads",
    "check_module",
    "check_vjp",
    "create_model",
    "data",
    "export",
    "first_order",
    "grad",
    "list_models",
    "load_model",
    "load_weights",
    "nn",
    "no_grad",
    "op",
    "ops",
    "optim",
    "predict_logits",
    "preparation",
    "random_key",
    "register_encoder",
    "runs",
    "save",
    "study",
    "tensor",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    from importlib import import_module

    if name in _MODULES:
        value: Any = import_module(f"minivit.{_MODULES[name]}")
    elif name in _HOMES:
        import_module("minivit.ops")  # attaches the operators of Tensor
        value = getattr(import_module(f"minivit.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'minivit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
