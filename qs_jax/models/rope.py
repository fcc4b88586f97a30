"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split layout of Hugging Face's Llama."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Angular frequency of each pair of channels, in radians per position, with the configured context scaling.

    `linear` divides every frequency by the factor (position interpolation, arXiv 2306.15595); `llama3` divides
    only wavelengths longer than the original context and blends in between (Llama 3.1 release).
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        turns = rope.original_max_position_embeddings / wavelengths
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return frequencies * (blend + (1.0 - blend) / rope.factor)
    return frequencies


def rotate(
    vectors: Float[Array, "batch tokens heads head_dim"],
    positions: Int[Array, "batch tokens"],
    frequencies: Float[np.ndarray, " half"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """Rotate each channel pair (i, i + head_dim/2) by position · frequency; angles in float32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    cosine, sine = (_kept(turn)[:, :, None] for turn in (jnp.cos(angles), jnp.sin(angles)))
    first, second = jnp.split(vectors.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(vectors.dtype)


def _kept(table: Float[Array, "*shape half"]) -> Float[Array, "*shape half"]:
    """The same numbers, which the CPU backend computes once: else it would for every head of every layer.

    It fuses them into whatever needs them. A product reads its operands from memory, and one with 1 and 0 is exact.
    """

    def multiplied(table: Array) -> Array:
        return jnp.matmul(table, np.eye(table.shape[-1], dtype=np.float32), precision="highest")

    return jax.lax.platform_dependent(table, cpu=multiplied, default=lambda table: table)
