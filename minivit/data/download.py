"""Downloads of the data sets that have names, only when they are asked for, every file checked by its SHA-256."""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from minivit.data.datasets import data_home, reading
from minivit.data.formats import find_files
from minivit.errors import DataError, unknown_name

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


def fetch(name: str) -> Path:
    """Download the data set ``name`` into the data home, if it is not there yet, and return its folder.

    ``name`` is a key of :data:`SOURCES`. A file that is not the published one, bit for bit, is not kept. Raises
    DataError for another name, without the package pooch, and where a file cannot be had.
    """
    if name == "digits":
        raise DataError("the digits come with minivit: there is nothing to download", "minivit train --data digits")
    if name not in SOURCES:
        raise unknown_name("data set", name, SOURCES, error=DataError)
    address, files = SOURCES[name]
    folder = data_home() / name
    packed = [file for file in files if file.endswith(".tar.gz")]
    if packed and folder.is_dir() and find_files(folder):
        return folder  # unpacked before, as a whole
    try:
        import pooch
    except ImportError:
        raise DataError("downloads need the package pooch", "pip install 'minivit[download]'") from None
    for file, digest in files.items():
        remedy = f"try again, or get it elsewhere and put it into {folder}"
        with reading(f"{address}{file}", remedy):
            pooch.retrieve(f"{address}{file}", f"sha256:{digest}", file, folder, progressbar=sys.stderr.isatty())
    for file in packed:
        with reading(str(folder / file), "remove it and try again"):
            _unpack(folder / file)
    return folder


def _unpack(archive: Path) -> None:
    """Unpack the files of data, and of names, to a folder beside ``archive``, which they replace."""
    with tempfile.TemporaryDirectory(prefix=".", dir=archive.parent) as temporary:
        whole = Path(temporary) / "whole"
        whole.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith((".bin", ".txt")) else None
                if content is not None:
                    with open(whole / Path(member.name).name, "wb") as file:
                        shutil.copyfileobj(content, file)
        whole.replace(archive.with_name(archive.name.removesuffix(".tar.gz")))  # in one step: never half a data set
    archive.unlink()
