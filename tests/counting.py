"""What the hostile suites went through, added up over tests and workers."""

from collections import Counter

import pytest

PREFIX = "hostile:"


def summary(reporter: pytest.TerminalReporter) -> str | None:
    """One line, or None where no test counted anything."""
    totals: Counter[str] = Counter()
    for report in reporter.getreports("passed"):
        for name, value in report.user_properties:
            if name.startswith(PREFIX) and report.when == "call":
                totals[name.removeprefix(PREFIX)] += int(str(value))
    return f"{PREFIX} " + ", ".join(f"{n} {what}" for what, n in sorted(totals.items())) if totals else None
