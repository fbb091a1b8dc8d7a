"""Which of a model's classes each class of a data set is: matched by name, because their order means nothing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minivit.data.dataset import class_names
from minivit.errors import DataError

LISTED = 8
"""So many names are listed in a message."""


@dataclass(frozen=True)
class Matching:
    """``places`` int64 (number of the data's classes,): the row of ``rows`` that each of them is.

    ``rows`` are the names of the model's classes, in its order, and behind them those that only the data have:
    ``unknown``. ``remark`` says what a user ought to know.
    """

    places: np.ndarray
    rows: tuple[str, ...]
    unknown: tuple[str, ...] = ()
    remark: str = ""


def match_classes(known: Sequence[str], given: Sequence[str], count: int, name: str, by_position: bool) -> Matching:
    """Match the classes ``given`` by a data set to those ``known`` to a model of ``count`` classes (() if unnamed).

    A class is known by its name, to the letter; data without names have the numbers "0", "1", … for names. The n-th
    class of the data is taken for the model's n-th with ``by_position``, and where the model's classes have no names
    and the data have as many.

    Raises DataError, in the name of the data set ``name``, if no name is shared, if one occurs twice, or if there are
    more or other classes than positions.
    """
    unnamed = not known
    if by_position or (unnamed and len(given) == count):
        if len(given) > count:
            what = f"{name} has {len(given)} classes, the model knows {count}: they cannot be matched by position"
            raise DataError(what, "evaluate on data of the kind that it was trained on")
        remark = "classes matched by position" + (": the checkpoint has no names for them" if unnamed else ", as asked")
        return Matching(np.arange(len(given)), tuple(known or class_names(given, count)), remark=remark)
    if unnamed:
        what = f"{name} has {len(given)} classes, the model {count}, and the checkpoint has no names for them"
        raise DataError(what, "if the n-th class of the data is the model's n-th: --by-position")
    for names, whose in ((known, "the model"), (given, name)):
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            what = f"{whose} has more than one class called {twice!r}: which one is meant cannot be told"
            raise DataError(what, "give every class a name of its own, or match them by number: --by-position")
    place = {n: i for i, n in enumerate(known)}
    unknown = tuple(n for n in given if n not in place)
    if len(unknown) == len(given):
        near = [f"{n!r} for {meant!r}" for n in given if (meant := meant_by(n, known))]
        raise DataError(
            f"{name} and the model share no class: the data have {listed(given)}; the model knows {listed(known)}",
            (f"names must be the same to the letter: rename {', '.join(near[:LISTED])}; or, " if near else "")
            + "if the n-th class of the data is the model's n-th: --by-position",
        )
    place |= {n: len(known) + i for i, n in enumerate(unknown)}
    return Matching(np.array([place[n] for n in given], np.int64), (*known, *unknown), unknown)


def meant_by(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is like ``name``: but for case, spaces and punctuation, or by a few letters."""

    def plain(text: str) -> str:
        return "".join(c for c in text.casefold() if c.isalnum())

    if name.isdigit():  # another number is another class
        return None
    same = [n for n in known if plain(n) and plain(n) == plain(name)]
    return next(iter(same or difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def listed(names: Sequence[str]) -> str:
    """Return names in quotes, the first few and how many more there are."""
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(map(repr, names[:LISTED])) + rest
