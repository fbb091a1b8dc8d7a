"""Folders of image files: which files, which split, which pixels; and files that act as an array."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, random_bits
from minivit.data import Loader, file_array, load, read_image, splits_of
from minivit.data import folder as folder_module
from minivit.data.file_array import ImageFiles, in_threads
from minivit.data.folder import load_folder
from minivit.data.listing import list_folder
from minivit.errors import ConfigError, DataError


def picture(seed: int, height: int = 12, width: int = 16) -> Image.Image:
    return Image.fromarray((random_bits(Key(seed), (height, width, 3)) >> 24).astype(np.uint8))


def make(root: Path, *names: str) -> Path:
    """Write a picture for each name; no two are the same."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(sum(map(ord, name))).save(root / name)
    return root


@pytest.fixture
def animals(tmp_path):
    train = [f"train/{kind}/{i}.png" for kind in ("dog", "cat") for i in range(4)]
    return make(tmp_path / "animals", *train, *(f"test/{kind}/{i}.png" for kind in ("cat", "dog") for i in (7, 8)))


@pytest.fixture
def lazily(monkeypatch):
    monkeypatch.setattr(folder_module, "available_memory", lambda: 0)


# ---- which files -----------------------------------------------------------------------------------------------------


def test_a_folder_of_splits(animals):
    data = load_folder(animals, "train", (6, 8))
    assert data.images.shape == (8, 3, 6, 8)
    assert data.images.dtype == np.uint8
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0] * 4 + [1] * 4
    assert data.name == str(animals)
    for i, name in enumerate(["cat/0.png", "cat/1.png"]):
        assert np.array_equal(data.images[i], read_image(animals / "train" / name, (6, 8), 3, fit="crop"))
    test = load_folder(animals, "test", (6, 8))
    assert test.classes == data.classes
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(test.images[3], read_image(animals / "test/dog/8.png", (6, 8), 3, fit="crop"))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "", "Testing"),
        ("TRAIN", "Validation", "TEST"),
        ("Train", "valid", ""),
        ("training", "dev", "testing"),
    ],
)
def test_the_names_of_splits_in_any_case(tmp_path, train, val, test):
    names = [f"{name}/{kind}/{i}.png" for i, name in enumerate((train, val, test)) if name for kind in ("cat", "dog")]
    root = make(tmp_path / "x", *names)
    for split, name in (("train", train), ("val", val), ("test", test)):
        if name:
            paths = [file.relative_to(root).parts[0] for file, _ in list_folder(root).files[split]]
            assert paths == [name, name]
            assert len(load(root, split, (4, 4))) == 2
        else:
            with pytest.raises(DataError, match=f"it has no split '{split}'") as caught:
                load(root, split)
            assert caught.value.remedy
    assert splits_of(root) == tuple(s for s, name in {"train": train, "val": val, "test": test}.items() if name)


def test_unlabelled_test_images_are_no_test_set(animals):
    shutil.rmtree(animals / "test")
    make(animals, "test/1.png")  # as competitions give them
    with pytest.warns(UserWarning, match="20% of each class.*; not read: test/$"):
        assert len(load_folder(animals, "test")) == 2


def test_a_folder_is_parted_as_version_1_did_for_what_was_trained_then(animals, tmp_path):
    (animals / "test").rename(animals / "val")
    assert set(list_folder(animals).files) == {"train", "val"}
    assert len(load(animals, "test", layout=1)) == 4
    assert splits_of(animals, layout=1) == ("train", "test")
    root = make(tmp_path / "flat", *(f"{kind}/{i:03}.png" for kind in ("cat", "dog") for i in range(100)))
    tested = {file for file, _ in list_folder(root, layout=1).files["test"]}
    for file in root.rglob("*.png"):
        digest = hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()
        assert (file in tested) == (int.from_bytes(digest[:8], "big") < 0.2 * 2**64)


def test_size_and_channels(animals):
    assert load_folder(animals, "train").images.shape == (8, 3, 64, 64)
    assert load_folder(animals, "train", (5, 5), channels=1).images.shape == (8, 1, 5, 5)
    assert load(animals, "test", (6, 6), 3).images.shape == (4, 3, 6, 6)


