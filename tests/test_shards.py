"""Tar shards in WebDataset's layout: which samples, which split and class; read in place; and shards made to harm."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, random_bits
from minivit.cli.main import main
from minivit.data import Loader, kind_of, load, splits_of
from minivit.data.audit import audit
from minivit.data.file_array import ImageFiles
from minivit.data.name_list import Names
from minivit.data.shards import list_shards
from minivit.data.tar import Members
from minivit.errors import DataError
from minivit.train import load_checkpoint
from tests.weight_files import peak


def pixels(seed: int) -> np.ndarray:
    return (random_bits(Key(seed), (9, 12, 3)) >> 24).astype(np.uint8)


def picture(seed: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed)).save(file, kind, lossless=True)
    return file.getvalue()


def shard(path: Path, *members: tuple[str, bytes], **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **settings) as archive:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return path


def samples(numbers, label=lambda i: str(i % 3)) -> list[tuple[str, bytes]]:
    return [part for i in numbers for part in ((f"{i:04}.png", picture(i)), (f"{i:04}.cls", label(i).encode()))]


@pytest.fixture
def shards(tmp_path):
    root = tmp_path / "shards"
    shard(root / "set-train-000000.tar", *samples(range(12)))
    shard(root / "set-train-000001.tar", *samples(range(12, 24)))
    shard(root / "set-val-000000.tar", *samples(range(24, 30)))
    shard(root / "set-test-000000.tar", *samples(range(30, 39)))
    return root


def pages(data) -> list[int]:
    """Return the seeds of a data set's images, which have the size of the pictures."""
    known = {pixels(i).transpose(2, 0, 1).tobytes(): i for i in range(60)}
    return [known[image.tobytes()] for image in data.images[:]]


# ---- which samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_folder_of_shards(shards, stream):
    assert kind_of(shards) == "shards"
    assert splits_of(shards) == ("train", "val", "test")
    for split, numbers in (("train", range(24)), ("val", range(24, 30)), ("test", range(30, 39))):
        data = load(shards, split, (9, 12), stream=stream)
        assert isinstance(data.images, ImageFiles) == stream
        assert pages(data) == list(numbers)
        assert data.labels.tolist() == [i % 3 for i in numbers]
        assert data.classes == ("0", "1", "2")
        assert data.files[0] == f"set-{split}-000000.tar/{numbers[0]:04}.png"
    assert load(shards, "train").images.shape == (24, 3, 64, 64)
    assert load(shards, "val", (4, 4), channels=1).images.shape == (6, 1, 4, 4)


