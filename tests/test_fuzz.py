"""Mutated files of every kind that minivit reads: nothing but its own errors, no hang, no crash, no memory to spare.

The cases of a kind run in a process with bounded memory, in which an alarm ends whatever hangs; it is a fork of a child
that has imported all. A case follows from its number: ``python -m tests.test_fuzz FOLDER KIND 1 17`` runs case 17 alone
and leaves its file in FOLDER/KIND. The environment variable MINIVIT_FUZZ_CASES says how many cases there are in all.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minivit.cli.main import main
from minivit.data import load, read_image
from minivit.errors import MinivitError
from minivit.models import count_parameters
from minivit.runs.settings import resolve, write_toml
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from minivit.weights.native import load_model, model_config
from minivit.weights.transfer import init_from
from tests.test_formats import CIFAR, IDX, NAMES10, npy, pixels, python2
from tests.test_formats import idx as idx_bytes

CASES = int(os.environ.get("MINIVIT_FUZZ_CASES", "600"))
SECONDS = 10  # a case may take
MEMORY = 512 << 20  # bytes of addresses that a child may take beyond those it has once its modules are loaded


# ---- mutations -------------------------------------------------------------------------------------------------------

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1]


def mutate(content: bytes, donors: list[bytes], rng: random.Random) -> bytes:
    """Return ``content`` changed in one to four places, the first bytes more often than the others."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(out)
        at = rng.randrange(min(size, rng.choice((16, 64, 512, size))) or 1) if size else 0
        run = rng.choice((1, 2, 4, 8, 64, 1000))
        match rng.randrange(8):
            case 0 if size:
                out[at] ^= 1 << rng.randrange(8)
            case 1:  # a field of a header
                width = rng.choice((1, 2, 4, 8))
                field = rng.choice(EXTREMES) & ((1 << 8 * width) - 1)
                out[at : at + width] = field.to_bytes(width, rng.choice(("little", "big")))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + run]
            case 4:
                out[at:at] = rng.randbytes(run)
            case 5:  # what is there once more; a byte over and over
                again = out[at : at + run] if rng.random() < 0.5 else out[at : at + 1] * rng.choice((10, 1000, 50_000))
                out[at:at] = again
            case 6:
                out[at : at + run] = rng.randbytes(run)
            case 7:
                donor = rng.choice(donors)
                start = rng.randrange(len(donor))
                out[at : at + run * rng.randrange(2)] = donor[start : start + rng.choice((run, len(donor)))]
    return bytes(out)


# ---- what is read ----------------------------------------------------------------------------------------------------

Change = Callable[[bytes, list[bytes], random.Random], bytes]


