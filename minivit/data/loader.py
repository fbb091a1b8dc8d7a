"""Batches of a data set, shuffled and augmented by key: the same key gives the same batches, wherever one starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from minivit.backend import Key, permutation, uniform
from minivit.data.augment import Augment
from minivit.data.datasets import Dataset
from minivit.errors import ConfigError, DataError


class Loader:
    """Standardised batches of ``dataset``, epoch by epoch.

    An image becomes (augment(image / 255) - mean) / std, per channel. ``mean`` and ``std`` are the data set's own
    unless given: a loader of validation or test images must be given those of the training set.

    Nothing is drawn from a hidden state: the order of epoch e follows from (``key``, e), and the random numbers that
    augment sample i from (``key``, e, i), whichever batch it falls into. Different loaders need different keys.

    ``drop_last`` leaves out a last batch that is smaller than the others. Raises ConfigError for a batch size below 1,
    DataError for a mean or std that does not fit the images, or where ``drop_last`` leaves no batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        key: Key,
        augment: Augment | None = None,
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
        self.dataset, self.batch_size, self.key, self.augment = dataset, batch_size, key, augment
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
        """Yield (images float32 (B, C, H, W), labels int64 (B,)) of ``epoch``, from its batch ``start`` on.

        The batches are exactly those that the whole epoch has there. Raises ConfigError for a ``start`` beyond the end.
        """
        if not 0 <= start <= len(self):
            raise ConfigError(f"there is no batch {start} to start from", f"an epoch has {len(self)} batches")
        n, key = len(self.dataset), self.key.at(epoch)
        order = permutation(key.child(0), n) if self.shuffle else np.arange(n)
        draws = uniform(key.child(1), (n, self.augment.draws)) if self.augment else None  # row i is sample i's own
        ends = range(start * self.batch_size, len(self) * self.batch_size, self.batch_size)
        return (self._batch(order[i : i + self.batch_size], draws) for i in ends)

    def _batch(self, index: np.ndarray, draws: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        images = _unit(self.dataset.images[index])  # (B, C, H, W)
        if self.augment and draws is not None:
            images = self.augment(images, draws[index])
        return _standard(images, self.mean, self.std), self.dataset.labels[index]


def standardize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return ``images``, uint8 (B, C, H, W), as float32 (images / 255 - mean) / std, per channel.

    Give the mean and std that the model was trained with.
    """
    return _standard(_unit(images), mean, std)


def _unit(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / np.float32(255)


def _standard(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    return (images - np.array(mean, np.float32)[:, None, None]) / np.array(std, np.float32)[:, None, None]