def test_folders_called_like_splits(tmp_path):
    shard(tmp_path / "x/Train/0000.tar", *samples(range(6)))
    shard(tmp_path / "x/Train/0001.tar", *samples(range(6, 9)))
    shard(tmp_path / "x/validation/0000.tar", *samples(range(9, 12)))
    assert splits_of(tmp_path / "x") == ("train", "val")
    assert pages(load(tmp_path / "x", "train", (9, 12))) == list(range(9))
    assert load(tmp_path / "x", "val").files[0] == "validation/0000.tar/0009.png"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.tar", "cat/1.png"], "folder"),  # an archive beside what was unpacked from it
        (["train/cat/1.png", "train/a.tar"], "folder"),
        (["train_station/a.tar"], "folder"),
        (["a.tar", "README.md", ".git/config"], "shards"),
        (["train/a.tar", "classes.txt"], "shards"),
        (["train/a.tar.gz"], "shards"),
    ],
)
def test_which_folders_are_shards(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert kind_of(tmp_path) == kind


def test_without_test_shards_a_fifth_is_held_out_by_name_whatever_shard_it_is_in(tmp_path):
    one = shard(tmp_path / "one", *samples(range(30)))  # known by its content
    assert kind_of(one) == "shards" and splits_of(one) == ("train", "test")
    test, train = (load(one, split, (9, 12)) for split in ("test", "train"))
    assert sorted(pages(test) + pages(train)) == list(range(30))
    assert np.bincount(test.labels).tolist() == [2, 2, 2]
    assert splits_of(shard(tmp_path / "three/val-0.tar", *samples(range(5)))) == ("train", "test")
    with pytest.raises(DataError, match="val shards, but none to train on"):
        load(tmp_path / "three")
    shard(tmp_path / "two/a.tar", *samples(range(7)))
    shard(tmp_path / "two/b.tar", *samples(range(7, 30)))
    assert pages(load(tmp_path / "two", "test", (9, 12))) == pages(test)


def test_pictures_of_other_kinds_and_other_files_beside_them(tmp_path):
    members = [
        ("./a/1.JPG", picture(1, "jpeg")), ("./a/1.cls", b" 0\n"), ("./a/1.txt", b"a cat"), ("./a/1.seg.png", b"mask"),
        ("a/._2.webp", b"what macOS adds"), ("b/1.webp", picture(2, "webp")), ("b/1.json", b'{"cls": 1, "x": [2]}'),
        ("notes", b""), ("README.md", b"read me"), ("3.json", b'{"label": "0"}'), ("3.png", picture(3)),
        ("4.cls", b"1"), ("4.json", b'{"text": "not of labels"}'), ("4.ppm", picture(4, "ppm")),
    ]  # fmt: skip
    root = shard(tmp_path / "s/train.tar", *members).parent
    shard(root / "val.tar", *samples(range(2)))
    found = list_shards(root).files["train"]
    assert [str(path) for path, _ in found] == [
        f"{root}/train.tar/{n}" for n in ("./a/1.JPG", "b/1.webp", "3.png", "4.ppm")
    ]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert pages(load(root, "train", (9, 12)).subset([1, 2, 3])) == [2, 3, 4]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_those_of_any_letters(tmp_path, format):
    names = ["d" * 90 + "/" + "ä" * 60, "x" * 300, "ю/猫"]
    members = [
        (f"{n}.{kind}", data) for i, n in enumerate(names) for kind, data in (("png", picture(i)), ("cls", b"%d" % i))
    ]
    path = shard(tmp_path / "a.tar", *members, format=format)
    found = list_shards(path)
    assert sorted(path.name for listed in found.files.values() for path, _ in listed) == sorted(
        f"{n}.png" for n in names
    )


def test_names_of_classes(tmp_path):
    words = lambda i: ("dog", "ant", "cat")[i % 3]
    root = shard(tmp_path / "s/train-0.tar", *samples(range(6), words)).parent
    shard(root / "val-0.tar", *samples(range(6, 9), words))
    data = load(root, "train")
    assert data.classes == ("ant", "cat", "dog") and data.labels.tolist() == [2, 0, 1, 2, 0, 1]
    (root / "classes.json").write_text(json.dumps({"dog": 0, "ant": 1, "cat": 2, "elk": 3}))
    with pytest.warns(UserWarning, match="no images to train on: elk"):
        data = load(root, "train")
    assert data.classes == ("dog", "ant", "cat", "elk") and data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    (root / "classes.txt").write_text("x\ny\nz\n")  # counts before the other
    with pytest.raises(DataError, match="'dog' is not one of the classes"):
        load(root, "train")
    shard(root / "train-0.tar", *samples(range(6)))
    shard(root / "val-0.tar", *samples(range(6, 9)))
    assert load(root, "val").classes == ("x", "y", "z")


def test_a_shard_that_is_missing_is_remarked_on(shards):
    assert list_shards(shards).remark == ""
    (shards / "set-train-000001.tar").rename(shards / "set-train-000003.tar")
    with pytest.warns(UserWarning, match="2 train, 1 val, 1 test; not there: set-train-000001.tar and 1 more"):
        load(shards, "train", (4, 4))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no list of names"), ("[]", "no list of names"), ("[1]", "no list of names"), ('{"a": 1}', "are not 0, 1"),
     ('{"a": "x", "b": 0}', "TypeError"), ('["a", "b", "a"]', "'a' is there twice"), (r'["\ud800"]', "UnicodeEncode"),
     ("[" * 100_000, "RecursionError"), ('["", "a"]', "no list of names")],
)  # fmt: skip
def test_files_of_classes_that_cannot_be_used(shards, text, message):
    (shards / "classes.json").write_text(text or "{}")
    with pytest.raises(DataError, match=rf"classes.json.*({message})"):
        list_shards(shards)


# ---- read in place ---------------------------------------------------------------------------------------------------


