"""``minivit export``: a model for timm, Hugging Face's transformers, Google's vit_jax, or as ONNX."""

from __future__ import annotations

import argparse
import sys

from minivit.cli.main import OK, add_like, one_of

SYSTEMS = ("timm", "huggingface", "google", "onnx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "timm and huggingface: a folder of model.safetensors, config.json and a model card, README.md.\n"
        "google: vit_jax's .npz. onnx: a file that takes batches of any size (pip install 'minivit[onnx]').\n"
        "Every model can go to onnx; a hybrid of a ResNet to timm or google, too, as its stem_eps says.\n"
        "What a system has no place for is an error that says so."
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument("--to", type=one_of("to", SYSTEMS), required=True, metavar="SYSTEM", help=", ".join(SYSTEMS))
    parser.add_argument("-o", "--output", metavar="FOLDER|FILE",
                        help="what to write (default: NAME-SYSTEM, NAME-google.npz or NAME.onnx, here)")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what was exported there before")
    add_like(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files, and say where and what is not quite as here."""
    from pathlib import Path

    from minivit.data.dataset import class_names
    from minivit.errors import ConfigError, printable
    from minivit.runs.folder import run_of
    from minivit.runs.read import read_test_of
    from minivit.runs.trained import open_trained
    from minivit.show.text import bytes_text, percent_interval
    from minivit.weights.card import Facts
    from minivit.weights.export import write_export
    from minivit.weights.place import find_checkpoint

    trained = open_trained(args.checkpoint, args.like)
    tell = lambda text: print(printable(text), file=sys.stderr)
    if trained.path != args.checkpoint:
        tell(f"checkpoint  {trained.path}")
    folder = run_of(trained.path)
    stem = Path(trained.path).stem if folder is None else folder.name
    stem = Path(args.checkpoint).resolve().name if folder is None and trained.path != args.checkpoint else stem
    output = args.output
    if output is None:
        output = stem + {"onnx": ".onnx", "google": "-google.npz"}.get(args.to, f"-{args.to}")
    for place in (Path(output), Path(output) / "model.safetensors"):
        if place.exists() and place.samefile(trained.path):
            raise ConfigError(f"{place} is the checkpoint itself", "name another place")
    tested = None
    if folder is not None and Path(find_checkpoint(str(folder))).resolve() == Path(trained.path).resolve():
        tested = read_test_of(folder, trained.meta.get("train", {}).get("epoch"))
    accuracy = "" if not tested else f"{percent_interval(tested)} of {tested['count']:,} test images"
    names = tuple(class_names(trained.classes, trained.model.config["num_classes"]))
    facts = Facts(trained.preparation, names, str(trained.data.get("name", "")), accuracy)
    for note in write_export(trained.model, output, args.to, facts, args.overwrite):
        tell(f"note        {note}")
    written = Path(output)
    files = sorted(written.iterdir()) if written.is_dir() else [written]
    print(printable(f"{args.to:11} {output} ({bytes_text(sum(f.stat().st_size for f in files))})"))
    return OK
