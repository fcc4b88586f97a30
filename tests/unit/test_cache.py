"""Slots of the cache: who takes which, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from qs_jax.cache import LayerCache, append
from tests.arrays import DTYPES, normal


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2])
def test_tokens_take_the_next_slots_and_those_without_change_nothing(dtype: DTypeLike, tokens: int) -> None:
    old = normal(3, 2, 4, 8, dtype=dtype)
    lengths = jnp.asarray([0, 2, 4], jnp.int32)
    layer = LayerCache(old, -old, jnp.zeros((3, 4), jnp.int32), lengths)
    k = normal(3, tokens, 2, 8, dtype=dtype)
    writes = jnp.asarray([[True], [False], [True]]).repeat(tokens, axis=1)
    positions = jnp.arange(7, 7 + tokens, dtype=jnp.int32)[None].repeat(3, axis=0)
    new = jax.jit(append)(layer, k, -k, positions, writes)
    expected = np.array(old)
    expected[0, :, :tokens] = np.asarray(k[0]).swapaxes(0, 1)  # row 1 writes nothing, row 2 is full
    np.testing.assert_array_equal(new.keys, expected)
    np.testing.assert_array_equal(new.values, -expected)
    assert new.lengths.tolist() == [tokens, 2, 4]
    assert new.positions[0, :tokens].tolist() == positions[0].tolist()
