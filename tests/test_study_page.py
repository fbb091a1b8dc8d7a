"""``minivit study``: its numbers are those of mv.study, its page holds text and pictures only, and what can fail."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit import study
from minivit.backend import Key, normal, random_bits
from minivit.cli.main import main
from minivit.data import Dataset, standardize
from minivit.errors import ConfigError
from minivit.runs import studies
from minivit.runs.figures import SINGLY, spread
from minivit.runs.trained import open_trained
from minivit.show.axes import log_ticks
from minivit.show.captions import CAPTIONS
from minivit.show.colours import SIGNED, signed
from minivit.show.curves import chart
from minivit.show.matrix import maps_of_maps, matrix, sheet_of
from minivit.show.study_figures import DRAW, agreement, likeness, neighbours, peak
from tests.mixer import Mixer
from tests.test_report import HOSTILE, Page

COUNT, CLASSES = 11, (HOSTILE, "a\nb", "c")
SVGS = {"filters", "positions", "distance", "entropy", "importance", "attribution", "lens", "norms", "flow"}


def saved(folder: Path, name: str = "m", model: Any = None, **settings: Any) -> tuple[Path, Dataset]:
    """Save a random model whose head is drawn, too, and the images that it was "trained" on, as an archive."""
    usual = {"image_size": 8, "patch_size": 4, "in_channels": 1, "num_classes": 3, "dim": 8, "depth": 2, "heads": 2}
    model = model or mv.ViT(**usual | {"seed": 3} | settings)
    model.head.weight.data[...] = normal(Key(5), model.head.weight.shape)
    channels = model.settings.image_shape[0]
    images = (random_bits(Key(1), (COUNT, *model.settings.image_shape)) >> 24).astype(np.uint8)
    labels = np.arange(COUNT) % len(CLASSES)
    dataset = Dataset(images, labels, CLASSES, str(folder / f"{name}-data.npz"))
    if channels in (1, 3, 4):  # what an archive can hold
        np.savez(dataset.name, train_images=images, train_labels=labels, test_images=images, test_labels=labels,
                 classes=np.array(CLASSES))  # fmt: skip
    mv.save(model, folder / f"{name}.npz", data=dataset)
    return folder / f"{name}.npz", dataset


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Dataset]:
    """A checkpoint, the folder of its study, and the data set."""
    folder = tmp_path_factory.mktemp("study")
    checkpoint, dataset = saved(folder)
    assert main(["study", str(checkpoint), "-o", str(folder / "out")]) == 0
    return checkpoint, folder / "out", dataset


def numbers(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return found


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_mv_study(done: tuple[Path, Path, Dataset]) -> None:
    checkpoint, folder, dataset = done
    trained = open_trained(str(checkpoint))
    images = standardize(dataset.images, trained.mean, trained.std)
    models = {"trained": trained.model, "untrained": study.untrained_like(trained.model, 3)}
    for name, model in models.items():
        found = {figure: pair[name] for figure, pair in numbers(folder)["figures"].items()}
        trace = study.trace_model(model, images)
        predicted = study.predicted(trace)
        assert found["distance"]["pixels"] == pytest.approx(study.attention_distance(trace), rel=1e-5)
        assert found["entropy"]["bits"] == pytest.approx(study.entropy(trace).bits, rel=1e-5)
        assert found["entropy"]["most"] == pytest.approx(np.log2(5), rel=1e-5)
        importance = study.head_importance(trace, study.attention_gradient(trace, predicted))
        assert found["importance"]["logits"] == pytest.approx(importance, rel=1e-4)
        flow = study.gradient_flow(trace, predicted)  # (L+1, B, T)
        assert found["flow"]["token"] == pytest.approx(flow[..., 0].mean(axis=1), rel=1e-4)
        assert found["flow"]["patch"] == pytest.approx(flow[..., 1:].mean(axis=(1, 2)), rel=1e-4)
        norms = study.token_norms(trace)
        assert found["norms"]["longest"] == pytest.approx(norms[..., 1:].max(axis=-1).mean(axis=1), rel=1e-5)
        terms = found["attribution"]
        parts = [np.sum(terms[key]) for key in ("embedding", "heads", "attention_bias", "mlp", "bias")]
        assert terms["logit"] == pytest.approx(sum(parts), abs=1e-4)
        assert found["lens"]["first"][-1] == pytest.approx(float((predicted == dataset.labels).mean()), rel=1e-5)
        p = np.exp(study.logit_lens(trace).astype(np.float64))
        own = (p / p.sum(axis=-1, keepdims=True))[:, np.arange(COUNT), dataset.labels]
        assert found["lens"]["probability"] == pytest.approx(own.mean(axis=1), rel=1e-4)
        with np.load(folder / "figures.npz") as arrays:
            maps = study.patch_map(trace, study.rollout(trace))
            assert np.allclose(arrays[f"attention/{name}/maps"], maps, rtol=1e-4)
            assert np.array_equal(arrays[f"positions/{name}/similarity"], study.position_similarity(model))


def test_batches_and_data_sets_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, dataset = saved(tmp_path)
    trained = open_trained(str(checkpoint))
    parts = [dataset.subset([0, 1, 2]), dataset.subset(range(3, COUNT))]

    def found(*given: Any) -> dict[str, Any]:
        chosen = studies.Chosen("x", "all", given[0], COUNT, dataset.labels, None)  # type: ignore[arg-type]
        return studies.as_numbers(studies.observe_both(trained, chosen, list(CAPTIONS), Bar)[0])

    whole = found([dataset])
    monkeypatch.setattr("minivit.runs.figures.CHUNK", 2)
    monkeypatch.setattr("minivit.runs.figures.batch_size", lambda first: 1)
    other = found(parts)
    for figure, pair in whole.items():
        for model, arrays in pair.items():
            for key, value in arrays.items():
                assert value == pytest.approx(other[figure][model][key], rel=1e-4, abs=1e-6), (figure, key)


class Bar:
    """A progress bar that shows nothing."""

    def __init__(self, total: int, desc: str) -> None:
        self.left = total

    def update(self, n: int) -> None:
        self.left -= n

    def close(self) -> None:
        assert self.left == 0


def test_images_are_evenly_spaced_and_all_if_there_are_fewer(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    for asked, got in (("4", 4), ("500", COUNT)):
        assert main(["study", str(checkpoint), "-n", asked, "--only", "lens", "-o", str(tmp_path / asked)]) == 0
        assert numbers(tmp_path / asked)["images"] == got
    assert spread(11, 4).tolist() == [0, 3, 7, 10]
    assert spread(1, 5).tolist() == [0]
    assert len(spread(100_000, SINGLY)) == SINGLY
    dataset = Dataset(np.zeros((6, 1, 2, 2), np.uint8), np.zeros(6, np.int64), ("a",), "x")
    assert [len(part) for part in studies.spread_over([dataset.subset([0]), dataset], 2)] == [1, 1]


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_every_figure_of_both_models_and_nothing_that_runs(done: tuple[Path, Path, Dataset]) -> None:
    page = Page((done[1] / "study.html").read_text(encoding="utf-8"))
    assert page.texts["h2"] == [caption.title for caption in CAPTIONS.values()]
    charts = [svg["aria-label"] for svg in page.all("svg") if svg.get("class") == "chart"]
    assert len(charts) == 2 * len(SVGS)
    assert all(charts[i + 1] == charts[i].replace(", trained", ", untrained") for i in range(0, len(charts), 2))
    assert len(page.all("img")) == 3 * (3 * SINGLY + COUNT)  # attention, features and norms; the gallery
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form", "a", "base", "use"}
    for tag, attributes in page.elements:
        assert not {n for n in attributes if n.startswith("on") or n in ("style", "xlink:href")}, tag
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert attributes.get("href", "data:image/").startswith("data:image/")
    assert HOSTILE in page.texts["figcaption"] + page.texts["span"]
    assert "a\\nb" in page.texts["figcaption"] + page.texts["span"]
    assert len(page.source) < 1e6


def test_every_figure_is_a_file_too(done: tuple[Path, Path, Dataset]) -> None:
    files = {path.name for path in done[1].iterdir()}
    models = ("trained", "untrained")
    expected = {f"{figure}_{model}.svg" for figure in SVGS for model in models}
    expected |= {f"{figure}_{model}.png" for figure in ("attention", "gallery") for model in models}
    assert files == expected | {"study.html", "figures.json", "figures.npz"}
    for name in files:
        if name.endswith(".svg"):
            text = (done[1] / name).read_text()
            assert "var(" not in text  # not every program knows it
            assert re.search(r'viewBox="-12 -8 \d+ \d+"', text)
        if name.endswith(".png"):
            Image.open(done[1] / name).load()


def test_a_browser_shows_it_and_refuses_nothing(done: tuple[Path, Path, Dataset], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--dump-dom", f"file://{done[1] / 'study.html'}"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "<title>What m.npz does</title>" in shown.stdout
    assert "Content Security Policy" not in shown.stderr


def test_each_figure_is_drawn_and_said() -> None:
    assert DRAW.keys() == CAPTIONS.keys()
    for caption in CAPTIONS.values():
        assert caption.shows.format(reader="x").endswith(".")
        assert caption.hides.endswith(".")


# ---- any model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "none"),
    [
        ({"pool": "mean", "image_size": (12, 8), "patch_size": (4, 2)}, set()),
        ({"pool": "none", "in_channels": 5, "position": "none"}, {"positions"}),
        ({"in_channels": 2, "head": "mlp", "depth": 1, "heads": 1}, {"attribution"}),
        ({"image_size": 4, "pool": "mean"}, set()),  # of one patch
        ({"dim": 2, "heads": 1, "drop_path": 0.5, "dropout": 0.5, "recompute": True, "depth": 16}, set()),
    ],
)
def test_models_of_any_kind(
    settings: dict[str, Any], none: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, dataset = saved(tmp_path, **settings)
    monkeypatch.setattr(studies, "load_split", lambda *given: [dataset])
    trained = open_trained(str(checkpoint))
    found = studies.make_study(trained, dataset.name, "test", False, (), 4, str(tmp_path / "out"), Bar)
    assert {name for name, pair in found["figures"].items() if "why_not" in pair["trained"]} == none
    assert all(found["said"].values())
    page = Page((tmp_path / "out" / "study.html").read_text(encoding="utf-8"))
    reader = "the patches on average" if settings.get("pool") else "the class token"
    assert any(reader in text for text in page.texts["p"])
    assert "NaN" not in (tmp_path / "out" / "figures.json").read_text()


def test_a_head_of_zeros_is_said_to_let_nothing_through(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    trained = open_trained(str(checkpoint))
    trained.model.head.weight.data[...] = 0
    only = ("importance", "flow", "attribution")
    found = studies.make_study(trained, None, "test", False, only, 4, str(tmp_path / "out"), Bar)
    assert found["said"]["flow"] == "No gradient goes back from the logits: the head lets none through."
    assert found["said"]["importance"] == "The logit does not answer to the attention of any head."
    assert np.any(found["figures"]["importance"]["untrained"]["logits"])
    assert not (tmp_path / "out" / "flow_trained.svg").exists()


def test_images_of_unknown_classes_are_no_labels_of_the_lens(tmp_path: Path, here: Path) -> None:
    checkpoint, dataset = saved(tmp_path)
    np.savez("other.npz", test_images=dataset.images[:4], test_labels=np.array([0, 1, 0, 0]),
             classes=np.array(["new", "c"]))  # fmt: skip
    assert main(["study", str(checkpoint), "other.npz", "--only", "lens,gallery", "-o", "out"]) == 0
    trace = study.trace_model(
        open_trained(str(checkpoint)).model, standardize(dataset.images[1:2], dataset.mean, dataset.std)
    )
    (first,) = study.predicted(trace)
    assert numbers(here / "out")["figures"]["lens"]["trained"]["first"][-1] == float(first == 2)
    assert "new" in (here / "out" / "study.html").read_text()


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_figures_are_refused_with_a_proposal(
    done: tuple[Path, Path, Dataset], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", str(done[0]), "--only", "lens,entrop"]) == 2
    assert "did you mean entropy?" in capsys.readouterr().err


def test_only_what_is_asked_for(done: tuple[Path, Path, Dataset], here: Path, capsys: Any) -> None:
    assert main(["study", str(done[0]), "--only", "lens, entropy", "-o", "new/out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["figures"]) == list(found["said"]) == ["entropy", "lens"]
    assert Page((here / "new/out/study.html").read_text()).texts["h2"] == ["Entropy of the attention", "Logit lens"]


def test_no_folder_is_written_over(done: tuple[Path, Path, Dataset], capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, folder, _ = done
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["study", str(checkpoint), "--only", "lens", "-o", str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    for _ in range(2):
        assert main(["study", str(checkpoint), "--only", "filters"]) == 0
    assert {path.name for path in checkpoint.parent.glob("m-study-*")} == {"m-study-1", "m-study-2"}


def test_a_run_keeps_its_studies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text("")
    (tmp_path / "run" / "checkpoints" / "last.npz").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert studies.study_folder("run/checkpoints/last.npz", None) == Path("run/study-1")
    monkeypatch.chdir("run/checkpoints")
    assert studies.study_folder("last.npz", None) == tmp_path / "run" / "study-2"


def test_a_model_without_attention_is_refused_and_nothing_is_written(here: Path, capsys: Any) -> None:
    checkpoint, dataset = saved(here, model=Mixer(image_size=8, in_channels=1, num_classes=3))
    assert main(["study", str(checkpoint), dataset.name]) == 1
    assert "a Mixer has no trace" in capsys.readouterr().err
    assert {path.suffix for path in here.iterdir()} == {".npz"}


def test_a_study_that_is_stopped_leaves_no_folder(done: tuple[Path, Path, Dataset], tmp_path: Path) -> None:
    class Interrupted(Bar):
        def update(self, n: int) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        studies.make_study(open_trained(str(done[0])), None, "test", False, (), 4, str(tmp_path / "out"), Interrupted)
    assert not [*tmp_path.iterdir()]


def test_data_that_are_not_known_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, dataset = saved(tmp_path)
    Path(dataset.name).unlink()
    assert main(["study", str(checkpoint)]) == 1
    assert dataset.name in capsys.readouterr().err


# ---- what it is drawn with -------------------------------------------------------------------------------------------


def test_what_is_said_of_maps_is_right() -> None:
    one = np.array([[1.0, 3.0], [2.0, 2.0]])
    assert peak(one) == 1.5
    assert agreement(np.stack([one, 2 * one + 1])) == pytest.approx(1.0)
    assert agreement(np.stack([one, -one])) == pytest.approx(-1.0)
    assert agreement(np.ones((3, 2, 2))) == agreement(one[None]) == 1.0
    assert likeness(np.stack([one, one]), np.stack([3 * one, -one])) == pytest.approx(0.0)
    assert likeness(one[None], np.ones((1, 2, 2))) == 0.0
    similarity = np.arange(16.0).reshape(2, 2, 2, 2)
    beside = [similarity[0, 1, 0, 0], similarity[1, 1, 1, 0], similarity[1, 0, 0, 0], similarity[1, 1, 0, 1]]
    assert neighbours(similarity) == np.mean(beside)
    assert neighbours(np.ones((1, 1, 1, 1))) is None


def test_a_head_that_looks_at_no_patch_has_no_dot() -> None:
    found = {"pixels": np.array([[1.0, np.nan], [np.nan, np.nan]]), "even": 3.0}
    drawn = DRAW["distance"](found, found, None)  # type: ignore[arg-type]
    assert drawn.svgs["distance_trained"].count('class="dot"') == 1
    assert drawn.said.startswith("Trained: heads from 1 to 1 pixels, 1 in the first layer and nan in the last")


@pytest.mark.parametrize(("low", "high"), [(1, 1), (0.03, 0.9), (2, 3), (1e-9, 1e12), (4.9, 5.1), (1, 100)])
def test_logarithmic_ticks_are_few_and_around(low: float, high: float) -> None:
    found = log_ticks(low, high)
    assert found[0] <= low * (1 + 1e-9)
    assert high <= found[-1] * (1 + 1e-9)
    assert 2 <= len(found) <= 9


def test_two_charts_can_share_a_scale_and_show_levels() -> None:
    small, large = {"a": [(1, 1.0), (2, 2.0)]}, {"a": [(1, 10.0), (2, 90.0)]}
    reach = [1.0, 90.0]
    axes: Callable[[str], list[str]] = lambda svg: re.findall(r'class="end" x="44" y="[^"]*">([^<]*)', svg)
    both = [axes(chart("T", lines, "x", reach=reach)) for lines in (small, large)]
    assert both[0] == both[1] != axes(chart("T", small, "x"))
    assert chart("T", {"a": [(1, 0.0)]}, "x", log_y=True) == ""
    svg = chart("T", small, "x", dots=[(1, 1.5, "<d>")], dots_are="single", levels={"<most>": 3.0})
    assert "&lt;most&gt;" in svg
    assert "<title>&lt;d&gt;</title>" in svg
    assert svg.count('class="mark"') == 1


def test_a_matrix_writes_numbers_in_readable_ink() -> None:
    svg = matrix("T", np.array([[0.0, 1.0], [np.nan, -1.0]]), ["1", "2"], ["a", "b"], ("row", "column"), 1.0, True)
    cells = re.findall(r'class="cell ([a-z-]+)"[^>]*>([^<]*)', svg)
    assert cells == [("on-light", "+0.00"), ("on-dark", "+1.00"), ("on-dark", "-1.00")]  # none for NaN
    many = matrix("T", np.ones((40, 20)), [*map(str, range(40))], [*map(str, range(20))], ("r", "c"), 1.0)
    assert 'class="cell' not in many
    assert many.count("<title>") == 800


def test_signs_have_colours_of_their_own() -> None:
    assert signed(np.array([-1.0, 0.0, 1.0])).tolist() == SIGNED[[0, 3, 6]].astype(int).tolist()
    assert signed(np.array(0.5))[0] > signed(np.array(0.5))[2]  # orange
    assert signed(np.array(-0.5))[0] < signed(np.array(-0.5))[2]  # blue


def test_small_maps_are_drawn_sharp_with_gaps() -> None:
    tiles = (random_bits(Key(0), (5, 4, 5, 3)) >> 24).astype(np.uint8)
    picture = np.asarray(sheet_of([*tiles], 3))
    scale = 32  # 480 pixels for 3 · 5
    gap = (picture.shape[1] - 3 * 5 * scale) // 2
    assert gap > 0
    for k, tile in enumerate(tiles):
        y, x = k // 3 * (4 * scale + gap), k % 3 * (5 * scale + gap)
        drawn = picture[y : y + 4 * scale, x : x + 5 * scale]
        assert np.array_equal(drawn[::scale, ::scale, :3], tile)
    assert int((picture[..., 3] > 0).sum()) == 5 * 4 * 5 * scale**2  # gaps and the sixth place are transparent
    svg = maps_of_maps("T", np.ones((20, 3, 20, 3)), ("row", "column"), -0.5)
    assert len(re.findall(r'class="end" x="46"', svg)) == 8  # sixteen of the twenty rows, every second one numbered


def test_positions_that_are_all_alike_have_a_scale_of_their_own() -> None:
    near = {"similarity": np.full((1, 2, 1, 2), 0.83)}
    said = [
        re.findall(r'class="end" x="[^"]*" y="16">([^<]*)', svg)[0]
        for far in (0.95, -0.4)
        for svg in DRAW["positions"](near, {"similarity": near["similarity"] * 0 + far}, None).svgs.values()  # type: ignore[arg-type]
    ]
    assert said == ["0.8", "0.8", "-1", "-1"]  # both models on one scale


def test_the_untrained_model_is_another(done: tuple[Path, Path, Dataset]) -> None:
    model = open_trained(str(done[0])).model
    twin = study.untrained_like(model, model.settings.seed)
    assert twin.head.weight.data.any()
    assert np.array_equal(twin.patch_embed.proj.weight.data, model.patch_embed.proj.weight.data)  # the very first ones
    with pytest.raises(ConfigError):
        study.untrained_like(object())
