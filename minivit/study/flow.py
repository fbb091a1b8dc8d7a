"""What flows back from a logit: through every attention, and through every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor, grad
from minivit.backend import to_device
from minivit.errors import GraphError, ShapeError
from minivit.models.trace import Trace
from minivit.study.asking import check_trace, followed, values


def attention_gradient(trace: Trace, of: Any) -> list[np.ndarray]:
    """Return ∂s/∂P of every block, (B, H, T, T) each, in the trace's dtype.

    s is the sum over the images of the logit of class ``of``, an integer, or one for each image, (B,); as no image acts
    on another, each has the gradient of its own logit. Of a model with logits for every patch (pool "none") it is their
    mean. ``of`` may also be a Tensor of one element computed from ``trace.logits``: a loss, the difference of two.

    The graph stays: another class can be asked for. Raises GraphError for a trace taken under ``no_grad`` and for a
    Tensor of another trace, ConfigError for a class that the model has not.
    """
    check_trace(trace)
    return [
        values(g, f"the gradient of block {i}'s attention") for i, g in enumerate(flows(trace, of, trace.attention))
    ]


def gradient_flow(trace: Trace, of: Any) -> np.ndarray:
    """Return ‖∂s/∂x‖₂ of every token after the embedding and after every block: (L+1, B, T), float64.

    s as in :func:`attention_gradient`. Where it is 0 nothing that the token holds there reaches the logit: of a model
    that reads its class token, all other tokens after the last block.
    """
    check_trace(trace)
    parts = [values(g, "the gradient of the tokens") for g in flows(trace, of, trace.tokens)]
    return np.stack([np.sqrt(np.square(g, dtype=np.float64).sum(axis=-1)) for g in parts])  # (B, T, dim) → (B, T)


def flows(trace: Trace, of: Any, inputs: Sequence[Any], keep: bool = True) -> list[Any]:
    """Return ∂s/∂x for each of ``inputs``, Tensors of the trace, as arrays on its device.

    s as in :func:`attention_gradient`. Without ``keep`` the graph is freed: quicker, and a third of the memory, but
    nothing else can be asked of the trace's gradients then.
    """
    if trace.logits.node is None:
        raise GraphError("the trace has no graph: it was taken under no_grad", "take it outside of no_grad")
    if isinstance(of, Tensor) and of.dtype.kind not in "iu":
        if of.size != 1:
            raise ShapeError(f"the gradient of one number is asked for, got a Tensor of shape {of.shape}", "of.sum()")
        return [g.data for g in grad(of, inputs, create_graph=keep)]
    chosen = one_hot(trace, followed(trace, of))
    return [g.data for g in grad(trace.logits, inputs, chosen, create_graph=keep)]


def one_hot(trace: Trace, classes: np.ndarray) -> Any:
    """Return the cotangent of the logits that picks a class of each image: 1 there, or 1/N for each of N patches."""
    shape = trace.logits.shape  # (B, K) or (B, N, K)
    picked = np.zeros(shape)
    picked[np.arange(shape[0]), ..., classes] = 1.0 if len(shape) == 2 else 1.0 / shape[1]
    return to_device(picked.astype(trace.logits.dtype), trace.logits.device)
