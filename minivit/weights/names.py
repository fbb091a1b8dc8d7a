"""What other systems call a Vision Transformer's arrays, and how their numbers lie: one table of rows for each layout.

A row pairs one of minivit's parameters, which bear timm's names, with the arrays that another system keeps it in, and
goes both ways: ``read`` turns theirs into ours, ``write`` ours into theirs, bit for bit.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minivit.backend.outline import stretched
from minivit.errors import value_text
from minivit.nn import init
from minivit.weights.stored import Entry


class Sizes(NamedTuple):
    """What a row must know to turn an array, beyond its shape."""

    heads: int = 1
    patch: tuple[int, int] = (1, 1)


class Form(NamedTuple):
    """How an array lies: ``read(theirs, sizes)`` gives ours, ``write(ours, sizes)`` theirs; both are views."""

    read: Callable[[np.ndarray, Sizes], np.ndarray]
    write: Callable[[np.ndarray, Sizes], np.ndarray]


SAME = Form(lambda a, s: a, lambda a, s: a)
KERNEL = Form(lambda a, s: a.T, lambda a, s: a.T)  # (in, out) ↔ (out, in)
HEADS_IN = Form(  # (D, H, d) ↔ (H·d, D)
    lambda a, s: a.reshape(a.shape[0], -1).T,
    lambda a, s: a.T.reshape(a.shape[1], s.heads, -1),
)
HEADS_BIAS = Form(lambda a, s: a.reshape(-1), lambda a, s: a.reshape(s.heads, -1))  # (H, d) ↔ (H·d)
HEADS_OUT = Form(  # (H, d, D) ↔ (D, H·d)
    lambda a, s: a.reshape(-1, a.shape[-1]).T,
    lambda a, s: a.T.reshape(s.heads, -1, a.shape[0]),
)
PATCH_LAST = Form(  # (P, Q, C, D) ↔ (D, C, P, Q)
    lambda a, s: a.transpose(3, 2, 0, 1),
    lambda a, s: a.transpose(2, 3, 1, 0),
)
PATCH_FLAT = Form(  # (D, P·Q·C) ↔ (D, C, P, Q)
    lambda a, s: a.reshape(a.shape[0], *s.patch, -1).transpose(0, 3, 1, 2),
    lambda a, s: a.transpose(0, 2, 3, 1).reshape(a.shape[0], -1),
)
PATCH_VECTOR = Form(  # (P·Q·C) ↔ (C·P·Q)
    lambda a, s: a.reshape(*s.patch, -1).transpose(2, 0, 1).reshape(-1),
    lambda a, s: a.reshape(-1, *s.patch).transpose(1, 2, 0).reshape(-1),
)


@dataclass(frozen=True)
class Row:
    """Our parameter, and their arrays: more than one lie under each other along our first axis, in this order.

    ``{i}`` in a name is the number of the block, ``{c}`` that of a convolution that makes tokens; ``{s}`` and ``{u}``
    are those of a stage of a ResNet and of a bottleneck in it, which ``{s+1}`` and ``{u+1}`` count from 1.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME

    def at(self, numbers: Mapping[str, str]) -> Row:
        """Return the row of the block with these numbers, by their letters."""

        def filled(name: str) -> str:
            for letter, n in numbers.items():
                name = name.replace(f"{{{letter}}}", n).replace(f"{{{letter}+1}}", str(int(n) + 1))
            return name

        return Row(filled(self.ours), tuple(map(filled, self.theirs)), self.form)

    def written(self, array: np.ndarray, sizes: Sizes) -> dict[str, np.ndarray]:
        """Return our array as theirs, by their names: views where that can be."""
        parts = np.split(array, len(self.theirs)) if len(self.theirs) > 1 else [array]
        return {name: self.form.write(part, sizes) for name, part in zip(self.theirs, parts, strict=True)}

    def shapes(self, shape: tuple[int, ...], sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Return the shapes of their arrays for our ``shape``; {} if it cannot be divided among them."""
        try:
            return {name: a.shape for name, a in self.written(stretched(shape), sizes).items()}
        except ValueError:
            return {}

    def read(self, entries: Mapping[str, Entry], out: np.ndarray, sizes: Sizes) -> None:
        """Read their arrays into ``out``, of our shape, one after the other."""
        shapes = self.shapes(out.shape, sizes)
        parts = np.split(out, len(self.theirs)) if len(self.theirs) > 1 else [out]
        for name, part in zip(self.theirs, parts, strict=True):
            part[...] = self.form.read(entries[name].read().reshape(shapes[name]), sizes)


def collected(named: Iterable[tuple[str, Entry]]) -> dict[str, Entry]:
    """Return entries by their names in a layout; ValueError where a file has one array twice, under two names."""
    out: dict[str, Entry] = {}
    for name, entry in named:
        if name in out:
            raise ValueError(f"{value_text(out[name].name)} and {value_text(entry.name)} are the same array")
        out[name] = entry
    return out


def rows(table: str, **forms: Form) -> tuple[Row, ...]:
    """Return the rows of a table in text: ours, theirs (one, or more with commas between), and a form's name if any."""
    found = []
    for line in table.strip().splitlines():
        ours, theirs, *form = line.split()
        found.append(Row(ours, tuple(theirs.split(",")), forms[form[0]] if form else SAME))
    return tuple(found)


_NUMBERED = re.compile(
    r"^blocks\.(?P<i>\d+)\.|^patch_embed\.convs\.(?P<c>\d+)\."
    r"|^patch_embed\.backbone\.stages\.(?P<s>\d+)\.blocks\.(?P<u>\d+)\."
)


def numbers_of(ours: str) -> dict[str, str]:
    """Return the numbers in the name of one of our parameters by their letters, as :class:`Row` has them."""
    match = _NUMBERED.match(ours)
    return {} if match is None else {letter: n for letter, n in match.groupdict().items() if n is not None}


def general_name(ours: str) -> str:
    """Return the name of one of our parameters with letters for the numbers of its block."""
    match = _NUMBERED.match(ours)
    for letter in reversed(numbers_of(ours)):  # the last first, so that the places of the others stay
        assert match is not None
        ours = f"{ours[: match.start(letter)]}{{{letter}}}{ours[match.end(letter) :]}"
    return ours


_WRAPPED = re.compile(r"((state_dict_ema|state_dict|model_ema|model|module)[./])*")


def unwrapped(found: Mapping[str, Entry], marks: Iterable[str]) -> dict[str, Entry] | None:
    """Return the entries without the words that training's wrappers put before names; None for another layout.

    ``marks`` are names of which the layout has one. Of a model and its moving average (``state_dict_ema``) it is that;
    what lies beside them is left out.
    """
    prefixes = {name.removesuffix(mark) for mark in marks for name in found if name.endswith(mark)}
    prefixes = {prefix for prefix in prefixes if _WRAPPED.fullmatch(prefix)}
    if not prefixes:
        return None
    best = min(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix)))
    return collected((name.removeprefix(best), entry) for name, entry in found.items() if name.startswith(best))


