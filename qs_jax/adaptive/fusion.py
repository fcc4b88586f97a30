"""Contextual token fusion, bound to a model: which neighbours continue as one token, and as what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.placement import acting_layers, threshold_table
from qs_jax.adaptive.policy import Distance, Fusion, PositionRule
from qs_jax.adaptive.signals import COMPARISON_FLOPS, angle, raw_drift
from qs_jax.pytree import STATIC

Hidden = Float[Array, "batch tokens hidden"]
PerToken = Bool[Array, "batch tokens"]


class Fused(NamedTuple):
    """The tokens after fusion, where `absorbed` ones are gone: each went into its right neighbour."""

    hidden_states: Hidden
    positions: Int[Array, "batch tokens"]
    sizes: Int[Array, "batch tokens"]
    absorbed: PerToken


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BoundFusion:
    """When prompt tokens fuse. `thresholds`, after 0, 1, … layers, are traced: another value compiles nothing.

    `layers`: after how many layers tokens may fuse. `position`: see `fuse`. `size_bias`: whether a fused token weighs
    in attention as its members did.
    """

    thresholds: Float[Array, " layers_run"]
    distance: Distance = field(metadata=STATIC)
    layers: tuple[int, ...] = field(metadata=STATIC)
    position: PositionRule = field(metadata=STATIC)
    size_bias: bool = field(metadata=STATIC)

    @classmethod
    def bind(cls, fusion: Fusion, depth: int) -> "BoundFusion":
        """Fit it to a model of so many layers.

        Raises:
            PolicyError: layers or a number of thresholds that do not fit.
        """
        layers = acting_layers(fusion, "fusion", depth)
        thresholds = threshold_table(fusion, layers, "fusion", depth)
        return cls(thresholds, fusion.distance, layers, fusion.position, fusion.size_bias)

    @property
    def probes(self) -> bool:
        return False

    @property
    def remembers(self) -> bool:
        return False

    def decide(self, layer: int, hidden_states: Hidden, may_fuse: PerToken) -> PerToken:
        """Which tokens fuse with their left neighbour: see `pairs`."""
        return pairs(self.distance, hidden_states, may_fuse, self.thresholds[layer])

    def bias(self, sizes: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens"] | None:
        """log(size), to add to a fused token's attention logits, where the policy asks for it."""
        return jnp.log(sizes.astype(jnp.float32)) if self.size_bias else None

    def flops(self, hidden_size: int) -> int:
        """Of one token's decision."""
        return COMPARISON_FLOPS * hidden_size


DISTANCES: dict[Distance, Callable[[Hidden, Hidden], Float[Array, "batch tokens"]]] = {"cosine": angle, "l2": raw_drift}


def pairs(distance: Distance, hidden_states: Hidden, may_fuse: PerToken, threshold: Float[Array, ""]) -> PerToken:
    """Which tokens fuse with their left neighbour: those nearer to it than the threshold. No token is in two pairs.

    Neighbours are tokens that stand side by side here and may both fuse. In a run of similar tokens every second one
    fuses with the one before it, so that a decision about a token depends on tokens to its left only.
    """
    left = jnp.roll(hidden_states, 1, axis=1)
    apart = DISTANCES[distance](left, hidden_states)
    first = jnp.arange(hidden_states.shape[1]) == 0
    similar = (apart < threshold) & may_fuse & jnp.roll(may_fuse, 1, axis=1) & ~first
    place = jnp.arange(hidden_states.shape[1], dtype=jnp.int32)
    run_start = jnp.maximum.accumulate(jnp.where(similar, -1, place), axis=1)
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
