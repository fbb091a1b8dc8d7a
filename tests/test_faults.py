"""Every open, write, fsync, rename and unlink fails in turn: what was saved stays whole, and one line says what failed.

MINIVIT_FAULTS=all lets each call of a whole run fail, and kills it at each: by default the first on each kind of file.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from minivit.cli.main import main
from minivit.errors import CheckpointError
from minivit.train import load_checkpoint, save_checkpoint
from minivit.train.lock import RunLock
from minivit.train.records import Records
from minivit.weights.checkpoint import sweep
from tests.faults import ERRORS, TEMPORARY, Faults, every_fault, failing, signals, start

ALL = os.environ.get("MINIVIT_FAULTS") == "all"
TINY = ["--set", "model.dim=8", "--set", "model.depth=1", "--set", "model.heads=2", "--set", "model.mlp_dim=16"]
errors = pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)


def names(folder):
    """Return the files below a folder; what will be ``a`` is called ``a.tmp``, as in the calls of Faults."""
    found = (str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
    return sorted(TEMPORARY.sub(r"\1.tmp", name) for name in found)


# ---- the parts -------------------------------------------------------------------------------------------------------


@errors
def test_a_checkpoint_outlives_every_fault_while_it_is_replaced(tmp_path, number):
    path = tmp_path / "a.npz"
    save_checkpoint(path, {"old": np.arange(10)}, {})
    before = path.read_bytes()
    for fault in every_fault(tmp_path, failing(number)):
        path.write_bytes(before)
        with fault:
            try:
                save_checkpoint(path, {"a": np.ones(1000), "b": np.ones(9)}, {"new": True})
            except CheckpointError as error:
                assert "\n" not in error.what and error.what.startswith(f"cannot save {path}: {os.strerror(number)} (")
                assert re.search(r"\(8,\d\d\d bytes needed, [\d,]+ free\)", error.what) and error.remedy
            else:
                assert not fault.fired, f"{fault.fired} failed, and nobody was told"
        assert names(tmp_path) == ["a.npz"], fault.fired
        # once it has been renamed, the new one, whole, has taken the place of the old one
        renamed = "rename a.npz" in fault.calls and fault.fired != "rename a.npz"
        assert load_checkpoint(path).meta.get("new") if renamed else path.read_bytes() == before, fault.fired
    assert {call.split()[0] for call in fault.calls} == {"open", "write", "fsync", "rename"}


@errors
def test_a_checkpoint_that_cannot_be_opened_is_not_called_damaged(tmp_path, number):
    save_checkpoint(tmp_path / "a.npz", {}, {})
    for fault in every_fault(tmp_path, failing(number)):
        with fault:
            try:
                load_checkpoint(tmp_path / "a.npz")
            except CheckpointError as error:
                assert error.what == f"cannot read {tmp_path / 'a.npz'}: {os.strerror(number)}"


@pytest.mark.parametrize("number", ERRORS if ALL else ERRORS[:1], ids=errno.errorcode.get)
def test_records_outlive_every_fault(tmp_path, number):
    first = [{"epoch": 1, "step": step, "batch": step, "batch_loss": 1.0} for step in (1, 2)]
    ended = {"epoch": 1, "step": 2, "loss": 1.0}
    for fault in every_fault(tmp_path, failing(number)):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        records = Records(folder)
        records.begin(0, [])
        for row in [*first, ended]:
            records.log(row)
        records.flush()
        records.write_results([ended])
        with fault:
            try:
                again = Records(folder)
                again.begin(0, [ended])  # the run goes on from a checkpoint at the end of its first epoch
                again.log({"epoch": 2, "step": 3, "batch": 1, "batch_loss": 0.5, "long": "x" * 20_000})
                again.flush()
                again.write_results([ended, ended])
            except CheckpointError as error:
                assert "\n" not in error.what and os.strerror(number) in error.what and str(folder) in error.what
            else:
                assert not fault.fired, f"{fault.fired} failed, and nobody was told"
        assert names(folder) == ["metrics.jsonl", "results.csv"], fault.fired
        Records(folder).begin(0, [ended])  # what was recorded before the checkpoint is there still
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3, fault.fired
        assert len((folder / "results.csv").read_text().splitlines()) == 2, fault.fired


def test_records_with_damaged_bytes_lose_the_damaged_line_only(tmp_path):
    good = '{"epoch": 1, "step": 1, "batch": 1, "batch_loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good.encode() + b'{"epoch": 1, \xff\xfe\n' + b"[" * 100_000 + b"\n")
    Records(tmp_path).begin(1, [])
    assert (tmp_path / "metrics.jsonl").read_text() == good


@errors
def test_a_lock_that_cannot_be_had_says_so_and_leaves_nothing(tmp_path, number):
    for fault in every_fault(tmp_path, failing(number)):
        with fault:
            try:
                with RunLock(tmp_path):
                    pass
            except CheckpointError as error:
                assert error.what == f"cannot lock {tmp_path}: {os.strerror(number)}"
            else:
                assert not fault.fired or fault.fired.startswith("unlink")
        assert names(tmp_path) == [".lock"] * fault.fired.startswith("unlink"), fault.fired
        with RunLock(tmp_path):  # what is left behind locks nobody out
            pass


@errors
def test_what_cannot_be_swept_is_named(tmp_path, number):
    (tmp_path / f".last.npz.{'0' * 16}.minivit-tmp").touch()
    with Faults(tmp_path, 1, failing(number)), pytest.raises(CheckpointError, match=r"cannot remove .*last\.npz\."):
        sweep(tmp_path)


# ---- a whole run -----------------------------------------------------------------------------------------------------


def parameters(folder):
    """Return all arrays of a run's last checkpoint as bytes."""
    arrays = load_checkpoint(Path(folder) / "checkpoints" / "last.npz").arrays
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module", autouse=True)
def _small_pictures():
    """Show two small images only: they are written as fifty are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minivit.runs.results.SHOWN", 2)
        patch.setattr("minivit.show.pictures.TILE", 8)
        yield


@pytest.fixture(scope="module")
def command(archive):
    return ["train", str(archive), *TINY, "--epochs", "2", "--batch-size", "64", "--val-fraction", "0.2", "--quiet"]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a run that nothing has disturbed, and its calls."""
    folder = tmp_path_factory.mktemp("whole")
    with Faults(folder / "run", 0) as listed:
        assert main([*command, "-o", str(folder), "--name", "run"]) == 0
    return folder / "run", listed.calls


