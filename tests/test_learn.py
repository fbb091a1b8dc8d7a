"""The exercises: every reference solution passes, every listed mistake is named, and by its own name only."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from minivit.backend import Key
from minivit.backend.wire import packed
from minivit.learn.calling import call
from minivit.learn.comparing import named
from minivit.learn.diagnosis import GENERAL
from minivit.learn.exercise import Asked, Exercise
from minivit.learn.ladder import arguments_of, ladder, text_of
from minivit.learn.marking import mark, mark_function

SOLUTIONS = Path(__file__).parent / "solutions"
LADDER = ladder()
FUNCTIONS = [(exercise, asked) for exercise in LADDER for asked in exercise.asked]
MISTAKES = [(exercise, asked, mistake) for exercise, asked in FUNCTIONS for mistake in asked.mistakes]

each_exercise = pytest.mark.parametrize("exercise", LADDER, ids=lambda e: e.slug)
each_function = pytest.mark.parametrize(
    ("exercise", "asked"), FUNCTIONS, ids=[f"{e.slug}-{a.name}" for e, a in FUNCTIONS]
)
BACKWARDS = [(exercise, asked) for exercise, asked in FUNCTIONS if asked.name.endswith("backward")]
each_backward = pytest.mark.parametrize(
    ("exercise", "asked"), BACKWARDS, ids=[f"{e.slug}-{a.name}" for e, a in BACKWARDS]
)
each_mistake = pytest.mark.parametrize(
    ("exercise", "asked", "mistake"), MISTAKES, ids=[f"{e.slug}-{a.name}-{m.name}" for e, a, m in MISTAKES]
)


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location("solution", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def running(module, file: str = ""):
    """Return a Run that calls the functions of ``module`` here, in this process."""
    return lambda name, many, measured: [call(getattr(module, name), args, file, measured) for args in many]


class Answers:
    """Stands for a learner's module: right, but for what is given."""

    def __init__(self, exercise: Exercise, **others) -> None:
        vars(self).update({asked.name: asked.right for asked in exercise.asked} | others)


def marked(asked: Asked, function, exercise: Exercise, key: Key = Key(0)):  # noqa: B008
    run = running(Answers(exercise, **{asked.name: function}))
    return mark_function(asked, arguments_of(exercise)[asked.name], run, key)


# ---- every exercise --------------------------------------------------------------------------------------------------


@each_exercise
def test_a_right_solution_written_otherwise_passes(exercise):
    """The other one of each: test_a_reference_solution_is_right_in_a_process_of_its_own."""
    module = loaded(SOLUTIONS / exercise.file.replace(".py", "_other.py"))
    findings = mark(exercise, arguments_of(exercise), running(module), Key(0))
    assert [(f.function, f.state, f.says) for f in findings] == [(a.name, "right", ()) for a in exercise.asked]


@functools.cache
def remembering(asked: Asked) -> Asked:
    """Return a function that is asked for, with what is right and what mistakes give computed once for each sample."""

    samples = asked.samples(Key(0))
    drawn = {tuple(map(id, args)): packed(args) for _, args in samples}

    def once(gives):
        known: dict[bytes, object] = {}

        def value(*args):
            place = drawn.get(tuple(map(id, args))) or packed(args)
            if place not in known:
                known[place] = gives(*args)
            return known[place]

        return value

    mistakes = tuple(dataclasses.replace(mistake, gives=once(mistake.gives)) for mistake in asked.mistakes)
    return dataclasses.replace(asked, right=once(asked.right), samples=lambda key: samples, mistakes=mistakes)


@each_mistake
def test_a_listed_mistake_is_named(exercise, asked, mistake):
    finding = marked(remembering(asked), mistake.gives, exercise)
    assert (finding.state, finding.mistake, finding.says[0]) == ("wrong", mistake.name, mistake.says)


FEWER_DIGITS = {
    "float32": [lambda x: x.astype(np.float32)],
    "nearly right": [lambda x, off=off: x * (1.0 + off) for off in (1e-11, 1e-8, 1e-5)],
}


