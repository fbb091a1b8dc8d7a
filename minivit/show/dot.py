"""A tape in the DOT language of Graphviz: https://graphviz.org/doc/info/lang.html."""

from __future__ import annotations

import math
from collections.abc import Sequence

from minivit.errors import printable
from minivit.show.operations import Operation, runs_of_parts, shape_text
from minivit.show.text import bytes_text


def tape_dot(tape: Sequence[Operation], title: str, about: Sequence[str] = ()) -> str:
    """Return the tape: a node for each operation and for each parameter, a cluster for each part of several."""
    lines = [
        "digraph tape {",
        f"  graph [label={quoted(title, *about)}, labelloc=t, rankdir=TB, fontname=sans]",
        "  node [shape=box, style=rounded, fontname=sans]",
    ]
    weights: dict[str, str] = {}
    for number, run in enumerate(runs_of_parts(tape)):
        indent = "  "
        if len(run) > 1:
            first = tape[run[0]]
            lines += [f"  subgraph cluster_{number} {{", f"    label={quoted(f'{first.part} {first.kind}'.rstrip())}"]
            indent = "    "
        for i in run:
            lines.append(f"{indent}n{i} [label={quoted(*_label(tape[i]))}]")
            for w in tape[i].weights:
                if w.name not in weights:
                    weights[w.name] = f"w{len(weights)}"
                    words = [w.name, shape_text(w.shape), *_gradient(w.gradient)]
                    lines.append(f"{indent}{weights[w.name]} [shape=ellipse, style=solid, label={quoted(*words)}]")
        if len(run) > 1:
            lines.append("  }")
    for i, one in enumerate(tape):
        lines += [f"  n{j} -> n{i}" for j in one.inputs]
        lines += [f"  {weights[w.name]} -> n{i} [style=dashed]" for w in one.weights]
    return "\n".join([*lines, "}"]) + "\n"


def _label(one: Operation) -> list[str]:
    """Return the lines of an operation's label."""
    kept = [f"keeps {bytes_text(one.kept)}"] if one.kept else []
    return [f"{one.place} {one.name}".strip(), f"{shape_text(one.shape)} {one.dtype}", *kept, *_gradient(one.gradient)]


def _gradient(norm: float | None) -> list[str]:
    return [] if norm is None else [f"‖gradient‖ {norm:.3g}" if math.isfinite(norm) else f"‖gradient‖ {norm}"]


def quoted(*lines: str) -> str:
    """Return lines as one quoted string, in which no name can do anything: neither end it, nor stand for another."""
    text = "\\n".join(printable(line).replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return f'"{text}"'
