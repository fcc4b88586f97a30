"""Policies that the search tries."""

import pytest

from qs_jax.adaptive.policy import Halting
from qs_jax.evaluation.candidates import Space, joined, neighbours, stop_prompt, stripped, uniform_stops
from tests.known_risk import PREFIX, SPACE, observed


def test_thresholds_lie_where_the_share_of_tokens_is() -> None:
    base = SPACE.neutral(PREFIX)
    policy = stop_prompt(base, observed(), {4: 0.25, 6: 1.0})
    assert stripped(policy, "x").prompt_halting == Halting("relative_drift", (0.25, float("inf")), layers=(4, 6))
    assert joined(base, [policy]).prompt_halting == policy.prompt_halting
    assert {4: 0.5, 6: 1.0} in neighbours((4, 5, 6), 5)
    assert stripped(base, "off").mechanisms == ()


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(1, ()), (2, ()), (3, (1,)), (6, (1, 2, 3, 4)), (12, (1, 3, 5, 7, 9, 10)), (16, (3, 5, 7, 9, 11, 13, 14))],
)
def test_no_prompt_stops_where_it_would_save_nothing(depth: int, layers: tuple[int, ...]) -> None:
    """After the last layer but one, that is: of the last, prompt tokens leave keys and values alone anyway."""
    space = Space.of(depth, planes=False)
    assert space.prompt_layers == layers
    assert len(uniform_stops(space, PREFIX)) == len(layers)
    assert (space.neutral(PREFIX).fusion is None) == (not layers)
