"""Nested codes: every one of the 256 comes back, and its top bits are the slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.choices import BITS
from qs_jax.matryoshka.codec import pack, slice_of, unpack

GROUP_SIZES = (16, 64, 128)


def all_codes(group_size: int) -> jax.Array:
    """Every code at every place of a group: outputs run through the 256 codes."""
    places = np.arange(group_size)[:, None] + np.arange(256)
    return jnp.asarray(np.stack([places % 256, (7 * places) % 256]), jnp.uint8)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_all_codes_come_back_and_their_top_bits_are_the_slices(group_size: int, bits: int) -> None:
    codes = all_codes(group_size)
    np.testing.assert_array_equal(unpack(pack(codes), bits), np.asarray(codes) >> (8 - bits))
    np.testing.assert_array_equal(slice_of(codes, bits), np.asarray(codes) >> (8 - bits))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_planes_are_those_of_a_plain_loop(group_size: int) -> None:
    """A numpy oracle that places one code at a time, by the layout that the codec documents."""
    codes = all_codes(group_size)
    high, middle, low = (np.asarray(plane) for plane in pack(codes))
    expected = [np.zeros_like(plane) for plane in (high, middle, low)]
    for place in range(group_size):
        block, i = divmod(place, 8)
        code = np.asarray(codes)[:, place].astype(np.uint16)
        expected[0][:, block] |= (code >> 6) << (2 * i)
        expected[1][:, block] |= (code >> 4 & 3) << (2 * i)
        expected[2][:, 2 * block + i % 2] |= (code & 15) << (4 * (i // 2))
    for found, wanted in zip((high, middle, low), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_group_that_words_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        pack(jnp.zeros((1, 20, 3), jnp.uint8))
