"""The files of MNIST and CIFAR: all spellings and layouts are read; damaged and hostile ones are refused by name."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minivit.backend import Key, random_bits
from minivit.data import kind_of, load, reading
from minivit.data.catalog import data_home
from minivit.data.npz import channels_first
from minivit.data.plain_pickle import read_plain_pickle
from minivit.errors import DataError

# ---- tiny data sets in the published formats -------------------------------------------------------------------------


def pixels(*shape: int, stream: int = 0) -> np.ndarray:
    return (random_bits(Key(5, stream), shape) >> 24).astype(np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


IDX = {
    "train": (pixels(12, 6, 5), np.arange(12, dtype=np.uint8) % 10),
    "t10k": (pixels(4, 6, 5), np.uint8([9, 1, 0, 3])),
}
CIFAR = {f"data_batch_{i}": (pixels(3, 3072, stream=i), [i, 0, 9]) for i in range(1, 6)}
CIFAR |= {"test_batch": (pixels(4, 3072), [7, 7, 1, 0])}
CIFAR100 = {"train": (pixels(5, 3072), [99, 0, 50, 51, 7]), "test": (pixels(2, 3072), [3, 98])}
NAMES10 = [f"kind_{i}" for i in range(10)]
NAMES100 = [f"sort_{i}" for i in range(100)]


def write_idx(folder: Path, gz: bool = False, dot: str = "-") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in IDX.items():
        for what, array in ((f"images{dot}idx3", images), (f"labels{dot}idx1", labels)):
            content = gzip.compress(idx(array)) if gz else idx(array)
            (folder / f"{split}-{what}-ubyte{'.gz' if gz else ''}").write_bytes(content)
    return folder


def write_cifar(folder: Path, kind: str, dumps: Callable[[Any], bytes] | None = None) -> Path:
    """Write CIFAR's binary layout, or its Python batches by ``dumps``."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = CIFAR if kind == "cifar-10" else CIFAR100
    for name, (data, labels) in batches.items():
        if dumps is None:
            before = [labels] if kind == "cifar-10" else [np.arange(len(labels)) % 20, labels]  # coarse, then fine
            records = np.column_stack([*before, data]).astype(np.uint8)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            of = {"labels": labels} if kind == "cifar-10" else {"fine_labels": labels, "coarse_labels": labels}
            batch = {"batch_label": "batch 1 of 5", **of, "data": data, "filenames": ["a_car.png"] * len(labels)}
            (folder / name).write_bytes(dumps(batch))
    if dumps is None:
        name, names = ("batches.meta", NAMES10) if kind == "cifar-10" else ("fine_label_names", NAMES100)
        (folder / f"{name}.txt").write_text("\n".join(names) + "\n\n")
    elif kind == "cifar-10":
        (folder / "batches.meta").write_bytes(dumps({"num_vis": 3072, "label_names": NAMES10}))
    else:
        (folder / "meta").write_bytes(dumps({"fine_label_names": NAMES100, "coarse_label_names": ["x"]}))
    return folder


def python2(value: Any) -> bytes:
    """Pickle as Python 2 did it for the published batches: protocol 2, text as bytes, everything remembered."""
    count = 0

    def put() -> bytes:
        nonlocal count
        count += 1
        return b"q" + bytes([count]) if count < 256 else b"r" + struct.pack("<I", count)

    def dump(x: Any) -> bytes:
        if isinstance(x, str):
            return dump(x.encode())
        if isinstance(x, bytes):
            return (b"U" + bytes([len(x)]) if len(x) < 256 else b"T" + struct.pack("<i", len(x))) + x + put()
        if isinstance(x, int):
            return b"K" + bytes([x]) if x < 256 else b"M" + struct.pack("<H", x)
        if isinstance(x, list):
            return b"]" + put() + b"(" + b"".join(map(dump, x)) + b"e"
        if isinstance(x, dict):
            return b"}" + put() + b"(" + b"".join(dump(k) + dump(v) for k, v in x.items()) + b"u"
        array = b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put() + b"K\x00\x85" + put()
        array += (
            dump(b"b") + b"\x87" + put() + b"R" + put() + b"(K\x01" + b"".join(map(dump, x.shape)) + b"\x86" + put()
        )
        array += b"cnumpy\ndtype\n" + put() + dump(b"u1") + b"K\x00K\x01\x87" + put() + b"R" + put() + b"(K\x03"
        array += dump(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + dump(x.tobytes()) + b"tb"
        return array

    return b"\x80\x02" + dump(value) + b"."


WRITERS: dict[str, Callable[[Any], bytes] | None] = {"binary": None, "Python 2": python2}
WRITERS |= {f"protocol {p}": lambda x, p=p: pickle.dumps(x, p) for p in (2, 3, 4, 5)}


# ---- idx -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dot", ["-", "."])
@pytest.mark.parametrize("gz", [False, True])
def test_idx_in_all_spellings(tmp_path, gz, dot):
    folder = write_idx(tmp_path / "MNIST" / "raw", gz, dot)
    for source in (folder, tmp_path, str(tmp_path)):
        for split, name in (("train", "train"), ("test", "t10k")):
            data = load(source, split)
            assert np.array_equal(data.images[:, 0], IDX[name][0])
            assert data.labels.tolist() == IDX[name][1].tolist()
            assert (data.classes, data.name) == (tuple("0123456789"), str(source))
            assert data.labels.dtype == np.int64
    assert kind_of(tmp_path) == "mnist"


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("fashion", "fashion-mnist"),
        ("FashionMNIST/raw", "fashion-mnist"),
        ("fashion/mnist", "mnist"),
        ("mine/digits", "mnist"),
    ],
)
def test_fashion_is_told_by_its_folder(tmp_path, folder, kind):
    write_idx(tmp_path / folder)
    assert kind_of(tmp_path / folder) == kind
    assert load(tmp_path / folder).classes[0] == ("T-shirt/top" if kind == "fashion-mnist" else "0")


