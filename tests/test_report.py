"""The page that a run leaves behind, its curves, and the pictures of what the model takes for what."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from minivit.backend import Key, normal, random_bits
from minivit.data.dataset import class_names
from minivit.errors import ShapeError
from minivit.measure.metrics import classification_metrics
from minivit.show.axes import ticks
from minivit.show.curves import chart, write_svg
from minivit.show.gallery import MISTAKES
from minivit.show.page import write_report
from minivit.show.pictures import RED, confusion_picture, predictions_picture

HOSTILE = '<script>document.title="owned"</script>'
VOID = {"meta", "img", "br"}


def rows(epochs: int, valid: bool = True) -> list[dict]:
    held = lambda e: {"valid_loss": 2.0 / e, "valid_accuracy": 1 - 0.5 / e} if valid else {}
    return [
        {"epoch": e, "step": 10 * e, "lr": 1e-3 / e, "loss": 2.3 / e, "images_per_second": 900.0, "seconds": 2.0}
        | held(e)
        for e in range(1, epochs + 1)
    ]


def trial(classes: int = 3, count: int = 60, channels: int = 1, size: tuple[int, int] = (8, 8)) -> dict:
    """Return images and what a model that is mostly right makes of them."""
    images = (random_bits(Key(1), (count, channels, *size)) >> 24).astype(np.uint8)
    labels = (np.arange(count) * 11 % classes).astype(np.int64)
    logits = normal(Key(2), (count, classes))
    logits[np.arange(count), labels] += 2.0
    return {"images": images, "logits": logits, "labels": labels, "classes": [f"n{i}" for i in range(classes)]}


def written(tmp_path, **given) -> Page:
    tried = trial() | {k: given.pop(k) for k in ("images", "logits", "labels", "classes") if k in given}
    config, command = '[data]\nname = "x"  # recipe <i>', "command  minivit train & more"
    defaults = {"title": "digits-1", "rows": rows(5), "test": classification_metrics(tried["logits"], tried["labels"])}
    write_report(tmp_path / "report.html", **defaults | {"config": config, "command": command} | tried | given)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """A page taken apart; one that is not well-formed is refused."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.open = source, []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert "svg" in self.open  # HTML's own elements do not end so
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def pictures(self) -> list[np.ndarray]:
        sources = [element["src"].partition(",") for element in self.all("img")]
        assert all(re.fullmatch("data:image/(png|jpeg);base64", kind) for kind, _, _ in sources)
        return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for _, _, text in sources]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_loads_and_runs_nothing(tmp_path):
    page = written(tmp_path)
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    (style,) = page.texts["style"]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    expected = {"default-src": "'none'", "img-src": "data:", "style-src": f"'sha256-{digest}'"}
    assert rules == expected | {"base-uri": "'none'", "form-action": "'none'"}
    assert "url(" not in style
    assert "@import" not in style
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form", "a", "base", "use"}
    for tag, attributes in page.elements:
        assert not {n for n in attributes if n.startswith("on") or n in ("style", "href", "xlink:href", "xmlns")}, tag
        assert attributes.get("src", "data:").startswith("data:")


def test_all_text_is_text(tmp_path):
    page = written(
        tmp_path, title=HOSTILE, about=HOSTILE, split=HOSTILE, classes=[HOSTILE, '"><img src=x onerror=alert(1)>', "&"]
    )
    assert "<script" not in page.source
    assert "onerror" not in {name for _, attributes in page.elements for name in attributes}
    assert page.texts["title"][0] == page.texts["h1"][0] == HOSTILE
    assert HOSTILE in page.texts["td"]
    assert "& more" in "".join(page.texts["pre"])
    assert "  # recipe <i>" in page.texts["i"]


def test_names_that_are_no_text_can_be_written(tmp_path):
    assert "a\\udc80b" in written(tmp_path, classes=["a\udc80b", "c", "d"]).texts["td"]


def test_the_figures_are_those_of_the_run(tmp_path):
    tried = trial(classes=12, count=200)
    test = classification_metrics(tried["logits"], tried["labels"])
    page = written(tmp_path, **tried, test=test)
    for figure in (f"{test['accuracy']:.2%}", f"{test['top5']:.2%}", f"{test['loss']:.4f}", "90.00%", "10.0 s", "5"):
        assert figure in page.texts["b"]
    cells = [t for t in page.texts["td"] if re.fullmatch(r"\d+|·", t)][: 12 * 12]
    counts = np.array([0 if cell == "·" else int(cell) for cell in cells])
    assert np.array_equal(counts.reshape(12, 12), test["confusion"])


