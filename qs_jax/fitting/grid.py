"""Where codes stand: scales and offsets of every slice, and the codes that suit all slices together.

A code is one choice for three readings of it. How much an error counts in each is a matter of weights, one per entry
of BITS; a weight of 1 in one place and 0 elsewhere makes codes for that precision alone, which is what nested codes
are compared with. Scales and offsets then follow from the codes by least squares, slice by slice. Levels are evenly
spaced, or bent: narrow cells where weights are many let the two top bits divide them as they would alone.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from qs_jax.choices import BITS, CODEBOOK_NAMES
from qs_jax.matryoshka.kernel import SCALE_DTYPE
from qs_jax.matryoshka.slices import bent, straightened
from qs_jax.pytree import STATIC

SliceWeights = tuple[float, float, float]
"""What the squared error counts at each of BITS."""

Grouped = Float[Array, "groups group_size outputs"]
PerGroup = Float[Array, "slices groups outputs"]

LARGEST_OFFSET = 127

_TINY = float(jnp.finfo(jnp.float32).tiny)
_SHRINKS = (1.0, 0.92, 0.84, 0.76, 0.68)
_ROUNDS = 3


Bend = tuple[float, float, float]
"""Curvature of the codebook at each of BITS: see `qs_jax.matryoshka.kernel.levels`."""

EVEN: Bend = (0.0, 0.0, 0.0)
COMPANDED: Bend = (0.5, 0.5, 0.15)
"""For weights that are about Gaussian. Bent by two thirds, level 192 of 256, where the top two bits change, stands at
0.98 standard deviations if level 255 stands at 2.8, the extreme of 64 weights: the border of the best quantiser of two
bits (Max 1960), whose levels, at 0.45 and 1.51 deviations, are 2 bits bent by 0.17. A little less loses least at all
three precisions together, on Gaussian draws and on Student's t with 5 degrees of freedom."""