@pytest.fixture(scope="module")
def halfway(command, tmp_path_factory):
    """The folder of a run that was killed as it renamed its second epoch's checkpoint."""
    folder = tmp_path_factory.mktemp("halfway")
    arguments = [*command, "-o", str(folder), "--name", "run"]
    child = start("kill", 2, folder / "run", *arguments, match="rename checkpoints/last.npz", cwd=folder)
    _, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err
    assert load_checkpoint(folder / "run" / "checkpoints" / "last.npz").meta["train"]["epoch"] == 1
    assert "checkpoints/last.npz.tmp" in names(folder / "run")
    return folder / "run"


def kind(call):
    """Return what a call does to what sort of file: "rename .npz" of "rename checkpoints/last.npz"."""
    what, _, path = call.partition(" ")
    return what, "".join(Path(path).suffixes) or Path(path).name


def first_of_each_kind(calls):
    return list({kind(call): call for call in reversed(calls)}.values())[::-1]


def chosen(folder, calls):
    """Yield faults at all calls, or at the first call of each kind, with one error after the other."""
    places = ((at, "*") for at in itertools.count(1)) if ALL else ((1, call) for call in first_of_each_kind(calls))
    for (at, match), number in zip(places, itertools.cycle(ERRORS)):
        fault = Faults(folder, at, failing(number), match)
        yield fault
        if not fault.fired:
            assert match == "*", f"there was no call {match!r}"
            break


def assert_one_line(err, fault):
    assert re.fullmatch(r"minivit: error: .+\n  → .+\n", err), f"{fault.fired}: {err!r}"


def assert_no_stray_file(folder, fault, before=()):
    """Check that no half-written file is there, besides those of ``before`` that could not yet be swept."""
    unswept = [name for name in before if f"unlink {name}" == fault.fired or f"unlink {name}" not in fault.calls]
    stray = [name for name in names(folder) if name.endswith(".tmp") and name not in unswept]
    assert not stray, f"{fault.fired} left {stray}"


def test_a_new_run_outlives_every_fault(command, whole, tmp_path, capsys):
    calls = [call for call in whole[1] if ".csv" not in call and ".jsonl.tmp" not in call]  # as a resumed run does it
    for runs, fault in enumerate(chosen(tmp_path / "run", calls)):  # noqa: B007
        with fault:
            code = main([*command, "-o", str(tmp_path), "--name", "run"])
        err = capsys.readouterr().err
        if fault.fired and fault.fired != "unlink .lock":  # left behind it is harmless
            assert code == 1, f"{fault.fired} failed, and nobody was told"
            assert_one_line(err, fault)
            assert_no_stray_file(tmp_path / "run", fault)
        for path in (tmp_path / "run").glob("checkpoints/*"):
            load_checkpoint(path)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert runs > 15
    print(f"{runs + 1} runs")


