"""The parts of a block as functions of it, each traced once for all blocks of a program that are alike.

A program of thirty layers is otherwise traced and lowered layer by layer, which takes longer than to load it once it is
compiled. XLA inlines the calls: what is computed stays the same.
"""

import jax

from qs_jax.models.attention import View
from qs_jax.models.base import Block, Heads, Hidden, LayerOutput, Positions


@jax.jit
def kv(block: Block, hidden_states: Hidden, positions: Positions) -> tuple[Heads, Heads]:
    """`Block.kv`."""
    return block.kv(hidden_states, positions)


@jax.jit
def run(block: Block, hidden_states: Hidden, positions: Positions, past: View) -> LayerOutput:
    """`Block.run`."""
    return block.run(hidden_states, positions, past)


@jax.jit
def run_over(block: Block, hidden_states: Hidden, positions: Positions, view: View, k: Heads, v: Heads) -> LayerOutput:
    """`Block.run_over`."""
    return block.run_over(hidden_states, positions, view, k, v)
