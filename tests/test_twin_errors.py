"""Errors of twins in ulps: what is measured, that wrong twins are found, and the command that prints it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from minivit.autograd.op import OPS
from minivit.cli.main import main
from minivit.measure import ulps as module
from minivit.measure.ulps import measure_ulps, twins_on, ulps


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 23), ("bfloat16", 7), ("tf32", 10)])
def test_an_ulp_is_that_of_the_largest_value_in_the_row(dtype: str, digits: int) -> None:
    exact, one = np.array([[1.0, 5.0], [0.0, 0.0], [0.5, -0.25]]), 2.0**-digits

    def with_error(row: int, column: int, error: float) -> np.ndarray:
        found = exact.copy()
        found[row, column] += error
        return found

    assert ulps(exact, exact, dtype) == 0.0
    assert ulps(with_error(0, 0, 4 * one), exact, dtype) == 1.0  # 5 lies between 4 and 8
    assert ulps(with_error(2, 1, one), exact, dtype) == 2.0
    assert ulps(with_error(1, 0, 8 * one), exact, dtype) == 2.0  # a row of zeros: the largest of all
    assert ulps(exact * np.nan, exact, dtype) == np.inf
    assert ulps(np.array(one), np.array(0.0), dtype) == np.inf


def test_twins_are_within_what_is_allowed_on_the_cpu() -> None:
    names = twins_on("cpu")
    assert {"linear", "gelu", "layer_norm", "self_attention", "cross_entropy"} <= set(names)
    for name in names:
        found = measure_ulps(name, "cpu", "float32")
        assert found.ran == "twin" and found.passed, found
        assert found.output > 0.0 or name in ("max_pool2d", "relu"), found  # which choose, and round nothing
        assert found.gradients, found


def wrong_gradient(monkeypatch: pytest.MonkeyPatch, kind: str, by: float) -> None:
    twin: Any = OPS["linear"].twins[kind]
    right = twin._vjp
    monkeypatch.setattr(twin, "_vjp", lambda g, kept, needs: (*right(g, kept, needs)[:1], *[
        None if part is None else part * by for part in right(g, kept, needs)[1:]]))  # fmt: skip


def test_a_wrong_gradient_is_farther_off_than_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "twins_on", lambda device: ["linear"])
    wrong_gradient(monkeypatch, "cpu", 1.0 + 1e-4)
    found = measure_ulps("linear", "cpu", "float32")
    assert not found.passed
    assert found.gradients["x"] < 64.0 < found.gradients["weight"]
    assert main(["gradcheck", "--dtype", "float32", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "1 operations, 1 farther off than allowed" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_command_on_a_gpu(strict_cupy: Any, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    assert main(["gradcheck", "--device", "cuda", "--dtype", dtype, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["device"], found["dtype"]) == ("cuda:0", dtype)
    rows = {row["operation"]: row for row in found["operations"]}
    assert rows["linear"]["ran"] == "twin" and rows["linear"]["passed"]
    assert set(rows["linear"]["gradients"]) >= {"x", "weight", "bias"}
    half = dtype != "float32"
    assert all(error <= 1.0 for error in rows["linear"]["gradients"].values()) or not half


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gradcheck", "vit_digits", "--dtype", "float32"]) == 1
    assert "measure operations, not the model vit_digits" in capsys.readouterr().err
    assert main(["gradcheck", "--device", "cpu", "--dtype", "bfloat16"]) == 1
    assert "bfloat16 on a CPU" in capsys.readouterr().err
