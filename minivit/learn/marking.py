"""Marks what a learner wrote: right, or which mistake it is, or which entry is wrong and what it should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.backend import Key
from minivit.errors import shortened
from minivit.learn.attempt import Attempt
from minivit.learn.calling import Outcome, same
from minivit.learn.comparing import Unreadable, worst_entry
from minivit.learn.diagnosis import diagnose
from minivit.learn.exercise import Asked, Exercise, Mistake

Run = Callable[[str, Sequence[tuple[Any, ...]], bool], list[Outcome]]
"""Calls a learner's function, by its name, with each of some arguments; True asks for the peak of its memory."""

SHOWN = 24
"""Samples of so many numbers are shown whole, if these have two decimals."""


@dataclass(frozen=True)
class Finding:
    """What marking a function found: ``state`` is "right", "wrong" or "unwritten"; ``mistake`` is a name, or None.

    ``says`` is what the learner reads, a line each.
    """

    function: str
    state: str
    mistake: str | None = None
    says: tuple[str, ...] = ()


def mark(exercise: Exercise, arguments: dict[str, tuple[str, ...]], run: Run, key: Key) -> list[Finding]:
    """Mark the functions of an exercise in order, as far as the first that is not right.

    ``arguments`` has the names of each function's arguments, ``run`` calls the learner's, ``key`` draws the samples.
    """
    findings: list[Finding] = []
    for asked in exercise.asked:
        findings.append(mark_function(asked, arguments[asked.name], run, key))
        if findings[-1].state != "right":
            break
    return findings


def mark_function(asked: Asked, arguments: tuple[str, ...], run: Run, key: Key) -> Finding:
    """Mark one function: its values on all samples, then its manners, then its memory."""
    samples = asked.samples(key)
    outcomes = run(asked.name, [args for _, args in samples], False)
    if any(outcome.unwritten for outcome in outcomes):
        return Finding(asked.name, "unwritten")
    attempt = Attempt(asked, arguments, samples, outcomes)
    finding = (
        wrong_values(attempt)
        or _changed_arguments(attempt)
        or _repeated(attempt, run, key)
        or _over_limit(asked, run, key)
    )
    return finding or Finding(asked.name, "right")


def wrong_values(attempt: Attempt) -> Finding | None:
    """Find the mistake: a listed one, what cannot be read, what stopped a call, a general one, or just an entry."""
    function, wrong = attempt.asked.name, bool(attempt.wrong)
    found = attempt.mistakes() if wrong else []
    if found:
        return _listed(attempt, found)
    for i, got in enumerate(attempt.got):
        if isinstance(got, Unreadable):
            return Finding(function, "wrong", got.name, (_sentence(got.says), _sample(attempt, i)))
    for i, outcome in enumerate(attempt.outcomes):
        if outcome.stopped:
            return Finding(
                function,
                "wrong",
                outcome.name or "stopped",
                (*stopped(outcome), _sample(attempt, i), *_printed(outcome)),
            )
    if not wrong:
        return None
    if general := diagnose(attempt):
        name, says = general
        output = next(iter(attempt.wrong))
        return Finding(function, "wrong", name, (says, *_entry(attempt, output), *_other_outputs(attempt, output)))
    output = next(iter(attempt.wrong))
    others = (*_where_right(attempt, output), *_other_outputs(attempt, output))
    return Finding(function, "wrong", None, (*_entry(attempt, output), *others))


def _listed(attempt: Attempt, found: list[tuple[Mistake, list[str], bool]]) -> Finding:
    """Name the listed mistakes: the first output's, and of several that give the same there, all.

    If a mistake spoils other outputs, too, which are not as it makes them, the output is named with it.
    """
    output = next(name for name in attempt.wrong if any(name in names for _, names, _ in found))
    most = max(len(names) for _, names, _ in found if output in names)  # what explains more comes first
    those = [(mistake, whole) for mistake, names, whole in found if output in names and len(names) == most]
    said = lambda text, whole: text if whole or text.startswith(output) else f"In {output}: {text}"
    says = [said(mistake.says, whole) for mistake, whole in those]
    if len(those) > 1:
        says = [f"Either: {says[0]}", *(f"Or: {text}" for text in says[1:])]
    name = " or ".join(mistake.name for mistake, _ in those)
    return Finding(
        attempt.asked.name, "wrong", name, (*says, *_entry(attempt, output), *_other_outputs(attempt, output))
    )


def _changed_arguments(attempt: Attempt) -> Finding | None:
    """Find arguments that are written into, though the values are right."""
    for name in _changed(attempt):
        says = (
            f"The values are right, but the call changes its argument {name}: whoever calls it needs {name} again. "
            f"Look for {name} +=, -=, *=, /=, [...] = and out=, and for names that stand for {name} or a part of it."
        )
        return Finding(attempt.asked.name, "wrong", "an argument changed", (says,))
    return None


