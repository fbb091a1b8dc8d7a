"""Where a run stands, and the rows that tell of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""What is told of a step or an epoch, by name; it has at least ``epoch`` and ``step``, both from 1."""


@dataclass
class Progress:
    """Where a run stands: what continues it exactly, besides parameters, optimizer state and seed."""

    epoch: int = 0  # epochs finished
    batches: int = 0  # batches in an epoch; 0 before training has begun
    batch: int = 0  # batches done of the epoch under way, and over these:
    images: int = 0
    loss_sum: float = 0.0
    right: int | None = 0  # whose largest logit was their label's; None where labels are mixed
    seconds: float = 0.0
    lr: float = 0.0  # of the last step
    skipped: int = 0  # batches in a row that were left out, because their loss was not finite
    stopped: str = ""  # why the run is over before its last epoch
    best: Row | None = None  # the row of the best epoch: see Trainer
    history: list[Row] = field(default_factory=list)  # a row for each finished epoch

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be, because a checkpoint may say anything."""
        counts = [self.epoch, self.batches, self.batch, self.images, self.skipped, self.right or 0]
        rows = self.history if self.best is None else [*self.history, self.best]
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in counts) or not isinstance(self.stopped, str):
            raise ValueError("counts that are none")
        numbers = [self.loss_sum, self.seconds, self.lr]
        for row in rows:
            numbers += [row["epoch"], row["step"], row["lr"], row["loss"], row["seconds"], row["images_per_second"]]
            numbers += [row[key] for key in ("accuracy", "valid_loss", "valid_accuracy") if key in row]
        if not all(type(x) in (int, float) for x in numbers) or len(self.history) != self.epoch:
            raise ValueError("figures that are none")

    def add(self, loss: float, images: int, right: int | None) -> None:
        """Add a batch to the sums of the epoch under way: its mean loss, its images, and how many were right."""
        self.images, self.loss_sum = self.images + images, self.loss_sum + loss * images
        self.right = None if self.right is None or right is None else self.right + right

    def row(self, step: int) -> Row:
        """Return the row of the epoch under way, after ``step`` updates of the run."""
        images = max(self.images, 1)
        row = {"epoch": self.epoch + 1, "step": step, "lr": self.lr, "loss": self.loss_sum / images}
        if self.right is not None:
            row["accuracy"] = self.right / images
        return row | {"images_per_second": self.images / max(self.seconds, 1e-9), "seconds": self.seconds}

    def after(self, row: Row) -> Progress:
        """Return where the run stands once the epoch under way has ended, with this row."""
        is_best = "valid_accuracy" in row and (self.best is None or _worth(row) > _worth(self.best))
        best = row if is_best else self.best
        return Progress(self.epoch + 1, self.batches, skipped=self.skipped, best=best, history=[*self.history, row])


def _worth(row: Row) -> tuple[float, float]:
    """Return what is larger for a better epoch."""
    return row["valid_accuracy"], -row["valid_loss"]
