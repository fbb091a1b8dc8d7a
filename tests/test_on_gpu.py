"""Batches made on a GPU: the CPU's pictures, without waiting, whichever way the images get there."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit.backend import Key, SideStream, packed_to, random_bits, side_stream, to_numpy, uniform, uniform_at
from minivit.backend import uniform_rows as rows_of
from minivit.data import Dataset, Loader, on_gpu, standardize
from minivit.data import loader as loader_module
from minivit.data.augment import Affine, Chain, Crop, Flip, RandomErasing, RandomResizedCrop
from minivit.data.colour import ColorJitter
from minivit.data.file_array import ImageFiles
from minivit.data.mixing import Mix
from minivit.data.randaugment import OPERATIONS, RandAugment
from minivit.errors import DataError
from minivit.train.identity import plain
from minivit.train.optim import AdamW
from tests import streams, strict
from tests.test_augment import EVERY, numbers_for, photos

any_cupy = strict.any_cupy

CIFAR = Chain((Crop(4), Flip()))
FULL = Chain((RandomResizedCrop(0.5), Crop(2), Flip(), Affine(), RandAugment(), ColorJitter(), RandomErasing(0.5)))
MIXES = [None, Mix(), Mix(prob=0.5), Mix(cutmix=0), Mix(mixup=0), Mix(prob=0)]
CLASSES = ("a", "b", "c", "d")


def toy(count: int = 60, channels: int = 3, height: int = 8, width: int = 10) -> Dataset:
    """Return images of noise, some of them dark, some of one value."""
    pixels = (random_bits(Key(7), (count, channels, height, width)) >> 24).astype(np.uint8)
    pixels[::3] //= 4
    pixels[1::5] = 100
    return Dataset(pixels, np.arange(count) % 4, CLASSES, "toy")


def assert_same(found, expected) -> None:
    """Compare batches on a GPU with the CPU's: as many, labels to the bit, pictures to 1e-5."""
    pairs = list(itertools.zip_longest(expected, found))
    for (images, labels), (its_images, its_labels) in pairs:
        assert (its_images.dtype, its_labels.dtype) == (images.dtype, labels.dtype)
        assert np.array_equal(to_numpy(its_labels), labels)
    if pairs:
        assert_pictures(*(np.concatenate([to_numpy(pair[i][0]) for pair in pairs]) for i in (1, 0)))


