"""The bars that are shown while files are read, and kernels compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without the import
if TYPE_CHECKING:
    from typing import Any

    from minivit.backend.compiling import Plan


def reading_bar(total: int, desc: str) -> object:
    """Return a bar that shows where it takes more than a second, and where standard error is a terminal."""
    from tqdm import tqdm  # late: to import it takes a while

    return tqdm(total=total, desc=desc, delay=1, leave=False, disable=None)


def compiling_bar(total: int | None = None, which: str = "") -> Any:
    """Return a bar that counts kernels, as a context; shown where standard error is a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=f"compiling kernels {which}".rstrip(), unit="kernel", leave=False, disable=None)


@contextlib.contextmanager
def compiling_shown() -> Iterator[None]:
    """Show, in this block or decorated function, a bar from the first kernel on that has to be compiled."""
    from minivit.backend.compiling import watching  # late: help needs none of it

    bars: list[Any] = []

    def tell(plan: Plan) -> None:
        if not bars:
            bars.append(compiling_bar())
        bars[0].update()
        bars[0].set_postfix_str(plan.factory)

    try:
        with watching(tell):
            yield
    finally:
        for bar in bars:
            bar.close()
