"""Policies that the search tries."""

from qs_jax.adaptive.policy import Halting
from qs_jax.evaluation.candidates import joined, neighbours, stop_prompt, stripped
from tests.known_risk import PREFIX, SPACE, observed


def test_thresholds_lie_where_the_share_of_tokens_is() -> None:
    base = SPACE.neutral(PREFIX)
    policy = stop_prompt(base, observed(), {4: 0.25, 6: 1.0})
    assert stripped(policy, "x").prompt_halting == Halting("relative_drift", (0.25, float("inf")), layers=(4, 6))
    assert joined(base, [policy]).prompt_halting == policy.prompt_halting
    assert {4: 0.5, 6: 1.0} in neighbours((4, 5, 6), 5)
    assert stripped(base, "off").mechanisms == ()
