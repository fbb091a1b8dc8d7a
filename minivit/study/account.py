"""One image's way through a model and back, in numbers: what a page shows, and what a reader can check by hand."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.graph import no_grad
from minivit.backend import blas_threads, to_device, to_numpy
from minivit.errors import ConfigError
from minivit.models.trace import Trace
from minivit.nn.attention import table
from minivit.nn.module import mode
from minivit.study.asking import class_indices, reads_class_token, token_weights, values
from minivit.study.attribution import direct_attribution
from minivit.study.components import token_norms
from minivit.study.flow import flows
from minivit.study.lens import logit_lens
from minivit.study.rollout import legrad, relevance, rollout

KEPT = 17
"""Tokens of a head whose vectors are told: the class token and the 16 that it attends to most."""

MOST_FOLLOWED, BUDGET = 5, 1 << 20
"""At most so many classes are followed back, and no more than fit into so many bytes; but two in any case."""

LARGEST = 100_000_000
"""Bytes of numbers from which on there is too much to show."""


@dataclass(frozen=True)
class Account:
    """What passed through a model for one image, and what flowed back from the logits of the classes ``follow`` (F,).

    ``maps`` are (…, T) arrays, float: ``P`` (L, H, T, T); ``looks`` (L, T), where the class token looks, or all
    patches on the mean, mean of the heads; ``dP`` (F, L, H, T, T); ``rollout`` (T, T); ``relevance`` (F, T, T);
    ``legrad`` (F, N). ``numbers`` are exact. Of the K tokens ``kept`` (L, H, K) of each head, in their order:
    ``q``, ``k``, ``v``, ``o`` (L, H, K, d); ``s``, ``p`` (L, H, K, K) among themselves; ``z`` (L, H, K, 2), the
    row's largest score m and Σ e^(s - m) over the tokens that are not kept; and going back ``do``, ``dq``, ``dk``,
    ``dv`` (F, L, H, K, d), ``dp``, ``ds`` (F, L, H, K, K). Where some tokens are not kept, ``o_rest``, ``dq_rest``,
    ``dk_rest`` and ``dv_rest`` are what those add to each sum. Of the seven steps: ``weight`` (C, P, Q) and ``bias``
    (1,), which give a token's first number where it is linear in its patch; ``embedded`` (N, D), ``class_token``
    (prefix, D), what is before the patches, ``positions`` (T, D), ``entering`` (T, D), ``features`` (D,), that go into
    the head, ``head_weight`` (1, D) and ``head_bias`` (1,) of the likeliest class, ``logits`` (classes,). A score is
    ``scale`` (L, H) times the product
    of query and key, plus ``relative`` (L, H, K, K) where there are relative positions. Besides, ``norms`` (L+1, T) and
    ``flow`` (F, L+1, T), ‖x‖ and ‖∂s/∂x‖; ``lens`` and ``lens_probability`` (L+1, F), ``lens_top`` (L+1,); ``direct``
    (F, terms), called ``terms``, none where a logit is no sum of them. ``reads`` says what the class is read from:
    "class", the class token; "both", that and the distillation token; "mean", "map" or "seq", the patches, each weighed
    by ``token_weights`` (N,) in the last.
    """

    follow: np.ndarray
    maps: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    terms: tuple[str, ...]
    grid: tuple[int, int]
    prefix: int
    reads: str


def account(model: Any, image: np.ndarray, label: int | None = None) -> Account:
    """Return the :class:`Account` of an image (C, H, W), standardised for the model, and of class ``label`` or None.

    The classes that are followed are the likeliest, the label and the runners-up: five, or fewer where a large model
    makes much of each. Raises ConfigError for a model without attention, with logits for each patch (pool "none"), or
    too large to show, NonFiniteError where numbers are not finite.
    """
    check_model(model)
    parameter = next(model.parameters())
    image = image.astype(parameter.dtype)
    images = to_device(image[None], parameter.device)
    with mode(False), blas_threads(1):  # many small products: more threads would wait for each other
        with no_grad():
            logits = values(model(images), "the logits")[0]
        if label is not None:
            [label] = class_indices(label, 1, len(logits)).tolist()
        follow = followed(logits, label, most_followed(model))
        # one row for each class that is followed: a single walk back serves all of them
        trace = model.trace(to_device(np.repeat(image[None], len(follow), axis=0), images.device))
        forward = passed(trace)
        with no_grad():
            steps = seven_steps(trace, images, int(follow[0]))
        lens = logit_lens(trace)[:, 0]  # (L+1, B, classes) → (L+1, classes)
        probability = np.asarray(ops.softmax(lens))
        numbers = steps | {
            "lens": lens[:, follow],
            "lens_probability": probability[:, follow],
            "lens_top": lens.argmax(axis=1),
            "norms": token_norms(trace)[:, 0],
        }
        weights = token_weights(trace)
        if weights is not None:
            numbers["token_weights"] = weights = weights[0, 0]  # (N,)
        maps = {
            "P": forward["p"],
            "looks": looks(forward["p"], trace.prefix, weights).mean(axis=1),
            "rollout": rollout(trace)[0],
        }
        terms: list[tuple[str, np.ndarray]] = []
        with contextlib.suppress(ConfigError):  # a logit that is no sum of terms
            terms = direct_attribution(trace, follow).terms()
            numbers["direct"] = np.stack([term for _, term in terms], axis=1)  # (F, terms)
        scale, bias = scores_made_of(trace)
        back, flow = flowed(trace, follow)
    dp = [np.ascontiguousarray(g) for g in back["dp"].swapaxes(0, 1)]  # (F, L, …) → of each layer (F, …)
    maps |= {"dP": back["dp"], "relevance": relevance(trace, dp)}
    maps["legrad"] = legrad(trace, dp).reshape(len(follow), -1)  # (F, rows, columns) → (F, N)
    kept = chosen_tokens(forward["p"], trace.prefix if reads_class_token(trace) else 0, weights)
    numbers |= {"flow": flow} | of_kept(forward, back, kept, scale, bias, trace.mask)
    reads = "both" if getattr(model, "head_dist", None) is not None else getattr(model, "pool", "mean")
    reads = "class" if reads == "cls" else reads
    return Account(follow, maps, numbers, tuple(name for name, _ in terms), trace.grid, trace.prefix, reads)


# ---- which model, which classes, which tokens ------------------------------------------------------------------------


def check_model(model: Any) -> None:
    """Raise ConfigError for a model that cannot be told about."""
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not hasattr(model, "trace") or not blocks or not all(hasattr(block, "attn") for block in blocks):
        raise ConfigError(f"a {name} has no attention to show: no trace", "explain a model that attends, such as a ViT")
    if getattr(model, "pool", None) == "none":
        remedy = "train it with pool cls or mean"
        raise ConfigError(f"this {name} gives logits for each patch (pool none), not one class for an image", remedy)
    layers, heads, tokens, d = sizes(model)
    kept = min(tokens, KEPT)
    maps = layers * heads * tokens**2
    size = 3 * maps + 19 * 4 * layers * heads * kept * d
    if size > LARGEST:
        what = f"{layers} layers of {heads} heads for {tokens:,} tokens are {size / 1e6:,.0f} MB of numbers to show"
        raise ConfigError(what, "take a model with fewer patches, or study it: minivit study")


def sizes(model: Any) -> tuple[int, int, int, int]:
    """Return layers, heads, tokens and the numbers of a head."""
    attention = model.blocks[0].attn
    return len(model.blocks), attention.heads, model.num_tokens, attention.dim_head


def most_followed(model: Any) -> int:
    """Return how many classes are followed back."""
    layers, heads, tokens, d = sizes(model)
    kept = min(tokens, KEPT)
    each = layers * heads * (tokens**2 + 4 * kept * (d * (4 if kept == tokens else 7) + 2 * kept))
    return max(2, min(MOST_FOLLOWED, BUDGET // each))


def followed(logits: np.ndarray, label: int | None, most: int) -> np.ndarray:
    """Return the likeliest class, the label if there is one, and the next likeliest: at most ``most`` of them."""
    order = np.argsort(-logits, kind="stable").tolist()
    first = [order[0]] + ([label] if label is not None and label != order[0] else [])
    return np.array([*first, *(c for c in order if c not in first)][:most])


def chosen_tokens(p: np.ndarray, prefix: int, weights: np.ndarray | None) -> np.ndarray:
    """Return which tokens of each head are kept, in their order: (L, H, T, T) → (L, H, K).

    The class token and those that it attends to most; without one, those that all attend to most, by their ``weights``.
    """
    tokens = p.shape[-1]
    if tokens <= KEPT:
        return np.broadcast_to(np.arange(tokens), (*p.shape[:2], tokens))
    read = looks(p, prefix, weights).copy()  # (L, H, T)
    if prefix:
        read[..., 0] = 2.0  # first in any case
    return np.sort(np.argsort(-read, axis=-1, kind="stable")[..., :KEPT], axis=-1)


def looks(p: np.ndarray, prefix: int, weights: np.ndarray | None) -> np.ndarray:
    """Return the row that the class is read from, the class token's or the patches' mean: (L, H, T, T) → (L, H, T).

    With ``weights`` (T,), it is the mean so weighed.
    """
    if weights is not None:
        return weights @ p
    return p[:, :, 0] if prefix else p.mean(axis=2)


# ---- forward and back ------------------------------------------------------------------------------------------------


def passed(trace: Trace) -> dict[str, np.ndarray]:
    """Return q, k, v, o (L, H, T, d), s and p (L, H, T, T) of the first image."""
    fields = {"q": "q", "k": "k", "v": "v", "s": "scores", "p": "weights", "o": "out"}
    return {
        name: np.stack([values(getattr(heads, field), f"{field} of a head")[0] for heads in trace.heads])
        for name, field in fields.items()
    }


def flowed(trace: Trace, follow: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return dq, dk, dv, do (F, L, H, T, d), ds, dp (F, L, H, T, T), and the norms of ∂s/∂x, (F, L+1, T)."""
    layers = len(trace.heads)
    fields = {"dq": "q", "dk": "k", "dv": "v", "ds": "scores", "dp": "weights", "do": "out"}
    asked = [getattr(heads, field) for field in fields.values() for heads in trace.heads]
    found = [values(g, "a gradient") for g in flows(trace, follow, [*asked, *trace.tokens], keep=False)]
    back = {
        name: np.stack(found[i * layers : (i + 1) * layers], axis=1)  # L of (F, H, …) → (F, L, H, …)
        for i, name in enumerate(fields)
    }
    return back, np.stack([np.linalg.norm(g, axis=-1) for g in found[len(asked) :]], axis=1)  # (F, T, D) → (F, L+1, T)


