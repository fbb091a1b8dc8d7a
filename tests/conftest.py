"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minivit.autograd.op import OPS
from minivit.backend import cuda_status
from tests import strict

strict_cupy = strict.strict_cupy  # the fixture: CuPy's strict stand-in


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is none, and say why."""
    if (why_not := cuda_status()) is not None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=why_not))


@pytest.fixture
def toys() -> Iterator[None]:
    """Let a test define operations of its own."""
    before = dict(OPS)
    yield
    OPS.clear()
    OPS.update(before)
