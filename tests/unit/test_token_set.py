"""Sets of token ids on the device."""

import jax.numpy as jnp

from qs_jax.token_set import is_in, token_set


def test_padding_is_no_token_of_the_set() -> None:
    assert is_in(jnp.asarray([[3, 5, 0]]), token_set([5])).tolist() == [[False, True, False]]
    assert not is_in(jnp.asarray([0, 1]), token_set([])).any()


def test_sets_of_up_to_eight_ids_have_one_shape() -> None:
    assert [token_set(range(count)).shape[0] for count in (0, 1, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 24]