IMAGES, LABELS = map(idx, IDX["train"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", b"", "starts with nothing"),
        ("images-idx3", IMAGES[:9], "cannot be read"),
        ("images-idx3", IMAGES[:-1], "needs 360 bytes, there are 359"),
        ("images-idx3", IMAGES + b"\0", "needs 360 bytes, there are 361"),
        ("images-idx3", LABELS, "starts with 00 00 08 01"),
        ("images-idx3", b"\0\0\x0d\3" + IMAGES[4:], "starts with 00 00 0d 03"),  # floats
        ("images-idx3", IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "more than half"),
        ("images-idx3", idx(np.zeros((0, 5, 5), np.uint8)), "labels for 0 images"),
        ("images-idx3", gzip.compress(IMAGES[:-1]), "360 bytes expected, it has 359"),
        ("images-idx3", gzip.compress(IMAGES + b"\0"), "360 bytes expected, it has more"),
        ("images-idx3", gzip.compress(IMAGES)[:-9], "ended before"),
        ("images-idx3", gzip.compress(IMAGES)[:-8] + b"\0" * 8, "CRC"),
        ("images-idx3", gzip.compress(IMAGES[:4] + b"\0\xff\xff\xff" + IMAGES[8:]), "packed bytes cannot hold"),
        ("labels-idx1", idx(np.arange(11, dtype=np.uint8) % 10), "11 labels for 12 images"),
        ("labels-idx1", idx(np.arange(12, dtype=np.uint8)), "label 10 of image 10 is not one of 10 classes"),
    ],
)
def test_idx_that_cannot_be_used(tmp_path, name, content, message):
    path = write_idx(tmp_path / "mnist") / f"train-{name}-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "mnist")
    assert f"train-{name[:6]}" in caught.value.what or name == "images-idx3"
    assert str(tmp_path) in caught.value.what
    assert caught.value.remedy


def test_a_missing_idx_file_is_named(tmp_path):
    (write_idx(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    load(tmp_path)
    with pytest.raises(DataError, match=r"no file t10k-labels-idx1-ubyte nor .*\.gz, needed for the split 'test'"):
        load(tmp_path, "test")


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    read = []
    inner = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: read.append(n) or inner(self, n))
    path = write_idx(tmp_path) / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(IMAGES + bytes(50_000_000)))
    with pytest.raises(DataError, match="it has more"):
        load(tmp_path)
    assert min(read) >= 0
    assert sum(read) == len(IMAGES) + 1


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["cifar-10", "cifar-100"])
def test_cifar_in_all_layouts(tmp_path, kind, writer):
    folder = write_cifar(tmp_path / "sub" / "cifar", kind, WRITERS[writer])
    assert kind_of(folder) == kind_of(tmp_path) == kind
    batches = CIFAR if kind == "cifar-10" else CIFAR100
    for split in ("train", "test"):
        data = load(tmp_path, split)
        parts = [batches[name] for name in batches if ("test" in name) == (split == "test")]
        assert np.array_equal(data.images, np.concatenate([p for p, _ in parts]).reshape(-1, 3, 32, 32))
        assert data.labels.tolist() == [label for _, labels in parts for label in labels]
        assert data.classes == tuple(NAMES10 if kind == "cifar-10" else NAMES100)
        assert data.images.flags.c_contiguous


