"""Where layers take their random keys from: initial weights, dropout and drop path.

Inside ``with random_key(Key(seed, stream, step)):`` the first draw gets that key's child 0, the next its child 1, and
so on: the same code under the same key draws the same numbers. Outside any block each thread draws on from seed 0.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from minivit.backend import Key


class _Draws(threading.local):
    key = Key(0)
    drawn = 0
    first_row = 0


_draws = _Draws()


@contextlib.contextmanager
def random_key(key: Key, first_row: int = 0) -> Iterator[None]:
    """Take this thread's random numbers from ``key`` in this block.

    ``first_row`` says that row 0 of the batches worked on here is that row of a larger batch, so that dropout gives a
    batch worked off in pieces the masks that it has as a whole.
    """
    before = _draws.key, _draws.drawn, _draws.first_row
    _draws.key, _draws.drawn, _draws.first_row = key, 0, first_row
    try:
        yield
    finally:
        _draws.key, _draws.drawn, _draws.first_row = before


def next_key() -> Key:
    """Return the next key of this thread's block."""
    _draws.drawn += 1
    return _draws.key.child(_draws.drawn - 1)


def first_row() -> int:
    """Return the row of the whole batch at which this thread's piece begins."""
    return _draws.first_row
