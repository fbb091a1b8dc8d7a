"""Which lines ran, by marks in the code: those that a tracer would see."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from tests import cover

SAMPLE = '''"""A docstring."""
from __future__ import annotations

import functools

TABLE = {
    "a": 1,
}
"""What it is."""


@functools.cache
@functools.lru_cache(
    maxsize=8
)
def called(x: int) -> str:
    """Of a function."""
    if x == 0:
        return "none"
    elif x == 1:
        found = "one"
    else:
        found = "many"
    for _ in range(x):
        pass
    else:
        found += "!"
    while x > 7:
        x -= 1
    with open(__file__) as f, f:
        found = found
    try:
        found[
            99
        ]
    except TypeError:
        raise
    except IndexError as error:
        del error
    finally:
        found += "?"
    match x:
        case 0:
            return ""
        case 2 | 3:
            return found + str(sum(
                n for n in (1, 2)
                if n > 1
            ))
    return found


class Thing:
    """Of a class."""

    size: int = 3

    def never(self):
        """Nobody calls it."""
        self.size = (
            4
        )


SAID = (lambda x:
        called(x))(2)
'''


def traced(path: Path) -> set[int]:
    """Return the lines of a file that a tracer is told of while it is imported."""
    lines: set[int] = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != str(path):
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        exec(compile(path.read_text(), str(path), "exec"), {"__name__": "sample", "__file__": str(path)})
    finally:
        sys.settrace(before)
    return lines


def test_marks_are_the_lines_of_a_tracer(tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(SAMPLE)
    spec = importlib.util.spec_from_loader("sample", cover.Loader("sample", str(path)))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SAID == "many!?2" and module.called.__doc__ == "Of a function." and module.__doc__ == "A docstring."
    assert not list(tmp_path.rglob("*.pyc"))  # which would be Python's own
    marked = {number for number, yes in enumerate(cover.ran.pop(str(path))) if yes}
    statements = {node.lineno for node in ast.walk(ast.parse(SAMPLE)) if isinstance(node, ast.stmt)}
    number_of = lambda *lines: {SAMPLE.splitlines().index(line) + 1 for line in lines}
    not_met = number_of("    except TypeError:", "        case 0:")
    docstrings = number_of('"""A docstring."""', '    """Of a class."""')  # which are no statements to coverage.py
    assert marked == (traced(path) & (statements | marked)) - docstrings and not_met <= traced(path) - marked


@pytest.mark.skipif(cover.Finder not in sys.meta_path, reason="coverage is not measured")
def test_the_modules_at_work_are_marked():
    assert sys.gettrace() is None
    assert any(cover.ran[str(Path(sys.modules["minivit.errors"].__file__).resolve())])
