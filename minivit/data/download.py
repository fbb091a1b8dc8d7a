"""Downloads of the data sets that have names, only when they are asked for, every file checked by its SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from minivit.data.catalog import data_home, load
from minivit.data.reading import reading
from minivit.errors import DataError, unknown_name
from minivit.files import open_regular, sync

SOURCES = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        {
            "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        },
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
    ),
    "cifar-10": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
    ),
    "cifar-100": (
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"},
    ),
}
"""Where each data set lies: the start of its addresses, and its files with their SHA-256."""


def fetch(name: str, show_progress: bool = False) -> Path:
    """Download the data set ``name`` into the data home, if it is not there yet as a whole, and return its folder.

    ``name`` is a key of :data:`SOURCES`. A file that is not the published one, bit for bit, is not kept; what has been
    damaged since is fetched again. Whatever comes is on the disk before it gets its name: a crash leaves no half of it.
    ``show_progress`` shows a bar.

    Raises DataError for another name, without the package pooch, where a file cannot be had, and where the folder holds
    what fetch did not put there and what cannot be loaded: it is left alone.
    """
    if name == "digits":
        raise DataError("the digits come with minivit: there is nothing to download", "minivit train --data digits")
    if name not in SOURCES:
        raise unknown_name("data set", name, SOURCES, error=DataError)
    address, files = SOURCES[name]
    folder = data_home() / name
    archive = next((file for file in files if file.endswith(".tar.gz")), "")
    unpacked = folder / archive.removesuffix(".tar.gz")
    if archive and folder.is_dir():
        if _is_whole(name, unpacked):
            return folder
        with reading(str(folder), "check its permissions"):
            others = [path for path in folder.iterdir() if path.name not in (archive, unpacked.name)]
        if strangers := sorted(path.name for path in others if not path.name.startswith(".")):
            what = f"{folder} holds {strangers[0]}, from elsewhere, which is damaged or not {name}"
            raise DataError(what, f"empty it, then: minivit data get {name}")
    try:
        import pooch
    except ImportError:
        raise DataError("downloads need the package pooch", "pip install 'minivit[download]'") from None
    with reading(str(folder), "check its permissions and the space on its disk"):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=folder) as temporary:
            for file, digest in files.items():
                source = folder / file
                if not source.is_file() or _sha256(source) != digest:
                    remedy = f"try again, or get it elsewhere and put it into {folder}"
                    with reading(f"{address}{file}", remedy):
                        known = f"sha256:{digest}"
                        pooch.retrieve(f"{address}{file}", known, file, temporary, progressbar=show_progress)
                    source = Path(temporary) / file
                if file == archive:
                    _unpack(source, unpacked, Path(temporary))
                    (folder / file).unlink(missing_ok=True)
                else:
                    sync(source)
                    source.replace(folder / file)
        sync(folder)
    return folder


_TEMPORARY = ".get-"  # what the hidden folders begin with that hold what is not whole yet
_SUMS = "SHA256SUMS"  # in an unpacked folder: what was unpacked, as the command sha256sum writes it


def _unpack(archive: Path, target: Path, temporary: Path) -> None:
    """Unpack the files of data, and of names, to the folder ``target``, which they replace."""
    whole = temporary / "whole"
    whole.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith((".bin", ".txt")) else None
            if content is not None:
                with open(whole / Path(member.name).name, "wb") as file:
                    shutil.copyfileobj(content, file)
    (whole / _SUMS).write_text(_sums(whole), encoding="utf-8")
    for path in (*whole.iterdir(), whole):
        sync(path)
    if target.exists():
        target.replace(temporary / "damaged")
    whole.replace(target)  # in one step: never half a data set


def _is_whole(name: str, unpacked: Path) -> bool:
    """Tell whether the data set can be loaded and, if it was unpacked here, is still what was unpacked."""
    try:
        for split in ("train", "test"):
            load(name, split)
        with reading(str(unpacked), ""):
            sums = unpacked / _SUMS
            if not sums.exists():
                return True
            with open_regular(sums) as file:
                return file.read().decode() == _sums(unpacked)
    except DataError:
        return False


def _sums(folder: Path) -> str:
    return "".join(f"{_sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != _SUMS)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed asks for readinto


def _sweep(folder: Path) -> None:
    """Remove what downloads that were killed have left; a younger one may belong to a download that still runs."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):  # another download has just removed its own
            if path.stat().st_mtime < time.time() - 24 * 60 * 60:
                shutil.rmtree(path)
