"""Decoding: a jitted `lax.scan` over a chunk of steps, layers unrolled, state donated."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qs_jax.cache import Cache, append, segment
from qs_jax.engine.sampling import SamplingPlan, SamplingSettings, next_tokens
from qs_jax.engine.stopping import is_eos
from qs_jax.models.base import CausalLM, Heads


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step.

    `tokens` are chosen but not yet run: a step runs them at `positions`, writes their keys and values, and
    chooses the next. `remaining` counts the tokens a row may still produce; a row that is `done` writes nothing.
    `seen` has zero width when no repetition penalty is in force.
    """

    tokens: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    cache: Cache
    done: Bool[Array, " batch"]
    remaining: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    seen: Bool[Array, "batch seen_vocab"]


class Chosen(NamedTuple):
    """Tokens chosen at one step (or, stacked, at each step of a chunk) and what is reported of them.

    `logprobs` are natural logarithms under the model's unprocessed distribution. `emitted` is false where the row
    had already ended, and the other fields are meaningless there.
    """

    tokens: Int[Array, "*steps batch"]
    logprobs: Float[Array, "*steps batch"]
    emitted: Bool[Array, "*steps batch"]


Written = tuple[tuple[Heads, Heads], ...]


@partial(jax.jit, static_argnames="plan", donate_argnames="cache")
def begin(
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    lengths: Int[Array, " batch"],
    remaining: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    seen: Bool[Array, "batch seen_vocab"],
    settings: SamplingSettings,
    eos: Int[Array, " slots"],
    *,
    plan: SamplingPlan,
) -> tuple[DecodeState, Chosen]:
    """The state after the prompts: the first token of every row is chosen from the prefill's logits."""
    idle = jnp.zeros_like(lengths)
    state = DecodeState(idle, lengths - 1, cache, remaining <= 0, remaining, keys, seen)
    tokens, logprobs = _choose(logits, state, settings, plan)
    return _advance(state, tokens, logprobs, eos)


def decode_step(
    model: CausalLM, state: DecodeState, settings: SamplingSettings, eos: Int[Array, " slots"], plan: SamplingPlan
) -> tuple[DecodeState, Chosen]:
    """Run each row's pending token through every layer and choose the one after it. Holds no conditional."""
    tokens, logprobs, written = _think(model, state, settings, plan)
    return _commit(state, tokens, logprobs, written, eos)


@partial(jax.jit, static_argnames=("plan", "steps"), donate_argnames="state")
def decode_chunk(
    model: CausalLM,
    state: DecodeState,
    settings: SamplingSettings,
    eos: Int[Array, " slots"],
    *,
    plan: SamplingPlan,
    steps: int,
) -> tuple[DecodeState, Chosen]:
    """`steps` decode steps; once every row is done the remaining ones run no layer."""

    def body(state: DecodeState, _: None) -> tuple[DecodeState, Chosen]:
        think = partial(_think, settings=settings, plan=plan)
        tokens, logprobs, written = jax.lax.cond(state.done.all(), partial(_idle, think), think, model, state)
        return _commit(state, tokens, logprobs, written, eos)

    return jax.lax.scan(body, state, length=steps)


def _think(
    model: CausalLM, state: DecodeState, settings: SamplingSettings, plan: SamplingPlan
) -> tuple[Int[Array, " batch"], Float[Array, " batch"], Written]:
    """All the reading of a step: next tokens, their log-probabilities, and the keys and values to write.

    The cache is read here and written in `_commit`: a conditional that returned it would have to copy it.
    """
    positions = state.positions[:, None]
    hidden_states = model.embed(state.tokens[:, None], positions)
    written = []
    for block, layer in zip(model.blocks, state.cache, strict=True):
        hidden_states, k, v = block.run(hidden_states, positions, (segment(layer),))
        written.append((k, v))
    tokens, logprobs = _choose(model.head(hidden_states[:, 0]), state, settings, plan)
    return tokens, logprobs, tuple(written)


def _idle(think: partial, model: CausalLM, state: DecodeState) -> tuple[Array, Array, Written]:
    """What `_think` would return, as zeros."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(think, model, state))


def _choose(
    logits: Float[Array, "batch vocab"], state: DecodeState, settings: SamplingSettings, plan: SamplingPlan
) -> tuple[Int[Array, " batch"], Float[Array, " batch"]]:
    """The next token and its log-probability. Keyed by row and position, never by batch mates or chunk."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.positions) if plan.do_sample else state.keys
    tokens = next_tokens(logits, state.seen, keys, settings, plan)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _commit(
    state: DecodeState,
    tokens: Int[Array, " batch"],
    logprobs: Float[Array, " batch"],
    written: Written,
    eos: Int[Array, " slots"],
) -> tuple[DecodeState, Chosen]:
    positions, writes = state.positions[:, None], ~state.done[:, None]
    cache = tuple(append(layer, k, v, positions, writes) for layer, (k, v) in zip(state.cache, written, strict=True))
    return _advance(replace(state, cache=cache), tokens, logprobs, eos)


def _advance(
    state: DecodeState, tokens: Int[Array, " batch"], logprobs: Float[Array, " batch"], eos: Int[Array, " slots"]
) -> tuple[DecodeState, Chosen]:
    """Make the chosen tokens the pending ones and see which rows end with them."""
    live = ~state.done
    remaining = state.remaining - live.astype(jnp.int32)
    seen = state.seen
    if seen.shape[1]:
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        seen = seen.at[rows, jnp.where(live, tokens, seen.shape[1])].set(True, mode="drop")
    state = replace(
        state,
        tokens=jnp.where(live, tokens, state.tokens),
        positions=state.positions + live.astype(jnp.int32),
        done=state.done | is_eos(tokens, eos) | (remaining <= 0),
        remaining=remaining,
        seen=seen,
    )
    return state, Chosen(tokens, logprobs, live)
