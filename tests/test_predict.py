"""``minivit predict``: folders of images, and images that are negatives of what the model learned from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minivit import data
from minivit.cli.main import main
from minivit.runs.classify import AT_ONCE, looks_inverted, negative

TINY = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "model.mlp_dim=16"]
PHOTOS = (0.458, 0.451, 0.414)  # the means of 500 photos, and about those of most


@pytest.fixture(scope="module")
def run(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a run on a few digits, light on black."""
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(archive), *TINY, "-e", "1", "--val-fraction", "0", "-o", str(folder), "-q"]) == 0
    return str(folder / "few-1")


def drawn(size: int, width: int, paper: str = "white", ink: str = "black", mode: str = "L") -> Image.Image:
    """Draw a four as people do."""
    image = Image.new(mode, (size, size), paper)
    pen = ImageDraw.Draw(image)
    for line in ([(60, 12), (25, 60), (78, 60)], [(62, 35), (62, 88)]):
        pen.line([(x * size // 100, y * size // 100) for x, y in line], fill=ink, width=width * size // 100)
    return image


def answers(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["predict", *args, "--json"]) == 0
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return rows


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_a_run_folder(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = data.load("digits", "test")
    names = ["b.png", "a/2.png", "a/10.png", ".hidden.png", "a/.hidden/3.png"]
    for i, name in enumerate(names):
        (here / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[i, 0]).save(here / "mine" / name)
    (here / "mine" / "notes.txt").write_text("what I drew")
    (here / "mine" / "a" / "Thumbs.db").write_bytes(b"\x00\x01")
    rows = answers(capsys, run, "mine", "mine/b.png")
    assert [row["file"] for row in rows] == ["mine/b.png", "mine/a/10.png", "mine/a/2.png", "mine/b.png"]
    assert {**rows[0]} == {**rows[3]}
    assert rows == answers(capsys, f"{run}/checkpoints/last.npz", "mine", "mine/b.png")
    assert main(["predict", run, "mine"]) == 0
    err = capsys.readouterr().err
    assert f"checkpoint  {run}/checkpoints/last.npz\n" in err
    assert "skipped     2 files in mine: no images\n" in err


def test_a_damaged_image_of_a_folder_has_a_row(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine").mkdir()
    drawn(8, 10, "black", "white").save("mine/b.png")
    (here / "mine" / "a.png").write_text("no picture")
    assert main(["predict", run, "mine", "--json"]) == 3
    bad, good = json.loads(capsys.readouterr().out)
    assert (bad["file"], good["file"]) == ("mine/a.png", "mine/b.png")
    assert "not an image" in bad["error"]
    assert "error" not in good


def test_a_name_too_long_for_a_file_has_a_row(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(8, 10, "black", "white").save("good.png")
    assert main(["predict", run, "a" * 5000, "good.png", "--json"]) == 3
    bad, good = json.loads(capsys.readouterr().out)
    assert "too long" in bad["error"] and "error" not in good


def test_a_folder_without_images_has_a_row(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    (here / "empty" / "notes.txt").write_text("none yet")
    assert main(["predict", run, "empty"]) == 3
    assert "no image files" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "x" * 5000])
def test_what_cannot_be_a_file_has_a_row(name: str, run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(40, 12, "black", "white").save("a.png")
    capsys.readouterr()
    assert main(["predict", run, "a.png", name, "--json"]) == 3
    sound, other = json.loads(capsys.readouterr().out)
    assert (sound["file"], other["file"]) == ("a.png", name) and "class" in sound
    assert "no such file" in other["error"] or "File name too long" in other["error"]


def test_more_images_than_are_held_at_once(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = data.load("digits").images[: AT_ONCE + 3]
    np.save("many.npy", images)
    np.save("last.npy", images[AT_ONCE:])
    many, last = answers(capsys, run, "many.npy"), answers(capsys, run, "last.npy")
    assert len(many) == AT_ONCE + 3
    assert [row["class"] for row in many[AT_ONCE:]] == [row["class"] for row in last]
    assert [row["probability"] for row in many[AT_ONCE:]] == pytest.approx(
        [row["probability"] for row in last], abs=1e-5
    )


# ---- black on white --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [28, 200])
@pytest.mark.parametrize("width", [3, 12])
def test_black_on_white_is_said_and_can_be_inverted(
    size: int, width: int, run: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn(size, width).save("mine.png")
    drawn(size, width, "black", "white").save("right.png")
    with pytest.warns(UserWarning, match=r"1 of 2 images looks like a negative .*: mine\.png; .*add --invert"):
        wrong, right = answers(capsys, run, "mine.png", "right.png")
    assert wrong["probability"] != right["probability"]
    with pytest.warns(UserWarning, match=r"1 of 2 images looks like a negative .*: right\.png; .*leave --invert out"):
        mended, _ = answers(capsys, run, "mine.png", "right.png", "--invert")
    assert mended["class"] == right["class"]
    assert mended["probability"] == pytest.approx(right["probability"], abs=1e-4)  # scaled, it is rounded


def test_black_on_a_clear_page_is_black_on_white(run: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(40, 12, "#00000000", "black", "RGBA").save("clear.png")
    drawn(40, 12).save("white.png")
    clear, white = answers(capsys, run, "clear.png", "white.png", "--invert")  # no warning: an error here
    assert clear == white | {"file": "clear.png"}


def test_ordinary_images_are_not_taken_for_negatives() -> None:
    train, test = data.load("digits"), data.load("digits", "test")
    assert not any(looks_inverted(image, train.mean) for image in test.images)
    assert all(looks_inverted(negative(image), train.mean) for image in test.images)
    paper = [1 - mean for mean in train.mean]  # a model that learned black on white
    assert not any(looks_inverted(negative(image), paper) for image in test.images)
    assert all(looks_inverted(image, paper) for image in test.images)


@pytest.mark.parametrize("level", [0, 20, 128, 235, 255])
def test_photos_of_any_brightness_are_not_taken_for_negatives(level: int) -> None:
    assert not looks_inverted(np.full((3, 16, 16), level, np.uint8), PHOTOS)


def test_a_bright_thing_on_black_is_no_negative() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[:, 2:26, 2:26] = 230  # a white shirt
    assert image.mean() / 255 > 0.6
    assert not looks_inverted(image, [0.286])


def test_a_negative_leaves_transparency_alone() -> None:
    image = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2)
    assert np.array_equal(negative(image)[:3], 255 - image[:3])
    assert np.array_equal(negative(image)[3], image[3])
    assert np.array_equal(negative(negative(image)), image)
