"""minivit: a Vision Transformer framework in pure NumPy and CuPy, every gradient proven."""

from __future__ import annotations

from minivit import ops
from minivit.autograd.check import GradientReport, check_grads, check_module
from minivit.autograd.graph import first_order, no_grad
from minivit.autograd.tensor import Tensor, grad, tensor
from minivit.backend import Key
from minivit.errors import GradientError, MinivitError
