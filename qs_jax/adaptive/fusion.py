"""Contextual token fusion: which neighbours continue as one token, and as what."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import FusionStructure
from qs_jax.adaptive.policy import PositionRule
from qs_jax.adaptive.signals import angle, raw_drift

Hidden = Float[Array, "batch tokens hidden"]
PerToken = Bool[Array, "batch tokens"]


class Fused(NamedTuple):
    """The tokens after fusion, where `absorbed` ones are gone: each went into its right neighbour."""

    hidden_states: Hidden
    positions: Int[Array, "batch tokens"]
    sizes: Int[Array, "batch tokens"]
    absorbed: PerToken


def pairs(
    structure: FusionStructure, hidden_states: Hidden, may_fuse: PerToken, threshold: Float[Array, ""]
) -> PerToken:
    """Which tokens fuse with their left neighbour; no token is in two pairs.

    Neighbours are tokens that stand side by side here and may both fuse. In a run of similar tokens every second one
    fuses with the one before it, so that a decision about a token depends on tokens to its left only.
    """
    left = jnp.roll(hidden_states, 1, axis=1)
    distance = {"cosine": angle, "l2": raw_drift}[structure.distance](left, hidden_states)
    first = jnp.arange(hidden_states.shape[1]) == 0
    similar = (distance < threshold) & may_fuse & jnp.roll(may_fuse, 1, axis=1) & ~first
    place = jnp.arange(hidden_states.shape[1], dtype=jnp.int32)
    run_start = _latest(jnp.where(similar, -1, place))
    return similar & ((place - run_start) % 2 == 1)


def fuse(
    hidden_states: Hidden,
    positions: Int[Array, "batch tokens"],
    sizes: Int[Array, "batch tokens"],
    fuses: PerToken,
    rule: PositionRule,
) -> Fused:
    """Merge each fusing token with its left neighbour: a mean weighted by how many tokens each stands for."""
    left, left_sizes, left_positions = (jnp.roll(x, 1, axis=1) for x in (hidden_states, sizes, positions))
    total = sizes + left_sizes
    weights = (left_sizes / total).astype(hidden_states.dtype)[..., None]
    merged = left * weights + hidden_states * (1 - weights)
    place = {
        "last": positions,
        "first": left_positions,
        "mean": (left_positions * left_sizes + positions * sizes) // total,
    }[rule]
    return Fused(
        jnp.where(fuses[..., None], merged, hidden_states),
        jnp.where(fuses, place, positions),
        jnp.where(fuses, total, sizes),
        jnp.roll(fuses, -1, axis=1).at[:, -1].set(False),
    )


def _latest(marks: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
    """At each place the greatest mark so far: marks are places, or -1 for none."""
    return jnp.maximum.accumulate(marks, axis=1)