@pytest.mark.parametrize(
    ("given", "titles"),
    [
        (rows(5), ["Loss", "Validation accuracy", "Learning rate", "Images per second"]),
        (rows(5, valid=False), ["Training loss", "Learning rate", "Images per second"]),
        ([row | {"accuracy": 0.5} for row in rows(5)], ["Loss", "Accuracy", "Learning rate", "Images per second"]),
        (rows(1), ["Loss", "Validation accuracy", "Learning rate", "Images per second"]),
        (rows(200), ["Loss", "Validation accuracy", "Learning rate", "Images per second"]),
        ([], []),
    ],
)
def test_there_is_a_chart_for_what_was_measured(tmp_path, given, titles):
    page = written(tmp_path, rows=given)
    assert [svg["aria-label"] for svg in page.all("svg") if svg["class"] == "chart"] == titles
    assert ("Curves" in page.texts["h2"]) == bool(titles)


def test_the_worst_mistakes_come_first(tmp_path):
    tried = trial(count=400)
    page = written(tmp_path, **tried)
    log_p = tried["logits"] - np.log(np.exp(tried["logits"]).sum(axis=1, keepdims=True))
    losses = -log_p[np.arange(400), tried["labels"]]
    wrong = np.flatnonzero(tried["logits"].argmax(axis=1) != tried["labels"])
    worst = sorted(wrong, key=lambda i: -losses[i])[:MISTAKES]
    assert len(worst) == MISTAKES
    shown = page.pictures()
    for i, picture in zip(worst, shown, strict=False):
        assert np.array_equal(picture, np.broadcast_to(tried["images"][i, 0, :, :, None], (8, 8, 3)))
    assert len(shown) > MISTAKES  # and some that are right
    prediction = tried["logits"][worst[0]].argmax()
    verdicts = [text for text in page.texts["span"] if re.fullmatch(r"n\d, \d+%", text)]
    assert verdicts[0] == f"n{prediction}, {np.exp(log_p[worst[0], prediction]):.0%}"


def test_images_from_files_are_named(tmp_path):
    files = tuple(f"n0/<{i}>.png" for i in range(60))
    page = written(tmp_path, files=files)
    shown = [text for text in page.texts["span"] if text.endswith(">.png")]
    titles = [attributes["title"] for tag, attributes in page.elements if tag == "figure"]
    assert len(shown) == len(titles) > 3
    assert [title.partition(", loss")[0] for title in titles] == [f"n0/{name}" for name in shown]
    assert set(shown) <= {file.removeprefix("n0/") for file in files}


def test_a_model_without_mistakes_has_none_to_show(tmp_path):
    tried = trial()
    tried["logits"] = np.eye(3, dtype=np.float32)[tried["labels"]] * 9
    heads = written(tmp_path, **tried).texts["h2"]
    assert "The worst mistakes on the test images" not in heads
    assert "Some that are right" in heads


@pytest.mark.parametrize("classes", [1, 20, 21, 1000])
def test_any_number_of_classes(tmp_path, classes):
    tried = trial(classes, count=max(classes, 60))
    page = written(tmp_path, **tried)
    assert bool([t for t in page.all("table") if t.get("class") == "confusion"]) == (classes <= 20)
    assert len([svg for svg in page.all("svg") if svg["class"] == "bar"]) == classes  # a row for each
    assert len(page.all("details")) == (classes > 20)
    assert len(page.source) < 1e6


def test_a_model_with_room_for_more_classes_than_there_are(tmp_path):
    tried = trial(5)
    tried["classes"] = class_names(["a", "b", "c"], 5)
    assert "class 4" in written(tmp_path, **tried).texts["th"]


def test_every_class_needs_a_name(tmp_path):
    with pytest.raises(ShapeError, match=r"logits of shape \(60, 5\) for 3 classes"):
        written(tmp_path, **trial(5) | {"classes": ["a", "b", "c"]})
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("channels", "size"), [(1, (28, 28)), (3, (32, 32)), (4, (32, 32)), (4, (300, 200))])
def test_images_of_any_channels_and_size(tmp_path, channels, size):
    pictures = written(tmp_path, **trial(count=20, channels=channels, size=size)).pictures()
    large = max(size) > 64
    assert pictures
    assert all(picture.shape == ((128, 85, 3) if large else (*size, 3)) for picture in pictures)


def test_the_samples_are_part_of_the_page(tmp_path):
    path = tmp_path / "samples_train.png"
    Image.new("RGB", (30, 20), (1, 2, 3)).save(path)
    assert any(picture.shape == (20, 30, 3) for picture in written(tmp_path, samples=path).pictures())
    noise = (random_bits(Key(0), (600, 1500, 3)) >> 24).astype(np.uint8)
    Image.fromarray(noise).save(path)
    page = written(tmp_path, samples=path)
    assert any(picture.shape == (400, 1000, 3) for picture in page.pictures())
    assert len(page.source) < 1e6
    assert len(written(tmp_path, samples=tmp_path / "none.png").pictures()) == len(page.pictures()) - 1


