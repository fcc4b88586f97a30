"""Slots of the cache: who takes which, in every dtype, and how many there are."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.typing import DTypeLike

from qs_jax.cache import LayerCache, allocate, append, bucket, grow, segment
from qs_jax.errors import StateError
from tests.arrays import DTYPES, normal
from tests.tiny import tiny_model

ROWS, TOKENS, CAPACITY = 2, 3, 5
CONFIG = replace(tiny_model("llama").config, num_key_value_heads=2, head_dim=4)
append_jit = jax.jit(append)


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


def contents(layer: LayerCache) -> list[list[tuple[Any, ...]]]:
    """What each row holds, slot by slot."""
    return [
        [
            (layer.keys[row, :, slot].tolist(), layer.values[row, :, slot].tolist(), int(layer.positions[row, slot]))
            + (() if layer.bias is None else (float(layer.bias[row, slot]),))
            for slot in range(length)
        ]
        for row, length in enumerate(layer.lengths.tolist())
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@settings(max_examples=25)
@given(data=st.data())
def test_rows_are_lists_that_take_what_is_written_until_they_are_full(
    dtype: Any, biased: bool, data: st.DataObject
) -> None:
    """Against lists: whatever is written when, in whatever pieces, and grown between them or not."""
    layer = allocate(CONFIG, ROWS, CAPACITY, jnp.dtype(dtype), biased=biased)
    expected: list[list[tuple[Any, ...]]] = [[] for _ in range(ROWS)]
    pieces = data.draw(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), max_size=5))
    for number, piece in enumerate(pieces):
        writes = np.reshape(piece, (ROWS, TOKENS))
        k, v = (np.asarray(normal(ROWS, TOKENS, 2, 4, dtype=dtype)) for _ in "kv")
        positions = np.arange(ROWS * TOKENS, dtype=np.int32).reshape(ROWS, TOKENS) + 10 * number
        bias = np.asarray(normal(ROWS, TOKENS)) if biased and number % 2 else None
        layer = append_jit(layer, k, v, positions, writes, bias)
        for row, token in np.argwhere(writes):
            if len(expected[row]) < layer.capacity:
                added = (0.0 if bias is None else float(bias[row, token]),) if biased else ()
                expected[row].append(
                    (k[row, token].tolist(), v[row, token].tolist(), int(positions[row, token]), *added)
                )
        assert contents(layer) == expected
        if number == 2 and data.draw(st.booleans()):
            (layer,) = grow((layer,), [CAPACITY + 3])
            assert contents(layer) == expected
    assert layer.lengths.tolist() == [len(row) for row in expected]


def test_later_tokens_see_every_filled_slot_and_no_other() -> None:
    layer = replace(allocate(CONFIG, 3, 4, jnp.dtype("float32")), lengths=jnp.asarray([0, 3, 4], jnp.int32))
    seen = segment(layer).visible
    assert seen.shape == (3, 1, 4)
    assert seen[:, 0].tolist() == [[False] * 4, [True, True, True, False], [True] * 4]


@given(
    length=st.integers(0, 5000),
    limit=st.integers(1, 5000),
    smallest=st.sampled_from((16, 64)),
    per_octave=st.sampled_from((1, 2, 4)),
)
def test_a_bucket_holds_what_is_asked_and_wastes_no_more_than_its_step(
    length: int, limit: int, smallest: int, per_octave: int
) -> None:
    size = bucket(length, limit, smallest=smallest, per_octave=per_octave)
    assert min(length, limit) <= size <= limit
    if size < limit:
        assert smallest <= size
        assert size <= max(smallest, length * (1 + 1 / per_octave))
        assert bucket(size, limit, smallest=smallest, per_octave=per_octave) == size


@pytest.mark.parametrize("per_octave", [1, 2, 4])
def test_an_octave_has_so_many_buckets(per_octave: int) -> None:
    sizes = sorted({bucket(length, 9999, smallest=16, per_octave=per_octave) for length in range(129, 257)})
    assert sizes == [128 + 128 * n // per_octave for n in range(1, per_octave + 1)]


def sound() -> LayerCache:
    """A cache with three slots filled in one row, and one in the other."""
    layer = allocate(CONFIG, ROWS, CAPACITY, jnp.dtype("bfloat16"), biased=True)
    positions = jnp.asarray([[4, 5, 6], [4, 5, 6]], jnp.int32)
    writes = jnp.asarray([[True, True, True], [False, True, False]])
    k = normal(ROWS, TOKENS, 2, 4, dtype=jnp.bfloat16)
    return append_jit(layer, k, k, positions, writes)


BROKEN = {
    "more than there is room for": (lambda c: {"lengths": c.lengths + CAPACITY}, "of 5 slots"),
    "fewer than none": (lambda c: {"lengths": c.lengths - 2}, "of 5 slots"),
    "a row too few": (lambda c: {"lengths": c.lengths[:1]}, "for 2 rows"),
    "values of other heads": (lambda c: {"values": c.values[:, :1]}, "values are"),
    "positions of another width": (lambda c: {"positions": c.positions[:, 1:]}, "positions do not fit"),
    "bias of another width": (lambda c: {"bias": c.bias[:, 1:]}, "bias do not fit"),
    "a key": (lambda c: {"keys": c.keys.at[1, 0, 0, 2].set(jnp.nan)}, "keys are not finite"),
    "a value": (lambda c: {"values": c.values.at[0, 0, 2, 2].set(jnp.inf)}, "values are not finite"),
    "a bias": (lambda c: {"bias": c.bias.at[0, 2].set(-jnp.inf)}, "bias is not finite"),
    "before the text": (lambda c: {"positions": c.positions.at[1, 0].set(-1)}, "negative position"),
    "out of order": (lambda c: {"positions": c.positions.at[0, 1].set(6)}, "do not rise"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_cache_is_noticed(name: str) -> None:
    change, complaint = BROKEN[name]
    layer = sound()
    with pytest.raises(StateError, match=complaint):
        replace(layer, **change(layer)).validate(rising=True)


def test_what_lies_beyond_the_filled_slots_may_be_anything() -> None:
    layer = sound()
    layer.validate(rising=True)
    beyond = replace(layer, keys=layer.keys.at[1, :, 1:].set(jnp.nan), positions=layer.positions.at[1, 1:].set(-7))
    beyond.validate(rising=True)
    replace(layer, positions=layer.positions.at[0, 1].set(9)).validate()
