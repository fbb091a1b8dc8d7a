"""The end of a run: the weights that count are measured, once, and drawn in its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from minivit.errors import CheckpointError, printable
from minivit.measure.metrics import classification_metrics
from minivit.runs.job import Job
from minivit.runs.results import write_results
from minivit.show.text import percent_interval
from minivit.train.evaluation import evaluate
from minivit.train.records import Records
from minivit.train.trainer import Trainer
from minivit.weights.checkpoint import Checkpoint, load_checkpoint


def finish(
    job: Job,
    trainer: Trainer,
    folder: Path,
    config: str,
    stop_if_asked: Callable[[], None],
    say: Callable[[str], object],
    tell: Callable[[str], object],
) -> dict[str, Any] | None:
    """Measure the best weights where there are validation images, else the last ones, once, on the test images.

    They are drawn in the report. Without test images it shows validation or training images; of a run that overfits it
    always shows these. Returns loss, accuracy, its interval and count of the test images, or None where there are none;
    the job's model then has the weights that were measured.
    """
    parts, best, overfit = job.parts, trainer.progress.best, job.settings["data.overfit"] > 0
    shown, split = parts.train, "training"
    if parts.valid is not None and best is not None:
        _take_best(job, folder, best)
        shown, split = parts.valid, "training" if overfit else "validation"
        what = "overfit     of the training images" if overfit else "validation  best accuracy"
        tell(f"{what} {best['valid_accuracy']:.2%}, after epoch {best['epoch']}")
    else:
        with trainer.averaged():  # their average, if the run keeps one
            last = job.model.state_dict()
        job.model.load_state_dict(last)
    if parts.test is not None and not overfit:
        shown, split = parts.test, "test"
    loader = parts.held_loader(shown, job.settings["train.device"])
    logits = evaluate(job.model, loader, stop_if_asked, job.settings["train.threads"])["logits"]
    result = classification_metrics(logits, shown.labels)
    test = None
    if split == "test":
        test = {name: result[name] for name in ("loss", "accuracy", "interval", "count")}
        test["interval"] = list(test["interval"])  # as it will be read
        of = f", with the weights of epoch {best['epoch']}" if best is not None else ""
        figures = f"accuracy {percent_interval(test)} on {test['count']:,} images, loss {test['loss']:.4f}"
        tell(f"test        {figures}{of}")
        at = best if best is not None else trainer.progress.history[-1]
        records = Records(folder)
        records.log({"epoch": at["epoch"], "step": at["step"], **{f"test_{name}": x for name, x in test.items()}})
        records.flush()
    title = f"{folder.resolve().name}: {job.settings['model.name']} on {parts.title}"
    about = f"{job.model.num_parameters():,} parameters; {parts.text(len(parts.train.classes))}"
    write_results(job.model, loader, logits, result, folder, title=title, about=about, config=config,
                  rows=trainer.progress.history, split=split)  # fmt: skip
    say(printable(f"report      {folder / 'report.html'}"))
    say(_next_steps(job, folder))
    return test


def _take_best(job: Job, folder: Path, best: Mapping[str, Any]) -> None:
    """Give the model the weights of the best epoch, whose row is ``best``; the average, if the run keeps one."""
    path = folder / "checkpoints" / "best.npz"
    kept = _best_checkpoint(path, best)
    try:
        job.model.load_state_dict(kept.under("model") | kept.under("ema"))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.what}", error.remedy) from error


def _best_checkpoint(path: Path, best: Mapping[str, Any]) -> Checkpoint:
    """Read the checkpoint that holds the weights of the epoch whose row is ``best``.

    Raises CheckpointError if it is missing or damaged, or of another epoch, as after a mix of two runs' files.
    """
    instead = f"put it back; or measure the last weights: minivit eval {quote(str(path.with_name('last.npz')))}"
    try:
        checkpoint = load_checkpoint(path)
        kept = checkpoint.meta["train"]["best"]
        same = all(kept.get(key) == best[key] for key in ("epoch", "step", "valid_accuracy", "valid_loss"))
    except CheckpointError as error:
        raise CheckpointError(error.what, instead) from error
    except (KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise CheckpointError(f"{path} does not hold the weights of epoch {best['epoch']}, the best one", instead)
    return checkpoint


def _next_steps(job: Job, folder: Path) -> str:
    """Return commands that a user may want next."""
    run, parts = printable(quote(str(folder))), job.parts
    commands = [f"minivit predict {run} IMAGE…"]
    if parts.test is not None:
        commands.insert(0, f"minivit eval {run}")
    elif parts.valid is not None and not job.settings["data.overfit"]:
        commands.insert(0, f"minivit eval {run} --split val")
    if parts.train.files:
        commands.append(f"minivit eval {run} --split all    (lists the worst mistakes: a label may be wrong)")
    return "next        " + "\n            ".join(commands)
