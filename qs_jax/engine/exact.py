"""Exact mode: a draft proposes tokens, the dense model decides on all of them in one pass over its weights.

A round of three drafts, of which the second is wrong; `p` is the row's pending token, chosen but not yet run:

    slots          … | p | a | b | c |      the pass runs p and the drafts a b c over the cache, and writes them all
    dense model          a   x   ·   ·      what it chooses after each: after a it wants x, not b
    kept           … | p | a |              the row's length is that of p and a: b and c are taken back
    next round's p               x          chosen by the dense model, as every token is

What is chosen at a position depends on the text before it and on noise keyed by (seed, row, position), which drafts
and rounds have no part in: the text is that of plain decoding, greedy or sampled, with every setting (Leviathan et al.,
arXiv 2211.17192, whose rejection step the shared noise makes needless). A row goes on through a round's positions by
the very functions that plain decoding goes by (`choose`, `advance`), so that ends of text, lengths and penalties hold
inside it as well. But for rounding: a pass over several tokens sums in another order than a step over one.

Rows of a batch accept each their own number of drafts. Rows that are done idle, as in `qs_jax.engine.decode`.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.ledger import PassCosts, Tally
from qs_jax.cache import Cache, append, segment
from qs_jax.engine.decode import Chosen, Controls, DecodeState, Spent, advance, choose, output_entropy
from qs_jax.kernels import most_bits
from qs_jax.models import alike
from qs_jax.models.base import CausalLM, Heads
from qs_jax.sharding import laid_out

History = Int[Array, "batch places"]
"""Every row's tokens by position, up to the pending one; what lies behind it is not yet text."""


class Proposal(NamedTuple):
    """Drafts of every row: guesses at what the dense model will choose after the pending token, and after each other.

    `tokens` is -1 where the draft has nothing to say. `cache` is that of the state, with anything behind the rows'
    lengths. `work` is what drafting cost, in whatever terms the draft's own `spent` understands.
    """

    tokens: Int[Array, "batch drafts"]
    cache: Cache
    work: Any


@runtime_checkable
class Draft(Protocol):
    """What proposes tokens: a frozen pytree, of which a round knows no more than this."""

    @property
    def remembers(self) -> bool:
        """Whether it needs the entropy of what the pending token was chosen from."""
        ...

    def propose(
        self, model: CausalLM, state: DecodeState, history: History, controls: Controls, count: int
    ) -> Proposal:
        """`count` drafts for every row. Rows that are done need none."""
        ...

    def spent(self, costs: PassCosts, work: Any) -> Tally:
        """What the rounds of a chunk spent on drafting: `work` as `propose` gave it, stacked, on the host."""
        ...


class Round(NamedTuple):
    """What a round (or, stacked, each of a chunk) did.

    `chosen` has a step for the pending token and one for each draft; `emitted` is false from the first wrong draft on.
    `drafted` and `accepted` count a row's drafts and those that were right, `work` is the draft's.
    """

    chosen: Chosen
    drafted: Int[Array, "*rounds batch"]
    accepted: Int[Array, "*rounds batch"]
    work: Any


class Rounds(NamedTuple):
    """What a chunk of rounds did: its rounds, and per layer the longest row of the cache after it."""

    rounds: Round
    filled: Int[Array, " layers"]


class _Verdict(NamedTuple):
    """What the dense model says of a row's pending token and its drafts, and the keys and values of them all."""

    chosen: Chosen
    entropy: Float[Array, "passed batch"]
    kv: tuple[tuple[Heads, Heads], ...]


