"""Direct logit attribution: a logit as a sum of what embedding, heads and MLPs wrote into the token that is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.errors import ConfigError, NonFiniteError
from minivit.models.trace import Trace
from minivit.nn.blocks import PostNormBlock, ResidualPostNormBlock
from minivit.nn.layers import LayerNorm, Linear
from minivit.nn.refined import RMSNorm
from minivit.study.asking import check_trace, followed, values

SLACK = {np.dtype(np.float64): 1e-10, np.dtype(np.float32): 1e-4}
"""By how much, of the sum of their sizes, the terms may miss the logit; of half precision by a twentieth."""


@dataclass(frozen=True)
class Attribution:
    """The terms of a class's logit, float64, which add up to it.

    ``embedding`` (B,); ``heads`` (B, L, H); ``attention_bias`` (B, L), of the projection after the heads; ``mlp``
    (B, L), with its bias; ``bias`` (B,), of the final norm and the head; ``logit`` (B,), as the model gave it;
    ``positions`` (B, L), of those added in every layer, or None.
    """

    embedding: np.ndarray
    heads: np.ndarray
    attention_bias: np.ndarray
    mlp: np.ndarray
    bias: np.ndarray
    logit: np.ndarray
    positions: np.ndarray | None = None

    def terms(self) -> list[tuple[str, np.ndarray]]:
        """Return every term by its name, (B,), in the order in which they are added; layers and heads count from 1."""
        named = [("embedding", self.embedding)]
        for layer in range(self.mlp.shape[1]):
            at = f"layer {layer + 1}"
            if self.positions is not None:
                named.append((f"{at}, positions", self.positions[:, layer]))
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
    patches, or has logits for every patch, it is the mean over them; of a distilled one, that of its two heads.

    Only what a part writes there itself is counted, not what later layers make of it. Raises ConfigError for a model
    whose logit is no such sum: with a hidden layer in its head (head "mlp": tanh stands between), with attention that
    pools (pool "map"), or with norms at the end of its branches (block "post" and "res_post"). NonFiniteError if the
    terms do not add up to the logit, as in training with dropout, or with parameters that have changed since.
    """
    check_trace(trace)
    blocks = layers_of(trace.model)
    classes = followed(trace, classes)
    read = tokens_read(trace)
    way, bias = way_to_logit(trace, classes, read)
    along = lambda x: np.einsum("brd,brd->b", np.broadcast_to(numbers(x)[:, read], way.shape), way)

    heads, biases = [], []
    for passed, block in zip(trace.heads, blocks, strict=True):
        proj, scale = block.attn.proj, getattr(block, "ls1", None)
        out = numbers(passed.out)[:, :, read]  # (B, H, T, d) → (B, H, R, d)
        scaled = way if scale is None else way * numbers(scale.gamma)
        back = (scaled @ numbers(proj.weight)).reshape(*way.shape[:2], *out.shape[1::2])  # (B, R, D) → (B, R, H, d)
        heads.append(np.einsum("bhrd,brhd->bh", out, back))
        biases.append(np.zeros(len(way)) if proj.bias is None else scaled.sum(axis=1) @ numbers(proj.bias))
    logits = numbers(trace.logits)
    logits = logits if logits.ndim == 2 else logits.mean(axis=1)  # (B, N, K) → (B, K)
    mlp = np.stack([along(x) for x in trace.mlp], axis=1)
    positions = None
    if any(x is not None for x in trace.placed):
        positions = np.stack([np.zeros(len(way)) if x is None else along(x) for x in trace.placed], axis=1)
    found = Attribution(
        along(trace.tokens[0]), np.stack(heads, 1), np.stack(biases, 1), mlp, bias,
        logits[np.arange(len(way)), classes], positions,
    )  # fmt: skip
    check_sum(found, trace)
    return found


def numbers(x: Any) -> np.ndarray:
    """Return a Tensor's numbers in float64, checked."""
    return values(x, "a trace's or a model's numbers").astype(np.float64)


