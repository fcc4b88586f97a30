"""From logits to the next token, against the plain mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.engine.sampling import log_normaliser, most_likely
from tests.arrays import exact, normal


@pytest.mark.parametrize("rows", [1, 3])
def test_the_most_likely_is_the_first_of_equals_and_the_normaliser_that_of_softmax(rows: int) -> None:
    logits = normal(rows, 300).at[:, jnp.asarray([41, 17, 250])].set(9.0)
    assert jax.jit(most_likely)(logits).tolist() == [17] * rows
    np.testing.assert_allclose(jax.jit(log_normaliser)(logits), np.log(np.exp(exact(logits)).sum(axis=-1)), rtol=1e-6)
