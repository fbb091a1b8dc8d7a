"""What a Trainer tells its observers, in which order, and that it says nothing else."""

from __future__ import annotations

import ast
import signal
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit.cli import epochs
from minivit.errors import CheckpointError, ConfigError, MinivitError, Stopped
from minivit.train import Observer, Trainer, load_checkpoint, parameters_hash
from tests.test_kill import BATCHES, EPOCHS, small_run
from tests.test_trainer import Hooked, PowerCut, metrics, nan_at, raise_at, timeless


class Log(Observer):
    """Notes all events: names, with the number of the batch or epoch, or the file's name."""

    def __init__(self):
        self.events, self.rows, self.remarks = [], [], []

    def begin(self, trainer):
        self.events.append("begin")

    def epoch_begins(self, trainer):
        self.events.append(f"epoch {trainer.progress.epoch + 1} begins at {trainer.progress.batch}")

    def step(self, trainer, row):
        self.events.append(f"step {row['batch']}")
        self.rows.append(row)

    def epoch(self, trainer, row):
        self.events.append(f"epoch {row['epoch']}")
        self.rows.append(row)

    def saved(self, trainer, path):
        assert path.exists()
        self.events.append(f"saved {path.name}")

    def remark(self, trainer, text):
        self.events.append("remark")
        self.remarks.append(text)

    def stopped(self, trainer, why):
        self.events.append(f"stopped {why}")

    def end(self, trainer):
        self.events.append("end")


def steps(first, last):
    return [f"step {batch}" for batch in range(first, last + 1)]


def logged(folder, **settings):
    log = Log()
    return log, *small_run(folder, **{"save_every": None, "observers": [log], **settings})


