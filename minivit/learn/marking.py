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

LINES = 12
"""So many lines of what a call printed are shown."""

SHOWN = 24
"""Samples of so many numbers are shown whole, if these have two decimals."""


@dataclass(frozen=True)
class Finding:
    """What marking a function found: ``state`` is "right", "wrong" or "unwritten"; ``mistake`` is a name, or None.

    ``says`` is what the learner reads, a line each; of what is right or not written yet, what it printed.
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
        finding = mark_function(asked, arguments[asked.name], run, key)
        if finding.state == "wrong":
            before = _forward_of(asked, [one.name for one in exercise.asked], arguments)
            finding = (before and _left_behind(asked, before, arguments, run, key)) or finding
        findings.append(finding)
        if findings[-1].state != "right":
            break
    return findings


def mark_function(asked: Asked, arguments: tuple[str, ...], run: Run, key: Key) -> Finding:
    """Mark one function: its values on all samples, then its manners, then its memory."""
    samples = asked.samples(key)
    outcomes = run(asked.name, [args for _, args in samples], False)
    if outcome := next((outcome for outcome in outcomes if outcome.unwritten), None):
        return Finding(asked.name, "unwritten", None, printed(outcome))
    attempt = Attempt(asked, arguments, samples, outcomes)
    finding = (
        wrong_values(attempt)
        or _changed_arguments(attempt)
        or _repeated(attempt, run, key)
        or _over_limit(asked, run, key)
    )
    spoke = next((outcome for outcome in outcomes if outcome.printed), Outcome())
    return finding or Finding(asked.name, "right", None, printed(spoke))


def wrong_values(attempt: Attempt) -> Finding | None:
    """Find the mistake: a listed one, or what comes first in the order of the samples, a stop or a wrong value."""
    if found := attempt.mistakes():
        return _listed(attempt, found)
    function, everywhere = attempt.asked.name, range(len(attempt.samples))
    stop = next((i for i in everywhere if i not in attempt.readable), None)
    first = min((i for places in attempt.wrong.values() for i in places), default=None)
    if stop is not None and (first is None or stop < first):
        return _stop(attempt, stop)
    if first is None:
        return None
    if general := diagnose(attempt):
        output, name, says = general
        return Finding(function, "wrong", name, (says, *_entry(attempt, output), *_others(attempt, output)))
    output = (attempt.plain or attempt.near)[0]
    others = (*_row_sums(attempt, output), *_where_right(attempt, output), *_others(attempt, output))
    return Finding(function, "wrong", None, (*_entry(attempt, output), *others))


def _stop(attempt: Attempt, i: int) -> Finding:
    """Say why there is nothing to compare in sample ``i``."""
    got, outcome, function = attempt.got[i], attempt.outcomes[i], attempt.asked.name
    right = [attempt.samples[k][0] for k in attempt.readable if all(k not in at for at in attempt.wrong.values())]
    after = (_sample(attempt, i), *([f"Right in: {'; '.join(right)}."] if right else []), *printed(outcome))
    if isinstance(got, Unreadable):
        return Finding(function, "wrong", got.name, (_sentence(got.says), *after))
    return Finding(function, "wrong", outcome.name or "stopped", (*stopped(outcome), *after))


def _forward_of(asked: Asked, functions: list[str], arguments: dict[str, tuple[str, ...]]) -> str:
    """Return the name of the last function before that takes no more than this one is given, or ""."""
    before = functions[: functions.index(asked.name)]
    return next((name for name in reversed(before) if set(arguments[name]) <= set(arguments[asked.name])), "")


def _left_behind(
    asked: Asked, forward: str, arguments: dict[str, tuple[str, ...]], run: Run, key: Key
) -> Finding | None:
    """Find a backward that is right only after a forward of the same arguments."""
    names, samples, outcomes = arguments[asked.name], asked.samples(key), []
    named = [name for name in names if not name.startswith("*")]
    for _, args in samples:
        given = dict(zip(named, args, strict=False))
        run(forward, [(*(given[n] for n in arguments[forward] if n in given), *args[len(named) :])], False)
        outcomes += run(asked.name, [args], False)
        if outcomes[-1].stopped:
            return None
    attempt = Attempt(asked, names, samples, outcomes)
    if attempt.wrong or len(attempt.readable) < len(samples):
        return None
    says = (
        f"{asked.name} is right only when {forward} has been called with the same arguments just before: it uses what "
        f"an earlier call left behind. It is called by itself: compute again in it what you need of {forward}.",
    )
    return Finding(asked.name, "wrong", "left behind by another call", says)


def _listed(attempt: Attempt, found: list[tuple[Mistake, list[str], bool]]) -> Finding:
    """Name the listed mistakes: the first output's, and of several that give the same there, all.

    If a mistake spoils other outputs, too, which are not as it makes them, the output is named with it.
    """
    output = next(name for name in attempt.plain if any(name in names for _, names, _ in found))
    most = max(len(names) for _, names, _ in found if output in names)  # what explains more comes first
    those = [(mistake, whole) for mistake, names, whole in found if output in names and len(names) == most]
    said = lambda text, whole: text if whole or text.startswith(output) else f"In {output}: {text}"
    says = [said(mistake.says, whole) for mistake, whole in those]
    if len(those) > 1:
        says = [f"Either: {says[0]}", *(f"Or: {text}" for text in says[1:])]
    name = " or ".join(mistake.name for mistake, _ in those)
    return Finding(attempt.asked.name, "wrong", name, (*says, *_entry(attempt, output), *_others(attempt, output)))


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


def printed(outcome: Outcome) -> tuple[str, ...]:
    """Return the beginning of what a call printed."""
    lines = outcome.printed.rstrip().splitlines()
    shown = [f"  {shortened(line, 100)}" for line in lines[:LINES]]
    return ("It printed:", *shown, *(["  …"] if len(lines) > LINES else [])) if lines else ()


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
    after = (_sample(attempt, i), *printed(attempt.outcomes[i]))
    if got.shape != right.shape:
        return (f"{output} has shape {got.shape}, and should have {right.shape}.", *after)
    place = worst_entry(got, right)
    where = f"{output}[{', '.join(map(str, place))}]" if place else output
    value, wanted = _apart(float(got[place]), float(right[place]))
    said = attempt.outcomes[i].warned
    warned = [f"NumPy warned first of: {said}."] if said and not np.isfinite(got).all() else []
    return (f"{where} is {value}, and should be {wanted}.", *warned, *after)


def _apart(a: float, b: float) -> tuple[str, str]:
    """Return two numbers in 12 digits, or in two more than it takes to tell them apart."""
    tell = next((digits for digits in range(1, 17) if f"{a:.{digits}g}" != f"{b:.{digits}g}"), 17)
    digits = min(max(12, tell + 2), 17)
    return f"{a:.{digits}g}", f"{b:.{digits}g}"


def _row_sums(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say what rows add up to, if in every sample those of what is right add up to 0: a property to look for."""
    i = attempt.wrong[output][0]
    got, scale = attempt.output(i, output), attempt.scales[i][output]
    if not got.ndim or got.shape != attempt.rights[i][output].shape or not np.isfinite(got).all():
        return ()
    zero = all(np.abs(one[output].sum(axis=-1)).max(initial=0.0) < 1e-9 * of[output]
               for one, of in zip(attempt.rights, attempt.scales, strict=True))  # fmt: skip
    sums = np.atleast_1d(got.sum(axis=-1)).ravel()
    if not zero or np.abs(sums).max(initial=0.0) < 1e-9 * scale:
        return ()
    shown = ", ".join(f"{x:.3g}" for x in sums[:3]) + (", …" if sums.size > 3 else "")
    return (f"Every row of {output} should add up to 0, along the last axis; here they add up to {shown}.",)


