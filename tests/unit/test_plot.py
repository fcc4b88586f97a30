"""Where marks and bars lie."""

import pytest

from qs_jax.evaluation.plot import HEIGHT, WIDTH, histogram, pareto
from tests.results import result


def test_marks_lie_within_the_figure_and_keep_their_order() -> None:
    figure = pareto(result()["table"])
    assert all(0 <= mark.x <= WIDTH and 0 <= mark.y <= HEIGHT for mark in figure.marks)
    off, calibrated, uniform, halting, lost = figure.marks
    assert off.x < halting.x < uniform.x < calibrated.x < figure.paper_x
    assert off.y > uniform.y > calibrated.y > figure.budget_y > halting.y
    assert [mark.outside for mark in figure.marks] == [False] * 4 + [True]
    assert lost.y == min(mark.y for mark in figure.marks)
    assert figure.front == [(calibrated.x, calibrated.y), (uniform.x, uniform.y), (off.x, off.y)]
    assert all(mark.high <= mark.y <= mark.low for mark in figure.marks)


def test_bars_are_proportional() -> None:
    bars = histogram([0, 0, 0, 30, 10, 0, 60])
    assert [bar.layers for bar in bars] == [1, 2, 3, 4, 5, 6]
    assert bars[2].height == pytest.approx(bars[5].height / 2, abs=0.1)
    assert bars[5].share == "60.0%"
    assert [bar.height for bar in histogram([0, 0])] == [0]
