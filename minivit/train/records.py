"""What a run writes down for people: ``metrics.jsonl``, a line for each step and epoch, and ``results.csv``."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from minivit.errors import CheckpointError, ConfigError
from minivit.files import open_regular, write_text
from minivit.train.progress import Row

_LONGEST_HEAD = 1000  # bytes of results.csv that tell whose it is


class Records:
    """The records in a run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines: list[str] = []

    def begin(self, batch: int, history: Sequence[Row]) -> None:
        """Cut the records to the finished epochs, ``history``, and the first ``batch`` batches of the next one.

        So a run that continues from a checkpoint has no row twice, nor that of a test, which is made at its end. Raises
        ConfigError, nothing changed, if a new run would overwrite files of these names that are none of minivit's.
        """
        metrics = self.folder / "metrics.jsonl"
        with _telling(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            # a line whose bytes are damaged is dropped like one cut short
            lines = _text(metrics).splitlines()
        if not history and not batch:
            self._refuse_others(lines)
        self._replace(metrics, "".join(f"{line}\n" for line in lines if _is_done(line, batch, len(history))))
        self.write_results(history)

    def _refuse_others(self, lines: Sequence[str]) -> None:
        """Raise ConfigError if metrics.jsonl, of ``lines``, or results.csv were written by somebody else."""
        others = ["metrics.jsonl"] if lines and not any(line.startswith('{"epoch":') for line in lines) else []
        results = self.folder / "results.csv"
        with _telling(self.folder):
            head = _text(results, _LONGEST_HEAD).partition("\n")[0].strip()
        others += ["results.csv"] if head and not head.startswith("epoch,") else []
        if others:
            what = f"{self.folder} holds {' and '.join(others)} that no run of minivit has written"
            raise ConfigError(what, "move that away, or name another folder")

    def log(self, row: Row) -> None:
        """Add a line to metrics.jsonl; it waits in memory until :meth:`flush`."""
        self._lines.append(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Write the lines out, to last: done before a checkpoint, which they must not lag behind."""
        lines, self._lines = self._lines, []
        with _telling(self.folder), open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.writelines(lines)
            f.flush()
            os.fsync(f.fileno())

    def write_results(self, history: Sequence[Row]) -> None:
        """Write results.csv, a row for each finished epoch."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in history for key in row)))
        writer.writeheader()
        writer.writerows(history)
        self._replace(self.folder / "results.csv", text.getvalue())

    def _replace(self, path: Path, text: str) -> None:
        with _telling(path.parent):
            write_text(path, text)


def _text(path: Path, most: int = -1) -> str:
    """Return the text of a file, of its first ``most`` bytes if that is not negative; "" if there is none."""
    try:
        with open_regular(path) as f:
            return f.read(most).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


@contextlib.contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Turn a failure to write into one line."""
    try:
        yield
    except OSError as error:
        what = f"cannot write the records in {folder}: {error.strerror or error}"
        raise CheckpointError(
            what, "make room or mend the folder, then resume the run from checkpoints/last.npz"
        ) from error


def _parsed(line: str) -> Row | None:
    """Return the row of a line in metrics.jsonl; None if it was cut short by a kill, or damaged since."""
    try:
        row = json.loads(line)
        return row if isinstance(row, dict) and isinstance(row["epoch"], int) else None
    except (ValueError, KeyError, RecursionError):
        return None


def _is_done(line: str, batch: int, epochs: int) -> bool:
    """Tell whether a line of metrics.jsonl is about one of the first ``epochs`` epochs, or ``batch`` of the next."""
    row = _parsed(line)
    if row is None or "test_accuracy" in row:
        return False
    at = row.get("batch")
    return row["epoch"] <= epochs or (row["epoch"] == epochs + 1 and isinstance(at, int) and at <= batch)