def _where_right(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say in which samples the output is right, if there are any."""
    told = lambda i: bool((np.abs(attempt.rights[i][output]) > 1e-9 * attempt.scales[i][output]).any())  # not 0
    right = [attempt.samples[i][0] for i in attempt.readable if i not in attempt.wrong[output] and told(i)]
    return (f"{output} is right in: {'; '.join(right)}.",) if right else ()


def _others(attempt: Attempt, output: str) -> tuple[str, ...]:
    """Say which other outputs are wrong, and which right: how far back to look; and what else is amiss."""
    others = [name for name in attempt.asked.outputs if name != output]
    stops = [attempt.samples[i][0] for i in range(len(attempt.samples)) if i not in attempt.readable]
    lines = {
        "Wrong, too": [name for name in others if name in attempt.wrong],
        "Right": [name for name in others if name not in attempt.wrong],
        "It stops, too, in": stops,
        "The call changes, too, its argument": _changed(attempt),
    }
    return tuple(f"{title}: {'; '.join(found) if found is stops else ', '.join(found)}."
                 for title, found in lines.items() if found)  # fmt: skip


def _changed(attempt: Attempt) -> list[str]:
    """Return the names of arguments that calls have written into."""
    return [_argument(attempt, i) for i in sorted({i for outcome in attempt.outcomes for i in outcome.changed})]
