"""What a model makes of each class, as HTML: the confusion matrix, and a table of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivit.show.markup import escape, short, table
from minivit.show.pictures import MOST_NAMED
from minivit.show.style import SHADES

PAIRS = 20  # of classes that are confused most often


def confusion_table(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return the confusion matrix, or of very many classes the pairs that are confused most often."""
    totals = np.maximum(counts.sum(axis=1), 1)  # (K,)
    if len(names) <= MOST_NAMED:
        head = "".join(f'<th scope="col">{short(name, 16)}</th>' for name in names)
        rows = [
            f'<tr><th scope="row">{short(names[i], 16)}</th>'
            + "".join(_cell(n, n / totals[i], i == j, f"{names[i]} read as {names[j]}") for j, n in enumerate(row))
            + "</tr>\n"
            for i, row in enumerate(counts.tolist())
        ]
        remark = "Label by row, prediction by column. Colour: the share of the row, for mistakes by its square root."
        cells = f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>{''.join(rows)}</tbody>"
        return f'<p>{remark}</p>\n<div class="wide"><table class="confusion">{cells}</table></div>'
    wrong = counts * (1 - np.eye(len(counts), dtype=np.int64))  # (K, K)
    worst = [divmod(int(k), len(names)) for k in np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]]
    pairs = [
        [short(names[i]), short(names[j]), f"{wrong[i, j]:,}", f"{wrong[i, j] / totals[i]:.1%}"]
        for i, j in worst
        if wrong[i, j]
    ]
    remark = f"The most frequent mistakes among {len(names):,} classes."
    return f"<p>{remark}</p>" + table(["label", "read as", "times", "share of its images"], pairs, numbers=(2, 3))


def _cell(count: int, share: float, right: bool, what: str) -> str:
    if not count:
        return '<td class="none">·</td>'
    shade = max(1, round(SHADES * (share if right else share**0.5)))
    return f'<td class="{"hit" if right else "miss"}{shade}" title="{escape(what)}: {share:.1%}">{count}</td>'


def class_table(counts: np.ndarray, names: Sequence[str]) -> str:
    """Return a table of the classes that there are images of; of very many, the worst first and most of it folded."""
    totals, rights = counts.sum(axis=1), counts.diagonal()  # (K,)
    shares = rights / np.maximum(totals, 1)
    order = [i for i in range(len(names)) if totals[i]]
    if len(names) > MOST_NAMED:
        order.sort(key=lambda i: shares[i])
    rows = [
        [short(names[i]), f"{totals[i]:,}", f"{shares[i]:.1%}", _bar(shares[i]), _mistaken(counts[i], i, names)]
        for i in order
    ]
    head = ["class", "images", "right", "", "most often mistaken for"]
    found = table(head, rows[:MOST_NAMED], numbers=(1, 2))
    if rest := rows[MOST_NAMED:]:
        found += f"<details><summary>{len(rest):,} more classes</summary>{table(head, rest, numbers=(1, 2))}</details>"
    return found


def _bar(share: float) -> str:
    rect = '<rect width="100" height="10"/>'
    full = f'<rect class="full" width="{100 * share:.1f}" height="10"/>'
    return f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{rect}{full}</svg>'


def _mistaken(row: np.ndarray, own: int, names: Sequence[str]) -> str:
    others = np.where(np.arange(len(row)) == own, 0, row)  # (K,)
    other = int(others.argmax())
    return f"{short(names[other])} ({others[other]:,})" if others[other] else ""
