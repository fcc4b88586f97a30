"""The precision ladder: at how many bits a token reads the weights."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.choices import BITS, FULL


def choose_bits(
    value: Float[Array, " batch"], two_below: Float[Array, ""], four_below: Float[Array, ""]
) -> Int[Array, " batch"]:
    """2 bits where the signal is below the first threshold, else 4 below the second, else 8."""
    return jnp.where(value < two_below, 2, jnp.where(value < four_below, 4, FULL)).astype(jnp.int32)


def precisions_in_use(bits: Int[Array, " batch"], active: Bool[Array, " batch"]) -> Bool[Array, " precisions"]:
    """Which of 2, 4 and 8 bits some active row reads: what a pass over the weights costs."""
    return jnp.stack([((bits == choice) & active).any() for choice in BITS])
