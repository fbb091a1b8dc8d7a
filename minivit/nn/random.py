"""Where layers take their random keys from: initial weights, dropout and drop path.

Inside ``with random_key(Key(seed, stream, step, row)):`` the first draw gets that key's child 0, the next its child 1,
and so on: the same code under the same key draws the same numbers. Outside any block each thread draws on from seed 0.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

from minivit.backend import Key


class Draws(NamedTuple):
    """Where a thread's drawing stands: the block's key, and how many were drawn from it."""

    key: Key = Key(0)
    drawn: int = 0


class _Now(threading.local):
    draws = Draws()


_now = _Now()


def random_key(key: Key) -> contextlib.AbstractContextManager[None]:
    """Take this thread's random numbers from ``key`` in this block."""
    return drawing(Draws(key))


@contextlib.contextmanager
def drawing(state: Draws) -> Iterator[None]:
    """Go on from ``state`` in this block: what was drawn after :func:`draws` gave it is drawn again."""
    before, _now.draws = _now.draws, state
    try:
        yield
    finally:
        _now.draws = before


def draws() -> Draws:
    """Return where this thread's drawing stands."""
    return _now.draws


def next_key() -> Key:
    """Return the next key of this thread's block."""
    key, drawn = _now.draws
    _now.draws = Draws(key, drawn + 1)
    return key.child(drawn)
