"""What others put in the way: settings beyond all bounds, checkpoints that lie, names that are made to deceive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import minivit as mv
from minivit.cli.main import main
from minivit.errors import CheckpointError, ConfigError, DataError, MinivitError, printable
from minivit.measure.costs import find_settings, open_model
from minivit.models import MODELS, count_parameters, model_outline
from minivit.runs.settings import RunSettings, parse_assignment, read_toml, resolve, write_toml
from minivit.show.curves import chart
from minivit.train import load_checkpoint, save_checkpoint
from minivit.weights.load import load_weights
from minivit.weights.native import load_model, read_model
from minivit.weights.transfer import init_from

SMALL = {
    "image_size": 8, "patch_size": 4, "in_channels": 1, "dim": 8, "depth": 2, "heads": 2, "num_classes": 10, "seed": 3,
}  # fmt: skip
TINY = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2"]


@pytest.fixture
def model() -> mv.ViT:
    model = mv.ViT(**SMALL)
    for p in model.parameters():
        p.data[...] += 0.01  # a head of zeros hides the rest
    return model


def saved(path: Path, model: mv.ViT, **changed: Any) -> Path:
    arrays = {f"model/{name}": array for name, array in model.state_dict().items()}
    save_checkpoint(path, arrays, {"model": model.config | changed})
    return path


# ---- a checkpoint is known by what is in it --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "weights.bin", "deep/er"])
def test_a_checkpoint_needs_no_suffix(name: str, model: mv.ViT, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(here / name, model)
    opened = open_model(name)
    assert all((a == opened.state_dict()[n]).all() for n, a in model.state_dict().items())
    assert main(["gradcheck", name, "--order", "1"]) == 0
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    for command in ("summary", "bench"):
        assert main([command, name, *(["--steps", "1", "-b", "2"] if command == "bench" else [])]) == 0
        assert name in capsys.readouterr().out


def test_gradcheck_proves_the_checkpoints_own_weights(
    model: mv.ViT, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import minivit.autograd.check as check

    checked: list[mv.ViT] = []

    def stop(model: mv.ViT, *args: Any, **settings: Any) -> None:
        checked.append(model)
        raise ConfigError("seen")

    monkeypatch.setattr(check, "check_module", stop)
    saved(here / "weights", model)
    assert main(["gradcheck", "weights"]) == 1
    assert "seen" in capsys.readouterr().err
    assert all((a == checked[0].state_dict()[n]).all() for n, a in model.state_dict().items())


def test_gradcheck_speaks_json(
    model: mv.ViT, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minivit.ops import samples

    saved(here / "weights", model)
    assert main(["gradcheck", "weights", "--json", "--order", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "weights" and found["parameters"] == model.num_parameters()
    assert {c["parameter"] for c in found["checks"]} >= {name for name, _ in model.named_parameters()}
    assert max(c["error"] for c in found["checks"]) == found["worst_error"] < 1e-8
    monkeypatch.setattr(samples, "SAMPLES", [s for s in samples.SAMPLES if s.op in ("add", "tanh")])
    assert main(["gradcheck", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["operation"] for row in found["operations"]] == ["add", "tanh"]
    assert all(not row["faults"] and row["killed"] == row["mutants"] > 0 for row in found["operations"])


def test_a_models_name_is_the_model_even_where_a_file_is_called_so(model: mv.ViT, here: Path) -> None:
    saved(here / "vit_digits", model)
    assert find_settings("vit_digits").config["dim"] == MODELS["vit_digits"].settings["dim"]
    assert find_settings("./vit_digits").config["dim"] == SMALL["dim"]


@pytest.mark.parametrize("command", ["gradcheck", "summary", "bench"])
def test_what_is_neither_model_nor_checkpoint(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").write_text("hello")
    for name, said in [
        ("file", "minivit did not write it"), ("vit_digit", "unknown model"), ("gone/x", "no checkpoint gone/x"),
        ("", "unknown model ''"), ("a" * 5000, "unknown model"), (".", "is no run folder"),
    ]:  # fmt: skip
        assert main([command, name]) == 1
        assert said in capsys.readouterr().err


# ---- settings are held against the arrays ----------------------------------------------------------------------------

CONFIGS: list[dict[str, Any]] = [
    {}, {"head": "mlp"}, {"pool": "mean"}, {"pool": "none"}, {"position": "none"}, {"qkv_bias": False}, {"mlp_dim": 5},
    {"dim_head": 3}, {"image_size": (8, 12), "patch_size": (4, 2)}, {"in_channels": 3}, {"depth": 1},
]  # fmt: skip


@pytest.mark.parametrize("changed", CONFIGS)
def test_the_shapes_that_are_foreseen_are_the_models(changed: dict[str, Any]) -> None:
    model = mv.ViT(**SMALL | changed)
    foreseen = {name: p.shape for name, p in model_outline("vit", model.config).named_parameters()}
    assert foreseen == {name: array.shape for name, array in model.state_dict().items()}
    assert count_parameters("vit", SMALL | changed) == model.num_parameters()


def test_a_million_numbers_a_block_are_counted_without_them() -> None:
    sizes = SMALL | {"dim": 1 << 20, "mlp_dim": 1 << 24}
    one, two = (count_parameters("vit", sizes | {"depth": depth}) for depth in (1, 2))
    tracemalloc.start()
    try:
        assert count_parameters("vit", sizes | {"depth": 100}) == one + 99 * (two - one) > 10**15
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"depth": 10**9}, "depth is 1000000000"),
        (
            {"depth": 10_000},
            r"settings are not those of its arrays: .*depth 10000.* cannot be: the model has more than",
        ),
        ({"depth": 3}, r"settings are not those of its arrays: .*depth 3.* asks for blocks\.2\.norm1"),
        ({"depth": 1}, r"depth 1, .* has no use for blocks\.1\."),
        ({"dim": 10**9}, "dim is 1000000000"),
        ({"dim": 1 << 22}, r"dim 4194304, .* asks for cls_token \(1, 1, 4194304\)"),
        ({"dim": 1 << 23}, r"dim 8388608, .* cannot be: out_features is 25165824"),
        ({"num_classes": 10**7}, r"num_classes 10000000, .* asks for head\.weight \(10000000, 8\), which is \(10, "),
        ({"mlp_dim": 1 << 24}, r"mlp_dim 16777216 asks for blocks\.0\.mlp"),
        ({"heads": 1 << 10, "dim_head": 1 << 12}, "heads 1024, dim_head 4096 asks for blocks"),
        ({"heads": 1 << 24, "dim_head": 1 << 24}, "heads 16777216, dim_head 16777216 cannot be: out_features is"),
        ({"heads": 1 << 24, "dim_head": 1, "weight_init": "mimetic"}, "heads 16777216, .* cannot be: out_features is"),
        ({"image_size": 32_768, "patch_size": 1}, r"asks for pos_embed \(1, 1073741825, 8\)"),
        ({"image_size": 32_768}, r"image_size 32768, .* asks for pos_embed \(1, 67108865, 8\)"),
        ({"head": "mlp"}, r"head mlp asks for pre_logits\.weight \(8, 8\), which is missing"),
        ({"position": "none"}, "has no use for pos_embed"),
        ({"pool": "mean"}, "pool mean"),
        ({"qkv_bias": False}, r"qkv_bias False has no use for blocks\.0\.attn\.qkv\.bias"),
        ({"qkv_bias": "no"}, "qkv_bias is 'no'"),
        ({"seed": 10**400}, "seed is 1000"),
        ({"norm_eps": 10**400}, "norm_eps is 1000"),
        ({"activation": [[]]}, "activation is"),
        ({"dim": None}, "dim is None"),
        ({"colour": 3}, "unknown setting 'colour'"),
        ({"patch_size": 0}, "patch_size 0, .* cannot be: image height 8 is not divided by patch height 0"),
    ],
)
def test_settings_that_ask_for_other_arrays(changed: dict[str, Any], says: str, tmp_path: Path, model: mv.ViT) -> None:
    path = saved(tmp_path / "a.npz", model, **changed)
    size = path.stat().st_size
    uses: list[Callable[[], Any]] = [
        lambda: load_model(path), lambda: read_model(path), lambda: find_settings(str(path)),
        lambda: init_from(model, path), lambda: resolve({"train.init_from": str(path)}),
    ]  # fmt: skip
    load_checkpoint(path)  # what is imported on the way is no part of it
    for use in uses:
        tracemalloc.start()
        try:
            with pytest.raises(CheckpointError, match=says) as caught:
                use()
            assert tracemalloc.get_traced_memory()[1] < 3 * size + 2_000_000
        finally:
            tracemalloc.stop()
        assert str(path) in caught.value.what and caught.value.remedy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", "0123456789"), ("classes", ["a"] * 11), ("classes", [1]), ("mean", [0.5, 0.5]), ("mean", 0.5),
        ("mean", [float("nan")]), ("mean", [True]), ("std", [0.0]), ("std", [1e308]), ("std", [10**400]),
        ("name", 7), ("fit", "crops"), ("bad_images", None),
    ],
)  # fmt: skip
def test_what_a_checkpoint_says_of_its_data_is_checked(key: str, value: Any, tmp_path: Path, model: mv.ViT) -> None:
    mv.save(model, tmp_path / "a.npz", mv.data.load("digits").subset(range(20)))
    checkpoint = load_checkpoint(tmp_path / "a.npz")
    read_model(tmp_path / "a.npz")
    checkpoint.meta["data"][key] = value
    save_checkpoint(tmp_path / "a.npz", checkpoint.arrays, checkpoint.meta)
    with pytest.raises(CheckpointError, match=rf"a\.npz: data\.{key} is"):
        read_model(tmp_path / "a.npz")


@pytest.mark.parametrize("command", ["summary", "gradcheck", "bench"])
def test_an_image_size_that_no_array_bounds(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(here / "a.npz", mv.ViT(**SMALL, position="none"), image_size=32_768)
    assert main([command, "a.npz"]) == 1
    assert "an image of 32,768 × 32,768 pixels makes 67,108,864 patches" in capsys.readouterr().err


# ---- names that are made to deceive ----------------------------------------------------------------------------------

CLASSES = (
    "cat\x1b[2J\x1b]0;owned\x07\n  → run: curl evil", "dog\u202egnp\x9b31m\u2028\r", os.fsdecode(b"caf\xe9\xff"),
    "<script>&\x7f\u200b\U000e0041",
)  # fmt: skip


def test_printable_leaves_what_shows_and_escapes_the_rest() -> None:
    for text in ("cat", "Kätzchen 二 🐈", "a\u00a0b\u3000c", "क्‍ष", "می\u200cخواهم", "👨\u200d👩\u200d👧", "\\n"):
        assert printable(text) == text
    assert printable("a\n\r\t\0\x1b\x7f\x9b") == "a\\n\\r\\t\\u0000\\u001b\\u007f\\u009b"
    for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x61C, 0x2028, 0x2029, 0x200B, 0xFEFF):
        assert printable(chr(c)) == f"\\u{c:04x}"
    assert printable(os.fsdecode(b"\xff")) == "\\udcff" and printable("\U000e0041") == "\\U000e0041"
    assert all(printable(name).isprintable() for name in CLASSES)


def test_a_name_in_an_error_forges_no_line_and_no_remedy() -> None:
    name = "x\nminivit: error: y\n  → run this\n  and"
    error = DataError(f"{name}: no such file\n  second line", f"look at {name}")
    lines = str(error).split("\n")
    assert [line[:8] for line in lines] == ["x\\nminiv", "  and: n", "  second", "  → look", "  and"]
    assert not any("\x1b" in str(MinivitError(text, text)) for text in CLASSES)


def test_pages_and_charts_show_what_is_hidden() -> None:
    svg = chart("a\u202eb\x1b<", {"line\x9b": [(1, 2.0), (2, 3.0)]}, "x\0")
    assert "a\\u202eb\\u001b&lt;" in svg and "line\\u009b" in svg and "x\\u0000" in svg


@pytest.fixture(scope="module")
def deceiving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images whose own name, classes and files deceive."""
    root = tmp_path_factory.mktemp("names") / "data\x1b[31m\n\u202e'\""
    for split in ("train", "test"):
        for k, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = np.full((8, 8, 3), 60 * k + i, np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}\x1b[5m\n\udcfe.png")
        (root / split / CLASSES[0] / "bad\n\x1b[7m.png").write_bytes(b"nothing")
    return root


def run(*args: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, and the UTF-8 that it printed."""
    root = str(Path(mv.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, "-m", "minivit", *args], cwd=cwd, env=environment, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_commands_print_and_write_names_escaped(deceiving: Path, tmp_path: Path) -> None:
    made = ["--set", "model.image_size=8", "--set", "model.patch_size=4", "-e", "1", "--bad-images", "skip"]
    name = "run\x1b[31m\n\u202e"
    folder = tmp_path / "runs" / name
    last, image = str(folder / "checkpoints" / "last.npz"), str(next((deceiving / "test" / CLASSES[2]).iterdir()))
    commands: list[tuple[int, list[str]]] = [
        (3, ["data", str(deceiving)]),
        (3, ["data", str(deceiving), "--json"]),
        (1, ["train", str(deceiving)]),
        (0, ["train", str(deceiving), *TINY, *made, "--name", name]),
        (0, ["eval", last]),
        (0, ["eval", last, "--json"]),
        (3, ["predict", last, image, "gone\x1b[1m\nx.png"]),
        (0, ["predict", last, image, "--format", "json"]),
        (0, ["predict", last, image, "--format", "csv"]),
        (0, ["compare", str(folder), str(folder)]),
        (0, ["summary", last]),
        (0, ["study", last, "-n", "3"]),
        (0, ["train", "--resume", str(folder)]),
        (1, ["eval", f"gone\x1b[2J{CLASSES[1]}\nx"]),
        (2, ["evil\x1b[2J\n"]),
    ]
    for code, command in commands:
        given, out, err = run(*command, cwd=tmp_path)
        assert given == code, (command, err)
        for text in (out, err):
            hidden = {c for c in text if not c.isprintable() and c != "\n"}
            assert not hidden, command
            assert not any(line.startswith("\u202e") or "→ run" in line[:6] for line in text.splitlines()), command
    for file in ("config.toml", "command.txt", "report.html", "metrics.jsonl", "results.csv", "study-1/study.html"):
        text = (folder / file).read_bytes().decode()
        assert not {c for c in text if not c.isprintable() and c not in "\r\n"}, file
    assert read_toml(folder / "config.toml")["data.name"] == str(deceiving.resolve())
    assert load_checkpoint(last).meta["data"]["classes"] == sorted(CLASSES)


def test_a_progress_bar_is_drawn_and_other_encodings_get_escapes(tmp_path: Path) -> None:
    code, _, err = run("eval", "gone→\udcff", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert code == 1 and err.startswith("minivit: error: there is no checkpoint gone\\u2192\\udcff\n  \\u2192 ")

    from minivit.cli.main import _Escaping

    class Stream:
        encoding, text = "utf-8", ""

        def write(self, text: str) -> None:
            self.text += text

    stream = Stream()
    assert _Escaping(stream).write("\r 50% a\rb\n") == 10  # type: ignore[arg-type]
    assert stream.text == "\r 50% a\\rb\n"


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[31m", "\x7f\x80\x9f", "\u202e\u2066\u200f", "\u2028\x85", 'q"\\', "\U000e0041", "ü 二 🐈"]
)
def test_every_text_comes_back_from_the_settings_file(text: str, tmp_path: Path) -> None:
    settings = resolve({"train.init_from": ""})
    settings.take({"data.name": text}, f"file {text}")
    written = write_toml(settings)
    assert tomllib.loads(written)["data"]["name"] == text
    assert all(line.isprintable() for line in written.splitlines())


@pytest.mark.parametrize("text", ["\udcff", "a\0b"])
def test_text_that_no_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="holds what is no text"):
        RunSettings().take({"data.name": text}, "command line")


# ---- command lines beyond all bounds ---------------------------------------------------------------------------------

MANY = "1" + "0" * 400
LINES = [
    ["--set", "model.dim=" + "[" * 5000],
    ["--set", "model.dim=" + "[" * 60 + "]" * 60],
    ["--set", "model.dim=" + "{a=" * 5000],
    ["--set", "model.dim=0x" + "f" * 9000],
    ["--set", "train.lr=0x" + "f" * 9000],
    ["--set", "model.dim=[0x" + "f" * 9000 + "]"],
    ["--set", "model.image_size=[0x" + "f" * 9000 + ",1]"],
    ["--set", "model.depth=1\nfoo=2"],
    ["--set", "model.num_classes=10000000"],
    ["--set", "model.num_classes=100000000"],
    ["--set", "model.dim=1000000000"],
    ["--set", "model.depth=1000000000"],
    ["--set", "model.image_size=1000000000"],
    ["--set", 'data.name="a\\u0000b"'],
    ["--set", 'train.init_from="a\\u0000b"'],
    ["--set", 'train.device="a\\u0000b"'],
    ["--set", "data.crop=1000000000"],
    ["--set", "data.shift=1e308"],
    ["--set", "a" * 100_000 + "=3"],
    ["--warmup-epochs", "1e308"],
    ["--epochs", MANY],
    ["--epochs", "1" * 9000],
    ["--batch-size", "1" + "0" * 18],
    ["--grad-accum-steps", "1" + "0" * 18],
    ["--seed", "-1"],
    ["--seed", MANY],
    ["--threads", "-1"],
    ["--threads", "1000000"],
    ["--micro-batch", MANY],
    ["--lr", "1e-400"],
    ["--lr", "1e308"],
    ["--lr", MANY],
    ["--mixup", "1e308"],
    ["--max-time", "1e308"],
    ["--weight-decay", "1e308"],
    ["x\udcff"],
    [""],
    ["a" * 5000],
    ["--init-from", "a" * 5000],
    ["--config", "a" * 5000],
    ["--config", ""],
    ["--device", "\udcff"],
    ["--name", "a" * 5000],
    ["--name", "a\0b"],
    ["--output", "file"],
    ["--output", "a" * 5000],
    ["--output", "/proc/none"],
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_run_that_cannot_be_is_refused(line: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "file").touch()
    assert main(["train", *TINY, "-q", *line]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("minivit") and "\n  → " in err and "Traceback" not in err
    assert "out of memory" not in err
    assert not (here / "runs").exists() or not list((here / "runs").iterdir())


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--resume", ""], ["train", "--resume", "a" * 5000], ["train", "--resume", "a\0b"],
        ["summary", "-b", "1" + "0" * 18], ["bench", "-b", "1" + "0" * 18], ["bench", "--threads", "100000"],
        ["bench", "--micro-batch", "-1"], ["gradcheck", "vit_digits", "--seed", MANY],
        ["gradcheck", "vit_digits", "--seed", "-1"], ["data", ""], ["data", "a" * 5000], ["data", "a\0b"],
        ["data", "digits", "--size", "1" + "0" * 18], ["data", "digits", "-o", "/proc/x.png"],
        ["eval", ""], ["eval", "a\0b"], ["eval", "a" * 5000], ["predict", "a" * 5000, "x"], ["compare", "", ""],
        ["compare", "a\0b", "b"], ["compare", "a" * 5000, "b"], ["summary", "a\0b"],
    ],
    ids=lambda line: " ".join(line)[:30].replace("\0", "0"),
)  # fmt: skip
def test_other_commands_refuse_too(line: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("minivit") and "\n  → " in err
    assert not list(here.iterdir())


def test_batches_larger_than_the_data_are_foreseen_quickly(here: Path) -> None:
    assert main(["train", *TINY, "-q", "--dry-run", "-b", "1000000", "--grad-accum-steps", "1000000"]) == 0


def test_a_value_of_two_lines_is_text() -> None:
    assert parse_assignment("data.name=1\nx = 2") == ("data.name", "1\nx = 2")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"depth": 10_001}, "depth is 10001"), ({"dim": True}, "dim is True"), ({"dim": -(10**5000)}, "too long to"),
        ({"qkv_bias": 1}, "qkv_bias is 1"), ({"norm_eps": 2.0}, "norm_eps is 2.0"), ({"seed": 1 << 63}, "seed is"),
        ({"image_size": 40_000}, "image_size is 40000"), ({"dropout": 10**400}, "dropout is"),
        ({"pool": []}, r"pool is \[\]"), ({"activation": {}}, "activation is {}"),
    ],
)  # fmt: skip
def test_settings_have_bounds_in_the_library_too(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mv.ViT(**settings)


# ---- mv.save ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def digits() -> mv.data.Dataset:
    return mv.data.load("digits").subset(range(100))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_saved_model_comes_back_to_the_bit(dtype: Any, model: mv.ViT, tmp_path: Path) -> None:
    path = tmp_path / "no suffix"
    mv.save(model.to(dtype), path)
    assert [p.name for p in tmp_path.iterdir()] == ["no suffix"]
    again = mv.load_model(path)
    assert again.config == model.config and not again.training
    state = again.state_dict()
    assert all(a.dtype == dtype and a.tobytes() == state[n].tobytes() for n, a in model.state_dict().items())
    fresh = mv.ViT(**SMALL | {"seed": 9}).to(dtype)
    load_weights(fresh, path)
    assert all((a == state[n]).all() for n, a in fresh.state_dict().items())


@pytest.mark.parametrize("changed", CONFIGS)
def test_every_kind_of_model_can_be_saved(changed: dict[str, Any], tmp_path: Path) -> None:
    model = mv.ViT(**SMALL | changed)
    mv.save(model, tmp_path / "a")
    assert mv.load_model(tmp_path / "a").state_dict().keys() == model.state_dict().keys()
    model.reset_head(3)
    mv.save(model, tmp_path / "a")
    assert mv.load_model(tmp_path / "a").config["num_classes"] == 3


def test_a_model_saved_with_its_data_is_evaluated_predicts_and_starts_runs(
    model: mv.ViT, digits: mv.data.Dataset, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mv.save(model, "mine", data=digits)
    kept = read_model("mine")[1]["data"]
    assert kept["classes"] == list(digits.classes) and kept["mean"] == list(digits.mean)
    assert kept["std"] == list(digits.std) and kept["name"] == "digits" and kept["fit"] == "stretch"
    np.save("one.npy", digits.images[:2])
    assert main(["eval", "mine"]) == 0
    assert main(["predict", "mine", "one.npy"]) == 0
    assert "one.npy[1]" in capsys.readouterr().out
    assert main(["train", "--init-from", "mine", "-e", "1", "-q", "--name", "a"]) == 0
    assert main(["train", "--config", "runs/a/config.toml", "-e", "1", "-q", "--name", "b"]) == 0
    assert load_model("runs/b/checkpoints/last.npz").config["dim"] == SMALL["dim"]


def test_a_model_saved_with_a_folder_of_photos_crops_other_photos_as_it_did(here: Path) -> None:
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40 + i, 20), (40 * i, 90, len(name))).save(f"photos/{name}/{i}.png")
    photos = mv.data.load("photos", size=(8, 8))
    assert isinstance(photos.images, np.ndarray)  # few enough to be held in memory
    model = mv.ViT(**SMALL | {"in_channels": 3, "num_classes": 2})
    for data in (photos, photos.subset([0, 5]), photos.split_off(0.5, mv.Key(0))[0]):
        mv.save(model, "mine", data=data)
        assert read_model("mine")[1]["data"]["fit"] == "crop"
    with pytest.raises(DataError, match="unknown fit 'cropp'"):
        mv.data.Dataset(photos.images, photos.labels, photos.classes, "mine", fit="cropp")


def test_predict_says_what_a_model_saved_alone_lacks(
    model: mv.ViT, digits: mv.data.Dataset, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mv.save(model, "mine.npz")
    np.save("one.npy", digits.images[:1])
    assert main(["predict", "mine.npz", "one.npy"]) == 1
    err = capsys.readouterr().err
    assert "mine.npz holds no classes, mean, std" in err and "mv.save(model, path, data=dataset)" in err


def test_what_cannot_be_saved(model: mv.ViT, digits: mv.data.Dataset, tmp_path: Path) -> None:
    class Other(mv.ViT):
        pass

    path = tmp_path / "a"
    for wrong in (mv.nn.Linear(3, 2), Other(**SMALL), object()):
        with pytest.raises(ConfigError, match="is not a registered model"):
            mv.save(wrong, path)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="10 classes and 1 channels, the model 7"):
        mv.save(mv.ViT(**SMALL | {"num_classes": 7}), path, digits)
    with pytest.raises(DataError, match="the model 10 and 3"):
        mv.save(mv.ViT(**SMALL | {"in_channels": 3}), path, digits)
    model.head = mv.nn.Linear(8, 3)
    with pytest.raises(ConfigError, match=r"num_classes 10, .* asks for head\.weight \(10, 8\), which is \(3, 8\)"):
        mv.save(model, path)
    with pytest.raises(DataError, match="data is a str, not a data set"):
        mv.save(mv.ViT(**SMALL), path, "digits")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    for name in ("", ".", "a\0b"):
        with pytest.raises(CheckpointError, match="is no name of a file"):
            mv.save(mv.ViT(**SMALL), name)
    with pytest.raises(CheckpointError, match="cannot save"):
        mv.save(mv.ViT(**SMALL), tmp_path)


def test_weights_of_another_model_are_named_with_their_file(model: mv.ViT, tmp_path: Path) -> None:
    mv.save(model, tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match=r"a\.npz: the state does not fit this ViT:\n  head\.weight: \(10, 8\)"):
        mv.load_weights(mv.ViT(**SMALL | {"num_classes": 3}), tmp_path / "a.npz")
