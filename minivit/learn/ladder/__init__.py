"""The exercises: ``eNN_slug.py`` holds ``EXERCISE``, and ``texts/NN_slug.py`` is the file that the learner gets."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from functools import cache
from importlib import import_module, resources

from minivit.learn.exercise import Exercise


def modules() -> list[str]:
    """Return the names of the exercises' modules, in the order of the ladder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def ladder() -> tuple[Exercise, ...]:
    """Return all exercises, in order."""
    return tuple(import_module(f"{__name__}.{name}").EXERCISE for name in modules())


def text_of(exercise: Exercise) -> str:
    """Return the file that the learner gets."""
    return (resources.files("minivit.learn") / "texts" / exercise.file).read_text(encoding="utf-8")


def arguments_of(exercise: Exercise) -> dict[str, tuple[str, ...]]:
    """Return the names of the arguments of the functions in the learner's file; ``*names`` keep their star."""
    functions = [node for node in ast.parse(text_of(exercise)).body if isinstance(node, ast.FunctionDef)]
    return {function.name: tuple(_names(function.args)) for function in functions}


def _names(arguments: ast.arguments) -> Iterator[str]:
    yield from (argument.arg for argument in arguments.args)
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}"