def test_a_resumed_run_outlives_every_fault_and_can_be_resumed_again(halfway, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder)
    with Faults(folder, 0) as listed:
        assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert parameters(folder) == parameters(whole[0])
    drawn = {call for call in whole[1] if ".png" in call or ".html" in call}  # as a new run does it
    calls = [call for call in listed.calls if call not in drawn]
    for runs, fault in enumerate(chosen(folder, calls)):
        shutil.rmtree(folder)
        shutil.copytree(halfway, folder)
        capsys.readouterr()
        with fault:
            code = main(["train", "--resume", str(folder), "--quiet"])
        if fault.fired and fault.fired != "unlink .lock":
            assert code == 1, f"{fault.fired} failed, and nobody was told"
            assert_one_line(capsys.readouterr().err, fault)
            assert_no_stray_file(folder, fault, before=["checkpoints/last.npz.tmp"])
            load_checkpoint(folder / "checkpoints" / "best.npz")
            load_checkpoint(folder / "checkpoints" / "last.npz")
            if not ALL and runs % 6:
                continue
            assert main(["train", "--resume", str(folder), "--quiet"]) == 0, fault.fired
            assert names(folder) == names(whole[0])
        assert parameters(folder) == parameters(whole[0]), fault.fired
    assert runs > 15
    print(f"{runs + 1} runs")


ENDS = [
    ("ENOSPC", 1, "write checkpoints/last.npz.tmp", 7),
    ("SIGTERM", 143, "write checkpoints/best.npz.tmp", 3),
    ("SIGINT", 130, "fsync checkpoints", 1),
]
if ALL:
    ENDS += [
        ("EIO", 1, "fsync checkpoints/last.npz.tmp", 2),
        ("EROFS", 1, "open config.toml.tmp", 1),
        ("SIGTERM", 143, "rename checkpoints/last.npz", 1),
    ]


@pytest.mark.parametrize(("act", "code", "point", "at"), ENDS)
def test_the_real_command_ends_with_its_code(command, tmp_path, act, code, point, at):
    arguments = [*command, "-o", str(tmp_path), "--name", "run"]
    child = start(act, at, tmp_path / "run", *arguments, match=point, cwd=tmp_path)
    out, err = child.communicate()
    assert child.returncode == code, out + err
    assert "Traceback" not in err
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    if act == "SIGTERM":  # the save under way was finished, and no step came after it
        assert re.search(r"stopped and saved after step 3; continue with\n  minivit train --resume .*last\.npz\n", err)


def test_two_ctrl_cs_at_any_call_leave_at_once_and_leave_no_half_file(command, whole, tmp_path, capsys):
    """The second one is Python's KeyboardInterrupt; it may come as a checkpoint is written."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        calls = [call for call in whole[1] if "checkpoints" in call or "metrics" in call]
        for point in dict.fromkeys(calls) if ALL else first_of_each_kind(calls):
            with Faults(tmp_path / "run", 1, signals(signal.SIGINT, 2), point) as fault:
                code = main([*command, "-o", str(tmp_path), "--name", "run"])
            assert fault.fired == point and code == 130
            err = capsys.readouterr().err
            tested = re.fullmatch(r"stopped; the training is done and saved: .*\n  minivit train --resume .*run\n", err)
            assert err == "minivit: interrupted\n" or (tested and "best" in point), f"{point}: {err}"
            assert_no_stray_file(tmp_path / "run", fault)
            for path in (tmp_path / "run").glob("checkpoints/*"):
                load_checkpoint(path)
            shutil.rmtree(tmp_path / "run")
    finally:
        signal.signal(signal.SIGINT, before)


# ---- killed at named points ------------------------------------------------------------------------------------------

KILL_POINTS = ("write metrics.jsonl", "rename results.csv")  # the last: records are ahead of last.npz, or behind it


def test_a_run_killed_at_a_named_point_is_resumed_to_the_same_bits(command, whole, tmp_path):
    calls = whole[1]
    points = [("*", at + 1) for at in range(len(calls))] if ALL else [(p, calls.count(p)) for p in KILL_POINTS]
    resumed = 0
    for i, (point, at) in enumerate(points):
        folder = tmp_path / f"run{i}"
        child = start("kill", at, folder, *command, "-o", str(tmp_path), "--name", folder.name, match=point,
                      cwd=tmp_path)  # fmt: skip
        out, err = child.communicate()
        assert child.returncode == -signal.SIGKILL, (point, at, out, err)
        if (folder / "checkpoints" / "last.npz").exists():
            assert main(["train", "--resume", str(folder), "--quiet"]) == 0
            assert parameters(folder) == parameters(whole[0]), (point, at)
            assert not [name for name in names(folder) if name.endswith((".tmp", ".lock"))]
            resumed += 1
        else:  # nothing had been saved yet, nor does anything pretend to
            assert not list(folder.glob("checkpoints/last*.npz"))
    assert resumed == len(points) or ALL
    print(f"{len(points)} kills, {resumed} resumed")
