"""When to draft: text is replayed as rounds would go, and rounds that are too slow are given up."""

from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qs_jax.engine.compilation import CompileMeter
from qs_jax.engine.decode import Chosen
from qs_jax.engine.drafts import Lookup
from qs_jax.engine.exact import Round
from qs_jax.engine.pacing import Drafting, Drafts, Replay, TextIndex
from tests.tiny import tiny_model

COUNTS = (8, 4)
SHAPE = (1, False, False)
PERIOD = [3, 1, 4, 1, 5, 9, 2, 6]
LIVE = np.asarray([0])
LEFT = 64
RAN = CompileMeter()
"""Nothing was compiled."""


def gained(tokens: list[int]) -> Chosen:
    """A chunk in which the only row chose these."""
    column = np.asarray(tokens, np.int32)[:, None]
    numbers = np.zeros(column.shape, np.float32)
    logits = np.zeros((*column.shape, 0), np.float32)
    on_the_host: tuple[Any, ...] = (column, numbers, column >= 0, column, column, numbers, logits)
    return Chosen(*on_the_host)


def drafts(*, adapts: bool = True) -> Drafts:
    """Of a model that nothing was measured of yet."""
    made = Drafts(Drafting(Lookup(), COUNTS, adapts=adapts), tiny_model("llama").network, [PERIOD])
    made._known.times.clear()
    made._known.foregone.clear()
    made._known.compiling = 0.0
    made._opened = True
    return made


def replayed(text: list[int], count: int, prompt: int) -> list[int]:
    """How rounds of lookups would go on a text that is known, by their definition: tokens of each."""
    rounds, at = [], prompt
    while at < len(text):
        proposed, right = TextIndex(text[:at]).continuation(count), 0
        while right < len(proposed) and at + right < len(text) and proposed[right] == text[at + right]:
            right += 1
        rounds.append(min(right + 1, len(text) - at))
        at += right + 1
    return rounds


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=4, max_size=40), st.integers(1, 5))
def test_a_replay_goes_as_rounds_would(text: list[int], count: int) -> None:
    index = TextIndex(text[:2])
    replay = Replay(index, count)
    for token in text[2:]:
        replay.see(token)
        index.push(token)
        replay.begin()
    expected = replayed(text, count, 2)
    assert replay.tokens == sum(expected) == len(text) - 2
    assert replay.rounds in (len(expected), len(expected) - 1)  # the last may still be under way


def test_text_that_does_not_repeat_itself_is_never_drafted() -> None:
    made, random = drafts(), np.random.default_rng(0)
    for _ in range(20):
        assert made.choose(LIVE, SHAPE, LEFT) == 0
        made.took(0, SHAPE, 1.0, RAN)
        made.see(gained(random.permutation(97)[:16].tolist()))


def test_text_that_repeats_itself_is_drafted_while_rounds_are_cheap() -> None:
    made = drafts()
    assert made.choose(LIVE, SHAPE, LEFT) == 0  # a step is measured before anything is compared with it
    made.took(0, SHAPE, 1.0, RAN)
    assert made.choose(LIVE, SHAPE, LEFT) == 0  # and text is seen
    made.see(gained(PERIOD * 4))
    assert made.choose(LIVE, SHAPE, LEFT) == 8
    made.took(8, SHAPE, 3.0, RAN)
    made.see(gained(PERIOD * 2))
    assert made.choose(LIVE, SHAPE, LEFT) == 8


@pytest.mark.parametrize(("slow", "expected"), [(9.5, 4), (2.0, 8)])
def test_rounds_that_cost_more_than_they_bring_are_given_up(slow: float, expected: int) -> None:
    """A slow one may be a hiccup; of two, the lesser counts."""
    made = drafts()
    made.took(0, SHAPE, 1.0, RAN)
    made.see(gained(PERIOD * 8))
    assert made.choose(LIVE, SHAPE, LEFT) == 8
    made.took(8, SHAPE, slow, RAN)
    assert made.choose(LIVE, SHAPE, LEFT) == 8
    made.took(8, SHAPE, slow, RAN)
    assert made.choose(LIVE, SHAPE, LEFT) == expected
    for _ in range(2):
        made.took(4, SHAPE, 6.0, RAN)
    assert made.choose(LIVE, SHAPE, LEFT) == (0 if slow > 9 else 8)


