"""Augmentation: against plain loops and Pillow, and that an image's numbers alone say what happens to it."""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

import minivit
from minivit.backend import Key, uniform
from minivit.data.augment import Affine, Chain, Crop, Flip, RandomErasing, RandomResizedCrop, bilinear
from minivit.data.colour import ColorJitter, brightness, contrast, saturation
from minivit.data.mixing import Mix, beta_quantile
from minivit.data.randaugment import OPERATIONS, RandAugment
from minivit.errors import ConfigError

ROOT = Path(minivit.__file__).parent.parent
BYTE = 1 / 255


def photos(count: int = 20, channels: int = 3, height: int = 16, width: int = 20) -> np.ndarray:
    """Return bytes / 255, float32, of images with smooth parts, flat parts and noise."""
    x = uniform(Key(0), (count, channels, height // 4, width // 4)).repeat(4, 2).repeat(4, 3)
    x = x + 0.3 * uniform(Key(1), x.shape) + np.linspace(-0.3, 0.3, width)
    return np.rint(x.clip(0, 1) * 255).astype(np.float32) / np.float32(255)


def as_picture(image: np.ndarray) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def as_array(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture).astype(np.float32) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


# ---- what holds of every augmentation --------------------------------------------------------------------------------

EVERY = [
    Chain(()),
    Flip(),
    Crop(4),
    Crop(0),
    Crop(30),
    Affine(),
    RandomResizedCrop(),
    ColorJitter(),
    RandomErasing(1.0),
    RandomErasing(),
    RandAugment(),
    RandAugment(5, 10, fill=0.0),
    Chain((Crop(2), Flip(), RandAugment(), ColorJitter(), RandomErasing(0.5))),
]
each = pytest.mark.parametrize("augment", EVERY, ids=[f"{i}-{type(a).__name__}" for i, a in enumerate(EVERY)])


@each
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_image_s_own_numbers_say_what_happens_to_it(augment, channels):
    images, u = photos(60, channels), uniform(Key(2), (60, augment.draws))
    before = images.copy()
    whole = augment(images, u)
    assert (whole.shape, whole.dtype) == (images.shape, np.float32)
    assert whole.min() >= -1e-6 and whole.max() <= 1 + 1e-6
    assert np.array_equal(images, before)
    for parts in (60, 9, 2):
        pieces = zip(np.array_split(images, parts), np.array_split(u, parts), strict=True)
        assert np.array_equal(np.concatenate([augment(*piece) for piece in pieces]), whole)
    backwards = augment(images[::-1], u[::-1])  # not contiguous, either
    assert np.array_equal(backwards[::-1], whole)


@each
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 3, 2, 5), (0, 3, 8, 8)])
def test_images_of_any_size_will_do(augment, shape):
    for extreme in (0.0, 0.5, 1 - 2.0**-24):
        changed = augment(np.full(shape, 0.5, np.float32), np.full((shape[0], augment.draws), extreme, np.float32))
        assert changed.shape == shape
        assert np.isfinite(changed).all()


def test_a_chain_is_its_steps_each_with_its_numbers():
    images, u = photos(), uniform(Key(3), (20, 7))
    chain = Chain((Crop(3), RandomResizedCrop(), Flip()))
    assert chain.draws == 7
    assert np.array_equal(chain(images, u), Flip()(RandomResizedCrop()(Crop(3)(images, u[:, :2]), u[:, 2:6]), u[:, 6:]))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Crop(-1),
        lambda: RandomResizedCrop(0.0),
        lambda: RandomResizedCrop(1.1),
        lambda: RandomResizedCrop(ratio=(2, 1)),
        lambda: RandomResizedCrop(ratio=(0, 1)),
        lambda: ColorJitter(brightness=-0.1),
        lambda: ColorJitter(saturation=1.1),
        lambda: ColorJitter(contrast=float("nan")),
        lambda: RandomErasing(1.1),
        lambda: RandomErasing(area=(0.5, 0.1)),
        lambda: RandomErasing(area=(0.5, 1.1)),
        lambda: RandomErasing(ratio=(1, float("inf"))),
        lambda: RandAugment(-1),
        lambda: RandAugment(magnitude=11),
        lambda: RandAugment(noise=-1),
        lambda: RandAugment(fill=2),
        lambda: Mix(mixup=-0.1),
        lambda: Mix(mixup=0, cutmix=0),
        lambda: Mix(cutmix=1e6),
        lambda: Mix(prob=1.5),
        lambda: Mix(switch=float("nan")),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError) as caught:
        wrong()
    assert caught.value.remedy


