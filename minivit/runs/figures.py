"""What the figures of a study are made of: a model's traces over many images, batch by batch, and what is kept of them.

It takes the memory of one batch of traces (:func:`minivit.study.traces`) and of what is drawn, however many images
there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np

from minivit import study
from minivit.autograd.tensor import Tensor
from minivit.backend import Key, Team, cpu_cores, to_device, to_numpy
from minivit.data import Dataset, Loader
from minivit.errors import ConfigError
from minivit.models import Model
from minivit.models.trace import Trace
from minivit.study.asking import values
from minivit.study.batches import batch_size
from minivit.study.distance import distance_sums, over_counts, patch_distances
from minivit.study.heads import entropy_sums, importance_sums, largest_entropy

Found = dict[str, Any]
CHUNK = 64
"""Images that are read and standardised at once."""
DRAWN = 128
"""So many images at most are drawn, and SINGLY of them one by one."""
SINGLY = 8


def spread(count: int, most: int) -> np.ndarray:
    """Return at most ``most`` of ``count`` places, evenly spaced: data sets are often in the order of their classes."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))


def observe(
    model: Model,
    datasets: Sequence[Dataset],
    labels: np.ndarray,
    standard: tuple[Sequence[float], Sequence[float]],
    wanted: Collection[str],
    after_batch: Callable[[int], object],
) -> tuple[dict[str, Found], np.ndarray]:
    """Return what was found of ``model`` for each of the ``wanted`` figures, and what it takes each image for, (N,).

    The images are those of all ``datasets``, N together, standardised by ``standard``, mean and deviation.
    ``labels`` (N,) are numbers of the model's classes, or others for images of classes that it does not know.
    ``after_batch(n)`` is called after each batch, of n images.
    """
    drawn, done = spread(len(labels), DRAWN), 0
    first = study.trace_model(model, np.zeros((1, *model.settings.image_shape), np.float32))
    size, device = batch_size(first), next(model.parameters()).device
    threads = min(cpu_cores(), size) if device == "cpu" else 1
    team = Team(threads, size // threads, device)
    whole, telling = Seen(wanted, drawn, first), Lock()
    del first
    for dataset in datasets:
        for images, _ in Loader(dataset, CHUNK, Key(0), mean=standard[0], std=standard[1], shuffle=False).batches(0):
            chunk = to_numpy(images)

            def work(thread: int, start: int, stop: int, chunk: Any = chunk, done: int = done) -> Seen:
                trace = study.trace_model(model, chunk[start:stop])
                seen = Seen(wanted, drawn, trace)
                seen.batch(trace, labels[done + start : done + stop], np.arange(done + start, done + stop))
                with telling:
                    after_batch(stop - start)
                return seen

            for part in team.run(work, len(chunk)):
                whole.add(part)
            done += len(chunk)
    return whole.found(), np.concatenate(whole.predictions)


class Seen:
    """Sums and maps of one trace after another; ``drawn`` are the places of the images that are drawn.

    ``first`` is a trace of the same model, of any image.
    """

    def __init__(self, wanted: Collection[str], drawn: np.ndarray, first: Trace) -> None:
        self.wanted, self.drawn = set(wanted), drawn
        self.singly = drawn[spread(len(drawn), SINGLY)]
        self.predictions: list[np.ndarray] = []
        self.images = 0
        self._sums: dict[str, Any] = {}
        self._kept: dict[str, list[np.ndarray]] = {}
        self._why_not: dict[str, str] = {}
        self._bare = replace(first, logits=None, tokens=[], heads=[], attended=[], mlp=[])  # its graph is let go
        self._most = largest_entropy(first)

    def add(self, other: Seen) -> None:
        """Take in what another one has seen of the images that follow."""
        self.images += other.images
        self.predictions += other.predictions
        self._add(**other._sums)
        self._why_not |= other._why_not
        for name, parts in other._kept.items():
            self._kept.setdefault(name, []).extend(parts)

    def batch(self, trace: Trace, labels: np.ndarray, places: np.ndarray) -> None:
        """Take in the trace of images whose places among all are ``places`` (B,); its graph is used up."""
        predicted = study.predicted(trace)
        self.predictions.append(predicted)
        self.images += len(predicted)
        drawn, singly = np.isin(places, self.drawn), np.isin(places, self.singly)
        if self.wanted & {"attention", "gallery"} and drawn.any():
            self._keep("maps", study.patch_map(trace, study.rollout(trace))[drawn])
        if "distance" in self.wanted:
            self._add(distance=distance_sums(trace))
        if "entropy" in self.wanted:
            self._add(entropy=entropy_sums(trace))
        if "lens" in self.wanted:
            self._add(lens=lens_sums(trace, labels))
        if "attribution" in self.wanted:
            self._attribute(trace, predicted)
        if "norms" in self.wanted:
            norms, prefix = study.token_norms(trace), trace.prefix  # (L+1, B, T)
            self._add(norms=by_token(norms, prefix), longest=norms[..., prefix:].max(axis=-1).sum(axis=1))
            self._keep("norms", norms[-1][singly][:, prefix:].reshape(-1, *trace.grid))
        if "features" in self.wanted:
            self._keep("features", to_numpy(trace.tokens[-1].data)[singly])
        if self.wanted & {"importance", "flow"}:
            self._follow_back(trace, predicted)

    def _add(self, **parts: Any) -> None:
        for name, part in parts.items():
            self._sums[name] = self._sums.get(name, 0) + np.asarray(part)

    def _keep(self, name: str, part: np.ndarray) -> None:
        self._kept.setdefault(name, []).append(part)

    def _follow_back(self, trace: Trace, predicted: np.ndarray) -> None:
        """Take in the gradients of the predicted class's logit, all in one walk, which frees the trace's graph."""
        layers = len(trace.attention)
        back = study.flows(trace, predicted, [*trace.attention, *trace.tokens], keep=False)
        self._add(importance=importance_sums(trace, back[:layers]))
        sizes = np.stack(
            [np.sqrt(np.square(values(g, "a gradient"), dtype=np.float64).sum(axis=-1)) for g in back[layers:]]
        )
        whole = np.sqrt(np.square(sizes).sum(axis=-1)).sum(axis=1)  # (L+1, B, T) → (L+1,)
        self._add(flow=by_token(sizes, trace.prefix), whole=whole)

    def _attribute(self, trace: Trace, predicted: np.ndarray) -> None:
        try:
            found = study.direct_attribution(trace, predicted)
        except ConfigError as error:
            self._why_not["attribution"] = f"This model has none: {error.what}."
            return
        if found.positions is not None:  # those of every layer count with those of the embedding
            found = replace(found, embedding=found.embedding + found.positions.sum(axis=1))
        names = ("embedding", "heads", "attention_bias", "mlp", "bias", "logit")
        self._add(**{f"attribution {name}": getattr(found, name).sum(axis=0) for name in names})

    # ---- what came of it ---------------------------------------------------------------------------------------------

    def found(self) -> dict[str, Found]:
        """Return the arrays of each figure, or why the model cannot have it."""
        model = self._bare.model
        makers: dict[str, Callable[[], Found]] = {
            "attention": lambda: {"maps": self._whole("maps")},
            "gallery": lambda: {"maps": self._whole("maps")},
            "filters": lambda: dict(zip(("components", "share"), study.filter_components(model), strict=True)),
            "positions": lambda: {"similarity": study.position_similarity(model)},
            "distance": lambda: {"pixels": over_counts(*self._sums["distance"]), "even": self._even()},
            "entropy": lambda: {"bits": over_counts(*self._sums["entropy"]), "most": self._most},
            "importance": lambda: {"logits": self._sums["importance"] / self.images},
            "attribution": self._attribution,
            "lens": self._lens,
            "features": self._features,
            "norms": self._norms,
            "flow": self._flow,
        }
        whole: dict[str, Found] = {}
        for name, make in makers.items():
            if name in self.wanted:
                try:
                    whole[name] = make()
                except ConfigError as error:
                    whole[name] = {"why_not": f"This model has none: {error.what}."}
        return whole

    def _whole(self, name: str) -> np.ndarray:
        return np.concatenate(self._kept[name])

    def _attribution(self) -> Found:
        if why_not := self._why_not.get("attribution"):
            return {"why_not": why_not}
        prefix = "attribution "
        sums = {key.removeprefix(prefix): x for key, x in self._sums.items() if key.startswith(prefix)}
        return {name: x / self.images for name, x in sums.items()}

    def _even(self) -> float:
        """Return the distance of attention that is even over all patches."""
        return float(patch_distances(self._bare.grid, self._bare.model.patch_embed.patch_size).mean())

    def _lens(self) -> Found:
        known, probability, first = self._sums["lens"]
        if not known.any():
            return {"why_not": "None of these images is of a class that the model knows."}
        return {"probability": probability / known, "first": first / known}

    def _features(self) -> Found:
        last = to_device(self._whole("features"), next(self._bare.model.parameters()).device)
        found = study.feature_components(replace(self._bare, tokens=[Tensor(last)]), 3)
        low, high = np.percentile(found.values, (1, 99), axis=(0, 1, 2))  # (3,) each
        colours = ((found.values - low) / np.maximum(high - low, np.finfo(float).tiny)).clip(0, 1)
        missing = [(0, 0)] * 3 + [(0, 3 - colours.shape[-1])]  # of a model with fewer numbers than three
        return {"colours": np.pad(colours, missing), "share": found.shares}

    def _norms(self) -> Found:
        patch, token = self._sums["norms"] / self.images
        longest = self._sums["longest"] / self.images
        return {"mean": patch, "longest": longest, "token": self._of_token(token), "maps": self._whole("norms")}

    def _flow(self) -> Found:
        patch, token = self._sums["flow"] / self.images
        return {"patch": patch, "token": self._of_token(token), "all": self._sums["whole"] / self.images}

    def _of_token(self, sizes: np.ndarray) -> np.ndarray | None:
        model: Any = self._bare.model
        return sizes if self._bare.prefix and getattr(model, "cls_token", model) is not None else None


def by_token(sizes: np.ndarray, prefix: int) -> np.ndarray:
    """Return sums over the images of (L+1, B, T): of the patches' mean, and of the class token, 0 if there is none."""
    token = sizes[..., 0] if prefix else np.zeros(sizes.shape[:2])
    return np.stack([sizes[..., prefix:].mean(axis=-1).sum(axis=1), token.sum(axis=1)])  # (2, L+1)


def lens_sums(trace: Trace, labels: np.ndarray) -> np.ndarray:
    """Return, after every layer, sums over the images of known classes: 1, p(label), whether it is first; (3, L+1)."""
    logits = study.logit_lens(trace).astype(np.float64)  # (L+1, B, K) or (L+1, B, N, K)
    logits = logits if logits.ndim == 3 else logits.mean(axis=2)
    known = np.flatnonzero(labels < logits.shape[-1])
    logits = logits[:, known]
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    own = shares[:, np.arange(len(known)), labels[known]]  # (L+1, known)
    first = logits.argmax(axis=-1) == labels[known]
    return np.stack([np.full(len(logits), float(len(known))), own.sum(axis=1), first.sum(axis=1)])
