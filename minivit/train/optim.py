"""Optimizers. All parameters live in one flat array, of which each ``parameter.data`` becomes a view.

So an update is a few passes over long arrays instead of a few calls for each of a hundred small ones, gradients are
added, clipped and averaged in one piece, and the moments have the same layout.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import Array, array_module, device_of, on_device_of, to_device, to_numpy
from minivit.errors import CheckpointError, ConfigError, GraphError
from minivit.nn.module import Parameter
from minivit.train.schedule import warmup_cosine, warmup_linear

__all__ = [
    "SGD",
    "AdamW",
    "Muon",
    "Optimizer",
    "clip_grad_norm",
    "gradient_norm",
    "layer_scales",
    "orthogonalized",
    "warmup_cosine",
    "warmup_linear",
]

CHUNK = 1 << 16  # numbers updated at a time on a CPU: few enough for the cache, enough to be worth a call


def is_decayed(name: str, p: Parameter) -> bool:
    """Tell whether weight decay applies: not to biases and norms (1-D), nor to class token and positions."""
    return p.ndim > 1 and name.rpartition(".")[2] not in ("cls_token", "pos_embed")


def layer_scales(names: Iterable[str], depth: int, decay: float) -> dict[str, float]:
    """Return a factor on the learning rate for each parameter of a ViT of ``depth`` blocks, by its name.

    Layer-wise decay (Clark et al. 2020, "ELECTRA", appendix B; Bao et al. 2021, "BEiT"): 1 for the head and the final
    norm, ``decay``^(depth - i) for block i = 0 …, ``decay``^(depth + 1) for patch embedding, class token and positions.
    What a pre-trained model has learned first, and shares most with other data, changes least. 0.65 to 0.9 is usual;
    0 trains the head alone. Raises ConfigError for a ``decay`` outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"a layer decay of {decay}", "it must be in [0, 1]; 0.75 is usual, 1 is none")

    def layers_above(name: str) -> int:
        first, *rest = name.split(".")
        if first == "blocks":
            return depth - int(rest[0])
        return depth + 1 if first in ("patch_embed", "cls_token", "pos_embed") else 0

    return {name: decay ** layers_above(name) for name in names}


class Group(NamedTuple):
    """A stretch of the flat parameters that is updated alike."""

    start: int
    stop: int
    decayed: bool
    scale: float  # on the learning rate


