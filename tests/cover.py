"""Line coverage without a tracer, for ``pytest --cov``: minivit's modules themselves note which lines ran.

A tracer is told of every line that runs, also within the tests, in stand-ins and in libraries, and up to Python 3.13
every instruction is slower as long as there is one: half of the suite's time. Instead, each statement of minivit is
preceded by a mark, ``__lines__[number] = True``, when its file is compiled; at the end coverage.py gets the lines that
were marked and reports as ever. The lines are the tracer's, but for an ``except`` or a ``case`` that was asked and
never met, which does not count as run here.

Where coverage.py does without a tracer (``sysmon``, Python 3.14), or is asked for something else (branches, other
files), this file does nothing. ``MINIVIT_TESTS_TRACED=1`` leaves the tracer in its place, to compare.
"""

from __future__ import annotations

import ast
import os
import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

WORKERS = "MINIVIT_TESTS_MARKED"  # set for xdist's workers, in which coverage begins after minivit is imported

ran: dict[str, list[bool]] = {}
"""File → whether the line of each number ran."""
_coverage: Any = None  # what measures, where it has been stopped


def mark(number: int, at: ast.stmt) -> ast.stmt:
    target = ast.Subscript(ast.Name("__lines__", ast.Load()), ast.Constant(number), ast.Store())
    made = ast.copy_location(ast.Assign([target], ast.Constant(True)), at)
    return ast.fix_missing_locations(made)


def marks(statement: ast.stmt) -> list[ast.stmt]:
    """Return the marks of a statement: one, and one for each decorator's line."""
    return [mark(x.lineno, statement) for x in (*getattr(statement, "decorator_list", ()), statement)]


def may_follow(block: list[ast.stmt], i: int) -> bool:
    """Tell whether a mark may stand before a block's i-th statement: not before a docstring or ``from __future__``."""
    at = block[i]
    text = i == 0 and isinstance(at, ast.Expr) and isinstance(at.value, ast.Constant)
    return not text and not (isinstance(at, ast.ImportFrom) and at.module == "__future__")


def marked(tree: ast.Module) -> ast.Module:
    """Put the marks into a module's tree."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, name, None), list):
                new: list[ast.stmt] = []
                if isinstance(node, ast.ExceptHandler):
                    new.append(mark(node.lineno, block[0]))
                elif isinstance(node, ast.match_case):
                    new.append(mark(node.pattern.lineno, block[0]))
                for i, statement in enumerate(block):
                    new += [*marks(statement), statement] if may_follow(block, i) else [statement]
                setattr(node, name, new)
    return tree


class Loader(SourceFileLoader):
    """Loads a file with marks, and leaves none of it on the disk."""

    def get_code(self, fullname: str) -> CodeType:
        content = self.get_data(self.path)
        tree = ast.parse(content, self.path)
        lines = ran.setdefault(os.path.realpath(self.path), [False] * (content.count(b"\n") + 2))
        for statement in tree.body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
                lines[statement.lineno] = True  # before which no mark can stand
        return compile(marked(tree), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        code = self.get_code(module.__name__)
        module.__dict__["__lines__"] = ran[os.path.realpath(self.path)]
        exec(code, module.__dict__)


class Finder:
    """Finds minivit where Python does."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "minivit":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Loader(name, spec.loader.path)
        return spec


def _measuring() -> Any:
    """Return the coverage that is being measured in this process, or None."""
    return sys.modules["coverage"].Coverage.current() if "coverage" in sys.modules else None


def begin() -> None:
    """Have minivit's modules marked that are imported from here on, if there is a tracer to be replaced."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        wanted = os.environ.pop(WORKERS, None) is not None  # no child of a test needs it
    else:
        cov = _measuring()
        wanted = (
            cov is not None
            and sys.gettrace() is not None
            and (cov.get_option("run:source"), cov.get_option("run:branch")) == (["minivit"], False)
            and not os.environ.get("MINIVIT_TESTS_TRACED")
        )
        if wanted:
            os.environ[WORKERS] = "1"
    if wanted:
        sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


def stop_tracing() -> None:
    """Stop the tracer, if the modules are marked."""
    global _coverage
    if Finder in sys.meta_path and _coverage is None and (cov := _measuring()) is not None:
        cov.stop()
        _coverage = cov


def hand_over() -> None:
    """Give coverage.py the lines that ran."""
    if _coverage is not None:
        _coverage.get_data().add_lines(
            {file: [number for number, yes in enumerate(lines) if yes] for file, lines in ran.items()}
        )