def test_streamed_or_held_by_any_number_of_threads_the_bits_are_equal(shards, monkeypatch):
    held = load(shards, "train", (8, 8))
    expected = list(Loader(held, 7, Key(1)).batches(1, start=2))
    for threads in (1, 3):
        monkeypatch.setattr("minivit.data.file_array.cpu_cores", lambda threads=threads: threads)
        data = load(shards, "train", (8, 8), stream=True)
        assert data.fingerprint == held.fingerprint and data.mean == held.mean
        for (x, labels), (y, others) in zip(Loader(data, 7, Key(1)).batches(1, start=2), expected, strict=True):
            assert np.array_equal(x, y) and np.array_equal(labels, others)
        for part, other in zip(data.split_off(0.25, Key(3)), held.split_off(0.25, Key(3)), strict=True):
            assert np.array_equal(part.images[:], other.images) and part.files == other.files


def test_windows_are_read_ahead_neighbours_in_one_go(shards, monkeypatch):
    data = load(shards, "train", (8, 8), stream=True)
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, size, how: asked.append((at, size)), raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    batches = Loader(data, 4, Key(1), window=8, mean=data.mean, std=data.std).batches(0, start=1)
    next(batches)
    assert len(asked) >= 2  # this window and the next; how far the thread that makes batches ahead is, is not known
    list(batches)
    whole = sum(size for _, size in asked)
    assert whole >= sum(data.images.paths.places[2].tolist())
    asked.clear()
    data.images.soon(np.arange(24))
    assert len(asked) == 2  # archives


def test_headers_are_read_once(shards, monkeypatch):
    list_shards(shards)
    with monkeypatch.context() as patched:
        patched.setattr("minivit.data.shards.entries", None)
        list_shards(shards)
    shard(shards / "set-val-000000.tar", *samples(range(24, 28)))
    assert len(list_shards(shards).files["val"]) == 4


def test_a_shard_that_changes_or_goes_meanwhile(shards):
    data = load(shards, "train", (8, 8), stream=True)
    os.utime(shards / "set-train-000000.tar", (0, 0))
    with pytest.raises(DataError, match=r"set-train-000000.tar: it has changed"):
        data.images[3]
    (shards / "set-train-000001.tar").unlink()
    with pytest.raises(DataError, match=r"set-train-000001.tar: no such file"):
        data.images[13]


def test_bad_pictures_stop_or_are_left_out(tmp_path):
    members = samples(range(6))
    members[2] = ("0001.png", b"damaged")
    root = shard(tmp_path / "s/train-0.tar", *members).parent
    shard(root / "test-0.tar", *samples(range(6, 9)))
    with pytest.raises(
        DataError, match=r"in the split 'train' 1 of 6 image files .*train-0.tar/0001.png: not an image"
    ):
        load(root, "train")
    with pytest.warns(UserWarning, match=r"1 image files are left out:\n.*train-0.tar/0001.png"):
        assert pages(load(root, "train", (9, 12), bad_images="skip", stream=True)) == [0, 2, 3, 4, 5]
    found = audit(root)
    assert found.counts == {"train": [2, 1, 2], "test": [1, 1, 1]} and len(found.corrupt) == 1
    assert found.formats == {"PNG": 8}