def test_a_fortran_array_is_turned_round(tmp_path):
    dumps = lambda x: pickle.dumps({k: np.asfortranarray(v) if k == "data" else v for k, v in x.items()}, 2)
    data = load(write_cifar(tmp_path, "cifar-100", dumps), "test")
    assert np.array_equal(data.images.reshape(2, 3072), CIFAR100["test"][0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_batch.bin", bytes(3072), "3,072 bytes are not a whole number of records of 3,073"),
        ("test_batch.bin", b"", "0 bytes are not"),
        ("test_batch.bin", b"\x0a" + bytes(3072), "label 10 of image 0"),
        ("batches.meta.txt", b"one\ntwo\n", "2 names of classes, not 10"),
        ("batches.meta.txt", b" ".join([b"x" * 2000] * 10), "short text"),
        ("batches.meta.txt", None, "no such file"),
    ],
)
def test_cifar_that_cannot_be_used(tmp_path, name, content, message):
    write_cifar(tmp_path, "cifar-10")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, "test")
    assert str(tmp_path / name) in caught.value.what
    assert caught.value.remedy


def test_a_missing_batch_is_not_passed_over(tmp_path):
    (write_cifar(tmp_path, "cifar-10") / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_3\.bin: no such file"):
        load(tmp_path)


def test_a_stray_file_called_meta_makes_no_cifar(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "meta").write_text("where the photos came from")
    assert kind_of(tmp_path) == "folder"


class Malicious:
    def __reduce__(self):
        return os.system, ("touch ran-after-all",)


def batch(**changed: Any) -> dict[str, Any]:
    return {"data": CIFAR["test_batch"][0], "labels": CIFAR["test_batch"][1]} | changed


NUMPY = b"cnumpy.core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            pickle.dumps(batch(more=Malicious()), 2),
            r"it asks for '\w+\.system', which no data set needs: it was not run",
        ),
        (
            pickle.dumps(batch(more=Malicious()), 4),
            r"it asks for '\w+\.system', which no data set needs: it was not run",
        ),
        (pickle.dumps(Malicious(), 0), "it asks for"),
        (b"cbuiltins\neval\n(X\x01\0\0\x001tR.", "it asks for 'builtins.eval'"),
        (b"cnumpy\nload\n(tR.", "it asks for 'numpy.load'"),
        (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "it calls numpy.ndarray in a way"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.", "it calls _codecs.encode in a way"),
        (b"\x80\x02cnumpy\ndtype\nX\x01\0\0\0OK\x00K\x01\x87R.", "it calls numpy.dtype in a way"),
        (pickle.dumps(batch(data=np.zeros((4, 3072), np.int16))), "it calls numpy.dtype in a way"),
        (pickle.dumps(batch(data=np.zeros((4, 3071), np.uint8))), r"shape \(4, 3071\)"),
        (pickle.dumps(batch(data=[1, 2])), "a list where a _Array belongs"),
        (pickle.dumps(batch(labels=[0, 1, 2])), "3 labels for 4 images"),
        (pickle.dumps(batch(labels=[0, 1, 2, 10])), "label 10 of image 3"),
        (pickle.dumps(batch(labels=[0, 1, 2, -1])), "label -1 of image 3"),
        (pickle.dumps(batch(labels=[0, 1, 2, True])), "labels that are not whole numbers"),
        (pickle.dumps(batch(labels=[0, 1, 2, 2**70])), "OverflowError"),
        (pickle.dumps([1]), "a list where a dict belongs"),
        (pickle.dumps(batch())[:-100], "cut short"),
        (pickle.dumps({(1,): 2}), "a tuple where a short text belongs"),
        (python2({"data": CIFAR["test_batch"][0]}), "a NoneType where a list belongs"),
        (NUMPY + b"(tR}b.", "a dict where a tuple belongs"),
        (b"\x80\x02" + b"]" * 1_200_000, "more than 1,000,000 instructions"),
        (b"\x80\x02]" + b"\x85" * 200_000 + b".", "a tuple where a dict belongs"),  # too deep for Python to walk
        (b"\x80\x02}]" + b"\x85" * 200_000 + b"K\x00s.", "a tuple where a short text belongs"),
        (b"\x80\x02X\xff\xff\xff\xff", "cut short"),
        (b"garbage", "unknown instruction b'g'"),
        (b"", "cut short"),
        (b"..", "IndexError"),
    ],
)
def test_batches_that_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (write_cifar(tmp_path / "x", "cifar-10", python2) / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "x", "test")
    assert str(tmp_path / "x" / "test_batch") in caught.value.what
    assert not Path("ran-after-all").exists()


