"""Decoding: a jitted `lax.scan` over a chunk of steps, layers unrolled, state donated."""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qs_jax.adaptive.binding import Structure, Thresholds
from qs_jax.adaptive.halting import is_special
from qs_jax.adaptive.signals import entropy_bits
from qs_jax.cache import Cache, append
from qs_jax.config import ModelConfig
from qs_jax.engine.descent import Context, Work, Written, descend
from qs_jax.engine.sampling import SamplingPlan, SamplingSettings, log_normaliser, next_tokens
from qs_jax.engine.stopping import is_eos
from qs_jax.errors import require
from qs_jax.models.base import CausalLM


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step.

    `tokens` are chosen but not yet run: a step runs them at `positions`, writes their keys and values, and
    chooses the next. `remaining` counts the tokens a row may still produce; a row that is `done` writes nothing.
    `seen` has zero width when no repetition penalty is in force. `entropy` is that of the distribution the pending
    token was chosen from, in bits; zero where no policy asks for it.
    """

    tokens: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    cache: Cache
    done: Bool[Array, " batch"]
    remaining: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    seen: Bool[Array, "batch seen_vocab"]
    entropy: Float[Array, " batch"]

    def validate(self, config: ModelConfig, *, rising: bool = False) -> None:
        """Check what is promised above and of each layer's cache, on the host and on concrete arrays: for tests.

        Raises:
            StateError: it names what does not hold.
        """
        names = ("tokens", "positions", "done", "remaining", "entropy")
        tokens, positions, done, remaining, entropy = (np.asarray(getattr(self, name)) for name in names)
        shapes = {name: getattr(self, name).shape for name in (*names, "keys")}
        require(set(shapes.values()) == {(len(tokens),)}, f"rows differ: {shapes}")
        require(self.seen.shape in {(len(tokens), 0), (len(tokens), config.vocab_size)}, f"seen is {self.seen.shape}")
        within = (tokens >= 0) & (tokens < config.vocab_size)
        require(bool(within.all()), f"tokens are {tokens.tolist()} of a vocabulary of {config.vocab_size}")
        within = (positions >= 0) & (positions < config.max_position_embeddings)
        require(bool(within.all()), f"positions are {positions.tolist()} of {config.max_position_embeddings}")
        require(bool((done | (remaining > 0)).all()), f"a row goes on though {remaining.tolist()} tokens remain")
        require(bool((done | np.isfinite(entropy)).all()), f"entropy is {entropy.tolist()}")
        require(len(self.cache) == config.num_hidden_layers, f"{len(self.cache)} layers have a cache")
        for number, layer in enumerate(self.cache):
            layer.validate(rising=rising)
            require(len(layer.lengths) == len(tokens), f"layer {number} has {len(layer.lengths)} rows")
            lengths, slots = np.asarray(layer.lengths), np.asarray(layer.positions)
            require(bool((lengths <= positions).all()), f"layer {number} has more slots than tokens that were run")
            later = (slots >= positions[:, None]) & (np.arange(layer.capacity) < lengths[:, None])
            require(not later.any(), f"layer {number} holds a token that was not run yet")


class Controls(NamedTuple):
    """The traced half of what a request asks of every step: numbers that may change without compiling."""

    settings: SamplingSettings
    eos: Int[Array, " slots"]
    thresholds: Thresholds


@dataclass(frozen=True)
class Program:
    """The static half: what the compiled steps contain."""

    sampling: SamplingPlan
    structure: Structure
    keep_logits: bool = False


class Chosen(NamedTuple):
    """Tokens chosen at one step (or, stacked, at each step of a chunk) and what is reported of them.

    `logprobs` are natural logarithms under the model's unprocessed distribution, not finite where logits are not, which
    ends the row. `emitted` is false where the row had already ended, and the other fields are meaningless there.
    `layers_run`, `bits_read` (summed over those layers) and `signal` (at the last decision to halt or not) tell of the
    pass that chose the token. `logits` has zero width unless the program keeps them.
    """

    tokens: Int[Array, "*steps batch"]
    logprobs: Float[Array, "*steps batch"]
    emitted: Bool[Array, "*steps batch"]
    layers_run: Int[Array, "*steps batch"]
    bits_read: Int[Array, "*steps batch"]
    signal: Float[Array, "*steps batch"]
    logits: Float[Array, "*steps batch kept_vocab"]


class Chunk(NamedTuple):
    """What a chunk of steps did. `filled` is, per layer, the longest row of the cache after it."""

    chosen: Chosen
    work: Work
    filled: Int[Array, " layers"]


class _Thought(NamedTuple):
    """All that a step finds out by reading; what it changes follows from it."""

    chosen: Chosen
    entropy: Float[Array, " batch"]
    written: tuple[Written, ...]
    work: Work


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def begin(
    logits: Float[Array, "batch vocab"],
    cache: Cache,
    lengths: Int[Array, " batch"],
    remaining: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    seen: Bool[Array, "batch seen_vocab"],
    forced: Int[Array, " batch"],
    controls: Controls,
    *,
    program: Program,
) -> tuple[DecodeState, Chosen]:
    """The state after the prompts: the first token of every row is chosen from the prefill's logits."""
    idle = jnp.zeros_like(lengths)
    entropy = jnp.zeros(lengths.shape, jnp.float32)
    state = DecodeState(idle, lengths - 1, cache, remaining <= 0, remaining, keys, seen, entropy)
    depth = jnp.full_like(lengths, program.structure.num_layers)
    chosen = _choose(logits, state, forced, controls, program)._replace(layers_run=depth)
    return _advance(state, chosen, _output_entropy(logits, program.structure), controls.eos)