def assert_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare pictures to 1e-5: all of them here; on a GPU, where means round otherwise, all but one in twenty."""
    off = np.abs(found - expected).max((1, 2, 3)) > 1e-5
    assert off.sum() <= (0 if sys.modules["cupy"] is strict.cupy else len(off) // 20), np.flatnonzero(off)


# ---- each augmentation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", EVERY, ids=[f"{i}-{type(a).__name__}" for i, a in enumerate(EVERY)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_an_augmentation_gives_the_cpu_s_pictures(any_cupy, augment, channels):
    for count, height, width in ((40, 16, 20), (9, 8, 12), (1, 32, 32)):
        images, u = photos(count, channels, height, width), uniform(Key(2), (count, augment.draws))
        there = any_cupy.asarray(images)
        changed = augment(there, u)
        assert isinstance(changed, any_cupy.ndarray)
        assert changed.dtype == np.float32
        assert_pictures(changed.get(), augment(images, u))
        assert np.array_equal(there.get(), images)


@pytest.mark.parametrize("augment", EVERY, ids=[f"{i}-{type(a).__name__}" for i, a in enumerate(EVERY)])
@pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 3, 2, 5), (4, 2, 7, 1)])
def test_images_of_odd_sizes(any_cupy, augment, shape):
    images = uniform(Key(1), shape)
    for extreme in (0.0, 0.5, 1 - 2.0**-24):
        u = np.full((shape[0], augment.draws), extreme, np.float32)
        assert_pictures(augment(any_cupy.asarray(images), u).get(), augment(images, u))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_of_randaugment(any_cupy, operation):
    images = photos(12, 3, 16, 20)
    images[3:5] = 0.25  # of one value
    u = np.concatenate([numbers_for(operation, sign, 4) for sign in (-1, 0, 1)])
    u[:, 2:] = uniform(Key(3), (12, 2))
    for augment in (RandAugment(1, 9), RandAugment(1, 3, noise=3.0, fill=0.0)):
        assert_pictures(augment(any_cupy.asarray(images), u).get(), augment(images, u))


@pytest.mark.parametrize("mix", MIXES[1:])
def test_images_are_mixed_as_on_the_cpu(any_cupy, mix):
    images, partners, u = photos(60), photos(60)[::-1], uniform(Key(14), (60, 4))
    mixed, share = mix(images, partners, u)
    its_mixed, its_share = mix(any_cupy.asarray(images), any_cupy.asarray(np.ascontiguousarray(partners)), u)
    np.testing.assert_allclose(its_mixed.get(), mixed, rtol=0, atol=1e-5)
    assert np.array_equal(its_share, share)


def test_images_there_are_standardised_there(any_cupy):
    images = toy().images
    there = standardize(any_cupy.asarray(images), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    np.testing.assert_allclose(there.get(), standardize(images, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), rtol=0, atol=1e-6)


# ---- random numbers and transfers ------------------------------------------------------------------------------------


def test_numbers_of_rows_and_places_have_the_same_bits(any_cupy):
    rows = np.array([2**40, 999, 0, 5, 5])
    assert np.array_equal(rows_of(Key(3, 1, 4), any_cupy.asarray(rows), 7).get(), rows_of(Key(3, 1, 4), rows, 7))
    places = np.array([[4, 0], [700, 2**41]])
    found = uniform_at(Key(3), places)
    assert np.array_equal(found[:, 0], uniform(Key(3), (701,))[places[:, 0]])
    assert np.array_equal(uniform_at(Key(3), any_cupy.asarray(places)).get(), found)
    steps = np.arange(5, dtype=np.uint64)[:, None]
    for xp in (np, any_cupy):
        of_each = to_numpy(
            uniform_at(Key(9, 2).at(xp.asarray(steps)), xp.asarray(np.arange(3))[None] + xp.zeros((5, 1)))
        )
        assert np.array_equal(of_each, [uniform(Key(9, 2).at(step), (3,)) for step in range(5)])


def test_what_goes_together_takes_one_transfer(strict_cupy):
    arrays = [
        np.array([True, False, True]),
        np.arange(5),
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.array([2**63 + 1], np.uint64),
    ]
    target = strict_cupy.ones(1)
    strict_cupy.counters.reset()
    there = packed_to(target, *arrays)
    assert (strict_cupy.counters.transfers, strict_cupy.counters.launches, strict_cupy.counters.syncs) == (1, 0, 0)
    for a, its in zip(arrays, there, strict=True):
        assert isinstance(its, strict_cupy.ndarray)
        assert (its.dtype, its.shape) == (a.dtype, a.shape)
        assert np.array_equal(its.get(), a)
    assert all(a is b for a, b in zip(arrays, packed_to(np.ones(1), *arrays), strict=True))


def test_packed_arrays_arrive_on_a_gpu(any_cupy):
    arrays = [np.array([True, False, True]), np.arange(5), np.zeros((0, 2), np.float32), np.float32([[1.5], [2.5]])]
    for a, its in zip(arrays, packed_to(any_cupy.ones(1), *arrays), strict=True):
        assert (its.dtype, its.shape) == (a.dtype, a.shape)
        assert np.array_equal(its.get(), a)


# ---- the loader ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("augment", [None, FULL], ids=["plain", "full"])
def test_batches_are_the_cpu_s(any_cupy, augment, mix):
    for data in (toy(), toy(23, 1, 8, 8), toy(9, 4, 7, 5)):
        here = Loader(data, 7, Key(5), augment, mix)
        there = Loader(data, 7, Key(5), augment, mix, device="cuda")
        assert there.remark == ""
        for epoch, start in ((0, 0), (3, 1), (3, len(here) - 1), (3, len(here))):
            assert_same(there.batches(epoch, start), here.batches(epoch, start))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 1},
        {"batch_size": 60},
        {"batch_size": 500},
        {"batch_size": 16, "drop_last": True},
        {"batch_size": 16, "shuffle": False, "mean": (0.1, 0.2, 0.3)},
    ],
)
def test_batches_of_any_size(any_cupy, settings):
    here, there = (Loader(toy(), key=Key(2), augment=CIFAR, device=device, **settings) for device in ("cpu", "cuda"))
    assert len(here) == len(there)
    assert_same(there.batches(1), here.batches(1))


@pytest.mark.parametrize("numbers", [1, 7 * 240 * 2, 7 * 240 * 3, 1 << 30])
def test_blocks_do_not_change_a_batch(any_cupy, monkeypatch, numbers):
    """They begin at the same places wherever the epoch is entered: a resumed run gets the same bits."""
    monkeypatch.setattr(loader_module, "BLOCK_NUMBERS", numbers)
    here, there = (Loader(toy(), 7, Key(5), FULL, Mix(), device=device) for device in ("cpu", "cuda"))
    assert_same(there.batches(2), here.batches(2))
    whole = [(images.get(), labels.get()) for images, labels in there.batches(2)]
    for start in range(len(there)):
        for batch, its in zip(whole[start:], there.batches(2, start), strict=True):
            assert all(np.array_equal(a, b.get()) for a, b in zip(batch, its, strict=True))


class Backwards:
    """An augmentation of somebody's own that knows NumPy only."""

    draws = 1

    def __call__(self, images, u):
        return np.ascontiguousarray(np.flip(np.asarray(images), 3))


