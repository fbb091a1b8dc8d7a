"""The parameters that are trained, as one flat array, of which each ``parameter.data`` becomes a view.

So an update is a few passes over long arrays instead of a few calls for each of a hundred small ones; gradients are
added, clipped and averaged in one piece; and whatever is kept for each number (a moment, an average) has the same
layout. Optimizers, averages and clipping work on such a store, and none of them owns it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.autograd.tensor import Tensor
from minivit.backend import Array, array_module, device_of, is_bfloat16, on_device_of, to_device
from minivit.backend.planning import is_on_gpu
from minivit.errors import CheckpointError, ConfigError, GraphError
from minivit.nn.module import Parameter

CHUNK = 1 << 16  # numbers worked on at a time on a CPU: few enough for the cache, enough to be worth a call
ALIGNMENT = 64  # on a GPU a parameter begins at a multiple of so many numbers, as kernels and cuBLASLt read them best

Span = tuple[int, int]
"""A stretch (start, stop) of a flat array."""


class Group(NamedTuple):
    """A stretch of the flat parameters that is updated alike."""

    start: int
    stop: int
    decayed: bool
    scale: float  # on the learning rate


class FlatParameters:
    """Parameters laid out one after the other in ``values``, and their gradients in ``grad`` alike.

    Parameters that do not require a gradient are left out. What is updated alike lies together, a :class:`Group`: the
    decayed ones first, then by falling factor on the learning rate, else in the order given. ``spans`` holds each
    parameter's place, in the order of ``names`` and ``parameters``. ``lr_scales`` are the factors by name, 1 where
    there is none: :func:`layer_scales` makes such.

    On a GPU each parameter begins at a multiple of ``ALIGNMENT``. The numbers between two of them are 0 in the values,
    as in all that is laid out alike, and belong to the group that they lie in: it is one stretch all the same.

    ``steps`` counts the updates made, and ``updated`` has the spans that the last one changed: see
    :meth:`begin_update`. ``numbers`` is None but while an update is made by numbers that lie on the GPU: see
    :class:`~minivit.train.numbers.DeviceNumbers`. Move or convert a model before it is laid out, not after.

    Raises ConfigError for parameters or factors that cannot be used.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, Parameter]], lr_scales: Mapping[str, float] | None = None
    ) -> None:
        given = checked_pairs(named_parameters)
        named = [(n, p) for n, p in given if p.requires_grad]
        _check_parameters(named)
        scales = _checked_scales([n for n, _ in given], lr_scales or {})

        def rule(item: tuple[str, Parameter]) -> tuple[bool, float]:
            return traits(item[1]).decays, scales[item[0]]

        named.sort(key=rule, reverse=True)
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        first = self.parameters[0].data
        self.alignment = ALIGNMENT if is_on_gpu(first) else 1
        # where each begins, and at last where the values end
        self.starts = [0, *itertools.accumulate(self.aligned(p.size) for p in self.parameters)]
        ends = (start + p.size for start, p in zip(self.starts, self.parameters, strict=False))
        self.spans: list[Span] = list(zip(self.starts, ends, strict=False))
        self.groups: list[Group] = []
        for (decayed, scale), members in itertools.groupby(zip(named, self.spans, strict=True), lambda m: rule(m[0])):
            spans = [span for _, span in members]
            self.groups.append(Group(spans[0][0], self.aligned(spans[-1][1]), decayed, scale))
        with on_device_of(first):
            self.values = array_module(first).zeros(self.starts[-1], first.dtype)
            for p, view in zip(self.parameters, self.split(self.values), strict=True):
                view[...] = p.data
        self.grad = self.zeros()
        self.steps = 0
        self.numbers: Any = None
        self.updated: list[Span] = [(0, self.values.size)]
        self._lay_out()

    def aligned(self, place: int) -> int:
        """Return the first place from ``place`` on at which a parameter may begin."""
        return -(-place // self.alignment) * self.alignment

    def _lay_out(self) -> None:
        """Make the parameters views of the flat values."""
        self.views = self.split(self.values)
        for p, view in zip(self.parameters, self.views, strict=True):
            p.data = view

    def rebase(self, values: Array, grad: Array | None = None) -> None:
        """Have the values, and the gradient if one is given, in these arrays from now on, as they are."""
        self.check_views()
        self.values, self.grad = values, self.grad if grad is None else grad
        self._lay_out()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the views, of which it would make arrays of their own."""
        self.check_views()
        return {name: value for name, value in vars(self).items() if name != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lay_out()

    def zeros(self) -> Array:
        """Return zeros laid out as the values are."""
        with on_device_of(self.values):
            return array_module(self.values).zeros_like(self.values)

    def split(self, flat: Array) -> list[Array]:
        """Return views of a flat array in the shapes of the parameters."""
        return [flat[a:b].reshape(p.shape) for (a, b), p in zip(self.spans, self.parameters, strict=True)]

    def by_name(self, flat: Array) -> dict[str, Array]:
        """Return the views of a flat array by the parameters' names."""
        return dict(zip(self.names, self.split(flat), strict=True))

    def spans_of(self, places: Iterable[int]) -> list[Span]:
        """Return the spans of some of the parameters, by their places in ``parameters``: as few as can be.

        What lies between a parameter and the next counts as its own.
        """
        spans: list[Span] = []
        for i in sorted(places):
            start, stop = self.starts[i], self.starts[i + 1]
            if spans and spans[-1][1] == start:
                start = spans.pop()[0]
            spans.append((start, stop))
        return spans

    def learned_before(self, place: int) -> int:
        """Return how many of the parameters' own numbers lie before a place: the same on every device."""
        return sum(stop - start for start, stop in self.spans if start < place)

    def gather(self) -> list[Span]:
        """Copy the parameters' own gradients, as ``backward`` leaves them, into ``grad``; return which have one.

        Raises GraphError if none has.
        """
        present = [i for i, p in enumerate(self.parameters) if p.grad is not None and p.requires_grad]
        if not present:
            raise GraphError("step(): no parameter has a gradient", "call loss.backward() before it")
        views = self.split(self.grad)
        for i in present:
            views[i][...] = self.parameters[i].grad
        return self.spans_of(present)

    def begin_update(self, spans: Sequence[Span] = ()) -> None:
        """Count an update of the given spans, or of all; whoever makes it calls this before it changes a value.

        One that is made by ``numbers`` is counted by them.

        Raises GraphError, nothing changed, if a parameter's array is no longer the view that it was made.
        """
        self.check_views()
        self.updated = list(spans) or [(0, self.values.size)]
        if self.numbers is None:
            self.steps += 1

    @property
    def count(self) -> Any:
        """The number of the present update: ``steps``, or what counts them on the GPU, a 0-d float64 array."""
        return self.steps if self.numbers is None else self.numbers.count

    def check_views(self) -> None:
        """Raise GraphError if a parameter's array is no longer its view of the values."""
        for name, p, view in zip(self.names, self.parameters, self.views, strict=True):
            if p.data is not view:
                raise GraphError(
                    f"{name}.data was replaced after its optimizer was made: by model.to(…), or by another optimizer",
                    "make the optimizer after model.to(…); change values in place: p.data[...] = values",
                )


class LaidOut:
    """A flat array ``flat`` beside a store's values, and its ``views`` in the shapes of the store's parameters."""

    def __init__(self, store: FlatParameters, flat: Array) -> None:
        self.store, self.flat, self.views = store, flat, store.split(flat)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the views, of which it would make arrays of their own."""
        return {name: value for name, value in vars(self).items() if name != "views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.views = self.store.split(self.flat)


def layer_scales(named_parameters: Iterable[tuple[str, Parameter]], decay: float) -> dict[str, float]:
    """Return a factor on the learning rate for each parameter of a model, by its name: ``decay``^(last - layer).

    Layer-wise decay (Clark et al. 2020, "ELECTRA", appendix B; Bao et al. 2021, "BEiT"): what a pre-trained model has
    learned first, and shares most with other data, changes least. ``last`` is the highest ``layer`` among the given
    parameters, so give all of a model's; one that belongs to no layer has 1. In a ViT of L blocks that is 1 for the
    head and the final norm, ``decay``^(L - i) for block i = 0 …, ``decay``^(L + 1) for patch embedding, class token and
    positions. 0.65 to 0.9 is usual; 0 trains the last layer alone.

    Raises ConfigError for a ``decay`` outside [0, 1], and if no parameter says which layer it belongs to.
    """
    if not 0.0 <= decay <= 1.0:
        raise ConfigError(f"a layer decay of {decay}", "it must be in [0, 1]; 0.75 is usual, 1 is none")
    layers = {name: traits(p).layer for name, p in checked_pairs(named_parameters)}
    last = max((layer for layer in layers.values() if layer is not None), default=None)
    if last is None:
        raise ConfigError(
            "layer-wise rates need layers, and no parameter says which it belongs to",
            "set parameter.layer, from 0 at the input on, where the model makes them",
        )
    return {name: decay ** (0 if layer is None else last - layer) for name, layer in layers.items()}


def checked_pairs(named_parameters: Iterable[tuple[str, Parameter]]) -> list[tuple[str, Parameter]]:
    """Return pairs (name, parameter) as a list; raise ConfigError for anything else."""
    given = list(named_parameters)
    for item in given:
        if not isinstance(item, tuple):
            what = f"the optimizer got a {type(item).__name__}, not a pair (name, parameter)"
            raise ConfigError(what, "pass model.named_parameters()")
        if not isinstance(item[1], Tensor):
            what = f"{item[0]!r} is a {type(item[1]).__name__}, not a Parameter"
            raise ConfigError(what, "make it one: mv.nn.Parameter(array)")
    return given


class Traits(NamedTuple):
    """What a :class:`~minivit.nn.module.Parameter` says of itself."""

    decays: bool
    layer: int | None
    matrices: int


def traits(p: Tensor) -> Traits:
    """Return what a parameter says of itself; a Tensor that is no Parameter counts as one that was told nothing."""
    if isinstance(p, Parameter):
        return Traits(p.decays, p.layer, p.matrices)
    return Traits(decays=p.ndim > 1, layer=None, matrices=0)


def _check_parameters(named: Sequence[tuple[str, Parameter]]) -> None:
    """Raise ConfigError unless there are some, each once, of one dtype and device."""
    if not named:
        raise ConfigError("the optimizer got no parameter that requires a gradient", "pass named_parameters()")
    kinds = {(str(p.dtype), p.device) for _, p in named}
    if any(is_bfloat16(p.dtype) for _, p in named):
        what = "parameters of bfloat16, in which a small step is rounded away"
        raise ConfigError(what, "keep them float32, and train in bfloat16: its working copy of them is made")
    if len(kinds) > 1:
        raise ConfigError(f"parameters of several kinds: {sorted(kinds)}", "convert the whole model: model.to(…)")
    for kind, values in (("name", [n for n, _ in named]), ("parameter", [str(id(p)) for _, p in named])):
        if twice := [n for (n, _), value in zip(named, values, strict=True) if values.count(value) > 1]:
            raise ConfigError(
                f"the optimizer got the same {kind} twice: {', '.join(dict.fromkeys(twice[:5]))}",
                'give each parameter once, by a name of its own: [("teacher." + n, p) for n, p in …]',
            )


def _checked_scales(names: Sequence[str], lr_scales: Mapping[str, float]) -> dict[str, float]:
    """Return a factor for every name, 1 where none is given; raise ConfigError for one that cannot be meant."""
    scales = dict.fromkeys(names, 1.0) | {n: float(scale) for n, scale in lr_scales.items()}
    if unknown := scales.keys() - set(names):
        raise ConfigError(f"lr_scales for unknown parameters: {', '.join(sorted(unknown)[:5])}", "see opt.names")
    if not all(0.0 <= scale < math.inf for scale in scales.values()):
        raise ConfigError(f"lr_scales={lr_scales}", "each must be finite and at least 0")
    return scales


def overlaps(spans: Iterable[Span], others: Sequence[Span]) -> list[Span]:
    """Return what each of the spans has in common with each of the others, in their order."""
    common = ((max(start, a), min(stop, b)) for start, stop in spans for a, b in others)
    return [(start, stop) for start, stop in common if start < stop]


def chunks(array: Array, spans: Iterable[Span]) -> Iterator[Span]:
    """Yield the given spans of a flat array in pieces (start, stop) to work on at a time."""
    size = array.size if is_on_gpu(array) else CHUNK
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
        with on_device_of(a):
            a[...] = to_device(np.asarray(state[k], a.dtype), device_of(a))