# ---- crops, flips, erasing, against plain loops ----------------------------------------------------------------------


def test_a_crop_shifts_by_whole_pixels():
    images, u = photos(250, 1, 8, 12), uniform(Key(4), (250, 2))
    changed, seen = Crop(2)(images, u), set()
    for image, got, numbers in zip(images, changed, u, strict=True):
        down, right = (2 - int(5 * float(x)) for x in numbers)
        expected = np.zeros_like(image)
        for y in range(8):
            for x in range(12):
                if 0 <= y - down < 8 and 0 <= x - right < 12:
                    expected[0, y, x] = image[0, y - down, x - right]
        assert np.array_equal(got, expected)
        seen.add((down, right))
    assert len(seen) == 25  # every shift there is


def test_a_flip_swaps_left_and_right_of_half_of_the_images():
    images, u = photos(2000, 1, 4, 8), uniform(Key(5), (2000, 1))
    changed = Flip()(images, u)
    mirrored = [np.array_equal(a, b[:, :, ::-1]) for a, b in zip(changed, images, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(changed, images, strict=True)]
    assert np.all(np.array(mirrored) != np.array(same))
    assert abs(sum(mirrored) / 2000 - 0.5) < 0.04


def test_a_resized_crop_against_pillow_s():
    images, u = photos(40, 3, 24, 32), uniform(Key(6), (40, 4))
    changed, areas = RandomResizedCrop(0.2)(images, u), []
    for image, got, (a, r, top, left) in zip(images, changed, u.astype(float), strict=True):
        area, ratio = (0.2 + 0.8 * a) * 24 * 32, np.exp(np.log(3 / 4) + r * np.log(16 / 9))
        w, h = min(32, np.sqrt(area * ratio)), min(24, np.sqrt(area / ratio))
        x, y = left * (32 - w), top * (24 - h)
        for channel in range(3):
            plane = Image.fromarray(image[channel])  # Pillow's mode F: no bytes
            box = (w / 32, 0, x, 0, h / 24, y)
            expected = np.asarray(plane.transform((32, 24), Image.Transform.AFFINE, box, Image.Resampling.BILINEAR))
            np.testing.assert_allclose(got[channel], expected, atol=2e-4)
        areas.append(w * h / (24 * 32))
    assert min(areas) < 0.3 and max(areas) > 0.9


def test_the_whole_image_is_a_resized_crop_of_area_1():
    images = photos(4, 1, 12, 12)
    unchanged = RandomResizedCrop(1.0, (1.0, 1.0))(images, uniform(Key(7), (4, 4)))
    np.testing.assert_allclose(unchanged, images, atol=1e-6)


def test_erasing_puts_noise_in_a_rectangle_of_some_images():
    images, u = np.full((2000, 3, 20, 30), 2.0, np.float32), uniform(Key(8), (2000, 6))  # 2 is no noise
    changed = RandomErasing(0.3, (0.1, 0.2))(images, u)
    erased = changed < 1.5
    areas, noise, places = [], [], np.zeros((20, 30))
    for image, mask, numbers in zip(changed, erased, u, strict=True):
        assert mask.any() == (numbers[0] < np.float32(0.3))
        if mask.any():
            rows, columns = np.flatnonzero(mask[0].any(1)), np.flatnonzero(mask[0].any(0))
            h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert mask.sum() == 3 * h * w  # all of a rectangle, in every channel
            assert 0.3 * 0.75 < w / h < 1 / (0.3 * 0.75)  # whole pixels
            areas.append(h * w / 600)
            noise.append(image[mask])
            places += mask[0]
    assert 500 < len(areas) < 700
    assert min(areas) > 0.08 and max(areas) < 0.23 and abs(np.mean(areas) - 0.15) < 0.01
    values = np.concatenate(noise)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.005 and abs(values.var() - 1 / 12) < 0.002
    assert len({part[:5].tobytes() for part in noise}) == len(noise)  # another image, other noise
    assert (places > 0).all()  # no pixel is safe
    unchanged = changed[u[:, 0] >= np.float32(0.3)]
    assert (unchanged == 2).all()


# ---- colours, against Pillow's bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("change", "enhancer"),
    [(brightness, ImageEnhance.Brightness), (contrast, ImageEnhance.Contrast), (saturation, ImageEnhance.Color)],
)
def test_factors_against_pillow(change, enhancer, factor, channels):
    images = photos(channels=channels)
    changed = change(images, np.full((20, 1, 1, 1), factor, np.float32))
    for image, got in zip(images, changed, strict=True):
        expected = as_array(enhancer(as_picture(image)).enhance(factor))
        assert np.abs(got - expected).max() < 1.6 * BYTE  # it rounds the grey, and cuts off the result's fraction


