"""A learner's folder: a file for each exercise. What is solved is found by marking them; nothing else is kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from minivit.backend import Key
from minivit.errors import ConfigError, DataError, shortened
from minivit.files import open_regular, write_text
from minivit.learn.child import Child
from minivit.learn.exercise import Exercise
from minivit.learn.ladder import arguments_of, ladder, text_of
from minivit.learn.marking import Finding, mark, printed, stopped

LARGEST_FILE = 1 << 20


@dataclass(frozen=True)
class Mark:
    """The mark of one exercise: ``state`` is "solved", "wrong", "unwritten" (in part), "untouched" or "missing".

    ``finding`` is what is to be said: of the function that is wrong or not written, else None. ``solved`` are the
    functions that are right, and ``printed`` is what they and the file printed.
    """

    exercise: Exercise
    path: Path
    state: str
    finding: Finding | None = None
    solved: tuple[str, ...] = ()
    printed: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether all of it is right."""
        return self.state == "solved"


def exercises(words: Sequence[str]) -> list[Exercise]:
    """Return the exercises of these numbers, or all; ConfigError for what is no number of one."""
    known = {str(exercise.number): exercise for exercise in ladder()}
    for word in words:
        if word.lstrip("0") not in known:
            what = f"there is no exercise {shortened(word, 40)!r}"
            raise ConfigError(what, f"minivit learn lists them: {min(map(int, known))} to {max(map(int, known))}")
    return [known[number] for number in dict.fromkeys(word.lstrip("0") for word in words)] if words else list(ladder())


def start(folder: Path, chosen: Sequence[Exercise]) -> tuple[list[Path], list[Path]]:
    """Write the exercises' files into a folder; return (those written, those that were there and stay as they are)."""
    folder.mkdir(parents=True, exist_ok=True)
    written, there = [], []
    for exercise in chosen:
        path = folder / exercise.file
        if os.path.lexists(path):
            there.append(path)
        else:
            write_text(path, text_of(exercise))
            written.append(path)
    return written, there


def find(path: Path) -> list[Exercise]:
    """Return the exercises whose files are in a folder, or the one whose file ``path`` is."""
    if path.is_dir():
        return [exercise for exercise in ladder() if os.path.lexists(path / exercise.file)]
    return [exercise for exercise in ladder() if exercise.file == path.name]


def elsewhere(folder: Path, chosen: Sequence[Exercise]) -> Path | None:
    """Return a folder within ``folder`` that has the file of one of the exercises, the first by name, or None."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return None
    return next((path for path in inner if any(os.path.lexists(path / one.file) for one in chosen)), None)


def mark_file(exercise: Exercise, path: Path) -> Mark:
    """Mark one file, in a process of its own."""
    if not os.path.lexists(path):
        return Mark(exercise, path, "missing")
    try:
        source = _read(path)
    except (OSError, DataError) as error:
        return Mark(exercise, path, "wrong", Finding("", "wrong", "cannot be read", (f"{error}.",)))
    if source == text_of(exercise).encode():
        return Mark(exercise, path, "untouched")
    with Child(path.absolute(), exercise.given) as child:
        loaded = child.load()
        if loaded.stopped:
            return Mark(exercise, path, "wrong", Finding("", "wrong", loaded.name or "stopped", stopped(loaded)),
                        printed=printed(loaded))  # fmt: skip
        missing = [asked.name for asked in exercise.asked if asked.name not in child.functions]
        if missing:
            says = f"There is no function {missing[0]} in the file: the name stands in what you were given, keep it."
            return Mark(exercise, path, "wrong", Finding(missing[0], "wrong", "no such function", (says,)))
        # the same numbers each time, so that a wrong entry stays in its place; then others that nobody can have noted
        for seed in (0, int.from_bytes(sha256(source).digest()[:6])):
            findings = mark(exercise, arguments_of(exercise), child.run, Key(seed))
            if findings[-1].state != "right":
                break
    solved = tuple(finding.function for finding in findings if finding.state == "right")
    state = "solved" if findings[-1].state == "right" else findings[-1].state
    said = (printed(loaded), *(finding.says for finding in findings if finding.state == "right"))
    return Mark(
        exercise, path, state, None if state == "solved" else findings[-1], solved, next(filter(None, said), ())
    )


def _read(path: Path) -> bytes:
    with open_regular(path) as f:
        source = f.read(LARGEST_FILE + 1)
    if len(source) > LARGEST_FILE:
        raise DataError(f"{path} is larger than 1 MB: no exercise is", "minivit learn start writes it anew elsewhere")
    return source
