"""A batch that goes on while rows join and leave it between chunks: what a server decodes with.

A batch of four places, of which `b` ends and `e` joins; `·` is a free place, which idles as a row that is done does:

    places      a   b   c   ·          a chunk of steps
    b ends      a   ·   c   ·          its place is free
    e joins     a   e   c   ·          e's prompt was run alone; its row of the cache and of the state is written over
                                       what b left, and a and c are not touched

A row's tokens depend on its own prompt, settings and seed, never on who else is there: that of every batch here. So
joining is only a matter of where a row stands, and compiles nothing: the batch has one of few sizes (1, 2, 4, …) and
its caches one of few capacities, all layers alike, and settings are traced and one per row. It grows when a newcomer
finds no place, and shrinks when half of it has been empty for a while.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qs_jax.adaptive.costs import Costs
from qs_jax.adaptive.ledger import Ledger
from qs_jax.cache import bucket
from qs_jax.engine.decode import Chosen, Controls, DecodeState, decode_chunk
from qs_jax.engine.meter import Meter, share
from qs_jax.engine.prefill import FIRST_CAPACITY, PromptTrace, grow_jit, prefill
from qs_jax.engine.sampling import Sampling
from qs_jax.engine.session import Request, Session, first_step, take_rows
from qs_jax.models.base import CausalLM
from qs_jax.token_set import token_set

_PATIENCE = 4
"""Chunks for which half of the places may stay empty: who asks again at once finds the place still there."""


class Gain(NamedTuple):
    """What a row gained: of `chosen` each leaf is (steps, ...), of this row alone, and only what it emitted.

    `from_draft` says of each token whether it was a draft of exact mode. `over` is set where the device ended the row,
    `prompt` with its first token.
    """

    ticket: int
    chosen: Chosen
    from_draft: Sequence[bool]
    over: bool
    prompt: PromptTrace | None = None


@runtime_checkable
class Batch(Protocol):
    """What runs rows that may run together, chunk by chunk.

    A row is known by the ticket that `join` gave it, until `leave`: of a row that has ended too, since only then its
    ledger is handed out.
    """

    @property
    def live(self) -> int:
        """Rows that go on."""
        ...

    @property
    def free(self) -> int:
        """Rows that may still join."""
        ...

    def join(self, request: Request) -> Gain:
        """Run a request's prompt; the row's first token."""
        ...

    def step(self) -> list[Gain]:
        """A chunk for all rows."""
        ...

    def leave(self, ticket: int) -> Ledger:
        """End a row, if it has not ended, and free its place; what was spent on it."""
        ...


@dataclass
class _Row:
    """A row on the host's books: `place` is None once it has ended, `slots` are those it has filled at most."""

    sampling: Sampling
    ledger: Ledger
    place: int | None
    slots: int
    remaining: int


@dataclass
class _Held:
    """What the device holds; free places are done."""

    state: DecodeState
    tickets: list[int | None]
    empty_for: int = field(default=0)

    @property
    def size(self) -> int:
        return len(self.tickets)

    @property
    def capacity(self) -> int:
        return self.state.cache[0].capacity


