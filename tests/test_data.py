"""Data sets, the loader and augmentation."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivit.backend import Key, random_bits, uniform
from minivit.data import Affine, Dataset, Loader, load, splits_of, standardize
from minivit.data import images as images_module
from minivit.data.augment import bilinear
from minivit.errors import ConfigError, DataError


def toy(n: int = 10, channels: int = 1, height: int = 4, width: int = 5, classes: int = 3) -> Dataset:
    pixels = (random_bits(Key(7), (n, channels, height, width)) >> 24).astype(np.uint8)
    return Dataset(pixels, np.arange(n) % classes, tuple("abcdefghij"[:classes]), "toy")


# ---- the embedded digits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "counts", "pixel_sum"),
    [
        ("train", [376, 389, 380, 389, 387, 376, 377, 387, 380, 382], 1_204_758),
        ("test", [178, 182, 177, 183, 181, 182, 181, 179, 174, 180], 561_718),
    ],
)
def test_digits_are_the_source_s(split, counts, pixel_sum):
    digits = load("digits", split)
    assert digits.images.shape == (sum(counts), 1, 8, 8)
    assert len(digits) == sum(counts)
    assert np.bincount(digits.labels).tolist() == counts
    source = np.rint(digits.images * (16 / 255)).astype(int)  # the 17 values that the source has
    assert source.sum() == pixel_sum
    assert np.array_equal(np.rint(source * (255 / 16)), digits.images)
    assert digits.classes == tuple("0123456789")
    assert digits.name == "digits"


def test_digits_are_small_and_attributed():
    folder = Path(images_module.__file__).parent / "digits"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 200_000
    text = (folder / "LICENSE.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "Changes made"))


def test_moments_are_those_of_the_pixels():
    data = toy(n=1500, channels=3)  # more than one piece of the sum
    scaled = data.images / 255
    np.testing.assert_allclose(data.mean, scaled.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, scaled.std((0, 2, 3)), rtol=1e-12)
    shuffled = data.subset(np.arange(len(data))[::-1])
    assert (shuffled.mean, shuffled.std) == (data.mean, data.std)


def test_a_constant_channel_has_a_std_that_divides():
    assert Dataset(np.full((2, 1, 3, 3), 255, np.uint8), np.array([0, 0]), ("a",), "white").std == (1.0,)


# ---- data sets -------------------------------------------------------------------------------------------------------

GOOD = {"images": np.zeros((2, 1, 3, 3), np.uint8), "labels": np.array([0, 1]), "classes": ("a", "b"), "name": "x"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": np.zeros((2, 1, 3, 3), np.float32)}, "uint8"),
        ({"images": np.zeros((2, 3, 3), np.uint8)}, r"\(2, 3, 3\)"),
        ({"images": [[0]]}, "list"),
        ({"labels": np.array([0.0, 1.0])}, "int64"),
        ({"labels": np.array([0, 1], np.int32)}, "int32"),
        ({"labels": np.array([[0, 1]])}, r"\(1, 2\)"),
        ({"labels": np.array([0])}, "2 images but 1 labels"),
        ({"labels": np.array([0, 2])}, "label 2 of image 1"),
        ({"labels": np.array([-1, 0])}, "label -1 of image 0"),
        ({"classes": ()}, "label 0 of image 0"),
        ({"images": np.zeros((0, 1, 3, 3), np.uint8), "labels": np.zeros(0, np.int64)}, "no images"),
        ({"images": np.zeros((2, 1, 0, 3), np.uint8)}, "no images"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused(changed, message):
    Dataset(**GOOD)
    with pytest.raises(DataError, match=message) as caught:
        Dataset(**(GOOD | changed))
    assert caught.value.remedy


def test_subset_keeps_the_order_asked_for():
    data = toy()
    part = data.subset([4, 1, 4])
    assert np.array_equal(part.images, data.images[[4, 1, 4]])
    assert part.labels.tolist() == data.labels[[4, 1, 4]].tolist()


@pytest.mark.parametrize("indices", [[], [10], [-1], [0.5], [[1, 2]], np.ones(10, bool)])
def test_subset_refuses(indices):
    with pytest.raises(DataError):
        toy().subset(indices)


def test_split_off_parts_the_data_by_key():
    digits = load("digits")
    data = Dataset(digits.images, np.arange(len(digits)), tuple(map(str, range(len(digits)))), "numbered")
    rest, held = data.split_off(0.1, Key(1), stratified=False)
    assert len(held) == 382
    assert sorted([*rest.labels, *held.labels]) == list(range(len(data)))
    assert np.array_equal(data.split_off(0.1, Key(1), False)[1].labels, held.labels)
    assert not np.array_equal(data.split_off(0.1, Key(2), False)[1].labels, held.labels)
    assert held.labels.tolist() == sorted(held.labels)  # in the data's order
    assert abs(held.labels.mean() / len(data) - 0.5) < 0.1  # from all over it


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_split_off_takes_its_share_of_every_class(fraction, seed):
    sizes = np.array([1, 2, 3, 4, 7, 10, 40, 100])
    labels = np.repeat(np.arange(8), sizes)
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    data = Dataset(pixels, labels, tuple("abcdefgh"), "uneven")
    rest, held = data.split_off(fraction, Key(seed))
    assert sorted([*rest.images.flat, *held.images.flat]) == list(range(len(data)))
    taken = np.bincount(held.labels, minlength=8)
    assert (np.abs(taken - fraction * sizes) <= 1).all()
    assert (np.bincount(rest.labels, minlength=8) >= 1).all()
    assert len(held) == round(fraction * len(data)) or fraction == 0.9  # where small classes keep what they have
    assert np.array_equal(data.split_off(fraction, Key(seed))[1].images, held.images)
    assert not np.array_equal(data.split_off(fraction, Key(seed + 99))[1].images, held.images)
    assert held.images.ravel().tolist() == sorted(held.images.ravel())


def test_split_off_where_no_class_can_spare_an_image():
    single = Dataset(np.zeros((4, 1, 2, 2), np.uint8), np.arange(4), tuple("abcd"), "single")
    with pytest.raises(DataError, match="no class has two images"):
        single.split_off(0.5, Key(0))


def test_a_data_set_prints_as_one_line():
    assert repr(load("digits")) == "Dataset('digits': 3,823 images uint8 (1, 8, 8), 10 classes)"
    assert str(toy(1, 3, classes=1)) == "Dataset('toy': 1 image uint8 (3, 4, 5), 1 class)"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, 0.01, 0.99, float("nan")])
def test_split_off_refuses_an_empty_part(fraction):
    with pytest.raises(DataError, match="hold out"):
        toy().split_off(fraction, Key(0))


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digit", "train", "did you mean 'digits'"),
        ("no-such-data", "train", "known: cifar-10, cifar-100, digits"),
        ("digits", "tset", "did you mean 'test'"),
        ("missing.npz", "train", "no such file"),
        ("no/such", "train", "no such file or folder"),
    ],
)
def test_unknown_names_get_advice(name, split, message):
    with pytest.raises(DataError, match=message):
        load(name, split)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5, 7), (6, 1, 5, 7)),
        ((6, 3, 5, 7), (6, 3, 5, 7)),
        ((6, 5, 7, 3), (6, 3, 5, 7)),
        ((6, 5, 7, 1), (6, 1, 5, 7)),
        ((6, 5, 7, 4), (6, 4, 5, 7)),
        ((6, 1, 5, 4), (6, 1, 5, 4)),
    ],
)
def test_npz_layouts(tmp_path, shape, expected):
    images = (random_bits(Key(0), shape) >> 24).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.array([0, 1, 2, 0, 1, 2], np.int32))
    data = load(tmp_path / "mine.npz")
    assert data.images.shape == expected
    assert (data.name, data.classes) == (str(tmp_path / "mine.npz"), ("0", "1", "2"))
    moved = np.moveaxis(images, -1, 1) if shape[-1] == expected[1] and shape != expected else images.reshape(expected)
    assert np.array_equal(data.images, moved)


def test_npz_names_its_classes_once_or_twice_the_same(tmp_path):
    arrays = {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 1]), "classes": np.array(["a", "b"])}
    np.savez(tmp_path / "d.npz", **arrays, class_names=np.array(["a", "b"]))
    assert load(tmp_path / "d.npz").classes == ("a", "b")
    np.savez(tmp_path / "d.npz", **arrays, class_names=np.array(["b", "a"]))
    with pytest.raises(DataError, match="classes and class_names do not name the same"):
        load(tmp_path / "d.npz")
    assert load(tmp_path / "d.npz", layout=1).classes == ("a", "b")


def test_npz_splits_agree_on_the_classes(tmp_path):
    arrays = {"train_images": np.zeros((5, 4, 4), np.uint8), "train_labels": np.arange(5)}
    arrays |= {"test_images": np.ones((2, 4, 4), np.uint8), "test_labels": np.array([0, 1])}
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    train, test = load(str(tmp_path / "d.npz")), load(str(tmp_path / "d.npz"), "test")
    assert (len(train), len(test)) == (5, 2)
    assert train.classes == test.classes == tuple("01234")
    assert test.images.min() == 1
    np.savez_compressed(tmp_path / "d.npz", **arrays, classes=np.array(["a", "b", "c", "d", "é"]))
    assert load(tmp_path / "d.npz").classes == ("a", "b", "c", "d", "é")


@pytest.mark.parametrize(
    ("arrays", "split", "message"),
    [
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2, int)}, "test", "no array 'test_images'"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "train", "no array 'labels'"),
        ({"train_images": np.zeros((2, 4, 4), np.uint8)}, "train", "no array 'train_labels'"),
        ({}, "train", "holds nothing"),
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "train", "images must be uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "train", "integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "train", "label -1"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**40])}, "train", "classes"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**64 - 1], np.uint64)}, "train", "large"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": np.zeros(2, int)}, "train", "channels"),
        ({"images": np.zeros((2, 5, 4, 7), np.uint8), "labels": np.zeros(2, int)}, "train", "channels"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "train", "no images"),
        (
            {"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, "x"], object)},
            "train",
            "bad.npz: labels: .*np.str_",
        ),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, split, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "bad.npz", split)
    assert "bad.npz: " in caught.value.what
    assert caught.value.remedy


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **({"images": np.zeros((6, 4, 4), np.uint8)} | arrays))
    return path


ONE_HOT = np.eye(4)[[2, 0, 1, 2, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.array([2, 0, 1, 2, 0, 1]), "012"),
        (np.array([[2], [0], [1], [2], [0], [1]], np.uint8), "012"),
        (ONE_HOT[:, :3], "012"),
        (ONE_HOT[:, :3].astype(bool), "012"),
        (ONE_HOT[:, :3].astype(np.int64), "012"),
        (np.array(["c", "a", "b", "c", "a", "b"]), "abc"),
        (np.array([b"c", b"a", b"b", b"c", b"a", b"b"]), "abc"),
    ],
)
def test_npz_labels_of_every_form(tmp_path, labels, classes):
    data = load(save(tmp_path / "x.npz", labels=labels))
    assert data.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert data.classes == tuple(classes)


@pytest.mark.parametrize("name", ["classes", "class_names"])
def test_npz_class_names(tmp_path, name):
    named = {name: np.array(["cat", "dog", "ant"])}
    labels = np.array([2, 0, 1, 2, 0, 1])
    assert load(save(tmp_path / "x.npz", labels=labels, **named)).classes == ("cat", "dog", "ant")
    texts = np.array(["ant", "cat", "dog", "ant", "cat", "dog"])
    assert load(save(tmp_path / "x.npz", labels=texts, **named)).labels.tolist() == labels.tolist()
    with pytest.raises(DataError, match="labels: 'cow' is not one of the classes"):
        load(save(tmp_path / "x.npz", labels=np.array([*texts[:5], "cow"]), **named))
    if name == "class_names":
        assert load(save(tmp_path / "x.npz", labels=labels, **named), layout=1).classes == ("0", "1", "2")


def test_npz_classes_of_one_name_cannot_be_trained_on(tmp_path):
    named = {"classes": np.array(["cat", "dog", "cat"]), "test_images": np.zeros((3, 4, 4), np.uint8)}
    path = save(tmp_path / "x.npz", labels=np.array([2, 0, 1, 2, 0, 1]), test_labels=np.arange(3), **named)
    with pytest.raises(DataError, match=r"x\.npz has more than one class called 'cat'"):
        load(path)
    assert load(path, "test").classes == ("cat", "dog", "cat")  # by their places they can be tested with
    assert load(path, layout=1).classes == ("cat", "dog", "cat")  # what version 0.1.0 trained goes on


@pytest.mark.parametrize("names", ["x_{} y_{}", "X_{} y_{}", "{}_images {}_labels"])
def test_npz_splits_by_their_usual_names(tmp_path, names):
    arrays = {}
    for n, split in enumerate(("train", "val", "test")):
        images, labels = names.replace("{}", split).split()
        arrays |= {
            images: np.full((2, 4, 4), n, np.uint8),
            labels: np.array(["b", "a"]) if n == 0 else np.array(["b"] * 2),
        }
    np.savez(tmp_path / "x.npz", **arrays)
    assert splits_of(tmp_path / "x.npz") == ("train", "val", "test")
    assert splits_of(tmp_path / "x.npz", layout=1) == ("train", "test")
    for n, split in enumerate(("train", "val", "test")):
        data = load(tmp_path / "x.npz", split)
        assert (data.images[0, 0, 0, 0], data.classes, data.labels[0]) == (n, ("a", "b"), 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(1, 7), "labels run from 1 to 6: class 0 has no training images; to number .* from 0: labels - 1"),
        (np.array([0, 1, 1, 3, 3, 3]), "labels run from 0 to 3: class 2 has no training images"),
        (np.array([0, 10, 20, 30, 40, 50]), r"45 of 51 classes \(1, 2, 3, …\) have no training images"),
        (ONE_HOT, "class 3 has no training images"),
    ],
)
def test_classes_without_images_are_announced(tmp_path, labels, message):
    with pytest.warns(UserWarning, match=message):
        load(save(tmp_path / "x.npz", labels=labels))


@pytest.mark.parametrize(
    ("arrays", "message", "remedy"),
    [
        ({"x_train": np.linspace(0, 1, 96).reshape(6, 4, 4)}, "x_train must be uint8", "np.rint(255 * x_train).astype"),
        ({"x_train": np.arange(96.0).reshape(6, 4, 4)}, "x_train must be uint8", "np.rint(x_train).astype(np.uint8)"),
        ({"x_train": np.arange(96).reshape(6, 4, 4)}, "x_train must be uint8", "x_train.astype(np.uint8)"),
        ({"x_train": np.arange(96.0).reshape(6, 4, 4) - 1}, "x_train must be uint8", "now from -1 to 94"),
        ({"x_train": np.zeros((6, 16), np.uint8)}, "have no axis of 1 or 3 or 4", "images.reshape(-1, 4, 4)"),
        ({"y_train": ONE_HOT * 0.5}, "y_train: row 0 is not one-hot", "argmax"),
        ({"y_train": np.ones((6, 3))}, "y_train: row 0 is not one-hot", "argmax"),
        ({"y_train": np.array([0, 1, 2, 0, 1, -1])}, "y_train: label -1 of image 5", "from 0"),
        ({"y_train": np.array([0.0, 1, 0, 1, 0, 1])}, "y_train must be integers", "astype(np.int64)"),
        ({"y_test": np.array(["a", "b"])}, "y_train are numbers, those of another split strings", "both"),
    ],
)
def test_what_is_wrong_in_an_npz_is_named(tmp_path, arrays, message, remedy):
    good = {"x_train": np.zeros((6, 4, 4), np.uint8), "y_train": np.array([0, 1, 2, 0, 1, 2])}
    np.savez(tmp_path / "x.npz", **(good | arrays))
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "x.npz")
    assert remedy in caught.value.remedy


def test_damaged_npz_files_raise_nothing_else(tmp_path):
    path = tmp_path / "d.npz"
    np.savez_compressed(path, images=toy().images, labels=toy().labels)
    whole = path.read_bytes()
    refused = 0
    for position, bit in zip(random_bits(Key(1), (300,)) % len(whole), random_bits(Key(2), (300,)) % 8, strict=True):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << int(bit)
        path.write_bytes(flipped)
        try:
            load(path)
        except DataError as error:
            refused += str(path) in error.what
    assert refused > 200
    others = [whole[: len(whole) // 2], b"", b"not an archive"]
    buffer = io.BytesIO()
    np.save(buffer, toy().images)
    for content in [*others, buffer.getvalue()]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"npz: (cannot be read|not a NumPy archive)"):
            load(path)


# ---- the loader ------------------------------------------------------------------------------------------------------


def epoch_of(loader: Loader, epoch: int = 0, start: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    batches = list(loader.batches(epoch, start))
    return [images for images, _ in batches], [labels for _, labels in batches]


def test_an_epoch_holds_every_image_once_standardised():
    data = load("digits")
    loader = Loader(data, 64, Key(0))
    images, labels = epoch_of(loader)
    assert len(images) == len(loader) == 60
    assert images[0].shape == (64, 1, 8, 8)
    assert images[-1].shape == (47, 1, 8, 8)
    assert images[0].dtype == np.float32
    assert labels[0].dtype == np.int64
    everything = np.concatenate(images)
    assert abs(everything.mean()) < 1e-5
    assert abs(everything.std() - 1) < 1e-5
    back = np.rint((everything * np.float32(data.std[0]) + np.float32(data.mean[0])) * 255).astype(np.uint8)
    keyed = sorted(zip(map(bytes, back.reshape(len(back), -1)), np.concatenate(labels).tolist(), strict=True))
    assert keyed == sorted(zip(map(bytes, data.images.reshape(len(data), -1)), data.labels.tolist(), strict=True))


def test_shuffling_depends_on_key_and_epoch_only():
    data, key = toy(50), Key(3)
    first = np.concatenate(epoch_of(Loader(data, 8, key))[0])
    assert np.array_equal(first, np.concatenate(epoch_of(Loader(data, 50, key))[0]))
    assert not np.array_equal(first, np.concatenate(epoch_of(Loader(data, 8, key), epoch=1)[0]))
    assert not np.array_equal(first, np.concatenate(epoch_of(Loader(data, 8, Key(4)))[0]))
    in_order = epoch_of(Loader(data, 8, key, shuffle=False))[1]
    assert np.array_equal(np.concatenate(in_order), data.labels)


@pytest.mark.parametrize("augment", [None, Affine()])
def test_starting_in_the_middle_gives_the_same_bits(augment):
    loader = Loader(load("digits", "test"), 100, Key(5), augment)
    images, labels = epoch_of(loader, epoch=2)
    assert {batch.dtype for batch in images} == {np.dtype(np.float32)}
    for start in (0, 1, 7, 17, 18):
        later_images, later_labels = epoch_of(Loader(loader.dataset, 100, Key(5), augment), epoch=2, start=start)
        assert len(later_images) == 18 - start
        assert all(np.array_equal(a, b) for a, b in zip(images[start:], later_images, strict=True))
        assert all(np.array_equal(a, b) for a, b in zip(labels[start:], later_labels, strict=True))


def test_augmentation_is_keyed_per_sample():
    data = load("digits", "test").subset(range(150))
    whole = np.concatenate(epoch_of(Loader(data, 150, Key(5), Affine(), shuffle=False))[0])
    for batch_size in (1, 7, 64):
        batches, _ = epoch_of(Loader(data, batch_size, Key(5), Affine(), shuffle=False))
        assert np.array_equal(whole, np.concatenate(batches))
    again = np.concatenate(epoch_of(Loader(data, 150, Key(5), Affine(), shuffle=False), epoch=1)[0])
    assert not (whole == again).all((1, 2, 3)).any()  # every image is changed anew in the next epoch


def test_a_validation_loader_uses_the_training_set_s_moments():
    data = toy(channels=3)
    moments = {"mean": (0, 0.5, 0), "std": (1, 1, 0.5)}
    images, _ = next(Loader(data, 10, Key(0), **moments, shuffle=False).batches(0))
    assert np.array_equal(images, standardize(data.images, **moments))
    expected = data.images / np.float32(255)
    np.testing.assert_allclose(images[:, 0], expected[:, 0], rtol=1e-6)
    np.testing.assert_allclose(images[:, 1], expected[:, 1] - 0.5, atol=1e-6)
    np.testing.assert_allclose(images[:, 2], expected[:, 2] * 2, rtol=1e-6)


def test_short_batches():
    data = toy(10)
    assert [len(labels) for labels in epoch_of(Loader(data, 4, Key(0)))[1]] == [4, 4, 2]
    assert [len(labels) for labels in epoch_of(Loader(data, 4, Key(0), drop_last=True))[1]] == [4, 4]
    assert [len(labels) for labels in epoch_of(Loader(data, 5, Key(0)))[1]] == [5, 5]
    assert [len(labels) for labels in epoch_of(Loader(data, 99, Key(0)))[1]] == [10]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"batch_size": 0}, ConfigError),
        ({"batch_size": -3}, ConfigError),
        ({"batch_size": 11, "drop_last": True}, DataError),
        ({"batch_size": 2, "mean": (0.5, 0.5, 0.5)}, DataError),
        ({"batch_size": 2, "std": (0.0,)}, DataError),
        ({"batch_size": 2, "std": (float("nan"),)}, DataError),
    ],
)
def test_a_loader_that_cannot_work_is_refused(arguments, error):
    with pytest.raises(error):
        Loader(toy(10), key=Key(0), **arguments)


@pytest.mark.parametrize("start", [-1, 4])
def test_a_start_beyond_the_epoch_is_refused_at_once(start):
    with pytest.raises(ConfigError, match="3 batches"):
        Loader(toy(10), 4, Key(0)).batches(0, start)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def scaled(data: Dataset) -> np.ndarray:
    return data.images.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 5, 9), (1, 1, 1, 1)])
def test_no_strength_no_change(shape):
    images = uniform(Key(0), shape)
    assert np.array_equal(Affine(0, 0, 0, 0)(images, uniform(Key(1), (shape[0], 6))), images)


def test_bilinear_against_a_plain_loop():
    images = uniform(Key(0), (2, 3, 4, 5))
    y, x = uniform(Key(1), (2, 40)) * 10 - 3, uniform(Key(2), (2, 40)) * 12 - 3  # inside, at the edge, far outside
    got = bilinear(images, y, x)
    assert got.shape == (2, 3, 40)
    for b in range(2):
        for p in range(40):
            expected = np.zeros(3)
            for i in range(4):
                for j in range(5):
                    weight = max(0.0, 1 - abs(float(y[b, p]) - i)) * max(0.0, 1 - abs(float(x[b, p]) - j))
                    expected += weight * images[b, :, i, j]
            np.testing.assert_allclose(got[b, :, p], expected, atol=1e-5)


def draws(**values: float) -> np.ndarray:
    """Numbers that ask for a signed share of each strength, and for nothing of the others."""
    order = ("degrees", "scale_y", "scale_x", "shear", "shift_y", "shift_x")
    return np.array([[values.get(name, 0.0) / 2 + 0.5 for name in order]], np.float32)


def test_augmentation_stays_in_float32(monkeypatch):
    images, u = np.ones((2, 3, 8, 8), np.float32), np.full((2, Affine.draws), 0.3, np.float32)
    points = []

    def look(images, y, x):
        points.extend((y, x))
        return bilinear(images, y, x)

    monkeypatch.setattr("minivit.data.augment.bilinear", look)
    changed = Affine()(images, u)
    assert [a.dtype for a in (changed, *points)] == [np.float32] * 3


def test_a_whole_pixel_s_shift_moves_the_image():
    image = uniform(Key(0), (1, 1, 4, 6))
    moved = Affine(0, 0, 0, shift=2.0)(
        image, draws(shift_y=0.5, shift_x=-0.5)
    )  # shows the point 1 below, 1 to the left
    expected = np.zeros_like(image)
    expected[:, :, :-1, 1:] = image[:, :, 1:, :-1]
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_a_quarter_turn_is_rot90():
    image = uniform(Key(0), (1, 2, 5, 5))
    turned = Affine(180, 0, 0, 0)(image, draws(degrees=0.5))
    assert any(np.allclose(turned, np.rot90(image, k, (2, 3)), atol=1e-5) for k in (1, 3))
    back = Affine(180, 0, 0, 0)(turned, draws(degrees=-0.5))
    np.testing.assert_allclose(back, image, atol=1e-5)


def test_scale_and_shear_move_what_they_should():
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32)[:, None] - 4, (1, 1, 9, 9))  # the value is y from the centre
    scaled_down = Affine(0, np.log(2), 0, 0)(ramp, draws(scale_y=-1))
    np.testing.assert_allclose(scaled_down, ramp / 2, atol=1e-5)
    assert np.array_equal(Affine(0, np.log(2), 0, 0)(ramp, draws(scale_x=-1)), ramp)
    columns = ramp.swapaxes(2, 3)  # the value is x
    np.testing.assert_allclose(Affine(0, np.log(2), 0, 0)(columns, draws(scale_x=-1)), columns / 2, atol=1e-5)
    sheared = Affine(0, 0, 0.25, 0)(columns, draws(shear=1))[0, 0, 3:6, 3:6]
    np.testing.assert_allclose(sheared, (columns + 0.25 * ramp)[0, 0, 3:6, 3:6], atol=1e-5)


def test_the_default_is_light():
    digits = load("digits", "test").subset(range(500))
    images = scaled(digits)
    changed = Affine()(images, uniform(Key(3), (500, Affine.draws)))
    assert changed.dtype == np.float32
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-6
    assert abs(changed.mean() / images.mean() - 1) < 0.05
    assert np.corrcoef(changed.ravel(), images.ravel())[0, 1] > 0.85
    assert Affine().shift <= 0.5


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_makes_no_sense_is_refused(strength):
    with pytest.raises(ConfigError, match="negative or not finite"):
        Affine(degrees=strength)


# ---- floors ----------------------------------------------------------------------------------------------------------


def test_the_import_is_light_and_knows_no_models():
    code = "import sys, minivit.data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "minivit.data.loader" in loaded
    assert not {"PIL", "cupy", "minivit.autograd", "minivit.nn", "minivit.models"} & loaded