def test_what_was_measured_is_kept_for_the_next_request_of_such_a_batch() -> None:
    made = drafts()
    made.took(0, SHAPE, 1.0, RAN)
    again = Drafts(Drafting(Lookup(), COUNTS, adapts=True), tiny_model("llama").network, [PERIOD])
    assert again.choose(LIVE, SHAPE, LEFT) == 0  # the opening: of rounds nothing is known
    again.see(gained(PERIOD * 4))
    assert again.choose(LIVE, SHAPE, LEFT) == 8
    assert again.choose(LIVE, (2, False, False), LEFT) == 0


@pytest.mark.parametrize(("slow", "left", "expected"), [(1.3, 64, 8), (1.3, 16, 0), (2.4, 64, 0), (2.4, 400, 8)])
def test_a_text_opens_with_rounds_where_little_can_be_lost(slow: float, left: int, expected: int) -> None:
    """Four rounds that bring a token each, against four steps: at most a fiftieth of the whole."""
    made = drafts()
    made._opened = False
    made.took(0, SHAPE, 1.0, RAN)
    made.took(8, SHAPE, slow, RAN)
    assert made.choose(LIVE, SHAPE, left) == expected
    made.see(gained([50, 60, 70, 80]))
    assert made.choose(LIVE, SHAPE, left) == 0


def test_a_text_opens_with_fewer_drafts_where_more_would_cost_too_much() -> None:
    made = drafts()
    made._opened = False
    for count, seconds in {0: 1.0, 8: 2.4, 4: 1.3}.items():
        made.took(count, SHAPE, seconds, RAN)
    assert made.choose(LIVE, SHAPE, 64) == 4


def test_a_program_is_compiled_once_it_would_have_saved_as_much() -> None:
    """Eight drafts hopefully take 2.2 steps and bring nine tokens: 0.76 steps saved of each of the 32 that are made."""
    made = drafts()
    made.took(0, SHAPE, 9.0, CompileMeter(programs=1, seconds=160.0, trace_seconds=40.0))
    assert made.choose(LIVE, SHAPE, LEFT) == 0  # a step that was compiled is not measured
    made.took(0, SHAPE, 1.0, RAN)
    for expected in (0, 0, 8):  # 24, 48 and 72 steps saved, against a quarter of 200
        made.see(gained(PERIOD * 4))
        assert made.choose(LIVE, SHAPE, LEFT) == expected
    made.took(8, SHAPE, 60.0, CompileMeter(programs=1, seconds=2000.0))
    made.see(gained(PERIOD))
    assert made.choose(LIVE, SHAPE, LEFT) == 8  # it is there now
    made.took(8, SHAPE, 2.2, RAN)
    again = Drafts(Drafting(Lookup(), COUNTS, adapts=True), tiny_model("llama").network, [PERIOD])
    assert again.choose(LIVE, SHAPE, 500) == 8


def test_a_program_that_saves_little_more_than_another_is_not_compiled() -> None:
    made = drafts()
    made.took(0, SHAPE, 1.0, CompileMeter(programs=1, seconds=200.0))
    made.took(0, SHAPE, 1.0, RAN)
    made.took(4, SHAPE, 1.3, RAN)
    for _ in range(8):  # 0.26 steps a token at four drafts, 0.24 at eight
        made.see(gained(PERIOD * 4))
        assert made.choose(LIVE, SHAPE, LEFT) == 4


def test_tokens_of_rounds_and_of_plain_steps_are_told_apart() -> None:
    """The prompt's token, a plain step, two rounds of which the second has no draft right, a plain step."""
    made = drafts()
    made.see(gained([5]))
    made.see(gained([6]))
    chosen = gained([7, 8, 9, 10, 0, 0])
    emitted = np.asarray([True, True, True, True, False, False])
    chosen = chosen._replace(emitted=emitted[:, None])
    rounds: Any = jax.tree.map(lambda leaf: leaf.reshape(2, 3, *leaf.shape[1:]), chosen)
    drafted: Any = np.asarray([[2], [2]])
    accepted: Any = np.asarray([[2], [0]])
    made.count(Round(rounds, drafted, accepted, None), LIVE)
    made.see(chosen)
    made.see(gained([11]))
    assert made.trace["from_draft"] == [[False, False, True, True, False, False, False]]
    assert made.trace["in_round"] == [[-1, -1, 0, 0, 0, 1, -1]]
    assert (made.trace["rounds"], made.trace["accepted"]) == ([2], [2])


def test_a_draft_that_is_asked_for_is_always_used() -> None:
    made = drafts(adapts=False)
    assert made.choose(LIVE, SHAPE, LEFT) == COUNTS[0]
    made.see(gained([5, 6]))
    assert made.history(LIVE, 11).tolist() == [[*PERIOD, 5, 6, 0]]
