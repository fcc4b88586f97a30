"""The rule that halts tokens, on a handful of numbers."""

import jax.numpy as jnp

from qs_jax.adaptive.halting import BoundHalting
from qs_jax.adaptive.policy import Halting
from qs_jax.adaptive.signals import Evidence, Shown

DRIFTS = jnp.asarray([0.1, 0.1, 0.1, 0.9, 0.25])
SEEN = Evidence(
    layer=2,
    shown=Shown(jnp.zeros((5, 1)), DRIFTS[:, None], jnp.zeros((5, 1))),
    ids=jnp.zeros(5, jnp.int32),
    positions=jnp.arange(5, dtype=jnp.int32),
    probe=lambda: jnp.asarray([1.0, 3.0, 1.0, 1.0, 1.0]),
)
EXEMPT = jnp.asarray([False, False, True, False, False])


def halts(threshold: float, entropy_below: float | None) -> list[bool]:
    halting = Halting("raw_drift", threshold, layers=(2,), entropy_below=entropy_below)
    found, value = BoundHalting.bind(halting, "decode_halting", 4).decide(SEEN, EXEMPT)
    assert value.tolist() == DRIFTS.tolist()
    return found.tolist()


def test_halting_needs_a_low_signal_and_a_low_entropy_and_no_protection() -> None:
    assert halts(0.25, 2.0) == [True, False, False, False, False]
    assert halts(0.25, None) == [True, True, False, False, False]
    assert not any(halts(0.0, None))
    assert halts(float("inf"), None) == [True, True, False, True, True]


def test_it_says_what_it_reads() -> None:
    gated = BoundHalting.bind(Halting("raw_drift", entropy_below=1.0), "prompt_halting", 4)
    assert (gated.reads, gated.probes, gated.remembers) == (("raw_drift", "entropy"), True, False)
    alone = BoundHalting.bind(Halting("previous_entropy"), "decode_halting", 4)
    assert (alone.reads, alone.probes, alone.remembers) == (("previous_entropy",), False, True)
    assert (gated.flops(100), alone.flops(100)) == (800, 0)
