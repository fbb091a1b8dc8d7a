"""Checkpoints: what goes in comes out, every damage is found, and no failure spoils what was there before."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import zipfile

import numpy as np
import pytest

import minivit as mv
from minivit.errors import CheckpointError
from minivit.train import checkpoint as module
from minivit.train import load_checkpoint, parameters_hash, save_checkpoint

ARRAYS = {
    "model/weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model/bias": np.array([np.nan, -0.0, np.inf]),
    "model/none": np.zeros((0, 3), np.float16),
    "optimizer/steps": np.asarray(7),
    "mask": np.array([True, False]),
    "file": np.arange(5, dtype=np.uint8),  # a name that np.savez would take for its own argument
}
META = {"model": {"dim": 8}, "classes": ["ü", "二"], "train": {"loss": 0.1, "best": None}}


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "a.npz", ARRAYS, META)
    return tmp_path / "a.npz"


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def sealed(path):
    """Give a file that a test has made the seal that minivit would give it."""
    with open(path, "r+b") as f:
        size = f.seek(0, os.SEEK_END) - module._SEAL_SIZE
        digest = module._digest(f, size)
        f.seek(size)
        f.write(module._SEAL + digest)


# ---- what goes in comes out ------------------------------------------------------------------------------------------


def test_arrays_and_meta_come_back_to_the_bit(path):
    checkpoint = load_checkpoint(str(path))
    assert checkpoint.arrays.keys() == ARRAYS.keys()
    assert all(same(checkpoint.arrays[name], array) for name, array in ARRAYS.items())
    assert checkpoint.meta == {"format": 1, **META}
    assert checkpoint.under("model").keys() == {"weight", "bias", "none"}
    checkpoint.arrays["mask"][0] = False  # they are the caller's own


def test_numpy_opens_it_without_minivit(path):
    with np.load(path, allow_pickle=False) as file:
        assert same(file["model/weight"], ARRAYS["model/weight"])
        assert json.loads(file["meta"].tobytes())["classes"] == ["ü", "二"]


def test_equal_content_gives_equal_bytes(path, tmp_path):
    fortran = {name: np.asfortranarray(a) if a.ndim else a for name, a in ARRAYS.items()}
    save_checkpoint(tmp_path / "b.npz", fortran, META)
    assert path.read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_object_array_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        save_checkpoint(tmp_path / "b.npz", {"a": np.array([object()])}, {})
    assert not list(tmp_path.iterdir())


def test_the_hash_tells_values_names_and_shapes_apart():
    model = mv.ViT(8, 2, 1, 4, dim=8, depth=1, heads=2)
    first = parameters_hash(model)
    assert first == parameters_hash(mv.ViT(8, 2, 1, 4, dim=8, depth=1, heads=2)) and len(first) == 64
    model.head.bias.data[0] = -0.0  # equal to 0.0, of other bits
    second = parameters_hash(model)
    model.head.bias.data = model.head.bias.data.reshape(2, 2)
    assert len({first, second, parameters_hash(model)}) == 3


# ---- every damage is found -------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(path):
    whole = path.read_bytes()
    places = random.Random(0)
    with open(path, "r+b", buffering=0) as f:
        for _ in range(2000):
            place = places.randrange(len(whole))
            os.pwrite(f.fileno(), bytes([whole[place] ^ 1 << places.randrange(8)]), place)
            with pytest.raises(CheckpointError, match=r"a\.npz is not a usable checkpoint"):
                load_checkpoint(path)
            os.pwrite(f.fileno(), whole[place : place + 1], place)
    load_checkpoint(path)


def test_the_damaged_array_is_named(path):
    whole = bytearray(path.read_bytes())
    whole[whole.index(ARRAYS["model/weight"].tobytes()) + 5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match="it is damaged, in model/weight") as caught:
        load_checkpoint(path)
    assert caught.value.remedy


def test_every_cut_is_found(path):
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(CheckpointError, match="it is cut short, or minivit did not write it"):
            load_checkpoint(path)


def test_other_files_are_told_from_checkpoints(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    os.mkfifo(tmp_path / "pipe.npz")  # opening it would wait for a writer
    for name, message in [
        ("other.npz", "minivit did not write it"),
        ("text.npz", "minivit did not write it"),
        ("pipe.npz", "there is no checkpoint"),
        ("missing.npz", "there is no checkpoint"),
        (".", "there is no checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / name)


def npy(declared, data):
    header = f"{declared}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
OBJECT = "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n"
BYTES = "{'descr': '|u1', 'fortran_order': False, 'shape': (256,), }\n"
META_1 = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (12,), }\n", b'{"format":1}')


@pytest.mark.parametrize(
    ("entries", "compression"),
    [
        ({"meta.npy": META_1, "a.npy": npy(HUGE, b"12345678")}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1, "a.npy": npy(OBJECT, b"12345678")}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1, "a.npy": npy("{" * 5000, b"")}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1, "a.npy": b""}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1, "a.npy": npy(HUGE, b"0" * 10**6)}, zipfile.ZIP_DEFLATED),  # a bomb, were it larger
        ({"meta.npy": META_1, "a.npy": npy(BYTES, bytes(range(256)))}, zipfile.ZIP_DEFLATED),
        ({"meta.npy": META_1.replace(b"{", b"[")}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1.replace(b'{"format":1}', b"[" * 12)}, zipfile.ZIP_STORED),
        ({"meta.npy": META_1.replace(b'{"format":1}', b'[1,2,3,4,56]')}, zipfile.ZIP_STORED),
        ({}, zipfile.ZIP_STORED),
    ],
)  # fmt: skip
def test_a_file_made_to_mislead_seal_and_all(tmp_path, entries, compression):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        archive.comment = bytes(module._SEAL_SIZE)
    sealed(path)
    with pytest.raises(CheckpointError, match="its contents make no sense"):
        load_checkpoint(path)


def test_resealed_mutations_raise_nothing_else(path):
    whole, choose, refused = path.read_bytes(), random.Random(1), 0
    for _ in range(500):
        mutated = bytearray(whole)
        for _ in range(choose.randint(1, 8)):
            mutated[choose.randrange(len(whole) - module._SEAL_SIZE)] = choose.choice((0, 1, 127, 255))
        path.write_bytes(mutated)
        sealed(path)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
    assert refused > 250


def test_a_newer_format_says_so(tmp_path):
    save_checkpoint(tmp_path / "a.npz", {}, {"format": 2})
    with pytest.raises(CheckpointError, match="has format 2, this minivit reads 1"):
        load_checkpoint(tmp_path / "a.npz")


# ---- no failure spoils what was there --------------------------------------------------------------------------------


class Fault:
    """Makes the N-th write, fsync or rename fail; a failing write has written half of its bytes."""

    def __init__(self, monkeypatch, failing):
        self.calls, self.failing = [], failing
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(module, "open", self.open, raising=False)
        monkeypatch.setattr(module.os, "fsync", lambda fd: (self.count("fsync"), fsync(fd)))
        monkeypatch.setattr(module.os, "replace", lambda a, b: (self.count("rename"), replace(a, b)))

    def count(self, call):
        self.calls.append(call)
        if len(self.calls) == self.failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open(self, *args):
        fault = self

        class File:
            def __init__(self):
                self.file = open(*args)  # noqa: SIM115 (closed by __exit__)

            def __getattr__(self, name):
                return getattr(self.file, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.file.close()

            def write(self, data):
                try:
                    fault.count("write")
                except OSError:
                    self.file.write(bytes(data)[: len(data) // 2])
                    raise
                return self.file.write(data)

        return File()


def test_each_write_fsync_and_rename_may_fail(path):
    before = path.read_bytes()
    failed = 0
    while True:
        path.write_bytes(before)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, failed + 1)
            try:
                save_checkpoint(path, {"a": np.ones(1000)}, {"new": True})
                break  # none failed any more
            except CheckpointError as error:
                assert "\n" not in error.what and "No space left" in error.what
                assert "0.0 MB needed" in error.what and " MB free" in error.what
        failed += 1
        assert [p.name for p in path.parent.iterdir()] == ["a.npz"], f"call {failed} left a file"
        # the last call makes the rename last: by then the new file, whole, has taken the place of the old one
        replaced = fault.calls[-2:] == ["rename", "fsync"]
        assert load_checkpoint(path).meta["new"] if replaced else path.read_bytes() == before, f"call {failed}"
    assert failed == len(fault.calls) >= 10
    assert fault.calls[-3:] == ["fsync", "rename", "fsync"]


def test_a_file_system_that_is_full(path, tmp_path):
    """The kernel itself refuses to write on, at many sizes; buffered bytes then fail as late as at close."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    size = 200_000
    try:
        for limit in (*range(0, 3000, 77), 4096, 65536, size, size + 500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(CheckpointError, match=r"cannot save .*0\.2 MB needed"):
                save_checkpoint(path, {"a": np.ones(size // 8)}, {})
            assert [p.name for p in tmp_path.iterdir()] == ["a.npz"] and path.read_bytes() == before
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_ctrl_c_while_saving_leaves_the_old_file_alone(path, monkeypatch):
    before = path.read_bytes()

    def interrupted(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {}, {})
    assert [p.name for p in path.parent.iterdir()] == ["a.npz"] and path.read_bytes() == before


def test_windows_folders_are_not_synced(path, monkeypatch):
    synced, folder = [], path.parent
    monkeypatch.setattr(module.os, "fsync", synced.append)
    module._sync_folder(folder)
    with monkeypatch.context() as windows:
        windows.setattr(module.os, "name", "nt")
        module._sync_folder(folder)
    assert len(synced) == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save"):
        save_checkpoint(tmp_path / "file" / "a.npz", {}, {})


def test_sweep_removes_half_written_files_only(path):
    path.with_name("a.npz.tmp").touch()
    (path.parent / "checkpoints").mkdir()
    (path.parent / "checkpoints" / "last.npz.tmp").touch()
    module.sweep(path.parent)
    assert sorted(p.name for p in path.parent.rglob("*")) == ["a.npz", "checkpoints"]
