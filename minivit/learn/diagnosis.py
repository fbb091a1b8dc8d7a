"""Mistakes that can be made in any exercise: signs, factors, orders, sums. They are tried after the listed ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from minivit.autograd.needs import unbroadcast
from minivit.learn.attempt import Attempt
from minivit.learn.comparing import Outputs, agree


def diagnose(attempt: Attempt) -> tuple[str, str, str] | None:
    """Return (output, name, what the learner reads) of the first general mistake that explains a wrong output."""
    for output in attempt.plain or attempt.near:
        for name, check in GENERAL.items():
            if says := check(attempt, output):
                return output, name, says
    return None


def _all(attempt: Attempt, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> bool:
    """Return whether every right answer, changed so, is what came back for the output ``name``."""
    return attempt.fits(name, [change(right[name]) for right in attempt.rights])


def _single(attempt: Attempt, name: str) -> str:
    kinds = {str(attempt.output(i, name).dtype) for i in attempt.readable} - {"float64"}
    if name not in attempt.near or not kinds:
        return ""
    return (
        f"{name} is right, but in {min(kinds)}, to 7 digits or fewer. Exercises are marked in float64: look for "
        "astype, dtype= and arrays made in another precision."
    )


def _zero(attempt: Attempt, name: str) -> str:
    return f"{name} is 0 everywhere: is something added to it?" if _all(attempt, name, np.zeros_like) else ""


def _sign(attempt: Attempt, name: str) -> str:
    return f"{name} has the wrong sign, and is right but for that." if _all(attempt, name, np.negative) else ""


def _transposed(attempt: Attempt, name: str) -> str:
    swapped = lambda x: x.swapaxes(-1, -2) if x.ndim > 1 else x
    return f"{name} is transposed: its last two axes are exchanged." if _all(attempt, name, swapped) else ""


def _flipped(attempt: Attempt, name: str) -> str:
    for axis in (-1, -2):
        if _all(attempt, name, lambda x, axis=axis: np.flip(x, axis) if x.ndim >= -axis else x):  # type: ignore[misc]
            return f"{name} is in reverse order along axis {axis}."
    return ""


def _reordered(attempt: Attempt, name: str) -> str:
    others = [other for other in attempt.asked.outputs if other != name and other in attempt.wrong]
    for other in others:
        if attempt.fits(name, [right[other] for right in attempt.rights]):
            order = ", ".join(attempt.asked.outputs)
            return f"What comes back as {name} is {other}: the order is {order}."
    return ""


def _has_cotangent(attempt: Attempt) -> bool:
    return attempt.arguments[:1] == ("g",) and all(isinstance(args[0], np.ndarray) for _, args in attempt.samples)


def _of_ones(attempt: Attempt, name: str) -> str:
    if not _has_cotangent(attempt):
        return ""
    values = attempt.values_of(lambda g, *args: attempt.asked.right(np.ones_like(g), *args))
    if not attempt.fits(name, _only(values, name)):
        return ""
    return (
        f"{name} does not depend on g: it is right only for a g of ones. g is the gradient that arrives from the loss."
    )


def _only(values: list[Outputs | None], name: str) -> list[np.ndarray | None]:
    return [None if one is None else one[name] for one in values]


def _passed_on(attempt: Attempt, name: str) -> str:
    for k, argument in enumerate(attempt.arguments):
        if attempt.fits(name, [_array(args[k]) if k < len(args) else None for _, args in attempt.samples]):
            return f"{name} is {argument}, as it came in."
    return ""


def _array(value: object) -> np.ndarray | None:
    return value if isinstance(value, np.ndarray) and value.dtype.kind == "f" else None


def _factors(attempt: Attempt, name: str) -> dict[int, float]:
    """Return c of each sample in which what came back is c times what is right, which is not 0; {} if one is not."""
    found: dict[int, float] = {}
    for i in attempt.readable:
        got, right, scale = attempt.output(i, name).astype(np.float64), attempt.rights[i][name], attempt.scales[i][name]
        if got.shape != right.shape or not np.isfinite(got).all():
            return {}
        square = float((right * right).sum())
        factor = float((got * right).sum()) / square if square else 1.0
        if not agree(got, factor * right, scale * max(1.0, abs(factor)), attempt.tolerance):
            return {}
        if np.abs(right).max(initial=0.0) > 1e-9 * scale:  # of what is 0 any multiple is right
            found[i] = factor
    return found


def _scaled(attempt: Attempt, name: str) -> str:
    factors = list(_factors(attempt, name).values())
    if not factors or not np.allclose(factors, factors[0], rtol=1e-9, atol=0.0):
        return ""
    return (
        f"{name} is {factors[0]:.6g} times what it should be, in every sample: a constant factor too many or too few."
    )


LENGTHS = {
    "n": (1.0, "Is there a sum where a mean should be, or √n as a factor where it should divide?"),
    "1/n": (-1.0, "Is there a mean where a sum should be, or is something divided by n that should not be?"),
    "√n": (0.5, "Is a scale of 1/√n missing?"),
    "1/√n": (-0.5, "Is a scale of 1/√n there twice, or 1/n in its place, or is there one that should not be?"),
}
"""A factor of a length: the length's power, and what to ask."""


