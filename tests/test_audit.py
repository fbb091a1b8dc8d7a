"""Looking a data set over: what ``minivit data`` finds and prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, random_bits
from minivit.cli.main import main
from minivit.data import load
from minivit.data.audit import audit
from minivit.data.folder import load_folder
from minivit.errors import ConfigError, DataError


def picture(seed: int, height: int = 10, width: int = 10) -> Image.Image:
    return Image.fromarray((random_bits(Key(seed), (height, width, 3)) >> 24).astype(np.uint8))


@pytest.fixture
def zoo(tmp_path):
    """A folder with one fault of each kind."""
    root, seed = tmp_path / "zoo", 0
    for split in ("train", "test"):
        for kind in ("ape", "bee"):
            (root / split / kind).mkdir(parents=True)
            for i in range(3):
                seed += 1
                picture(seed).save(root / split / kind / f"{i}.png")
    one = Image.open(root / "train/ape/0.png")
    one.save(root / "train/ape/copy.bmp")  # other bytes, the same pixels
    one.save(root / "train/ape/another.png")
    Image.open(root / "train/bee/1.png").save(root / "test/bee/leak.png")
    Image.open(root / "train/bee/2.png").save(root / "train/ape/which.png")
    (root / "train/bee/broken.png").write_bytes((root / "train/bee/0.png").read_bytes()[:80])
    (root / "test/ape/empty.jpg").write_bytes(b"")
    picture(98, 30, 20).convert("L").save(root / "test/ape/grey.png")
    frames = [Image.new("L", (5, 4), grey) for grey in (10, 200)]
    frames[0].save(root / "train/bee/moving.gif", save_all=True, append_images=frames[1:])
    return root


def test_every_fault_is_found(zoo):
    found = audit(zoo, (8, 8))
    assert found.classes == ("ape", "bee")
    assert found.counts == {"train": [6, 4], "test": [4, 4]}
    assert found.how == "train/ and test/"
    assert found.sizes == {"smallest": (4, 5), "median": (10, 10), "largest": (30, 20)}
    assert found.formats == {"PNG": 16, "BMP": 1, "GIF": 1}
    assert found.modes["RGB"] == 16
    assert [reason.split(":")[0] for reason in found.corrupt] == ["train/bee/broken.png", "test/ape/empty.jpg"]
    assert found.several == ["train/bee/moving.gif"]
    duplicates, leaked, contradictions = found.duplicates, found.leaked, found.contradictions
    names = ("train/ape/0.png", "train/ape/another.png", "train/ape/copy.bmp")
    assert [same.names for same in duplicates] == [names, ("train/ape/which.png", "train/bee/2.png")]
    assert [same.names for same in leaked] == [("train/bee/1.png", "test/bee/leak.png")]
    assert leaked[0].splits == ("train", "test")
    assert [same.classes for same in contradictions] == [("ape", "bee")]
    assert not found.note


def test_moments_are_those_of_the_training_images(zoo):
    for file in ("train/bee/broken.png", "test/ape/empty.jpg", "train/bee/moving.gif"):
        (zoo / file).unlink()
    found, loaded = audit(zoo, (8, 8)), load_folder(zoo, "train", (8, 8))
    np.testing.assert_allclose(found.mean, loaded.mean, rtol=1e-12)
    np.testing.assert_allclose(found.std, loaded.std, rtol=1e-9)
    assert found.counts["train"] == np.bincount(loaded.labels).tolist()
    assert all(any(np.array_equal(sample, image) for image in loaded.images) for sample in found.samples)


def test_moments_and_samples_are_those_of_what_is_loaded_to_train_on(tmp_path):
    for i, kind in enumerate(("ape", "bee")):
        for split in ("train", "test"):
            (tmp_path / split / kind).mkdir(parents=True)
            photo = np.asarray(picture(i).resize((600, 400), Image.Resampling.BICUBIC)) * np.uint8([1, 1, 0])
            Image.fromarray(photo).save(tmp_path / split / kind / "large.jpg", quality=100 - i, subsampling=0)
    found, loaded = audit(tmp_path, (16, 16)), load_folder(tmp_path, "train", (16, 16))
    assert (found.mean, found.std) == (loaded.mean, loaded.std)
    assert found.sizes["largest"] == (400, 600)
    assert np.array_equal(found.samples, loaded.images)
    for kind in ("ape", "bee"):
        Image.new("L", (20, 20)).save(tmp_path / "train" / kind / "large.jpg")
    assert audit(tmp_path, (16, 16)).std == load_folder(tmp_path, "train", (16, 16)).std == (1.0, 1.0, 1.0)


def test_arrays(tmp_path):
    images = (random_bits(Key(3), (20, 6, 5)) >> 24).astype(np.uint8)
    labels = np.arange(20) % 3
    images[7] = images[1]  # both of class 1
    images[5] = images[0]  # of classes 2 and 0
    test = images[12:16].copy()
    test[1:] ^= 255
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=test, test_labels=labels[12:16])
    found = audit(tmp_path / "a.npz")
    assert found.counts == {"train": [7, 7, 6], "test": [2, 1, 1]}
    assert set(found.sizes.values()) == {(6, 5)}
    assert found.modes == {"grey": 24}
    assert [same.names for same in found.duplicates] == [("train[0]", "train[5]"), ("train[1]", "train[7]")]
    assert [same.names for same in found.leaked] == [("train[12]", "test[0]")]
    assert [same.classes for same in found.contradictions] == [("0", "2")]
    loaded = load(tmp_path / "a.npz")
    assert (found.mean, found.std) == (loaded.mean, loaded.std)
    np.savez(tmp_path / "b.npz", images=images, labels=labels)
    assert "no test images" in audit(tmp_path / "b.npz").note
    np.savez(tmp_path / "c.npz", train_images=images, train_labels=labels, test_images=test, test_labels=labels)
    with pytest.raises(DataError, match="4 images but 20 labels"):
        audit(tmp_path / "c.npz")


def test_a_split_by_key_is_audited_as_it_is_trained_on(zoo):
    root = zoo / "train"
    found = audit(root, (8, 8))
    assert "20%" in found.how
    (root / "bee/broken.png").unlink()
    (root / "bee/moving.gif").unlink()
    assert sum(found.counts["train"]) + sum(found.counts["test"]) == 10


def test_a_folder_without_classes_is_still_looked_over(zoo):
    found = audit(zoo / "train/bee")
    assert found.counts == {"train": [4]}
    assert "in no class" in found.note
    assert sorted(found.sample_labels) == ["0.png", "1.png", "2.png", "moving.gif"]
    assert len(found.corrupt) == 1


def test_what_cannot_be_looked_over(tmp_path):
    with pytest.raises(DataError, match="no image files"):
        audit(tmp_path)
    with pytest.raises(DataError, match="unknown data set"):
        audit("digitz")
    with pytest.raises(ConfigError, match="size of their own"):
        audit("digits", (8, 8))


def test_the_embedded_digits_are_clean():
    found = audit("digits")
    assert {split: sum(counts) for split, counts in found.counts.items()} == {"train": 3823, "test": 1797}
    assert not found.same
    assert len(found.samples) == 100
    assert found.sample_labels == [str(i // 10) for i in range(100)]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_reports_and_draws(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "zoo", "--size", "16"]) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]  # nothing is written unless asked for
    text = capsys.readouterr().out
    assert "\npicture" not in text and text.endswith("To look at a few images of each class: -o FILE.png\n")
    assert "train without them: --bad-images skip" in text
    assert main(["data", "zoo", "--size", "16", "-o", "zoo-mosaic.png"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "zoo: 18 images, 2 classes"
    for line in [
        "class  train  test",
        "ape        6     4",
        "all       10     8",
        "formats  PNG 16, BMP 1, GIF 1",
        "picture  zoo-mosaic.png",
        "files that cannot be read                          2",
        "copies within a split                              3",
        "images in more than one split                      1",
        "images in more than one class                      1",
        "  train/bee/1.png = test/bee/leak.png",
        "  train/ape/which.png (ape) = train/bee/2.png (bee)",
    ]:
        assert line in lines
    with Image.open("zoo-mosaic.png") as mosaic:
        assert mosaic.format == "PNG"
        assert mosaic.width > 300


def test_the_command_prints_json(zoo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "zoo", "--json", "--output", "here.png"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["test"] == [4, 4]
    assert found["mosaic"] == "here.png"
    assert Path("here.png").exists()
    assert found["leaked"][0]["names"] == ["train/bee/1.png", "test/bee/leak.png"]
    assert len(found["corrupt"]) == 2


def test_the_command_on_arrays_and_on_many_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images = (random_bits(Key(3), (300, 4, 4)) >> 24).astype(np.uint8)
    np.savez("many.npz", images=images, labels=np.arange(300) % 150)
    assert main(["data", "many.npz"]) == 0
    text = capsys.readouterr().out
    assert "train: 2 to 2 images a class" in text
    assert [path.name for path in tmp_path.iterdir()] == ["many.npz"]
    assert "no test images" in text
    assert "files that cannot be read                          0" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "digits"], "one data set at a time"),
        (["get"], "which data set"),
        (["get", "mnist", "cifar-10"], "one data set at a time"),
        (["digits", "--size", "8"], "size of their own"),
        (["no-such"], "unknown data set"),
    ],
)
def test_the_command_refuses(words, message, capsys):
    assert main(["data", *words]) == 1
    assert message in capsys.readouterr().err


def test_get_fetches(monkeypatch, capsys, tmp_path):
    import minivit.data.download

    monkeypatch.setattr(minivit.data.download, "fetch", lambda name, show_progress: tmp_path / name)
    assert main(["data", "get", "mnist"]) == 0
    assert capsys.readouterr().out == f"mnist is in {tmp_path / 'mnist'}\n"
