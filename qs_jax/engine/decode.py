"""Decoding: a jitted `lax.scan` over a chunk of steps, layers unrolled, state donated."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.ledger import Work
from qs_jax.adaptive.signals import entropy_bits
from qs_jax.cache import Cache, LayerCache, append
from qs_jax.choices import BITS
from qs_jax.config import ModelConfig
from qs_jax.engine.descent import Context, NewSlots, descend
from qs_jax.engine.sampling import Sampling, log_normaliser, next_tokens
from qs_jax.errors import require
from qs_jax.models.base import CausalLM
from qs_jax.pytree import STATIC
from qs_jax.sharding import laid_out
from qs_jax.token_set import is_in


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Everything that changes from step to step.

    `tokens` are chosen but not yet run: a step runs them at `positions`, writes their keys and values, and
    chooses the next. `remaining` counts the tokens a row may still produce; a row that is `done` writes nothing.
    `noise` is each row's own source of randomness. `seen` has zero width when no repetition penalty is in force.
    `entropy` is that of the distribution the pending token was chosen from, in bits; zero where no policy asks for it.
    """

    tokens: Int[Array, " batch"]
    positions: Int[Array, " batch"]
    cache: Cache
    done: Bool[Array, " batch"]
    remaining: Int[Array, " batch"]
    noise: Key[Array, " batch"]
    seen: Bool[Array, "batch seen_vocab"]
    entropy: Float[Array, " batch"]

    def validate(self, config: ModelConfig, *, rising: bool = False) -> None:
        """Check what is promised above and of each layer's cache, on the host and on concrete arrays: for tests.

        Raises:
            StateError: it names what does not hold.
        """
        names = ("tokens", "positions", "done", "remaining", "entropy")
        tokens, positions, done, remaining, entropy = (np.asarray(getattr(self, name)) for name in names)
        shapes = {name: getattr(self, name).shape for name in (*names, "noise")}
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Controls:
    """What a request asks of every step. Numbers are traced; another one compiles nothing.

    `eos` are the ids that end a row; `keep_logits` hands out the logits of every step as well.
    """

    sampling: Sampling
    eos: Int[Array | np.ndarray, " slots"]
    policy: BoundPolicy
    keep_logits: bool = field(default=False, metadata=STATIC)


class Spent(NamedTuple):
    """What was spent on the pass that chose a token: layers run, the bits it read summed over them, and the signal at
    its last decision to halt or not."""

    layers_run: Int[Array, " batch"]
    bits_read: Int[Array, " batch"]
    signal: Float[Array, " batch"]