def test_jitter_is_brightness_then_contrast_then_saturation():
    images, u = photos(channels=4), uniform(Key(9), (20, 3))
    factors = (1 + np.float32([0.1, 0.2, 0.3]) * (2 * u - 1))[:, :, None, None, None]
    expected = saturation(contrast(brightness(images[:, :3], factors[:, 0]), factors[:, 1]), factors[:, 2])
    changed = ColorJitter(0.1, 0.2, 0.3)(images, u)
    np.testing.assert_allclose(changed[:, :3], expected, atol=1e-6)
    assert np.array_equal(changed[:, 3], images[:, 3])
    np.testing.assert_allclose(ColorJitter(0, 0, 0)(images, u), images, atol=1e-6)


# ---- RandAugment -----------------------------------------------------------------------------------------------------


def numbers_for(operation: str, sign: int, count: int) -> np.ndarray:
    """Return numbers that choose an operation of one layer, apply it that way, and add no noise to its level."""
    which = (OPERATIONS.index(operation) + 0.5) / len(OPERATIONS)
    return np.tile(np.float32([which, {-1: 0.1, 0: 0.7, 1: 0.3}[sign], 0, 0]), (count, 1))


def with_pillow(operation: str, sign: int, level: float, picture: Image.Image) -> Image.Image:
    """Return what the bytes of ``picture`` become: the published operation at its published strength."""

    def moved(a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
        fill = 128 if picture.mode == "L" else (128, 128, 128)
        return picture.transform(
            picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=fill
        )

    width, height = picture.size
    factor = 1 + sign * 0.9 * level
    added = [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)]
    return {
        "auto contrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "invert": lambda: ImageOps.invert(picture),
        "posterize": lambda: ImageOps.posterize(picture, max(1, 4 - int(4 * level))),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(256 * level)),
        "solarize add": lambda: picture.point(added * len(picture.getbands())),
        "color": lambda: ImageEnhance.Color(picture).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(picture).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(picture).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(picture).enhance(factor),
        "rotate": lambda: picture.rotate(
            sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=128 if picture.mode == "L" else (128, 128, 128)
        ),
        "shear y": lambda: moved(d=sign * 0.3 * level),
        "shear x": lambda: moved(b=sign * 0.3 * level),
        "translate y": lambda: moved(f=sign * 0.45 * level * height),
        "translate x": lambda: moved(c=sign * 0.45 * level * width),
    }[operation]()  # fmt: skip


TOLERANCE = {  # of a byte: 0.5 where the bytes are the same
    "equalize": 0.01, "invert": 0.01, "posterize": 0.01, "solarize": 0.01, "auto contrast": 1.01, "solarize add": 1.01,
    "color": 1.6, "contrast": 1.6, "brightness": 1.01, "sharpness": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("magnitude", [3, 9, 10])
@pytest.mark.parametrize("operation", OPERATIONS[:10])
def test_colour_operations_against_pillow(operation, magnitude, channels):
    images = photos(8, channels, 32, 40)
    for sign in (-1, 1):
        changed = RandAugment(1, magnitude)(images, numbers_for(operation, sign, 8))
        for image, got in zip(images, changed, strict=True):
            picture = as_picture(image[:3])
            expected = as_array(with_pillow(operation, sign, magnitude / 10, picture))
            assert np.abs(got[:3] - expected).max() < TOLERANCE[operation] * BYTE
            assert np.array_equal(got[3:], image[3:])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [0, 4, 9])
@pytest.mark.parametrize("operation", OPERATIONS[10:])
def test_moves_against_pillow(operation, magnitude, channels):
    """Pillow does not blend with what is outside: the line along the border may differ."""
    images = photos(5, channels, 24, 40)
    for sign in (-1, 1):
        numbers = numbers_for(operation, sign, 5)
        changed = RandAugment(1, magnitude, fill=128 / 255)(images, numbers)
        inside = RandAugment(1, magnitude, fill=0.0)(np.ones_like(images), numbers)  # the share of a pixel from inside
        clear = (inside < 1e-5) | (inside > 1 - 1e-5)
        assert clear.mean() > 0.9
        for image, got, sure in zip(images, changed, clear, strict=True):
            expected = as_array(with_pillow(operation, sign, magnitude / 10, as_picture(image)))
            assert np.abs(got - expected)[sure].max() < 1.6 * BYTE
    assert magnitude == 0 or np.abs(changed - images).max() > 0.1