@pytest.mark.parametrize("window", [0, 8])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_at_the_very_sample(shards, tmp_path, monkeypatch, window):
    monkeypatch.chdir(tmp_path)
    tiny = [
        *("train", str(shards), "--epochs", "2", "--batch-size", "4", "--set", "model.image_size=8", "--device", "cpu"),
        *("--set", "model.patch_size=4", "--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2"),
        *("--set", "data.stream=true", "--set", f"data.window={window}", "--set", "train.save_every=2"),
    ]
    assert main([*tiny, "--output", "whole"]) == 0
    made, stop = [], Loader._batch

    def few(self, index, key, partner):
        if len(index) == 4:
            made.append(index)
        if len(made) > 10:  # six an epoch
            raise KeyboardInterrupt
        return stop(self, index, key, partner)

    with monkeypatch.context() as patched:
        patched.setattr(Loader, "_batch", few)
        assert main([*tiny, "--output", "killed"]) != 0
    at = load_checkpoint(tmp_path / "killed/shards-1/checkpoints/last.npz").meta["train"]
    assert at["epoch"] == 1 and at["batch"] in (2, 4)
    assert main(["train", "--resume", "killed/shards-1"]) == 0
    whole, resumed = (np.load(tmp_path / f"{name}/shards-1/checkpoints/last.npz") for name in ("whole", "killed"))
    names = [name for name in whole.files if name.startswith(("model/", "optimizer/"))]
    assert names and all(np.array_equal(whole[name], resumed[name]) for name in names)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no samples"),
        ([("1.txt", b"")], "no samples"),
        ([("1.png", b"")], "'1' has no label"),
        ([("1.cls", b"0")], "'1' has no picture, only 'cls'"),
        ([("1.png", b""), ("2.png", b""), ("1.cls", b"0"), ("2.cls", b"0")], "'1' has no label"),
        ([("1.png", b""), ("1.jpg", b""), ("1.cls", b"0")], "2 pictures"),
        ([("1.png", b""), ("1.png", b""), ("1.cls", b"0")], "'1.png' is there twice"),
        ([("1.png", b""), ("1.cls", b"")], "'' is no label"),
        ([("1.png", b""), ("1.cls", b"\xff")], "1.cls.*UnicodeDecodeError"),
        ([("1.png", b""), ("1.cls", b"1" * 40)], "label 1{40} is not a class"),
        ([("1.png", b""), ("1.cls", b"9999999")], "label 9999999 is not a class: number them from 0"),
        ([("1.png", b""), ("1.json", b'{"label": -1}')], "label -1 is not a class"),
        ([("1.png", b""), ("1.json", b'{"label": true}')], "True is no label"),
        ([("1.png", b""), ("1.json", b'{"label": 0.5}')], "0.5 is no label"),
        ([("1.png", b""), ("1.json", b'{"label": [0]}')], r"\[0\] is no label"),
        ([("1.png", b""), ("1.json", b'{"label": ' + b"9" * 5000 + b"}")], "1.json.*ValueError"),
        ([("1.png", b""), ("1.json", b"[" * 100_000)], "1.json.*RecursionError"),
        ([("1.png", b""), ("1.cls", b"-1")], "label -1 is not a class"),
        ([("1.png", b""), ("1.json", rb'{"label": "\ud800"}')], "1.json.*UnicodeEncodeError"),
        ([("1.png", b""), ("1.json", b"{")], "1.json.*JSONDecodeError"),
        ([("1.png", b""), ("1.json", b"[1]")], "'1' has no label"),
        ([("1.png", b""), ("1.json", b" " * (2 << 20))], "more than a label takes"),
        ([*samples([1]), ("2.png", b""), ("2.cls", b"cat")], "0001 has a number for a label, .*2 a name"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, members, message):
    path = shard(tmp_path / "a.tar", *members)
    with pytest.raises(DataError, match=message) as caught:
        load(path)
    assert caught.value.remedy and "a.tar" in caught.value.what


def linked(kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    about = tarfile.TarInfo("1.png")
    about.type, about.linkname = kind, target
    return about


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (linked(tarfile.SYMTYPE), "is a link; only files are read, and nothing is followed"),
        (linked(tarfile.LNKTYPE, "../0.png"), "a hard link"),
        (linked(tarfile.CHRTYPE), "a device"),
        (linked(tarfile.BLKTYPE), "a device"),
        (linked(tarfile.FIFOTYPE), "a pipe"),
        (linked(b"S"), "holes"),
        (linked(b"Z"), "unknown kind"),
    ],
)
def test_only_files_are_read(tmp_path, about, message):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(about)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.tar")


def test_names_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["../../etc/1", "/etc/2", "a/../../3", "\x1b[31m4", "b\\5"]
    members = [
        (f"{n}.{kind}", data)
        for i, n in enumerate(names)
        for kind, data in (("png", picture(i)), ("cls", b"%d" % (i % 2)))
    ]
    shard(tmp_path / "a.tar", *members)
    before = sorted(tmp_path.rglob("*"))
    found = [load(tmp_path / "a.tar", split, (9, 12)) for split in ("train", "test")]
    assert sorted(page for data in found for page in pages(data)) == list(range(5))
    assert sorted(tmp_path.rglob("*")) == before


def header(**changed: tuple[int, bytes]) -> bytes:
    """Return a header of a file 1.png without content, some bytes changed, with a checksum that is right."""
    head = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.USTAR_FORMAT))
    for at, data in changed.values():
        head[at : at + len(data)] = data
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    data = b"".join(records)
    return header(kind=(156, kind), size=(124, b"%011o\0" % len(data))) + data + bytes(-len(data) % 512)