def folder_of(path, count: int = 12) -> ImageFiles:
    for i in range(count):
        Image.fromarray((random_bits(Key(i), (9, 11, 3)) >> 24).astype(np.uint8)).save(path / f"{i}.png")
    return ImageFiles([path / f"{i}.png" for i in range(count)], (8, 10), 3)


@pytest.mark.parametrize("mix", [None, Mix(prob=0.5)])
def test_images_that_do_not_fit_are_copied_batch_by_batch(any_cupy, monkeypatch, mix):
    monkeypatch.setattr(loader_module, "BLOCK_NUMBERS", 7 * 240 * 2)
    for fewer in ({"gpu_memory": 14_399}, {}):
        monkeypatch.setattr(on_gpu, "available_memory", lambda device: 2 * 14_399)
        there = Loader(toy(), 7, Key(5), FULL, mix, device="cuda", **fewer)
        assert there.remark == "the images take 14,400 bytes, 14,399 of cuda:0 are for them: " \
                               "they stay on the CPU, and are copied there batch by batch"  # fmt: skip
        assert_same(there.batches(3, 2), Loader(toy(), 7, Key(5), FULL, mix).batches(3, 2))
    for enough in ({"gpu_memory": 14_400}, {}):
        monkeypatch.setattr(on_gpu, "available_memory", lambda device: 2 * 14_400)
        assert Loader(toy(), 7, Key(5), FULL, mix, device="cuda", **enough).remark == ""


def test_image_files_are_read_here_and_changed_there(any_cupy, tmp_path):
    data = Dataset(folder_of(tmp_path), np.arange(12) % 4, CLASSES, "files")
    there = Loader(data, 5, Key(5), FULL, Mix(), device="cuda")
    assert there.remark == "image files are read on the CPU; what is done with the images is done on cuda:0"
    assert_same(there.batches(1), Loader(data, 5, Key(5), FULL, Mix()).batches(1))


def test_what_cannot_work_there_works_here_and_says_so(any_cupy):
    chain = Chain((Crop(2), Backwards()))
    there = Loader(toy(), 7, Key(5), chain, Mix(), device="cuda")
    assert there.remark.startswith("batches are made on the CPU, because Chain does not work on a GPU: ")
    assert_same(there.batches(1), Loader(toy(), 7, Key(5), chain, Mix()).batches(1))


def test_an_augmentation_s_own_error_is_its_own(strict_cupy):
    class Wrong(Flip):
        def __call__(self, images, u):
            raise DataError("no such image", "give another")

    with pytest.raises(DataError, match="no such image"):
        Loader(toy(), 7, Key(5), Wrong(), device="cuda")


def test_where_batches_are_made_is_no_setting(strict_cupy):
    """A run may go on elsewhere: train/identity.py compares the loader's settings."""
    here, there = (Loader(toy(), 7, Key(5), FULL, Mix(), device=device) for device in ("cpu", "cuda"))
    assert plain(here) == plain(there)
    assert not {"device", "gpu_memory"} & plain(there).keys()


def test_on_another_gpu_than_the_current_one(strict_cupy):
    there = Loader(toy(), 7, Key(5), FULL, Mix(), device="cuda:1")
    found = list(there.batches(1))
    assert {x.device.id for batch in found for x in batch} == {1}
    assert strict_cupy.cuda.Device().id == 0
    assert_same(found, Loader(toy(), 7, Key(5), FULL, Mix()).batches(1))


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "mix", "launches", "transfers"),  # of a block, and two launches a batch besides
    [
        (None, None, 5, 3),
        (CIFAR, None, 19, 5),
        (CIFAR, Mix(), 27, 7),
        (Chain((Crop(4), Flip(), RandAugment(), RandomErasing())), Mix(), 450, 14),
    ],
    ids=["plain", "crop and flip", "mixed", "RandAugment"],
)
def test_an_epoch_waits_for_nothing(strict_cupy, augment, mix, launches, transfers):
    """Launches and transfers are paid once for a block of batches; no batch costs more than its copies."""
    data = toy(2048, 3, 32, 32)
    loader = Loader(data, 128, Key(5), augment, mix, device="cuda")
    assert loader_module.BLOCK_NUMBERS // (128 * 3 * 32 * 32) >= 16  # the epoch is one block
    strict_cupy.counters.reset()
    assert len(list(loader.batches(0))) == 16
    counters = strict_cupy.counters
    assert counters.syncs == 0, counters.synced
    assert counters.launches <= launches + 2 * 16, counters.launched
    assert counters.transfers <= transfers, counters.transferred
    assert counters.transfer_bytes < data.images.nbytes / 4, "the images do not go there again"


