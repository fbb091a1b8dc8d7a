"""The logit lens: what the head would say of the tokens of every layer."""

from __future__ import annotations

from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import grad
from minivit.errors import ConfigError, GraphError
from minivit.models.trace import Trace
from minivit.study.asking import check_trace, followed, values
from minivit.study.flow import one_hot


def logit_lens(trace: Trace) -> np.ndarray:
    """Return the logits that the final norm and the head give to the tokens after the embedding and every block.

    (L+1, B, K), or of a model with logits for every patch (L+1, B, N, K), in the trace's dtype: head(norm(x_l)), of
    the class token or of the mean, as the model reads it (nostalgebraist 2020, "interpreting GPT: the logit lens").
    The last are the model's own logits.
    """
    check_trace(trace)
    with no_grad():
        return np.stack([values(lens(trace, x.detach()), "the lens's logits") for x in trace.tokens])


def lens_gradient(trace: Trace, classes: Any) -> list[np.ndarray]:
    """Return ∂s_l/∂P_l of every block l, (B, H, T, T) each: s_l is the lens's logit of a class after that block.

    What :func:`legrad` is made of in its paper (Bousselham et al. 2024, 2404.03214, section 3). ``classes`` is a class,
    or one for each image, (B,). The last block's is :func:`attention_gradient`'s.
    """
    check_trace(trace)
    if trace.logits.node is None:
        raise GraphError("the trace has no graph: it was taken under no_grad", "take it outside of no_grad")
    chosen = one_hot(trace, followed(trace, classes))
    found = []
    for i, (x, p) in enumerate(zip(trace.tokens[1:], trace.attention, strict=True)):
        (g,) = grad(lens(trace, x), [p], chosen, create_graph=True)
        found.append(values(g, f"the gradient of block {i}'s attention"))
    return found


def lens(trace: Trace, x: Any) -> Any:
    """Return the logits of tokens (B, T, dim); raise ConfigError for a model without final norm and classify."""
    model = trace.model
    if not (hasattr(model, "norm") and hasattr(model, "classify")):
        raise ConfigError(f"{type(model).__name__} has no norm and classify", "they make logits of its last tokens")
    return model.classify(model.norm(x))
