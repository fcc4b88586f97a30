"""From logits to the next token, against the plain mathematics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from qs_jax.engine.sampling import (
    Sampling,
    log_normaliser,
    most_likely,
    next_tokens,
    process_logits,
)
from tests.arrays import exact, normal

VOCAB = 11
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SEEN = np.arange(VOCAB) % 3 == 0
process_jit = jax.jit(process_logits)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_most_likely_is_the_first_of_equals_and_the_normaliser_that_of_softmax(rows: int) -> None:
    logits = normal(rows, 300).at[:, jnp.asarray([41, 17, 250])].set(9.0)
    assert jax.jit(most_likely)(logits).tolist() == [17] * rows
    np.testing.assert_allclose(jax.jit(log_normaliser)(logits), np.log(np.exp(exact(logits)).sum(axis=-1)), rtol=1e-6)


def processed(logits: np.ndarray, seen: np.ndarray, asked: dict[str, float]) -> tuple[np.ndarray, float]:
    """One row by sorting, in float64; and how close a token came to being ruled out, or not."""
    scores = logits.astype(np.float64)
    penalty = asked["repetition_penalty"]
    scores = np.where(seen, np.where(scores < 0, scores * penalty, scores / penalty), scores) / asked["temperature"]
    if asked["top_k"]:
        scores[scores < np.sort(scores)[::-1][: int(asked["top_k"])][-1]] = -np.inf
    p = np.exp(scores - scores.max())
    p /= p.sum()
    margin = np.inf
    if asked["top_p"] < 1:
        greater = np.array([p[p > own].sum() for own in p])
        margin = np.abs(greater - asked["top_p"]).min()
        scores[greater >= asked["top_p"]] = -np.inf
        p = np.where(np.isneginf(scores), 0.0, p)
        p /= p.sum()
    if asked["min_p"]:
        margin = min(margin, np.abs(p[p > 0] - asked["min_p"] * p.max()).min())
        scores[p < asked["min_p"] * p.max()] = -np.inf
    return scores, float(margin)


@settings(max_examples=200)
@given(
    halves=st.lists(st.integers(-16, 16), min_size=VOCAB, max_size=VOCAB),
    seen=st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB),
    asked=st.fixed_dictionaries(
        {
            "temperature": st.floats(0.25, 4),
            "top_k": st.integers(0, VOCAB + 1),
            "top_p": st.just(1.0) | st.floats(0.01, 0.99),
            "min_p": st.just(0.0) | st.floats(0.01, 0.99),
            "repetition_penalty": st.just(1.0) | st.floats(0.5, 2),
        }
    ),
)
def test_scores_are_those_of_a_sort(halves: list[int], seen: list[bool], asked: dict[str, Any]) -> None:
    """Logits are halves, so that many are equal: of those at a threshold all are kept."""
    logits, marked = np.asarray(halves, np.float32) / 2, np.asarray(seen)
    # as the engine gets them: else a sum that is 1/2 to the last bit falls on the other side of a threshold
    asked = {name: value if name == "top_k" else float(np.float32(value)) for name, value in asked.items()}
    expected, margin = processed(logits, marked, asked)
    assume(margin > 1e-5)
    found = np.asarray(process_jit(logits[None], marked[None], Sampling.of(**asked)))[0]
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.5, "top_k": 5}, {"repetition_penalty": 3.0, "top_p": 0.8}])
def test_samples_are_drawn_as_often_as_is_likely(asked: dict[str, Any]) -> None:
    """One row for each of many keys; a chi-square test, which fixed keys make certain."""
    draws = 4000
    logits = np.linspace(-1, 2, VOCAB, dtype=np.float32)
    sampling = Sampling.of(do_sample=True, **asked)
    seen = np.tile(SEEN, (draws, 1)) if sampling.penalise else np.zeros((draws, 0), bool)
    noise = jax.random.split(jax.random.key(0), draws)
    tokens = jax.jit(next_tokens)(np.tile(logits, (draws, 1)), seen, noise, sampling)
    scores, _ = processed(logits, SEEN, {**NEUTRAL, **asked})
    expected = draws * np.exp(scores) / np.exp(scores).sum()
    counts = np.bincount(np.asarray(tokens), minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 0.01


def test_greedy_takes_the_first_of_the_greatest_after_the_penalty() -> None:
    logits = jnp.asarray([[1.0, 3.0, 3.0, -1.0], [-4.0, -3.0, -5.0, -3.5]])
    seen = jnp.asarray([[False, True, False, False], [False, True, False, False]])
    noise = jax.random.split(jax.random.key(0), 2)
    assert next_tokens(logits, seen[:, :0], noise, Sampling.of()).tolist() == [1, 1]
    assert next_tokens(logits, seen, noise, Sampling.of(repetition_penalty=2.0)).tolist() == [2, 3]


def test_rows_of_their_own_settings_are_each_as_alone() -> None:
    """Greedy ones among those that sample, too; and where none samples it is the program of plain greedy decoding."""
    rows = [
        Sampling.of(),
        Sampling.of(do_sample=True, temperature=0.7, top_k=5),
        Sampling.of(do_sample=True, temperature=2.0, top_p=0.8),
        Sampling.of(),
    ]
    logits, keys = normal(len(rows), VOCAB).at[0].set(1.0), jax.random.split(jax.random.key(3), len(rows))
    seen = jnp.zeros((len(rows), 0), bool)
    together = next_tokens(logits, seen, keys, Sampling.of_rows(rows))
    for row, sampling in enumerate(rows):
        one = slice(row, row + 1)
        assert together[row] == next_tokens(logits[one], seen[one], keys[one], sampling)[0]
    assert together[0] == 0  # of equals the first, whatever the noise
    greedy = Sampling.of_rows([Sampling.of(), Sampling.of()])
    assert (greedy.do_sample, greedy.penalise, greedy.greedy) == (False, False, None)
    penalised = Sampling.of_rows([Sampling.of(repetition_penalty=1.5), Sampling.of()])
    assert penalised.repetition_penalty.tolist() == [1.5, 1.0]
