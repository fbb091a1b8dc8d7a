"""``minivit learn``: exercises in backpropagation that mark themselves, and name the mistake."""

from __future__ import annotations

import argparse
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivit.cli.bars import reading_bar
from minivit.cli.main import FAILURE, OK, did_you_mean

if TYPE_CHECKING:
    from minivit.learn.exercise import Exercise
    from minivit.learn.workbook import Mark

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = (
        "minivit learn [DIR]                  the exercises, and what is solved in DIR\n"
        "       minivit learn start DIR [N …]        write their files into DIR; none is ever overwritten\n"
        "       minivit learn check DIR|FILE [N …]   mark them; exit code 1 unless all are solved; --json\n"
        "       minivit learn hint N [1|2|3]         a nudge, a step, the last step but one"
    )
    parser.epilog = (
        "Each file explains what is asked, and is solved in plain NumPy. What is solved is found by marking\n"
        "the files: nothing else is remembered. A file is run to be marked, in a process of its own with\n"
        "bounds on time and memory, but with your rights: mark no files of people whom you do not trust."
    )
    parser.add_argument("words", metavar="…", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the first word says; without one that is known, list the exercises."""
    from minivit.errors import ConfigError

    verb, *words = args.words or ["list", "."]
    if verb in VERBS:
        return VERBS[verb](words, args.json)
    if words:
        meant = did_you_mean(verb, VERBS)
        raise ConfigError(f"minivit learn {verb!r}: unknown word{meant}", f"known: {', '.join(VERBS)}")
    return list_all([verb], args.json)


def list_all(words: Sequence[str], as_json: bool) -> int:
    """Print the ladder, and the state of the files in a folder."""
    from minivit.errors import ConfigError
    from minivit.learn.ladder import ladder
    from minivit.learn.workbook import find
    from minivit.show.text import text_table

    folder = Path(words[0] if words else ".")
    if folder.is_file():
        raise ConfigError(f"{folder} is a file, not a folder", f"mark it: minivit learn check {_shown(folder)}")
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {str(folder)!r}", f"minivit learn start {_shown(folder)} makes one")
    marks = {mark.exercise: mark for mark in _marked(folder, find(folder))}
    if as_json:
        return _print_json(list(marks.values()))
    rows = [
        [str(exercise.number), exercise.title, _state(marks[exercise]) if exercise in marks else ""]
        for exercise in ladder()
    ]
    print(text_table(["", "exercise", "state" if marks else ""], rows, right=(0,)))
    solved = sum(mark.passed for mark in marks.values())
    where = f"{solved} of {len(rows)} solved in {_shown(folder)}"
    print(f"\n{where}" if marks else "\nBegin with:  minivit learn start learn")
    return OK


def start(words: Sequence[str], as_json: bool) -> int:
    """Write the files of some exercises, or of all, into a folder."""
    from minivit.errors import ConfigError
    from minivit.learn.workbook import exercises, start
    from minivit.show.text import json_text, plural

    if not words or not words[0]:
        raise ConfigError("start: into which folder?", "minivit learn start learn")
    folder = Path(words[0])
    if words[0].isdigit() and not folder.exists():
        raise ConfigError("start: into which folder?", f"minivit learn start learn {' '.join(words)}")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a folder", "give a folder: minivit learn start learn")
    written, there = start(folder, exercises(words[1:]))
    if as_json:
        print(json_text({"written": [str(path) for path in written], "there": [str(path) for path in there]}))
        return OK
    if written:
        print(f"{plural(len(written), 'file')} in {_shown(folder)}: {_names(written)}")
    if there:
        print(f"Already there, and left as they are: {_names(there)} (remove a file to begin it anew)")
    first = (written or there)[0]
    print(f"\nOpen {_shown(first)} and read it from the top; write what is missing; then:")
    print(f"  minivit learn check {_shown(folder)}")
    return OK


def _names(paths: Sequence[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} … {paths[-1].name}"


def check(words: Sequence[str], as_json: bool) -> int:
    """Mark files: those of a folder, those of some numbers in it, or one."""
    place, chosen = _chosen(words)
    marks = _marked(place, chosen)
    if as_json:
        _print_json(marks)
    else:
        print(_report(marks[0]) if len(marks) == 1 else _reports(marks))
        print(f"\n{_next(marks, place)}")
    return OK if all(mark.passed for mark in marks) else FAILURE


def _chosen(words: Sequence[str]) -> tuple[Path, list[Exercise]]:
    """Return the folder or file that the words name, and the exercises; ConfigError says which words would do."""
    from minivit.errors import ConfigError
    from minivit.learn.workbook import elsewhere, exercises, find

    place, numbers = Path(words[0] if words else "."), list(words[1:])
    if words and words[0].isdigit() and not place.exists():  # in the folder itself: minivit learn check 3
        place, numbers = Path("."), list(words)
    if not place.exists():
        folder = place.parent if place.suffix else place  # a file that is not there is in no folder of its name
        verb = "check" if folder.is_dir() else "start"
        does = "marks what is there" if verb == "check" else "makes a folder of exercises"
        raise ConfigError(f"there is no {place}", f"minivit learn {verb} {_shown(folder)} {does}")
    if not place.is_dir() and not place.is_file():
        raise ConfigError(f"{place} is neither a folder nor a file", "give a folder of exercises, or one of its files")
    chosen, own = exercises(numbers) if numbers else find(place), find(place)
    if place.is_file():
        if not chosen:
            raise ConfigError(
                f"{place} is no exercise's file", f"say which it is: minivit learn check {_shown(place)} 3"
            )
        if len(chosen) > 1:
            raise ConfigError(f"{place} is one file, for one exercise", f"minivit learn check {_shown(place)} 3")
        if own and own != chosen:
            what = f"{place} is the file of exercise {own[0].number}, not of {chosen[0].number}"
            raise ConfigError(what, f"minivit learn check {_shown(place)}; or give your file a name of its own")
        return place, chosen
    inner = elsewhere(place, chosen or exercises([]))
    if inner and not set(own) & set(chosen):
        what = f"there are none of these exercises in {place}" if numbers else f"there are no exercises in {place}"
        raise ConfigError(what, " ".join(["they are in a folder there: minivit learn check", _shown(inner), *numbers]))
    if not chosen:
        raise ConfigError(f"there are no exercises in {place}", f"minivit learn start {_shown(place)}")
    return place, chosen


def hint(words: Sequence[str], as_json: bool) -> int:
    """Print one of an exercise's three hints."""
    from minivit.errors import ConfigError
    from minivit.learn.workbook import exercises
    from minivit.show.text import json_text

    steps = ["1", "2", "3"]
    if not 1 <= len(words) <= 2 or words[1:] not in ([], *([step] for step in steps)):
        what = f"hint {' '.join(words)}: there is none" if words else "hint: for which exercise?"
        number = words[0] if words and words[0].isdigit() else "3"
        raise ConfigError(what, f"minivit learn hint {number}; then hint {number} 2, and hint {number} 3")
    [exercise] = exercises(words[:1])
    step = int(words[1]) if len(words) == 2 else 1
    text = exercise.hints[step - 1]
    if as_json:
        print(json_text({"exercise": exercise.number, "hint": step, "text": text}))
        return OK
    print(f"Exercise {exercise.number}, {exercise.title}: hint {step} of 3\n\n{_wrapped([text])}")
    if step < 3:
        print(f"\nThe next one:  minivit learn hint {exercise.number} {step + 1}")
    return OK


VERBS = {"list": list_all, "start": start, "check": check, "hint": hint}


# ---- marking and words -----------------------------------------------------------------------------------------------


def _marked(place: Path, chosen: Sequence[Exercise]) -> list[Mark]:
    from minivit.learn.workbook import mark_file

    marks = []
    bar: Any = reading_bar(len(chosen), "marking")
    for exercise in chosen:
        marks.append(mark_file(exercise, place if place.is_file() else place / exercise.file))
        bar.update()
    bar.close()
    return marks


def _print_json(marks: Sequence[Mark]) -> int:
    from minivit.show.text import json_text

    rows = [
        {
            "exercise": mark.exercise.number,
            "title": mark.exercise.title,
            "file": str(mark.path),
            "passed": mark.passed,
            "state": mark.state,
            "function": mark.finding.function if mark.finding else None,
            "mistake": mark.finding.mistake if mark.finding else None,
            "message": "\n".join(mark.finding.says) if mark.finding else "",
        }
        for mark in marks
    ]
    print(json_text({"exercises": rows, "solved": sum(mark.passed for mark in marks)}))
    return OK


def _state(mark: Mark) -> str:
    """Return the state in a few words."""
    right = f"{' and '.join(mark.solved)} {'are' if len(mark.solved) > 1 else 'is'} right; " if mark.solved else ""
    if mark.state == "unwritten" and mark.finding:
        return f"{right}{mark.finding.function} is not written yet"
    if mark.state == "wrong" and mark.finding:
        what = f"{mark.finding.function} is wrong" if mark.finding.function else "the file cannot be run"
        return right + what + (f": {mark.finding.mistake}" if mark.finding.mistake else "")
    return {"untouched": "not begun", "missing": "no file"}.get(mark.state, mark.state)


def _reports(marks: Sequence[Mark]) -> str:
    """Return what is to be said of several files: most of those that are begun and not solved."""
    numbers = lambda state: ", ".join(str(mark.exercise.number) for mark in marks if mark.state == state)
    parts = [f"solved: {numbers('solved')}"] if numbers("solved") else []
    parts += [_report(mark) for mark in marks if mark.state in ("wrong", "unwritten")]
    parts += [f"not begun: {numbers('untouched')}"] if numbers("untouched") else []
    parts += [f"no file: {numbers('missing')}"] if numbers("missing") else []
    return "\n\n".join(parts)


def _report(mark: Mark) -> str:
    """Return what is to be said of one file."""
    says = list(mark.finding.says) if mark.finding else []
    if mark.state == "untouched":
        first, *others = (asked.name for asked in mark.exercise.asked)
        then = f", and {' and '.join(others)} once that is right" if others else ""
        says = [
            "Read it from the top: what is given, what is asked, and the derivation up to its last step. Take that "
            f"step on paper. Then write {first}{then}, in place of the lines that raise NotImplementedError."
        ]
    says += [] if says and mark.state == "wrong" and "It printed:" in says else mark.printed
    head = f"{_shown(mark.path.name)}: {_state(mark)}"
    return f"{head}\n\n{_wrapped(says)}" if says else head


def _next(marks: Sequence[Mark], place: Path) -> str:
    """Return what to do next."""
    from minivit.learn.ladder import ladder

    open_ones = [mark for mark in marks if not mark.passed]
    folder = place if place.is_dir() else place.parent
    if not open_ones:
        later = [exercise for exercise in ladder() if exercise.number > marks[-1].exercise.number]
        if not later:
            return "That was the last one." if len(marks) == 1 else "All of them are solved."
        there = (folder / later[0].file).exists()
        file, number = _shown(folder / later[0].file), later[0].number
        step = f"open {file}" if there else f"minivit learn start {_shown(folder)} {number}"
        return f"Next, exercise {later[0].number}, {later[0].title}:  {step}"
    mark = open_ones[0]
    which = "" if mark.path.name == mark.exercise.file else f" {mark.exercise.number}"
    again = f"minivit learn check {_shown(mark.path)}{which}"
    if mark.state == "missing":
        return f"Write the file:  minivit learn start {_shown(folder)} {mark.exercise.number}"
    stuck = f"Stuck?  minivit learn hint {mark.exercise.number}"
    if mark.state == "untouched":
        return f"Open {_shown(mark.path)}.\nThen:   {again}"
    return f"Again:  {again}\n{stuck}"


def _shown(path: object) -> str:
    """Return a path as a shell takes it, and on one line."""
    from minivit.errors import printable

    return printable(shlex.quote(str(path)))


def _wrapped(says: Sequence[str]) -> str:
    """Return lines, indented and wrapped, but not within shapes; those that are indented, or of code, stay whole."""
    lines = []
    for text in "\n".join(says).split("\n"):
        kept = text.startswith(("  ", "In line "))
        joined = re.sub(r"\(\d[\d, ]*\)", lambda shape: shape[0].replace(" ", "\xa0"), text)
        wrapped = textwrap.fill(joined, WIDTH, initial_indent="  ", subsequent_indent="  ").replace("\xa0", " ")
        lines.append(f"  {text}" if kept else wrapped)
    return "\n".join(lines)