def test_images_lie_there_once_as_bytes(strict_cupy):
    data = toy(2048, 3, 32, 32)
    strict_cupy.counters.reset()
    loader = Loader(data, 128, Key(5), device="cuda")
    assert (strict_cupy.counters.transfers, strict_cupy.counters.transfer_bytes) == (1, data.images.nbytes)
    assert loader.remark == ""


def test_copied_batches_take_their_bytes_and_wait_for_nothing(strict_cupy, monkeypatch):
    """What is still being copied from page-locked memory is not written over: the stand-in looks when it is over."""
    monkeypatch.setattr(loader_module, "BLOCK_NUMBERS", 1)
    data = toy(64, 3, 32, 32)
    loader = Loader(data, 16, Key(5), CIFAR, device="cuda", gpu_memory=0)
    strict_cupy.counters.reset()
    batches = list(loader.batches(0))
    counters = strict_cupy.counters
    assert counters.syncs == 0, counters.synced
    assert data.images.nbytes <= counters.transfer_bytes < 1.3 * data.images.nbytes  # bytes, not float32
    streams.deliver()
    assert_same(batches, Loader(data, 16, Key(5), CIFAR).batches(0))


# ---- streams ---------------------------------------------------------------------------------------------------------


class Watched(Flip):
    """Notes on which thread and stream it works."""

    def __init__(self, cupy, seen: list) -> None:
        object.__setattr__(self, "where", lambda: (threading.current_thread().name, cupy.cuda.get_current_stream()))
        object.__setattr__(self, "seen", seen)

    def __call__(self, images, u):
        self.seen.append(self.where())
        return super().__call__(images, u)


def test_batches_are_made_ahead_on_a_stream_and_a_thread_of_their_own(any_cupy, monkeypatch):
    monkeypatch.setattr(loader_module, "BLOCK_NUMBERS", 1)
    seen: list = []
    loader = Loader(toy(), 10, Key(1), Watched(any_cupy, seen), device="cuda")
    seen.clear()  # of the trial
    before = any_cupy.cuda.get_current_stream()
    batches = loader.batches(0)
    next(batches), next(batches)
    assert any_cupy.cuda.get_current_stream() == before
    batches.close()
    assert 2 <= len(seen) <= 3  # no more than one ahead
    for thread, stream in seen:
        assert thread.startswith("minivit-loader")
        assert stream == side_stream("cuda:0").stream != before
    assert not any(thread.name.startswith("minivit-loader") for thread in threading.enumerate())


def test_the_caller_s_stream_waits_for_a_batch_and_the_side_stream_for_its_copy(strict_cupy, monkeypatch):
    log: list = []

    def name(stream):
        return {side.stream: "side", own: "caller's"}[stream]

    record, copy = streams.Event.record, strict_cupy.ndarray.copy
    side, own = SideStream("cuda:0"), strict_cupy.cuda.Stream(non_blocking=True)
    monkeypatch.setattr(streams.Event, "record", lambda self, stream=None: (
        record(self, stream), log.append(("mark", name(stream or streams.get_current_stream()))))[0])  # fmt: skip
    monkeypatch.setattr(streams.Stream, "wait_event", lambda self, event: log.append(("wait", name(self))))
    monkeypatch.setattr(strict_cupy.ndarray, "copy", lambda self: (
        log.append(("copy", name(streams.get_current_stream()))), copy(self))[1])  # fmt: skip
    with side.working():
        made = strict_cupy.ones(3)
        ready = side.mark()
    with own:
        (found,) = side.copies([made], ready)
    assert found is not made and not np.may_share_memory(found._host, made._host)
    assert log == [("mark", "side"), ("wait", "caller's"), ("copy", "caller's"), ("mark", "caller's"), ("wait", "side")]