def layers_of(entries: Mapping[str, Entry], name: str) -> int:
    """Return how many numbers, from 0 on, put into ``name`` make one that is there."""
    return next(i for i in itertools.count() if name.format(i) not in entries)


def shape_of(entries: Mapping[str, Entry], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of an array; ValueError where it is not there, or has not so many axes or one of length 0."""
    shape = entries[name].shape if name in entries else None
    if shape is None or len(shape) != axes or not math.prod(shape):
        raise ValueError(f"it has no {name}" if shape is None else f"its {name} is of shape {shape}")
    return shape


def position_of(entries: Mapping[str, Entry], name: str) -> str:
    """Return which positions a file has: "sincos_1d" where they are those numbers, to rounding, "learned", "none"."""
    entry = entries.get(name)
    if entry is None:
        return "none"
    if len(entry.shape) != 3 or entry.shape[0] != 1 or entry.shape[2] % 2 or not 0 < math.prod(entry.shape) < 1 << 26:
        return "learned"
    try:
        differ = np.abs(entry.read()[0] - init.sincos_1d(*entry.shape[1:])).max()
    except ValueError:  # of no numbers that weights are made of: told where all are read
        return "learned"
    return "sincos_1d" if differ < (5e-3 if entry.is_half else 1e-4) else "learned"


@dataclass(frozen=True)
class Layout:
    """A system's way to keep a ViT.

    ``name`` is the system's. ``entries_of`` returns the entries of a file under the names of ``rows``, or None if they
    are not of this layout. ``settings_of(entries, config)`` returns what the layout, and a config.json beside the file,
    say of the model's settings beyond the shapes, and ``data_of`` of its images and classes. ``passed`` are the
    beginnings of names that no ViT for classification has a use for: they are left out. ``lacking`` says in words what
    a name stands for, found in it, that is not in ``rows``. Our parameters in ``zero`` are 0 where a file has none.

    ``kind`` is the kind of the models. ``sizes_of(entries)`` returns the sizes that shapes say of a model that is no
    ViT of patches, or raises ValueError. Where ``named``, what a file does not say of its model, a model's name does.
    """

    name: str
    rows: tuple[Row, ...]
    entries_of: Callable[[Mapping[str, Entry]], dict[str, Entry] | None]
    settings_of: Callable[[Mapping[str, Entry], Mapping[str, Any]], dict[str, Any]]
    data_of: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    passed: tuple[str, ...] = ()
    lacking: Mapping[str, str] = field(default_factory=dict)
    zero: tuple[str, ...] = ()
    kind: str = "vit"
    sizes_of: Callable[[Mapping[str, Entry]], dict[str, Any]] | None = None
    named: bool = False

    def row(self, ours: str) -> Row | None:
        """Return the row of one of our parameters, or None if this layout has no place for it."""
        if not self.rows:  # the names are ours
            return Row(ours, (ours,))
        general = general_name(ours)
        row = next((row for row in self.rows if row.ours == general), None)
        return row if row is None else row.at(numbers_of(ours))

    def written(self, state: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
        """Return our arrays under this layout's names, turned as it has them; KeyError for one it has no place for."""
        out: dict[str, np.ndarray] = {}
        for name, array in state.items():
            row = self.row(name)
            if row is None:
                raise KeyError(name)
            out |= row.written(array, sizes)
        return out
