"""The page shows what was measured."""

import pytest

from benchmarks.harness import read_result
from benchmarks.serve import PAGE, load_table, table

STORED = read_result("serve")


def test_the_page_shows_how_fast_it_was() -> None:
    assert table(STORED["servers"]["found"]) in PAGE.read_text("utf-8")


def test_the_page_shows_what_became_of_the_load() -> None:
    load = STORED["load"]
    assert load_table(load) in PAGE.read_text("utf-8")
    assert (load["wrong"], load["lost"]) == (0, 0)
    assert load["left_over"] == {"running": 0, "waiting": 0}
    assert load["seconds"] == pytest.approx(300, abs=60)