@dataclass
class Kind:
    """Files that are read together by ``read``, one of which is changed: by ``mutate``, or by what knows its format."""

    files: dict[str, bytes]
    read: Callable[[Path], Any]
    change: Change = mutate
    donors: tuple[bytes, ...] = ()

    def make(self, case: int, name: str, folder: Path) -> None:
        """Write the files of a case into ``folder``."""
        rng = random.Random(f"{name} {case}")
        chosen = rng.choice(list(self.files))
        content = rng.choice([self.files[chosen], *self.donors])
        changed = rng.choice((mutate, self.change))(content, [*self.files.values(), *self.donors], rng)
        for file, whole in self.files.items():
            (folder / file).write_bytes(changed if file == chosen else whole)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def npz(images: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", images)
        archive.writestr("labels.npy", npy("(4,)", 4))
    return buffer.getvalue()


def checkpoint() -> bytes:
    path = Path("a.npz")  # which the cases write over
    arrays = {"model/head.weight": np.ones((3, 5), np.float32), "optimizer/head.weight": np.arange(7)}
    save_checkpoint(path, arrays, {"step": 3, "settings": {"train.lr": 0.1}})
    return path.read_bytes()


def sealed(body: bytes) -> bytes:
    """Return a checkpoint whose SHA-256 is right, whatever it holds."""
    return body + b"minivit sha256 " + hashlib.sha256(body).hexdigest().encode()


def checked_png(content: bytes) -> bytes:
    """Return a PNG whose chunks have the right CRC-32, as far as it has chunks."""
    out, at = content[:8], 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        chunk = content[at + 4 : at + 8 + size]
        out += content[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + size
    return out + content[at:]


ODD = """
0 -1 7 1.5 -0.0 nan inf 1e999 9223372036854775808 0x10 true "" "x" "none" "a\\u0000b" "no.npz" 1979-05-27 07:32:00
[] [8] [8,8] [8,8,8] [[8]] ["a"] [1e9,1] {} {a=1} {name="x"} [{}] "//////" "." "~" "cifar10" "imagefolder"
"""
ENDLESS = ["[" * 5000, "[" * 50 + "]" * 50, "{a=" * 5000, "9" * 5000, '"' + "x/" * 5000 + '"', "'" + "é" * 300 + "'"]


def other_values(content: bytes, donors: list[bytes], rng: random.Random) -> bytes:
    """Return a file of settings in which some values are odd ones, or values without end, or stand under other keys."""
    lines = content.decode().splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        at, other = rng.randrange(len(lines)), rng.choice(lines).partition("=")[0].strip("[] ")
        value = rng.choice(ODD.split() if rng.random() < 0.9 else ENDLESS)
        key = rng.choice((lines[at].partition("=")[0], other, "recipe", "a." * 1200 + "b"))
        lines[at] = rng.choice((f"{key} = {value}", f"{key} = {value}", f"[{other}]"))
    return "\n".join(lines).encode()


OTHER_VALUES = (
    None, True, -1, 0, 1, 1e308, 10**400, "", "x", "nan", [], [[[]]], {}, {"a": None}, ["\x1b[2J", 1], 0.5, 10**9,
)  # fmt: skip
"""What each value of a checkpoint's meta becomes in turn."""


@dataclass
class Meta(Kind):
    """A run, its checkpoint read by all that reads one; a case changes one value of the meta, and seals it again."""

    def make(self, case: int, name: str, folder: Path) -> None:
        """Write the checkpoint of a case."""
        checkpoint = load_checkpoint("run/checkpoints/last.npz")
        places = list(walk(checkpoint.meta))
        # every place is met once before one is met again
        where, value = places[case % len(places)], OTHER_VALUES[(case + case // len(places)) % len(OTHER_VALUES)]
        inner: Any = checkpoint.meta
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        print(f"{where} = {str(value)[:40]}")
        shutil.rmtree(folder)
        shutil.copytree("run", folder)
        save_checkpoint(folder / "checkpoints" / "last.npz", checkpoint.arrays, checkpoint.meta)


def walk(table: Any, under: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each value in nested tables and lists, of a list no more than its first."""
    for key in table if isinstance(table, dict) else range(len(table[:1])):
        yield (*under, key)
        if isinstance(table[key], dict | list):
            yield from walk(table[key], (*under, key))


def use(folder: Path) -> None:
    """Do with a run's checkpoint all that there is to do, as a command and, last, in the library."""
    path = str(folder / "checkpoints" / "last.npz")
    commands = [["eval", path], ["eval", path, "--json"], ["predict", path, "run/image.npy"], ["summary", path]]
    commands += [["train", "few.npz", "--init-from", path, "--dry-run"], ["train", "--resume", str(folder), "-q"]]
    for command in commands:
        assert main(command) in range(4), command
    model = load_model(path)
    init_from(load_model("run/checkpoints/last.npz"), path)
    assert model.num_parameters() == count_parameters(model.kind, model_config(path))


def run_in(folder: Path) -> None:
    """Train a tiny model for an epoch; the run's folder is ``folder / "run"``."""
    few = load("digits").subset(range(40))
    np.savez(folder / "few.npz", train_images=few.images, train_labels=few.labels,
             test_images=few.images, test_labels=few.labels)  # fmt: skip
    tiny = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2", "--val-fraction", "0"]
    tiny += ["--threads", "1", "-e", "1", "-q", "-o", str(folder), "--name", "run"]
    assert main(["train", str(folder / "few.npz"), *tiny]) == 0
    np.save(folder / "run" / "image.npy", few.images[:1])


def hang(folder: Path) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    pow(3, 1 << 40)  # inside C, where no handler of Python's runs


def kinds() -> dict[str, Kind]:
    arrays = zip(("images-idx3", "labels-idx1"), IDX["t10k"], strict=True)
    idx = {f"t10k-{what}-ubyte": idx_bytes(array) for what, array in arrays}
    data, labels = CIFAR["test_batch"]
    records = np.column_stack([np.array(labels, np.uint8), data]).tobytes()
    batch = {"batch_label": "testing", "labels": labels, "data": data, "filenames": ["a.png"] * 4}
    meta = {"num_vis": 3072, "label_names": NAMES10}
    noise, smooth = Image.fromarray(pixels(20, 24, 3)), Image.linear_gradient("L").resize((40, 30))
    palette, deep = noise.quantize(16), Image.fromarray(pixels(9, 8).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # its orientation
    pngs = saved(noise, "PNG", exif=exif), saved(palette, "PNG", transparency=3), saved(deep, "PNG", transparency=0)
    inks = saved(noise.convert("CMYK"), "JPEG")
    jpegs = saved(noise, "JPEG", exif=exif), saved(smooth, "JPEG", progressive=True), inks
    config = write_toml(resolve({})).encode()
    small = (
        b'[data]\nname = "digits"\nval_fraction = 0.2\n[model]\nimage_size = [8, 8]\n[train]\nlr = 1e-3\nepochs = 2\n'
    )
    array = npy("(4, 4, 4)")
    test = lambda folder: load(folder, "test")
    picture = lambda folder: read_image(folder / "picture", (8, 8), 3)
    return {
        "npz": Kind({"a.npz": npz(array)}, lambda folder: load(folder / "a.npz"),
                    lambda content, *rest: npz(mutate(array, *rest))),
        "checkpoint": Kind({"a.npz": checkpoint()}, lambda folder: load_checkpoint(folder / "a.npz"),
                           lambda content, *rest: sealed(mutate(content[:-79], *rest))),
        "idx": Kind(idx, test),
        "idx.gz": Kind({f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx.items()}, test,
                       lambda content, *rest: gzip.compress(mutate(gzip.decompress(content), *rest), mtime=0)),
        "cifar": Kind({"test_batch.bin": records, "batches.meta.txt": "\n".join(NAMES10).encode()}, test),
        "batches": Kind({"test_batch": python2(batch), "batches.meta": python2(meta)}, test,
                        donors=tuple(pickle.dumps(batch, protocol) for protocol in (2, 4, 5))),
        "toml": Kind({"a.toml": small}, lambda folder: resolve({}, file=folder / "a.toml"), other_values, (config,)),
        "png": Kind({"picture": pngs[0]}, picture, lambda *given: checked_png(mutate(*given)), pngs),
        "jpeg": Kind({"picture": jpegs[0]}, picture, donors=jpegs),
        "meta": Meta({}, use),
        # what the child is to see
        "wrong": Kind({"a": b"a"}, lambda folder: {}["a key"]),
        "hangs": Kind({"a": b"a"}, hang),
        "hungry": Kind({"a": b"a"}, lambda folder: np.empty(2 * MEMORY, np.uint8)),
        "crashes": Kind({"a": b"a"}, lambda folder: os.kill(os.getpid(), signal.SIGSEGV)),
    }  # fmt: skip


KINDS = ("npz", "checkpoint", "idx", "idx.gz", "cifar", "batches", "toml", "png", "jpeg")


# ---- the child -------------------------------------------------------------------------------------------------------


def child(folder: Path, names: list[str], cases: int, first: int = 0) -> None:
    """Run the cases of each kind in a fork, which says in KIND.txt what it saw; print its name and exit status."""
    os.chdir(folder)
    known = kinds()
    for name in names:
        process = os.fork()
        if process == 0:
            output = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(output, 1)
            os.dup2(output, 2)
            Path(name).mkdir(exist_ok=True)
            if name == "meta":
                run_in(folder)
            count = 2 * cases if name == "meta" else cases  # each of its places once
            code = fuzz(known[name], name, range(first, first + count), Path(name).absolute())
            sys.stdout.flush()
            os._exit(code)
        print(name, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


def fuzz(kind: Kind, name: str, cases: range, folder: Path) -> int:
    """Run the cases in ``folder``; return 1, having said which and why, if one raised what is not minivit's."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process, even in the middle of a call into C
    with open("/proc/self/statm") as f:
        limit = int(f.read().split()[0]) * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    refused = wrong = 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for case in cases:
        kind.make(case, name, folder)
        print(f"case {case}", flush=True)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            kind.read(folder)
        except MinivitError as error:
            refused += 1
            if isinstance(error.__cause__, MemoryError) or not error.remedy:
                wrong += 1
                traceback.print_exc()
        except BaseException:
            wrong += 1
            traceback.print_exc()
        signal.setitimer(signal.ITIMER_REAL, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) / 1024
    seconds = time.perf_counter() - start
    counts = f"{len(cases)} cases, {refused} refused, {wrong} wrong"
    print(f"{name}: {counts}, {seconds:.1f} s, {grown:.0f} MiB more at its peak")
    return 1 if wrong else 0


@pytest.fixture
def done(tmp_path: Path) -> Callable[[str], tuple[int, str]]:
    """Return the exit status of a kind's process, and all that it said."""

    def run(name: str) -> tuple[int, str]:
        root, cases = Path(__file__).parent.parent, -(-CASES // len(KINDS))
        environment = os.environ | {
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.test_fuzz", str(tmp_path), name, str(cases)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout.split()[1]), (tmp_path / f"{name}.txt").read_text(errors="replace")

    return run


# ---- the tests -------------------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the child's memory is bounded on Linux")


@linux
@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_raise_nothing_else(name, done):
    status, output = done(name)
    assert status == 0, f"exit status {status}\n{output[-3000:]}"
    *cases, summary = output.splitlines()
    print(summary)
    refused = int(summary.split(" cases, ")[1].split()[0])
    assert len(cases) // 4 < refused, summary  # else the mutations do not get at what is read


@linux
def test_one_changed_value_of_a_checkpoints_meta_raises_nothing_else(done):
    status, output = done("meta")
    summary = output.splitlines()[-1]
    print(summary)
    assert status == 0, f"exit status {status}\n{output[-3000:]}"
    assert "Traceback" not in output
    assert len(set(re.findall(r"^(\('.*\)) = ", output, re.MULTILINE))) > 60, "places that were changed"
    assert "its model's settings cannot be used: depth is" in output


@linux
@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("wrong", 1, "KeyError: 'a key'"),
        ("hangs", -signal.SIGALRM, ""),
        ("hungry", 1, "MemoryError"),
        ("crashes", -signal.SIGSEGV, "Segmentation fault"),
    ],
)
def test_the_child_sees_what_is_wrong(name, status, message, done):
    found, output = done(name)
    assert found == status, output
    assert message in output
    assert "case 0" in output


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2].split(","), *map(int, sys.argv[3:]))
