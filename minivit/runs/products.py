"""Which algorithms a run's matrix products ran on a GPU, kept in its folder, so that it goes on with the same ones.

Two algorithms of cuBLASLt may add in another order, and so differ in the last bits. Which is the fastest is found by
timing, which may come out otherwise on another day: :mod:`minivit.backend.choices`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivit.backend.choices import chosen, kept_in, prefer
from minivit.files import write_text
from minivit.show.text import plural
from minivit.train.observers import Observer
from minivit.train.progress import Row


class ProductsRecord(Observer):
    """Keeps ``products.json`` in a run's folder: for each GPU and version of cuBLASLt, product → algorithm in hex.

    A run that goes on prefers those; where it runs others all the same, it is remarked on.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "products.json"
        self._kept: dict[str, dict[str, bytes]] = {}
        self._is_new, self._told = True, False

    def begin(self, trainer: Any) -> None:
        """Prefer the algorithms that the run has had so far."""
        self._kept, self._is_new, self._told = kept_in(self.path), True, False
        prefer(self._kept)

    def step(self, trainer: Any, row: Row) -> None:
        """Record the products after the first batch: nearly all are of its kinds."""
        if self._is_new:
            self._is_new = False
            self._record(trainer)

    def epoch(self, trainer: Any, row: Row) -> None:
        """Record also those of the last batch, and of the validation."""
        self._record(trainer)

    def end(self, trainer: Any) -> None:
        """Record all, whatever has ended the run."""
        self._record(trainer)

    def _record(self, trainer: Any) -> None:
        now: dict[str, dict[str, bytes]] = {}
        for row in chosen():
            now.setdefault(row["gpu"], {})[row["product"]] = bytes.fromhex(row["algorithm"])
        if self._kept and not self._told and (text := _differences(self._kept, now)):
            self._told = True
            for observer in trainer.observers:
                observer.remark(trainer, f"{text}: the numbers agree but for rounding")
        both = {gpu: self._kept.get(gpu, {}) | now.get(gpu, {}) for gpu in self._kept | now}
        if both != self._kept:
            self._kept = both
            found = {gpu: {name: how.hex() for name, how in products.items()} for gpu, products in both.items()}
            write_text(self.path, json.dumps(found, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def _differences(before: dict[str, dict[str, bytes]], now: dict[str, dict[str, bytes]]) -> str:
    """Return how what multiplies ``now`` differs from ``before``, "" if it does not."""
    if new := [gpu for gpu in now if gpu not in before]:
        return f"goes on with another GPU or cuBLASLt: {', '.join(before)} → {', '.join(new)}"
    others = [name for gpu in now for name, how in now[gpu].items() if before[gpu].get(name, how) != how]
    return f"{plural(len(others), 'matrix product')} by another algorithm of cuBLASLt than before" if others else ""