@partial(jax.jit, static_argnames=("count", "rounds"), donate_argnames="state")
def exact_chunk(
    model: CausalLM,
    state: DecodeState,
    history: History,
    draft: Draft,
    controls: Controls,
    *,
    count: int,
    rounds: int,
) -> tuple[DecodeState, Rounds]:
    """So many rounds of `count` drafts; once every row is done the remaining ones run no layer.

    The policy in `controls` is off: it is the dense model that decides.
    """

    def one(carry: tuple[DecodeState, History], _: None) -> tuple[tuple[DecodeState, History], Round]:
        state, history, done = exact_round(model, *carry, draft, controls, count)
        return (state, history), done

    (state, _), ran = jax.lax.scan(one, (state, history), length=rounds)
    return laid_out(state, like=model), Rounds(ran, jnp.stack([layer.lengths.max() for layer in state.cache]))


def exact_round(
    model: CausalLM, state: DecodeState, history: History, draft: Draft, controls: Controls, count: int
) -> tuple[DecodeState, History, Round]:
    """Draft, run pending token and drafts in one pass, keep what the dense model would have chosen itself."""
    lengths = [layer.lengths for layer in state.cache]
    proposal = draft.propose(model, state, history, controls, count)
    drafts = proposal.tokens
    state = replace(state, cache=proposal.cache)
    verify = partial(_verify, remembers=draft.remembers)
    verdict = jax.lax.cond(state.done.all(), _idle, verify, model, state, drafts, controls)
    positions, writes = _places(model, state, count), jnp.repeat(~state.done[:, None], count + 1, axis=1)
    written = [append(layer, k, v, positions, writes) for layer, (k, v) in zip(state.cache, verdict.kv, strict=True)]
    first, live = state.positions, ~state.done
    state, emitted, right = _accept(state, verdict, drafts, controls)
    kept = emitted.sum(axis=0, dtype=jnp.int32)
    cache = tuple(
        replace(layer, lengths=jnp.minimum(length + kept, layer.capacity))
        for layer, length in zip(written, lengths, strict=True)
    )
    chosen = verdict.chosen._replace(emitted=emitted)
    drafted = ((drafts >= 0) & live[:, None]).sum(axis=1, dtype=jnp.int32)
    told = Round(chosen, drafted, right.sum(axis=0, dtype=jnp.int32), proposal.work)
    return replace(state, cache=cache), _with_text(history, first, chosen), told


def _places(model: CausalLM, state: DecodeState, count: int) -> Int[Array, "batch passed"]:
    """Positions of the pending token and of `count` drafts. Those beyond the context are never kept: any will do."""
    ahead = jnp.arange(count + 1, dtype=jnp.int32)
    return jnp.minimum(state.positions[:, None] + ahead, model.config.max_position_embeddings - 1)


def _verify(
    model: CausalLM,
    state: DecodeState,
    drafts: Int[Array, "batch drafts"],
    controls: Controls,
    *,
    remembers: bool,
) -> _Verdict:
    """One pass of the dense model over pending tokens and drafts, and what it chooses after each, were all before it
    right."""
    batch, count = drafts.shape
    positions = _places(model, state, count)
    hidden_states = model.embed(jnp.concatenate([state.tokens[:, None], jnp.maximum(drafts, 0)], axis=1), positions)
    kv: list[tuple[Heads, Heads]] = []
    for block, layer in zip(model.blocks, state.cache, strict=True):
        output = alike.run(block, hidden_states, positions, (segment(layer),))
        hidden_states = output.hidden_states
        kv.append((output.k, output.v))
    logits = model.head(hidden_states).reshape(batch * (count + 1), -1)
    flat, controls = _one_row_each(state, drafts, positions, controls)
    none, read = jnp.zeros_like(flat.tokens), sum(map(most_bits, model.blocks))
    spent = Spent(none + len(model.blocks), none + read, none.astype(jnp.float32))
    chosen = choose(logits, flat, none - 1, controls, spent)
    by_step = jax.tree.map(lambda leaf: jnp.swapaxes(leaf.reshape(batch, count + 1, *leaf.shape[1:]), 0, 1), chosen)
    entropy = output_entropy(logits, remembers=remembers).reshape(batch, count + 1).T
    return _Verdict(by_step, entropy, tuple(kv))


