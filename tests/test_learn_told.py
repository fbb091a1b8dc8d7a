"""What a learner is told first: digits before mistakes, an early sample before a late one, nothing that misleads."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest

from minivit.backend import Key
from minivit.learn.child import Child
from minivit.learn.ladder import arguments_of, ladder, text_of
from minivit.learn.marking import mark
from tests.test_learn import Answers, marked, remembering, running, spoiled
from tests.test_learn_check import LAST, RIGHT, SOFTMAX, said
from tests.test_learn_check import marked as marked_file

LADDER = {exercise.slug: exercise for exercise in ladder()}


def asked_of(slug: str, name: str = "backward"):
    return next(asked for asked in LADDER[slug].asked if asked.name == name)


def told(slug: str, gives, name: str = "backward"):
    return marked(remembering(asked_of(slug, name)), gives, LADDER[slug])


def outputs_of(slug: str, change, name: str = "backward"):
    """Return the finding on outputs that are changed together."""
    asked = asked_of(slug, name)
    return told(slug, lambda *args: change(*asked.right(*args), *args), name)


# ---- which mistake ---------------------------------------------------------------------------------------------------


def test_a_mistake_is_named_beside_an_output_of_fewer_digits():
    finding = outputs_of("linear", lambda dx, dweight, dbias, *_: (dx.astype(np.float32), dweight.T, dbias))
    assert finding.mistake == "dweight transposed"
    assert {"Wrong, too: dx.", "Right: dbias."} <= set(finding.says)


def test_single_precision_is_told_where_it_is_coarse():
    """Scores near 800 have 4 digits behind the point in float32, and so have what comes of them."""
    asked = asked_of("attention", "forward")

    def single(*args):
        q, k, v = (np.asarray(x, np.float32) for x in args)
        s = q @ k.swapaxes(-1, -2) / np.float32(math.sqrt(q.shape[-1]))
        e = np.exp(s - s.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True) @ v

    assert single(*asked.samples(Key(0))[0][1]).dtype == np.float32
    assert told("attention", single, "forward").mistake == "float32"


@pytest.mark.parametrize("slug", ["attention", "blockwise"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_mistake_of_two_outputs_is_not_named_for_one(slug, place):
    """dq and dk without 1/√d is a mistake in the list; if one of them is right, who obeys it breaks that one."""
    root = lambda args: math.sqrt(args[1].shape[-1])
    change = lambda *d_and_args: tuple(
        d * root(d_and_args[3:]) if i == place else d for i, d in enumerate(d_and_args[:3])
    )
    finding = outputs_of(slug, change)
    assert finding.mistake == "a factor of a length"
    assert finding.says[0].startswith(f"{('dq', 'dk')[place]} is √n times") and "1/√n" in finding.says[0]
    assert any(line.startswith("Right: ") for line in finding.says)


def test_no_mistake_is_named_for_an_output_that_it_leaves_as_it_is():
    asked = remembering(asked_of("linear"))
    rng = np.random.default_rng(0)
    finding = marked(asked, spoiled(asked, 0, lambda x: x + rng.standard_normal(x.shape)), LADDER["linear"])
    assert finding.mistake is None and finding.says[0].startswith("dx[")


# ---- what comes first ------------------------------------------------------------------------------------------------


def test_the_first_sample_is_told_even_if_a_later_one_stops():
    def forward(logits, labels, smoothing):
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -logs[:, labels].mean()  # IndexError without leading axis; columns for entries before

    finding = told("cross_entropy", forward, "forward")
    assert finding.says[0].startswith("loss is ") and "two rows, three classes" in finding.says[1]
    assert any(line.startswith("It stops, too, in: no leading axis") for line in finding.says)


def test_what_is_right_is_told_beside_a_stop():
    finding = told("softmax", lambda x: asked_of("softmax", "forward").right(x) if x.ndim < 3 else 1 / 0, "forward")
    assert finding.mistake == "stopped" and "ZeroDivisionError" in finding.says[0]
    assert any(line.startswith("Right in: two rows of three; ") for line in finding.says)


def test_numbers_are_shown_to_the_digit_in_which_they_differ():
    right = asked_of("cross_entropy", "forward").right
    finding = told("cross_entropy", lambda *args: right(*args) * (1.0 + 3e-12), "forward")
    got, wanted = (text.split(" is ")[-1] for text in finding.says[1].removesuffix(".").split(", and should be "))
    assert float(got) / float(wanted) - 1.0 == pytest.approx(3e-12, rel=0.1)


def test_a_sample_whose_answer_is_0_is_not_called_right():
    right = asked_of("softmax").right
    finding = told("softmax", lambda g, x: right(g, x) * (1.0 + np.sin(7.0 * g)))
    assert not any("rows of one number" in line for line in finding.says if " is right in: " in line)


def test_what_rows_add_up_to_is_told():
    finding = told("softmax", lambda g, x: np.sin(g) * np.exp(np.sin(x)))
    [line] = [line for line in finding.says if "add up to" in line]
    assert line.startswith("Every row of dx should add up to 0, along the last axis; here they add up to ")


# ---- what a file leaves behind, prints, and imports ------------------------------------------------------------------


def test_what_forward_left_behind_is_found():
    exercise, kept = LADDER["chain"], {}

    def forward(x, w, b):
        kept["all"] = x, w, b
        return exercise.asked[0].right(x, w, b)

    answers = Answers(exercise, forward=forward, backward=lambda g, *_: exercise.asked[1].right(g, *kept["all"]))
    [_, finding] = mark(exercise, arguments_of(exercise), running(answers), Key(0))
    assert finding.mistake == "left behind by another call"
    assert "backward is right only when forward has been called" in finding.says[0]


def test_prints_are_shown_whatever_the_mark(here, capsys):
    Path("03_softmax.py").write_text(f"print('hello')\n{RIGHT}")
    code, text = said(capsys, "check", "03_softmax.py")
    assert code == 0 and "It printed:\n    hello" in text
    Path("03_softmax.py").write_text(RIGHT.replace(LAST, "    print('x is', x)\n    return 2 * e"))
    code, text = said(capsys, "check", "03_softmax.py")
    assert code == 1 and "    x is [[" in text
    Path("03_softmax.py").write_text("print('hello')\n1 / 0\n")
    assert "    hello" in said(capsys, "check", "03_softmax.py")[1]


def test_the_line_that_numpy_warned_of_is_told(tmp_path):
    mark = marked_file(tmp_path, RIGHT.replace("x - x.max(axis=-1, keepdims=True)", "x"))
    assert mark.finding.mistake == "overflow"
    assert "NumPy warned first of: overflow, in line 4: e = np.exp(x)." in mark.finding.says


def test_numpy_may_load_late_what_it_needs(tmp_path):
    more = "from numpy import *\nimport numpy.testing\nnumpy.testing.assert_allclose(1.0, 1.0)\n"
    assert marked_file(tmp_path, more + RIGHT).passed
    on_behalf = "import importlib\nimportlib.import_module('torch')\n"
    assert marked_file(tmp_path, on_behalf + RIGHT).finding.mistake == "not plain NumPy"


def test_a_function_that_uses_up_the_time_of_the_others_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("minivit.learn.child.TOTAL", 0.3)
    (tmp_path / "f.py").write_text("import time\ndef slow():\n    time.sleep(0.2)\ndef quick():\n    return 1\n")
    with Child(tmp_path / "f.py") as child:
        child.load()
        child.run("slow", [(), ()])
        [outcome] = child.run("quick", [()])
    assert outcome.name == "too slow" and "the calls of slow took" in outcome.fault


# ---- the command -----------------------------------------------------------------------------------------------------


def test_files_in_a_folder_within_are_pointed_to(here, capsys):
    said(capsys, "start", "learn", "3")
    for words in (("check",), ("check", "."), ("check", ".", "3")):
        code, text = said(capsys, *words)
        assert code == 1 and "minivit learn check learn" in text and "start" not in text
    assert "minivit learn check learn 3" in said(capsys, "check", ".", "3")[1]
    assert "minivit learn check learn marks" in said(capsys, "check", "learn/nothing.py")[1]
    assert "minivit learn start . 4" in said(capsys, "check", ".", "4")[1]


def test_what_is_not_meant_is_refused(here, capsys):
    Path("03_softmax.py").write_text(RIGHT)
    code, text = said(capsys, "check", "03_softmax.py", "5")
    assert code == 1 and "is the file of exercise 3, not of 5" in text
    code, text = said(capsys, "start", "3")
    assert code == 1 and "minivit learn start learn 3" in text and not Path("3").exists()
    assert "hint 10 2, and hint 10 3" in said(capsys, "hint", "10", "4")[1]


def test_a_file_that_cannot_be_read_stops_none_of_the_others(here, capsys):
    os.mkdir("01_chain.py")
    os.symlink("nowhere", "02_linear.py")
    Path("03_softmax.py").write_text(RIGHT)
    code, text = said(capsys, "check", ".")
    assert code == 1 and text.startswith("solved: 3") and "not a regular file" in text
    assert "1 of 15 solved" in said(capsys, ".")[1]
    assert "03_softmax.py" in said(capsys, "start", ".", "3")[1]


def test_an_untouched_file_is_to_be_opened(here, capsys):
    Path("03_softmax.py").write_text(text_of(SOFTMAX))
    assert said(capsys, "check", "3")[1].splitlines()[-2:] == [
        "Open 03_softmax.py.",
        "Then:   minivit learn check 03_softmax.py",
    ]
