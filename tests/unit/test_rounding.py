"""Rounding to nearest: how far off it may be."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.fitting.rounding import relative_errors, round_to_nearest

rng = np.random.default_rng(0)


def test_rounding_errs_by_half_a_step_and_never_more_with_more_bits() -> None:
    weights = jnp.asarray(rng.standard_t(5, (64, 256)), jnp.float32)
    kernel = round_to_nearest(weights)
    step = np.repeat(np.asarray(kernel.scales[0], np.float32), 64, axis=0).T
    assert (np.abs(kernel.dequantise(8) - weights) <= step * 1.01).all()
    assert np.mean(np.abs(kernel.dequantise(8) - weights) <= step * 0.501) > 0.98
    errors = relative_errors(weights, kernel)
    assert errors["8"] < 1e-4 < errors["4"] < 0.02 < errors["2"] < 0.5


@pytest.mark.parametrize("weights", [np.zeros((4, 70)), np.full((4, 70), -3.0), np.full((4, 70), 1e-30)])
def test_groups_without_spread_are_exact(weights: np.ndarray) -> None:
    kernel = round_to_nearest(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(kernel.dequantise(8), weights, rtol=0.01, atol=1e-37)