def _one_row_each(
    state: DecodeState,
    drafts: Int[Array, "batch drafts"],
    positions: Int[Array, "batch passed"],
    controls: Controls,
) -> tuple[DecodeState, Controls]:
    """A state without cache that has a row for every token of the pass, as if all drafts before it were right."""
    batch, passed = positions.shape
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), passed)
    seen, sampling = state.seen, controls.sampling
    vocab = seen.shape[1]
    if vocab:
        marks = jnp.where(drafts >= 0, drafts, vocab)
        each = jnp.arange(passed, dtype=jnp.int32)
        before = jnp.where(each[:, None] > each[None, :-1], marks[:, None], vocab)  # (batch, passed, drafts)
        seen = jnp.repeat(seen[:, None], passed, axis=1)
        seen = seen.at[jnp.arange(batch)[:, None, None], each[:, None], before].set(True, mode="drop")
        seen = seen.reshape(batch * passed, vocab)
    else:
        seen = seen[row]
    flat = jax.tree.map(lambda leaf: leaf[row], replace(state, cache=(), seen=jnp.zeros((batch, 0), bool)))
    per_row = jax.tree.map(lambda number: number[row] if jnp.ndim(number) else number, sampling)
    return replace(flat, positions=positions.reshape(-1), seen=seen), replace(controls, sampling=per_row)


def _idle(model: CausalLM, state: DecodeState, drafts: Int[Array, "batch drafts"], controls: Controls) -> _Verdict:
    """What `_verify` would return, as zeros. Written out: to ask for its shapes would trace the model once more."""
    batch, passed = drafts.shape[0], drafts.shape[1] + 1
    none, nothing = jnp.zeros((passed, batch), jnp.int32), jnp.zeros((passed, batch), jnp.float32)
    logits = jnp.zeros((passed, batch, model.config.vocab_size if controls.keep_logits else 0), jnp.float32)
    kv = []
    for layer in state.cache:
        _, kv_heads, _, head_dim = layer.keys.shape
        empty = jnp.zeros((batch, passed, kv_heads, head_dim), layer.keys.dtype)
        kv.append((empty, empty))
    return _Verdict(Chosen(none, nothing, none > 0, none, none, nothing, logits), nothing, tuple(kv))


def _accept(
    state: DecodeState, verdict: _Verdict, drafts: Int[Array, "batch drafts"], controls: Controls
) -> tuple[DecodeState, Bool[Array, "passed batch"], Bool[Array, "passed batch"]]:
    """Go on step by step while drafts are what the dense model chose; also which steps that were, and which of them
    chose the draft."""
    wanted = jnp.concatenate([drafts.T, jnp.full((1, drafts.shape[0]), -1, jnp.int32)])

    def step(carry: tuple[DecodeState, Bool[Array, " batch"]], at: Any) -> Any:
        (state, going), (chosen, entropy, draft) = carry, at
        emitted = going & ~state.done
        after = advance(replace(state, done=~emitted), chosen, entropy, controls.eos)
        state = replace(
            after,
            done=jnp.where(emitted, after.done, state.done),
            entropy=jnp.where(emitted, entropy, state.entropy),
        )
        right = emitted & (chosen.tokens == draft)
        return (state, right), (emitted, right)

    cache, bare = state.cache, replace(state, cache=())
    carry = bare, jnp.ones_like(state.done)
    (bare, _), (emitted, right) = jax.lax.scan(step, carry, (verdict.chosen, verdict.entropy, wanted))
    return replace(bare, cache=cache), emitted, right


def _with_text(history: History, first: Int[Array, " batch"], chosen: Chosen) -> History:
    """The history with what a round chose, behind the token that was pending at position `first`."""
    steps, batch = chosen.tokens.shape
    places = first[:, None] + 1 + jnp.arange(steps, dtype=jnp.int32)
    places = jnp.where(chosen.emitted.T, places, history.shape[1])
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return history.at[rows, places].set(chosen.tokens.T, mode="drop")
