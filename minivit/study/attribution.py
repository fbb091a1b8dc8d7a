"""Direct logit attribution: a logit as a sum of what embedding, heads and MLPs wrote into the token that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.errors import ConfigError, NonFiniteError
from minivit.models.trace import Trace
from minivit.nn.layers import LayerNorm, Linear
from minivit.study.asking import check_trace, followed, values

SLACK = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-4}
"""By how much, of the sum of their sizes, the terms may miss the logit; of half precision by a twentieth."""


@dataclass(frozen=True)
class Attribution:
    """The terms of a class's logit, float64, which add up to it.

    ``embedding`` (B,); ``heads`` (B, L, H); ``attention_bias`` (B, L), of the projection after the heads; ``mlp``
    (B, L), with its bias; ``bias`` (B,), of the final norm and the head; ``logit`` (B,), as the model gave it.
    """

    embedding: np.ndarray
    heads: np.ndarray
    attention_bias: np.ndarray
    mlp: np.ndarray
    bias: np.ndarray
    logit: np.ndarray

    def terms(self) -> list[tuple[str, np.ndarray]]:
        """Return every term by its name, (B,), in the order in which they are added; layers and heads count from 1."""
        named = [("embedding", self.embedding)]
        for layer in range(self.mlp.shape[1]):
            at = f"layer {layer + 1}"
            named += [(f"{at}, head {h + 1}", self.heads[:, layer, h]) for h in range(self.heads.shape[2])]
            named += [(f"{at}, attention's bias", self.attention_bias[:, layer]), (f"{at}, MLP", self.mlp[:, layer])]
        return [*named, ("final norm's and head's bias", self.bias)]

    @property
    def total(self) -> np.ndarray:
        """The sum of the terms, (B,)."""
        return np.sum([term for _, term in self.terms()], axis=0)


def direct_attribution(trace: Trace, classes: Any) -> Attribution:
    """Return the logit of a class, an integer or one for each image, (B,), as a sum of terms.

    The tokens that are read are a sum: x = embedding + Σ_l (Σ_h O_h·W_h + b_l + mlp_l). With the final norm's 1/σ held
    fixed the logit is linear in x: Σ (x - mean x)/σ ∘ γ·w + (β·w + b), w the class's row of the head (Elhage et al.
    2021, "A mathematical framework for transformer circuits", direct path). Of a model that reads the mean of its
    tokens, or has logits for every patch, it is the mean over them.

    Only what a part writes there itself is counted, not what later layers make of it. Raises ConfigError for a head
    with a hidden layer (head "mlp"): tanh stands between, and its logit is no sum; NonFiniteError if the terms do not
    add up to the logit, as in training with dropout, or with parameters that have changed since.
    """
    check_trace(trace)
    parts = layers_of(trace.model)
    classes = followed(trace, classes)
    numbers = lambda x: values(x, "a trace's or a model's numbers").astype(np.float64)
    # what one unit of each number of a read token adds to the logit
    norm, head = trace.model.norm, trace.model.head
    weight = numbers(head.weight)[classes]  # (K, D) → (B, D)
    way = weight * numbers(norm.weight)
    way -= way.mean(axis=-1, keepdims=True)  # the norm takes the mean off: x - mean x, moved to the other factor
    read = slice(0, 1) if getattr(trace.model, "pool", None) == "cls" else slice(None)
    last = numbers(trace.tokens[-1])[:, read]  # (B, T, D) → (B, R, D), the tokens that are read
    rstd = 1.0 / np.sqrt(last.var(axis=-1, keepdims=True) + norm.eps)  # (B, R, 1)
    way = way[:, None] * rstd / last.shape[1]  # → (B, R, D)
    along = lambda x: np.einsum("brd,brd->b", numbers(x)[:, read], way)

    heads, biases = [], []
    for passed, proj in zip(trace.heads, parts, strict=True):
        out = numbers(passed.out)[:, :, read]  # (B, H, T, d) → (B, H, R, d)
        back = (way @ numbers(proj.weight)).reshape(*way.shape[:2], *out.shape[1::2])  # (B, R, D) → (B, R, H, d)
        heads.append(np.einsum("bhrd,brhd->bh", out, back))
        biases.append(np.zeros(len(way)) if proj.bias is None else way.sum(axis=1) @ numbers(proj.bias))
    bias = weight @ numbers(norm.bias) + (0.0 if head.bias is None else numbers(head.bias)[classes])
    logits = numbers(trace.logits)
    logits = logits if logits.ndim == 2 else logits.mean(axis=1)  # (B, N, K) → (B, K)
    mlp = np.stack([along(x) for x in trace.mlp], axis=1)
    found = Attribution(
        along(trace.tokens[0]), np.stack(heads, 1), np.stack(biases, 1), mlp, bias, logits[np.arange(len(way)), classes]
    )
    check_sum(found, trace)
    return found


def layers_of(model: Any) -> list[Linear]:
    """Return the projection after the heads of every block; raise ConfigError if a logit is no sum of terms."""
    if getattr(model, "pre_logits", None) is not None:
        raise ConfigError(
            "a head with a hidden tanh layer (head 'mlp') makes no logit that is a sum of the layers' terms",
            "attribution needs head 'linear'; head_importance and gradient_attention go through any head",
        )
    parts: list[Any] = [getattr(getattr(block, "attn", None), "proj", None) for block in getattr(model, "blocks", [])]
    right = isinstance(getattr(model, "norm", None), LayerNorm) and isinstance(getattr(model, "head", None), Linear)
    if not (right and parts and all(isinstance(part, Linear) for part in parts)):
        raise ConfigError(
            f"{type(model).__name__} does not end in a LayerNorm called norm and a Linear called head, after blocks"
            " with attn.proj",
            "only for such a model a logit is a sum of terms",
        )
    return parts


def check_sum(found: Attribution, trace: Trace) -> None:
    """Raise NonFiniteError unless the terms add up to the logit."""
    sizes = np.sum([np.abs(term) for _, term in found.terms()], axis=0)
    missed = np.abs(found.total - found.logit) / np.maximum(sizes, 1e-300)
    if (worst := float(missed.max(initial=0.0))) > SLACK.get(trace.logits.dtype, 0.05):
        raise NonFiniteError(
            f"the terms of a logit add up to something else: {worst:.1e} of their sizes is missing",
            "take the trace in eval mode (study.trace_model does), and of the parameters as they are now",
        )