@pytest.fixture
def python_handlers():
    """Python's own handlers of signals, which a shell's background job does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- the order of events ---------------------------------------------------------------------------------------------


def test_a_run_with_validation_and_a_folder(tmp_path):
    log, trainer, train, valid = logged(tmp_path, epochs=2, save_every=5)
    history = trainer.fit(train, valid)
    second = ["saved best.npz"] if trainer.progress.best["epoch"] == 2 else []
    assert log.events == [
        "begin",
        *("epoch 1 begins at 0", *steps(1, 4), "saved last.npz", *steps(5, BATCHES)),
        *("saved best.npz", "saved last.npz", "epoch 1"),
        *("epoch 2 begins at 0", *steps(1, 2), "saved last.npz", *steps(3, BATCHES)),
        *(*second, "saved last.npz", "epoch 2"),
        "end",
    ]
    assert log.rows == metrics(tmp_path), "an observer is told what is recorded"
    assert [row for row in log.rows if "batch" not in row] == history
    log, trainer, train, valid = logged(tmp_path, epochs=2)
    trainer.fit(train, valid)  # it is over
    assert log.events == ["begin", "end"]


def test_a_run_without_a_folder():
    log, trainer, train, _ = logged(None, epochs=1)
    trainer.fit(train)
    assert log.events == ["begin", "epoch 1 begins at 0", *steps(1, BATCHES), "epoch 1", "end"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_stop_and_what_comes_after_it(tmp_path, python_handlers, number):
    log, trainer, train, valid = logged(tmp_path)
    with pytest.raises(Stopped) as caught:
        trainer.fit(Hooked(train, raise_at(3, number)), valid)
    assert log.events[-4:] == ["step 3", "saved last.npz", f"stopped {number.name}", "end"]
    assert (caught.value.signum, caught.value.code) == (number, 128 + number)
    assert caught.value.path == str(tmp_path / "checkpoints" / "last.npz")
    log, trainer, train, valid = logged(tmp_path, epochs=EPOCHS)
    trainer.fit(train, valid)
    assert log.events[:3] == ["begin", "epoch 1 begins at 3", "step 4"]


def test_a_batch_that_is_left_out(tmp_path):
    log, trainer, train, valid = logged(tmp_path, epochs=1, on_nan="skip")
    trainer.fit(Hooked(train, nan_at(3)), valid)
    assert log.events[1:7] == ["epoch 1 begins at 0", "step 1", "step 2", "remark", "step 3", "step 4"]
    assert log.rows[2].keys() == {"epoch", "step", "batch", "left_out"} and log.rows[2]["step"] == 2
    assert log.rows == metrics(tmp_path)
    (remark,) = log.remarks
    assert remark.startswith("batch 3 of epoch 1 left out: ")


def test_a_rollback(tmp_path):
    log, trainer, train, valid = logged(tmp_path, epochs=1, on_nan="rollback")
    trainer.fit(Hooked(train, nan_at(3)), valid)
    begun = ["begin", "saved epoch.npz", "epoch 1 begins at 0", "step 1", "step 2", "remark", "step 3", "step 4"]
    assert log.events[:8] == begun
    assert [row["step"] for row in log.rows[:4]] == [1, 2, 0, 1]


def test_a_run_that_ends_early_says_so_last(tmp_path):
    log, trainer, train, valid = logged(tmp_path, max_seconds=1e-9)
    trainer.fit(train, valid)
    assert log.events[-3:] == ["epoch 1", "remark", "end"]
    assert log.remarks == ["stopped after epoch 1: its time is up"]


def test_resume_remarks_before_fit(tmp_path):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    log, *_ = logged(tmp_path, epochs=1, threads=1)
    assert log.events == ["remark"] and log.remarks[0].startswith("goes on with other threads: 2 → 1")


def test_several_are_told_in_their_order_after_the_keeper_and_of_the_end_in_reverse(tmp_path):
    told = []

    class Named(Observer):
        def __init__(self, name):
            self.name = name

        def epoch(self, trainer, row):
            kept = load_checkpoint(tmp_path / "checkpoints" / "last.npz").meta["train"]["epoch"]
            told.append((self.name, "epoch", kept == row["epoch"] and (tmp_path / "results.csv").exists()))

        def end(self, trainer):
            told.append((self.name, "end", True))

    trainer, train, valid = small_run(tmp_path, epochs=1, observers=[Named("first"), Named("second")])
    trainer.fit(train, valid)
    assert [name for name, *_ in told] == ["first", "second", "second", "first"] and all(kept for *_, kept in told)


def test_an_observer_that_does_nothing_changes_nothing(tmp_path):
    digests = []
    for observers in ([], [Observer(), Log()]):
        trainer, train, valid = small_run(tmp_path / str(len(observers)), epochs=2, observers=observers)
        trainer.fit(train, valid)
        digests.append((parameters_hash(trainer.model), timeless(metrics(tmp_path / str(len(observers))))))
    assert digests[0] == digests[1]


# ---- observers that raise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["begin", "epoch_begins", "step", "epoch", "saved", "end"])
def test_an_observers_error_passes_and_the_run_is_resumed_to_the_same_bits(tmp_path, event):
    whole, train, valid = small_run(None, epochs=2)
    whole.fit(train, valid)

    class Fails(Observer):
        pass

    def fail(self, trainer, *what):
        if trainer.progress.epoch == 1 or event == "begin":
            raise PowerCut

    setattr(Fails, event, fail)
    log, trainer, train, valid = logged(tmp_path, epochs=2 if event != "end" else 1)
    trainer.observers.append(Fails())
    with pytest.raises(PowerCut):
        trainer.fit(train, valid)
    assert log.events[-1] == "end"
    if event != "begin":
        last = load_checkpoint(tmp_path / "checkpoints" / "last.npz").meta["train"]
        assert last["epoch"] == 1, "the first epoch is kept"
    with trainer.lock:  # it was let go of
        pass
    trainer, train, valid = small_run(tmp_path, epochs=2)
    trainer.fit(train, valid)
    assert parameters_hash(trainer.model) == parameters_hash(whole.model)


def test_a_folder_that_is_refused_is_not_touched_by_the_end(tmp_path):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    (tmp_path / "metrics.jsonl").unlink()
    log = Log()
    other = Trainer(trainer.model, trainer.opt, folder=tmp_path, observers=[log])
    with pytest.raises(ConfigError, match="already holds a run"):
        other.fit(train)
    assert log.events == [] and not (tmp_path / "metrics.jsonl").exists()


def test_a_class_is_no_observer():
    with pytest.raises(ConfigError, match=r"observers=<class .*Log'>") as caught:
        small_run(None, observers=[Log])
    assert "objects" in caught.value.remedy


def test_a_run_within_an_observer_that_is_stopped_stops_the_outer_one(tmp_path, python_handlers):
    class Nested(Observer):
        def epoch(self, trainer, row):
            inner, train, valid = small_run(tmp_path / "inner", save_every=None)
            inner.fit(Hooked(train, raise_at(2, signal.SIGTERM)), valid)

    for outer, path in ((tmp_path / "outer", "outer"), (None, "inner")):
        log, trainer, train, valid = logged(outer)
        trainer.observers.append(Nested())
        with pytest.raises(Stopped) as caught:
            trainer.fit(train, valid)
        assert caught.value.path == str(tmp_path / path / "checkpoints" / "last.npz")
        assert log.events[-2:] == ["stopped SIGTERM", "end"] and caught.value.code == 143


def test_a_signal_before_the_first_step_stops_there(tmp_path, python_handlers):
    class Early(Observer):
        def begin(self, trainer):
            signal.raise_signal(signal.SIGINT)

    log, trainer, train, valid = logged(tmp_path)
    trainer.observers.append(Early())
    with pytest.raises(Stopped, match="after step 0"):
        trainer.fit(train, valid)
    assert log.events == ["begin", "saved last.npz", "stopped SIGINT", "end"]
    whole, again = small_run(None, epochs=1)[0], small_run(tmp_path, epochs=1)
    whole.fit(*again[1:])
    again[0].fit(*again[1:])
    assert parameters_hash(again[0].model) == parameters_hash(whole.model)


# ---- silence ---------------------------------------------------------------------------------------------------------


def test_a_trainer_prints_nothing(tmp_path, capfd, python_handlers):
    trainer, train, valid = small_run(tmp_path, on_nan="rollback", patience=1, ema=0.9)
    with pytest.raises(Stopped):
        trainer.fit(Hooked(train, lambda count: nan_at(3)(count) or raise_at(9, signal.SIGINT)(count)), valid)
    trainer, train, valid = small_run(tmp_path, threads=1, on_nan="skip", patience=1, ema=0.9)
    trainer.fit(train, valid)
    assert capfd.readouterr() == ("", "")


def said_by(tree):
    """Yield the names by which a file could write to a terminal, or end the process."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("print", "SystemExit", "exit", "quit"):
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            yield from (name for name in names if name in ("sys", "tqdm", "logging", "warnings"))


