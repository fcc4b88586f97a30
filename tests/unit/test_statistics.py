"""Statistics against closed forms and against what they promise."""

import math

import numpy as np
import pytest
from scipy import stats

from qs_jax.evaluation.statistics import (
    bits_per_byte,
    excess_p_value,
    increase,
    increase_interval,
    linearised_increase,
    perplexity,
    standard_error,
)


def draws(seed: int, windows: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A dense model's and a policy's nll per window, strongly correlated, the policy's mean above by `shift`."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(2.0, 0.5, windows)
    return dense + rng.normal(shift, 0.05, windows), dense


def test_a_uniform_guess_has_the_perplexity_of_its_choices() -> None:
    nll = np.full(5, math.log(97))
    assert perplexity(nll) == pytest.approx(97)
    assert standard_error(nll) == pytest.approx(0, abs=1e-9)
    assert standard_error(nll[:1]) is None
    assert bits_per_byte(np.full(3, math.log(2)), tokens=8, scored_bytes=12) == pytest.approx(2)
    assert bits_per_byte(nll, 8, 0) is None


def test_the_standard_error_is_the_delta_methods() -> None:
    nll, _ = draws(0, 400)
    assert standard_error(nll) == pytest.approx(math.exp(nll.mean()) * nll.std(ddof=1) / 20)


def test_the_linearised_increase_has_the_right_mean_and_spread() -> None:
    nll, dense = draws(1, 500, 0.1)
    values = linearised_increase(nll, dense)
    assert values.mean() == pytest.approx(increase(nll, dense))
    estimates = [increase(*draws(seed, 500, 0.1)) for seed in range(300)]
    assert stats.sem(values) == pytest.approx(np.std(estimates), rel=0.2)


def test_the_paired_interval_is_narrow_and_covers() -> None:
    nll, dense = draws(2, 300, 0.1)
    interval = increase_interval(nll, dense)
    assert interval is not None
    error = stats.sem(linearised_increase(nll, dense))
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval[1] - interval[0] < 2 * (standard_error(nll) or 0)
    true = math.exp(2.1) - math.exp(2.0)
    covered = 0
    for seed in range(100):
        low, high = increase_interval(*draws(1000 + seed, 40, 0.1)) or (0.0, 0.0)
        covered += low <= true <= high
    assert 85 <= covered <= 100
    assert increase_interval(nll[:1], dense[:1]) is None
    assert increase_interval(nll, nll) == (0, 0)


def test_the_p_value_is_uniform_where_the_truth_is_at_the_budget() -> None:
    budget = math.exp(2.02) - math.exp(2.0)
    p = [excess_p_value(*draws(seed, 40, 0.02), budget=budget) for seed in range(600)]
    for level in (0.05, 0.1, 0.5):
        assert np.mean(np.asarray(p) < level) == pytest.approx(level, abs=0.06)
    nll, dense = draws(0, 40, 0.02)
    assert excess_p_value(nll, dense, 10.0) < 1e-6 < 0.99 < excess_p_value(nll, dense, -1.0)
    assert excess_p_value(dense, dense, 0.1) == 0
    assert excess_p_value(dense, dense, -0.1) == 1
