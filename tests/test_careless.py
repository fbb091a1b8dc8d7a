"""What careless users do with study, explain, graph and learn: nothing is lost, and each is told what to do instead."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import study
from minivit.cli.main import FAILURE, OK, main
from minivit.data import Dataset
from minivit.errors import ConfigError, DataError, DTypeError, MinivitError
from minivit.files import replacing, write_text
from minivit.runs.studies import make_study
from minivit.runs.trained import open_trained
from minivit.study.account import account
from tests.test_study_page import saved

# ---- where files are written -----------------------------------------------------------------------------------------


def test_no_device_and_no_folder_is_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("pipe")
    for path, number in (
        (tmp_path / "pipe", errno.EINVAL), (tmp_path / "link", errno.EINVAL), (tmp_path / "folder", errno.EISDIR),
        (Path(), errno.EISDIR), (Path("/dev/null"), errno.EINVAL), (Path("/dev/no-such-device"), errno.EINVAL),
    ):  # fmt: skip
        before = os.lstat(path).st_mode if os.path.lexists(path) else None
        with pytest.raises(OSError) as error, replacing(path):
            raise AssertionError("it was opened")
        assert error.value.errno == number and error.value.filename == str(path)
        assert (os.lstat(path).st_mode if os.path.lexists(path) else None) == before
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_cannot_be_written_is_called_by_its_own_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "x", tmp_path / ("y" * 300)):
        with pytest.raises(OSError) as error:
            write_text(path, "text")
        assert error.value.filename == str(path)
    with pytest.raises(OSError) as error, replacing(tmp_path / "z"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path / "z") and not [*tmp_path.iterdir()]
    with pytest.raises(OSError, match="truncated"), replacing(tmp_path / "z"):
        raise OSError("image file is truncated")


class Bar:
    """A progress bar that shows nothing."""

    def __init__(self, **_: Any) -> None:
        pass

    def update(self, n: int) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full disk", "Ctrl-C"])
def test_a_study_that_cannot_be_written_to_its_end_leaves_nothing(
    error: BaseException, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, _ = saved(here)

    def fails(*_: Any, **arrays: Any) -> None:
        assert Path("out/study.html").exists()
        raise error

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(type(error)):
        make_study(open_trained(str(checkpoint)), None, "test", False, ("lens",), 4, "out", Bar)
    assert not Path("out").exists()


def test_a_closed_output_is_no_reason_to_stop(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # as Python has it after >&-
    monkeypatch.setattr("sys.stderr", None)
    assert main(["learn"]) == OK
    assert main(["learn", "nix"]) == FAILURE


# ---- images and folders ----------------------------------------------------------------------------------------------


def test_one_image_is_called_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = saved(here)
    assert main(["study", str(checkpoint), "-n", "1", "--only", "gallery", "-o", "out"]) == OK
    said = capsys.readouterr().out
    assert "test: 1 image\n" in said and "There is one image only" in said  # not that "two images" are alike


def test_an_image_that_is_none_is_named_shortly(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = saved(here)
    for image, said in (
        (str(checkpoint), "and 28 others"),  # arrays of a checkpoint
        ("", "the image has no name"),
    ):
        assert main(["explain", str(checkpoint), image]) == FAILURE
        assert said in capsys.readouterr().err
    np.save("one.npy", np.zeros((8, 8), np.uint8))
    assert main(["explain", str(checkpoint), "one.npy", "--index", "4"]) == FAILURE
    assert "it has 1\n  → leave --index out" in capsys.readouterr().err


def test_learn_says_what_was_meant(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "start", "d", "1"]) == OK
    os.mkfifo("pipe")
    for words, said in (
        (["d/01_chain.py"], "mark it: minivit learn check d/01_chain.py"),
        (["list", "d/01_chain.py"], "mark it: minivit learn check d/01_chain.py"),
        (["chek", "d"], "did you mean check?"),
        (["start", ""], "into which folder?"),
        (["check", "pipe", "1"], "pipe is neither a folder nor a file"),
        (["list", "none"], "there is no folder 'none'"),
    ):
        assert main(["learn", *words]) == FAILURE
        assert said in capsys.readouterr().err
    assert sorted(path.name for path in here.iterdir()) == ["d", "pipe"]


# ---- functions -------------------------------------------------------------------------------------------------------


def test_studies_of_what_is_nothing_say_so() -> None:
    model = mv.ViT(image_size=8, patch_size=4, in_channels=1, dim=8, depth=1, heads=2, num_classes=3).eval()
    images = np.zeros((2, 1, 8, 8), np.float32)
    trace, none = study.trace_model(model, images), study.trace_model(model, images[:0])
    wrong: list[tuple[Callable[[], object], type[MinivitError], str]] = [
        (lambda: study.predicted(images), ConfigError, "a trace is studied, got a ndarray"),  # type: ignore[arg-type]
        (lambda: study.patch_map(trace, [[1.0]]), DTypeError, "an array is asked for, got a list"),
        (lambda: study.update_ratios({"a": 1}, {"a": 2}), DTypeError, "a: an array is asked for, got a int"),
        (lambda: study.trace_model(mv.ViT, images), ConfigError, "ViT is a class"),
        (lambda: study.trace_model(model, images + 0j), DTypeError, "takes float32 images, got complex64"),
        (lambda: study.feature_components(none), DataError, "no image"),
        (lambda: study.outlying_tokens(study.token_norms(trace), float("nan")), ConfigError, "nan times"),
        (lambda: account(model, images[0], 3), ConfigError, "there is no class 3: the model has 3"),
    ]
    for call, error, said in wrong:
        with pytest.raises(error, match=said):
            call()
    assert study.direct_attribution(none, 0).heads.shape == (0, 1, 2)


def test_checks_of_what_cannot_be_checked_say_so() -> None:
    def forward(x: Any) -> Any:
        return 2 * x

    def backward(g: Any, x: Any) -> Any:
        return 2 * g

    x = np.ones((2, 3))
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: mv.check_vjp(forward, backward, None), "args is a NoneType"),  # type: ignore[arg-type]
        (lambda: mv.check_vjp(forward, backward, {"x": x}), "args is a dict"),  # type: ignore[arg-type]
        (lambda: mv.check_vjp(forward, None, [x]), "backward is a NoneType"),  # type: ignore[arg-type]
        (lambda: mv.check_vjp(lambda x: (forward(x), (x, x[0])), backward, [x]), r"a tuple in place 1\n.*cache=True"),
        (lambda: mv.check_vjp(forward, backward, [x], rtol="1"), "rtol='1'"),  # type: ignore[arg-type]
        (lambda: mv.check_vjp(forward, backward, [x], seed=1.5), "seed=1.5"),  # type: ignore[arg-type]
        (lambda: mv.check_module(mv.ViT, x), "the class ViT is no module"),
        (lambda: mv.check_module(forward, x), r"a function is no module\n.*check_grads"),
    ]
    for call, said in wrong:
        with pytest.raises(ConfigError, match=said):
            call()


def test_a_known_data_set_is_to_be_downloaded(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIVIT_DATA", str(here))
    model = mv.ViT(image_size=32, patch_size=16, dim=8, depth=1, heads=2)
    images = np.zeros((1, 3, 32, 32), np.uint8)
    mv.save(model, "m.npz", data=Dataset(images, np.zeros(1, np.int64), tuple("abcdefghij"), "cifar-10"))
    assert main(["study", "m.npz"]) == FAILURE
    assert "minivit data get cifar-10" in capsys.readouterr().err