def test_a_split_by_key_stays_as_it_is_when_files_come_and_go(tmp_path):
    root = tmp_path / "flat"
    make(root, *(f"{kind}/{i:03}.png" for kind in ("cat", "dog") for i in range(100)))
    before = list_folder(root)
    counts = {split: np.bincount([label for _, label in files]).tolist() for split, files in before.files.items()}
    assert counts["test"] == [20, 20]
    assert np.array(list(counts.values())).sum(0).tolist() == [100, 100]
    for i in range(10):
        make(root, f"cat/new-{i}.png", "ant/1.png", "ant/2.png", "ant/3.png")
        after = list_folder(root)
        assert after.classes == ("ant", "cat", "dog")
        for name in after.classes:
            tested = [file.parent.name for file, _ in after.files["test"]].count(name)
            assert abs(tested - len(list((root / name).iterdir())) / 5) <= 1
        sides = [{file: split for split, files in x.files.items() for file, _ in files} for x in (before, after)]
        assert sum(side != sides[1][file] for file, side in sides[0].items()) <= i + 1
    moved = root.rename(tmp_path / "elsewhere")
    again = {file.relative_to(moved) for file, _ in list_folder(moved).files["test"]}
    assert again == {file.relative_to(root) for file, _ in after.files["test"]}
    assert load_folder(moved, "train").classes == load_folder(moved, "test").classes


def test_train_alone_is_split_by_key_as_well(animals):
    shutil.rmtree(animals / "test")
    make(animals, *(f"train/{kind}/{i}.png" for kind in ("cat", "dog") for i in range(4, 40)))
    train, test = (list_folder(animals).files[split] for split in ("train", "test"))
    assert len(train) + len(test) == 80
    assert len(test) == 16


def test_a_small_folder_can_be_trained_on_and_tested(tmp_path):
    for i in range(30):  # names by which, of four files each, often none or all would be of one split
        root = make(tmp_path / str(i), *(f"{kind}/{i}-{j}.png" for kind in ("cat", "dog") for j in range(4)))
        make(root, f"eel/{i}.png", f"fox/{i}.png", f"fox/{i}-2.png")
        found = list_folder(root)
        counts = {split: np.bincount([n for _, n in files], minlength=4) for split, files in found.files.items()}
        assert (counts["train"] > 0).all()
        assert counts["test"][2] == 0  # the only one is trained on
        assert (counts["test"][[0, 1, 3]] > 0).all()
        assert (counts["train"] + counts["test"]).tolist() == [4, 4, 1, 2]
    assert found.problem() is None
    assert len(load_folder(root, "train", (4, 4))) + len(load_folder(root, "test", (4, 4))) == 11


def test_what_is_not_read_is_named(animals):
    assert list_folder(animals).how == "train/ and test/"
    assert list_folder(animals).remark == ""
    make(animals, "val/cat/1.png", "val/dog/1.png", "extra/cat/1.png", "notes/1.png", "cover.png", "train/stray.png")
    found = list_folder(animals)
    assert found.how == "train/ and val/ and test/"
    with pytest.warns(
        UserWarning, match="animals: train/ and val/ and test/; not read: extra/, notes/, 1 image in no "
    ):
        assert len(load_folder(animals, "test")) == 4
    assert f"{animals / 'cover.png'}" in found.remark
    assert f"{animals / 'train/stray.png'}" in found.remark
    shutil.rmtree(animals / "test")
    assert list_folder(animals).how == "train/ and val/: no test images"