class Places:
    """A batch of up to `most` rows, all under the policy, the ends of text and the precision of `like`.

    Whether a repetition penalty is in force and whether logits are kept is that of `like` as well: both shape the
    state or what is handed out. Temperature, seed and the rest of sampling are each row's own.
    """

    def __init__(self, model: CausalLM, like: Request, *, most: int, bits: int | None = None):
        self.model, self._like, self._most, self._bits = model, like, most, bits
        self._limit = model.config.max_position_embeddings
        self._eos = token_set(like.eos_token_ids)
        self._rows: dict[int, _Row] = {}
        self._held: _Held | None = None
        self._given = 0

    @property
    def live(self) -> int:
        return sum(row.place is not None for row in self._rows.values())

    @property
    def free(self) -> int:
        return self._most - self.live

    @property
    def size(self) -> int:
        """Places that the device holds."""
        return self._held.size if self._held else 0

    def join(self, request: Request) -> Gain:
        """Run a prompt alone, choose its first token and take a free place.

        Raises:
            ValueError: there is no free place, more than one row is asked for, or the request is not like the others.
        """
        like = self._like
        if request.rows != 1 or not self.free or request.sampling.penalise != like.sampling.penalise:
            raise ValueError("this batch has no place for that request")
        prompt, room = request.prompts[0], self._limit - request.longest
        prefilled = prefill(self.model, request.prompts, like.policy, new_tokens=room, chunk=request.chunk_size)
        meter = self._meter(prefilled.cache[0].capacity)
        meter.prefill(prefilled, rows=1)
        controls = self._controls([request.sampling])
        state, chosen = first_step(request, prefilled, controls, self.model.config.vocab_size)
        chosen, done = jax.device_get((chosen, state.done))
        over, ticket = bool(done[0]), self._given
        self._given += 1
        place = None if over else self._seat(state, ticket)
        self._rows[ticket] = _Row(
            request.sampling, meter.ledger, place, slots=len(prompt), remaining=request.max_new_tokens - 1
        )
        return Gain(ticket, chosen, [False], over, prefilled.trace)

    def step(self) -> list[Gain]:
        """A chunk of steps for the rows that are there.

        Raises:
            ValueError: there is none.
        """
        self._shrink()
        held, live = self._held, [row for row in self._rows.values() if row.place is not None]
        if held is None or not live:
            raise ValueError("no row is there to go on with")
        chunk_size = self._like.chunk_size
        left = min(chunk_size, max(row.remaining for row in live))
        needed = max(row.slots + min(chunk_size, row.remaining) for row in live)
        self._make_room(held, needed)
        forced = np.full((chunk_size, held.size), -1, np.int32)
        held.state, chunk = decode_chunk(self.model, held.state, forced, self._controls(self._samplings(held)))
        chunk, done = jax.device_get((chunk, held.state.done))
        meter, depth = self._meter(held.capacity), self.model.config.num_hidden_layers
        meter.decode(chunk, [held.capacity] * depth, needed, twin_steps=left)
        produced = int(chunk.chosen.emitted.sum())
        return [
            self._gained(ticket, place, chunk.chosen, meter.ledger, produced, over=bool(done[place]))
            for place, ticket in enumerate(held.tickets)
            if ticket is not None
        ]

    def leave(self, ticket: int) -> Ledger:
        """End a row, if it has not ended, and free its place; what was spent on it, its share of what ran together
        included."""
        row, held = self._rows.pop(ticket), self._held
        if row.place is not None and held is not None:
            held.tickets[row.place] = None
            held.state = replace(held.state, done=_marked(held.state.done, row.place))
        if self._held is not None and not self.live:
            self._held = None
        return row.ledger

    def halve(self) -> None:
        """Go on with half of the places, at once.

        Raises:
            ValueError: more rows than that are there, or none.
        """
        if self._held is None or self.live > max(1, self._held.size // 2):
            raise ValueError(f"{self.live} rows of {self.size} cannot go on in half of the places")
        self._resize(self._held, max(1, self._held.size // 2))

    def _gained(self, ticket: int, place: int, chosen: Chosen, spent: Ledger, produced: int, *, over: bool) -> Gain:
        held, row, emitted = self._held, self._rows[ticket], chosen.emitted[:, place]
        assert held is not None
        own = jax.tree.map(lambda leaf: leaf[emitted, place], chosen)
        tokens = len(own.tokens)
        row.ledger.add(share(spent, own, tokens / max(produced, 1)))
        row.slots, row.remaining = row.slots + tokens, row.remaining - tokens
        if over:
            row.place, held.tickets[place] = None, None
        return Gain(ticket, own, [False] * tokens, over)

    def _meter(self, capacity: int) -> Meter:
        costs = Costs.of(self.model)
        return Meter(costs, self._like.policy, twin_capacity=capacity, limit=self._limit, bits=self._bits)

    def _controls(self, rows: Sequence[Sampling]) -> Controls:
        return Controls(Sampling.of_rows(rows), self._eos, self._like.policy, keep_logits=self._like.keep_logits)

    def _samplings(self, held: _Held) -> list[Sampling]:
        """Of every place; a free one asks for nothing."""
        return [_NOTHING if ticket is None else self._rows[ticket].sampling for ticket in held.tickets]

    def _seat(self, row: DecodeState, ticket: int) -> int:
        """Write a row's state and cache into a free place; which one."""
        held, filled = self._held, max(layer.capacity for layer in row.cache)
        if held is None:
            capacity = bucket(max(FIRST_CAPACITY, filled), self._limit)
            self._held = _Held(_roomier(row, capacity), [ticket])
            return 0
        if None not in held.tickets:
            self._resize(held, min(2 * held.size, self._most))
        if filled > held.capacity:
            held.state = _roomier(held.state, filled)
        place = held.tickets.index(None)
        held.state = _seated(held.state, row, place)
        held.tickets[place], held.empty_for = ticket, 0
        return place

    def _make_room(self, held: _Held, needed: int) -> None:
        """Grow all layers if a row could overflow one; the request was checked against the model's limit."""
        if needed > held.capacity:
            held.state = _roomier(held.state, bucket(needed, self._limit))

    def _shrink(self) -> None:
        held = self._held
        if held is None or held.size == 1 or self.live > held.size // 2:
            if held is not None:
                held.empty_for = 0
            return
        held.empty_for += 1
        if held.empty_for > _PATIENCE:
            self.halve()

    def _resize(self, held: _Held, size: int) -> None:
        """The live rows, in order, in a batch of another size; the rest of it is free."""
        kept = [place for place, ticket in enumerate(held.tickets) if ticket is not None]
        tickets: list[int | None] = [held.tickets[place] for place in kept]
        spare = size - len(kept)
        places = np.asarray(kept + [kept[0] if kept else 0] * spare)
        state = take_rows(held.state, places)
        free = jnp.asarray(np.arange(size) >= len(kept))
        held.state, held.tickets, held.empty_for = replace(state, done=state.done | free), tickets + [None] * spare, 0
        for place, ticket in enumerate(tickets):
            assert ticket is not None
            self._rows[ticket].place = place


class Alone:
    """A batch of one, for what rows cannot join: exact mode, whose rounds are paced by the text of the request."""

    def __init__(self, model: CausalLM, *, bits: int | None = None):
        self.model, self._bits = model, bits
        self._session: Session | None = None
        self._over = False
        self._seen = 0

    @property
    def live(self) -> int:
        return int(self._session is not None and not self._over)

    @property
    def free(self) -> int:
        return int(self._session is None)

    def join(self, request: Request) -> Gain:
        """Run the prompt.

        Raises:
            ValueError: somebody is there already, or more than one row is asked for.
        """
        if self._session is not None or request.rows != 1:
            raise ValueError("this batch has no place for that request")
        self._session, self._over, self._seen = Session(self.model, request, bits=self._bits), False, 0
        self._chunks = self._session.chunks()
        gain, prefilled = self._next(), self._session.prefilled
        assert prefilled is not None
        return gain._replace(prompt=prefilled.trace)

    def step(self) -> list[Gain]:
        return [self._next()]

    def leave(self, ticket: int) -> Ledger:
        assert self._session is not None
        ledger, self._session = self._session.ledger, None
        return ledger

    def _next(self) -> Gain:
        session, chosen = self._session, next(self._chunks)
        assert session is not None
        emitted = chosen.emitted[:, 0]
        own = jax.tree.map(lambda leaf: leaf[emitted, 0], chosen)
        first, request = self._seen, session.request
        self._seen += len(own.tokens)
        marks = session.drafts.from_draft[0][first : self._seen] if session.drafts else [False] * len(own.tokens)
        ended = np.isin(own.tokens, request.eos_token_ids).any() or not np.isfinite(own.logprobs).all()
        self._over = bool(ended) or self._seen >= request.max_new_tokens
        return Gain(0, own, marks, self._over)


_NOTHING = Sampling.of()


@partial(jax.jit, donate_argnames="state")
def _seated(state: DecodeState, row: DecodeState, place: Int[Array, ""] | int) -> DecodeState:
    """The state with a row in this place. The row's cache may have fewer slots: what lies beyond is never read."""

    def write(whole: Array, one: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, one, (place, *[0] * (whole.ndim - 1)))

    return jax.tree.map(write, state, row)


@jax.jit
def _marked(done: Bool[Array, " batch"], place: Int[Array, ""] | int) -> Bool[Array, " batch"]:
    return done.at[place].set(True)


def _roomier(state: DecodeState, capacity: int) -> DecodeState:
    """Every layer with so many slots."""
    if all(layer.capacity == capacity for layer in state.cache):
        return state
    return replace(state, cache=grow_jit(state.cache, capacities=(capacity,) * len(state.cache)))
