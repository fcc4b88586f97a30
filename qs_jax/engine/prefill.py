"""Prompts into the cache: padded on the right to a bucket, in bounded pieces, each piece stage by stage.

The host reads after every stage how many tokens go on and picks the smallest bucket that holds them, so that halting
and fusion remove real work with a handful of compiled programs. With both off there is a single stage of all layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.ledger import StagePass
from qs_jax.cache import Cache, LayerCache, bucket, grow
from qs_jax.engine.stage import Decision, Entering, Tokens, regroup, run_stage
from qs_jax.models.base import CausalLM
from qs_jax.sharding import laid_out, on_host

PIECE = 1024
"""Most tokens of a prompt that go through the blocks at once: bounds the memory of the attention scores."""

FIRST_CAPACITY = 256
"""Slots a cache starts with if the request could need more; it doubles as the text grows."""

_SMALLEST_PIECE = 16
_SIZES_PER_OCTAVE = 4
_WIDTHS_PER_OCTAVE = 2


@partial(jax.jit, static_argnames="capacities")
def grow_jit(cache: Cache, capacities: tuple[int, ...]) -> Cache:
    """`grow`, compiled."""
    return laid_out(grow(cache, capacities), like=cache)


Counts = Int[np.ndarray, " batch"]
Places = Int[np.ndarray, "batch tokens"]
PerToken = Bool[np.ndarray, "batch tokens"]


@dataclass
class PromptTrace:
    """Per row and prompt token: layers run, the token it was fused into (-1: none), and what it showed at the last
    decision about it.

    Layers run are those after which a token halted or fused; all of them if it did neither, though of the last one it
    runs keys and values only, unless its logits are read. The ledger counts what that takes, on both sides.
    """

    layers_run: list[Int[np.ndarray, " tokens"]]
    fused_with: list[Int[np.ndarray, " tokens"]]
    signal: list[Float[np.ndarray, " tokens"]]

    @classmethod
    def dense(cls, lengths: Counts, depth: int) -> "PromptTrace":
        """Of tokens that nothing was decided about."""
        return cls(
            [np.full(n, depth, np.int32) for n in lengths],
            [np.full(n, -1, np.int32) for n in lengths],
            [np.zeros(n, np.float32) for n in lengths],
        )

    def note(self, decision: Decision, valid: PerToken, origins: Places, *, layer: int, halting: bool) -> None:
        """Take in what was decided after `layer` layers about the valid tokens, which stand at these places of the
        prompt; if not `halting`, they were only asked to fuse and showed nothing. All arrays are the host's."""
        for row in range(len(valid)):
            if halting:
                self.signal[row][origins[row, valid[row]]] = decision.signal[row, valid[row]]
            self.layers_run[row][origins[row, decision.halts[row]]] = layer
            gone = np.flatnonzero(decision.absorbed[row])
            self.layers_run[row][origins[row, gone]] = layer
            self.fused_with[row][origins[row, gone]] = origins[row, gone + 1]


class Piece(NamedTuple):
    """Tokens start … start + width - 1 of every row, as they were run."""

    start: int
    width: int
    passes: tuple[StagePass, ...]


@dataclass(frozen=True)
class Prefilled:
    """The cache after the prompts, the logits that follow each, and what it took.

    `filled` is, per layer and row, the number of slots that hold a token.
    """

    logits: Float[Array, "batch vocab"]
    cache: Cache
    filled: Int[np.ndarray, "layers batch"]
    trace: PromptTrace
    pieces: tuple[Piece, ...]


def first_capacity(filled: int, new_tokens: int, chunk: int, limit: int) -> int:
    """Slots for `filled` tokens and the first chunk to come; no more than the whole request could need."""
    return bucket(min(filled + new_tokens, max(FIRST_CAPACITY, filled + chunk)), limit)


def piece_width(tokens: int, limit: int) -> int:
    """Places for the next piece of a prompt that has `tokens` left; `limit` is the model's."""
    most = min(PIECE, limit)
    return bucket(min(tokens, most), most, smallest=_SMALLEST_PIECE, per_octave=_WIDTHS_PER_OCTAVE)


