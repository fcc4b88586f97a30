"""Signals, each on a handful of numbers."""

import math
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qs_jax.adaptive import signals
from qs_jax.adaptive.policy import SignalName
from qs_jax.adaptive.signals import SIGNALS, Evidence, Shown
from tests.tiny import tiny_model

BEFORE = jnp.asarray([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
AFTER = jnp.asarray([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])


def test_drifts() -> None:
    root = math.sqrt(5)
    np.testing.assert_allclose(signals.raw_drift(BEFORE, AFTER), [0, root, 3], rtol=1e-6)
    np.testing.assert_allclose(signals.relative_drift(BEFORE, AFTER), [0, root, 1.5], rtol=1e-6)
    np.testing.assert_allclose(signals.direction_drift(BEFORE, AFTER), [0, 1, 2], atol=1e-6)
    np.testing.assert_allclose(signals.attention_update(BEFORE, AFTER), [1, 2, 0.5], rtol=1e-6)


def test_drifts_of_nothing_are_finite_and_those_of_bfloat16_float32() -> None:
    zeros = jnp.zeros((1, 4))
    for drift in (signals.raw_drift, signals.relative_drift, signals.direction_drift, signals.attention_update):
        assert jnp.isfinite(drift(zeros, zeros)).all()
        assert drift(BEFORE.astype(jnp.bfloat16), AFTER.astype(jnp.bfloat16)).dtype == jnp.float32


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=8))
def test_no_distance_is_negative(values: list[float]) -> None:
    """Rounding may not make a threshold of 0 bite."""
    state = jnp.asarray([values])
    assert signals.angle(state, state * 3) >= 0
    assert signals.entropy_bits(state * 10) >= 0


def test_entropy_is_in_bits() -> None:
    logits = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1e9, -1e9], [50.0, -50.0, -50.0, -50.0]])
    np.testing.assert_allclose(signals.entropy_bits(logits), [2, 1, 0], atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_probe_sees_what_the_head_would_say(name: str) -> None:
    model, states = tiny_model(name).network, jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    logits = model.head(states)
    for shortlist in (0, 40):
        expected = signals.entropy_bits(logits[:, : shortlist or None])
        np.testing.assert_allclose(signals.probe_entropy(model, states, shortlist), expected, rtol=1e-5)


def test_random_numbers_depend_on_place_token_and_layer_only() -> None:
    places, tokens = jnp.arange(64).reshape(4, 16), jnp.full((4, 16), 5)
    numbers = signals.uniform(places, tokens, 3)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(np.asarray(numbers))) == 64
    assert numbers[1, 3] == signals.uniform(places[1, 3:4], tokens[1, 3:4], 3)[0]
    for other in (signals.uniform(places, tokens, 4), signals.uniform(places, tokens + 1, 3)):
        assert (numbers != other).all()


def test_every_name_that_a_policy_may_use_is_a_signal() -> None:
    assert set(SIGNALS) == set(get_args(SignalName))


def evidence(probe: Callable[[], jax.Array] | None = None) -> Evidence:
    places = jnp.arange(3, dtype=jnp.int32)
    return Evidence(2, Shown(BEFORE, AFTER, AFTER), places, places, probe, jnp.full(3, 7.0))


def test_signals_are_read_of_evidence_by_name() -> None:
    seen = evidence(lambda: jnp.full(3, 5.0))
    np.testing.assert_array_equal(seen.read("raw_drift"), signals.raw_drift(BEFORE, AFTER))
    np.testing.assert_array_equal(seen.read("attention_update"), signals.attention_update(BEFORE, AFTER))
    assert (seen.read("entropy") == 5).all()
    assert (seen.read("previous_entropy") == 7).all()
    np.testing.assert_array_equal(seen.read("random"), signals.uniform(seen.positions, seen.ids, 2))


def test_the_probe_is_taken_when_it_is_asked_for_and_once() -> None:
    taken = []
    seen = evidence(lambda: taken.append(1) or jnp.zeros(3))
    seen.read("raw_drift")
    assert not taken
    for _ in range(2):
        seen.read("entropy")
    assert taken == [1]


def test_evidence_that_is_not_there_is_named() -> None:
    with pytest.raises(AssertionError, match="entropy was asked for"):
        evidence().read("entropy")