@pytest.mark.parametrize(
    ("names", "message", "remedy"),
    [
        (["cat/1.png", "dog/1.png", "test/1.png"], "test/ could be a split, or a class like cat/", "rename"),
        (["cat/1.png", "dog/1.png", "Test/cat/1.png"], "Test/ could be a split, or a class like cat/", "train"),
        (["plane/1.png", "train/1.png"], "train/ could be a split, or a class like plane/", "rename"),
        (["train/1.png", "test/1.png"], "are splits, but there are 1 image in no class", "folder for each class"),
        (["test/cat/1.png", "test/dog/1.png"], "no folder to train on", "train"),
        (["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "Valid/cat/1.png"], "the same split", "rename one"),
        (["archive/cat/1.png", "archive/dog/1.png"], "only one class, 'archive'", "archive$"),
        (["a/b/c/train/cat/1.png", "a/b/c/train/dog/1.png"], "only one class, 'a'", "a/b/c$"),
        (
            ["train/Cat/1.png", "train/dog/1.png", "test/cat/1.png"],
            "'cat' has no images to train on, but 'Cat'",
            "same",
        ),
    ],
)
def test_folders_that_could_mean_two_things_are_refused(tmp_path, names, message, remedy):
    make(tmp_path, *names)
    with pytest.raises(DataError, match=message) as caught:
        load_folder(tmp_path, "train")
    assert re.search(remedy, caught.value.remedy)


def test_a_class_may_be_called_like_a_split_inside_one(tmp_path):
    make(tmp_path, *(f"train/{kind}/{i}.png" for kind in ("train", "plane") for i in range(9)))
    assert list_folder(tmp_path).classes == ("plane", "train")


def test_classes_that_hold_only_folders_are_remarked_on(tmp_path):
    make(tmp_path, *(f"{a}/{b}/{i}.png" for a in ("raw", "drawn") for b in ("cat", "dog") for i in (1, 2)))
    with pytest.warns(UserWarning, match="hold only folders; if these are the classes, give .*drawn$"):
        assert load_folder(tmp_path, "train").classes == ("drawn", "raw")


def test_what_is_no_image_is_passed_over(animals):
    cats = animals / "train" / "cat"
    (cats / "notes.txt").write_text("not a picture")
    (cats / "Thumbs.db").write_bytes(bytes(100))
    (cats / ".hidden.png").write_bytes(b"hidden")
    (animals / "train" / ".git").mkdir()
    (cats / ".cache").mkdir()
    make(animals, "train/cat/.cache/9.png")
    os.mkfifo(cats / "pipe.png")  # to open it would wait for ever
    make(animals, "train/cat/deeper/still/5.png")
    (cats / "0.png").rename(cats / "a picture without a suffix")
    os.symlink(animals / "train", cats / "deeper" / "circle")  # which leads here again
    found = [str(file.relative_to(cats)) for file, label in list_folder(animals).files["train"] if label == 0]
    assert [name for name in found if "circle" not in name] == [
        "1.png", "2.png", "3.png", "a picture without a suffix", "deeper/still/5.png",
    ]  # fmt: skip
    assert len(load_folder(animals, "train")) == len(list_folder(animals).files["train"])


def test_files_count_by_content_not_by_name(animals):
    (animals / "train/cat/0.png").unlink()
    picture(5).save(animals / "train/cat/0.txt", "JPEG")
    assert len(load_folder(animals, "train")) == 8


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ([], "train", "no image files"),
        (["1.png", "2.png"], "train", "in no class"),
        (["cat/1.png", "cat/2.png"], "train", "only one class, 'cat'"),
        (
            ["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/cow/1.png"],
            "train",
            "'cow' has no images to train",
        ),
        (["train/cat/1.png", "train/dog/1.png", "val/cow/1.png"], "test", "'cow' has no images to train"),
        (["train/cat/1.png", "train/dog/1.png", "test/dog/x.txt"], "test", "no image files for the split 'test'"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, names, split, message):
    for name in names:
        if name.endswith("png"):
            make(tmp_path, name)
        else:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=message) as caught:
        load_folder(tmp_path, split)
    assert str(tmp_path) in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": "no/such"}, DataError, "no such folder"),
        ({"path": __file__}, DataError, "not a folder"),
        ({"split": "vaild"}, DataError, "unknown split"),
        ({"bad": "ignore"}, ConfigError, "'ignore'"),
        ({"size": (0, 4)}, ConfigError, "size"),
        ({"channels": 2}, DataError, "not 2"),
    ],
)
def test_arguments_that_cannot_be_used(animals, arguments, error, message):
    with pytest.raises(error, match=message):
        load_folder(**({"path": animals, "split": "train"} | arguments))


def test_a_class_that_only_has_test_images_is_refused_but_one_without_them_is_not(animals):
    make(animals, "train/eel/1.png")
    assert load_folder(animals, "test").classes == ("cat", "dog", "eel")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="who may read everything is never refused")
def test_a_folder_that_may_not_be_listed(animals):
    (animals / "train/cat").chmod(0)
    try:
        with pytest.raises(DataError, match="Permission"):
            load_folder(animals, "train")
    finally:
        (animals / "train/cat").chmod(0o700)


# ---- files that cannot be read ---------------------------------------------------------------------------------------


