"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivit import data
from minivit.autograd.op import OPS
from minivit.backend import cuda_status
from tests import strict

strict_cupy = strict.strict_cupy  # the fixture: CuPy's strict stand-in
idle_cupy = strict.idle_cupy  # the same, on which no kernel computes


def pytest_configure() -> None:
    """Heed signals that whoever starts the tests ignores (nohup, a job in the background): they stop runs here.

    A hundred tests start minivit anew: it starts in two thirds of the time where its byte code may be kept.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    for name, handler in {
        "SIGINT": signal.default_int_handler,
        "SIGTERM": signal.SIG_DFL,
        "SIGHUP": signal.SIG_DFL,
    }.items():
        if (number := getattr(signal, name, None)) is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, and say why."""
    if (why_not := cuda_status()) is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=why_not))


def pytest_collection_finish() -> None:
    """Let no collection of garbage go over the ten thousand tests, and what their modules made, again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def hurried() -> Iterator[None]:
    """Wait for no disk, and press no picture: what is written is the same, and no test cuts the power.

    A child of a test does both.
    """

    def fsync(descriptor: int) -> None:
        os.fstat(descriptor)  # what is no open file is still an error

    def save(image: Image.Image, *args: Any, **kwargs: Any) -> None:
        image.encoderinfo |= {"optimize": False, "compress_level": 1}
        save_png(image, *args, **kwargs)

    Image.preinit()
    save_png = Image.SAVE["PNG"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setitem(Image.SAVE, "PNG", save)
        yield


@pytest.fixture
def toys() -> Iterator[None]:
    """Let a test define operations of its own."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set: 200 digits to train on, 60 to test with."""
    path = tmp_path_factory.mktemp("data") / "few.npz"
    train, test = data.load("digits"), data.load("digits", "test")
    np.savez(path, train_images=train.images[:200], train_labels=train.labels[:200],
             test_images=test.images[:60], test_labels=test.labels[:60])  # fmt: skip
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def small_pictures() -> Iterator[None]:
    """Show two small images only: what is drawn is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivit.runs.results.SHOWN", 2)
        patch.setattr("minivit.show.pictures.TILE", 8)
        yield
