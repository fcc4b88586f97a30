"""Kernels that carry nested codes, read as documented."""

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.choices import BITS
from qs_jax.matryoshka.kernel import nested_kernel

rng = np.random.default_rng(0)


@pytest.mark.parametrize("bend", [0.0, 0.3])
@pytest.mark.parametrize("bits", BITS)
def test_weights_are_read_as_documented(bits: int, bend: float) -> None:
    codes = jnp.asarray(rng.integers(0, 256, (2, 32, 5)), jnp.uint8)
    scales = jnp.asarray(rng.uniform(0.5, 2, (3, 2, 5)), jnp.bfloat16)
    offsets = jnp.asarray(rng.integers(-128, 128, (3, 2, 5)), jnp.int8)
    kernel = nested_kernel(codes, scales, offsets, inputs=50, bend=(bend,) * 3)
    slice_ = BITS.index(bits)
    t = (np.asarray(codes) >> (8 - bits)).astype(np.float64) - (2**bits - 1) / 2
    level = t + bend * t**3 / (2**bits / 2) ** 2
    offset = np.asarray(offsets[slice_], np.float64) * 2**bits / 256
    expected = (level + offset[:, None]) * np.asarray(scales[slice_], np.float64)[:, None]
    np.testing.assert_allclose(kernel.dequantise(bits), expected.reshape(64, 5).T[:, :50], rtol=1e-5, atol=1e-5)
