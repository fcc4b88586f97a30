"""Groups of prompt tokens between layers: what is promised of them is checked, and a broken group noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.binding import dense
from qs_jax.cache import allocate
from qs_jax.engine.stage import Decision, Staged, Tokens, regroup, run_stage
from qs_jax.errors import StateError
from tests.arrays import normal
from tests.tiny import tiny_model

_LAST = jnp.asarray([[False, False, True], [False, False, False]])


def sound() -> Tokens:
    """Two rows: places 0, 3 (which stands for 2 and 3) and 4, which is read; and place 1 alone, behind which there is
    padding."""
    return Tokens(
        hidden_states=normal(2, 3, 4),
        ids=jnp.zeros((2, 3), jnp.int32),
        origins=jnp.asarray([[0, 3, 4], [1, 9, 9]], jnp.int32),
        positions=jnp.asarray([[0, 2, 4], [1, 0, 0]], jnp.int32),
        sizes=jnp.asarray([[1, 2, 1], [1, 0, 7]], jnp.int32),
        valid=jnp.asarray([[True, True, True], [True, False, False]]),
        protected=_LAST,
        read=_LAST,
    )


BROKEN = {
    "a token too few": (lambda t: {"ids": t.ids[:, :2]}, "tokens differ"),
    "padding in front": (lambda t: {"valid": t.valid.at[0, 0].set(False)}, "padding comes before"),
    "a state": (lambda t: {"hidden_states": t.hidden_states.at[1, 0, 2].set(jnp.nan)}, "not finite"),
    "nothing": (lambda t: {"sizes": t.sizes.at[0, 2].set(0)}, "stands for none"),
    "another's members": (lambda t: {"sizes": t.sizes.at[0, 1].set(4)}, "stands for more"),
    "out of order": (lambda t: {"origins": t.origins.at[0, 1].set(7)}, "order of the text"),
    "the position of another": (lambda t: {"positions": t.positions.at[0, 1].set(0)}, "among a token's own"),
    "a position to come": (lambda t: {"positions": t.positions.at[1, 0].set(2)}, "among a token's own"),
    "read twice": (lambda t: {"read": t.read.at[0, 0].set(True)}, "more than one token"),
    "read, and free to halt": (lambda t: {"read": t.read.at[1, 0].set(True)}, "not protected"),
}
OF_A_RESTING_GROUP = {
    "a token twice": (lambda t: {"origins": t.origins.at[0, 1].set(4)}, "there twice"),
    "more than there is": (lambda t: {"sizes": t.sizes.at[0, 1].set(5)}, "stands for more"),
    "one that is read": (lambda t: {"sizes": jnp.ones_like(t.sizes)}, "is read rests"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_group_is_noticed(name: str) -> None:
    change, complaint = BROKEN[name]
    with pytest.raises(StateError, match=complaint):
        sound()._replace(**change(sound())).validate(active=True)


@pytest.mark.parametrize("name", OF_A_RESTING_GROUP)
def test_a_broken_resting_group_is_noticed(name: str) -> None:
    change, complaint = OF_A_RESTING_GROUP[name]
    with pytest.raises(StateError, match=complaint):
        sound()._replace(**change(sound())).validate(active=False)


def test_tokens_that_go_on_and_tokens_that_rest_are_gathered_in_their_order() -> None:
    """Of three tokens the middle one halts; later the first, which comes after it among those that rest."""
    nobody, signal = jnp.zeros((2, 3), bool), jnp.zeros((2, 3))
    active = sound()
    active.validate(active=True)
    active, resting = regroup(
        active, None, Decision(nobody.at[0, 1].set(True), nobody, signal), halting=True, width=3, rest_width=1
    )
    assert resting is not None
    assert active.origins[0, :2].tolist() == [0, 4]
    assert active.valid.tolist() == [[True, True, False], [True, False, False]]
    assert (resting.origins[0].tolist(), resting.valid.tolist()) == ([3], [[True], [False]])
    decision = Decision(nobody.at[0, 0].set(True), nobody, signal)
    active, resting = regroup(active, resting, decision, halting=True, width=2, rest_width=2)
    assert resting is not None
    assert active.valid.tolist() == [[True, False], [True, False]]
    assert active.origins[:, 0].tolist() == [4, 1]
    assert resting.origins[0].tolist() == [3, 0]
    active.validate(active=True)
    resting.validate(active=False)
    with pytest.raises(StateError, match="order of the text"):
        resting.validate(active=True)


def test_an_absorbed_token_goes_nowhere() -> None:
    nobody = jnp.zeros((2, 3), bool)
    decision = Decision(nobody, nobody.at[0, 1].set(True), jnp.zeros((2, 3)))
    active, resting = regroup(sound(), None, decision, halting=False, width=2, rest_width=0)
    assert resting is None
    assert active.origins[0].tolist() == [0, 4]


def last_layer(active: Tokens, given: jax.Array | None) -> Staged:
    network = tiny_model("llama").network
    layer = allocate(network.config, 2, 16, jnp.dtype("float32"))
    return run_stage(network, active, None, (layer,), given, dense(network.config), start=1, stop=2)


def test_logits_are_those_of_what_is_read_and_stay_where_nothing_is() -> None:
    active = sound()._replace(hidden_states=normal(2, 3, 32))
    assert (active.valid & active.read).any(axis=1).tolist() == [True, False]
    first = last_layer(active, None).logits
    given = jnp.ones((2, tiny_model("llama").config.vocab_size))
    later = last_layer(active, given).logits
    assert first is not None
    assert later is not None
    network = tiny_model("llama").network
    output = network.blocks[1].run(active.hidden_states, active.positions, ())
    np.testing.assert_allclose(first[0], network.head(output.hidden_states[0, 2]), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(later[0], first[0])
    assert (later[1] == 1).all()


def test_a_piece_of_which_nothing_goes_on_stays_finite() -> None:
    """Every token of a prompt's first piece may halt, and drop: padding then has nothing before it to see."""
    active = sound()._replace(hidden_states=normal(2, 3, 32), valid=jnp.zeros((2, 3), bool))
    staged = last_layer(active, None)
    assert staged.decision is None
    assert staged.active is None
    assert staged.logits is not None
    assert jnp.isfinite(staged.logits).all()
    assert not staged.cache[0].lengths.any()
