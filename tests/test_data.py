"""Data sets, the loader, augmentation, and the reading of image files."""

from __future__ import annotations

import csv
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, random_bits, uniform
from minivit.data import Affine, Dataset, Loader, load, read_image, standardize
from minivit.data import images as images_module
from minivit.data.augment import bilinear
from minivit.errors import ConfigError, DataError

FIXTURES = Path(os.environ.get("MINIVIT_IMAGE_FIXTURES", "no such folder"))  # odd files of Pillow's own test suite


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
    rest, held = data.split_off(0.1, Key(1))
    assert len(held) == 382
    assert sorted([*rest.labels, *held.labels]) == list(range(len(data)))
    assert np.array_equal(data.split_off(0.1, Key(1))[1].labels, held.labels)
    assert not np.array_equal(data.split_off(0.1, Key(2))[1].labels, held.labels)
    assert held.labels.tolist() == sorted(held.labels)  # in the data's order
    assert abs(held.labels.mean() / len(data) - 0.5) < 0.1  # from all over it


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 2.0, 0.01, 0.99, float("nan")])
def test_split_off_refuses_an_empty_part(fraction):
    with pytest.raises(DataError, match="hold out"):
        toy().split_off(fraction, Key(0))


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("digit", "train", "did you mean 'digits'"),
        ("no-such-data", "train", "known: digits"),
        ("digits", "tset", "did you mean 'test'"),
        ("missing.npz", "train", "no such file"),
        (".", "train", "not a NumPy archive"),
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


def test_npz_splits_agree_on_the_classes(tmp_path):
    arrays = {"train_images": np.zeros((3, 4, 4), np.uint8), "train_labels": np.array([0, 1, 4])}
    arrays |= {"test_images": np.ones((2, 4, 4), np.uint8), "test_labels": np.array([0, 1])}
    np.savez_compressed(tmp_path / "d.npz", **arrays)
    train, test = load(str(tmp_path / "d.npz")), load(str(tmp_path / "d.npz"), "test")
    assert (len(train), len(test)) == (3, 2)
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
        ({"images": np.zeros((2, 4, 4)), "labels": np.zeros(2, int)}, "train", "uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(2)}, "train", "integers"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "train", "label -1"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**40])}, "train", "classes"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, 2**64 - 1], np.uint64)}, "train", "large"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": np.zeros(2, int)}, "train", "channels"),
        ({"images": np.zeros((2, 5, 4, 7), np.uint8), "labels": np.zeros(2, int)}, "train", "channels"),
        ({"images": np.zeros((0, 4, 4), np.uint8), "labels": np.zeros(0, int)}, "train", "no images"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, "x"], object)}, "train", "cannot be read"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, split, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "bad.npz", split)
    assert "bad.npz: " in caught.value.what
    assert caught.value.remedy


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


# ---- image files -----------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


