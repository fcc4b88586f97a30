"""Round-to-nearest nested codes: the start of every fit, and the baseline it is measured against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qs_jax.choices import BITS
from qs_jax.fitting.grid import EVEN, Bend, Grid, Grouped, across, between_extremes, nearest, stored_offsets
from qs_jax.matryoshka.kernel import NestedKernel, groups_of, nested_kernel


def grouped(weights: Float[Array, "outputs inputs"], group_size: int) -> Grouped:
    """Weights as codes are laid out: inputs in groups, padded with zeros, outputs last."""
    outputs, inputs = weights.shape
    groups = groups_of(inputs, group_size)
    padded = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, groups * group_size - inputs)))
    return padded.T.reshape(groups, group_size, outputs)


def round_to_nearest(
    weights: Float[Array, "outputs inputs"], *, group_size: int = 64, bend: Bend = EVEN
) -> NestedKernel:
    """8-bit codes between each group's extremes; the coarser codes read as the middle of their cell.

    The middle of the cell is free: with scales 16 and 64 times as large, the same stored offset says it exactly.
    """
    values = grouped(weights, group_size)
    grid = between_extremes(values, bend=bend)
    return packed(nearest_codes(values, grid), grid, inputs=weights.shape[1])


def nearest_codes(values: Grouped, grid: Grid) -> UInt8[Array, "groups group_size outputs"]:
    """The 8-bit codes that read nearest at 8 bits."""
    return jnp.clip(nearest(values, across(grid)), 0, 255).astype(jnp.uint8)


def packed(codes: UInt8[Array, "groups group_size outputs"], grid: Grid, *, inputs: int) -> NestedKernel:
    """A kernel of codes and their grid."""
    return nested_kernel(codes, grid.scales, stored_offsets(grid), inputs=inputs, bend=grid.bend)


def relative_errors(weights: Float[Array, "outputs inputs"], kernel: NestedKernel) -> dict[str, float]:
    """Per precision, the squared error of the weights over their squared size."""
    exact = weights.astype(jnp.float32)
    power = jnp.square(exact).sum()
    errors = [jnp.square(kernel.dequantise(bits).astype(jnp.float32) - exact).sum() / power for bits in BITS]
    return {str(bits): float(error) for bits, error in zip(BITS, jax.device_get(errors), strict=True)}
