"""Round-to-nearest nested codes: the start of every fit, and the baseline it is measured against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qs_jax.matryoshka.codec import BITS
from qs_jax.matryoshka.kernel import SCALE_DTYPE, NestedKernel, groups_of, nested_kernel

Grouped = Float[Array, "groups group_size outputs"]

_LARGEST_OFFSET = 127


def grouped(weights: Float[Array, "outputs inputs"], group_size: int) -> Grouped:
    """Weights as codes are laid out: inputs in groups, padded with zeros, outputs last."""
    outputs, inputs = weights.shape
    groups = groups_of(inputs, group_size)
    padded = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, groups * group_size - inputs)))
    return padded.T.reshape(groups, group_size, outputs)


def round_to_nearest(weights: Float[Array, "outputs inputs"], *, group_size: int = 64) -> NestedKernel:
    """8-bit codes between each group's extremes; the coarser codes read as the middle of their cell.

    The middle of the cell is free: with scales 16 and 64 times as large, the same stored offset says it exactly.
    """
    values = grouped(weights, group_size)
    lowest, highest = values.min(axis=1), values.max(axis=1)
    centre = (highest + lowest) / 2
    step = jnp.maximum((highest - lowest) / 255, jnp.abs(centre) / _LARGEST_OFFSET)
    step = jnp.maximum(step, jnp.finfo(jnp.float32).tiny).astype(SCALE_DTYPE).astype(jnp.float32)
    offset = jnp.clip(jnp.round(centre / step), -_LARGEST_OFFSET, _LARGEST_OFFSET)
    codes = jnp.clip(jnp.round(values / step[:, None] + 127.5 - offset[:, None]), 0, 255).astype(jnp.uint8)
    scales = jnp.stack([step * 2.0 ** (8 - bits) for bits in BITS])
    offsets = jnp.broadcast_to(offset.astype(jnp.int8), scales.shape)
    return nested_kernel(codes, scales, offsets, inputs=weights.shape[1])


def relative_errors(weights: Float[Array, "outputs inputs"], kernel: NestedKernel) -> dict[str, float]:
    """Per precision, the squared error of the weights over their squared size."""
    exact = weights.astype(jnp.float32)
    power = jnp.square(exact).sum()
    errors = [jnp.square(kernel.dequantise(bits).astype(jnp.float32) - exact).sum() / power for bits in BITS]
    return {str(bits): float(error) for bits, error in zip(BITS, jax.device_get(errors), strict=True)}
