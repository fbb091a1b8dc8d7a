"""``minivit COMMAND``: finds the command and runs it; each command imports what it needs, and only when it runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from types import ModuleType

from minivit import __version__
from minivit.errors import MinivitError, printable, shortened

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without the import
if TYPE_CHECKING:
    from typing import Any, TextIO

COMMANDS = {
    "train": "train a model; without arguments, a Vision Transformer on handwritten digits",
    "eval": "measure a checkpoint on a data set",
    "predict": "classify images with a checkpoint",
    "explain": "show on one page how a model reads an image, and the gradients that flow back",
    "study": "draw what a model has learned: attention, filters, heads, layers",
    "export": "write a model for timm, Hugging Face, Google's vit_jax or ONNX",
    "data": "look a data set over before training on it, or download one",
    "lr-find": "find a learning rate to begin with",
    "compare": "compare runs: settings, accuracy and time",
    "summary": "show a model's layers, sizes, FLOPs and memory",
    "plan": "predict time, memory and cost of training on many devices",
    "graph": "draw the tape of a training step: operations, shapes, what is kept, gradients",
    "gradcheck": "prove the gradients of all operations, or of a model",
    "bench": "measure the speed of a training step, and of its operations",
    "learn": "learn backpropagation by exercises that mark themselves",
    "doctor": "show what minivit runs on, and test it",
}
"""What there is, each in a module of ``minivit.cli``: ``add_arguments(parser)`` and ``run(args)`` → exit code."""

OK, FAILURE, USAGE, BAD_INPUTS, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes. SIGTERM gives 143 and SIGHUP 129, as a shell reports them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (by default the process's) and return its exit code."""
    with (
        open(os.devnull, "w") as nowhere,  # for a stream that is closed, as by >&-
        redirect_stdout(_Escaping(sys.stdout or nowhere)),
        redirect_stderr(_Escaping(sys.stderr or nowhere)),
    ):
        return _guarded(list(sys.argv[1:] if argv is None else argv))


