"""What of a file's arrays does not fit a model: every name, and the nearest one to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from minivit.errors import shortened
from minivit.weights.names import Layout, Sizes, general_name
from minivit.weights.stored import Entry

_LISTED = 200  # names in one message; more are counted
_LONGEST_NAME = 200


def misfits(
    layout: Layout,
    entries: Mapping[str, Entry],
    wanted: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    skip: Sequence[str],
) -> str:
    """Return a line for each name that is missing, misshapen or unexpected, or ""."""
    missing, misshapen, left = [], [], dict(entries)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in wanted.items():
        row = layout.row(name)
        if row is None:
            missing.append((name, name, f"(no place in {layout.name}'s layout)"))
            continue
        for theirs, of in (row.shapes(shape, sizes) or dict.fromkeys(row.theirs, shape)).items():
            expected[theirs] = of
            entry = left.pop(theirs, None)
            if entry is None and general_name(name) in layout.zero:
                continue
            if entry is None:
                missing.append((theirs, name, str(of)))
            elif [n for n in entry.shape if n != 1] != [n for n in of if n != 1]:
                misshapen.append(f"misshapen   {entry.name}: {entry.shape} in the file, {of} in the model's {name}")
    for name in [n for n in left if n.startswith(layout.passed or (" ",)) or not math.prod(left[n].shape)]:
        del left[name]
    for ours in (f"{name}.{kind}" for name in ("head", "head_dist", "pre_logits") for kind in ("weight", "bias")):
        row = layout.row(ours)
        if row is not None and ours.startswith(tuple(skip) or (" ",)):
            left.pop(row.theirs[0], None)
    unexpected = {name: entry for name, entry in left.items() if name not in expected}
    lines = [
        f"missing     {theirs} {what}{_near(theirs, unexpected)}" if theirs == ours
        else f"missing     {theirs} {what}, the model's {ours}{_near(theirs, unexpected)}"
        for theirs, ours, what in missing[:_LISTED]
    ] + misshapen[:_LISTED]  # fmt: skip
    lost = {theirs: None for theirs, _, _ in missing}
    for name, entry in list(unexpected.items())[:_LISTED]:
        words = next((text for part, text in layout.lacking.items() if part in name), "")
        why = f": {words}, which the model has not" if words else _near(name, lost or expected)
        lines.append(f"unexpected  {shortened(entry.name, _LONGEST_NAME)} {entry.shape}{why}")
    beyond = len(missing) + len(misshapen) + len(unexpected) - len(lines)
    return "\n  ".join(lines + ([f"… and {beyond:,} more"] if beyond else []))


def _near(name: str, among: Mapping[str, Any]) -> str:
    """Return the name that is nearest to one, as a message ends."""
    known = [other for other in list(among)[:_LISTED] if len(other) < _LONGEST_NAME]
    near = get_close_matches(name, known, n=1, cutoff=0.6) if len(name) < _LONGEST_NAME else []
    return f"; nearest: {near[0]}" if near else ""
