"""GPTQ (arXiv 2210.17323) for nested codes: inputs in turn, the error of each made up for by those that follow.

One code is read at three precisions, whose errors differ. So three copies of the weights are carried along, one per
slice, each moved by the error of what that slice finally reads; the code of an input is the one whose three readings
lie nearest to the three copies, by weighted squared error. With all weight on one slice this is plain GPTQ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from qs_jax.choices import BITS
from qs_jax.fitting.grid import Grid, best_codes, read

Hessians = Float[Array, "slices inputs inputs"]

DAMPING = 0.01
"""Of the mean diagonal, added to every Hessian: the paper's value."""

_BLOCK = 64


def compensated_codes(
    weights: Float[Array, "outputs inputs"],
    hessians: Hessians,
    grid: Grid,
    importance: Float[Array, " slices"],
    *,
    group_size: int,
) -> UInt8[Array, "groups group_size outputs"]:
    """Codes whose error in the layer's output, not in its weights, is small at every precision.

    Args:
        weights: what the codes shall read as.
        hessians: mean of x xᵀ over the inputs x that the layer sees at each precision.
        grid: scales and offsets, which stay as they are.
        importance: what the squared error of each slice counts.
        group_size: inputs that share an entry of the grid.

    Inputs are taken in the order of what they weigh on the output, the heaviest first, whatever their group.
    """
    outputs, inputs = weights.shape
    groups = grid.scales.shape[1]
    padding = groups * group_size - inputs
    steps = -(-(inputs + padding) // _BLOCK) * _BLOCK
    order = jnp.argsort(-jnp.pad(jnp.einsum("sii->i", hessians), (0, padding), constant_values=-1.0), stable=True)
    order = jnp.concatenate([order, jnp.full(steps - len(order), order[-1])])
    idle = jnp.arange(steps) >= inputs
    pieces = jnp.pad(weights.T, ((0, padding), (0, 0)))[order]
    copies = jnp.broadcast_to(pieces, (len(BITS), steps, outputs))
    factors = jax.vmap(lambda h: _factor(h, order, idle))(hessians)
    codes = _sweep(copies, factors, grid, order // group_size, importance)
    placed = (
        jnp.zeros((groups * group_size, outputs), jnp.uint8)
        .at[order[: inputs + padding]]
        .set(codes[: inputs + padding])
    )
    return placed.reshape(groups, group_size, outputs)


def _factor(
    hessian: Float[Array, "inputs inputs"], order: Int[Array, " steps"], idle: Array
) -> Float[Array, "steps steps"]:
    """The upper Cholesky factor of the inverse, inputs in order; inputs that are always zero or padding stand alone."""
    pad = max(0, len(order) - hessian.shape[0])
    wide = jnp.pad(hessian, ((0, pad), (0, pad)))[order][:, order]
    wide = jnp.where(idle[:, None] | idle, 0.0, wide)
    diagonal = jnp.diagonal(wide)
    damping = DAMPING * jnp.maximum(diagonal.sum() / jnp.maximum((~idle).sum(dtype=jnp.float32), 1.0), 1e-30)
    wide += jnp.diag(jnp.where(diagonal == 0, diagonal.max() + damping, damping))
    identity = jnp.eye(len(order), dtype=wide.dtype)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(wide), True), identity)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T


def _sweep(
    copies: Float[Array, "slices steps outputs"],
    factors: Float[Array, "slices steps steps"],
    grid: Grid,
    group: Int[Array, " steps"],
    importance: Float[Array, " slices"],
) -> UInt8[Array, "steps outputs"]:
    """Codes of all inputs in order. Errors reach the rest of a block at once, and what follows it block by block."""

    def one(step: Array, carry: tuple[Array, Array, Array], factor: Array, group: Array) -> tuple[Array, Array, Array]:
        block, errors, codes = carry
        here = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, group[step], 1, False), grid)
        target = jax.lax.dynamic_index_in_dim(block, step, 1, False)
        code = best_codes(target, here, importance)
        level = jnp.stack([read(code, here, s) for s in range(len(BITS))])
        row = jax.lax.dynamic_index_in_dim(factor, step, 1, False)
        error = (target - level) / jax.lax.dynamic_index_in_dim(row, step, 1)
        block -= row[:, :, None] * error[:, None]
        return (
            block,
            jax.lax.dynamic_update_index_in_dim(errors, error, step, 1),
            jax.lax.dynamic_update_index_in_dim(codes, code, step, 0),
        )

    def one_block(copies: Array, start: Array) -> tuple[Array, Array]:
        block = jax.lax.dynamic_slice_in_dim(copies, start, _BLOCK, 1)
        rows = jax.lax.dynamic_slice_in_dim(factors, start, _BLOCK, 1)
        factor = jax.lax.dynamic_slice_in_dim(rows, start, _BLOCK, 2)
        groups = jax.lax.dynamic_slice_in_dim(group, start, _BLOCK, 0)
        empty = jnp.zeros(block.shape[1:], jnp.uint8)
        carry = (block, jnp.zeros_like(block), empty)
        _, errors, codes = jax.lax.fori_loop(0, _BLOCK, lambda i, carry: one(i, carry, factor, groups), carry)
        return copies - jnp.einsum("sbi,sbo->sio", rows, errors), codes

    starts = jnp.arange(0, copies.shape[1], _BLOCK)
    codes = jax.lax.scan(one_block, copies, starts)[1]
    return codes.reshape(-1, codes.shape[-1])
