"""Image files as if they were an array: what is indexed is decoded then, by several threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from minivit.backend import cpu_cores
from minivit.data.fit import OWN_FITS, fitted
from minivit.data.images import Picture, decode
from minivit.data.name_list import Paths
from minivit.data.tar import Member, Members
from minivit.errors import DataError

FIT = "crop"
"""How files of a folder are brought to one size unless told otherwise: see :func:`~minivit.data.fit.fitted`."""

DEADLINE = 60.0
"""Seconds without a file done after which reading gives up: a disk that is gone keeps whoever reads from it waiting."""
_WAITS = 60  # many short ones: while the process itself is suspended, no more than one of them goes by


class ImageFiles:
    """Image files as if they were an array, uint8 (N, C, H, W): what is indexed is decoded then, by several threads.

    Each is a path, or a member of a tar archive. An index is an integer, a slice, or an array of integers. Raises
    DataError, naming the file, for one that has gone or been damaged since.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, paths: Sequence[Path | Member], size: tuple[int, int], channels: int, fit: str = FIT) -> None:
        self.paths, self.fit = paths, fit
        self.shape = (len(paths), channels, *size)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all images would take."""
        return self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        out = np.empty((chosen.size, *self.shape[1:]), np.uint8)

        def read(i: int) -> None:
            out[i] = self.read(int(chosen.flat[i]))[0]

        in_threads(read, self._paths_at(chosen.reshape(-1)))
        return out.reshape(*chosen.shape, *self.shape[1:])  # (n, C, H, W), or (C, H, W) for an integer

    def take(self, indices: np.ndarray, axis: int = 0) -> ImageFiles:
        """Return the files at ``indices``, in that order; none is decoded. There is no other ``axis`` than 0."""
        return ImageFiles(self._paths_at(indices), self.shape[2:], self.shape[1], self.fit)

    def _paths_at(self, indices: np.ndarray) -> Sequence[Path | Member]:
        if isinstance(self.paths, Paths | Members):
            return cast(Sequence[Path | Member], self.paths.take(indices))
        return [self.paths[i] for i in indices]

    def soon(self, indices: np.ndarray) -> None:
        """Say that those at ``indices`` are wanted soon: see :meth:`~minivit.data.tar.Members.soon`."""
        if isinstance(self.paths, Members):
            self.paths.soon(indices)

    def read(self, i: int) -> tuple[np.ndarray, bool]:
        """Decode a file: (uint8 (C, H, W), whether it holds further pictures)."""
        size, own = self.shape[2:], self.fit in OWN_FITS
        picture = self.picture(i, at_least=size if own else None)  # others decode all pixels
        return fitted(picture.page, size, self.fit, str(self.paths[i])), picture.animated

    def picture(self, i: int, at_least: tuple[int, int] | None = None) -> Picture:
        """Decode a file in its own size, as :func:`~minivit.data.images.decode` does."""
        path = self.paths[i]
        return decode(path.open() if isinstance(path, Member) else path, self.shape[1], at_least)


def in_threads(
    work: Callable[[int], None], paths: Sequence[Path | Member], title: str = "", bar: Callable[..., Any] | None = None
) -> None:
    """Call ``work(i)`` for the place of every path, on a thread for each core; raise the first error that one meets.

    A thread takes the next number when it is done with its last: there is no queue to fill up or to wait on. After an
    error, or Ctrl-C, no further number is taken. ``bar`` shows how far it is, as tqdm does: it is called with ``total``
    and ``desc``, the ``title``; of what it returns, ``update()`` is called after each path, and ``close()`` at the end.

    Raises DataError, naming the files that are being read, if none is done within :data:`DEADLINE` seconds. A thread
    that waits for a disk cannot be stopped: it is left behind, and does not keep Python from ending.
    """
    numbers, lock, stop = iter(range(len(paths))), threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    busy: set[int] = set()
    done = 0
    shown = bar(total=len(paths), desc=title) if bar else None

    def run() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                i = next(numbers, None)
                if i is None:
                    return
                busy.add(i)
            try:
                work(i)
            except BaseException as error:  # it belongs to whoever waits for the threads
                errors.append(error)
                stop.set()
            with lock:
                busy.remove(i)
                done += 1
                if shown is not None:
                    shown.update()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(cpu_cores(), len(paths)))]
    waits, seen = 0, 0
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and waits < _WAITS:
                thread.join(DEADLINE / _WAITS)
                waits, seen = (waits + 1 if done == seen else 0), done
    finally:
        stop.set()
        if shown is not None:
            shown.close()
    if errors:
        raise errors[0]
    with lock:
        stalled = ", ".join(str(paths[i]) for i in sorted(busy))
    if stalled:
        what = f"no file could be read for {DEADLINE:g} seconds; they wait for {stalled}"
        raise DataError(what, "check the disk or the network that they are on, then try again")
