"""Batches of a data set, shuffled and augmented by key: the same key gives the same batches, wherever one starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from minivit.backend import Key, permutation, uniform_rows
from minivit.data.augment import Augment
from minivit.data.dataset import Dataset, bytes_remedy
from minivit.data.mixing import Mix
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
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"a batch cannot hold {batch_size} images", "use a batch size of at least 1")
        if drop_last and batch_size > len(dataset):
            what = f"{dataset.name}: drop_last leaves no batch: {len(dataset)} images make none of {batch_size}"
            raise DataError(what, f"use a batch size of at most {len(dataset)}")
        self.dataset, self.batch_size, self.key, self.augment, self.mix = dataset, batch_size, key, augment, mix
        self.mean = tuple(dataset.mean if mean is None else mean)
        self.std = tuple(dataset.std if std is None else std)
        self.shuffle, self.drop_last = shuffle, drop_last
        channels = dataset.images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels:
            what = f"{dataset.name}: {len(self.mean)} means and {len(self.std)} stds for {channels} channels"
            raise DataError(what, "give one of each per channel")
        if not all(0 < std < np.inf for std in self.std):
            raise DataError(f"{dataset.name}: std {self.std} cannot divide", "give positive numbers")

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (images float32 (B, C, H, W), labels) of ``epoch``, from its batch ``start`` on.

        Labels are int64 (B,), or float32 (B, K) with ``mix``. The batches are exactly those that the whole epoch has
        there. Raises ConfigError for a ``start`` beyond the end.
        """
        if not 0 <= start <= len(self):
            raise ConfigError(f"there is no batch {start} to start from", f"an epoch has {len(self)} batches")
        n, key = len(self.dataset), self.key.at(epoch)
        order = permutation(key.child(0), n) if self.shuffle else np.arange(n)
        partner = permutation(key.child(2), n) if self.mix else None
        places = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        return _ahead(lambda i: self._batch(order[i : i + self.batch_size], key, partner), places)

    def _batch(self, index: np.ndarray, key: Key, partner: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        labels = self.dataset.labels[index]
        if self.mix is None or partner is None:
            return _standard(self._augmented(index, key), self.mean, self.std), labels
        u = uniform_rows(key.child(3), index, self.mix.draws)
        mixed = self.mix.chosen(u)
        others = partner[index[mixed]]
        both = self._augmented(np.concatenate([index, others]), key)  # (B + mixed, C, H, W)
        images = both[: len(index)]
        images[mixed], share = self.mix(images[mixed], both[len(index) :], u[mixed])
        soft = np.zeros((len(index), len(self.dataset.classes)), np.float32)  # (B, K)
        soft[np.arange(len(index)), labels] = 1
        soft[mixed] *= share[:, None]
        soft[mixed, self.dataset.labels[others]] += 1 - share
        return _standard(images, self.mean, self.std), soft  # both are linear: fewer images after mixing than before

    def _augmented(self, index: np.ndarray, key: Key) -> np.ndarray:
        images = _unit(self.dataset.images[index])  # (B, C, H, W)
        return self.augment(images, uniform_rows(key.child(1), index, self.augment.draws)) if self.augment else images


def _ahead(make: Callable[[int], T], places: Iterable[int]) -> Iterator[T]:
    """Yield ``make(place)`` for each place, made on a thread of its own while the one before it is in use."""
    with ThreadPoolExecutor(1, "minivit-loader") as pool:
        batches = (pool.submit(make, place) for place in places)
        coming = next(batches, None)
        while coming is not None:
            batch, coming = coming, next(batches, None)
            yield batch.result()


def standardize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return ``images``, uint8 (B, C, H, W), as float32 (images / 255 - mean) / std, per channel.

    Give the mean and std that the model was trained with. Raises DataError for images that are not uint8: they would
    be divided by 255 once more.
    """
    if images.dtype != np.uint8:
        raise DataError(f"images to standardize must be uint8, 0 to 255, not {images.dtype}", bytes_remedy(images))
    return _standard(_unit(images), mean, std)


def _unit(images: np.ndarray) -> np.ndarray:
    x = images.astype(np.float32)
    x /= np.float32(255)
    return x


def _standard(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    x = images - np.array(mean, np.float32)[:, None, None]
    x /= np.array(std, np.float32)[:, None, None]
    return x
