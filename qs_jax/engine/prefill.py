"""Prompts into the cache. Prompts are padded on the right to a bucket and processed in bounded pieces."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qs_jax.cache import Cache, allocate, append, bucket, segment
from qs_jax.models.base import CausalLM

PIECE = 1024
"""Most tokens of a prompt that go through the blocks at once: bounds the memory of the attention scores."""

_SMALLEST_PIECE = 16


class Prefilled(NamedTuple):
    """The cache after the prompts, the logits that follow each, and the shape of every piece that was run."""

    logits: Float[Array, "batch vocab"]
    cache: Cache
    pieces: list[tuple[int, int]]


def prefill(model: CausalLM, prompts: Sequence[Sequence[int]], capacity: int) -> Prefilled:
    """Run ragged prompts; row i of the result is what prompt i alone would give.

    Each entry of `pieces` is (tokens per row, slots of the cache that were looked at).
    """
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    longest, config = int(lengths.max()), model.config
    cache = allocate(config, len(prompts), capacity, model.embedding.table.dtype)
    logits = jnp.zeros((len(prompts), config.vocab_size), jnp.float32)
    pieces = []
    for start in range(0, longest, PIECE):
        width = bucket(min(longest - start, PIECE), min(PIECE, capacity), smallest=_SMALLEST_PIECE)
        tokens = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            tokens[row, : len(part)] = part
        logits, cache = extend(model, tokens, jnp.int32(start), jnp.asarray(lengths), logits, cache, fresh=start == 0)
        pieces.append((width, 0 if start == 0 else capacity))
    return Prefilled(logits, cache, pieces)


@partial(jax.jit, static_argnames="fresh", donate_argnames=("logits", "cache"))
def extend(
    model: CausalLM,
    tokens: Int[Array, "batch tokens"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    *,
    fresh: bool,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Run one piece of the prompts, tokens start … start + width - 1; padding writes nothing.

    `fresh` says that the cache is empty, so that attention does not look at it. Logits are replaced for the rows
    whose last token is in this piece.
    """
    positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    writes = positions < lengths[:, None]
    hidden_states = model.embed(tokens, positions)
    layers = []
    for block, layer in zip(model.blocks, cache, strict=True):
        past = () if fresh else (segment(layer),)
        hidden_states, k, v = block.run(hidden_states, positions, past)
        layers.append(append(layer, k, v, positions, writes))
    last = lengths - 1 - start
    ends_here = (last >= 0) & (last < tokens.shape[1])
    last_hidden = jnp.take_along_axis(hidden_states, last[:, None, None], axis=1, mode="clip")[:, 0]
    return jnp.where(ends_here[:, None], model.head(last_hidden), logits), tuple(layers)