def decode_step(
    model: CausalLM, state: DecodeState, forced: Int[Array, " batch"], controls: Controls, program: Program
) -> tuple[DecodeState, Chosen]:
    """Run each row's pending token through the layers and choose the one after it.

    With every mechanism off it holds no conditional.
    """
    return _commit(state, _think(model, state, forced, controls, program), controls.eos)


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def decode_chunk(
    model: CausalLM,
    state: DecodeState,
    forced: Int[Array, "steps batch"],
    controls: Controls,
    *,
    program: Program,
) -> tuple[DecodeState, Chunk]:
    """As many decode steps as `forced` has rows; once every row is done the remaining ones run no layer.

    A forced token that is not negative takes the place of the chosen one, and its log-probability is reported: text
    is scored by the very program that generates it.
    """

    def body(state: DecodeState, forced: Int[Array, " batch"]) -> tuple[DecodeState, tuple[Chosen, Work]]:
        think = partial(_think, controls=controls, program=program)
        thought = jax.lax.cond(state.done.all(), partial(_idle, think), think, model, state, forced)
        state, chosen = _commit(state, thought, controls.eos)
        return state, (chosen, thought.work)

    state, (chosen, work) = jax.lax.scan(body, state, forced)
    filled = jnp.stack([layer.lengths.max() for layer in state.cache])
    return state, Chunk(chosen, work, filled)


def _think(
    model: CausalLM, state: DecodeState, forced: Int[Array, " batch"], controls: Controls, program: Program
) -> _Thought:
    """All the reading of a step: the next tokens, and the keys and values to write.

    The cache is read here and written in `_commit`: a conditional that returned it would have to copy it.
    """
    structure, thresholds = program.structure, controls.thresholds
    protected = is_special(state.tokens, thresholds.special_ids) | (state.positions < structure.protect_first)
    context = Context(state.tokens, state.positions[:, None], protected, state.done, state.entropy)
    rows, written, work = descend(model, state.cache, context, structure, thresholds)
    logits = model.head(rows.hidden_states[:, 0])
    chosen = _choose(logits, state, forced, controls, program)
    chosen = chosen._replace(layers_run=rows.layers_run, bits_read=rows.bits_read, signal=rows.signal)
    return _Thought(chosen, _output_entropy(logits, structure), written, work)


def _idle(think: partial, model: CausalLM, state: DecodeState, forced: Int[Array, " batch"]) -> _Thought:
    """What `_think` would return, as zeros."""
    shapes = jax.eval_shape(think, model, state, forced)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _choose(
    logits: Float[Array, "batch vocab"],
    state: DecodeState,
    forced: Int[Array, " batch"],
    controls: Controls,
    program: Program,
) -> Chosen:
    """The next token and its log-probability. Keyed by row and position, never by batch mates or chunk."""
    plan = program.sampling
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.positions) if plan.do_sample else state.keys
    tokens = next_tokens(logits, state.seen, keys, controls.settings, plan)
    tokens = jnp.where(forced >= 0, forced, tokens)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_normaliser(logits)
    zeros = jnp.zeros_like(tokens)
    kept = logits if program.keep_logits else logits[:, :0]
    return Chosen(tokens, logprobs, ~state.done, zeros, zeros, jnp.zeros_like(logprobs), kept)


def _output_entropy(logits: Float[Array, "batch vocab"], structure: Structure) -> Float[Array, " batch"]:
    return entropy_bits(logits) if structure.needs_output_entropy else jnp.zeros(logits.shape[0], jnp.float32)


def _commit(state: DecodeState, thought: _Thought, eos: Int[Array, " slots"]) -> tuple[DecodeState, Chosen]:
    positions = state.positions[:, None]
    cache = tuple(
        append(layer, new.k, new.v, positions, new.writes)
        for layer, new in zip(state.cache, thought.written, strict=True)
    )
    return _advance(replace(state, cache=cache), thought.chosen, thought.entropy, eos)


def _advance(
    state: DecodeState, chosen: Chosen, entropy: Float[Array, " batch"], eos: Int[Array, " slots"]
) -> tuple[DecodeState, Chosen]:
    """Make the chosen tokens the pending ones and see which rows end with them."""
    live, tokens = ~state.done, chosen.tokens
    remaining = state.remaining - live.astype(jnp.int32)
    seen = state.seen
    if seen.shape[1]:
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        seen = seen.at[rows, jnp.where(live, tokens, seen.shape[1])].set(True, mode="drop")
    state = replace(
        state,
        tokens=jnp.where(live, tokens, state.tokens),
        positions=state.positions + live.astype(jnp.int32),
        # a logit that is NaN or infinite makes the normaliser so, and with it every log-probability of the row
        done=state.done | is_eos(tokens, eos) | (remaining <= 0) | ~jnp.isfinite(chosen.logprobs),
        remaining=remaining,
        seen=seen,
        entropy=entropy,
    )
    return state, chosen._replace(emitted=live)
