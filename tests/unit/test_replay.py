"""Text is replayed as rounds of lookups would have gone."""

from hypothesis import given, settings
from hypothesis import strategies as st

from qs_jax.engine.replay import Replay, TextIndex


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
