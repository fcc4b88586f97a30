"""Counts what the hostile suites went through; the end of the run prints it (tests/conftest.py)."""

from collections.abc import Callable

import pytest

from tests.counting import PREFIX


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """`count("mutated inputs", 500)`."""
    return lambda what, number: record_property(f"{PREFIX}{what}", number)