def scores_made_of(trace: Trace) -> tuple[np.ndarray, np.ndarray | None]:
    """Return what query times key is multiplied by, (L, H), and the bias that is added, (L, H, T, T), or None."""
    scales, biases = [], []
    for block, heads in zip(trace.model.blocks, trace.heads, strict=True):
        count, d = heads.q.shape[1], heads.q.shape[-1]
        temperature, relative = (getattr(block.attn, name, None) for name in ("temperature", "rel_pos"))
        scales.append(np.full(count, d**-0.5) if temperature is None else np.exp(values(temperature, "a temperature")))
        biases += [] if relative is None else [values(relative(), "relative positions")]
    return np.stack(scales), np.stack(biases) if biases else None


def of_kept(
    forward: dict[str, np.ndarray],
    back: dict[str, np.ndarray],
    kept: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray | None,
    mask: Any,
) -> dict[str, np.ndarray]:
    """Return the numbers of the kept tokens (L, H, K), and what all others add to the sums over tokens."""
    tokens = forward["q"].shape[-2]
    rows = kept[..., None]  # (L, H, K, 1)
    pick = lambda x: np.take_along_axis(x, rows if x.ndim == 4 else rows[None], axis=-2)  # (…, T, n) → (…, K, n)
    columns = lambda x: pick(x.swapaxes(-1, -2)).swapaxes(-1, -2)  # (…, n, T) → (…, n, K)
    numbers = {"kept": kept} | {name: pick(forward[name]) for name in ("q", "k", "v", "o")}
    numbers |= {name: columns(pick(forward[name])) for name in ("s", "p")}
    numbers["scale"] = scales
    numbers |= {} if bias is None else {"relative": columns(pick(bias))}
    numbers |= {name: pick(back[name]) for name in ("do", "dq", "dk", "dv")}
    numbers |= {name: columns(pick(back[name])) for name in ("dp", "ds")}
    others = np.ones((*kept.shape[:2], tokens))  # 1 for a token that is not kept
    np.put_along_axis(others, kept, 0.0, axis=-1)
    s = pick(forward["s"]).astype(np.float64)  # (L, H, K, T)
    seen = np.ones((tokens, tokens)) if mask is None else 1.0 - to_numpy(mask).reshape(-1, tokens, tokens)[0]
    seen = np.broadcast_to(seen, forward["s"].shape)
    m = np.where(pick(seen) > 0, s, -np.inf).max(axis=-1, keepdims=True)
    beside = np.exp(np.minimum(s - m, 0.0)) * others[:, :, None] * pick(seen)
    numbers["z"] = np.concatenate([m, beside.sum(-1, keepdims=True)], axis=-1)
    if kept.shape[-1] < tokens:
        scale, left, right = scales[..., None, None], others[..., None, :], others[..., :, None]
        numbers["o_rest"] = (pick(forward["p"]) * left) @ forward["v"]
        numbers["dv_rest"] = columns(forward["p"] * right).swapaxes(-1, -2) @ back["do"]
        numbers["dq_rest"] = (pick(back["ds"]) * left) @ forward["k"] * scale
        numbers["dk_rest"] = columns(back["ds"] * right).swapaxes(-1, -2) @ forward["q"] * scale
    return numbers


