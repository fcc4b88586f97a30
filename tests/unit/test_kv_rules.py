"""What each K/V rule leaves of a halted token, on a tiny model."""

from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.kv_rules import KV_RULES, KvRule, Means
from qs_jax.adaptive.policy import Halting, KvRuleName, Policy
from tests.tiny import tiny_model, with_random_direct_lens

STATES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 32)), jnp.float32)
PLACES = jnp.zeros((2, 1), jnp.int32)
STOP = Halting(thresholds=1.0, layers=(1,))
RULES = {name: make(Policy(kv_rule=name, prompt_halting=STOP)) for name, make in KV_RULES.items()}


def test_every_name_that_a_policy_may_use_is_a_rule() -> None:
    assert set(KV_RULES) == set(get_args(KvRuleName))


@pytest.mark.parametrize("name", KV_RULES)
def test_what_it_leaves_is_shaped_like_keys_and_values(name: KvRuleName) -> None:
    model = with_random_direct_lens(tiny_model("llama"), stop=1).network
    block = model.blocks[1]
    resting = RULES[name].settle(model, 1, STATES, (STATES,))
    k, v = RULES[name].kv(model, 1, block, resting, PLACES)
    projected = block.kv(STATES, PLACES)
    assert (k.shape, v.shape, k.dtype) == (projected[0].shape, projected[1].shape, projected[0].dtype)
    projects = RULES[name].kv_flops(Costs.of(model), 1) > 0
    assert bool(k.any()) == projects


def test_zero_blanks_what_resting_tokens_left_and_nothing_else() -> None:
    ones = jnp.ones((2, 1, 4, 8))
    k, v = RULES["zero"].blank(ones, ones, jnp.asarray([[True], [False]]))
    assert not k[0].any()
    assert (v[1] == 1).all()
    same, _ = RULES["frozen"].blank(ones, ones, jnp.asarray([[True], [False]]))
    assert same is ones


def test_rules_say_what_they_need() -> None:
    def lacking(has: Means) -> set[str]:
        return {name for name, rule in RULES.items() if rule.lacks(has)}

    assert lacking(Means()) == {"affine", "direct", "shallow"}
    assert lacking(Means(planes=True, lens=True, direct_stops=(1, 2))) == set()
    assert "has one for 2, 4; fit one with qs-jax lens --direct 1" in (
        RULES["direct"].lacks(Means(direct_stops=(2, 4))) or ""
    )


def test_rules_are_static_parts_of_programs() -> None:
    assert all(make(Policy()) == make(Policy()) and hash(make(Policy())) is not None for make in KV_RULES.values())
    assert RULES["shallow"] != KV_RULES["shallow"](Policy(shallow_bits=2))
    assert isinstance(RULES["affine"], KvRule)


def test_shallow_lowers_the_bits_of_halted_rows() -> None:
    bits, halted = jnp.asarray([8, 8, 2]), jnp.asarray([True, False, True])
    assert RULES["shallow"].bits(bits, halted).tolist() == [4, 8, 2]
    assert RULES["drop"].bits(bits, halted).tolist() == [8, 8, 2]