def tokens_read(trace: Trace) -> slice:
    """Return which tokens the heads read: that of the class, and of distillation, or the patches."""
    if getattr(trace.model, "pool", None) == "cls":
        return slice(0, 1 if getattr(trace.model, "head_dist", None) is None else 2)
    return slice(trace.prefix, None)


def way_to_logit(trace: Trace, classes: np.ndarray, read: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return what one unit of each number of a token that is read adds to the logit, (B, R, D), and the bias (B,)."""
    model = trace.model
    norm = model.norm if getattr(model, "fc_norm", None) is None else model.fc_norm
    last = numbers(trace.tokens[-1])[:, read]  # (B, T, D) → (B, R, D)
    dist = getattr(model, "head_dist", None)
    heads = [model.head] * last.shape[1] if dist is None else [model.head, dist]  # one for each token
    weight = np.stack([numbers(head.weight)[classes] for head in heads], axis=1)  # (K, D) → (B, R, D)
    bias = sum(0.0 if head.bias is None else numbers(head.bias)[classes] for head in heads) / len(heads)
    way, normed = weight * numbers(norm.weight), last
    if norm is not model.norm and getattr(model, "pool", None) == "mean":  # it stands after the mean
        normed = last.mean(axis=1, keepdims=True)  # → (B, 1, D)
    if isinstance(norm, LayerNorm):
        way -= way.mean(axis=-1, keepdims=True)  # the norm takes the mean off: x - mean x, moved to the other factor
        normed = normed - normed.mean(axis=-1, keepdims=True)
        bias = bias + weight.mean(axis=1) @ numbers(norm.bias)
    rstd = 1.0 / np.sqrt(np.square(normed).mean(axis=-1, keepdims=True) + norm.eps)  # (B, R or 1, 1)
    return way * rstd / last.shape[1], np.broadcast_to(bias, len(way))


def layers_of(model: Any) -> list[Any]:
    """Return the blocks; raise ConfigError if a logit is no sum of terms."""
    if getattr(model, "pre_logits", None) is not None:
        raise ConfigError(
            "a head with a hidden tanh layer (head 'mlp') makes no logit that is a sum of the layers' terms",
            "attribution needs head 'linear'; head_importance and gradient_attention go through any head",
        )
    if getattr(model, "attn_pool", None) is not None:
        raise ConfigError(
            f"attention that pools the patches (pool {model.pool!r}) makes no logit that is a sum of the layers' terms",
            "attribution needs pool cls or mean; head_importance and gradient_attention go through any pool",
        )
    blocks = list(getattr(model, "blocks", []))
    if any(isinstance(block, PostNormBlock | ResidualPostNormBlock) for block in blocks):
        raise ConfigError(
            "a block whose norms stand at its branches' end adds what is no sum over its heads",
            "attribution needs block pre or parallel; head_importance and gradient_attention go through any",
        )
    parts: list[Any] = [getattr(getattr(block, "attn", None), "proj", None) for block in blocks]
    norm = getattr(model, "norm", None) if getattr(model, "fc_norm", None) is None else model.fc_norm
    right = isinstance(norm, LayerNorm | RMSNorm) and isinstance(getattr(model, "head", None), Linear)
    if not (right and parts and all(isinstance(part, Linear) for part in parts)):
        raise ConfigError(
            f"{type(model).__name__} does not end in a LayerNorm called norm and a Linear called head, after blocks"
            " with attn.proj",
            "only for such a model a logit is a sum of terms",
        )
    return blocks


def check_sum(found: Attribution, trace: Trace) -> None:
    """Raise NonFiniteError unless the terms add up to the logit."""
    sizes = np.sum([np.abs(term) for _, term in found.terms()], axis=0)
    missed = np.abs(found.total - found.logit) / np.maximum(sizes, 1e-300)
    if (worst := float(missed.max(initial=0.0))) > SLACK.get(trace.logits.dtype, 0.05):
        raise NonFiniteError(
            f"the terms of a logit add up to something else: {worst:.1e} of their sizes is missing",
            "take the trace in eval mode (study.trace_model does), and of the parameters as they are now",
        )
