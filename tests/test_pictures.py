"""The pictures that a run leaves behind."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, random_bits, uniform
from minivit.errors import ShapeError
from minivit.show import lettering
from minivit.show.colours import HEAT, heat
from minivit.show.lettering import drawable_names, lettered
from minivit.show.pictures import PAPER, RED, attention_overlay, confusion_picture, mosaic

IMAGES = (random_bits(Key(0), (7, 1, 8, 8)) >> 24).astype(np.uint8)
ATTENTION = uniform(Key(1), (7, 4, 2))
LABELS = [0, 1, 2, 3, 4, 5, 6]


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.array(image)


def contains(sheet: np.ndarray, tile: np.ndarray) -> bool:
    """Tell whether ``tile`` (h, w, 3) is somewhere in ``sheet``."""
    h, w, _ = tile.shape
    corners = np.argwhere((sheet[: 1 - h, : 1 - w] == tile[0, 0]).all(-1))
    return any(np.array_equal(sheet[y : y + h, x : x + w], tile) for y, x in corners)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mosaic_shows_every_image_enlarged(tmp_path, channels):
    images = (random_bits(Key(0), (7, channels, 8, 6)) >> 24).astype(np.uint8)
    mosaic(images, LABELS, tmp_path / "m.png", columns=3, scale=5)
    sheet = pixels_of(tmp_path / "m.png")
    for image in images:
        square = np.kron(image.transpose(1, 2, 0), np.ones((5, 5, 1), np.uint8))
        assert contains(sheet, np.broadcast_to(square, (40, 30, 3)))
    assert (sheet[:8] == PAPER).all()  # a margin


def test_the_labels_and_the_title_are_written(tmp_path):
    def drawn(labels, title="Samples"):
        mosaic(IMAGES, labels, tmp_path / "m.png", columns=7, title=title)
        return pixels_of(tmp_path / "m.png")

    plain = drawn([""] * 7, title="")
    top, bottom = drawn([""] * 7), drawn(LABELS, title="")
    rows = lambda sheet: np.flatnonzero((sheet != plain).any((1, 2)))
    assert rows(top).max() < plain.shape[0] / 3 < 2 * plain.shape[0] / 3 < rows(bottom).min()
    long = drawn(["a name that is much wider than its picture"] * 7, title="")
    assert len(rows(long))
    assert (long[:, -8:] == PAPER).all()  # and does not run over the edge


def test_few_images_make_a_narrow_sheet(tmp_path):
    mosaic(IMAGES[:2], LABELS[:2], tmp_path / "2.png", columns=10)
    mosaic(IMAGES, LABELS, tmp_path / "7.png", columns=10)
    assert pixels_of(tmp_path / "2.png").shape[1] < pixels_of(tmp_path / "7.png").shape[1]


def test_one_image_leaves_room_for_title_note_and_legend(tmp_path):
    def drawn(write, *args, **more):
        write(*args, tmp_path / "1.png", title="Images of a data set held out, as the model sees them", **more)
        return pixels_of(tmp_path / "1.png")

    one, many = (drawn(mosaic, IMAGES[:n], LABELS[:n], columns=10) for n in (1, 7))
    assert np.array_equal(one[:50, :420], many[:50, :420])  # all of the title
    assert (one[:, -15:] == PAPER).all()
    args = [(x[:n] for x in (IMAGES, ATTENTION, LABELS, LABELS)) for n in (1, 7)]
    one, many = (drawn(attention_overlay, *x)[50:78] for x in args)
    assert np.array_equal(one[:, -270:], many[:, -270:])  # the legend, with nothing under it
    assert (one[:, -295:-271] == PAPER).all()


def test_the_overlay_marks_what_is_wrong(tmp_path):
    red = []
    for predictions in (LABELS, [0, 1, 2, 3, 4, 5, 9], [9] * 7):
        attention_overlay(IMAGES, ATTENTION, LABELS, predictions, tmp_path / "a.png")
        red.append(int((pixels_of(tmp_path / "a.png") == RED).all(-1).sum()))
    assert red[0] == 0 < red[1] < red[2]


def test_the_overlay_is_hot_where_the_attention_is(tmp_path):
    black = np.zeros((1, 1, 8, 8), np.uint8)
    means = []
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        attention = np.zeros((1, 2, 2), np.float32)
        attention[0][corner] = 0.3
        attention_overlay(black, attention, [""], [""], tmp_path / "a.png")
        sheet = pixels_of(tmp_path / "a.png").astype(int)
        warm = np.argwhere(sheet[:, :, 0] > sheet[:, :, 2] + 60)  # orange and yellow
        warm = warm[warm[:, 0] > sheet.shape[0] / 2]  # the overlay, without the legend above it
        means.append(warm.mean(0))
    assert means[0][0] < means[2][0]
    assert means[0][1] < means[1][1]
    assert means[2][1] < means[3][1]
    assert means[1][0] < means[3][0]


def test_no_attention_at_all_is_drawn(tmp_path):
    attention_overlay(IMAGES, np.zeros((7, 2, 2)), LABELS, LABELS, tmp_path / "a.png")
    assert pixels_of(tmp_path / "a.png").size


def test_the_same_input_gives_the_same_file(tmp_path):
    for name in ("1.png", "2.png"):
        mosaic(IMAGES, LABELS, tmp_path / f"m{name}")
        attention_overlay(IMAGES, ATTENTION, LABELS, LABELS, tmp_path / f"a{name}")
    assert (tmp_path / "m1.png").read_bytes() == (tmp_path / "m2.png").read_bytes()
    assert (tmp_path / "a1.png").read_bytes() == (tmp_path / "a2.png").read_bytes()


def test_the_colour_map_rises_in_lightness():
    assert heat(np.array([0.0, 1.0])).tolist() == HEAT[[0, -1]].astype(int).tolist()
    light = heat(np.linspace(0, 1, 101)) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > 0).all()


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES.astype(np.float32), LABELS),
        (IMAGES[0], LABELS),
        (np.zeros((7, 2, 8, 8), np.uint8), LABELS),
        (IMAGES[:0], []),
        (IMAGES, LABELS[:3]),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, images, labels):
    with pytest.raises(ShapeError):
        mosaic(images, labels, tmp_path / "m.png")
    assert not list(tmp_path.iterdir())


def test_overlays_need_one_of_each(tmp_path):
    with pytest.raises(ShapeError, match="attention"):
        attention_overlay(IMAGES, ATTENTION[:3], LABELS, LABELS, tmp_path / "a.png")
    with pytest.raises(ShapeError, match="predictions"):
        attention_overlay(IMAGES, ATTENTION, LABELS, LABELS[:3], tmp_path / "a.png")


def test_pillow_is_imported_late():
    code = "import sys, minivit.show.pictures; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- names that Pillow's own font cannot write -----------------------------------------------------------------------

NAMES = [
    "cat", "Käse", "кошка", "γάτα", "狗", "قطة", "🐶", "cat 狗", "e\u0301te\u0301", "\u202egod\x1b[31m\n!", "Łódź",
    "日本", "\udcff", "", "\u0e41\u0e21\u0e27", "👩\u200d🚀", "\U0010ffff", "\u0301", "x" * 300,
]  # fmt: skip


@pytest.fixture(params=["the system's fonts", "no font"])
def fonts(request, monkeypatch):
    lettering._spelled.cache_clear()
    if request.param == "no font":
        monkeypatch.setattr(lettering, "_font_files", list)
    yield request.param
    lettering._spelled.cache_clear()


def is_drawn(text: str, font) -> bool:
    """Tell whether no letter is drawn as the box that stands for a missing one."""
    box = font.getmask("\U0010ffff")
    return not any(c != " " and bytes(font.getmask(c)) == bytes(box) and font.getmask(c).size == box.size for c in text)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_no_name_has_boxes(fonts, name):
    for text in (name, drawable_names([name])[0]):
        words, font = lettered(text, 14)
        assert is_drawn(words, font)
        assert words or text in ("", "\u0301")  # a mark alone may be nothing
        cut, font = lettered(text, 14, 60)
        assert is_drawn(cut, font) and font.getlength(cut) <= 60


def test_every_class_has_a_name_of_its_own(fonts):
    names = [*NAMES, "Kase", "class 4", "a", "a\u200b", "猫"]
    drawn = drawable_names(names)
    assert len(set(drawn)) == len(names)
    assert drawn[0] == "cat" and drawn[12] == "class #12"  # there is a "class 4" already
    if fonts == "no font":
        assert drawn[1:4] == ["class #1", "class #2", "class #3"]  # Käse without its dots is Kase, which is another
        assert drawable_names(["Käse", "ÆØå", "Łódź", "🐶"]) == ["Kase", "AEOa", "Lodz", "dog face"]


def test_names_that_differ_are_drawn_differently(tmp_path, fonts):
    pictures = []
    for name in ("狗", "猫", "ä", "ж", "🐶"):
        mosaic(IMAGES[:1], [name], tmp_path / "m.png", title="")
        confusion_picture(np.eye(2, dtype=int), [name, "b"], tmp_path / "c.png")
        pictures.append(pixels_of(tmp_path / "m.png").tobytes())
    assert len(set(pictures)) == len(pictures)


def test_a_damaged_font_is_passed_over(tmp_path, monkeypatch):
    broken = tmp_path / "a.ttf"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(lettering, "_font_files", lambda: [str(broken), str(tmp_path / "gone.ttf")])
    lettering._spelled.cache_clear()
    assert lettered("狗", 14)[0] == "U+72D7"
    lettering._spelled.cache_clear()


def test_fonts_are_found_in_folders_and_plain_ones_come_first(tmp_path, monkeypatch):
    for name in ("Zeta-Bold.ttf", "Zeta.otf", "DejaVuSans.ttf", "sub/NotoSansCJK.ttc", "readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(lettering, "FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    found = [file.rpartition("/")[2] for file in lettering._font_files.__wrapped__()]
    assert found == ["DejaVuSans.ttf", "NotoSansCJK.ttc", "Zeta.otf", "Zeta-Bold.ttf"]