@pytest.mark.parametrize("again", [b"h\x01h\x02R", b"h\x03h\x04b", b"h\x05K\x00s"])
def test_a_short_batch_cannot_ask_for_much(again):
    """A long text, once told, is encoded, kept in arrays or used as a key over and over: it must not be copied."""
    text = b"X" + struct.pack("<I", 1_000_000) + b"a" * 1_000_000
    start = b"\x80\x02c_codecs\nencode\nq\x01" + text + b"q\x05X\x06\0\0\0latin1\x86q\x02"
    start += NUMPY + b")Rq\x03(K\x01)N\x89h\x05tq\x04"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_plain_pickle(start + b"}" + again * 10_000 + b".")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


# ---- which one is it -------------------------------------------------------------------------------------------------


def test_names_are_looked_for_in_the_data_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVIT_DATA", str(tmp_path))
    write_idx(tmp_path / "mnist", gz=True)
    write_idx(tmp_path / "fashion-mnist" / "raw")
    write_cifar(tmp_path / "cifar-10" / "cifar-10-batches-py", "cifar-10", python2)
    for name in ("mnist", "fashion-mnist", "cifar-10"):
        assert (load(name).name, kind_of(name)) == (name, name)
    assert load("fashion-mnist").classes[9] == "Ankle boot"
    with pytest.raises(DataError, match="cifar-100 is not on this machine") as caught:
        load("cifar-100")
    assert "minivit data get cifar-100" in caught.value.remedy
    write_cifar(tmp_path / "cifar-100", "cifar-10")
    with pytest.raises(DataError, match="holds cifar-10, not cifar-100"):
        load("cifar-100")


def test_a_name_wins_over_a_folder_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIVIT_DATA", str(tmp_path / "home"))
    write_idx(tmp_path / "mnist")
    with pytest.raises(DataError, match="not on this machine"):
        load("mnist")
    assert len(load("./mnist")) == len(load(Path("mnist"))) == 12


def test_the_data_home(monkeypatch):
    monkeypatch.delenv("MINIVIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert data_home() == Path("/caches/minivit")
    monkeypatch.setenv("HOME", "/home/someone")
    for none in ("caches", ""):  # a relative one does not count
        monkeypatch.setenv("XDG_CACHE_HOME", none)
        assert data_home() == Path("/home/someone/.cache/minivit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_home() == Path("/home/someone/.cache/minivit")
    monkeypatch.setenv("MINIVIT_DATA", "mine")
    assert data_home() == Path("mine")


def test_kinds(tmp_path):
    with open(tmp_path / "a.dat", "wb") as file:
        np.savez(file, images=pixels(2, 4, 4), labels=np.array([0, 1]))
    (tmp_path / "train" / "cats").mkdir(parents=True)
    assert kind_of("digits") == "digits"
    assert kind_of(tmp_path / "a.dat") == "npz"  # by content
    assert len(load(tmp_path / "a.dat")) == 2
    assert kind_of(tmp_path) == kind_of(tmp_path / "train") == "folder"
    with pytest.raises(DataError, match="no such file or folder"):
        kind_of(tmp_path / "none")
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(IMAGES))
    with pytest.raises(DataError, match="not a NumPy archive") as caught:
        load(tmp_path / "train-images-idx3-ubyte.gz")
    assert "folder" in caught.value.remedy


def test_asking_for_the_kind_reads_no_data(tmp_path):
    write_cifar(tmp_path, "cifar-10")
    code = f"import sys; from minivit.data import kind_of; print(kind_of({str(tmp_path)!r}), *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cifar-10 ")
    assert not {"PIL", "pooch", "tarfile", "minivit.data.folder", "minivit.autograd"} & {*done.stdout.split()}


REAL = {  # first labels, mean of the first channel of the training images
    "mnist": ([5, 0, 4, 1, 9, 2, 1, 3], 0.130660),
    "fashion-mnist": ([9, 0, 0, 3, 0, 2, 7, 2], 0.286041),
    "cifar-10": ([6, 9, 9, 4, 1, 1, 2, 7], 0.491400),
}


