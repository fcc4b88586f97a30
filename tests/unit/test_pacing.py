"""When to draft, and by what: rounds that bring less than they cost are given up, and what is tried is paid for."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qs_jax.adaptive.binding import dense
from qs_jax.engine.compilation import CompileMeter
from qs_jax.engine.drafts import Lookup, Steps
from qs_jax.engine.pacing import _ANEW, _KNOWN, ROUNDS, Drafting, Pacing, Rightness, Way
from tests.tiny import tiny_model

LOOKUPS = tuple(Way("lookup", Lookup(), count) for count in (8, 4))
SHAPE = (1, False, False)
PERIOD = [3, 1, 4, 1, 5, 9, 2, 6]
LIVE = np.asarray([0])
LEFT = 64
RAN = CompileMeter()
"""Nothing was compiled."""


def paced(*, ways: Sequence[Way] = LOOKUPS, anew: bool = True) -> Pacing:
    """The choices of a request of one row, of a model that nothing was measured of yet, unless it is not `anew`."""
    network = tiny_model("llama").network
    if anew:
        _KNOWN.pop(network, None)
    made = Pacing(Drafting(tuple(ways), adapts=True), network, [PERIOD])
    made._opened = anew
    return made


def chosen(made: Pacing, left: int = LEFT) -> int:
    """Drafts a round; 0 for plain steps."""
    way = made.choose(LIVE, SHAPE, left)
    return way.count if way else 0


def took(made: Pacing, count: int, seconds: float, compiled: CompileMeter = RAN) -> None:
    """A round of so many looked-up drafts, or a plain step, took so long."""
    way = next((way for way in LOOKUPS if way.count == count), None)
    made.took(way, SHAPE, seconds, 1, compiled)


def test_text_that_does_not_repeat_itself_is_never_drafted() -> None:
    made, random = paced(), np.random.default_rng(0)
    for _ in range(20):
        assert chosen(made) == 0
        took(made, 0, 1.0)
        made.see([random.permutation(97)[:16].tolist()])


def test_text_that_repeats_itself_is_drafted_while_rounds_are_cheap() -> None:
    made = paced()
    assert chosen(made) == 0  # a step is measured before anything is compared with it
    took(made, 0, 1.0)
    assert chosen(made) == 0  # and text is seen
    made.see([PERIOD * 4])
    assert chosen(made) == 8
    took(made, 8, 3.0)
    made.see([PERIOD * 2])
    assert chosen(made) == 8


@pytest.mark.parametrize(("slow", "expected"), [(9.5, 4), (2.0, 8)])
def test_rounds_that_cost_more_than_they_bring_are_given_up(slow: float, expected: int) -> None:
    """A slow one may be a hiccup; of two, the lesser counts."""
    made = paced()
    took(made, 0, 1.0)
    made.see([PERIOD * 8])
    assert chosen(made) == 8
    took(made, 8, slow)
    assert chosen(made) == 8
    took(made, 8, slow)
    assert chosen(made) == expected
    for _ in range(2):
        took(made, 4, 6.0)
    assert chosen(made) == (0 if slow > 9 else 8)


def test_what_was_measured_is_kept_for_the_next_request_of_such_a_batch() -> None:
    made = paced()
    took(made, 0, 1.0)
    again = paced(anew=False)
    assert chosen(again) == 0  # the opening: of rounds nothing is known
    again.see([PERIOD * 4])
    assert chosen(again) == 8
    assert again.choose(LIVE, (2, False, False), LEFT) is None


@pytest.mark.parametrize(("slow", "left", "expected"), [(1.3, 64, 8), (1.3, 16, 0), (2.4, 64, 0), (2.4, 400, 8)])
def test_a_text_opens_with_rounds_where_little_can_be_lost(slow: float, left: int, expected: int) -> None:
    """Four rounds that bring a token each, against four steps: at most a fiftieth of the whole."""
    made = paced()
    made._opened = False
    took(made, 0, 1.0)
    took(made, 8, slow)
    assert chosen(made, left) == expected
    made.see([[50, 60, 70, 80]])
    assert chosen(made, left) == 0


def test_a_text_opens_with_fewer_drafts_where_more_would_cost_too_much() -> None:
    made = paced()
    made._opened = False
    for count, seconds in {0: 1.0, 8: 2.4, 4: 1.3}.items():
        took(made, count, seconds)
    assert chosen(made, 64) == 4


def test_a_program_is_compiled_once_it_would_have_saved_as_much() -> None:
    """Eight drafts hopefully take 2.2 steps and bring nine tokens: 0.76 steps saved of each of the 32 that are made."""
    made = paced()
    took(made, 0, 9.0, CompileMeter(programs=1, seconds=160.0, trace_seconds=40.0))
    assert chosen(made) == 0  # a step that was compiled is not measured
    took(made, 0, 1.0)
    for expected in (0, 0, 8):  # 24, 48 and 72 steps saved, against a quarter of 200
        made.see([PERIOD * 4])
        assert chosen(made) == expected
    took(made, 8, 60.0, CompileMeter(programs=1, seconds=2000.0))
    made.see([PERIOD])
    assert chosen(made) == 8  # it is there now
    took(made, 8, 2.2)
    again = paced(anew=False)
    assert chosen(again, 500) == 8


def test_a_program_that_saves_little_more_than_another_is_not_compiled() -> None:
    made = paced()
    took(made, 0, 1.0, CompileMeter(programs=1, seconds=200.0))
    took(made, 0, 1.0)
    took(made, 4, 1.3)
    for _ in range(8):  # 0.26 steps a token at four drafts, 0.24 at eight
        made.see([PERIOD * 4])
        assert chosen(made) == 4


CODES = Way("bits:4", Steps(dense(tiny_model("llama").config), 4), 2, price=0.25)
PASS = 1.1
"""Seconds of a round without its drafts, where a step takes one."""


def decoded(made: Pacing, price: float, right: float, chunks: int) -> tuple[float, float, list[bool]]:
    """Seconds and tokens of text that does not repeat itself, beyond what is compiled, and which chunks were tried: of
    codes whose drafts take so long and are right so often."""
    random, fresh, seconds, tokens, tried = np.random.default_rng(0), iter(range(10**6)), 0.0, 0, []
    for _ in range(chunks):
        way = made.choose(LIVE, SHAPE, LEFT)
        tried.append(way is not None)
        passes, took, made_now, compiled = 16, 16.0, 16, RAN
        if way:
            rights = np.cumprod(random.random((ROUNDS, way.count)) < right, axis=1).sum(axis=1)
            passes, took, made_now = ROUNDS, ROUNDS * (PASS + way.count * price), int(rights.sum()) + ROUNDS
            made.learn(way, int(rights.sum()), int((rights < way.count).sum()))
            compiled = RAN if sum(tried) > 1 else CompileMeter(programs=1, seconds=30.0)
        made.took(way, SHAPE, took, passes, compiled)
        made.see([[next(fresh) for _ in range(made_now)]])
        seconds, tokens = seconds + took, tokens + made_now
    return seconds, tokens, tried


@settings(max_examples=40)
@given(st.floats(0, 1), st.floats(0, 1))
def test_what_is_tried_never_costs_more_than_was_put_aside(price: float, right: float) -> None:
    """But for one run that is compiled and one that costs more than was hoped. Plain steps take a second a token."""
    seconds, tokens, _ = decoded(paced(ways=(*LOOKUPS, CODES)), price, right, 400)
    worst = ROUNDS * (PASS + CODES.count * price - 1)
    assert seconds <= 1.01 * tokens + 2 * worst + 1


@pytest.mark.parametrize(("price", "right", "speed"), [(0.25, 0.95, 1.7), (0.45, 0.99, 1.4), (0.25, 0.8, 1.4)])
def test_drafts_that_pay_are_found_and_kept(price: float, right: float, speed: float) -> None:
    seconds, tokens, tried = decoded(paced(ways=(*LOOKUPS, CODES)), price, right, 800)
    assert not any(tried[:10])  # until enough was put aside
    assert np.mean(tried[-400:]) > 0.9
    assert tokens / seconds > speed * 0.9


@pytest.mark.parametrize(("price", "right"), [(0.25, 0.1), (0.9, 0.99)], ids=["mostly wrong", "too slow"])
def test_drafts_that_do_not_pay_are_given_up(price: float, right: float) -> None:
    """Whose time is known for many requests; of how often they are right another try may tell otherwise."""
    made = paced(ways=(*LOOKUPS, CODES))
    _, _, tried = decoded(made, price, right, 400)
    assert 2 <= sum(tried) <= 6
    made = paced(ways=(*LOOKUPS, CODES), anew=False)
    assert sum(decoded(made, price, right, 400)[2]) <= (10 if right < 0.5 else 0)


def test_rounds_that_were_too_slow_are_measured_anew_after_many_requests() -> None:
    """Once the machine is free, and without another compilation."""
    ways = (*LOOKUPS, CODES)
    assert sum(decoded(paced(ways=ways), 0.9, 0.99, 100)[2]) > 0
    tried = [any(decoded(paced(ways=ways, anew=False), 0.2, 0.99, 20)[2]) for _ in range(80)]
    assert tried.index(True) == _ANEW - 2  # after the first one, and counted from none
    assert all(tried[_ANEW:])


def test_a_trial_is_measured_by_what_would_be_done_without_it() -> None:
    """Lookups bring a token in a third of a step: four rounds of 0.9 that bring one each lose 2.2 to 2.4, and eight
    seconds for sixteen tokens are a loss, though plain steps take sixteen."""
    made = paced(ways=(*LOOKUPS, CODES))
    took(made, 0, 1.0)
    for way, seconds in ((LOOKUPS[0], 2.8), (LOOKUPS[1], 2.8), (CODES, 0.9)):
        for _ in range(2):
            made.took(way, SHAPE, seconds, 1, RAN)
    made._known.rightness["bits:4"] = Rightness(1000.0, 0.0)
    for aside, expected in ((2.1, 8), (2.5, 2)):
        made.see([PERIOD * 8])
        made._known.aside = aside
        assert chosen(made) == expected
    made.took(CODES, SHAPE, 8.0, ROUNDS, RAN)
    made.see([PERIOD * 2])
    assert made._known.aside == pytest.approx(2.5 + 16 * made._untried - 8.0)
    assert 0.3 < made._untried < 0.35


def test_a_program_that_only_hope_speaks_for_must_have_missed_saving_all_of_its_time() -> None:
    """Hopefully a round takes 1.8 steps and brings 2.44 tokens: 4.2 steps saved of every 16."""
    made = paced(ways=(CODES,))
    made._known.aside = 100.0
    took(made, 0, 1.0, CompileMeter(programs=1, seconds=20.0))
    took(made, 0, 1.0)
    for expected in (0, 0, 0, 0, 2):
        made.see([list(range(16))])
        assert chosen(made) == expected


def test_a_pass_is_known_from_lookups_of_as_many_tokens() -> None:
    """Where three tokens take almost as long as three steps nothing is worth a try."""
    looked_up = Way("lookup", Lookup(), 2)
    for seconds, expected in ((1.2, 2), (2.8, 0)):
        made = paced(ways=(looked_up, CODES))
        made._known.aside = 100.0
        took(made, 0, 1.0)
        for _ in range(2):
            made.took(looked_up, SHAPE, seconds, 1, RAN)
        assert chosen(made) == expected


def test_drafts_are_believed_as_they_are_seen() -> None:
    seen = Rightness()
    assert seen.tokens(2) == pytest.approx(1 + 0.8 + 0.64)
    for _ in range(20):
        seen.see(9, 1)
    assert 2.65 < seen.tokens(2) < 1 + 0.9 + 0.81
    for _ in range(3):
        seen.see(0, 4)
    assert seen.tokens(2) < 2.1


def test_a_draft_that_is_asked_for_is_always_used() -> None:
    made = Pacing(Drafting(LOOKUPS[:1]), tiny_model("llama").network, [PERIOD])
    assert chosen(made) == LOOKUPS[0].count
    made.see([[5, 6]])
    assert chosen(made) == LOOKUPS[0].count