def test_images_of_which_there_is_no_test_are_no_measure(tmp_path):
    page = written(tmp_path, test=None, split="training")
    assert not any("training accuracy" in text for text in page.texts["span"])
    assert "Confusion on the training images" in page.texts["h2"]


def test_the_page_is_whole_or_as_it_was(tmp_path, monkeypatch):
    before = written(tmp_path).source

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, title="another")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_browser_shows_it_and_finds_no_fault(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    written(tmp_path, classes=[HOSTILE, "b", "c"], title="a run")
    (tmp_path / "control.html").write_text(f"<title>a run</title>{HOSTILE}")  # a script that does run is seen

    def shown(name):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / name}"]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert "<title>owned</title>" in shown("control.html").stdout
    found = shown("report.html")
    page = Page(found.stdout)
    assert page.texts["title"][0] == "a run"
    assert HOSTILE in page.texts["td"]
    assert not page.all("script")
    assert "Content Security Policy" not in found.stderr  # nothing was refused: the style's hash is right


# ---- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.301, 2.3), (1e-6, 3e-6), (-5, 7), (899, 901), (0, 0), (5, 5), (-1, -1)]
)
def test_ticks_are_few_round_and_around(low, high):
    found = ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    assert np.allclose(np.diff(found), found[1] - found[0])
    assert all(len(f"{t:.3g}") <= 8 and math.isclose(float(f"{t:.6g}"), t, abs_tol=1e-12) for t in found)


def test_a_chart_keeps_to_its_frame_and_rises_where_the_numbers_do():
    svg = ElementTree.fromstring(chart("T", {"a": [(1, 0.5), (2, 2.25), (3, 1.0)]}, "x"))
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    _, _, width, height = map(float, svg.get("viewBox").split())
    assert all(0 < x < width and 0 < y < height for x, y in places)
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1][1] < places[2][1] < places[0][1]  # upwards is less


def test_what_is_not_finite_is_left_out():
    assert chart("T", {"a": [(1, math.nan)], "b": []}, "x") == ""
    svg = ElementTree.fromstring(chart("T", {"a": [(1, 1.0), (2, math.inf), (3, 2.0)], "b": [(1, math.nan)]}, "x"))
    assert len(list(svg.iter("circle"))) == 2
    assert len(list(svg.iter("polyline"))) == 1


def test_logarithmic_charts_have_powers_of_ten_and_marks(tmp_path):
    points = [(10.0**e, 3.0 + e) for e in range(-6, 1)]
    svg = chart("T", {"loss <b>": points}, "rate", log_x=True, marks={"here": 1e-3})
    write_svg(tmp_path / "c.svg", svg)
    text = (tmp_path / "c.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    words = [t.text for t in root.iter(f"{space}text")]
    assert {"1e-06", "0.001", "1", "here"} <= set(words)
    (mark,) = [line for line in root.iter(f"{space}line") if line.get("class") == "mark"]
    middle = [float(c.get("cx")) for c in root.iter(f"{space}circle")][3]
    assert float(mark.get("x1")) == middle
    assert "var(" not in text  # not every program knows it


# ---- pictures --------------------------------------------------------------------------------------------------------


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def test_wrong_predictions_are_red(tmp_path):
    images = trial(count=4)["images"]
    red = []
    for predictions in ("abcd", "abcx", "xxxx"):
        predictions_picture(images, list("abcd"), list(predictions), tmp_path / "p.png")
        red.append(int((pixels_of(tmp_path / "p.png") == RED).all(-1).sum()))
    assert red[0] == 0 < red[1] < red[2]


@pytest.mark.parametrize("classes", [1, 10, 21, 1000])
def test_the_confusion_picture_is_blue_where_right_and_red_where_wrong(tmp_path, classes):
    names = [f"a long name of class {i}\n<b>" for i in range(classes)]

    def drawn(confusion):
        confusion_picture(confusion, names, tmp_path / "c.png")
        pixels = pixels_of(tmp_path / "c.png")
        return (pixels[..., 2] > pixels[..., 0] + 60).sum(), (pixels[..., 0] > pixels[..., 2] + 60).sum()

    right = np.eye(classes, dtype=np.int64) * 9
    blue, red = drawn(right)
    assert blue >= classes
    assert red == 0
    if classes > 1:
        blue, red = drawn(np.roll(right, 1, axis=1))
        assert blue == 0
        assert red >= classes
    assert max(pixels_of(tmp_path / "c.png").shape) < 1300


def test_a_confusion_that_does_not_fit_is_refused(tmp_path):
    for confusion in (np.zeros((2, 3)), np.zeros((3, 3)), np.zeros((0, 0))):
        with pytest.raises(ShapeError):
            confusion_picture(confusion, ["a", "b"], tmp_path / "c.png")
