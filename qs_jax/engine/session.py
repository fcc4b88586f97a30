"""The host's side of a request: prefill once, then decode chunk by chunk until every row is done."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from qs_jax.adaptive.ledger import Costs, Ledger
from qs_jax.cache import bucket, grow
from qs_jax.engine.compilation import METER
from qs_jax.engine.decode import Chosen, DecodeState, begin, decode_chunk
from qs_jax.engine.prefill import prefill
from qs_jax.engine.sampling import SamplingPlan, SamplingSettings
from qs_jax.engine.stopping import eos_array
from qs_jax.models.base import CausalLM

_FIRST_CAPACITY = 256
"""Slots a cache starts with if the request could need more; it doubles as the text grows."""


@dataclass(frozen=True)
class Request:
    """Token ids in, and all that decides what comes out. One row per prompt and returned sequence.

    `copies` is the number of sequences per prompt; `seeds` has one (seed, sequence) pair per row.
    """

    prompts: Sequence[Sequence[int]]
    copies: int
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    seeds: Sequence[tuple[int, int]]
    settings: SamplingSettings
    plan: SamplingPlan
    chunk_size: int


class Session:
    """Runs a request. Iterate `chunks()`; call `finish(row)` between chunks to end a row early."""

    def __init__(self, model: CausalLM, request: Request):
        self.model = model
        self.request = request
        self.ledger = Ledger(Costs.of(model))
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.decode_steps = 0
        self._written = 0
        self._compiled_before = METER.reading()
        self._finished: set[int] = set()

    @property
    def compile_seconds(self) -> float:
        return METER.since(self._compiled_before).seconds

    def finish(self, row: int) -> None:
        """End a row: it takes no further part from the next chunk on."""
        self._finished.add(row)

    def chunks(self) -> Iterator[Chosen]:
        """What was chosen, as host arrays (steps, batch); the first chunk is the prefill's single step."""
        request, eos = self.request, eos_array(self.request.eos_token_ids)
        started = time.perf_counter()
        state, first = self._prefill(eos)
        chosen, done = jax.device_get((first, state.done))
        self.prefill_seconds = time.perf_counter() - started
        yield Chosen(*(field[None] for field in chosen))
        while True:
            state, done = self._apply_finished(state, done)
            if done.all():
                return
            started = time.perf_counter()
            state = self._make_room(state)
            capacity = state.cache[0].capacity
            state, chunk = decode_chunk(
                self.model, state, request.settings, eos, plan=request.plan, steps=request.chunk_size
            )
            chosen, done = jax.device_get((chunk, state.done))
            self.decode_seconds += time.perf_counter() - started
            self._count(chosen, capacity)
            yield chosen

    def _prefill(self, eos: jax.Array) -> tuple[DecodeState, Chosen]:
        request, vocab_size = self.request, self.model.config.vocab_size
        longest = max(map(len, request.prompts))
        total = longest + request.max_new_tokens
        first_use = min(total, max(_FIRST_CAPACITY, longest + request.chunk_size))
        capacity = bucket(first_use, self.model.config.max_position_embeddings)
        prefilled = prefill(self.model, request.prompts, capacity)
        for width, slots in prefilled.pieces:
            rows = len(request.prompts)
            self.ledger.add_pass(rows=rows, tokens=width, slots=slots, logit_rows=rows)
        self.ledger.add_writes(sum(map(len, request.prompts)))
        self._written = longest
        rows = [index for index in range(len(request.prompts)) for _ in range(request.copies)]
        lengths = np.asarray([len(request.prompts[row]) for row in rows], np.int32)
        seen = np.zeros((len(rows), vocab_size if request.plan.penalise else 0), bool)
        if request.plan.penalise:
            for row, prompt in enumerate(rows):
                seen[row, list(request.prompts[prompt])] = True
        logits, cache = prefilled.logits, prefilled.cache
        if request.copies > 1:
            logits, cache = _take_rows((logits, cache), np.asarray(rows))
        return begin(
            logits,
            cache,
            jnp.asarray(lengths),
            jnp.full(len(rows), request.max_new_tokens, jnp.int32),
            _row_keys(request.seeds),
            jnp.asarray(seen),
            request.settings,
            eos,
            plan=request.plan,
        )

    def _apply_finished(self, state: DecodeState, done: np.ndarray) -> tuple[DecodeState, np.ndarray]:
        finished = np.isin(np.arange(len(done)), list(self._finished))
        if (finished & ~done).any():
            done = done | finished
            state = replace(state, done=jnp.asarray(done))
        return state, done

    def _make_room(self, state: DecodeState) -> DecodeState:
        """Double the cache while the next chunk could overflow it; the host checked that the model's limit holds."""
        longest = max(map(len, self.request.prompts))
        needed = min(self._written + self.request.chunk_size, longest + self.request.max_new_tokens)
        if needed <= state.cache[0].capacity:
            return state
        capacity = bucket(needed, self.model.config.max_position_embeddings)
        return replace(state, cache=_grow(state.cache, capacity))

    def _count(self, chosen: Chosen, capacity: int) -> None:
        steps, rows = int(chosen.emitted.any(axis=1).sum()), chosen.emitted.shape[1]
        self._written += steps
        self.decode_steps += steps
        self.ledger.add_pass(rows=rows, tokens=1, slots=capacity, logit_rows=rows, times=steps)
        self.ledger.add_writes(int(chosen.emitted.sum()))


_grow = jax.jit(grow, static_argnums=1)
_take_rows = jax.jit(lambda tree, rows: jax.tree.map(lambda leaf: leaf[rows], tree))


@jax.jit
def _keys_of(seeds: Int[Array, "batch 2"]) -> Key[Array, " batch"]:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(pair[0]), pair[1]))(seeds)


def _row_keys(seeds: Sequence[tuple[int, int]]) -> Key[Array, " batch"]:
    """One key per row, from the seed asked for and the sequence's number: batch mates play no part."""
    return _keys_of(jnp.asarray(np.asarray(seeds, np.int64) % 2**31, jnp.int32))
