"""The host's side of a request: prefill once, then decode chunk by chunk until every row is done."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.ledger import Ledger
from qs_jax.cache import bucket
from qs_jax.engine.compilation import METER
from qs_jax.engine.decode import Chosen, Controls, DecodeState, begin, decode_chunk
from qs_jax.engine.exact import exact_chunk
from qs_jax.engine.meter import Meter
from qs_jax.engine.pacing import ROUNDS, Drafting, Way
from qs_jax.engine.prefill import Prefilled, first_capacity, grow_jit, prefill
from qs_jax.engine.rounds import Drafts
from qs_jax.engine.sampling import Sampling
from qs_jax.hosts import agreed
from qs_jax.models.base import CausalLM
from qs_jax.sharding import laid_out, mesh_of, on_host, placed_like
from qs_jax.token_set import token_set

Tree = TypeVar("Tree")

_FEWEST_ROWS_TO_SHRINK = 4
_CHUNKS_WORTH_SHRINKING = 2


@dataclass(frozen=True)
class Request:
    """Token ids in, and all that decides what comes out. One row per prompt and returned sequence.

    `copies` is the number of sequences per prompt; `seeds` has one (seed, sequence) pair per row. `forced`, if given,
    has for every row the tokens to score in place of free choice, `max_new_tokens` of them; `keep_logits` hands out the
    logits of every step as well. With `drafting` the same text is made in rounds (`qs_jax.engine.exact`): the policy is
    off then, and nothing is forced.
    """

    prompts: Sequence[Sequence[int]]
    copies: int
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    seeds: Sequence[tuple[int, int]]
    sampling: Sampling
    chunk_size: int
    policy: BoundPolicy
    forced: Sequence[Sequence[int]] | None = None
    keep_logits: bool = False
    drafting: Drafting | None = None

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.copies

    @property
    def prompts_by_row(self) -> list[Sequence[int]]:
        return [prompt for prompt in self.prompts for _ in range(self.copies)]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))


@dataclass
class _Batch:
    """The rows that the device holds, which may be fewer than were asked for: `rows[i]` is the request's number of row
    i, `slots` how many slots each layer's longest row has filled."""

    rows: Int[np.ndarray, " batch"]
    done: Bool[np.ndarray, " batch"]
    slots: list[int] = field(default_factory=list)