def _scaled_by_length(attempt: Attempt, name: str) -> str:
    """Find a factor n, 1/n, √n or 1/√n, n the length of an argument's axis."""
    factors = _factors(attempt, name)
    if not factors:
        return ""
    for text, (power, ask) in LENGTHS.items():
        for of, lengths in _lengths(attempt):
            known = [i for i in factors if i in lengths]
            if len(known) < len(factors) or len({lengths[i] for i in known}) < 2:
                continue
            if np.allclose([factors[i] for i in known], [lengths[i] ** power for i in known], rtol=1e-9, atol=0.0):
                return f"{name} is {text} times what it should be, n being {of}. {ask}"
    return ""


def _lengths(attempt: Attempt) -> Iterator[tuple[str, dict[int, int]]]:
    """Yield numbers that a factor may come from: (words, the number in each sample)."""
    for k, argument in enumerate(attempt.arguments):
        shapes = {i: np.shape(args[k]) for i, (_, args) in enumerate(attempt.samples)
                  if k < len(args) and isinstance(args[k], np.ndarray)}  # fmt: skip
        for axis in (-1, -2, -3):
            where = f"the length of axis {axis} of {argument}"
            yield where, {i: shape[axis] if len(shape) >= -axis else 1 for i, shape in shapes.items()}
        yield f"the number of rows of {argument}", {i: int(np.prod(shape[:-1])) for i, shape in shapes.items()}
        yield f"the number of entries of {argument}", {i: int(np.prod(shape)) for i, shape in shapes.items()}


def _not_summed(attempt: Attempt, name: str) -> str:
    """Find an output that is right once it is summed over the axes along which its argument was broadcast."""
    for i in attempt.readable:
        got, right = attempt.output(i, name), attempt.rights[i][name]
        if got.ndim < right.ndim:
            return ""
        stretched = zip(got.shape[::-1], right.shape[::-1], strict=False)
        if not all(a == b or b == 1 for a, b in stretched):
            return ""
        if not agree(unbroadcast(got, right.shape), right, attempt.scales[i][name], attempt.tolerance):
            return ""
    return (
        f"{name} is not summed: what is used once for each row of a batch gets a gradient from each of them, and the "
        "gradient of something has its shape."
    )


def _summed(attempt: Attempt, name: str) -> str:
    """Find an output that is what is right, summed or averaged over an axis that should have stayed."""
    for word, reduced in {"summed": np.sum, "averaged": np.mean}.items():
        for axis in (0, -1, -2, None):
            for keep in (False, True):
                change = lambda x, r=reduced, a=axis, k=keep: _reduced(x, r, a, k)
                if _all(attempt, name, change):
                    return f"{name} is {word} over {_axis(attempt, name, axis)}, which should stay."
    return ""


