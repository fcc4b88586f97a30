"""Gradient refinement of scales and offsets: codes stay, a block's output comes nearer to the dense one at all bits.

As in OmniQuant and MatQuant (arXiv 2308.13137, 2502.06786), block by block; but only numbers that are stored anyway are
learnt, by Adam, for all slices together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8

from qs_jax.choices import BITS
from qs_jax.fitting.activations import batches, run, with_kernels
from qs_jax.fitting.grid import Grid, across, read, storable
from qs_jax.models.base import Block, Hidden


@dataclass(frozen=True)
class Coded:
    """A kernel while it is being fitted: shape (outputs, inputs), codes, and where they stand."""

    shape: tuple[int, int]
    codes: UInt8[Array, "groups group_size outputs"]
    grid: Grid

    def weights(self, slice_: int, grid: Grid | None = None) -> Float[Array, "outputs inputs"]:
        """The weights as they read at one precision, by its own grid or another."""
        values = read(self.codes, across(grid or self.grid), slice_)
        return values.reshape(-1, self.shape[0]).T[:, : self.shape[1]]


jax.tree_util.register_dataclass(Coded, data_fields=["codes", "grid"], meta_fields=["shape"])

Kernels = Mapping[str, Coded]
Grids = dict[str, Grid]


@dataclass(frozen=True)
class Tuning:
    """How long and how fast: passes over the windows, and the learning rate, in units of a scale; it falls to 0."""

    passes: int = 4
    learning_rate: float = 1e-2


def tuned(
    block: Block, kernels: Kernels, streams: Sequence[Hidden], targets: Hidden, tuning: Tuning
) -> dict[str, Coded]:
    """The kernels with better grids; as they were where that would raise the loss after rounding to what is stored.

    Args:
        block: the dense block.
        kernels: its coded kernels, by name.
        streams: what enters the block at each of BITS.
        targets: what leaves the dense block.
        tuning: the budget.
    """
    parts = [list(batches(part)) for part in (*streams, targets)]
    data = [tuple(piece) for piece in zip(*parts, strict=True)]
    start = {name: jax.tree.map(jnp.zeros_like, c.grid) for name, c in kernels.items()}
    before = _losses(block, kernels, start, data)
    optimizer = _optimizer(tuning.learning_rate, max(1, tuning.passes * len(data)))
    moves = jax.tree.map(jnp.copy, start)
    state = optimizer.init(moves)
    for _ in range(tuning.passes):
        for piece in data:
            moves, state = _step(optimizer, block, kernels, moves, state, piece, 1 / before)
    result = {name: Coded(c.shape, c.codes, _storable(_moved(c.grid, moves[name]))) for name, c in kernels.items()}
    after = _losses(block, result, start, data)
    return result if float((after / before).sum()) < len(BITS) else dict(kernels)


def _moved(grid: Grid, move: Grid) -> Grid:
    return replace(grid, scales=grid.scales * jnp.exp(move.scales), offsets=grid.offsets + move.offsets)


def _storable(grid: Grid) -> Grid:
    return storable(grid.scales, grid.scales * grid.offsets, grid.bend)


@jax.jit
def _errors(block: Block, kernels: Kernels, moves: Grids, piece: tuple[Hidden, ...]) -> Float[Array, " slices"]:
    """Mean squared error of the block's output at each precision."""
    *streams, target = piece
    errors = []
    for slice_, hidden_states in enumerate(streams):
        weights = {name: c.weights(slice_, _moved(c.grid, moves[name])) for name, c in kernels.items()}
        errors.append(jnp.square(run(with_kernels(block, weights), hidden_states) - target).mean())
    return jnp.stack(errors)


@cache
def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """One object for equal settings, so that blocks share a compiled step."""
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@partial(jax.jit, static_argnums=0, donate_argnums=(3, 4))
def _step(
    optimizer: optax.GradientTransformation,
    block: Block,
    kernels: Kernels,
    moves: Grids,
    state: optax.OptState,
    piece: tuple[Hidden, ...],
    balance: Float[Array, " slices"],
) -> tuple[Grids, optax.OptState]:
    """Down the gradient of the sum over slices, each relative to where it began."""
    gradients = jax.grad(lambda moves: (_errors(block, kernels, moves, piece) * balance).sum())(moves)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, state = optimizer.update(gradients, state)
    moved = jax.tree.map(jnp.add, moves, updates)
    return moved, state


def _losses(
    block: Block, kernels: Kernels, moves: Grids, data: Sequence[tuple[Hidden, ...]]
) -> Float[Array, " slices"]:
    return jnp.stack([_errors(block, kernels, moves, piece) for piece in data]).mean(axis=0)
