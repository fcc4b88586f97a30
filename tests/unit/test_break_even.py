"""The acceptance at which drafts pay, by the formula and by counting."""

import itertools

import numpy as np
import pytest

from benchmarks.break_even import COSTS, decoded, needed, script, table
from benchmarks.harness import read_result
from benchmarks.quality_report import METHOD
from tests.tiny import tiny_model


@pytest.mark.parametrize(("ratio", "count", "cost"), list(itertools.product([1.05, 1.4, 2.6], [2, 4, 8], COSTS)))
def test_it_is_where_a_round_brings_what_it_costs(ratio: float, count: int, cost: float) -> None:
    least = needed(ratio, count, cost)
    price = ratio + count * cost
    if least is None:
        assert price > count + 1
        return
    random = np.random.default_rng(0)
    right = np.cumprod(random.random((200_000, count)) < least, axis=1)
    assert 1 + right.sum(axis=1).mean() == pytest.approx(price, abs=0.02)


def test_a_script_is_right_as_often_as_it_is_told() -> None:
    """And whatever it says, the text is that of plain decoding."""
    model, prompt = tiny_model("llama"), [3, 4, 5]
    plain = decoded(model, prompt, 17)
    for right, passes in ((0.0, 16), (1.0, 4)):
        ran = decoded(model, prompt, 17, script(prompt, plain.tokens, right, model.config.vocab_size), 3)
        assert (ran.tokens, ran.passes) == (plain.tokens, passes)
    told = script(prompt, [7] * 10_000, 0.8, 97).script[0, 3:10_003]
    assert float((told == 7).mean()) == pytest.approx(0.8, abs=0.02)


def test_the_page_shows_what_was_measured() -> None:
    assert table(read_result("break_even")["runs"]) in METHOD.read_text("utf-8")