def _guarded(argv: list[str]) -> int:
    """Run the command line; turn what ends it into a line and an exit code."""
    warnings.formatwarning = lambda message, *where: f"minivit: warning: {_text(message)}\n"  # as errors have
    try:
        return _run(argv)
    except SystemExit as stop:  # from argparse, and from a training run that a signal ended
        return stop.code if isinstance(stop.code, int) else FAILURE
    except KeyboardInterrupt:
        print("minivit: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would raise again
        return FAILURE
    except MemoryError as error:
        what = f"out of memory: {error}".removesuffix(": ")
        return _fail(MinivitError(what, "use a smaller batch, model or image size"))
    except OSError as error:
        return _fail(MinivitError(str(error), "check the path, its permissions and the space left"))
    except Exception as error:
        if not isinstance(error, MinivitError):
            raise  # a bug: the traceback belongs in a report
        return _fail(error)


def _run(argv: list[str]) -> int:
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {command:{width}}  {purpose}" for command, purpose in COMMANDS.items())
    top = Parser(
        prog="minivit",
        usage="minivit COMMAND [arguments]",
        description="Vision Transformers in pure NumPy and CuPy, every gradient proven.\n\n"
        f"commands:\n{listed}\n\nminivit COMMAND --help says more.",
    )
    top.add_argument("--version", action="version", version=f"minivit {__version__}")
    commands = top.add_subparsers(dest="command", help=argparse.SUPPRESS, parser_class=Parser, prog="minivit")
    if any("\0" in word for word in argv):  # which no shell lets through, but a caller of main
        top.error("an argument holds a NUL character")
    name = argv[0] if argv else "--help"
    if not name.startswith("-") and name not in COMMANDS:
        top.error(f"there is no command {name!r}" + did_you_mean(name, COMMANDS))
    for command, purpose in COMMANDS.items():
        if command == name:
            parser = commands.add_parser(command, description=f"{purpose[0].upper()}{purpose[1:]}.")
            _module(command).add_arguments(parser)
    args = top.parse_args(argv or ["--help"])
    if args.command is None:
        top.error("which command?")
    args.argv = argv
    code: int = _module(args.command).run(args)
    sys.stdout.flush()  # here, where a broken pipe is met
    return code


def _module(command: str) -> ModuleType:
    return import_module(f"minivit.cli.{command.replace('-', '_')}")


class Parser(argparse.ArgumentParser):
    """argparse with "did you mean", and errors in the form of minivit's own."""

    def __init__(self, **settings: object) -> None:
        settings["formatter_class"] = lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=30, width=100
        )
        super().__init__(allow_abbrev=False, **settings)  # type: ignore[arg-type]

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse, or say which flag is not known and which was perhaps meant."""
        parsed, extra = self.parse_known_args(args)
        if extra:
            parser = self._of(getattr(parsed, "command", None))
            flag = next((word for word in extra if word.startswith("-")), extra[0]).partition("=")[0]
            what = f"unknown option {flag}" if flag.startswith("-") else f"{flag!r} is one argument too many"
            parser.error(what + did_you_mean(flag, parser._option_string_actions))
        return parsed

    def _of(self, command: str | None) -> Parser:
        """Return the parser of a command, or this one."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and command in action.choices:
                return action.choices[command]
        return self

    def error(self, message: str) -> None:  # type: ignore[override]
        """Print what is wrong and how to learn more; exit with 2."""
        print(f"{self.prog}: error: {MinivitError(message, f'see {self.prog} --help')}", file=sys.stderr)
        raise SystemExit(USAGE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean …?" if a known name is like ``name``, else ""."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def number(kind: type, low: float | None = None, high: float | None = None) -> Callable[[str], float]:
    """Return an argument's ``type``: a number, whole if ``kind`` is int; from ``low`` to ``high`` if given."""

    def check(word: str) -> float:
        shown = repr(shortened(word, 40))
        try:
            value: float = kind(word)
        except ValueError:  # no number, or one of more digits than Python reads
            takes = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"takes {takes}, not {shown}") from None
        if value == 0 and any(c in "123456789" for c in word.lower().partition("e")[0]):
            raise argparse.ArgumentTypeError(f"{shown} is too small: it would be 0")
        if low is not None and high is not None and not low <= value <= high:
            raise argparse.ArgumentTypeError(f"takes a number from {low:,} to {high:,}, not {shown}")
        return value

    return check


def one_of(kind: str, known: Sequence[str]) -> Callable[[str], str]:
    """Return an argument's ``type``: one of the known words."""

    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {kind} {word!r}; known: {', '.join(known)}{did_you_mean(word, known)}"
            )
        return word

    return check


def add_like(parser: argparse.ArgumentParser) -> None:
    """Add ``--like``, which says of weights from elsewhere what their file does not."""
    parser.add_argument("--like", metavar="MODEL",
                        help="prepare images as for weights of this named model (else as the file says)")  # fmt: skip


def _text(message: object) -> str:
    return str(MinivitError(str(message)))  # with its own line breaks only


def _fail(error: MinivitError) -> int:
    print(f"minivit: error: {error}", file=sys.stderr)
    return FAILURE


class _Escaping:
    """A stream of text in which names can do nothing to a terminal: all passes as :func:`printable` has it.

    Line breaks pass: whoever prints a name that may hold one escapes it. So does a carriage return that begins what is
    written, with which a progress bar draws itself anew. What the stream's encoding does not have is escaped, too.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = hasattr(stream, "isatty") and stream.isatty()

    def write(self, text: str) -> int:
        """Write ``text``, escaped; return its length."""
        returns = "\r" * text.startswith("\r")
        shown = returns + "\n".join(map(printable, text.removeprefix("\r").split("\n")))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with self._without_terminal():
            self._stream.write(shown.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what is held back."""
        with self._without_terminal():
            self._stream.flush()

    @contextmanager
    def _without_terminal(self) -> Iterator[None]:
        """Go on where the terminal has been closed: a run that saves itself then must not fail by saying so."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO or not self._terminal:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
