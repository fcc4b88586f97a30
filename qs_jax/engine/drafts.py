"""What proposes tokens in exact mode: text that occurred before, the model read cheaply, or one checked by the other.

Each is a frozen pytree that a round asks and does not know by name (`qs_jax.engine.exact.Draft`).
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.ledger import Ledger, PassCosts, Tally
from qs_jax.cache import Cache
from qs_jax.engine.decode import Controls, DecodeState, decode_step, unless_done
from qs_jax.engine.exact import Draft, History, Proposal, exact_round
from qs_jax.kernels import at_bits
from qs_jax.models.base import CausalLM
from qs_jax.pytree import STATIC

LONGEST = 3
"""Most tokens that a lookup compares."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup:
    """What followed the latest earlier occurrence of the last `longest` tokens, or of fewer, in prompt and output.

    It costs nothing (Saxena's prompt lookup, 2023). A text that ends in a repetition is taken to go on with it.
    """

    longest: int = field(default=LONGEST, metadata=STATIC)

    @property
    def remembers(self) -> bool:
        return False

    def propose(
        self, model: CausalLM, state: DecodeState, history: History, controls: Controls, count: int
    ) -> Proposal:
        return Proposal(self.continuation(history, state.positions, count), state.cache, ())

    def continuation(self, history: History, last: Int[Array, " batch"], count: int) -> Int[Array, "batch drafts"]:
        """Drafts behind the tokens at `last`; -1 for rows whose last token is new to them."""
        places = jnp.arange(history.shape[1], dtype=jnp.int32)
        matched = jnp.zeros_like(history)
        alike = places < last[:, None]
        for back in range(self.longest):
            wanted = jnp.take_along_axis(history, jnp.maximum(last - back, 0)[:, None], axis=1)
            # a row shorter than what is looked for, and places with too little before them, match no longer
            alike &= (jnp.roll(history, back, axis=1) == wanted) & (places >= back) & (last[:, None] >= back)
            matched += alike.astype(jnp.int32)
        at = jnp.argmax(matched * history.shape[1] + jnp.where(matched > 0, places, 0), axis=1).astype(jnp.int32)
        period = jnp.maximum(last - at, 1)[:, None]
        follow = at[:, None] + 1 + jnp.arange(count, dtype=jnp.int32) % period
        found = (matched > 0).any(axis=1, keepdims=True)
        return jnp.where(found, jnp.take_along_axis(history, follow, axis=1), -1)

    def spent(self, costs: PassCosts, work: Any) -> Tally:
        return Tally()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """Decode steps of the same network under a policy, read at `bits` where these are given.

    They see the dense keys and values of the text, and add their own for the tokens in flight.
    """

    policy: BoundPolicy
    bits: int | None = field(default=None, metadata=STATIC)

    @property
    def remembers(self) -> bool:
        return self.policy.remembers

    def propose(
        self, model: CausalLM, state: DecodeState, history: History, controls: Controls, count: int
    ) -> Proposal:
        network = model if self.bits is None else at_bits(model, self.bits)
        own, free = replace(controls, policy=self.policy, keep_logits=False), jnp.full_like(state.tokens, -1)

        def step(state: DecodeState, _: None) -> tuple[DecodeState, tuple[Int[Array, " batch"], Any]]:
            state, (chosen, work) = decode_step(network, state, free, own, run=unless_done)
            return state, (jnp.where(chosen.emitted, chosen.tokens, -1), work)

        after, (tokens, work) = jax.lax.scan(step, state, length=count)
        return Proposal(tokens.T, _taken_back(after.cache, state.cache), work)

    def spent(self, costs: PassCosts, work: Any) -> Tally:
        leading = work.rows_run.ndim - 1
        ran = work.rows_run[..., 0].reshape(-1) > 0
        steps = jax.tree.map(lambda leaf: leaf.reshape(ran.size, *leaf.shape[leading:])[ran], work)
        ledger = Ledger(costs.costs, self.policy, self.bits or costs.bits)
        ledger.add_decode(steps, int(ran.sum()), costs.rows, costs.slots)
        return ledger.run


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cascade:
    """Drafts of a cheaper draft, verified by the same network at `bits` before the dense model sees them.

    Its rounds are those of exact mode itself, of `ahead` drafts each, until there are as many tokens as were asked for
    (arXiv 2503.13565, with one network at several precisions for its several models).
    """

    first: Draft
    bits: int = field(metadata=STATIC)
    ahead: int = field(metadata=STATIC)

    @property
    def remembers(self) -> bool:
        return self.first.remembers

    def propose(
        self, model: CausalLM, state: DecodeState, history: History, controls: Controls, count: int
    ) -> Proposal:
        network, own = at_bits(model, self.bits), replace(controls, keep_logits=False)
        # a row that has its drafts is done, so that the last of these rounds run only where others need them
        inner = replace(state, remaining=jnp.minimum(state.remaining, count))

        def one(carry: tuple[DecodeState, History], _: None) -> Any:
            state, history, told = exact_round(network, *carry, self.first, own, self.ahead)
            return (state, history), (told.chosen.tokens, told.chosen.emitted, told.work)

        (after, _), (tokens, emitted, work) = jax.lax.scan(one, (inner, history), length=count)
        tokens, emitted = (x.reshape(-1, x.shape[-1]).T for x in (tokens, emitted))
        places = jnp.where(emitted, jnp.cumsum(emitted, axis=1, dtype=jnp.int32) - 1, count)
        rows = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
        drafts = jnp.full((tokens.shape[0], count), -1, jnp.int32).at[rows, places].set(tokens, mode="drop")
        ran = emitted.any(axis=0).reshape(count, -1).any(axis=1)
        return Proposal(drafts, _taken_back(after.cache, state.cache), (ran, work))

    def spent(self, costs: PassCosts, work: Any) -> Tally:
        ran, first = work
        tally = replace(costs, bits=self.bits).of(int(np.sum(ran)), self.ahead + 1)
        return tally + self.first.spent(replace(costs, bits=self.bits), first)


def _taken_back(drafted: Cache, before: Cache) -> Cache:
    """The cache with what drafts wrote behind the text, where nobody reads it."""
    return tuple(replace(layer, lengths=old.lengths) for layer, old in zip(drafted, before, strict=True))
