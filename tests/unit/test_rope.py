"""Rotary positions against complex numbers."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.config import RopeConfig
from qs_jax.models.rope import inverse_frequencies, rotate
from tests.arrays import DTYPES, exact, normal

HEAD_DIM = 16
PLAIN = RopeConfig(1e4)
LLAMA3 = replace(
    PLAIN,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_of_channels_is_a_complex_number_that_turns(dtype: Any) -> None:
    """The angle is that of the position, whatever the row and the head."""
    vectors, positions = normal(2, 3, 4, HEAD_DIM, dtype=dtype), np.asarray([[0, 1, 511], [7, 7, 3]], np.int32)
    frequencies = inverse_frequencies(PLAIN, HEAD_DIM)
    found = jax.jit(lambda v, p: rotate(v, p, frequencies))(vectors, jnp.asarray(positions))
    assert found.dtype == dtype
    half = HEAD_DIM // 2
    numbers = exact(vectors)[..., :half] + 1j * exact(vectors)[..., half:]
    turned = numbers * np.exp(1j * positions[..., None, None] * frequencies)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    # angles are float32: 511 radians are known to 3e-5
    atol = max(2e-4, 4 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(exact(found), expected, atol=atol)


def test_products_of_rotated_vectors_depend_on_their_distance_alone() -> None:
    q, k = normal(1, 1, 1, HEAD_DIM), normal(1, 1, 1, HEAD_DIM)
    frequencies = inverse_frequencies(PLAIN, HEAD_DIM)

    def product(of_q: int, of_k: int) -> float:
        at = [jnp.asarray([[position]], jnp.int32) for position in (of_q, of_k)]
        return float((rotate(q, at[0], frequencies) * rotate(k, at[1], frequencies)).sum())

    assert product(105, 100) == pytest.approx(product(5, 0), abs=1e-4)
    assert product(106, 100) != pytest.approx(product(5, 0), abs=1e-3)


def test_frequencies_fall_by_one_ratio_from_one_radian() -> None:
    frequencies = inverse_frequencies(PLAIN, HEAD_DIM)
    assert frequencies[0] == 1
    np.testing.assert_allclose(frequencies[1:] / frequencies[:-1], PLAIN.theta ** (-2 / HEAD_DIM))
    stretched = inverse_frequencies(replace(PLAIN, rope_type="linear", factor=4.0), HEAD_DIM)
    np.testing.assert_allclose(stretched, frequencies / 4)


def test_llama3_keeps_short_waves_stretches_long_ones_and_blends_between() -> None:
    """More than 4 turns within the original context are kept, fewer than 1 stretched."""
    plain, scaled = inverse_frequencies(PLAIN, HEAD_DIM), inverse_frequencies(LLAMA3, HEAD_DIM)
    turns = 64 * plain / (2 * np.pi)
    short, long = turns > 4, turns < 1
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = ~short & ~long
    assert min(short.sum(), long.sum(), between.sum()) > 0
    assert ((plain / 8 < scaled) & (scaled < plain))[between].all()
