"""Downloads: from a server of this machine; what is damaged is not kept, and nothing is fetched unasked."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import os
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivit.data import download, load
from minivit.errors import DataError
from tests.test_formats import write_cifar, write_idx


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    """Serve tiny data sets under the real names; pooch and the sources are turned to them."""
    pytest.importorskip("pooch").get_logger().setLevel("ERROR")
    folder = tmp_path / "served"
    folder.mkdir()
    write_idx(folder, gz=True)
    write_cifar(tmp_path / "cifar-10-batches-bin", "cifar-10")
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
        readme = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
        tar.addfile(readme, io.BytesIO())
    httpd = http.server.HTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    httpd.folder, httpd.asked = folder, []
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    address = f"http://127.0.0.1:{httpd.server_port}/"
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    for name in ("mnist", "cifar-10"):
        known = {file: digests[file] for file in download.SOURCES[name][1]}
        monkeypatch.setitem(download.SOURCES, name, (address, known))
    monkeypatch.setenv("MINIVIT_DATA", str(tmp_path / "home"))
    yield httpd
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("name", ["mnist", "cifar-10"])
def test_what_is_fetched_can_be_loaded_by_name(server, tmp_path, name):
    with pytest.raises(DataError, match=f"{name} is not on this machine") as caught:
        load(name)
    assert f"minivit data get {name}" in caught.value.remedy
    assert server.asked == []  # nothing is downloaded unasked
    assert download.fetch(name) == tmp_path / "home" / name
    assert load(name).name == load(name, "test").name == name
    asked = len(server.asked)
    assert asked == len(download.SOURCES[name][1])
    assert download.fetch(name) == tmp_path / "home" / name  # it is there: not asked for again
    assert len(server.asked) == asked
    assert not [path for path in (tmp_path / "home" / name).iterdir() if path.name.startswith((".", "tmp"))]
    assert not list((tmp_path / "home" / name).rglob("*.tar.gz"))


@pytest.mark.parametrize(
    ("name", "file"), [("mnist", "t10k-labels-idx1-ubyte.gz"), ("cifar-10", "cifar-10-binary.tar.gz")]
)
def test_a_file_that_is_not_the_published_one_is_not_kept(server, tmp_path, name, file):  # fmt: skip
    content = bytearray((server.folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (server.folder / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file}: .*(?i:sha256).* does not match") as caught:
        download.fetch(name)
    assert str(tmp_path / "home" / name) in caught.value.remedy
    assert not list((tmp_path / "home").rglob(file))


def test_a_damaged_file_is_mended(server, tmp_path):
    path = download.fetch("mnist") / "train-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz: cannot be read") as caught:
        load("mnist")
    assert "minivit data get" in caught.value.remedy
    download.fetch("mnist")
    assert len(load("mnist"))


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: whole[:3073], lambda whole: whole[:-1] + b"?", None]
)
def test_what_was_unpacked_and_is_damaged_is_fetched_again(server, damage):
    path = download.fetch("cifar-10") / "cifar-10-binary" / "data_batch_3.bin"
    whole = path.read_bytes()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(whole))
    assert download.fetch("cifar-10") == path.parents[1]
    assert path.read_bytes() == whole
    assert [entry.name for entry in path.parents[1].iterdir()] == ["cifar-10-binary"]
    assert len(load("cifar-10")) == 15


def test_files_from_elsewhere_are_used_but_not_overwritten(server, tmp_path):
    path = write_cifar(tmp_path / "home" / "cifar-10" / "mine", "cifar-10") / "data_batch_3.bin"
    assert download.fetch("cifar-10") == path.parents[1]
    path.write_bytes(b"")
    with pytest.raises(DataError, match="holds mine, from elsewhere, which is damaged or not cifar-10") as caught:
        download.fetch("cifar-10")
    assert "empty it" in caught.value.remedy
    assert (path.read_bytes(), server.asked) == (b"", [])


@pytest.mark.parametrize("name", ["mnist", "cifar-10"])
def test_what_is_fetched_is_on_the_disk(server, monkeypatch, name):
    synced, sync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino) or sync(descriptor))
    folder = download.fetch(name)
    assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= synced


@pytest.mark.parametrize("name", ["mnist", "cifar-10"])
def test_a_server_that_has_it_not(server, tmp_path, name):
    for file in server.folder.iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"gz: cannot be read.*404"):
        download.fetch(name)
    with pytest.raises(DataError, match=f"{name} is not on this machine: .* is empty") as caught:
        load(name)
    assert f"minivit data get {name}" in caught.value.remedy


def test_what_a_killed_download_has_left_goes(server, tmp_path):
    old, young = (tmp_path / "home" / "mnist" / name for name in (".get-old", ".get-young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / "tmpabc").write_bytes(b"a part")
    os.utime(old, (0, 0))
    with pytest.raises(DataError, match="mnist is not on this machine"):
        load("mnist")
    download.fetch("mnist")
    assert not old.exists()
    assert young.exists()  # another process may still be at it


@pytest.mark.parametrize(
    ("name", "message"), [("digits", "come with minivit"), ("cifar", "did you mean"), ("../x", "known: cifar-10")]
)
def test_names_that_cannot_be_fetched(name, message):
    with pytest.raises(DataError, match=message):
        download.fetch(name)


def test_without_pooch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIVIT_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(DataError, match="pooch") as caught:
        download.fetch("mnist")
    assert caught.value.remedy == "pip install 'minivit[download]'"
    assert not list(tmp_path.iterdir())


def test_every_file_has_its_sha_256():
    digests = [digest for _, files in download.SOURCES.values() for digest in files.values()]
    assert len(set(digests)) == len(digests) == 10
    assert all(len(bytes.fromhex(digest)) == 32 for digest in digests)