class Session:
    """Runs a request. Iterate `chunks()`; call `finish(row)` between chunks to end a row early."""

    def __init__(self, model: CausalLM, request: Request, *, bits: int | None = None):
        limit = model.config.max_position_embeddings
        room = first_capacity(request.longest, request.max_new_tokens, request.chunk_size, limit)
        self.model, self.request = model, request
        self.prefilled: Prefilled | None = None
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0
        self.rounds = 0
        self.drafts = Drafts(request.drafting, model, request.prompts_by_row) if request.drafting else None
        self._made = np.zeros(request.rows, np.int64)
        self._meter = Meter(Costs.of(model), request.policy, twin_capacity=room, limit=limit, bits=bits)
        self._compiled_before = METER.reading()
        self._finished: set[int] = set()
        self._controls = Controls(
            request.sampling, token_set(request.eos_token_ids), request.policy, keep_logits=request.keep_logits
        )

    @property
    def ledger(self) -> Ledger:
        return self._meter.ledger

    @property
    def compile_seconds(self) -> float:
        return METER.since(self._compiled_before).seconds

    @property
    def trace_seconds(self) -> float:
        return METER.since(self._compiled_before).trace_seconds

    def finish(self, row: int) -> None:
        """End a row: it takes no further part from the next chunk on."""
        self._finished.add(row)

    def chunks(self) -> Iterator[Chosen]:
        """What was chosen, as host arrays (steps, rows); the first chunk is the prefill's single step."""
        started = time.perf_counter()
        prefilled, state, first = self._begin()
        chosen, done = on_host((first, state.done))
        self.prefill_seconds = time.perf_counter() - started
        batch = _Batch(np.arange(self.request.rows), done, prefilled.filled.max(axis=1).tolist())
        yield self._told(jax.tree.map(lambda leaf: leaf[None], chosen), batch)
        while True:
            state = self._apply_finished(state, batch)
            if batch.done.all():
                return
            started = time.perf_counter()
            state = self._shrink(state, batch)
            way = self._way(batch)
            before = METER.reading()
            state, chosen, passes = self._rounds(state, batch, way) if way else self._steps(state, batch)
            seconds = time.perf_counter() - started
            if self.drafts and passes:
                compiled = METER.since(before).agreed()
                self.drafts.pacing.took(way, self._shape(batch), agreed(seconds), passes, compiled)
            self.decode_seconds += seconds
            self.decode_steps += passes
            self.rounds += passes if way else 0
            yield self._told(chosen, batch)

    def _steps(self, state: DecodeState, batch: _Batch) -> tuple[DecodeState, Chosen, int]:
        """A chunk of plain steps, and how many of them ran a layer."""
        left = min(self.request.chunk_size, self._left(batch))
        longest = self._longest(left)
        state = self._make_room(state, batch, left)
        capacities = [layer.capacity for layer in state.cache]
        state, chunk = decode_chunk(self.model, state, self._forced(batch), self._controls)
        chunk, batch.done = on_host((chunk, state.done))
        batch.slots = chunk.filled.tolist()
        ahead = self._ahead(chunk.chosen, batch)
        return state, chunk.chosen, self._meter.decode(chunk, capacities, longest, twin_steps=ahead)

    def _rounds(self, state: DecodeState, batch: _Batch, way: Way) -> tuple[DecodeState, Chosen, int]:
        """A chunk of rounds, and how many of them ran a layer."""
        assert self.drafts is not None
        draft, count = way.draft, way.count
        left = min(ROUNDS * (count + 1), self._left(batch))
        longest = self._longest(left)
        state = self._make_room(state, batch, left)
        capacities = [layer.capacity for layer in state.cache]
        history = self.drafts.history(batch.rows, capacities[0])
        state, chunk = exact_chunk(self.model, state, history, draft, self._controls, count=count, rounds=ROUNDS)
        chunk, batch.done = on_host((chunk, state.done))
        batch.slots = chunk.filled.tolist()
        self.drafts.count(way, chunk.rounds, batch.rows)
        chosen = jax.tree.map(
            lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), chunk.rounds.chosen
        )
        ahead = self._ahead(chosen, batch)
        return state, chosen, self._meter.rounds(chunk, draft, capacities, longest, twin_steps=ahead)

    def _way(self, batch: _Batch) -> Way | None:
        """None for plain steps."""
        live = batch.rows[~batch.done]
        return self.drafts.pacing.choose(live, self._shape(batch), self._left(batch)) if self.drafts else None

    def _left(self, batch: _Batch) -> int:
        """Most tokens that a live row may still produce."""
        return self.request.max_new_tokens - int(self._made[batch.rows[~batch.done]].min())

    def _longest(self, left: int) -> int:
        """Slots that the dense twin's longest row may need after so many more tokens."""
        return self.request.longest + int(self._made.max()) - 1 + left

    def _ahead(self, chosen: Chosen, batch: _Batch) -> int:
        """Steps by which the longest output grew: so many the dense twin takes, whose rows go on together."""
        made = self._made.copy()
        made[batch.rows] += chosen.emitted.sum(axis=0)
        return int(made.max() - self._made.max())

    def _shape(self, batch: _Batch) -> tuple[int, bool, bool]:
        sampling = self.request.sampling
        return len(batch.rows), sampling.do_sample, sampling.penalise

    def _told(self, chosen: Chosen, batch: _Batch) -> Chosen:
        """What rows chose, by the request's numbers and on the host's books."""
        chosen = self._spread(chosen, batch.rows)
        self._made += chosen.emitted.sum(axis=0)
        if self.drafts:
            self.drafts.see(chosen)
        return chosen

    def _begin(self) -> tuple[Prefilled, DecodeState, Chosen]:
        request = self.request
        prefilled = prefill(
            self.model, request.prompts, request.policy, new_tokens=request.max_new_tokens, chunk=request.chunk_size
        )
        self.prefilled = prefilled
        self._meter.prefill(prefilled, rows=request.rows)
        return prefilled, *first_step(request, prefilled, self._controls, self.model.config.vocab_size)

    def _apply_finished(self, state: DecodeState, batch: _Batch) -> DecodeState:
        finished = np.isin(batch.rows, list(self._finished))
        if not (finished & ~batch.done).any():
            return state
        batch.done = batch.done | finished
        alone = mesh_of(state.done) is None
        return replace(state, done=jnp.asarray(batch.done) if alone else placed_like(batch.done, state.done))

    def _shrink(self, state: DecodeState, batch: _Batch) -> DecodeState:
        """Go on with half of the rows, or a quarter, … where the others are done and enough is left to do."""
        left, size = self._left(batch), len(batch.rows)
        if size < _FEWEST_ROWS_TO_SHRINK or left < _CHUNKS_WORTH_SHRINKING * self.request.chunk_size:
            return state
        live = int((~batch.done).sum())
        while size // 2 >= live and size >= _FEWEST_ROWS_TO_SHRINK:
            size //= 2
        if size == len(batch.rows):
            return state
        kept = np.argsort(batch.done, kind="stable")[:size]
        batch.rows, batch.done = batch.rows[kept], batch.done[kept]
        return take_rows(state, kept)

    def _make_room(self, state: DecodeState, batch: _Batch, left: int) -> DecodeState:
        """Grow each layer that the next chunk, of `left` steps, could overflow; the host checked that the model's limit
        holds."""
        limit = self.model.config.max_position_embeddings
        capacities = tuple(
            max(layer.capacity, bucket(filled + left, limit)) if filled + left > layer.capacity else layer.capacity
            for layer, filled in zip(state.cache, batch.slots, strict=True)
        )
        if all(new == layer.capacity for new, layer in zip(capacities, state.cache, strict=True)):
            return state
        return replace(state, cache=grow_jit(state.cache, capacities=capacities))

    def _forced(self, batch: _Batch) -> Int[np.ndarray, "steps batch"]:
        """The tokens to score in the next chunk; -1 where the model chooses."""
        forced = np.full((self.request.chunk_size, len(batch.rows)), -1, np.int32)
        if self.request.forced:
            first = int(self._made.max())
            for place, row in enumerate(batch.rows):
                tokens = self.request.forced[row][first : first + len(forced)]
                forced[: len(tokens), place] = tokens
        return forced

    def _spread(self, chosen: Chosen, rows: Int[np.ndarray, " batch"]) -> Chosen:
        """Columns of the whole request from those of the rows the device holds; the others emitted nothing."""
        if len(rows) == self.request.rows:
            return chosen

        def spread(leaf: np.ndarray) -> np.ndarray:
            whole = np.zeros((leaf.shape[0], self.request.rows, *leaf.shape[2:]), leaf.dtype)
            whole[:, rows] = leaf
            return whole

        return jax.tree.map(spread, chosen)


