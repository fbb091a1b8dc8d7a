"""Batches of a data set, shuffled and augmented by key: the same key gives the same batches, wherever one starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from minivit.backend import (
    Array,
    Key,
    SideStream,
    packed_to,
    permutation,
    resolve_device,
    side_stream,
    to_device,
    uniform_rows,
)
from minivit.data.augment import Augment
from minivit.data.dataset import Dataset, bytes_remedy
from minivit.data.file_array import ImageFiles
from minivit.data.mixing import Mix
from minivit.data.on_gpu import placed
from minivit.errors import ConfigError, DataError

T = TypeVar("T")


class Loader:
    """Standardised batches of ``dataset``, epoch by epoch.

    An image becomes (augment(image / 255) - mean) / std, per channel. ``mean`` and ``std`` are the data set's own
    unless given: a loader of validation or test images must be given those of the training set.

    With ``mix``, augmented images are mixed with others, and labels are float32 (B, K), each row the classes' shares in
    the image. A sample's partner comes from the whole data set, and looks as it does in its own place in the epoch.

    Nothing is drawn from a hidden state: the order of epoch e and the partners in it follow from (``key``, e), and the
    random numbers that augment and mix sample i from (``key``, e, i), whichever batch it falls into. Different loaders
    need different keys.

    On a CUDA ``device`` the batches are made there, ahead of their use, and are CuPy's arrays: the same pictures, as
    ``augment.py`` says. The images are copied there once if they take no more than ``gpu_memory`` bytes, or, if that is
    None, than half of what is free; else as they are needed. What a user ought to know of that is ``remark``, or "".

    With a ``window``, an epoch takes so many images at a time, drawn from 16 pieces of neighbours, and shuffles among
    them: the pieces' order and that within a window follow from (``key``, e) as well, and a sample's partner is one of
    its window. It is for disks that are slow to find a place: see :meth:`~minivit.data.tar.Members.soon`. 0 shuffles
    all.

    ``drop_last`` leaves out a last batch that is smaller than the others. Raises ConfigError for a batch size below 1,
    DataError for a mean or std that does not fit the images, or where ``drop_last`` leaves no batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        key: Key,
        augment: Augment | None = None,
        mix: Mix | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        device: str = "cpu",
        gpu_memory: int | None = None,
        window: int = 0,
    ) -> None:
        if window < 0:
            raise ConfigError(f"a window cannot hold {window} images", "use 0 to shuffle all")
        if batch_size < 1:
            raise ConfigError(f"a batch cannot hold {batch_size} images", "use a batch size of at least 1")
        if drop_last and batch_size > len(dataset):
            what = f"{dataset.name}: drop_last leaves no batch: {len(dataset)} images make none of {batch_size}"
            raise DataError(what, f"use a batch size of at most {len(dataset)}")
        self.dataset, self.batch_size, self.key, self.augment, self.mix = dataset, batch_size, key, augment, mix
        self.mean = tuple(dataset.mean if mean is None else mean)
        self.std = tuple(dataset.std if std is None else std)
        self.shuffle, self.drop_last, self.window = shuffle, drop_last, window
        channels = dataset.images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels:
            what = f"{dataset.name}: {len(self.mean)} means and {len(self.std)} stds for {channels} channels"
            raise DataError(what, "give one of each per channel")
        if not all(0 < std < np.inf for std in self.std):
            raise DataError(f"{dataset.name}: std {self.std} cannot divide", "give positive numbers")
        # where batches are made is no setting of the run (train/identity.py): it may go on elsewhere
        self._side, self._pixels, self.remark = None, dataset.images, ""
        if (device := resolve_device(device)) != "cpu":
            self._side = side_stream(device)
            self._pixels, self.remark = placed(dataset.images, augment, self._side, gpu_memory)

    @property
    def on_gpu(self) -> bool:
        """Whether the batches are made, and lie, on a GPU."""
        return self._side is not None

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """Yield (images float32 (B, C, H, W), labels) of ``epoch``, from its batch ``start`` on.

        Labels are int64 (B,), or float32 (B, K) with ``mix``. The batches are exactly those that the whole epoch has
        there. Raises ConfigError for a ``start`` beyond the end.
        """
        if not 0 <= start <= len(self):
            raise ConfigError(f"there is no batch {start} to start from", f"an epoch has {len(self)} batches")
        n, key = len(self.dataset), self.key.at(epoch)
        order = shuffled(key.child(0), n, self.window) if self.shuffle else np.arange(n)
        partner = _partners(key.child(2), order, self.window) if self.mix else None
        if self._side is not None:
            return self._handed_over(self._side, order[: len(self) * self.batch_size], key, partner, start)
        places = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)

        def make(i: int) -> tuple[Array, np.ndarray]:
            self._announce(order, i, self.batch_size, i == places.start)
            return self._batch(order[i : i + self.batch_size], key, partner)

        return _ahead(make, places)

    def _announce(self, order: np.ndarray, at: int, count: int, first: bool) -> None:
        """Have files read ahead before ``count`` images of the ``order`` are made: the next window when one begins."""
        images, window = self.dataset.images, self.window
        if not window or not isinstance(images, ImageFiles):
            return
        soon = [at // window, at // window + 1] if first else []
        soon += [i + 1 for i in range(-(-at // window), -(-(at + count) // window)) if i + 1 not in soon]
        for i in soon:
            images.soon(order[i * window : (i + 1) * window])

    def _handed_over(
        self, side: SideStream, order: np.ndarray, key: Key, partner: np.ndarray | None, start: int
    ) -> Iterator[tuple[Array, Array]]:
        """Yield batches of ``order``'s images from batch ``start`` on, made ahead on ``side``, several in a block.

        Blocks begin at the same places wherever the epoch is entered, for the same bits.
        """
        batch = self.batch_size * math.prod(self.dataset.images.shape[1:])  # numbers
        size = self.batch_size * max(1, BLOCK_NUMBERS // batch)
        first = start * self.batch_size
        places = range(first // size * size, len(order), size)

        def make(place: int) -> tuple[Array, Array, Any]:
            self._announce(order, place, size, place == places.start)
            with side.working():
                images, labels = self._batch(order[place : place + size], key, partner)
                images = to_device(images, side.device)
                return images, *packed_to(images, labels), side.mark()

        for place, (images, labels, ready) in zip(places, _ahead(make, places), strict=True):
            for i in range(max(first - place, 0), len(images), self.batch_size):
                own_images, own_labels = side.copies([x[i : i + self.batch_size] for x in (images, labels)], ready)
                yield own_images, own_labels

    def _batch(self, index: np.ndarray, key: Key, partner: np.ndarray | None) -> tuple[Array, np.ndarray]:
        labels = self.dataset.labels[index]
        if self.mix is None or partner is None:
            return _standard(self._augmented(index, key), self.mean, self.std), labels
        u = uniform_rows(key.child(3), index, self.mix.draws)
        mixed = self.mix.chosen(u)
        others = partner[index[mixed]]
        both = self._augmented(np.concatenate([index, others]), key)  # (B + mixed, C, H, W)
        images, (rows,) = both[: len(index)], packed_to(both, mixed)
        images[rows], share = self.mix(images[rows], both[len(index) :], u[mixed])
        soft = np.zeros((len(index), len(self.dataset.classes)), np.float32)  # (B, K)
        soft[np.arange(len(index)), labels] = 1
        soft[mixed] *= share[:, None]
        soft[mixed, self.dataset.labels[others]] += 1 - share
        return _standard(images, self.mean, self.std), soft  # both are linear: fewer images after mixing than before

    def _augmented(self, index: np.ndarray, key: Key) -> Array:
        images = _unit(self._pixels[index])  # (B, C, H, W)
        return self.augment(images, uniform_rows(key.child(1), index, self.augment.draws)) if self.augment else images


PIECES = 16
"""A window of a loader holds so many pieces of neighbouring images."""


def shuffled(key: Key, n: int, window: int = 0) -> np.ndarray:
    """Return the numbers below ``n`` in a random order: of all of them, or within windows (:class:`Loader`)."""
    if not 0 < window < n:
        return permutation(key, n)
    piece = -(-window // PIECES)
    pieces = permutation(key.child(0), -(-n // piece))
    order = (pieces[:, None] * piece + np.arange(piece)).reshape(-1)  # (pieces, piece) → (n or more,)
    order = order[order < n]
    for step, at in enumerate(range(0, n, window)):
        part = order[at : at + window]
        part[:] = part[permutation(key.child(1).at(step), len(part))]
    return order


def _partners(key: Key, order: np.ndarray, window: int) -> np.ndarray:
    """Return the partner of every image, int64 (n,): any, or one of those in its window of the ``order``."""
    n = len(order)
    if not 0 < window < n:
        return permutation(key, n)
    partner = np.empty(n, np.int64)
    for step, at in enumerate(range(0, n, window)):
        part = order[at : at + window]
        partner[part] = part[permutation(key.at(step), len(part))]
    return partner


BLOCK_NUMBERS = 1 << 23
"""Numbers of images that a GPU makes at once: launched from Python, an operation on fewer takes no less time."""


def _ahead(make: Callable[[int], T], places: Iterable[int]) -> Iterator[T]:
    """Yield ``make(place)`` for each place, made on a thread of its own while the one before it is in use."""
    with ThreadPoolExecutor(1, "minivit-loader") as pool:
        batches = (pool.submit(make, place) for place in places)
        coming = next(batches, None)
        while coming is not None:
            batch, coming = coming, next(batches, None)
            yield batch.result()


def standardize(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Return ``images``, uint8 (B, C, H, W), as float32 (images / 255 - mean) / std, per channel.

    Give the mean and std that the model was trained with. Raises DataError for images that are not uint8: they would
    be divided by 255 once more.
    """
    if images.dtype != np.uint8:
        raise DataError(f"images to standardize must be uint8, 0 to 255, not {images.dtype}", bytes_remedy(images))
    return _standard(_unit(images), mean, std)


def _unit(images: Array) -> Array:
    x = images.astype(np.float32)
    x /= np.float32(255)
    return x


def _standard(images: Array, mean: Sequence[float], std: Sequence[float]) -> Array:
    offset, scale = packed_to(images, *(np.array(x, np.float32)[:, None, None] for x in (mean, std)))  # (C, 1, 1) each
    x = images - offset
    x /= scale
    return x