PIXELS = (random_bits(Key(9), (6, 4, 3)) >> 24).astype(np.uint8)  # (H, W, 3)
GREY = PIXELS[:, :, 0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_without_loss(kind):
    stream = saved(Image.fromarray(PIXELS), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(read_image(stream, (6, 4), 3), PIXELS.transpose(2, 0, 1))


def test_paths_and_streams_give_the_same(tmp_path):
    (tmp_path / "x.dat").write_bytes(saved(Image.fromarray(GREY)).getvalue())  # by content, not by name
    from_path = read_image(tmp_path / "x.dat", (6, 4), 1)
    assert from_path.dtype == np.uint8
    assert np.array_equal(from_path, GREY[None])
    assert np.array_equal(from_path, read_image(saved(Image.fromarray(GREY)), (6, 4), 1))


@pytest.mark.parametrize(
    ("orientation", "store"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, 1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, lambda x: np.rot90(x, -1)),
        (9, lambda x: x),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_is_applied(orientation, store, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store(GREY)))
    assert np.array_equal(read_image(saved(stored, kind, exif=exif), (6, 4), 1)[0], GREY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    deep = np.array([[0, 257, 256, 32896, 65535, 128, 129]], np.uint16)
    by_hand = io.BytesIO(b"P5 7 1 65535\n" + deep.astype(">u2").tobytes())  # older Pillows cannot write it
    stream = by_hand if kind == "PPM" else saved(Image.fromarray(deep), kind)
    assert read_image(stream, (1, 7), 1).ravel().tolist() == [0, 1, 1, 128, 255, 0, 1]


def test_transparent_is_white():
    alpha = np.array([[0, 255], [128, 0]], np.uint8)
    grey = np.full((2, 2), 100, np.uint8)
    la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    assert read_image(saved(la), (2, 2), 1).ravel().tolist() == [255, 100, 177, 255]
    rgba = la.convert("RGBA")
    assert read_image(saved(rgba), (2, 2), 3).reshape(3, 4).tolist() == [[255, 100, 177, 255]] * 3
    deep = saved(Image.fromarray(np.array([[0, 65535, 257]], np.uint16)), transparency=0)
    assert read_image(deep, (1, 3), 1).ravel().tolist() == [255, 255, 1]


def test_palette_one_bit_cmyk_and_animation():
    palette = Image.fromarray(PIXELS).quantize(24)
    assert np.array_equal(read_image(saved(palette), (6, 4), 3), np.array(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(read_image(saved(bits), (6, 4), 1)[0], np.where(GREY > 127, 255, 0))
    ink = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert read_image(saved(ink, "TIFF"), (2, 2), 3)[:, 0, 0].tolist() == [255, 0, 0]
    frames = [Image.new("L", (3, 3), grey) for grey in (10, 200)]
    assert (read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]), (3, 3), 1) == 10).all()


def test_grey_is_luma():
    assert read_image(saved(Image.new("RGB", (2, 2), (255, 0, 0))), (2, 2), 1)[0, 0, 0] == 76  # 0.299 · 255


def test_shrinking_averages_areas():
    bitmap = random_bits(Key(4), (32, 32)) > 2**31  # as the digits were made: 4 × 4 points to a pixel
    small = read_image(saved(Image.fromarray(bitmap)), (8, 8), 1)[0]
    expected = bitmap.reshape(8, 4, 8, 4).mean((1, 3)) * 255
    assert np.abs(small - expected).max() <= 1
    assert read_image(saved(Image.fromarray(GREY)), (12, 2), 3).shape == (3, 12, 2)


def png_claiming(width: int, height: int) -> io.BytesIO:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND"]
    framed = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + framed)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: "no/such/file.png", "file.png: no such file"),
        (lambda: ".", "cannot be read"),
        (lambda: io.BytesIO(b""), "not an image"),
        (lambda: io.BytesIO(b"GIF89a nonsense"), "image"),
        (lambda: saved(Image.fromarray(GREY), "TGA"), "not an image"),  # Pillow could, but it is not on the list
        (lambda: io.BytesIO(saved(Image.fromarray(PIXELS)).getvalue()[:60]), "cannot be read"),
        (lambda: png_claiming(10_000, 5_001), "50 megapixels"),
        (lambda: png_claiming(10_000, 5_000), "cannot be read"),  # small enough to be decoded, but damaged
        (lambda: png_claiming(2**30, 2**30), "image"),
        (lambda: saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "no fixed range"),
        (lambda: saved(Image.fromarray(np.ones((2, 2), np.int32)), "TIFF"), "no fixed range"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(source, message):
    with pytest.raises(DataError, match=message) as caught:
        read_image(source(), (8, 8), 1)
    assert caught.value.remedy


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channels_are_refused(channels):
    with pytest.raises(DataError, match=f"not {channels}"):
        read_image(saved(Image.fromarray(GREY)), (8, 8), channels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_image_files_raise_nothing_else(kind):
    whole = saved(Image.fromarray(np.tile(PIXELS, (5, 5, 1))), kind).getvalue()
    places = random_bits(Key(1), (60,)) % len(whole)
    for i, position in enumerate(places.tolist()):
        broken = whole[:position] + bytes([random_bits(Key(2), (1,), start=i)[0] & 255]) + whole[position + 1 :]
        for content in (broken, whole[:position]):
            try:
                assert read_image(io.BytesIO(content), (8, 8), 3).shape == (3, 8, 8)
            except DataError as error:
                assert error.what


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="MINIVIT_IMAGE_FIXTURES names no folder of odd image files")
def test_odd_files_give_the_right_picture_or_a_typed_error():
    with open(FIXTURES / "MANIFEST.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    refused = set()
    for row in rows:
        width, height = map(int, (row["size"] or "8x8").split("x"))
        size = (width, height) if row["orientation"] in ("5", "6", "8") else (height, width)
        try:
            picture = read_image(FIXTURES / row["file"], size, 3)
        except DataError as error:
            assert row["file"] in str(error)
            refused.add(row["file"])
            continue
        differs = row["file"] in {"hopper_16bit.pgm", "12in16bit.tif"}  # which Pillow's own conversion clips
        if row["mode"] in ("RGB", "L", "CMYK") and not differs and "trns" not in row["file"]:
            assert abs(picture.mean() - float(row["rgb_mean"])) < 0.01, row["file"]
    assert len(rows) == 60
    broken = {row["file"] for row in rows if row["load"] != "ok"} | {"broken_data_stream.png"}
    assert refused == broken
    deep = read_image(FIXTURES / "hopper_16bit.pgm", (128, 128), 1).astype(int)
    assert np.abs(deep - read_image(FIXTURES / "hopper_8bit.pgm", (128, 128), 1)).max() <= 1


# ---- floors ----------------------------------------------------------------------------------------------------------


def test_the_import_is_light_and_knows_no_models():
    code = "import sys, minivit.data; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "minivit.data.loader" in loaded
    assert not {"PIL", "cupy", "minivit.autograd", "minivit.nn", "minivit.models"} & loaded
