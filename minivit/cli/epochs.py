"""What the command line shows of a training run: a progress bar, or lines where nobody watches, and remarks."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from minivit.train.observers import Observer
from minivit.train.progress import Row


class Remarks(Observer):
    """Prints remarks about the run."""

    def remark(self, trainer: Any, text: str) -> None:
        """Print a remark."""
        print(text, file=sys.stderr, flush=True)


class EpochLines(Observer):
    """Prints a line for each epoch."""

    def epoch(self, trainer: Any, row: Row) -> None:
        """Print the epoch's line."""
        print(f"{_title(trainer, row['epoch'])}{describe(row)}", file=sys.stderr, flush=True)


class EpochBars(Observer):
    """Draws a bar for each epoch, which stays there when it is full."""

    def __init__(self) -> None:
        self._bar: Any = None

    def epoch_begins(self, trainer: Any) -> None:
        """Begin a bar."""
        from tqdm import tqdm  # late: to import it takes a while

        columns, rows = shutil.get_terminal_size()  # unlike tqdm's own guess never 0
        self._bar = tqdm(
            total=trainer.progress.batches,
            initial=trainer.progress.batch,
            desc=_title(trainer, trainer.progress.epoch + 1),
            bar_format="{desc}{bar} {percentage:3.0f}% {elapsed}<{remaining}{postfix}",
            ncols=min(columns - 1, 120),  # what is last in the postfix is cut first
            nrows=rows,
        )

    def step(self, trainer: Any, row: Row) -> None:
        """Draw the bar one batch longer."""
        if "left_out" not in row:
            self._bar.set_postfix_str(describe(row), refresh=False)
        self._bar.update()

    def epoch(self, trainer: Any, row: Row) -> None:
        """Leave the bar with the epoch's figures."""
        self._bar.set_postfix_str(describe(row))
        self._close()

    def end(self, trainer: Any) -> None:
        """Leave the bar as it is where an epoch was not finished."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def shown() -> list[Observer]:
    """Return what shows a run on standard error: bars on a terminal, else a line an epoch."""
    return [EpochBars() if sys.stderr.isatty() else EpochLines(), Remarks()]


def _title(trainer: Any, epoch: int) -> str:
    return f"epoch {epoch:{len(str(trainer.epochs))}}/{trainer.epochs}  "


def describe(row: Row) -> str:
    """Return a row as text; what matters most comes first, because a narrow terminal cuts the rest."""
    parts = []
    for name, form in (("accuracy", ".2%"), ("loss", ".4f")):
        if name in row:
            parts.append(f"{name} {row[name]:{form}}")
        if f"valid_{name}" in row:
            parts.append(f"valid{'' if name in row else f' {name}'} {row[f'valid_{name}']:{form}}")
    return f"{', '.join(parts)}, lr {row['lr']:.2e}, {row['images_per_second']:,.0f} images/s"