def _axis(attempt: Attempt, name: str, axis: int | None) -> str:
    """Return words for an axis of an output: the learner may think of another array's."""
    shape = max((one[name].shape for one in attempt.rights), key=len)
    if axis is None or not shape:
        return "all its axes"
    return f"its only axis, of length {shape[0]}" if len(shape) == 1 else f"axis {axis} of its shape {shape}"


def _reduced(x: np.ndarray, reduced: Callable[..., np.ndarray], axis: int | None, keep: bool) -> np.ndarray | None:
    if axis is not None and not -x.ndim <= axis < x.ndim:
        return x  # where there is no such axis, nothing is summed
    return np.asarray(reduced(x, axis=axis, keepdims=keep))


def _extra_axis(attempt: Attempt, name: str) -> str:
    for i in attempt.readable:
        got, right = attempt.output(i, name), attempt.rights[i][name]
        if got.size != right.size or [n for n in got.shape if n > 1] != [n for n in right.shape if n > 1]:
            return ""
        if not agree(got.reshape(right.shape), right, attempt.scales[i][name], attempt.tolerance):
            return ""
    return f"The numbers of {name} are right, but not its shape: an axis of length 1 is too many, or missing."


def _shifted(attempt: Attempt, name: str) -> str:
    """Find an output that is off by the same number everywhere."""
    gaps = []
    for i in attempt.readable:
        got, right = attempt.output(i, name), attempt.rights[i][name]
        if got.shape != right.shape or not got.size or not np.isfinite(got).all():
            return ""
        gaps.append(float((got - right).mean()))
        if not agree(got, right + gaps[-1], attempt.scales[i][name] + abs(gaps[-1]), attempt.tolerance):
            return ""
    if not gaps or not np.allclose(gaps, gaps[0], rtol=1e-9, atol=0.0):
        return ""
    return f"{name} is off by the same number everywhere, in every sample: {gaps[0]:.6g}."


def _not_finite(attempt: Attempt, name: str) -> str:
    """Find an output that is wrong only where it is not a number, or infinite."""
    where = attempt.wrong[name]
    for i in where:
        got, right, scale = attempt.output(i, name), attempt.rights[i][name], attempt.scales[i][name]
        finite = np.isfinite(got)
        if got.shape != right.shape or finite.all():
            return ""
        if not agree(np.where(finite, got, 0.0), np.where(finite, right, 0.0), scale, attempt.tolerance):
            return ""
    labels = "; ".join(attempt.samples[i][0] for i in where)
    places = f"in: {labels}" if len(where) < len(attempt.readable) else "in every sample"
    return (
        f"{name} is right but where it is NaN or infinite, {places}. Does exp overflow there, or is 0 divided by 0, or "
        "infinity taken off infinity?"
    )


def _nearly(attempt: Attempt, name: str) -> str:
    right = [one[name] for one in attempt.rights]
    if not attempt.fits(name, right, 1e-4):
        return ""
    worst = max(
        float(np.abs(attempt.output(i, name) - right[i]).max(initial=0.0)) / (attempt.scales[i][name] or 1.0)
        for i in attempt.readable
    )
    return (
        f"{name} is near, but off by {worst:.0e} of its size where 1e-12 is allowed. So much is left by a difference "
        "quotient, by float32 on the way, by a constant that is only nearly right (eps elsewhere, rounded digits), or "
        "by a small number that is added lest something is 0."
    )


GENERAL: dict[str, Callable[[Attempt, str], str]] = {
    "float32": _single,
    "nearly right": _nearly,
    "not a number": _not_finite,
    "zero": _zero,
    "sign": _sign,
    "transposed": _transposed,
    "outputs in another order": _reordered,
    "an axis of length 1": _extra_axis,
    "not summed": _not_summed,
    "right for ones only": _of_ones,
    "an argument passed on": _passed_on,
    "a constant factor": _scaled,
    "a factor of a length": _scaled_by_length,
    "summed over an axis that stays": _summed,
    "reversed": _flipped,
    "off by a constant": _shifted,
}
"""Name → a function of an attempt and the name of a wrong output: what the learner reads, "" where it does not fit."""
