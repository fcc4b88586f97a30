"""Sets of token ids on the device."""

import jax.numpy as jnp
import pytest

from qs_jax.token_set import is_in, token_set


@pytest.mark.parametrize(("count", "slots"), [(0, 8), (1, 8), (8, 8), (9, 16)])
def test_another_set_has_the_same_shape_and_padding_is_no_token(count: int, slots: int) -> None:
    ids = token_set(range(count))
    assert ids.shape == (slots,)
    assert is_in(jnp.arange(20, dtype=jnp.int32), ids).tolist() == [token < count for token in range(20)]


def test_tokens_may_have_any_shape() -> None:
    assert is_in(jnp.asarray([[3, 5, 0]]), token_set([5])).tolist() == [[False, True, False]]
