"""The bar that is shown while files are read."""

from __future__ import annotations


def reading_bar(total: int, desc: str) -> object:
    """Return a bar that shows where it takes more than a second, and where standard error is a terminal."""
    from tqdm import tqdm  # late: to import it takes a while

    return tqdm(total=total, desc=desc, delay=1, leave=False, disable=None)