# ---- the seven steps -------------------------------------------------------------------------------------------------


def seven_steps(trace: Trace, images: Any, first: int) -> dict[str, np.ndarray]:
    """Return what goes from step to step for ``images`` (1, C, H, W); ``first`` is the likeliest class."""
    model = trace.model
    number: Any = lambda x: values(x, "a parameter or a token")
    x = model.norm(trace.tokens[-1].detach()[:1])  # (1, T, D)
    heads = [model.head] if getattr(model, "head_dist", None) is None else [model.head, model.head_dist]
    if len(heads) == 2:  # the class's token and that of distillation, each with half of its head
        features, weight = [number(x)[0, i] for i in (0, 1)], [number(head.weight)[first] / 2 for head in heads]
    else:
        features, weight = [number(read_by_head(model, x))[0]], [number(model.head.weight)[first]]
    found = {
        "embedded": number(model.patch_embed(images))[0],
        "entering": number(trace.tokens[0])[0],
        "features": np.concatenate(features),
        "head_weight": np.concatenate(weight)[None],
        "head_bias": np.mean([first_bias(head.bias, first, number) for head in heads], axis=0),
        "logits": number(trace.logits)[0],
    }
    if not model.patch_embed.says:  # a linear map of the patch
        found["weight"] = number(model.patch_embed.proj.weight)[0]
        found["bias"] = first_bias(model.patch_embed.proj.bias, 0, number)
    if hasattr(model.patch_embed, "features"):  # the first few of each patch's, which are no pixels
        found["seen"] = number(model.patch_embed.features(images))[0, :, :4]
    beside = [number(p)[0] for p in (getattr(model, name, None) for name in BESIDE) if p is not None]
    placed = table(getattr(model, "pos_embed", None), trace.tokens[0])
    if beside:
        found["class_token"] = np.concatenate(beside)
    if placed is not None:  # of patches only: nothing is added to the tokens before them
        found["positions"] = np.zeros_like(found["entering"])
        found["positions"][-placed.shape[1] :] = number(placed)[0]
    return found


BESIDE = {"cls_token": "class token", "dist_token": "distillation token", "reg_token": "register"}
"""What may stand before the patches, by its parameter."""


def tokens_beside(model: Any) -> list[str]:
    """Return the names of the tokens before the patches."""
    found = []
    for parameter, name in BESIDE.items():
        count = 0 if (p := getattr(model, parameter, None)) is None else p.shape[1]
        found += [name] if count == 1 else [f"{name} {i + 1}" for i in range(count)]
    return found


def read_by_head(model: Any, x: Any) -> Any:
    """Return what the head reads of tokens (1, T, D) after the final norm, (1, D)."""
    if hasattr(model, "read"):
        return model.read(x)
    read = x[:, 0] if getattr(model, "pool", None) == "cls" else ops.mean(x, axis=1)
    hidden = getattr(model, "pre_logits", None)
    return read if hidden is None else ops.tanh(hidden(read))


def first_bias(bias: Any, at: int, number: Any) -> np.ndarray:
    """Return one number of a bias, (1,); 0 where there is none."""
    return np.zeros(1, np.float32) if bias is None else number(bias)[at : at + 1]
