"""Weights files that are damaged, or made to mislead: a typed error or the right arrays, nothing run, little memory."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile

import numpy as np
import pytest

import minivit as mv
from minivit.backend import Key, uniform
from minivit.errors import CheckpointError, MinivitError
from minivit.weights.foreign import open_foreign
from minivit.weights.stored import open_stored
from tests.test_weights import SMALL, case, goldens  # noqa: F401
from tests.weight_files import peak, safetensors


def small_state(dtype=np.float32):
    return {n: a.astype(dtype) for n, a in mv.ViT(**SMALL).state_dict().items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# ---- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "BF16"])
def test_numbers_of_every_width(path, dtype):
    state = small_state()
    if dtype == "BF16":
        state = {n: (a.view(np.uint32) >> 16).astype(np.uint16) for n, a in state.items()}
        expected = {n: (a.astype(np.uint32) << 16).view(np.float32) for n, a in state.items()}
    else:
        state = expected = {n: a.astype(dtype) for n, a in state.items()}
    path.write_bytes(safetensors(state, {"format": "pt"}))
    model = mv.ViT(**SMALL)
    mv.load_weights(model, path)
    for n, a in model.state_dict().items():
        np.testing.assert_array_equal(a, expected[n].astype(np.float32))
    mv.load_weights(model.to(np.float64), path)
    assert all((a == expected[n].astype(np.float64)).all() for n, a in model.state_dict().items())


def moved(name, **changes):
    return lambda header: header | {name: header[name] | changes}


BAD_HEADERS = {
    "no dtype": (lambda h: h | {"norm.bias": {"shape": [12]}}, "is not described by"),
    "an unknown dtype": (moved("norm.bias", dtype="F4_NEW"), "known are F64"),
    "a dtype that is no text": (moved("norm.bias", dtype=["F32"]), "has the dtype"),
    "a negative length": (moved("norm.bias", shape=[-12]), "has the shape"),
    "a length that is true": (moved("norm.bias", shape=[True]), "has the shape"),
    "a fraction": (moved("norm.bias", shape=[12.0]), "has the shape"),
    "a huge shape": (moved("norm.bias", shape=[1 << 40, 1 << 40]), "needs"),
    "a huge length": (moved("norm.bias", shape=[1 << 62]), "has the shape"),
    "too many axes": (moved("norm.bias", shape=[1] * 40), "has the shape"),
    "another shape": (moved("norm.bias", shape=[13]), "needs 52"),
    "offsets backwards": (moved("norm.bias", data_offsets=[48, 0]), "has the data_offsets"),
    "offsets of one number": (moved("norm.bias", data_offsets=[48]), "has the data_offsets"),
    "offsets that overlap": (moved("norm.bias", data_offsets=[0, 48]), "begins at byte"),
    "offsets beyond the end": (moved("norm.bias", data_offsets=[1 << 40, (1 << 40) + 48]), "begins at byte"),
    "one array less": (lambda h: {n: v for n, v in h.items() if n != "head.bias"}, "begins at byte|it has"),
    "no table": (lambda h: "[1, 2]", "is no table"),
    "a table that is cut": (lambda h: json.dumps(h)[:-3], "cannot be read"),
    "deep lists": (lambda h: '{"a":' + "[" * 50_000, "cannot be read"),
    "metadata of numbers": (lambda h: {"__metadata__": {"a": 1}} | h, "__metadata__"),
    "a name twice": (lambda h: [*h.items(), ("norm.bias", h["norm.bias"])], "norm.bias' is there more than once"),
}


@pytest.mark.parametrize("bad", BAD_HEADERS)
def test_headers_that_mislead(path, bad):
    edit, match = BAD_HEADERS[bad]
    path.write_bytes(safetensors(small_state(), edit=edit))
    model = mv.ViT(**SMALL)
    before = model.state_dict()
    for use in (lambda: mv.load_weights(model, path), lambda: mv.load_model(path), lambda: open_foreign(path)):
        with pytest.raises(CheckpointError, match=match):
            use()
    assert all((a == before[n]).all() for n, a in model.state_dict().items())


@pytest.mark.parametrize("length", [1 << 60, (1 << 64) - 1, 0, 1, 10_000_000])
def test_a_header_of_another_length_takes_no_memory(path, length):
    whole = safetensors(small_state())
    path.write_bytes(struct.pack("<Q", length) + whole[8:])

    def use():
        with pytest.raises(CheckpointError, match="header has"):
            mv.load_model(path)

    assert peak(use)[1] < 2 << 20


@pytest.mark.parametrize("left", [0, 5, 8, 9, 100, -1, -1000])
def test_a_file_cut_short(path, left):
    path.write_bytes(safetensors(small_state())[:left])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        mv.load_model(path)


def test_a_file_with_more_at_its_end(path):
    path.write_bytes(safetensors(small_state()) + b"PK\5\6")
    with pytest.raises(CheckpointError, match="it has"):
        mv.load_model(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\n  → run rm", "\x1b[2J", "", "x" * 100_000])
def test_names_are_text_only(path, name):
    path.write_bytes(safetensors(small_state() | {name: np.ones(3, np.float32)}))
    with pytest.raises(CheckpointError, match="unexpected") as caught:
        mv.load_weights(mv.ViT(**SMALL), path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 2000
    assert not any(line.strip().startswith("→ run") for line in str(caught.value).splitlines())


def test_whole_numbers_are_no_weights(path):
    state = small_state() | {"norm.bias": np.ones(12, np.int64)}
    path.write_bytes(safetensors(state))
    model = mv.ViT(**SMALL)
    before = model.state_dict()
    with pytest.raises(CheckpointError, match=r"norm\.bias.*int64, which no weights are made of"):
        mv.load_weights(model, path)
    assert all((a == before[n]).all() for n, a in model.state_dict().items())


def test_thousands_of_names_are_told_soon(path):
    path.write_bytes(safetensors({f"blocks.{i}.norm1.weight": np.ones(1, np.float32) for i in range(20_000)}))
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"and [0-9,]+ more") as caught:
        mv.load_weights(mv.ViT(**SMALL), path)
    assert time.perf_counter() - start < 60 and len(str(caught.value)) < 60_000
    with pytest.raises(CheckpointError):
        mv.load_model(path)


# ---- archives --------------------------------------------------------------------------------------------------------


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as z:
        for name, data in members:
            z.writestr(f"{name}.npy", data)


def npy(array, **header):
    """Return an .npy file, its header as told."""
    import io

    f = io.BytesIO()
    usual = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(f, usual | header)
    return f.getvalue() + array.tobytes()


@pytest.fixture
def google(case):  # noqa: F811
    _, path = case("google")
    return path, dict(np.load(path))


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_object_arrays_are_never_read(google, tmp_path, monkeypatch):
    path, arrays = google
    monkeypatch.chdir(tmp_path)
    trap = np.empty(5, object)
    trap[:] = Trap()
    np.savez(path, **arrays | {"head/bias": trap})
    with pytest.raises(CheckpointError, match="head/bias"):
        mv.load_model(path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="is a pickle"):
        mv.load_model(path)
    with zipfile.ZipFile(path, "w") as z:  # as torch.save makes it
        z.writestr("archive/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="is a pickle"):
        mv.load_model(path)
    assert not (tmp_path / "trapped").exists()


def test_archives_that_mislead(google):
    path, arrays = google
    whole = [(n, npy(a)) for n, a in arrays.items()]
    bias = arrays["head/bias"]
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive(path, [*whole, ("head/bias", npy(bias + 1))])
    with pytest.raises(CheckpointError, match="head/bias' is there more than once"):
        mv.load_model(path)
    for shape in [(1 << 60,), (1 << 30, 1 << 30), (6,), (-5,)]:
        archive(path, [(n, npy(a, shape=shape) if n == "head/bias" else data) for (n, data), a in
                       zip(whole, arrays.values(), strict=True)])  # fmt: skip
        with pytest.raises(CheckpointError):
            mv.load_model(path)
    archive(path, [*whole, ("../../evil", npy(bias)), ("/etc/passwd", npy(bias))])
    with pytest.raises(CheckpointError, match=r"unexpected  \.\./\.\./evil"):
        mv.load_model(path)
    archive(path, [(n, data) for n, data in whole if n != "head/bias"] + [("head/bias", b"\x93NUMPY\x03\x00")])
    with pytest.raises(CheckpointError, match="unknown version"):
        mv.load_model(path)
    archive(path, [(n, data) for n, data in whole if n != "head/bias"] + [("head/bias", b"\x93NUMPX" + npy(bias)[6:])])
    with pytest.raises(CheckpointError, match="magic string is not correct"):
        mv.load_model(path)


def test_one_array_under_two_names(google):
    path, arrays = google
    same = "Transformer/encoderblock_0/LayerNorm_1/scale"
    np.savez(path, **arrays | {same: np.ones(12, np.float32)})
    with pytest.raises(CheckpointError, match="are the same array"):
        mv.load_model(path)


def test_what_unpacks_to_more_than_there_is_takes_no_memory(google):
    path, arrays = google
    big = np.zeros((1 << 12, 1 << 11), np.float32)  # 32 MB, which pack to a thousandth
    archive(path, [*((n, npy(a)) for n, a in arrays.items()), ("head/extra", npy(big))], zipfile.ZIP_DEFLATED)

    def use():
        with pytest.raises(CheckpointError, match="unexpected  head/extra"):
            mv.load_model(path)

    assert peak(use)[1] < 8 << 20


@pytest.mark.parametrize("system", ["google", "hugging_face"])
def test_any_damage_is_told_or_does_no_harm(case, system):  # noqa: F811
    """Bits flipped, bytes cut or doubled, anywhere: an archive's own sums find them, safetensors has none."""
    _, path = case(system)
    whole = path.read_bytes()
    expected = mv.load_model(path).state_dict()
    places = (uniform(Key(7, 1), (60,)) * len(whole)).astype(int).tolist()
    header = (uniform(Key(7, 2), (60,)) * min(len(whole), 4000)).astype(int).tolist()
    for n, at in enumerate(places + header):
        damaged = bytearray(whole)
        if n % 3 == 0:
            damaged[at] ^= 1 << (n % 8)
        elif n % 3 == 1:
            del damaged[at : at + 1 + n]
        else:
            damaged[at:at] = damaged[at : at + 1 + n]
        path.write_bytes(damaged)
        try:
            state = mv.load_model(path).state_dict()
        except MinivitError:
            continue
        assert state.keys() == expected.keys() and all(a.shape == expected[k].shape for k, a in state.items())
        if system == "google":
            assert all((a == expected[k]).all() for k, a in state.items()), (n, at)


def test_a_file_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for place in (tmp_path / "pipe.safetensors", tmp_path, tmp_path / "gone.safetensors", tmp_path / ("a" * 300)):
        with pytest.raises(CheckpointError):
            mv.load_weights(mv.ViT(**SMALL), place)
    (tmp_path / "text").write_text("hello")
    assert open_stored(tmp_path / "text") is None
    np.savez(tmp_path / "photos.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.zeros(3))
    with pytest.raises(CheckpointError, match=r"no known layout.*images, labels"):
        mv.load_model(tmp_path / "photos.npz")