@jax.jit
def take_rows(tree: Tree, rows: Int[Array, " kept"]) -> Tree:
    return laid_out(jax.tree.map(lambda leaf: leaf[rows], tree), like=tree)


def first_step(
    request: Request, prefilled: Prefilled, controls: Controls, vocabulary: int
) -> tuple[DecodeState, Chosen]:
    """The state of a request's rows after their prompts, their caches in it, and the first token of each."""
    rows = [index for index in range(len(request.prompts)) for _ in range(request.copies)]
    lengths = np.asarray([len(request.prompts[row]) for row in rows], np.int32)
    penalises = request.sampling.penalise
    seen = np.zeros((len(rows), vocabulary if penalises else 0), bool)
    if penalises:
        for row, prompt in enumerate(rows):
            seen[row, list(request.prompts[prompt])] = True
    logits, cache = prefilled.logits, prefilled.cache
    if request.copies > 1:
        logits, cache = take_rows((logits, cache), np.asarray(rows))
    forced = [tokens[0] for tokens in request.forced] if request.forced else [-1] * len(rows)
    state, chosen = begin(
        logits,
        lengths,
        np.full(len(rows), request.max_new_tokens, np.int32),
        np.asarray(np.asarray(request.seeds, np.int64) % 2**31, np.int32),
        seen,
        np.asarray(forced, np.int32),
        controls,
    )
    return replace(state, cache=cache), chosen