def spoil(animals: Path) -> None:
    whole = (animals / "train/cat/1.png").read_bytes()
    (animals / "train/cat/1.png").write_bytes(whole[: len(whole) // 2])
    (animals / "train/dog/3.png").write_bytes(b"")
    os.symlink("nowhere", animals / "train/dog/9.jpg")
    (animals / "train/cat/photo.heic").write_bytes(b"a format that is not read")


@pytest.mark.parametrize("lazy", [False, True])
def test_bad_files_stop_or_are_left_out(animals, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(folder_module, "available_memory", lambda: 0)
    good = load_folder(animals, "train", (6, 8)).images[[0, 2, 3, 4, 5, 6]]
    spoil(animals)
    with pytest.raises(
        DataError, match=r"in the split 'train' 4 of 10 image files cannot be read; the first: .*cat.1.png"
    ) as caught:
        load_folder(animals, "train", (6, 8))
    assert "--bad-images skip" in caught.value.remedy
    with pytest.warns(
        UserWarning, match=r"4 image files are left out:\n  .*1.png: cannot.*\n.*heic: not.*\n.*3.png.*\n.*9.jpg: no"
    ):
        data = load_folder(animals, "train", (6, 8), bad="skip")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.images[:], good)


@pytest.mark.parametrize("lazy", [False, True])
def test_images_know_their_files(animals, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(folder_module, "available_memory", lambda: 0)
    (animals / "train/cat/2.png").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="left out"):
        data = load_folder(animals, "train", (6, 8), bad="skip")
    assert len(data.files) == len(data) and "train/cat/2.png" not in data.files
    chosen = data.subset([len(data) - 1, 0])
    assert chosen.files == (data.files[-1], data.files[0])
    for file, image in zip(chosen.files, chosen.images[:], strict=True):
        assert np.array_equal(read_image(animals / file, (6, 8), 3, "crop"), image)
    with pytest.raises(DataError, match="files"):
        replace(data, files=("one.png",))


def test_a_class_that_cannot_be_read_at_all(animals):
    for file in (animals / "train/dog").iterdir():
        file.write_bytes(b"")
    with (
        pytest.raises(DataError, match="no image of the class 'dog'"),
        pytest.warns(UserWarning, match="4 image files"),
    ):
        load_folder(animals, "train", bad="skip")


def test_an_animation_counts_with_a_warning(animals):
    frames = [Image.new("RGB", (8, 8), (grey, 0, 0)) for grey in (10, 200)]
    frames[0].save(animals / "train/cat/0.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"1 files hold more than one picture, such as .*0.gif"):
        data = load_folder(animals, "train", (4, 4))
    assert len(data) == 9
    assert np.abs(data.images[0, 0].astype(int) - 10).max() <= 1


# ---- files as an array -----------------------------------------------------------------------------------------------


def test_a_large_folder_is_decoded_when_indexed(animals, lazily):
    lazy = load_folder(animals, "train", (6, 8))
    assert isinstance(lazy.images, ImageFiles)
    whole = np.stack([read_image(path, (6, 8), 3, fit="crop") for path in lazy.images.paths])
    index = np.array([3, 0, 3, -1])
    for i in (slice(None), slice(2, 5), slice(None, None, -3), index, [1, 2], 4, -2, np.int64(3), slice(5, 5)):
        found = lazy.images[i]
        assert isinstance(found, np.ndarray)
        assert found.shape == whole[i].shape
        assert np.array_equal(found, whole[i])
    for beyond in (8, -9, [0, 8]):
        with pytest.raises(IndexError):
            lazy.images[beyond]
    assert (lazy.images.shape, lazy.images.size, lazy.images.dtype) == (whole.shape, whole.size, whole.dtype)


def test_a_data_set_of_files_is_that_of_their_pixels(animals, monkeypatch):
    held = load_folder(animals, "train", (6, 8))
    monkeypatch.setattr(folder_module, "available_memory", lambda: 0)
    lazy = load_folder(animals, "train", (6, 8))
    assert (lazy.mean, lazy.std) == (held.mean, held.std)
    parts = [data.split_off(0.25, Key(3)) for data in (lazy, held)]
    for of_files, of_arrays in zip(*parts, strict=True):
        assert isinstance(of_files.images, ImageFiles)  # still not decoded
        assert np.array_equal(of_files.images[:], of_arrays.images)
        assert of_files.labels.tolist() == of_arrays.labels.tolist()
    batches = [list(Loader(data, 3, Key(1)).batches(0)) for data in (lazy, held)]
    for (images, labels), (expected, expected_labels) in zip(*batches, strict=True):
        assert np.array_equal(images, expected)
        assert np.array_equal(labels, expected_labels)


def test_files_that_go_or_break_after_loading(animals, lazily):
    data = load_folder(animals, "train", (6, 8))
    data.images.paths[2].unlink()
    data.images.paths[5].write_bytes(b"no longer an image")
    for index, message in (([0, 1, 2], "no such file"), ([5], "not an image")):
        with pytest.raises(DataError, match=message) as caught:
            data.images[index]
        assert str(data.images.paths[index[-1]]) in caught.value.what
    assert data.images[[0, 1, 3, 4]].shape == (4, 3, 6, 8)


def test_an_epoch_holds_only_its_batch_in_memory(animals, lazily, monkeypatch):
    data = load_folder(animals, "train", (6, 8))
    decoded, read = [], ImageFiles.read
    monkeypatch.setattr(ImageFiles, "read", lambda self, i: decoded.append(i) or read(self, i))
    batches = Loader(data, 2, Key(0), mean=(0, 0, 0), std=(1, 1, 1)).batches(0)
    assert decoded == []
    next(batches)
    assert len(decoded) <= 6  # the loader may read ahead by a batch or two


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_threads_do_everything_once():
    done = []
    in_threads(done.append, range(1000))
    assert sorted(done) == list(range(1000))
    in_threads(done.append, [])
    assert len(done) == 1000


class Bar:
    """Counts what it is told, as a bar that is shown would."""

    def __init__(self, total: int, desc: str) -> None:
        self.total, self.desc, self.done, self.closed = total, desc, 0, False

    def update(self) -> None:
        assert not self.closed
        self.done += 1

    def close(self) -> None:
        self.closed = True


def test_a_bar_is_told_of_every_file(animals):
    shown = []
    bar = lambda **given: shown.append(Bar(**given)) or shown[-1]
    load(animals, "train", (6, 8), bar=bar)
    assert [(b.total, b.desc, b.done, b.closed) for b in shown] == [(8, f"reading {animals}", 8, True)]
    with pytest.raises(MemoryError):
        in_threads(lambda i: (_ for _ in ()).throw(MemoryError), range(9), "", bar)
    assert shown[1].closed


def test_the_library_shows_no_bar(animals):
    code = f"import sys; from minivit.data import load; load({str(animals)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tqdm" not in done.stdout.split()


@pytest.mark.parametrize("error", [DataError("broken"), MemoryError(), KeyboardInterrupt()])
def test_an_error_reaches_the_caller_and_stops_the_others(error):
    begun = []

    def work(i: int) -> None:
        begun.append(i)
        if i == 5:
            raise error
        time.sleep(0.001)

    with pytest.raises(type(error)):
        in_threads(work, range(10_000))
    assert len(begun) < 1000


def test_an_interrupt_leaves_at_once_even_if_a_file_hangs(monkeypatch):
    release, begun = threading.Event(), []

    def hang(i: int) -> None:
        begun.append(i)
        release.wait(60)

    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_threads(hang, range(1000))
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    release.set()
    while threading.active_count() > before:
        time.sleep(0.001)
    assert len(begun) <= file_array.cpu_cores()  # none took a further file


def test_a_file_that_never_comes_is_named(animals, lazily, monkeypatch):
    data = load_folder(animals, "train", (6, 8))
    monkeypatch.setattr(file_array, "DEADLINE", 1.0)
    monkeypatch.setattr(file_array, "cpu_cores", lambda: 2)
    before, slow, release, read = threading.active_count(), data.images.paths[2], threading.Event(), ImageFiles.read

    def wait(self, i):
        if self.paths[i] == slow:  # as on a disk that is gone
            release.wait(60)
        return read(self, i)

    monkeypatch.setattr(ImageFiles, "read", wait)
    try:
        with pytest.raises(DataError, match="no file could be read for 1 seconds") as caught:
            data.images[:]
        assert caught.value.what.endswith(f"they wait for {slow}")
        assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    finally:
        release.set()
    while threading.active_count() > before:
        time.sleep(0.001)


def test_slow_files_are_waited_for(monkeypatch):
    monkeypatch.setattr(file_array, "DEADLINE", 1.0)
    monkeypatch.setattr(file_array, "cpu_cores", lambda: 1)
    done = []
    in_threads(lambda i: (time.sleep(0.15), done.append(i)), range(8))
    assert done == list(range(8))