class Optimizer:
    """Base: lays the parameters out flat, collects their gradients, keeps ``slots`` arrays of state beside them.

    ``lr`` may be set before every step; ``steps`` counts the updates made. Parameters that do not require a gradient
    are left out. One that is frozen later (``requires_grad = False``), or that the loss does not reach, is left alone
    by an update: its value, its state, and its average (:class:`minivit.train.ema.EMA`) stay. Move or convert the model
    before making its optimizer, not after. ``lr_scales`` are factors on ``lr`` by parameter name, 1 where there is
    none: :func:`layer_scales` makes such. ``lr`` and the other settings are no part of the state: a run that is resumed
    without a schedule goes on with those that its optimizer was made with.

    Raises ConfigError for settings or parameters that cannot be used.
    """

    slots: tuple[str, ...] = ()

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float,
        weight_decay: float,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        given = list(named_parameters)
        if wrong := [item for item in given if not isinstance(item, tuple)]:
            raise ConfigError(
                f"the optimizer got a {type(wrong[0]).__name__}, not a pair (name, parameter)",
                "pass model.named_parameters()",
            )
        named = [(n, p) for n, p in given if p.requires_grad]
        if not named:
            raise ConfigError("the optimizer got no parameter that requires a gradient", "pass named_parameters()")
        kinds = {(str(p.dtype), p.device) for _, p in named}
        if len(kinds) > 1:
            raise ConfigError(f"parameters of several kinds: {sorted(kinds)}", "convert the whole model: model.to(…)")
        scales = {n: 1.0 for n, _ in given} | {n: float(scale) for n, scale in (lr_scales or {}).items()}
        if unknown := scales.keys() - {n for n, _ in given}:
            raise ConfigError(f"lr_scales for unknown parameters: {', '.join(sorted(unknown)[:5])}", "see opt.names")
        if not all(0.0 <= scale < math.inf for scale in scales.values()):
            raise ConfigError(f"lr_scales={lr_scales}", "each must be finite and at least 0")

        def rule(item: tuple[str, Parameter]) -> tuple[bool, float]:
            return is_decayed(*item), scales[item[0]]

        for kind, values in (("name", [n for n, _ in named]), ("parameter", [str(id(p)) for _, p in named])):
            if twice := [n for (n, _), value in zip(named, values, strict=True) if values.count(value) > 1]:
                raise ConfigError(
                    f"the optimizer got the same {kind} twice: {', '.join(dict.fromkeys(twice[:5]))}",
                    'give each parameter once, by a name of its own: [("teacher." + n, p) for n, p in …]',
                )
        named.sort(key=rule, reverse=True)  # what is updated alike lies together, in its order; the decayed ones first
        self.lr, self.weight_decay, self.steps = lr, weight_decay, 0
        check_rates(lr, weight_decay, scales.values(), named[0][1].dtype)
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self.spans = list(itertools.pairwise([0, *np.cumsum([p.size for p in self.parameters]).tolist()]))
        self.groups = []
        for (decayed, scale), members in itertools.groupby(zip(named, self.spans, strict=True), lambda m: rule(m[0])):
            spans = [span for _, span in members]
            self.groups.append(Group(spans[0][0], spans[-1][1], decayed, scale))
        first = self.parameters[0].data
        xp = array_module(first)
        with on_device_of(first):
            self.flat = xp.concatenate([p.data.reshape(-1) for p in self.parameters])
            self.grad = xp.zeros_like(self.flat)
            self.state = {slot: xp.zeros_like(self.flat) for slot in self.slots}
        self.updated = [(0, self.flat.size)]  # what the last update changed, as spans of the flat array
        self._lay_out()

    def _lay_out(self) -> None:
        """Make the parameters views of the flat array."""
        self.views = self.split(self.flat)
        for p, view in zip(self.parameters, self.views, strict=True):
            p.data = view

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the views, of which it would make arrays of their own."""
        self._check_views()
        return {name: value for name, value in vars(self).items() if name != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lay_out()

    def split(self, flat: Array) -> list[Array]:
        """Return views of a flat array in the shapes of the parameters."""
        return [flat[a:b].reshape(p.shape) for (a, b), p in zip(self.spans, self.parameters, strict=True)]

    def zero_grad(self) -> None:
        """Forget the parameters' gradients."""
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient by it; the others keep their values and their state."""
        present = [i for i, p in enumerate(self.parameters) if p.grad is not None and p.requires_grad]
        if not present:
            raise GraphError("step(): no parameter has a gradient", "call loss.backward() before it")
        views = self.split(self.grad)
        for i in present:
            views[i][...] = self.parameters[i].grad
        self.update(self.spans_of(present))

    def spans_of(self, places: Iterable[int]) -> list[tuple[int, int]]:
        """Return the spans of some of the parameters, by their places in ``parameters``: as few as can be."""
        spans: list[tuple[int, int]] = []
        for i in sorted(places):
            start, stop = self.spans[i]
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
        return spans

    def update(self, spans: Sequence[tuple[int, int]] = ()) -> None:
        """Update from the flat gradient ``self.grad``: all of it, or the given spans."""
        self.begin_update(spans)
        self.update_spans([(0, self.flat.size)])

    def begin_update(self, spans: Sequence[tuple[int, int]] = ()) -> None:
        """Count an update of the given spans, or of all, which :meth:`update_spans` may then make in shares.

        Raises ConfigError, nothing changed, if a learning rate or weight decay was set that is not finite.
        """
        self._check_views()
        try:
            check_rates(self.lr, self.weight_decay, [g.scale for g in self.groups], self.flat.dtype)
        except ConfigError as error:
            raise ConfigError(f"step {self.steps}: {error.what}", error.remedy) from None
        self.updated = list(spans) or [(0, self.flat.size)]
        self.steps += 1

    def _check_views(self) -> None:
        for name, p, view in zip(self.names, self.parameters, self.views, strict=True):
            if p.data is not view:
                raise GraphError(
                    f"{name}.data was replaced after its optimizer was made: by model.to(…), or by another optimizer",
                    "make the optimizer after model.to(…); change values in place: p.data[...] = values",
                )

    def update_spans(self, spans: Sequence[tuple[int, int]]) -> None:
        """Make the part of the update that lies in the given spans; threads may share them out."""
        spans = overlaps(spans, self.updated)
        for group in self.groups:
            lr, decay = self._rates(group)
            for start, stop in chunks(self.flat, overlaps(spans, [(group.start, group.stop)])):
                piece = slice(start, stop)
                self.update_chunk(
                    self.flat[piece], self.grad[piece], lr, decay, *[s[piece] for s in self.state.values()]
                )

    def _rates(self, group: Group) -> tuple[float, float]:
        """Return the learning rate and the weight decay of a group at this step."""
        return self.lr * group.scale, self.weight_decay if group.decayed else 0.0

    def update_chunk(self, p: Array, g: Array, lr: float, decay: float, *state: Array) -> None:
        """Update the slice ``p`` of the parameters in place by its gradient ``g``, which is not changed."""
        raise NotImplementedError

    # ---- state ----

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return a copy of the state: ``steps``, and an array ``slot/parameter name`` for each slot."""
        state = {"steps": np.asarray(self.steps)}
        for slot, flat in self.state.items():
            host = np.array(to_numpy(flat))
            state |= {f"{slot}/{n}": view for n, view in zip(self.names, self.split(host), strict=True)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`; nothing is changed if it does not fit."""
        steps = np.zeros((), np.int64)
        into = {"steps": steps}
        for slot, flat in self.state.items():
            into |= {f"{slot}/{n}": view for n, view in zip(self.names, self.split(flat), strict=True)}
        load_arrays(into, state, "the optimizer state")
        self.steps = int(steps)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2, as in PyTorch).

    m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², p ← (1 - lr·decay)·p - lr·m̂/(√v̂ + eps), with m̂ = m/(1-β₁ᵗ) and
    v̂ = v/(1-β₂ᵗ). t counts the optimizer's updates, also for a parameter that had no gradient in some of them.
    """

    slots = ("m", "v")

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(named_parameters, lr, weight_decay, lr_scales)
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ConfigError(f"betas={betas}", "each must be in [0, 1); 0.9 and 0.999 are usual")
        if not 0.0 < eps < math.inf:
            raise ConfigError(f"eps={eps}", "it must be positive, or the update would divide by zero; 1e-8 is usual")
        self.betas, self.eps = betas, eps

    def update_chunk(self, p: Array, g: Array, lr: float, decay: float, *state: Array) -> None:
        """Update one slice."""
        m, v = state
        b1, b2 = self.betas
        xp = array_module(p)
        t = xp.multiply(g, 1.0 - b1)  # the only memory that is taken: if there is none, nothing has changed yet
        m *= b1
        m += t
        v *= b2
        xp.multiply(g, g, out=t)
        t *= 1.0 - b2
        v += t
        xp.sqrt(v, out=t)
        t *= (1.0 - b2**self.steps) ** -0.5
        t += self.eps
        xp.divide(m, t, out=t)
        t *= lr / (1.0 - b1**self.steps)
        if decay:
            p *= 1.0 - lr * decay
        p -= t


class Muon(AdamW):
    """Momentum made orthogonal for the matrices of the blocks, AdamW for all the rest (Jordan et al. 2024, "Muon").

    For a matrix of n × k: b ← momentum·b + (1-momentum)·g, u = momentum·b + (1-momentum)·g (Nesterov's), and
    p ← (1 - lr·decay)·p - lr·0.2·√max(n, k)·O, where O is ``u`` with all its singular values near 1, see
    :func:`orthogonalized`. So a step goes equally far in every direction of the gradient, and not mostly in the few
    that are largest. The factor gives the step the size of AdamW's: both take one ``lr`` and one decay (Liu et al.
    2025, arXiv 2502.16982, section 2.2). Queries, keys and values are three matrices, though they are kept as one.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(named_parameters, lr, betas, eps, weight_decay, lr_scales)
        self.momentum = check_momentum(momentum)
        self.matrices = []  # (start, stop, shape) in the flat array
        for name, p, (start, stop) in zip(self.names, self.parameters, self.spans, strict=True):
            if "blocks" in name.split(".") and p.ndim == 2:
                count = 3 if name.endswith("qkv.weight") else 1
                self.matrices.append((start, stop, (count, p.shape[0] // count, p.shape[1])))

    def update_spans(self, spans: Sequence[tuple[int, int]]) -> None:
        """Update the given spans of the flat parameters; a matrix is updated as a whole, with the span it begins in."""
        for start, stop in overlaps(spans, self.updated):
            place, between = start, []
            for a, b, shape in self.matrices:
                if a < stop and b > start:
                    between.append((place, max(place, a)))
                    place = min(b, stop)
                    if a >= start:
                        self._update_matrices(slice(a, b), shape)
            super().update_spans([*between, (place, stop)])

    def _update_matrices(self, piece: slice, shape: tuple[int, int, int]) -> None:
        group = next(g for g in self.groups if g.start <= piece.start < g.stop)
        lr, decay = self._rates(group)
        p, g, b = (flat[piece].reshape(shape) for flat in (self.flat, self.grad, self.state["m"]))
        g = g * (1.0 - self.momentum)
        after = b * self.momentum + g
        u = orthogonalized(after * self.momentum + g)
        u *= lr * 0.2 * math.sqrt(max(shape[1:]))
        b[...] = after  # only now: if there was no memory for all this, nothing has changed yet
        if decay:
            p *= 1.0 - lr * decay
        p -= u


class SGD(Optimizer):
    """Gradient descent with momentum (Sutskever et al. 2013, as in PyTorch): b ← momentum·b + g, p ← p - lr·b.

    Weight decay is coupled: g ← g + decay·p.
    """

    slots = ("momentum",)

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Parameter]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        lr_scales: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(named_parameters, lr, weight_decay, lr_scales)
        self.momentum = check_momentum(momentum)

    def update_chunk(self, p: Array, g: Array, lr: float, decay: float, *state: Array) -> None:
        """Update one slice."""
        (b,) = state
        xp = array_module(p)
        t = xp.multiply(p, decay)  # first, as in AdamW
        b *= self.momentum
        b += g
        if decay:
            b += t
        xp.multiply(b, lr, out=t)
        p -= t


def orthogonalized(x: Array) -> Array:
    """Return matrices (…, n, k) with the singular vectors that ``x`` has, and singular values near 1 (0.7 to 1.2).

    Five steps of a Newton-Schulz iteration with the odd polynomial of Jordan et al. 2024, "Muon", each of which makes
    small singular values 3.4 times as large: what is below 1/500 of the Frobenius norm stays under 0.7, and 0 stays 0.
    """
    xp = array_module(x)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x  # the products below are of the shorter side
    x = x / (xp.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(5):
        a = x @ x.swapaxes(-1, -2)  # (…, n, n)
        x = 3.4445 * x + (2.0315 * (a @ a) - 4.7750 * a) @ x
    return x.swapaxes(-1, -2) if tall else x


def check_rates(lr: Any, weight_decay: Any, scales: Iterable[float], dtype: Any) -> None:
    """Raise ConfigError unless both are finite numbers from 0 on, also in the parameters' dtype and scaled."""
    most = float(np.finfo(dtype).max)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        is_number = isinstance(value, Real)
        if not (is_number and 0.0 <= value <= most):  # NaN compares with nothing
            raise ConfigError(
                f"{name}={value!r}", "it must be finite and at least 0: look at what sets it, such as a schedule"
            )
    if (scale := max(scales)) * lr * max(1.0, weight_decay) > most:
        raise ConfigError(f"lr={lr}, scaled by {scale}, and weight_decay={weight_decay}", "together they overflow")


def overlaps(spans: Iterable[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what each of the spans has in common with each of the others, in their order."""
    common = ((max(start, a), min(stop, b)) for start, stop in spans for a, b in others)
    return [(start, stop) for start, stop in common if start < stop]


def check_momentum(momentum: float) -> float:
    """Return ``momentum``; raise ConfigError for one that is no share of what was."""
    if not 0.0 <= momentum < 1.0:
        raise ConfigError(f"momentum={momentum}", "it must be in [0, 1); 0.9 is usual, for Muon 0.95")
    return momentum


def chunks(array: Array, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the given spans of a flat array in pieces (start, stop) to work on at a time."""
    size = CHUNK if device_of(array) == "cpu" else array.size
    for start, stop in spans:
        for a in range(start, stop, size):
            yield a, min(a + size, stop)


def load_arrays(into: Mapping[str, Array], state: Mapping[str, Any], what: str) -> None:
    """Copy ``state`` into the arrays of the same names; raise CheckpointError, nothing changed, if it does not fit."""
    wrong = [k for k, a in into.items() if k not in state or tuple(np.shape(state[k])) != a.shape]
    wrong += [k for k in state if k not in into]
    if wrong:
        raise CheckpointError(
            f"{what} does not fit: missing, unknown or misshapen: {', '.join(wrong[:5])}",
            "resume with the model and the optimizer that it was saved with",
        )
    for k, a in into.items():
        a[...] = to_device(np.asarray(state[k], a.dtype), device_of(a))


def gradient_norm(arrays: Iterable[Array]) -> Array:
    """Return the Euclidean norm over all arrays together, as a 0-d array on their device."""
    total: Any = 0.0
    for a in arrays:
        flat = a.reshape(-1)
        total = total + flat @ flat
    return array_module(total).sqrt(total)


def clip_grad_norm(parameters: Iterable[Parameter], max_norm: float) -> float:
    """Scale all gradients together so that their norm is at most ``max_norm``; return the norm they had.

    Parameters that do not require a gradient, and are therefore not updated, do not count. Raises ConfigError for a
    ``max_norm`` that is not positive.
    """
    check_clip_norm(max_norm)
    grads = [p.grad for p in parameters if p.grad is not None and p.requires_grad]
    if not grads:
        return 0.0
    norm = float(gradient_norm(grads))
    scale_to_norm(grads, norm, max_norm)
    return norm


def check_clip_norm(norm: Any) -> None:
    """Raise ConfigError unless ``norm`` is a positive number: a negative one would turn the gradient round."""
    if not (isinstance(norm, int | float | np.number) and norm > 0):
        raise ConfigError(
            f"a gradient norm of at most {norm!r}", "give a positive number; for TrainStep, None clips nothing"
        )


def scale_to_norm(arrays: Iterable[Array], norm: float, max_norm: float) -> None:
    """Scale arrays, whose norm together is ``norm``, in place to ``max_norm`` if that is smaller."""
    if norm > max_norm:
        for a in arrays:
            a *= max_norm / (norm + 1e-6)
