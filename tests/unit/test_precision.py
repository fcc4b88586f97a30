"""The precision ladder on a handful of numbers."""

import jax.numpy as jnp

from qs_jax.adaptive.policy import Precision
from qs_jax.adaptive.precision import BoundPrecision, choose_bits, precisions_in_use
from qs_jax.adaptive.signals import Evidence, Shown
from qs_jax.choices import BITS


def test_bits_follow_two_thresholds() -> None:
    bits = choose_bits(jnp.asarray([0.0, 0.5, 1.0, 2.0]), jnp.float32(0.5), jnp.float32(1.5))
    assert bits.tolist() == [2, 4, 4, 8]
    assert (choose_bits(jnp.zeros(2), jnp.float32(0), jnp.float32(0)) == 8).all()
    active = jnp.asarray([True, False, True, False])
    assert dict(zip(BITS, precisions_in_use(bits, active).tolist(), strict=True)) == {8: False, 4: True, 2: True}


def test_exempt_tokens_read_all_bits() -> None:
    precision = BoundPrecision.bind(Precision(two_below=1.0), 4)
    places = jnp.arange(2, dtype=jnp.int32)
    seen = Evidence(0, Shown.by_none(jnp.zeros((2, 3))), places, places, previous_entropy=jnp.zeros(2))
    assert precision.decide(seen, jnp.asarray([False, True])).tolist() == [2, 8]


def test_it_decides_at_once_unless_it_probes() -> None:
    assert BoundPrecision.bind(Precision("previous_entropy", layer=2), 4).layers == ()
    assert BoundPrecision.bind(Precision("entropy", layer=2), 4).layers == (2,)