def prefill(
    model: CausalLM, prompts: Sequence[Sequence[int]], policy: BoundPolicy, *, new_tokens: int, chunk: int
) -> Prefilled:
    """Run ragged prompts; row i of the result is what prompt i alone would give.

    Args:
        model: the network.
        prompts: token ids of every row.
        policy: what decides which tokens go on.
        new_tokens: most tokens that will follow, and `chunk` how many at once: the cache has room for the first chunk.
    """
    config, lengths = model.config, np.asarray([len(prompt) for prompt in prompts], np.int32)
    limit, trace = config.max_position_embeddings, PromptTrace.dense(lengths, policy.num_layers)
    cache: list[LayerCache] = []
    filled = np.zeros((policy.num_layers, len(prompts)), np.int32)
    logits: Float[Array, "batch vocab"] | None = None
    pieces: list[Piece] = []
    for start, width, ids in _cut(prompts, int(lengths.max()), limit):
        active: Entering | Tokens = Entering(ids, np.asarray(start, np.int32), lengths, policy.protection)
        resting: Tokens | None = None
        going, rested, passes = np.clip(lengths - start, 0, width), np.zeros_like(lengths), []
        for first, stop in policy.stages:
            needed = lengths if first == 0 else filled[first] + going + rested
            capacity = first_capacity(int(needed.max()), new_tokens, chunk, limit)
            layers = _with_room(cache[first:stop], capacity) if start else None
            slots, resting_width = layers[0].capacity if layers else 0, resting.ids.shape[1] if resting else 0
            passes.append(StagePass(first, stop, len(prompts), active.ids.shape[1], resting_width, slots))
            given = logits if stop == policy.num_layers else None
            new = None if start else capacity
            staged = run_stage(model, active, resting, layers, given, policy, start=first, stop=stop, capacity=new)
            cache[first:stop] = staged.cache
            filled[first:stop] += going + rested
            if staged.active is None or staged.decision is None:
                logits = staged.logits
                break
            going_on, resting, decision = staged.active, staged.resting, staged.decision
            halting = policy.prompt_halting is not None and stop in policy.prompt_halting.layers
            taken, valid, origins = on_host((decision, going_on.valid, going_on.origins))
            trace.note(taken, valid, origins, layer=stop, halting=halting)
            active = going_on
            if (taken.halts | taken.absorbed).any():
                going = (valid & ~taken.halts & ~taken.absorbed).sum(axis=1, dtype=np.int32)
                rested = rested + policy.kv_rule.keeps_slots * taken.halts.sum(axis=1, dtype=np.int32)
                active, resting = _regrouped(going_on, resting, decision, going, rested, halting=halting)
        pieces.append(Piece(start, width, tuple(passes)))
    assert logits is not None
    return Prefilled(logits, tuple(cache), filled, trace, tuple(pieces))


def _cut(
    prompts: Sequence[Sequence[int]], longest: int, limit: int
) -> Iterator[tuple[int, int, Int[np.ndarray, "batch width"]]]:
    """The pieces of the prompts: where each starts, its width, and its ids, with zeros behind the ends of rows."""
    for start in range(0, longest, PIECE):
        width = piece_width(longest - start, limit)
        ids = np.zeros((len(prompts), width), np.int32)
        for row, prompt in enumerate(prompts):
            part = prompt[start : start + width]
            ids[row, : len(part)] = part
        yield start, width, ids


def _with_room(layers: Sequence[LayerCache], capacity: int) -> Cache:
    """The caches of a stage's layers, grown where they have fewer slots than they may need."""
    if layers[0].capacity >= capacity:
        return tuple(layers)
    return grow_jit(tuple(layers), capacities=(capacity,) * len(layers))


def _regrouped(
    active: Tokens, resting: Tokens | None, decision: Decision, going: Counts, rested: Counts, *, halting: bool
) -> tuple[Tokens, Tokens | None]:
    """The tokens that go on in the smallest bucket that holds them, and likewise those that rest."""
    fit = partial(bucket, smallest=_SMALLEST_PIECE, per_octave=_SIZES_PER_OCTAVE)
    rest_width = fit(int(rested.max()), PIECE) if rested.any() else 0
    width = fit(int(going.max()), active.ids.shape[1])
    return regroup(active, resting, decision, halting=halting, width=width, rest_width=rest_width)
