"""The state of decoding: what is promised of it is checked, and a broken one noticed."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qs_jax.cache import allocate, append
from qs_jax.engine.decode import DecodeState
from qs_jax.errors import StateError
from tests.arrays import normal
from tests.tiny import tiny_model

CONFIG = replace(tiny_model("llama").config, num_hidden_layers=2, num_key_value_heads=2, head_dim=4)
LIMIT = CONFIG.max_position_embeddings


def sound() -> DecodeState:
    """Two rows that have run three and one of their tokens; the second is done."""
    kv, positions = normal(2, 3, 2, 4), jnp.asarray([[0, 1, 2], [0, 1, 2]], jnp.int32)
    writes = jnp.asarray([[True, True, True], [True, False, False]])
    layer = append(allocate(CONFIG, 2, 8, jnp.dtype("float32")), kv, kv, positions, writes)
    return DecodeState(
        tokens=jnp.asarray([5, 96], jnp.int32),
        positions=jnp.asarray([3, 1], jnp.int32),
        cache=(layer, layer),
        done=jnp.asarray([False, True]),
        remaining=jnp.asarray([4, 0], jnp.int32),
        noise=jax.random.split(jax.random.key(0), 2),
        seen=jnp.zeros((2, 0), bool),
        entropy=jnp.asarray([1.5, jnp.nan], jnp.float32),
    )


def with_layer(state: DecodeState, **changes: Any) -> dict[str, Any]:
    return {"cache": (state.cache[0], replace(state.cache[1], **changes))}


BROKEN = {
    "a row too many": (lambda s: {"entropy": jnp.zeros(3)}, "rows differ"),
    "a key too few": (lambda s: {"noise": s.noise[:1]}, "rows differ"),
    "half a table": (lambda s: {"seen": jnp.zeros((2, 50), bool)}, "seen is"),
    "no such token": (lambda s: {"tokens": s.tokens + 1}, "of a vocabulary of 97"),
    "before the text": (lambda s: {"positions": s.positions - 2}, "positions are"),
    "beyond the context": (lambda s: {"positions": s.positions.at[0].set(LIMIT)}, "positions are"),
    "on and on": (lambda s: {"remaining": s.remaining.at[0].set(0)}, "a row goes on"),
    "no entropy": (lambda s: {"entropy": s.entropy.at[0].set(jnp.inf)}, "entropy is"),
    "a layer too few": (lambda s: {"cache": s.cache[:1]}, "1 layers have a cache"),
    "a broken layer": (lambda s: with_layer(s, lengths=s.cache[1].lengths + 9), "of 8 slots"),
    "a layer of other rows": (
        lambda s: {"cache": (s.cache[0], jax.tree.map(lambda leaf: leaf[:1], s.cache[1]))},
        "layer 1 has 1 rows",
    ),
    "more slots than tokens": (lambda s: {"positions": s.positions.at[0].set(2)}, "more slots"),
    "a token of the future": (lambda s: with_layer(s, positions=s.cache[1].positions.at[0, 2].set(3)), "not run yet"),
    "out of order": (lambda s: with_layer(s, positions=s.cache[1].positions.at[0, 1].set(0)), "do not rise"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_noticed(name: str) -> None:
    change, complaint = BROKEN[name]
    state = sound()
    with pytest.raises(StateError, match=complaint):
        replace(state, **change(state)).validate(CONFIG, rising=True)


def test_a_sound_state_passes_and_a_row_that_is_done_may_be_at_its_end() -> None:
    state = sound()
    state.validate(CONFIG, rising=True)
    replace(state, positions=jnp.asarray([3, LIMIT - 1], jnp.int32), seen=jnp.ones((2, 97), bool)).validate(CONFIG)