def test_an_operation_comes_with_probability_half_and_every_one_as_often():
    count = 4000
    image = 0.1 + 0.7 * photos(1, 3, 32, 32)  # that auto contrast changes, too
    images, u = np.repeat(image, count, 0), uniform(Key(10), (count, 4))
    changed = RandAugment(1, noise=0.0)(images, u)
    untouched = np.array([np.array_equal(x, image[0]) for x in changed])
    assert abs(untouched.mean() - 0.5) < 0.03
    kinds = collections.Counter(x.tobytes() for x in changed[~untouched])
    # six operations have one direction, nine have two
    assert len(kinds) == 6 + 2 * 9
    expected = count / 2 / len(OPERATIONS)
    assert all(min(abs(n - expected), abs(n - expected / 2)) < 5 * expected**0.5 for n in kinds.values())


def test_a_quarter_each_way():
    images, u = photos(6), np.repeat(numbers_for("brightness", 1, 1), 6, 0)
    u[:, 1] = 0, 0.249, 0.25, 0.499, 0.5, 0.999
    means = (RandAugment(1)(images, u) - images).mean((1, 2, 3))
    assert (means[:2] < 0).all() and (means[2:4] > 0).all() and (means[4:] == 0).all()


def test_the_level_is_normal_about_the_magnitude():
    count = 4000
    u = np.concatenate([numbers_for("translate x", 1, count)[:, :2], uniform(Key(11), (count, 2))], 1)
    ramp = np.broadcast_to(np.linspace(0, 1, 101, dtype=np.float32), (count, 1, 1, 101))
    shift = RandAugment(1, 5, noise=0.5)(ramp, u)[:, 0, 0, 0]  # the value at the left edge is what was moved there
    level = shift * 100 / (0.45 * 101)
    assert abs(level.mean() - 0.5) < 0.005 and abs(level.std() - 0.05) < 0.003
    assert abs(((level - 0.5) / 0.05 > 1).mean() - 0.159) < 0.02
    cut = RandAugment(1, 10, noise=5)(ramp, u)[:, 0, 0, 0]
    assert cut.max() * 100 / (0.45 * 101) < 1.001


def test_layers_follow_each_other():
    images, u = photos(), uniform(Key(12), (20, 8))
    one, two = RandAugment(1), RandAugment(2)
    assert two.draws == 8
    assert np.array_equal(two(images, u), one(one(images, u[:, :4]), u[:, 4:]))
    assert np.array_equal(RandAugment(0)(images, u[:, :0]), images)


def test_what_is_moved_in_is_the_fill():
    images = photos(2)
    for fill in (0.0, 0.25, 1.0):
        moved = RandAugment(1, 10, fill=fill)(images, numbers_for("translate y", 1, 2))
        assert (moved[:, :, -5:] == np.float32(fill)).all()
    assert (bilinear(images, np.full((2, 1), -9, np.float32), np.zeros((2, 1), np.float32), 0.75) == 0.75).all()


# ---- mixing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 1.5, 2.0, 10.0, 100.0])
def test_beta_by_its_moments(alpha):
    x = beta_quantile(alpha, (np.arange(200_000, dtype=np.float64) + 0.5) / 200_000)
    assert x.dtype == np.float32
    assert x.min() >= 0 and x.max() <= 1
    assert (np.diff(x) >= 0).all()
    assert abs(x.mean(dtype=np.float64) - 0.5) < 1e-6  # symmetric
    moment = 1.0
    for order in range(1, 7):
        moment *= (alpha + order - 1) / (2 * alpha + order - 1)  # E x^k = Π (α + i) / (2α + i)
        np.testing.assert_allclose((x.astype(np.float64) ** order).mean(), moment, rtol=2e-4)


def test_beta_where_its_distribution_is_known():
    u = uniform(Key(13), (10_000,)).astype(np.float64)
    u[:4] = 0, 2.0**-24, 0.5, 1 - 2.0**-24
    np.testing.assert_allclose(beta_quantile(1.0, u), u, atol=1e-7)
    np.testing.assert_allclose(beta_quantile(0.5, u), np.sin(np.pi / 2 * u) ** 2, rtol=1e-4, atol=1e-7)
    x = beta_quantile(2.0, u).astype(np.float64)
    np.testing.assert_allclose(3 * x**2 - 2 * x**3, u, atol=1e-6)
    tiny = beta_quantile(0.5, np.float32([2.0**-24, 2.0**-20]))
    np.testing.assert_allclose(tiny, (np.pi / 2 * np.array([2.0**-24, 2.0**-20])) ** 2, rtol=1e-3)  # exact near 0


