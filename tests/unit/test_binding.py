"""What binding to a model makes of a policy, and what it refuses."""

import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from qs_jax.adaptive.binding import BoundPolicy, bind, dense
from qs_jax.adaptive.kv_rules import Means
from qs_jax.adaptive.policy import Fusion, Halting, KvRuleName, Policy, Precision
from qs_jax.config import ModelConfig
from qs_jax.errors import PolicyError
from tests.tiny import tiny_model


def config_of(depth: int) -> ModelConfig:
    return replace(tiny_model("llama").config, num_hidden_layers=depth)


def bound(policy: Policy, depth: int = 8, *, planes: bool = False, special_ids: tuple[int, ...] = ()) -> BoundPolicy:
    return bind(policy, config_of(depth), Means(planes=planes), special_ids=special_ids)


def test_off_binds_to_the_dense_model() -> None:
    assert dense(config_of(8)).is_off
    assert jax.tree.structure(dense(config_of(8))) == jax.tree.structure(bound(Policy.off()))
    assert bound(Policy.off()).stages == bound(Policy.off()).spans == ((0, 8),)


@pytest.mark.parametrize(
    ("start", "step", "depth", "expected"),
    [
        (0.5, 1, 8, (4, 5, 6, 7)),
        (0.5, 2, 8, (4, 6)),
        (0.75, 1000, 8, (6,)),
        (0.0, 3, 8, (1, 4, 7)),
        (1.0, 1, 8, (7,)),
        (0.5, 1, 2, (1,)),
        (0.5, 1, 1, ()),
    ],
)
def test_layers_left_open_follow_the_depth(start: float, step: int, depth: int, expected: tuple[int, ...]) -> None:
    halting = bound(Policy(decode_halting=Halting(start=start, step=step)), depth).decode_halting
    assert halting is not None
    assert halting.layers == expected


def test_stages_and_spans_are_cut_where_something_may_happen() -> None:
    policy = Policy(
        prompt_halting=Halting(layers=(2, 5)),
        decode_halting=Halting(layers=(3,)),
        fusion=Fusion(layers=(5, 6)),
        precision=Precision("entropy", layer=4),
    )
    fitted = bound(policy, planes=True)
    assert fitted.stages == ((0, 2), (2, 5), (5, 6), (6, 8))
    assert fitted.spans == ((0, 3), (3, 4), (4, 8))


def test_thresholds_stand_at_their_layers_and_nowhere_else() -> None:
    policy = Policy(
        prompt_halting=Halting(thresholds=(0.1, 0.2), layers=(2, 5)),
        fusion=Fusion(thresholds=math.inf, layers=(3,)),
        decode_halting=Halting(entropy_below=1.5),
    )
    fitted = bound(policy)
    assert fitted.prompt_halting is not None
    assert fitted.decode_halting is not None
    assert fitted.fusion is not None
    np.testing.assert_allclose(fitted.prompt_halting.thresholds, [0, 0, 0.1, 0, 0, 0.2, 0, 0, 0])
    np.testing.assert_array_equal(fitted.fusion.thresholds, [0, 0, 0, np.inf, 0, 0, 0, 0, 0])
    assert not fitted.decode_halting.thresholds.any()
    entropies = (float(part.entropy_below) for part in (fitted.decode_halting, fitted.prompt_halting))
    assert tuple(entropies) == (1.5, math.inf)


def test_thresholds_are_leaves_and_all_else_is_static() -> None:
    policy = Policy.paper()
    other = replace(
        policy,
        prompt_halting=Halting("raw_drift", 0.3, start=0.25, entropy_below=2.0),
        fusion=Fusion("l2", 0.1, start=0.25, step=1),
        precision=Precision("entropy", two_below=0.5, four_below=0.7),
    )
    one, another = (bound(each, planes=True) for each in (policy, other))
    assert jax.tree.structure(one) == jax.tree.structure(another)
    assert hash(jax.tree.structure(one)) == hash(jax.tree.structure(another))
    elsewhere = replace(policy, kv_rule="drop")
    assert jax.tree.structure(bound(elsewhere, planes=True)) != jax.tree.structure(one)


def test_special_tokens_are_padded_to_slots() -> None:
    ids = bound(Policy.off(), special_ids=(9, 2, 9)).protection.special_ids
    assert ids.tolist() == [2, 9, -1, -1, -1, -1, -1, -1]
    assert bound(Policy.off(), special_ids=tuple(range(9))).protection.special_ids.shape == (16,)
    unprotected = bound(Policy(protect_special=False), special_ids=(9, 2))
    assert (unprotected.protection.special_ids == -1).all()


def test_precision_needs_planes_and_says_so_or_is_left_out() -> None:
    precise = Policy(precision=Precision(four_below=1.0))
    assert bound(precise).precision is None
    assert bound(precise).is_off
    precision = bound(Policy(precision=Precision(pinned=(0, -1))), planes=True).precision
    assert precision is not None
    assert [precision.adapts(layer) for layer in range(8)] == [False] * 4 + [True] * 3 + [False]
    assert not bound(Policy(kv_rule="shallow")).adapts_bits
    assert bound(Policy(kv_rule="shallow", decode_halting=Halting()), planes=True).adapts_bits


@pytest.mark.parametrize(
    ("policy", "planes", "message"),
    [
        (Policy(prompt_halting=Halting(layers=(8,))), False, "prompt_halting.layers reach 8, with 8 layers"),
        (Policy(fusion=Fusion(layers=(2, 9))), False, "fusion.layers reach 9"),
        (Policy(decode_halting=Halting(thresholds=(0.1, 0.2), layers=(3,))), False, "has 2 thresholds for 1 layers"),
        (Policy(kv_rule="shallow", prompt_halting=Halting()), False, "shallow needs Matryoshka weights"),
        (Policy(precision=Precision(layer=8)), True, "precision names layers beyond"),
        (Policy(precision=Precision(pinned=(-9,))), True, "precision names layers beyond"),
        (Policy(precision=Precision("entropy", layer=0)), True, "needs at least one layer"),
    ],
)
def test_what_the_model_has_no_means_for_is_refused(policy: Policy, planes: bool, message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)) as caught:
        bound(policy, planes=planes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kv_rule", ["frozen", "affine", "shallow", "zero", "drop"])
def test_a_share_of_the_depth_binds_no_stop_of_the_prompt_that_would_save_nothing(kv_rule: KvRuleName) -> None:
    """After the last layer but one, where a prompt token leaves in the last what it would have left anyway."""
    policy = Policy(prompt_halting=Halting(thresholds=math.inf, start=0.93, step=1000), kv_rule=kv_rule)

    def stops(policy: Policy, depth: int) -> tuple[int, ...]:
        halting = bind(policy, config_of(depth), Means(planes=True, lens=True)).prompt_halting
        return halting.layers if halting else ()

    assert stops(policy, 12) == (() if kv_rule in ("frozen", "affine") else (11,))
    assert stops(policy, 30) == (28,)
    assert stops(replace(policy, prompt_halting=Halting(layers=(11,))), 12) == (11,)
