"""Signals and rules, each on a handful of numbers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qs_jax.adaptive import signals
from qs_jax.adaptive.binding import FusionStructure, HaltingStructure
from qs_jax.adaptive.fusion import fuse, pairs
from qs_jax.adaptive.halting import halts, is_special
from qs_jax.adaptive.policy import PositionRule
from qs_jax.adaptive.precision import choose_bits, precisions_in_use
from qs_jax.choices import BITS
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
    for drift in (*signals.DRIFTS.values(), signals.attention_update):
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
def test_a_lens_sees_what_the_head_would_say(name: str) -> None:
    model, states = tiny_model(name).network, jnp.asarray(np.random.default_rng(0).normal(size=(3, 32)), jnp.float32)
    logits = model.head(states)
    for shortlist in (0, 40):
        expected = signals.entropy_bits(logits[:, : shortlist or None])
        np.testing.assert_allclose(signals.lens_entropy(model, states, shortlist), expected, rtol=1e-5)


def test_random_numbers_depend_on_place_token_and_layer_only() -> None:
    places, tokens = jnp.arange(64).reshape(4, 16), jnp.full((4, 16), 5)
    numbers = signals.uniform(places, tokens, 3)
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert len(np.unique(np.asarray(numbers))) == 64
    assert numbers[1, 3] == signals.uniform(places[1, 3:4], tokens[1, 3:4], 3)[0]
    for other in (signals.uniform(places, tokens, 4), signals.uniform(places, tokens + 1, 3)):
        assert (numbers != other).all()


def test_halting_needs_a_low_signal_and_a_low_entropy_and_no_protection() -> None:
    values = {"raw_drift": jnp.asarray([0.1, 0.1, 0.1, 0.9, 0.3]), "entropy": jnp.asarray([1.0, 3.0, 1.0, 1.0, 1.0])}
    protected = jnp.asarray([False, False, True, False, False])
    gated, plain = (HaltingStructure("raw_drift", (2,), gate) for gate in ("entropy", None))
    threshold, doubt = jnp.float32(0.3), jnp.float32(2.0)
    assert halts(gated, values, threshold, doubt, protected).tolist() == [True, False, False, False, False]
    assert halts(plain, values, threshold, doubt, protected).tolist() == [True, True, False, False, False]
    assert not halts(plain, values, jnp.float32(0), doubt, protected).any()
    assert halts(plain, values, jnp.float32(jnp.inf), doubt, protected).tolist() == [True, True, False, True, True]


def test_padding_is_no_special_token() -> None:
    assert is_special(jnp.asarray([[3, 5, 0]]), jnp.asarray([5, -1])).tolist() == [[False, True, False]]


def states(*values: float) -> jnp.ndarray:
    return jnp.asarray(values, jnp.float32)[None, :, None]


def structure(position: PositionRule = "last") -> FusionStructure:
    return FusionStructure("l2", (2,), position, False)


@pytest.mark.parametrize(
    ("values", "free", "expected"),
    [
        ((0, 0, 0, 0, 0), (1, 1, 1, 1, 1), [0, 1, 0, 1, 0]),
        ((0, 9, 9, 9, 0), (1, 1, 1, 1, 1), [0, 0, 1, 0, 0]),
        ((0, 0, 9, 9, 0), (1, 1, 1, 1, 1), [0, 1, 0, 1, 0]),
        ((0, 0, 0, 0, 0), (1, 0, 1, 1, 1), [0, 0, 0, 1, 0]),
        ((0, 0, 0, 0, 0), (0, 1, 1, 1, 0), [0, 0, 1, 0, 0]),
        ((0, 3, 6, 9, 12), (1, 1, 1, 1, 1), [0, 0, 0, 0, 0]),
    ],
)
def test_every_second_token_of_a_run_fuses_leftwards(
    values: tuple[float, ...], free: tuple[int, ...], expected: list[int]
) -> None:
    fuses = pairs(structure(), states(*values), jnp.asarray([free], bool), jnp.float32(1.0))
    assert fuses[0].astype(int).tolist() == expected


def test_the_first_token_has_no_left_neighbour_and_a_threshold_of_zero_fuses_nothing() -> None:
    free = jnp.ones((1, 2), bool)
    assert pairs(structure(), states(0, 0), free, jnp.float32(jnp.inf)).tolist() == [[False, True]]
    assert not pairs(structure(), states(0, 0), free, jnp.float32(0)).any()


@pytest.mark.parametrize(("position", "expected"), [("last", 9), ("first", 4), ("mean", 7)])
def test_a_pair_is_its_weighted_mean(position: PositionRule, expected: int) -> None:
    places, sizes = jnp.asarray([[1, 4, 9]]), jnp.asarray([[1, 1, 2]])
    fused = fuse(states(5, 3, 6), places, sizes, jnp.asarray([[False, False, True]]), position)
    np.testing.assert_allclose(fused.hidden_states[0, :, 0], [5, 3, 5])
    assert fused.positions.tolist() == [[1, 4, expected]]
    assert fused.sizes.tolist() == [[1, 1, 3]]
    assert fused.absorbed.tolist() == [[False, True, False]]


def test_bits_follow_two_thresholds() -> None:
    bits = choose_bits(jnp.asarray([0.0, 0.5, 1.0, 2.0]), jnp.float32(0.5), jnp.float32(1.5))
    assert bits.tolist() == [2, 4, 4, 8]
    assert (choose_bits(jnp.zeros(2), jnp.float32(0), jnp.float32(0)) == 8).all()
    active = jnp.asarray([True, False, True, False])
    assert dict(zip(BITS, precisions_in_use(bits, active).tolist(), strict=True)) == {8: False, 4: True, 2: True}