CODEBOOKS: dict[str, Bend] = dict(zip(CODEBOOK_NAMES, (EVEN, COMPANDED), strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grid:
    """Scales, and offsets in steps of them, per slice and group: float32 numbers that storing would not change."""

    scales: Float[Array, "slices groups outputs"]
    offsets: Float[Array, "slices groups outputs"]
    bend: Bend = field(default=EVEN, metadata=STATIC)


def stored_offsets(grid: Grid) -> Int8[Array, "slices groups outputs"]:
    """Offsets as kernels keep them: in 256ths of the range of codes."""
    return jnp.round(grid.offsets * _units()).astype(jnp.int8)


def storable(scales: PerGroup, shifts: PerGroup, bend: Bend = EVEN) -> Grid:
    """The nearest grid that can be stored; `shifts` are offsets in the weights' own unit."""
    kept = jnp.maximum(scales, _TINY).astype(SCALE_DTYPE).astype(jnp.float32)
    units = _units()
    steps = jnp.clip(jnp.round(shifts / kept * units), -LARGEST_OFFSET, LARGEST_OFFSET)
    return Grid(kept, steps / units, bend)


def between_extremes(values: Grouped, shrink: float = 1.0, bend: Bend = EVEN) -> Grid:
    """Levels over each group's range, or a part of it; coarser codes read as the middle of their cell."""
    lowest, highest = values.min(axis=1), values.max(axis=1)
    centre = (highest + lowest) / 2
    steps = 2 * bent(jnp.float32(127.5), BITS[0], bend[0])
    step = jnp.maximum(shrink * (highest - lowest) / steps, jnp.abs(centre) / LARGEST_OFFSET)
    scale = jnp.maximum(step, _TINY).astype(SCALE_DTYPE).astype(jnp.float32)
    offset = jnp.clip(jnp.round(centre / scale), -LARGEST_OFFSET, LARGEST_OFFSET)
    return Grid(
        jnp.stack([scale * 2.0 ** (8 - bits) for bits in BITS]),
        jnp.stack([offset * 2.0 ** (bits - 8) for bits in BITS]),
        bend,
    )


def read(codes: UInt8[Array, "*shape"], grid: Grid, slice_: int) -> Float[Array, "*shape"]:
    """Weights at one precision; the grid's entries have the codes' shape or broadcast to it."""
    return grid.scales[slice_] * (levels_of(codes, slice_, grid.bend) + grid.offsets[slice_])


def levels_of(codes: UInt8[Array, "*shape"], slice_: int, bend: Bend) -> Float[Array, "*shape"]:
    """Where 8-bit codes stand in one reading, in steps of its scale."""
    bits = BITS[slice_]
    return bent((codes >> (8 - bits)).astype(jnp.float32) - (2**bits - 1) / 2, bits, bend[slice_])


def nearest(targets: Float[Array, "*shape"], grid: Grid) -> Float[Array, "*shape"]:
    """The 8-bit codes that read nearest at 8 bits, as whole numbers, below 0 and above 255 too."""
    level = targets / grid.scales[0] - grid.offsets[0]
    below = jnp.floor(straightened(level, BITS[0], grid.bend[0]) + 0.5) - 0.5
    middle = (bent(below, BITS[0], grid.bend[0]) + bent(below + 1, BITS[0], grid.bend[0])) / 2
    return jnp.where(level > middle, below + 1, below) + 127.5


def best_codes(
    targets: Float[Array, "slices *shape"], grid: Grid, weights: Float[Array, " slices"]
) -> UInt8[Array, "*shape"]:
    """The codes whose readings lie nearest to the targets of all slices, by weighted squared error.

    Of the 16 upper halves all are tried; within one, the best 8-bit code is the nearest.
    """
    exact = nearest(targets[0], grid)

    def consider(half: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        floor = 16 * half.astype(jnp.float32)
        codes = jnp.clip(exact, floor, floor + 15).astype(jnp.uint8)
        errors = jnp.stack([jnp.square(read(codes, grid, s) - targets[s]) for s in range(len(BITS))])
        cost = jnp.tensordot(weights, errors, 1)
        return jnp.minimum(cost, best[0]), jnp.where(cost < best[0], codes, best[1])

    shape = targets.shape[1:]
    start = jnp.full(shape, jnp.inf), jnp.zeros(shape, jnp.uint8)
    return jax.lax.fori_loop(0, 16, consider, start)[1]


def least_squares(
    values: Grouped,
    codes: UInt8[Array, "groups group_size outputs"],
    importance: Float[Array, "groups group_size"],
    bend: Bend = EVEN,
) -> Grid:
    """Scales and offsets that bring every slice of given codes nearest to the values, each input by its importance."""
    share = importance + 1e-6 * importance.mean() + _TINY
    share = (share / share.sum(axis=1, keepdims=True))[:, :, None]
    mean = (share * values).sum(axis=1)
    scales, shifts = [], []
    for slice_, bits in enumerate(BITS):
        level = levels_of(codes, slice_, bend)
        centre = (share * level).sum(axis=1)
        spread = (share * jnp.square(level - centre[:, None])).sum(axis=1)
        slope = (share * (level - centre[:, None]) * values).sum(axis=1) / jnp.maximum(spread, _TINY)
        flat = (spread < 1e-6) | (slope <= 0)
        even = (values.max(axis=1) - values.min(axis=1)) / 2**bits
        scale = jnp.where(flat, jnp.maximum(even, jnp.abs(mean)), slope)
        scales.append(scale)
        shifts.append(mean - scale * centre)
    return storable(jnp.stack(scales), jnp.stack(shifts), bend)


def refit(
    values: Grouped,
    importance: Float[Array, "groups group_size"],
    weights: Float[Array, " slices"],
    bend: Bend = EVEN,
) -> tuple[UInt8[Array, "groups group_size outputs"], Grid]:
    """Codes and grid that lower the weighted error of all slices: several ranges tried per group, then turns of both.

    `importance` is how much an input's error counts, the mean square of what it sees.
    """

    def turn(grid: Grid) -> tuple[Array, Grid, Array]:
        targets = jnp.broadcast_to(values, (len(BITS), *values.shape))
        codes = best_codes(targets, across(grid), weights)
        fitted = least_squares(values, codes, importance, bend)
        wide = across(fitted)
        errors = [jnp.square(read(codes, wide, s) - values) * importance[:, :, None] for s in range(len(BITS))]
        return codes, fitted, jnp.tensordot(weights, jnp.stack(errors).sum(axis=2), 1)

    codes, grid, cost = turn(between_extremes(values, bend=bend))
    for shrink in _SHRINKS[1:]:
        codes, grid, cost = _better(turn(between_extremes(values, shrink, bend)), (codes, grid, cost))
    for _ in range(_ROUNDS):
        codes, grid, cost = _better(turn(grid), (codes, grid, cost))
    return codes, grid


def _better(new: tuple[Array, Grid, Array], old: tuple[Array, Grid, Array]) -> tuple[Array, Grid, Array]:
    """Group by group and output by output, the cheaper of two fits."""
    take = new[2] < old[2]
    grid = jax.tree.map(lambda a, b: jnp.where(take, a, b), new[1], old[1])
    return jnp.where(take[:, None], new[0], old[0]), grid, jnp.minimum(new[2], old[2])


def across(grid: Grid) -> Grid:
    """The grid with an axis for the inputs of a group."""
    return jax.tree.map(lambda part: part[:, :, None], grid)


def _units() -> Float[Array, "slices 1 1"]:
    return jnp.asarray([256 / 2.0**bits for bits in BITS], jnp.float32)[:, None, None]