END = bytes(1024)
DAMAGED = {
    "cut in a header": (header()[:300], "no tar archive"),
    "no end": (header(), "stops at byte 512 without the mark"),
    "two in one": (header() + END + header() + END, "something follows the mark of its end"),
    "much behind its end": (header() + bytes(2 << 20), "something follows the mark of its end"),
    "a wrong checksum": (header() + b"x" + header()[1:] + END, "damaged at byte 512"),
    "no archive": (b"something else" * 100, "not a NumPy archive, and no tar archive"),
    "a picture": (picture(1), "no tar archive"),
    "a file beyond its end": (header(size=(124, b"%011o\0" % 5000)) + END, "to have 5,000 bytes, 1,024 are left"),
    "a huge file": (header(size=(124, b"\x80" + b"\xff" * 11)) + END, "is said to have"),
    "a negative size": (header(size=(124, b"\xff" * 12)) + END, "no size that can be read"),
    "a size of no digits": (header(size=(124, b"12x\0")) + END, "no size that can be read"),
    "a size of minus": (header(size=(124, b"-0000000001\0")) + END, "no size that can be read"),
    "a folder with content": (header(kind=(156, b"5"), size=(124, b"00000001000\0")) + END + END, "with content"),
    "pax that overlaps": (pax(b"999 path=x\n") + header() + END, "extended header is damaged"),
    "pax of length 0": (pax(b"0 path=x\n") + header() + END, "extended header is damaged"),
    "pax without end": (pax(b"12 path=abcdef") + header() + END, "extended header is damaged"),
    "a huge pax size": (pax(b"29 size=99999999999999999999\n") + header() + END, "no size|is said to have"),
    "a pax size of minus": (pax(b"11 size=-1\n") + header() + END, "no size that can be read"),
    "holes by pax": (pax(b"22 GNU.sparse.major=1\n") + header() + END, "holes"),
    "a path for all": (pax(b"10 path=x\n", kind=b"g") + header() + END, "one path or size for all"),
    "a long name": (pax(b"5010 path=" + b"x" * 4999 + b"\n") + header() + END, "a name of 4,999 letters"),
    "a long extended header": (pax(b" " * 70_000) + header() + END, "too many"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_archives(tmp_path, name):
    data, message = DAMAGED[name]
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "a.tar")
    assert caught.value.remedy


def test_compressed_shards_are_told_to_be_unpacked(tmp_path):
    path = shard(tmp_path / "x/a.tar", *samples(range(6)))
    packed = tmp_path / "y/a.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "z.tgz").write_bytes(packed.read_bytes())
    for given in (packed, packed.parent, tmp_path / "z.tgz"):
        with pytest.raises(DataError, match="compressed by gzip") as caught:
            load(given)
        assert "gunzip" in caught.value.remedy


def test_every_byte_of_the_headers_changed_is_an_error_or_the_same(tmp_path):
    """Fuzz: no other exception, and never another picture under a name."""
    whole = bytearray(shard(tmp_path / "a.tar", *samples(range(4))).read_bytes())
    expected = {i: picture(i) for i in range(4)}
    bits = random_bits(Key(5), (100, 2))
    places = bits[:, 0] % 512 + bits[:, 0] // 512 % 2 * 1024  # the first two headers; a picture takes a block
    for at, value in zip(places.tolist(), (bits[:, 1] >> 24).tolist(), strict=True):
        changed = whole.copy()
        changed[at] = value
        (tmp_path / "b.tar").write_bytes(changed)
        try:
            found = list_shards(tmp_path / "b.tar")
        except DataError:
            continue
        for listed in found.files.values():
            for member, _ in listed:
                assert member.open().read() in expected.values()


def test_a_million_samples_take_little_memory(tmp_path):
    parts = (
        header(name=(0, b"%05d.png" % i))
        + header(name=(0, b"%05d.cls" % i), size=(124, b"00000000001\0"))
        + b"%d" % (i % 2)
        for i in range(1000)
    )
    (tmp_path / "a.tar").write_bytes(b"".join(part + bytes(511) for part in parts) + END)
    found, most = peak(lambda: list_shards(tmp_path / "a.tar"))
    assert sum(map(len, found.files.values())) == 1000
    assert most < 1000 * 600


def test_names_are_texts_in_little_memory():
    texts = ["a", "", "ä/ю", "x\udcff"]
    names = Names(texts)
    assert names == texts and list(names) == texts and names[-1] == texts[-1]
    assert names.take(np.array([3, 1])) == ("x\udcff", "") and names != ["a"] and "" in names
    with pytest.raises(IndexError):
        names[4]
    assert repr(Names("abcd")) == "Names('a', 'b', 'c', …: 4)"
    assert not Names() and not Members(Path(), [], Names(), ([], [], []))