class Chosen(NamedTuple):
    """Tokens chosen at one step (or, stacked, at each step of a chunk) and what is reported of them.

    `logprobs` are natural logarithms under the model's unprocessed distribution, not finite where logits are not, which
    ends the row. `emitted` is false where the row had already ended, and the other fields are meaningless there.
    `layers_run`, `bits_read` (summed over those layers) and `signal` (at the last decision to halt or not) tell of the
    pass that chose the token. `logits` has zero width unless they are kept.
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


class Step(NamedTuple):
    """What a step finds out by reading: its choice, the entropy of what that was chosen from (bits, where the policy
    remembers it), the keys and values to write, and what it cost."""

    chosen: Chosen
    entropy: Float[Array, " batch"]
    new_slots: tuple[NewSlots, ...]
    work: Work


Forward = Callable[[CausalLM, DecodeState, Int[Array, " batch"], Controls], Step]


@jax.jit
def begin(
    logits: Float[Array, "batch vocab"],
    lengths: Int[Array, " batch"],
    remaining: Int[Array, " batch"],
    seeds: Int[Array, "batch 2"],
    seen: Bool[Array, "batch seen_vocab"],
    forced: Int[Array, " batch"],
    controls: Controls,
) -> tuple[DecodeState, Chosen]:
    """The state after the prompts, but for the cache: the first token of every row is chosen from the prefill's logits.

    A row's noise comes from the seed asked for and the sequence's number: batch mates play no part.
    """
    none = jnp.zeros_like(lengths)
    entropy = jnp.zeros(lengths.shape, jnp.float32)
    noise = jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(pair[0]), pair[1]))(seeds)
    state = DecodeState(none, lengths - 1, (), remaining <= 0, remaining, noise, seen, entropy)
    spent = Spent(jnp.full_like(lengths, controls.policy.num_layers), none, jnp.zeros_like(entropy))
    chosen = choose(logits, state, forced, controls, spent)
    state = advance(state, chosen, output_entropy(logits, remembers=controls.policy.remembers), controls.eos)
    return laid_out(state, like=logits), chosen


@partial(jax.jit, donate_argnames="state")
def decode_chunk(
    model: CausalLM, state: DecodeState, forced: Int[Array, "steps batch"], controls: Controls
) -> tuple[DecodeState, Chunk]:
    """As many decode steps as `forced` has rows; once every row is done the remaining ones run no layer.

    A forced token that is not negative takes the place of the chosen one, and its log-probability is reported: text
    is scored by the very program that generates it.
    """

    def step(state: DecodeState, forced: Int[Array, " batch"]) -> tuple[DecodeState, tuple[Chosen, Work]]:
        return decode_step(model, state, forced, controls, run=unless_done)

    state, (chosen, work) = jax.lax.scan(step, state, forced)
    filled = jnp.stack([layer.lengths.max() for layer in state.cache])
    return laid_out(state, like=model), Chunk(chosen, work, filled)


def forward(model: CausalLM, state: DecodeState, forced: Int[Array, " batch"], controls: Controls) -> Step:
    """All the reading of a step: the next tokens, and the keys and values to write.

    The cache is read here and written in `decode_step`: a conditional that returned it would have to copy it.
    """
    policy = controls.policy
    protected = policy.protection.of_generated(state.tokens, state.positions)
    context = Context(state.tokens, state.positions[:, None], protected, state.done, state.entropy)
    rows, new_slots, work = descend(model, state.cache, context, policy)
    logits = model.head(rows.hidden_states[:, 0])
    spent = Spent(rows.layers_run, rows.bits_read, rows.signal)
    chosen = choose(logits, state, forced, controls, spent)
    return Step(chosen, output_entropy(logits, remembers=policy.remembers), new_slots, work)


def unless_done(model: CausalLM, state: DecodeState, forced: Int[Array, " batch"], controls: Controls) -> Step:
    """`forward`, or zeros in its place where every row is done."""
    return jax.lax.cond(state.done.all(), _idle, forward, model, state, forced, controls)


def _idle(model: CausalLM, state: DecodeState, forced: Int[Array, " batch"], controls: Controls) -> Step:
    """What `forward` would return, as zeros. Written out: to ask for its shapes would trace the model once more."""
    batch, spans = state.tokens.shape[0], len(controls.policy.spans)
    none, nothing = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)
    logits = jnp.zeros((batch, model.config.vocab_size if controls.keep_logits else 0), jnp.float32)

    def unwritten(layer: LayerCache) -> NewSlots:
        _, kv_heads, _, head_dim = layer.keys.shape
        empty = jnp.zeros((batch, 1, kv_heads, head_dim), layer.keys.dtype)
        return NewSlots(empty, empty, jnp.zeros((batch, 1), bool))

    precisions = jnp.zeros((spans, len(BITS)), bool)
    return Step(
        chosen=Chosen(none, nothing, jnp.zeros(batch, bool), none, none, nothing, logits),
        entropy=nothing,
        new_slots=tuple(map(unwritten, state.cache)),
        work=Work(jnp.zeros(spans, jnp.int32), precisions, precisions, jnp.zeros(spans, jnp.int32)),
    )


def decode_step(
    model: CausalLM,
    state: DecodeState,
    forced: Int[Array, " batch"],
    controls: Controls,
    *,
    run: Forward = forward,
) -> tuple[DecodeState, tuple[Chosen, Work]]:
    """Run each row's pending token through the layers, write its keys and values, and choose the token after it.

    With every mechanism off it holds no conditional, but what `run`, in place of `forward`, brings along.
    """
    step, positions = run(model, state, forced, controls), state.positions[:, None]
    cache = tuple(
        append(layer, new.k, new.v, positions, new.writes)
        for layer, new in zip(state.cache, step.new_slots, strict=True)
    )
    state = advance(replace(state, cache=cache), step.chosen, step.entropy, controls.eos)
    return state, (step.chosen, step.work)


def choose(
    logits: Float[Array, "batch vocab"],
    state: DecodeState,
    forced: Int[Array, " batch"],
    controls: Controls,
    spent: Spent,
) -> Chosen:
    """The next token and its log-probability. Keyed by row and position, never by batch mates or chunk."""
    sampling = controls.sampling
    noise = jax.vmap(jax.random.fold_in)(state.noise, state.positions) if sampling.do_sample else state.noise
    tokens = next_tokens(logits, state.seen, noise, sampling)
    tokens = jnp.where(forced >= 0, forced, tokens)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_normaliser(logits)
    kept = logits if controls.keep_logits else logits[:, :0]
    return Chosen(tokens, logprobs, ~state.done, *spent, kept)


def output_entropy(logits: Float[Array, "batch vocab"], *, remembers: bool) -> Float[Array, " batch"]:
    """Bits of what a token is chosen from, or zeros where nobody remembers it."""
    return entropy_bits(logits) if remembers else jnp.zeros(logits.shape[0], jnp.float32)


def advance(
    state: DecodeState, chosen: Chosen, entropy: Float[Array, " batch"], eos: Int[Array | np.ndarray, " slots"]
) -> DecodeState:
    """Make the chosen tokens the pending ones and see which rows end with them."""
    live, tokens, seen = ~state.done, chosen.tokens, state.seen
    remaining = state.remaining - live.astype(jnp.int32)
    if seen.shape[1]:
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        seen = seen.at[rows, jnp.where(live, tokens, seen.shape[1])].set(True, mode="drop")
    return replace(
        state,
        tokens=jnp.where(live, tokens, state.tokens),
        positions=state.positions + live.astype(jnp.int32),
        # a logit that is NaN or infinite makes the normaliser so, and with it every log-probability of the row
        done=state.done | is_in(tokens, eos) | (remaining <= 0) | ~jnp.isfinite(chosen.logprobs),
        remaining=remaining,
        seen=seen,
        entropy=entropy,
    )