def test_mixup_is_a_weighted_mean():
    images, partners, u = photos(300), photos(300)[::-1], uniform(Key(14), (300, 4))
    mixed, weight = Mix(0.3, 0)(images, partners, u)
    assert mixed.dtype == weight.dtype == np.float32
    assert np.array_equal(weight, beta_quantile(0.3, u[:, 1]))
    w = weight[:, None, None, None]
    np.testing.assert_allclose(mixed, w * images + (1 - w) * partners, atol=1e-6)


def test_cutmix_pastes_a_rectangle_and_counts_its_pixels():
    count = 800
    images, partners = np.zeros((count, 2, 20, 30), np.float32), np.ones((count, 2, 20, 30), np.float32)
    u = uniform(Key(15), (count, 4))
    mixed, weight = Mix(0, 1.0)(images, partners, u)
    assert set(np.unique(mixed)) == {0.0, 1.0}
    for image, kept, (_, beta, y, x) in zip(mixed, weight, u.astype(float), strict=True):
        assert abs(kept - (1 - image[0].mean())) < 1e-6
        assert np.array_equal(image[0], image[1])
        h, w = 20 * np.sqrt(1 - beta), 30 * np.sqrt(1 - beta)
        expected = np.zeros((20, 30))
        top, bottom, left, right = (round(v) for v in (y * 20 - h / 2, y * 20 + h / 2, x * 30 - w / 2, x * 30 + w / 2))
        for i in range(max(0, top), min(20, bottom)):
            for j in range(max(0, left), min(30, right)):
                expected[i, j] = 1
        assert np.array_equal(image[0], expected)
    assert (weight > 1 - u[:, 1]).any()  # where the border cut something off, more is left than λ says
    assert mixed[:, 0].any(0).all()  # every pixel is pasted over some time


def test_a_coin_decides_whether_and_which():
    u = uniform(Key(16), (4000, 4))
    zeros, ones = np.zeros((4000, 1, 16, 16), np.float32), np.ones((4000, 1, 16, 16), np.float32)

    def kinds(mix: Mix) -> tuple[float, float]:
        """Return the shares of all images that mixup and cutmix change."""
        rows = mix.chosen(u)
        mixed, _ = mix(zeros[rows], ones[rows], u[rows])
        binary = ((mixed == 0) | (mixed == 1)).all((1, 2, 3))
        return (~binary).sum() / 4000, binary.sum() / 4000

    np.testing.assert_allclose(kinds(Mix()), (0.5, 0.5), atol=0.03)
    np.testing.assert_allclose(kinds(Mix(prob=0.5)), (0.25, 0.25), atol=0.03)
    np.testing.assert_allclose(kinds(Mix(switch=0.2)), (0.8, 0.2), atol=0.03)
    np.testing.assert_allclose(kinds(Mix(cutmix=0, switch=1)), (1, 0), atol=0.01)
    np.testing.assert_allclose(kinds(Mix(mixup=0, switch=0, prob=0.5)), (0, 0.5), atol=0.03)
    assert len(Mix(prob=0).chosen(u)) == 0


def test_mixing_depends_on_the_pair_s_own_numbers():
    images, partners, u = photos(90), photos(90)[::-1], uniform(Key(17), (90, 4))
    copies = images.copy()
    mixed, weight = Mix()(images, partners, u)
    parts = [Mix()(images[i : i + 7], partners[i : i + 7], u[i : i + 7]) for i in range(0, 90, 7)]
    assert np.array_equal(np.concatenate([x for x, _ in parts]), mixed)
    assert np.array_equal(np.concatenate([w for _, w in parts]), weight)
    assert np.array_equal(images, copies)


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_prints_a_row_for_each(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["--size", "8", "--batch", "8", "--images", "16", "--repeats", "1"]
    script = [sys.executable, str(ROOT / "benchmarks" / "augment.py"), *words]
    printed = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    rates = re.findall(r"^\| .+ \| ([\d,]+) \|$", printed, re.MULTILINE)
    assert len(rates) == 9
    assert all(int(rate.replace(",", "")) > 0 for rate in rates)