@pytest.mark.gpu
def test_memory_that_is_let_go_is_not_written_over(any_cupy):
    """Each batch is added up behind work that keeps the caller's stream busy, while later ones are made."""
    if any_cupy is strict.cupy:
        pytest.skip("the stand-in has no streams that overtake each other")
    data = toy(4096, 3, 32, 32)
    expected = [float(images.sum()) for images, _ in Loader(data, 256, Key(1), CIFAR).batches(0)]
    loader, busy = Loader(data, 256, Key(1), CIFAR, device="cuda"), any_cupy.ones((4096, 4096), np.float32)
    with any_cupy.cuda.Stream(non_blocking=True):
        sums = []
        for images, _ in loader.batches(0):
            for _ in range(30):
                busy *= 1.0
            sums.append(images.sum(dtype=np.float64))
        np.testing.assert_allclose([float(x) for x in sums], expected, rtol=1e-4, atol=1.0)


# ---- training --------------------------------------------------------------------------------------------------------


def trained(device: str, data: Dataset, **settings):
    model = mv.ViT(image_size=8, patch_size=4, in_channels=1, dim=16, depth=1, heads=2, num_classes=10).to(device)
    trainer = mv.Trainer(model, AdamW(model.named_parameters(), lr=1e-3), epochs=2)
    train = Loader(data, 32, Key(1), Chain((Affine(), RandomErasing(0.5))), device=device, **settings)
    valid = Loader(data, 50, Key(0), mean=train.mean, std=train.std, shuffle=False, device=device)
    return trainer.fit(train, valid)


def test_a_run_on_batches_made_there_is_the_cpu_s(any_cupy):
    data = mv.data.load("digits").subset(range(100))
    here, there, copied = trained("cpu", data), trained("cuda", data), trained("cuda", data, gpu_memory=0)
    for name in ("loss", "accuracy", "valid_loss", "valid_accuracy"):
        np.testing.assert_allclose([row[name] for row in there], [row[name] for row in here], rtol=1e-3)
        np.testing.assert_allclose([row[name] for row in copied], [row[name] for row in here], rtol=1e-3)


def test_labels_that_no_step_looks_at_are_looked_at_before(strict_cupy):
    data = mv.data.load("digits").subset(range(100))
    more = Dataset(data.images, np.where(np.arange(100) == 70, 10, data.labels), tuple("abcdefghijk"), "eleven")
    with pytest.raises(DataError, match="label 10 at row 70 is outside 0 … 9"):
        trained("cuda", more)


def test_a_run_makes_its_batches_on_its_device(strict_cupy, tmp_path, monkeypatch, small_pictures):
    made: list[tuple[int, str]] = []

    class Noted(Loader):
        def __init__(self, dataset, *args, device="cpu", **settings):
            made.append((len(dataset), device))
            if settings.get("gpu_memory"):  # what a step leaves
                settings["gpu_memory"] = 5760
            super().__init__(dataset, *args, device=device, **settings)

    monkeypatch.setattr("minivit.runs.parts.Loader", Noted)
    few = mv.data.load("digits").subset(range(200))
    np.savez(tmp_path / "few.npz", train_images=few.images, train_labels=few.labels,
             test_images=few.images[:50], test_labels=few.labels[:50])  # fmt: skip
    settings = {"model.dim": 16, "model.depth": 1, "model.heads": 2, "train.device": "cuda", "data.erasing": 0.5}
    told: list[str] = []
    run = mv.runs.train(
        data=str(tmp_path / "few.npz"), epochs=1, output=str(tmp_path / "runs"), settings=settings, tell=told.append
    )
    assert run.test["count"] == 50
    assert "            the images take 11,520 bytes, 5,760 of cuda:0 are for them: they stay on the CPU" in told[0]
    assert made.count((180, "cuda:0")) == 1
    assert (20, "cuda:0") in made and (50, "cuda:0") in made


def test_the_benchmark_prints_a_row_for_each(strict_cupy, monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    monkeypatch.setattr(strict_cupy.cuda.runtime, "getDeviceProperties", lambda i: {"name": b"a GPU"}, raising=False)
    benchmark = importlib.import_module("augment")
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: True)  # this process's malloc stays as it is
    benchmark.main(["--device", "cuda", "--size", "8", "--batch", "8", "--images", "16", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert "batches of 8, a GPU, CuPy 14.2.0" in printed
    assert len(re.findall(r"^\| .+ \| [\d,]+ \|$", printed, re.MULTILINE)) == 9
