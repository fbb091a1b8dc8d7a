"""Many names in little memory: of a million files, texts and paths as Python has them would fill some 600 MB."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Names(Sequence[str]):
    """Texts, such as names of files: their bytes one behind the other, and 16 bytes more for each.

    It equals any sequence of the same texts. An index is an integer; others are taken with :meth:`take`.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        held, ends = bytearray(), array("q")
        for text in texts:
            held += text.encode("utf-8", "surrogateescape")  # a file's name may be any bytes
            ends.append(len(held))
        self._held, self._ends = held, np.array(ends, np.int64)  # (N,)
        self._starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)[: len(self._ends)]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: Any) -> Any:
        return self._held[self._starts[i] : self._ends[i]].decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        some = ", ".join(repr(self[i]) for i in range(min(3, len(self))))
        return f"Names({some}{', …' if len(self) > 3 else ''}: {len(self):,})"

    def take(self, indices: np.ndarray) -> Names:
        """Return the texts at ``indices``, in that order; their bytes are shared."""
        taken = Names()
        taken._held, taken._starts, taken._ends = self._held, self._starts[indices], self._ends[indices]
        return taken


class Paths(Sequence[Path]):
    """Files below ``root``, by their ``names`` there: a Path is made when it is asked for."""

    def __init__(self, root: Path, names: Iterable[str] = ()) -> None:
        self.root, self.names = root, names if isinstance(names, Names) else Names(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        return self.root / self.names[i]

    def take(self, indices: np.ndarray) -> Paths:
        """Return the files at ``indices``, in that order."""
        return Paths(self.root, self.names.take(indices))
