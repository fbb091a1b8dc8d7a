"""Sums over columns in a fixed order: what a bias, or a LayerNorm's weight, gets from the rows of a cotangent.

A kernel that writes (rows, n) numbers adds their columns up on its way: each of ROWS programs its own rows, into its
own row of a (ROWS, n) array of partial sums. No atomic operation is in it, so equal inputs give equal bits; and ROWS is
the same on every GPU. What remains, a sum of ROWS rows for each of a hundred parameters, is done in one launch for all
of them when a step's backward pass is over: see :func:`collecting`.

Who writes rows gets the place for their partial sums from :func:`scratch`, fills all of it, and says of which array
they are, if of one, by :func:`note`; :func:`partial` does both. Who needs column sums asks :func:`of` for partial ones.
Either returns ``deliver(partials, need, dtype)`` from its gradient, where ``partials`` may be some of the columns.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minivit.autograd.needs import Slot
from minivit.backend import Array, address_of, array_module, tile
from minivit.ops.cuda.rows import as_rows, serves

ROWS = 256  # partial sums of a column: about two programs for each multiprocessor of an H200, the same on every GPU
_APART = 64  # columns from which each array of partial sums starts at a multiple: aligned, however wide the others are
_FLOAT32 = np.dtype(np.float32)
_COLUMNS = tile.Kernel("sums", "columns")
_SETTLE = tile.Kernel("sums", "settle")
_COLUMN_TILE: dict[str, Any] = {"rows": ROWS, "R": 16, "W": 128}
_SETTLE_TILE: dict[str, Any] = {"rows": ROWS, "R": 64, "W": _APART}


class _Route(NamedTuple):
    """Where a sum comes from, and where it goes."""

    start: int  # its first column in the arena
    n: int
    place: int  # its first element in the flat gradient
    filled: bool  # it is added to what is there


class Arena:
    """The partial sums of a step, side by side in one (ROWS, width) array, and where in a flat gradient they belong.

    One for each flat gradient, float32; threads do not share one. It takes its memory at the end of the first
    collection, when it is known how much that is. A later one that delivers the same takes no memory and copies nothing
    from the host, so a CUDA graph may record it; whoever records keeps the arena as long as the graph.
    """

    def __init__(self, flat: Array) -> None:
        self.flat = flat
        self.rows: Any = None  # float32 (ROWS, width)
        self._indices: dict[tuple[_Route, ...], Array] = {}
        self.clear()

    def clear(self) -> None:
        """Forget what was collected; the memory stays."""
        self._width = 0  # columns that are taken
        self._taken: list[tuple[Array, int]] = []  # partial sums, and their first column
        self._noted: dict[int, tuple[weakref.ref, Array]] = {}  # id of an array → itself, its partial sums
        self._due: list[tuple[int, int, Slot]] = []  # first column, first element in the flat gradient, whose it is

    def take(self, n: int) -> Array:
        """Return the next n columns, float32 (ROWS, n): beside the arena where it is too small as yet."""
        start = self._width
        width = -(-n // _APART) * _APART
        self._width += width
        if self.rows is not None and self._width <= self.rows.shape[1]:
            partials = self.rows[:, start : start + n]  # (ROWS, width) → (ROWS, n)
        else:
            partials = _fresh(self.flat, n)
        self._taken.append((partials, start))
        return partials

    def note(self, array: Array, partials: Array) -> None:
        """Remember the partial sums of an array's columns, as long as that very array is there."""
        self._noted[id(array)] = weakref.ref(array), partials

    def noted(self, array: Array) -> Array | None:
        """Return the partial sums of an array's columns that were noted."""
        of, partials = self._noted.get(id(array), (None, None))
        return partials if of is not None and of() is array else None  # else another array has got its number

    def defer(self, partials: Array, slot: Slot) -> bool:
        """Note that a slot is due the sum of some of the arena's columns; False if they, or it, lie elsewhere.

        Until it is made the slot counts as it did: who writes another part into it before does not add to nothing.
        """
        column, into = self._column(partials), slot.array
        offset = address_of(into) - address_of(self.flat)
        inside = 0 <= offset <= self.flat.nbytes - into.nbytes and into.size == partials.shape[1]
        if column is None or not (inside and into.dtype == self.flat.dtype == _FLOAT32):
            return False
        self._due.append((column, offset // _FLOAT32.itemsize, slot))
        return True

    def _column(self, partials: Array) -> int | None:
        """Return the first column of partial sums, some or all that were taken together; None if they were not."""
        if partials.shape[0] != ROWS:
            return None
        address = address_of(partials)
        for taken, start in reversed(self._taken):  # most are delivered soon after they were taken
            column = (address - address_of(taken)) // _FLOAT32.itemsize
            if 0 <= column <= taken.shape[1] - partials.shape[1]:
                return start + column
        return None

    def settle(self) -> None:
        """Sum all that is due into the flat gradient: one launch, and one more for what was delivered twice."""
        if self._due and (self.rows is None or self.rows.shape[1] < self._width):
            self._grow()
        while self._due:
            due: dict[int, tuple[int, int, Slot]] = {}  # each slot once
            again = [entry for entry in self._due if due.setdefault(id(entry[2]), entry) is not entry]
            self._make(tuple(_Route(start, slot.array.size, place, slot.filled) for start, place, slot in due.values()))
            for _, _, slot in due.values():
                slot.done()
            self._due = again

    def _make(self, routes: tuple[_Route, ...]) -> None:
        """Sum the arena's columns into the flat gradient."""
        if _SETTLE.ready(self.rows, self._index(routes), self.flat, **_SETTLE_TILE):
            _SETTLE(self.rows.shape[1] // _APART, self.rows, self._index(routes), self.flat, **_SETTLE_TILE)
            return
        for start, n, place, filled in routes:
            total, into = self.rows[:, start : start + n].sum(axis=0), self.flat[place : place + n]  # (ROWS, n) → (n,)
            into[...] = total + into if filled else total

    def _grow(self) -> None:
        """Take the memory for as many columns as were asked for, and bring in what lies beside it."""
        rows = array_module(self.flat).empty((ROWS, self._width), np.float32)
        for partials, start in self._taken:
            rows[:, start : start + partials.shape[1]] = partials
        self.rows = rows
        self._indices.clear()

    def _index(self, routes: tuple[_Route, ...]) -> Array:
        """Return, int32 (2, width), to which element of the flat gradient a column's sum goes, and which is added.

        -1 where there is none. Made once for each layout.
        """
        if routes not in self._indices:
            index = np.full((2, self.rows.shape[1]), -1, np.int32)
            for start, n, place, filled in routes:
                index[: 1 + filled, start : start + n] = np.arange(place, place + n)
            self._indices[routes] = array_module(self.flat).asarray(index)
        return self._indices[routes]


class _Here(threading.local):
    arena: Arena | None = None


_here = _Here()


@contextlib.contextmanager
def collecting(arena: Arena) -> Iterator[None]:
    """Put off the sums of this block's partial sums, and make them all at its end, in this thread.

    Around the forward and the backward pass of a micro-batch whose slots are views of the arena's flat gradient.
    """
    before, _here.arena = _here.arena, arena
    try:
        yield
        arena.settle()
    finally:
        _here.arena = before
        arena.clear()


def _fresh(like: Array, n: int) -> Array:
    """Return (ROWS, n) numbers laid out as in an arena where ``like`` is, so that one kernel writes to both."""
    width = -(-n // _APART) * _APART
    return array_module(like).empty((ROWS, width), np.float32)[:, :n]


def scratch(array: Array, n: int) -> Array:
    """Return a place for partial sums of n columns, float32 (ROWS, n), where ``array`` is; all is to be written."""
    if _here.arena is not None:
        return _here.arena.take(n)
    return _fresh(array, n)


def note(array: Array, partials: Array) -> None:
    """Remember the partial sums of the columns of ``array`` (…, n), as long as the array is there, for :func:`of`."""
    if _here.arena is not None:
        _here.arena.note(array, partials)


def partial(array: Array, n: int) -> Array:
    """Return a place as :func:`scratch` does, noted as that of the partial sums of ``array`` (…, n)."""
    partials = scratch(array, n)
    note(array, partials)
    return partials


def of(g: Array) -> Array:
    """Return partial sums of the columns of g (…, n): a few rows, (ROWS, n) if kernels run, whose sum they are.

    Those noted when this very array was written, else made by a pass over it. float32, of float64 data float64.
    """
    if _here.arena is not None and (partials := _here.arena.noted(g)) is not None:
        return partials
    rows = as_rows(g)
    if not serves(g) or not _COLUMNS.ready(rows, like(rows.shape[1]), **_COLUMN_TILE):
        rows = rows.astype(np.float32, copy=False) if serves(g) else rows
        return rows.sum(axis=0, keepdims=True)  # (M, n) → (1, n)
    partials = scratch(rows, rows.shape[1])
    _COLUMNS((-(-rows.shape[1] // _COLUMN_TILE["W"]), ROWS), rows, partials, **_COLUMN_TILE)
    return partials


def deliver(partials: Array, need: Any, dtype: Any) -> Any:
    """Return what a gradient returns for an input of (n,) that gets the sum of ``partials``.

    For a Slot it is the slot, whose sum comes at the end of :func:`collecting`; else the sum, as ``dtype``.
    """
    if type(need) is Slot:
        if _here.arena is None or not _here.arena.defer(partials, need):
            need.add(partials.sum(axis=0).reshape(need.array.shape))  # (ROWS, n) → (n,) → the slot's
        return need
    return partials.sum(axis=0).astype(dtype, copy=False)  # (ROWS, n) → (n,)


@functools.lru_cache(maxsize=256)
def like(n: int) -> np.ndarray:
    """Return a stand-in for what :func:`scratch` gives, to ask whether a kernel is ready for it."""
    return np.empty((ROWS, -(-n // _APART) * _APART), np.float32)[:, :n]
