"""Products in every dtype and for every number of rows, against the plain mathematics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from qs_jax.models.layers import project
from tests.arrays import DTYPES, exact, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 65])
@pytest.mark.parametrize("outputs", [24, 7])
def test_a_projection_sums_in_float32(dtype: DTypeLike, rows: int, outputs: int) -> None:
    x, kernel = normal(rows, 96, dtype=dtype), normal(outputs, 96, dtype=dtype)
    expected = exact(x) @ exact(kernel).T
    unrounded = jax.jit(project, static_argnums=2)(x, kernel, jnp.float32)
    np.testing.assert_allclose(unrounded, expected, atol=2e-5)
    assert unrounded.shape == (rows, outputs)
    own = jax.jit(project)(x, kernel)
    assert own.dtype == dtype
    np.testing.assert_array_equal(own, unrounded.astype(dtype))
