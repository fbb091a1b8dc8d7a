"""``minivit learn`` as learners meet it: their files, hostile ones too, the commands, and mistakes of any exercise."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from minivit.backend import Key
from minivit.backend.wire import Thing, packed, unpacked
from minivit.cli.main import main
from minivit.learn.calling import Outcome
from minivit.learn.child import Child, _outcome
from minivit.learn.ladder import ladder, text_of
from minivit.learn.marking import mark, mark_function
from minivit.learn.workbook import mark_file
from tests.test_learn import Answers, arguments_of, remembering, running

LADDER = {exercise.slug: exercise for exercise in ladder()}
SOFTMAX = LADDER["softmax"]
SOLUTIONS = Path(__file__).parent / "solutions"

RIGHT = """
import numpy as np
def forward(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
def backward(g, x):
    p = forward(x)
    return p * (g - (g * p).sum(axis=-1, keepdims=True))
"""

LAST = "    return e / e.sum(axis=-1, keepdims=True)"


def marked(tmp_path: Path, source: str, exercise=SOFTMAX):
    path = tmp_path / exercise.file
    path.write_text(source)
    return mark_file(exercise, path)


# ---- whatever the file does ------------------------------------------------------------------------------------------

FORWARD_ONLY = "import numpy as np, os, sys\n{before}\ndef forward(x):\n    {body}\ndef backward(g, x):\n    return g\n"

HOSTILE = {
    "an endless loop": ("while True: pass", "no end", "had not come to an end"),
    "a loop that catches everything": (
        "\n    while 1:\n        try:\n            while 1: pass\n        except BaseException: pass", "no end", "",
    ),
    "exit": ("sys.exit(0)", "ends the program", "In line 4: sys.exit(0)"),
    "a hard exit": ("os._exit(0)", "ends the program", ""),
    "a signal": ("os.kill(os.getpid(), 9)", "crash", "SIGKILL"),
    "a crash": ("import ctypes; ctypes.string_at(0)", "crash", "SIGSEGV"),
    "recursion": ("return forward(x)", "no end", "calls itself"),
    "deep recursion": ("sys.setrecursionlimit(10**9); return next(map(forward, [x]))", "", ""),
    "memory": ("return np.ones((1 << 20, 1 << 15))", "too much memory", "256. GiB"),
    "a large result": ("return np.zeros((2900, 2900)) if x.size == 6 else x", "not an array", "an array of 67 MB"),
    "a flood of prints": ("\n    for i in range(10**4): print(i)\n    return x.tolist()", "not an array", "a list"),
    "an error that cannot be shown": (
        "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()", "stopped", "Odd",
    ),
    "a colour in an error": ("raise ValueError('\\x1b[31mred')", "stopped", "red"),
    "objects": ("return np.array([None, x], dtype=object)", "not an array", "array of object"),
    "lists in lists": ("\n    for _ in range(10**4): x = [x]\n    return x", "not an array", "a list"),
    "an array that lies": (
        "return type('A', (np.ndarray,), {'tobytes': lambda self: b''})(x.shape)", "", "",
    ),
    "minivit": ("import minivit; return minivit.ops.softmax(x)", "not plain NumPy", "minivit may not be imported"),
    "minivit, by its parts": ("from minivit.ops.normalize import softmax", "not plain NumPy", "plain NumPy"),
    "a framework": ("import torch", "not plain NumPy", "torch may not be imported"),
}  # fmt: skip


def be_impatient(monkeypatch):
    monkeypatch.setattr("minivit.learn.child.SECONDS", 0.3)
    monkeypatch.setattr("minivit.learn.child._GRACE", 0.5)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_function_is_reported_in_words(name, tmp_path, monkeypatch):
    body, mistake, words = HOSTILE[name]
    if "loop" in name:
        be_impatient(monkeypatch)
    started = time.monotonic()
    mark = marked(tmp_path, FORWARD_ONLY.format(before="", body=body))
    assert time.monotonic() - started < 10.0
    assert (mark.state, mark.finding.function) == ("wrong", "forward")
    assert mistake in ("", mark.finding.mistake)
    assert words in "\n".join(mark.finding.says)


@pytest.mark.parametrize(
    ("before", "mistake"),
    {
        "sys.exit('bye')": "ends the program",
        "while True: pass": "no end",
        "1 / 0": "stopped",
        "def": "no Python",
        "x = '\\N{NO SUCH NAME}'": "no Python",
        "import minivit": "not plain NumPy",
        "for fd in range(3, 30):\n    try: os.write(fd, b'x' * 100)\n    except OSError: pass": "no answer",
        "os.closerange(3, 100)": "ends the program",
    }.items(),
)
def test_a_file_that_cannot_be_run_says_why(before, mistake, tmp_path, monkeypatch):
    if mistake == "no end":
        be_impatient(monkeypatch)
    mark = marked(tmp_path, FORWARD_ONLY.format(before=before, body="return x"))
    assert (mark.state, mark.finding.function, mark.finding.mistake) == ("wrong", "", mistake)
    if mistake in ("no Python", "stopped", "not plain NumPy"):
        assert any(line.startswith("In line 2") for line in mark.finding.says)


def test_numpy_changed_by_a_learner_changes_no_mark(tmp_path):
    before = "np.abs = np.array_equal = np.allclose = np.asarray = lambda *a, **k: True\nsys.modules.clear()"
    assert marked(tmp_path, FORWARD_ONLY.format(before=before, body="return 3 * x")).state == "wrong"
    patched = "import sys\nnp.array_equal = lambda *a, **k: True\nsys.modules.pop('numpy')"
    assert marked(tmp_path, RIGHT + patched).state == "solved"


def test_what_a_learner_starts_is_ended(tmp_path):
    note = tmp_path / "pid"
    body = f"""
    child = os.fork()
    if child == 0:
        while True: pass
    open({str(note)!r}, 'w').write(str(child))
    return x"""
    assert marked(tmp_path, FORWARD_ONLY.format(before="", body=body)).state == "wrong"
    status = Path(f"/proc/{note.read_text()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("it runs on")


@pytest.mark.parametrize(
    ("change", "mistake"),
    {
        ("    e = ", "    x -= 1.0\n    e = "): "an argument changed",
        ("    return e / ", "    return np.divide(e, 1.0, out=KEPT.setdefault(x.shape, e)) / "): None,
        (LAST, "    return np.divide(e, e.sum(-1, keepdims=True), out=KEPT.setdefault(x.shape, np.empty(x.shape)))"):
            "result overwritten",
        ("    return e", "    KEPT[len(KEPT)] = 0\n    return (1 + len(KEPT) // 12) * e"): "not repeatable",
        ("    return e / e", "    return e.astype(np.float32) / e.astype(np.float32)"): "float32",
        ("    return e / e", "    return (e + 0j) / e"): "complex",
        (LAST, "    return (e / e.sum(axis=-1, keepdims=True)).tolist()"): "not an array",
        (LAST, f"{LAST},"): "a tuple",
        (LAST, LAST.replace("return ", "")): "nothing returned",
        ("def forward", "def forwards"): "no such function",
        ("def forward(x)", "def forward(x, y)"): "stopped",
    }.items(),
)  # fmt: skip
def test_bad_manners_are_named(change, mistake, tmp_path):
    old, new = change
    source = f"KEPT = {{}}{RIGHT}"
    assert old in source
    mark = marked(tmp_path, source.replace(old, new, 1))
    if mistake is None:
        assert mark.passed
    else:
        assert (mark.finding.function, mark.finding.mistake) == ("forward", mistake)


def test_a_right_file_is_solved_and_leaves_nothing_behind(tmp_path):
    mark = marked(tmp_path, RIGHT)
    assert (mark.passed, mark.solved, mark.finding) == (True, ("forward", "backward"), None)
    assert os.listdir(tmp_path) == [SOFTMAX.file]


def test_a_file_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / SOFTMAX.file)
    assert main(["learn", "check", str(tmp_path), "3"]) == 1
    (tmp_path / SOFTMAX.file).unlink()
    (tmp_path / SOFTMAX.file).write_bytes(b"#" * (1 << 20) + b"\n")
    assert main(["learn", "check", str(tmp_path), "3"]) == 1


# ---- the wire --------------------------------------------------------------------------------------------------------


def test_values_cross_the_wire_as_they_are():
    value = {
        "a": np.arange(6.0).reshape(2, 3), "n": (1, -2.5, None, True, "ü"), "e": [], "z": np.zeros((0, 3)),
        "s": np.float32(1.5), "i": np.array(7), "inf": [float("inf"), float("-inf")], "t": np.arange(4.0)[::2],
    }  # fmt: skip
    back = unpacked(packed(value))
    assert list(back) == list(value) and back["n"] == value["n"] and back["e"] == [] and back["inf"] == value["inf"]
    for name in ("a", "z", "s", "i", "t"):
        np.testing.assert_array_equal(back[name], value[name], strict=name not in ("s",))
    assert np.isnan(unpacked(packed(float("nan"))))
    assert unpacked(packed({"f": print})) == {"f": Thing("builtin_function_or_method")}


@pytest.mark.parametrize(
    "tree",
    ['{"array": "<f8", "shape": [1000000000000]}', '{"array": "<f8", "shape": [-1]}', '{"array": "|O8", "shape": [1]}',
     '{"array": "<f8", "shape": [[]]}', "[1]", '{"dict": [1]}', '{"dict": [[1]]}', '{"number": "x"}', '{"a": 1}',
     '{"array": "<f99", "shape": [1]}', '{"array": "<f8", "shape": [1e400]}', "NaN", "[" * 99999],
)  # fmt: skip
def test_a_frame_that_was_not_packed_is_refused(tree):
    body = tree.encode()
    with pytest.raises(ValueError):
        unpacked(len(body).to_bytes(8, "big") + body)


def test_a_forged_reply_is_an_outcome_at_most():
    forged = {"fault": 3, "line": None, "changed": ("x", 1), "value": 7, "more": 1, "peak": "x"}
    assert _outcome(forged) == Outcome(value=7, changed=(1,))
    assert _outcome([1]) == Outcome()


def test_a_child_that_never_loaded_does_not_hang(tmp_path):
    with Child(tmp_path / "none.py") as child:
        assert "No such file" in child.load().fault
        assert child.run("forward", [(1,)])[0].stopped


# ---- mistakes of any exercise ----------------------------------------------------------------------------------------


def spoiled(slug: str, change, function: str = "backward"):
    exercise = LADDER[slug]
    asked = next(a for a in exercise.asked if a.name == function)
    run = running(Answers(exercise, **{function: lambda *args: change(asked.right(*args), *args)}))
    return mark_function(asked, arguments_of(exercise)[function], run, Key(0))


def each(change):
    return lambda outputs, *args: tuple(map(change, outputs))


@pytest.mark.parametrize(
    ("slug", "change", "mistake"),
    [
        ("softmax", lambda d, g, x: -d, "sign"),
        ("softmax", lambda d, g, x: 2.0 * d, "a constant factor"),
        ("softmax", lambda d, g, x: d / x.shape[-1], "a factor of a length"),
        ("softmax", lambda d, g, x: d * np.sqrt(x.shape[-1]), "a factor of a length"),
        ("softmax", lambda d, g, x: 0.0 * d, "zero"),
        ("softmax", lambda d, g, x: d.swapaxes(-1, -2) if d.ndim > 1 else d, "transposed"),
        ("softmax", lambda d, g, x: d[..., ::-1], "reversed"),
        ("softmax", lambda d, g, x: g, "an argument passed on"),
        ("softmax", lambda d, g, x: d.astype(np.float32), "float32"),
        ("softmax", lambda d, g, x: d + 0.5, "off by a constant"),
        ("softmax", lambda d, g, x: d * (1.0 + 1e-7 * np.sin(x)), "nearly right"),
        ("softmax", lambda d, g, x: d.sum(axis=-1), "summed over an axis that stays"),
        ("softmax", lambda d, g, x: d.mean(axis=-1, keepdims=True), "summed over an axis that stays"),
        ("softmax", lambda d, g, x: d[None], "an axis of length 1"),
        ("softmax", lambda d, g, x: np.where(d == d.max(), np.nan, d), "not a number"),
        ("softmax", lambda d, g, x: d + np.sin(7.0 * x), None),
        ("linear", lambda d, g, x, w, b: (d[0], d[2], d[1]), "outputs in another order"),
        ("linear", lambda d, g, x, w, b: d[:2], "number of outputs"),
        ("linear", lambda d, g, x, w, b: dict(zip("abc", d, strict=True)), "number of outputs"),
        ("linear", lambda d, g, x, w, b: (d[0], None, d[2]), "nothing returned"),
        ("linear", lambda d, g, x, w, b: (-d[0], -d[1], -d[2]), "sign"),
        ("linear", lambda d, g, x, w, b: (d[0], d[1], np.broadcast_to(g * 0 + d[2] / (g.size // g.shape[-1]), g.shape)),
         "not summed"),
        ("chain", lambda d, g, x, w, b: list(d), "right"),
        ("linear", lambda d, g, x, w, b: list(d), "right"),
    ],
)  # fmt: skip
def test_a_general_mistake_is_named(slug, change, mistake):
    finding = spoiled(slug, change)
    assert mistake == ("right" if finding.state == "right" else finding.mistake)


@pytest.mark.parametrize("slug", LADDER)
def test_a_sign_or_a_factor_is_named_in_every_exercise(slug):
    exercise = LADDER[slug]
    for asked in map(remembering, exercise.asked):
        for factor in (-1.0, 3.0):

            def change(value, factor=factor):
                if isinstance(value, dict):
                    return {key: factor * x for key, x in value.items()}
                return tuple(factor * x for x in value) if isinstance(value, tuple) else factor * value

            run = running(Answers(exercise, **{asked.name: lambda *args, a=asked, c=change: c(a.right(*args))}))
            finding = mark_function(asked, arguments_of(exercise)[asked.name], run, Key(0))
            names = [mistake.name for mistake in asked.mistakes]
            assert finding.mistake in (*names, "sign" if factor < 0 else "a constant factor"), asked.name


def test_two_mistakes_in_two_outputs_are_named_one_after_the_other():
    change = lambda d, g, x, w, b: (d[0], d[1].T, g)
    assert spoiled("linear", change).mistake == "dweight transposed"
    assert spoiled("linear", lambda d, g, x, w, b: (d[0] + 1.0, d[1], g)).mistake == "bias not summed"


def test_an_entry_is_shown_with_what_it_should_be_and_the_sample():
    finding = spoiled("softmax", lambda d, g, x: d + np.sin(7.0 * x))
    first, sample = finding.says[:2]
    assert first.startswith("dx[") and ", and should be " in first
    assert sample.startswith("Sample: two rows of three.\n")
    g, x = (np.array(json.loads(line.partition("np.array(")[2][:-1])) for line in sample.splitlines()[1:])
    place = tuple(int(i) for i in first[first.index("[") + 1 : first.index("]")].split(", "))
    right = SOFTMAX.asked[1].right(g, x)[place]
    assert first.endswith(f"] is {right + np.sin(7.0 * x[place]):.12g}, and should be {right:.12g}.")


# ---- the commands ----------------------------------------------------------------------------------------------------


def said(capsys, *words: str) -> tuple[int, str]:
    code = main(["learn", *words])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_a_learners_way_through_the_commands(here, capsys):
    assert "minivit learn start learn" in said(capsys)[1]
    code, text = said(capsys, "start", "learn")
    assert code == 0 and sorted(os.listdir("learn")) == [exercise.file for exercise in ladder()]
    assert "Open learn/01_chain.py" in text
    for exercise in ladder():
        assert Path("learn", exercise.file).read_text() == text_of(exercise)

    code, text = said(capsys, "check", "learn", "3")
    assert code == 1 and "not begun" in text and "Read it from the top" in text and "write forward" in text
    Path("learn/03_softmax.py").write_text(RIGHT.replace("p * (g - ", "g * p * (1 - p) + 0 * (g - "))
    code, text = said(capsys, "check", "learn/03_softmax.py")
    assert code == 1
    assert text.splitlines()[0] == "03_softmax.py: forward is right; backward is wrong: only the diagonal"
    assert "minivit learn hint 3" in text
    code, text = said(capsys, "check", "learn", "03", "--json")
    [row] = json.loads(text)["exercises"]
    assert (code, row["exercise"], row["passed"], row["function"]) == (1, 3, False, "backward")
    assert row["mistake"] == "only the diagonal" and "Jacobian" in row["message"]

    Path("learn/03_softmax.py").write_text(RIGHT.replace("p = forward(x)", "raise NotImplementedError"))
    assert "forward is right; backward is not written yet" in said(capsys, "check", "learn", "3")[1]
    Path("learn/03_softmax.py").write_text(RIGHT)
    assert said(capsys, "check", "learn", "3") == (
        0, "03_softmax.py: solved\n\nNext, exercise 4, cross-entropy from logits, with label smoothing:  "
        "open learn/04_cross_entropy.py\n",
    )  # fmt: skip
    code, text = said(capsys, "learn")
    assert code == 0 and "1 of 15 solved in learn" in text
    code, text = said(capsys, "check", "learn")
    assert code == 1 and text.splitlines()[-1].startswith("Then:") and "01_chain" in text.splitlines()[-1]

    code, text = said(capsys, "start", "learn", "3", "4")
    assert code == 0 and "left as they are" in text and Path("learn/03_softmax.py").read_text() == RIGHT


@pytest.mark.parametrize("exercise", LADDER.values(), ids=LADDER)
def test_a_reference_solution_is_right_in_a_process_of_its_own(exercise):
    with Child(SOLUTIONS / exercise.file, exercise.given) as child:
        assert not child.load().stopped
        findings = mark(exercise, arguments_of(exercise), child.run, Key(1))
    assert [(f.function, f.state, f.says) for f in findings] == [(a.name, "right", ()) for a in exercise.asked]


def test_several_that_are_solved_are_told_in_a_line(here, capsys):
    os.mkdir("all")
    for slug in ("gelu", "block"):
        shutil.copy(SOLUTIONS / LADDER[slug].file, Path("all"))
    code, text = said(capsys, "check", "all")
    assert (code, text.splitlines()[0]) == (0, "solved: 5, 10")


def test_hints_come_one_at_a_time(capsys):
    for words, step in ((["3"], 0), (["3", "2"], 1), (["3", "3"], 2)):
        code, text = said(capsys, "hint", *words, "--json")
        assert (code, json.loads(text)["text"]) == (0, SOFTMAX.hints[step])
    assert "minivit learn hint 3 2" in said(capsys, "hint", "3")[1]
    assert "The next one" not in said(capsys, "hint", "3", "3")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["check", "nowhere"], "minivit learn start nowhere"),
        (["check", "."], "there are no exercises in ."),
        (["check", ".", "99"], "there is no exercise '99'"),
        (["check", ".", "x"], "there is no exercise 'x'"),
        (["start"], "into which folder?"),
        (["start", "file"], "is a file"),
        (["check", "file"], "is no exercise's file"),
        (["hint"], "for which exercise?"),
        (["hint", "3", "4"], "there is none"),
        (["hint", "0"], "there is no exercise"),
        (["solve", "learn"], "known: list, start, check, hint"),
        (["lern"], "minivit learn start lern"),
    ],
)
def test_what_cannot_be_done_says_what_can(words, told, here, capsys):
    Path("file").write_text("x")
    code, text = said(capsys, *words)
    assert code == 1 and told in text


def test_a_file_of_another_name_is_marked_by_its_number(here, capsys):
    Path("alice.py").write_text(RIGHT)
    assert said(capsys, "check", "alice.py", "3")[0] == 0
    assert said(capsys, "check", "alice.py", "3", "4")[0] == 1