@each_function
def test_right_formulas_with_fewer_digits_are_no_mistake_of_another_kind(exercise, asked):
    """Neither one that is listed, which may leave that output as it is, nor a constant factor."""
    asked = remembering(asked)
    for place, output in enumerate(asked.outputs):
        for mistake, changes in FEWER_DIGITS.items():
            for change in changes:
                finding = marked(asked, spoiled(asked, place, change), exercise)
                assert (finding.state, finding.mistake) == ("wrong", mistake), output
                assert finding.says[0].startswith(f"{output} is ")


def spoiled(asked: Asked, place: int, change):
    """Return what is right, with the output at ``place`` changed."""

    def gives(*args):
        right = asked.right(*args)
        if isinstance(right, dict):
            return right | {asked.outputs[place]: change(np.asarray(right[asked.outputs[place]]))}
        outputs = right if isinstance(right, tuple) else (right,)
        outputs = tuple(change(np.asarray(x)) if i == place else x for i, x in enumerate(outputs))
        return outputs if isinstance(right, tuple) else outputs[0]

    return gives


@each_backward
def test_a_backward_is_the_complex_step_of_its_forward(exercise, asked):
    """Im Σ g·forward(x + ih·v) / h = Σ backward(g, x)·v: what marks is itself proven to 1e-12."""
    name = asked.name.removesuffix("_backward").replace("backward", "forward")  # backward of forward, f_backward of f
    forward = next(a for a in exercise.asked if a.name == name)
    named_ones = {key: [n for n in names if n[0] != "*"] for key, names in arguments_of(exercise).items()}
    given, wanted = named_ones[asked.name][1:], named_ones[name]
    # what backward takes beside: what forward returned; after the named arguments those that *args stands for
    of_forward = [given.index(name) for name in wanted]
    for label, (g, *args) in asked.samples(Key(0)):
        gradients = named(asked.outputs, asked.right(g, *args))
        rest = iter(range(len(given), len(args)))
        for output, gradient in gradients.items():
            name = output.removeprefix("d")
            position = given.index(name) if name in given else next(rest)
            x, v = args[position], np.random.default_rng(0).standard_normal(np.shape(args[position]))
            moved = [a.astype(complex) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
            moved[position] = x + 1e-30j * v
            out = forward.right(*(moved[i] for i in of_forward), *moved[len(given) :])
            terms = np.imag(out[0] if isinstance(out, tuple) else out) / 1e-30 * g
            scale = max(np.abs(terms).sum(), np.abs(gradient * v).sum(), 1e-3)
            assert abs(terms.sum() - (gradient * v).sum()) <= 1e-12 * scale, (label, output)


@each_exercise
def test_an_exercise_is_whole(exercise):
    names = [mistake.name for asked in exercise.asked for mistake in asked.mistakes]
    assert len(names) >= 6
    for asked in exercise.asked:
        assert len({mistake.name for mistake in asked.mistakes}) == len(asked.mistakes)
        assert not {mistake.name for mistake in asked.mistakes} & GENERAL.keys()
        assert len({label for label, _ in asked.samples(Key(0))}) == len(asked.samples(Key(0))) >= 3
        assert asked.name in arguments_of(exercise)
    assert len(exercise.hints) == 3
    assert all(hint.strip() and "np." not in hint for hint in exercise.hints)


@each_exercise
def test_no_line_of_a_solution_is_told(exercise):
    told = "\n".join([text_of(exercise), *exercise.hints, *(m.says for a in exercise.asked for m in a.mistakes)])
    for written in ("", "_other"):
        source = (SOLUTIONS / exercise.file.replace(".py", f"{written}.py")).read_text()
        body = [line.strip() for line in source.splitlines() if line.startswith("    ")]
        given = tuple(f"{name}(" for name in exercise.given)  # how these are called, the text may well say
        lines = [line.removeprefix("return ") for line in body if not any(name in line for name in given)]
        assert [line for line in lines if len(line) > 15 and set(line) & set("=*@+") and line in told] == []


@each_exercise
def test_an_untouched_file_is_unwritten(exercise, tmp_path):
    path = tmp_path / exercise.file
    path.write_text(text_of(exercise))
    [finding] = mark(exercise, arguments_of(exercise), running(loaded(path)), Key(0))
    assert (finding.function, finding.state) == (exercise.asked[0].name, "unwritten")
