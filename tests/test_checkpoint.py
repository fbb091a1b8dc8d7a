"""Checkpoints: what goes in comes out, every damage is found, and no failure spoils what was there before."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

import minivit as mv
from minivit.errors import CheckpointError
from minivit.files import sync
from minivit.train import AdamW, load_checkpoint, parameters_hash, save_checkpoint
from minivit.weights import checkpoint as module

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


FLIPS = int(os.environ.get("MINIVIT_FLIPS", "200"))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The checkpoint of a digits model in training, and where in it the bytes of each array are."""
    model = mv.create_model("vit_digits")
    opt = AdamW(model.named_parameters())
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    arrays |= {f"optimizer/{name}": array for name, array in opt.state_dict().items()}
    path, places = tmp_path_factory.mktemp("real") / "last.npz", {}
    save_checkpoint(path, arrays, {"model": model.config, "train": {"history": [{"epoch": 1, "loss": 2.3}]}})
    with zipfile.ZipFile(path) as archive, open(path, "rb") as f:
        for member in archive.infolist():
            f.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", f.read(4))  # the lengths in a local header (APPNOTE.TXT, 4.3.7)
            start = member.header_offset + 30 + name + extra
            places[member.filename.removesuffix(".npy")] = range(start, start + member.file_size)
    return path, places


def test_every_flipped_bit_is_found_and_the_damaged_array_named(real):
    """MINIVIT_FLIPS=2000 flips as many bits as are promised to be found."""
    path, places = real
    whole, choose, named = path.read_bytes(), random.Random(0), 0
    # half of them anywhere, which is nearly always in an array, half of them near the ends of the arrays
    edges = [i for place in places.values() for end in (place.start, place.stop) for i in range(end - 60, end + 60)]
    edges += range(places["meta"].stop, len(whole))  # the archive's list of its members, and the seal
    edges = [i for i in edges if 0 <= i < len(whole)]
    with open(path, "r+b", buffering=0) as f:
        for flip in range(FLIPS):
            at = choose.randrange(len(whole)) if flip % 2 else choose.choice(edges)
            os.pwrite(f.fileno(), bytes([whole[at] ^ 1 << choose.randrange(8)]), at)
            with pytest.raises(CheckpointError, match=r"last\.npz is not a usable checkpoint: it is ") as caught:
                load_checkpoint(path)
            said = re.search(r"damaged, in (.*)$", caught.value.what)
            if hit := [name for name, place in places.items() if at in place]:
                assert said and said[1] == hit[0], f"bit at {at} in {hit[0]}: {caught.value.what}"
                named += 1
            elif said:  # never a name that there is not
                assert said[1] in {"what surrounds the arrays", *places}
            os.pwrite(f.fileno(), whole[at : at + 1], at)
    load_checkpoint(path)
    print(f"{FLIPS} flips found, {named} of them in an array, which was named")
    assert named > FLIPS // 2


@pytest.mark.parametrize("name", [*ARRAYS, "meta"])
def test_numpys_own_reader_finds_a_damaged_array_too(path, name):
    """Each array has a checksum of its own that any reader of archives compares."""
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data = archive.read(f"{name}.npy")
    whole[whole.index(data) + len(data) - 1] ^= 4
    path.write_bytes(whole)
    with np.load(path) as file, pytest.raises((zipfile.BadZipFile, ValueError), match=r"CRC|header"):
        file[name]
    with pytest.raises(CheckpointError, match=f"it is damaged, in {name}") as caught:
        load_checkpoint(path)
    assert caught.value.remedy


def test_memory_that_runs_out_is_not_called_damage(path, monkeypatch):
    def none_left(archive, member):
        raise MemoryError

    monkeypatch.setattr(module, "_array", none_left)
    with pytest.raises(MemoryError):
        load_checkpoint(path)


@pytest.mark.parametrize("zeros", [0, 20_000_000])
def test_reading_takes_at_most_twice_the_file(tmp_path, zeros):
    save_checkpoint(tmp_path / "a.npz", {"a": np.zeros(zeros // 8), "b": np.ones(2_000_000)}, {})
    tracemalloc.start()
    try:
        load_checkpoint(tmp_path / "a.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.05 * (tmp_path / "a.npz").stat().st_size + 1_000_000


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


def test_a_file_system_that_is_full(path, tmp_path):
    """The kernel itself refuses to write on, at many sizes; buffered bytes then fail as late as at close."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = path.read_bytes()
    size = 200_000
    try:
        for limit in (*range(0, 3000, 77), 4096, 65536, size, size + 500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(CheckpointError, match=r"cannot save .*\(200,\d\d\d bytes needed, [\d,]+ free\)"):
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
    sync(folder)
    with monkeypatch.context() as windows:
        windows.setattr(module.os, "name", "nt")
        sync(folder)
    assert len(synced) == 1


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot save"):
        save_checkpoint(tmp_path / "file" / "a.npz", {}, {})


def test_sweep_removes_half_written_files_only(path):
    """Only minivit's own, and only where a run writes."""
    ours, folder = f".a.npz.{'0' * 16}.minivit-tmp", path.parent
    others = [
        "a.npz.tmp",
        "b.minivit-tmp",
        f".a.npz.{'0' * 15}.minivit-tmp",
        f"mine/{ours}",
        f"checkpoints/mine/{ours}",
    ]
    for name in [*others, ours, f"checkpoints/{ours}"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ours.replace("0", "1")).mkdir()
    (folder / ours.replace("0", "2")).symlink_to(path)
    module.sweep(folder)
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    assert left == sorted(["a.npz", *others])


def test_a_temporary_file_is_made_anew_and_never_written_through_a_link(path, monkeypatch):
    whole, mine = path.read_bytes(), path.with_name("mine")
    mine.write_text("mine")
    path.with_name("a.npz.tmp").symlink_to(mine)  # the fixed name that version 0.1.0 opened
    save_checkpoint(path, ARRAYS, META)
    monkeypatch.setattr(os, "urandom", bytes)  # as if somebody had guessed the name
    guessed = path.with_name(f".a.npz.{'0' * 16}.minivit-tmp")
    guessed.symlink_to(mine)
    with pytest.raises(CheckpointError, match="File exists"):
        save_checkpoint(path, ARRAYS, META)
    assert mine.read_text() == "mine" and guessed.is_symlink() and path.read_bytes() == whole


def test_what_is_replaced_has_the_mode_of_a_new_file_and_may_have_a_long_name(tmp_path):
    path, other = tmp_path / f"{'ü' * 120}.npz", tmp_path / "other"
    save_checkpoint(path, {}, {})
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
