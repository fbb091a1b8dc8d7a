"""The loader: batches that depend on the key, the epoch and the sample only, augmented and mixed."""

from __future__ import annotations

import threading
import time
import types

import numpy as np
import pytest

from minivit.backend import Key, permutation, random_bits, uniform, uniform_rows
from minivit.data import Dataset, Loader
from minivit.data.augment import Chain, Crop, Flip, RandomErasing
from minivit.data.loader import _partners, shuffled
from minivit.data.mixing import Mix
from minivit.data.randaugment import RandAugment
from minivit.errors import ConfigError

FULL = Chain((Crop(2), Flip(), RandAugment(), RandomErasing(0.5)))


def toy(count: int = 60, channels: int = 3) -> Dataset:
    pixels = (random_bits(Key(7), (count, channels, 8, 10)) >> 24).astype(np.uint8)
    return Dataset(pixels, np.arange(count) % 4, ("a", "b", "c", "d"), "toy")


def by_sample(loader: Loader, epoch: int = 0, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return all images and labels from a batch on, one after the other."""
    images, labels = zip(*loader.batches(epoch, start), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def test_rows_are_those_of_the_whole():
    whole = uniform(Key(3, 1, 4), (1000, 7))
    rows = np.array([999, 0, 5, 5, 421])
    assert np.array_equal(uniform_rows(Key(3, 1, 4), rows, 7), whole[rows])
    assert uniform_rows(Key(3), rows, 7).dtype == np.float32
    assert uniform_rows(Key(3), rows, 0).shape == (5, 0)
    far = 2**40
    assert np.array_equal(uniform_rows(Key(3), np.array([far]), 7)[0], uniform(Key(3), (7,), start=7 * far))


@pytest.mark.parametrize("mix", [None, Mix(), Mix(prob=0.5)], ids=["unmixed", "mixed", "half mixed"])
def test_batches_do_not_change_a_sample(mix):
    data, key = toy(), Key(5)
    images, labels = by_sample(Loader(data, 60, key, FULL, mix), 3)
    assert images.dtype == np.float32
    for size in (1, 7, 32):
        again, its_labels = by_sample(Loader(data, size, key, FULL, mix), 3)
        assert np.array_equal(again, images)
        assert np.array_equal(its_labels, labels)
    for start in (0, 1, 5, 8):
        later, its_labels = by_sample(Loader(data, 7, key, FULL, mix), 3, start)
        assert np.array_equal(later, images[7 * start :])
        assert np.array_equal(its_labels, labels[7 * start :])
    assert not np.array_equal(by_sample(Loader(data, 60, key, FULL, mix), 4)[0], images)
    assert not np.array_equal(by_sample(Loader(data, 60, Key(6), FULL, mix), 3)[0], images)


def test_the_order_does_not_change_a_sample():
    data = toy()
    numbered = Dataset(data.images, np.arange(60), tuple(map(str, range(60))), "numbered")
    images, labels = by_sample(Loader(numbered, 16, Key(1), FULL))
    in_order, _ = by_sample(Loader(data, 16, Key(1), FULL, shuffle=False))
    assert np.array_equal(images, in_order[labels])


def test_mixup_mixes_with_what_the_partner_is_in_its_own_place():
    """Each image has its own class, so that the label tells who is in it, and how much of it."""
    data = Dataset(toy(50).images, np.arange(50), tuple(map(str, range(50))), "numbered")
    alone, _ = by_sample(Loader(data, 50, Key(2), FULL, shuffle=False))
    images, labels = by_sample(Loader(data, 16, Key(2), FULL, Mix(mixup=0.8, cutmix=0), shuffle=False))
    assert labels.dtype == np.float32
    assert labels.shape == (50, 50)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(images, np.einsum("nk,kchw->nchw", labels, alone), atol=2e-5)
    partners = [int(np.argmax(np.where(np.arange(50) == i, 0, row))) for i, row in enumerate(labels)]
    assert len(set(partners)) > 45  # a permutation, but for those whose partner they are themselves
    assert (labels > 0).sum(1).max() == 2
    other_epoch = by_sample(Loader(data, 16, Key(2), FULL, Mix(cutmix=0), shuffle=False), 1)[1]
    assert not np.array_equal(labels > 0, other_epoch > 0)


def test_cutmix_labels_are_shares_of_pixels():
    pixels = np.zeros((40, 1, 10, 10), np.uint8)
    pixels[20:] = 255
    data = Dataset(pixels, np.arange(40) // 20, ("black", "white"), "halves")
    loader = Loader(data, 16, Key(4), None, Mix(mixup=0), mean=(0.0,), std=(1.0,))
    images, labels = by_sample(loader)
    np.testing.assert_allclose(labels[:, 1], images.mean((1, 2, 3)), atol=1e-6)
    assert 0 < labels[:, 1].mean() < 1


def test_samples_that_are_not_mixed_are_left_alone():
    data, key = toy(), Key(8)
    plain, labels = by_sample(Loader(data, 16, key, FULL))
    images, shares = by_sample(Loader(data, 16, key, FULL, Mix(prob=0.5)))
    same = np.array([np.array_equal(a, b) for a, b in zip(images, plain, strict=True)])
    assert 15 < same.sum() < 45
    assert np.array_equal(shares[same], np.eye(4, dtype=np.float32)[labels[same]])
    never = by_sample(Loader(data, 16, key, FULL, Mix(prob=0)))
    assert np.array_equal(never[0], plain)


class OnDisk:
    """Images that can only be had by an array of indices, and that remember who was asked for."""

    def __init__(self, images: np.ndarray) -> None:
        self.all, self.shape, self.dtype, self.asked = images, images.shape, images.dtype, []

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        assert isinstance(index, np.ndarray) and index.dtype == np.int64 and index.ndim == 1
        self.asked.append(len(index))
        return self.all[index]


class Stub(types.SimpleNamespace):
    def __len__(self) -> int:
        return len(self.labels)


def test_images_on_disk_are_asked_for_by_index_and_only_where_needed():
    data = toy()
    lazy = Stub(**{name: getattr(data, name) for name in ("labels", "classes", "name", "mean", "std")})
    for mix, most in ((None, 16), (Mix(), 32), (Mix(prob=0.25), 26)):
        lazy.images = OnDisk(data.images)
        batches = list(Loader(lazy, 16, Key(0), FULL, mix, drop_last=True).batches(0))
        expected = list(Loader(data, 16, Key(0), FULL, mix, drop_last=True).batches(0))
        assert all(
            np.array_equal(a, b) for x, y in zip(batches, expected, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert len(lazy.images.asked) == 3
        assert min(lazy.images.asked) >= 16 and max(lazy.images.asked) <= most


def test_the_data_set_is_left_as_it_is():
    data = toy()
    before = data.images.copy()
    by_sample(Loader(data, 16, Key(0), FULL, Mix()))
    assert np.array_equal(data.images, before)


def test_one_batch_is_made_while_another_is_in_use():
    made: list[str] = []

    class Watched(Loader):
        def _batch(self, index, key, partner):
            made.append(threading.current_thread().name)
            if len(made) == 4:
                raise OSError("the disk is gone")
            return super()._batch(index, key, partner)

    batches = Watched(toy(), 10, Key(1)).batches(0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert len(made) == 2  # and no more, whose images would all be held
    next(batches), next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert all(name.startswith("minivit-loader") for name in made)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("minivit-loader") for name in names)  # it ends with the batches


def test_batches_that_nobody_takes_leave_no_thread():
    batches = Loader(toy(), 10, Key(1)).batches(0)
    next(batches)
    del batches
    assert not any(thread.name.startswith("minivit-loader") for thread in threading.enumerate())


def test_a_window_shuffles_among_neighbours_and_starts_anywhere():
    n, window = 1000, 160  # pieces of 10
    order = shuffled(Key(1), n, window)
    assert sorted(order.tolist()) == list(range(n))
    for at in range(0, n, window):
        part = order[at : at + window]
        assert len({i // 10 for i in part.tolist()}) <= 17
        assert np.mean(np.diff(part) == 1) < 0.1  # shuffled
    assert not np.array_equal(order, shuffled(Key(2), n, window))
    assert np.array_equal(shuffled(Key(1), n, n), permutation(Key(1), n))
    data, mix = toy(), Mix(prob=0.7)
    whole = by_sample(Loader(data, 7, Key(5), FULL, mix, window=16), 2)
    for size, start in ((7, 3), (3, 11), (60, 0)):
        images, labels = by_sample(Loader(data, size, Key(5), FULL, mix, window=16), 2, start)
        assert np.array_equal(images, whole[0][size * start :]) and np.array_equal(labels, whole[1][size * start :])
    order = shuffled(Key(3), 60, 16)
    partner = _partners(Key(4), order, 16)
    for at in range(0, 60, 16):
        assert set(partner[order[at : at + 16]]) == set(order[at : at + 16].tolist())
    with pytest.raises(ConfigError, match="window"):
        Loader(data, 7, Key(5), window=-1)
