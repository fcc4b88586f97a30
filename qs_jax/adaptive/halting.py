"""Dynamic token halting: the rule. What it sees comes from `signals`, what follows from the K/V rule."""

from collections.abc import Mapping

from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import HaltingStructure

Values = Mapping[str, Float[Array, "*tokens"]]


def halts(
    structure: HaltingStructure,
    values: Values,
    threshold: Float[Array, ""],
    entropy_threshold: Float[Array, ""],
    protected: Bool[Array, "*tokens"],
) -> Bool[Array, "*tokens"]:
    """Which tokens take no further compute: signal below its threshold, entropy (if asked for) too, not protected.

    A threshold of 0 halts nothing and infinity everything that is not protected, whatever the signal: no signal is
    negative or infinite.
    """
    halt = (values[structure.signal] < threshold) & ~protected
    if structure.gate is not None:
        halt &= values[structure.gate] < entropy_threshold
    return halt


def is_special(tokens: Int[Array, "*tokens"], special_ids: Int[Array, " slots"]) -> Bool[Array, "*tokens"]:
    """Which tokens are the model's special ones."""
    return (tokens[..., None] == special_ids).any(axis=-1)
