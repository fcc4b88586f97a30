"""Counts what the hostile suites went through and prints it at the end of the run."""

from collections import Counter
from collections.abc import Callable

import pytest

_PREFIX = "hostile:"


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """`count("mutated inputs", 500)`."""
    return lambda what, number: record_property(f"{_PREFIX}{what}", number)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    totals: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith(_PREFIX) and report.when == "call":
                totals[name.removeprefix(_PREFIX)] += int(str(value))
    if totals:
        terminalreporter.write_line("hostile: " + ", ".join(f"{n} {what}" for what, n in sorted(totals.items())))
