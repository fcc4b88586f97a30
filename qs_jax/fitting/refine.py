"""Codes and their grid once more, in turns: each made better while all others stay.

GPTQ chooses every code once, and for nested codes its copies of the weights drift apart. What it leaves is lowered here
by coordinate descent, as CDQuant (arXiv 2406.17542) does for one precision, on the sum over slices s of
importance_s · tr(E_sᵀ H_s E_s), where E_s is the error of the weights as slice s reads them and H_s what its inputs
weigh. Group by group every code of it is tried again, then its scales and offsets are solved for; neither step raises
the sum, for any output.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from qs_jax.choices import BITS
from qs_jax.fitting.gptq import DAMPING, Hessians
from qs_jax.fitting.grid import Grid, Grouped, across, best_codes, levels_of, read, storable

Codes = UInt8[Array, "groups group_size outputs"]
Pull = Float[Array, "slices group_size outputs"]
"""H_s E_s for the inputs of one group: half the slope of the sum along each weight, turned round."""

_TINY = 1e-30


class _Group(NamedTuple):
    """One group of inputs: its block of every Hessian, its codes, and its part of the grid, (slices, 1, outputs)."""

    hessians: Float[Array, "slices group_size group_size"]
    codes: UInt8[Array, "group_size outputs"]
    grid: Grid

    def weights(self) -> Float[Array, "slices group_size outputs"]:
        return _readings(self.codes, self.grid)


def refined(
    values: Grouped,
    hessians: Hessians,
    codes: Codes,
    grid: Grid,
    importance: Float[Array, " slices"],
    *,
    rounds: int,
) -> tuple[Codes, Grid]:
    """Better codes and a better grid for the same weights.

    Args:
        values: the weights, grouped; inputs that pad the last group are zero.
        hessians: mean of x xᵀ over the inputs x that the layer sees at each precision.
        codes: where to start.
        grid: where they stand.
        importance: what the squared error of each slice counts.
        rounds: passes over all groups.
    """
    groups, size, _ = values.shape
    inputs = hessians.shape[1]
    damping = DAMPING / inputs * jnp.einsum("sii->s", hessians)[:, None, None] * jnp.eye(inputs)
    padding = groups * size - inputs
    wide = jnp.pad(hessians + damping, ((0, 0), (0, padding), (0, padding)))
    blocks = wide.reshape(len(BITS), groups, size, groups, size)
    pull = jnp.einsum("sgihj,shjo->sgio", blocks, values - _readings(codes, across(grid)))

    def turn(carry: tuple[Codes, Grid, Array], g: Int[Array, ""]) -> tuple[tuple[Codes, Grid, Array], None]:
        codes, grid, pull = carry
        columns = jax.lax.dynamic_index_in_dim(blocks, g, 3, keepdims=False)
        part = jax.tree.map(lambda kept: jax.lax.dynamic_slice_in_dim(kept, g, 1, 1), grid)
        old = _Group(
            jax.lax.dynamic_index_in_dim(columns, g, 1, keepdims=False),
            jax.lax.dynamic_index_in_dim(codes, g, 0, keepdims=False),
            part,
        )
        new = _with_grid(*_with_codes(old, jax.lax.dynamic_index_in_dim(pull, g, 1, keepdims=False), importance))
        pull -= jnp.einsum("sgij,sjo->sgio", columns, new.weights() - old.weights())
        codes = jax.lax.dynamic_update_index_in_dim(codes, new.codes, g, 0)
        grid = jax.tree.map(lambda kept, own: jax.lax.dynamic_update_slice_in_dim(kept, own, g, 1), grid, new.grid)
        return (codes, grid, pull), None

    order = jnp.tile(jnp.arange(groups), rounds)
    codes, grid, _ = jax.lax.scan(turn, (codes, grid, pull), order)[0]
    return codes, grid


def _with_codes(group: _Group, pull: Pull, importance: Float[Array, " slices"]) -> tuple[_Group, Pull]:
    """Every input's code in turn, against what is left of its target once all other inputs have said theirs."""

    def one(i: Array, carry: tuple[Array, Pull]) -> tuple[Array, Pull]:
        codes, pull = carry
        row = jax.lax.dynamic_index_in_dim(group.hessians, i, 2, keepdims=True)
        curvature = jnp.maximum(jax.lax.dynamic_index_in_dim(row, i, 1, keepdims=False), _TINY)
        old = jax.lax.dynamic_slice_in_dim(codes, i, 1, 0)
        reads = _readings(old, group.grid)
        targets = reads + jax.lax.dynamic_slice_in_dim(pull, i, 1, 1) / curvature[:, None]
        counts = importance * curvature[:, 0]
        new = best_codes(targets, group.grid, counts)
        read_anew = _readings(new, group.grid)
        gain = jnp.tensordot(counts, jnp.square(reads - targets) - jnp.square(read_anew - targets), 1)
        change = jnp.where(gain > 0, read_anew - reads, 0.0)
        codes = jax.lax.dynamic_update_slice_in_dim(codes, jnp.where(gain > 0, new, old), i, 0)
        return codes, pull - row * change

    codes, pull = jax.lax.fori_loop(0, len(group.codes), one, (group.codes, pull))
    return group._replace(codes=codes), pull


def _with_grid(group: _Group, pull: Pull) -> _Group:
    """The scale and the shift of every slice and output that leave the least: two unknowns, two equations.

    Of the numbers that can be stored; kept as they are where rounding them would lose, or the scale turn negative.
    """
    level = jnp.stack([levels_of(group.codes, slice_, group.grid.bend) for slice_ in range(len(BITS))])
    weighed = jnp.einsum("sij,sjo->sio", group.hessians, level)
    ll, l1 = (level * weighed).sum(axis=1, keepdims=True), weighed.sum(axis=1, keepdims=True)
    ones = group.hessians.sum(axis=(1, 2))[:, None, None]
    along_level, along_ones = (level * pull).sum(axis=1, keepdims=True), pull.sum(axis=1, keepdims=True)
    determinant = ll * ones - l1 * l1
    solvable = determinant > 1e-6 * ll * ones
    divisor = jnp.where(solvable, determinant, 1.0)
    scales = group.grid.scales + (ones * along_level - l1 * along_ones) / divisor
    shifts = group.grid.scales * group.grid.offsets + (ll * along_ones - l1 * along_level) / divisor
    found = group._replace(grid=storable(scales, shifts, group.grid.bend))
    change = found.weights() - group.weights()
    rise = change * (jnp.einsum("sij,sjo->sio", group.hessians, change) - 2 * pull)
    take: Bool[Array, "slices 1 outputs"] = solvable & (scales > 0) & (rise.sum(axis=1, keepdims=True) < 0)
    return group._replace(grid=jax.tree.map(lambda new, old: jnp.where(take, new, old), found.grid, group.grid))


def _readings(codes: UInt8[Array, "*shape"], grid: Grid) -> Float[Array, "slices *shape"]:
    return jnp.stack([read(codes, grid, slice_) for slice_ in range(len(BITS))])