def _repeated(attempt: Attempt, run: Run, key: Key) -> Finding | None:
    """Find a function that gives something else when it is called again, in another order, or gives the same array."""
    others = [args for _, args in attempt.asked.samples(key.child(1))]  # other numbers, mostly in the same shapes
    repeated = [args for _, args in reversed(attempt.samples)]
    again = run(attempt.asked.name, repeated + others, False)[: len(repeated)]
    for i, (first, second) in enumerate(zip(attempt.outcomes, reversed(again), strict=True)):
        if second.overwritten:
            says = (
                "The values are right, but a later call overwrites what this one returned: an array that outlives the "
                "call is returned. Make a new one in each call.",
                _sample(attempt, i),
            )
            return Finding(attempt.asked.name, "wrong", "result overwritten", says)
        if second.stopped or not same(first.value, second.value):
            says = (
                "It gives something else when it is called again with the same arguments: something is kept from one "
                "call to the next, or drawn at random.",
                _sample(attempt, i),
            )
            return Finding(attempt.asked.name, "wrong", "not repeatable", says)
    return None


def _over_limit(asked: Asked, run: Run, key: Key) -> Finding | None:
    """Find a function that needs more memory than the exercise allows."""
    if asked.limit is None:
        return None
    label, args = asked.limit.sample(key)
    [outcome] = run(asked.name, [args], True)
    if outcome.stopped:
        return Finding(
            asked.name, "wrong", asked.limit.name, (asked.limit.says, *stopped(outcome), f"Sample: {label}.")
        )
    if outcome.peak <= asked.limit.peak:
        return None
    took = f"It took {outcome.peak / 1e6:.1f} MB, where {asked.limit.peak / 1e6:.1f} MB are allowed. Sample: {label}."
    return Finding(asked.name, "wrong", asked.limit.name, (asked.limit.says, took))


# ---- words -----------------------------------------------------------------------------------------------------------


def _sentence(text: str) -> str:
    text = f"{text[0].upper()}{text[1:]}" if text.startswith(("it ", "this ", "the ")) else text
    return text if text.endswith((".", "?")) else f"{text}."


def stopped(outcome: Outcome) -> tuple[str, ...]:
    """Say what stopped a call, and where."""
    what = outcome.fault or "it raises NotImplementedError"
    return (_sentence(what), f"In {outcome.line}") if outcome.line else (_sentence(what),)


def _printed(outcome: Outcome) -> tuple[str, ...]:
    lines = [shortened(line, 100) for line in outcome.printed.rstrip().splitlines()[:12]]
    return ("It printed:", *(f"  {line}" for line in lines)) if lines else ()


def _argument(attempt: Attempt, position: int) -> str:
    names = attempt.arguments
    if names and names[-1].startswith("*") and position >= len(names) - 1:  # *blocks
        return f"{names[-1][1:]}[{position - len(names) + 1}]"
    return names[position] if position < len(names) else f"number {position + 1}"


def _sample(attempt: Attempt, i: int) -> str:
    """Return the sample's label and its arguments' shapes; of a small one the arguments, to be copied."""
    label, args = attempt.samples[i]
    if (
        all(isinstance(x, np.ndarray | float | int) for x in args)
        and sum(map(np.size, args)) <= SHOWN
        and all(np.array_equal(np.round(x, 2), x) for x in args)
    ):
        values = [f"    {_argument(attempt, k)} = {_source(x)}" for k, x in enumerate(args)]
        return "\n".join([f"Sample: {label}.", *values])
    shown = [f"{_argument(attempt, k)} {_shape(x)}" for k, x in enumerate(args)]
    return f"Sample: {label}; {', '.join(shown)}."


def _source(value: Any) -> str:
    """Return Python for a number or a small array."""
    if isinstance(value, np.ndarray):
        return f"np.array({value.tolist()})" if value.ndim else repr(value.item())
    return repr(value)


def _shape(value: Any) -> str:
    if isinstance(value, np.ndarray) and (value.ndim or value.dtype.kind not in "fiu"):
        return str(value.shape)
    if isinstance(value, np.ndarray):
        return f"= {value.item():.6g}"
    if isinstance(value, dict | list | tuple):
        return f"({type(value).__name__} of {len(value)})"
    return f"= {value!r}"


def _entry(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say which entry is farthest off, in the first sample where the output is wrong."""
    i = attempt.wrong[output][0]
    got, right = attempt.output(i, output), attempt.rights[i][output]
    if got.shape != right.shape:
        return (f"{output} has shape {got.shape}, and should have {right.shape}.", _sample(attempt, i))
    place = worst_entry(got, right)
    where = f"{output}[{', '.join(map(str, place))}]" if place else output
    value = f"{where} is {got[place]:.12g}, and should be {right[place]:.12g}."
    return (value, _sample(attempt, i), *_printed(attempt.outcomes[i]))


def _where_right(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say in which samples the output is right, if there are any."""
    right = [attempt.samples[i][0] for i in attempt.readable if i not in attempt.wrong[output]]
    return (f"{output} is right in: {'; '.join(right)}.",) if right else ()


def _other_outputs(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say which other outputs are wrong, and which right: how far back to look; and which arguments are changed."""
    others = [name for name in attempt.asked.outputs if name != output]
    wrong = [name for name in others if name in attempt.wrong]
    right = [name for name in others if name not in attempt.wrong]
    lines = {"Wrong, too": wrong, "Right": right, "The call changes, too, its argument": _changed(attempt)}
    return tuple(f"{title}: {', '.join(names)}." for title, names in lines.items() if names)


def _changed(attempt: Attempt) -> list[str]:
    """Return the names of arguments that calls have written into."""
    return [_argument(attempt, i) for i in sorted({i for outcome in attempt.outcomes for i in outcome.changed})]