@pytest.mark.parametrize("name", REAL)
def test_the_real_sets(name):
    if not (data_home() / name).is_dir():
        pytest.skip(f"{name} is not in the data home")
    train, test = load(name), load(name, "test")
    labels, mean = REAL[name]
    assert train.labels[:8].tolist() == labels
    assert train.mean[0] == pytest.approx(mean, abs=1e-6)
    assert (len(train), len(test)) == (50_000 if name == "cifar-10" else 60_000, 10_000)


# ---- archives --------------------------------------------------------------------------------------------------------


def npy(shape: str, size: int = 64) -> bytes:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(size)


@pytest.mark.parametrize(
    ("method", "images", "message"),
    [
        (zipfile.ZIP_STORED, npy("(4, 4, 4)"), None),
        (
            zipfile.ZIP_STORED,
            npy("(10**12, 4, 4)".replace("10**12", "1000000000000")),
            "needs 16,000,000,000,000 bytes",
        ),
        (zipfile.ZIP_DEFLATED, npy("(4, 4, 5)"), "needs 80 bytes, there are 64"),
        (zipfile.ZIP_DEFLATED, npy("(-4, -4, 4)"), "cannot be read"),
        (zipfile.ZIP_STORED, npy("(4, 4, 4)").replace(b"|u1", b"|O8"), "cannot be read"),
        (zipfile.ZIP_STORED, npy("(4, 4, 4)").replace(b"\x01\x00", b"\x09\x00", 1), "cannot be read"),
        (zipfile.ZIP_STORED, b"not an array", "cannot be read"),
        (zipfile.ZIP_BZIP2, npy("(4, 4, 4)"), "unknown method of compression"),
        (zipfile.ZIP_LZMA, npy("(4, 4, 4)"), "unknown method of compression"),
    ],
)
def test_npz_headers_are_checked_before_memory_is_taken(tmp_path, method, images, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", npy("(4,)", 4))
    if message is None:
        assert load(tmp_path / "a.npz").images.shape == (4, 1, 4, 4)
        return
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / "a.npz")
    assert caught.value.what.startswith(str(tmp_path / "a.npz"))


def test_an_archive_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((1000, 32, 32), np.uint8), labels=np.zeros(1000, int))
    assert len(load(tmp_path / "a.npz")) == 1000
    monkeypatch.setattr(reading, "available_memory", lambda: 2_000_000)
    with pytest.raises(
        DataError, match=r"it needs 1,032,256 bytes of memory, more than half of the 2,000,000 that are"
    ):
        load(tmp_path / "a.npz")


def test_channels_last_are_turned_where_they_lie():
    images = pixels(4000, 32, 32, 3)
    expected = images.transpose(0, 3, 1, 2).copy()
    tracemalloc.start()
    try:
        turned = channels_first(images, Path("x"))
        assert tracemalloc.get_traced_memory()[1] < images.nbytes // 2
    finally:
        tracemalloc.stop()
    assert np.array_equal(turned, expected)
    assert turned.flags.c_contiguous


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("cifar", "data_batch_3.bin"),
        ("cifar", "batches.meta.txt"),
        ("idx", "train-labels-idx1-ubyte"),
        ("npz", "x.npz"),
    ],
)
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: bind(path)])
def test_only_regular_files_are_opened(tmp_path, kind, name, make):
    path = tmp_path / name
    if kind == "cifar":
        write_cifar(tmp_path, "cifar-10")
    elif kind == "idx":
        write_idx(tmp_path)
    path.unlink(missing_ok=True)
    make(path)
    code = f"from minivit.data import load; load({str(path if kind == 'npz' else tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "DataError" in done.stderr
    words = ("not a regular file", "no file train-labels", "No such device")  # the last one of a socket
    assert any(word in done.stderr for word in words)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_arrays_of_all_orders_come_back(tmp_path):
    images, labels = np.asfortranarray(pixels(3, 6, 5, 3)), np.array([1, 0, 2], ">i4")
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=np.array(["ä", "b", "c"]))
    data = load(tmp_path / "a.npz")
    assert np.array_equal(data.images, images.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == [1, 0, 2]
    assert data.classes == ("ä", "b", "c")
    data.images[0] = 0  # it can be written to


@pytest.mark.parametrize("names", [["cat", "Kätzchen"], [b"cat", "Kätzchen".encode()]])
def test_classes_are_text_or_bytes(tmp_path, names):
    np.savez(tmp_path / "a.npz", images=pixels(2, 4, 4), labels=np.array([0, 1]), classes=np.array(names))
    assert load(tmp_path / "a.npz").classes == ("cat", "Kätzchen")