def test_no_file_of_training_knows_a_terminal():
    files = list((Path(minivit.__file__).parent / "train").glob("*.py"))
    assert len(files) > 10
    for file in files:
        tree = ast.parse(file.read_text())
        among_processes = ("workers.py", "worker.py", "peer.py", "mpi.py", "relay.py")
        starts = {"sys"} if file.name in among_processes else set()  # others: by what, with what
        assert set(said_by(tree)) == starts, file.name
        of_sys = {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute) and ast.unparse(x.value) == "sys"}
        assert of_sys <= {"executable", "path", "argv", "maxsize"}, file.name
    assert list(said_by(ast.parse("import sys\nfrom tqdm import tqdm\nprint()"))) == ["sys", "tqdm", "tqdm", "print"]


# ---- Stopped ---------------------------------------------------------------------------------------------------------


def test_stopped_is_a_request_and_no_error():
    stop = Stopped(signal.SIGTERM, "stopped and saved after step 3", "resume it", "a/last.npz")
    assert str(stop) == "stopped and saved after step 3\n  → resume it"
    assert isinstance(stop, KeyboardInterrupt) and not isinstance(stop, (Exception, MinivitError))
    assert str(Stopped(signal.SIGINT)) == "stopped" and Stopped(signal.SIGINT).code == 130


# ---- resume from what was read ---------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_read_is_not_read_again(tmp_path, monkeypatch):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    last = tmp_path / "checkpoints" / "last.npz"
    whole, train, valid = small_run(tmp_path, epochs=2)
    with whole.lock:
        checkpoint = load_checkpoint(last)
        monkeypatch.setattr("minivit.train.trainer.load_checkpoint", None)
        again = Trainer(
            whole.model, whole.opt, schedule=whole.schedule, epochs=2, seed=3, clip_norm=1.0, threads=2, micro_batch=9,
            folder=tmp_path,
        )  # fmt: skip
        again.lock = whole.lock
        again.resume(last, checkpoint)
        assert len(again.fit(train, valid)) == 2


def test_a_trainers_own_checkpoint_is_taken_over_by_another(tmp_path):
    trainer, train, valid = small_run(None, epochs=2)
    seen = []

    class Keep(Observer):
        def step(self, trainer, row):
            if trainer.opt.steps == 4:
                seen.append(trainer.checkpoint())

    trainer.observers.append(Keep())
    trainer.fit(train, valid)
    other, train, valid = small_run(None, epochs=2)
    other.resume(tmp_path / "none.npz", seen[0])
    assert other.progress.batch == 4
    other.fit(train, valid)
    assert parameters_hash(other.model) == parameters_hash(trainer.model)


def test_a_model_of_another_kind_is_refused(tmp_path):
    trainer, train, valid = small_run(tmp_path, epochs=1)
    trainer.fit(train, valid)
    last = tmp_path / "checkpoints" / "last.npz"
    checkpoint = load_checkpoint(last)
    kind = checkpoint.meta.pop("kind", "vit")  # the first checkpoints named none
    other, *_ = small_run(None, epochs=2)
    other.model.kind = kind
    other.resume(last, checkpoint)
    assert other.checkpoint().meta["kind"] == "vit"
    for meta in ({}, {"kind": "vit"}):
        other.model.kind = "mixer"
        checkpoint.meta |= meta
        with pytest.raises(CheckpointError, match="kind of model: vit → mixer"):
            other.resume(last, checkpoint)


# ---- what the command line shows -------------------------------------------------------------------------------------


def test_a_bar_is_closed_however_the_run_ends(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bars, remarks = epochs.shown()
    trainer, train, _ = small_run(None, observers=[bars, remarks])
    with pytest.raises(PowerCut):
        trainer.fit(Hooked(train, lambda count: (_ for _ in ()).throw(PowerCut) if count == 3 else None))
    assert isinstance(bars, epochs.EpochBars) and bars._bar is None


def test_a_row_as_text():
    row = {"loss": 0.5, "lr": 1e-3, "images_per_second": 1234.0}
    assert epochs.describe(row) == "loss 0.5000, lr 1.00e-03, 1,234 images/s"
    row |= {"accuracy": 0.25, "valid_loss": 0.75, "valid_accuracy": np.float64(0.5)}
    shown = "accuracy 25.00%, valid 50.00%, loss 0.5000, valid 0.7500, lr 1.00e-03, 1,234 images/s"
    assert epochs.describe(row) == shown
