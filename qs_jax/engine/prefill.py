"""Prompts into the cache: padded on the right to a bucket, in bounded pieces, each piece stage by stage.

The host reads after every stage how many tokens go on and picks the smallest bucket that holds them, so that halting
and fusion remove real work with a handful of compiled programs. With both off there is a single stage of all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.ledger import StagePass
from qs_jax.cache import Cache, LayerCache, allocate, bucket, grow
from qs_jax.engine.stage import Tokens, Verdict, enter, leave, regroup, run_stage
from qs_jax.models.base import CausalLM

PIECE = 1024
"""Most tokens of a prompt that go through the blocks at once: bounds the memory of the attention scores."""

FIRST_CAPACITY = 256
"""Slots a cache starts with if the request could need more; it doubles as the text grows."""

_SMALLEST_PIECE = 16
_SIZES_PER_OCTAVE = 4
_WIDTHS_PER_OCTAVE = 2

grow_jit = jax.jit(grow, static_argnames="capacities")


@dataclass
class PromptTrace:
    """Per row and prompt token: layers run, the token it was fused into (-1: none), and what it showed when judged."""

    layers_run: list[Int[np.ndarray, " tokens"]]
    fused_with: list[Int[np.ndarray, " tokens"]]
    signal: list[Float[np.ndarray, " tokens"]]


@dataclass
class Prefilled:
    """The cache after the prompts, the logits that follow each, and what it took.

    `written` is, per layer and row, the number of slots filled.
    """

    logits: Float[Array, "batch vocab"]
    cache: Cache
    written: Int[np.ndarray, "layers batch"]
    trace: PromptTrace
    passes: list[StagePass] = field(default_factory=list)


def first_capacity(filled: int, new_tokens: int, chunk: int, limit: int) -> int:
    """Slots for `filled` tokens and the first chunk to come; no more than the whole request could need."""
    return bucket(min(filled + new_tokens, max(FIRST_CAPACITY, filled + chunk)), limit)


def piece_width(tokens: int, limit: int) -> int:
    """Places for the next piece of a prompt that has `tokens` left; `limit` is the model's."""
    most = min(PIECE, limit)
    return bucket(min(tokens, most), most, smallest=_SMALLEST_PIECE, per_octave=_WIDTHS_PER_OCTAVE)


def prefill(
    model: CausalLM, prompts: Sequence[Sequence[int]], bound: BoundPolicy, *, new_tokens: int, chunk: int
) -> Prefilled:
    """Run ragged prompts; row i of the result is what prompt i alone would give.

    Args:
        model: the network.
        prompts: token ids of every row.
        bound: the policy.
        new_tokens: most tokens that will follow, and `chunk` how many at once: the cache has room for the first chunk.
    """
    return _Prefill(model, prompts, bound, new_tokens, chunk).run()


class _Prefill:
    """The host's side of one prefill."""

    def __init__(
        self, model: CausalLM, prompts: Sequence[Sequence[int]], bound: BoundPolicy, new_tokens: int, chunk: int
    ):
        self.model, self.prompts, self.bound = model, prompts, bound
        self.new_tokens, self.chunk = new_tokens, chunk
        self.lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        depth, config = bound.structure.num_layers, model.config
        self.cache: list[LayerCache | None] = [None] * depth
        self.result = Prefilled(
            logits=jnp.zeros((len(prompts), config.vocab_size), jnp.float32),
            cache=(),
            written=np.zeros((depth, len(prompts)), np.int32),
            trace=PromptTrace(
                [np.full(n, depth, np.int32) for n in self.lengths],
                [np.full(n, -1, np.int32) for n in self.lengths],
                [np.zeros(n, np.float32) for n in self.lengths],
            ),
        )

    def run(self) -> Prefilled:
        longest = int(self.lengths.max())
        for start in range(0, longest, PIECE):
            self._piece(start, piece_width(longest - start, self.model.config.max_position_embeddings))
        self.result.cache = tuple(layer for layer in self.cache if layer is not None)
        return self.result

    def _piece(self, start: int, width: int) -> None:
        """Tokens start … start + width - 1 of every row through all stages."""
        bound, lengths = self.bound, jnp.asarray(self.lengths)
        ids = np.zeros((len(self.prompts), width), np.int32)
        for row, prompt in enumerate(self.prompts):
            part = prompt[start : start + width]
            ids[row, : len(part)] = part
        active = enter(self.model, ids, jnp.int32(start), lengths, bound.thresholds, structure=bound.structure)
        going = np.clip(self.lengths - start, 0, width)
        resting, rested = None, np.zeros_like(going)
        for first, stop in bound.structure.stages:
            cache = self._room(first, stop, going + rested)
            self.result.passes.append(
                StagePass(
                    start=first,
                    stop=stop,
                    rows=len(going),
                    tokens=active.ids.shape[1],
                    resting=resting.ids.shape[1] if resting else 0,
                    slots=cache[0].capacity if start else 0,
                )
            )
            active, resting, cache, verdict = run_stage(
                self.model,
                active,
                resting,
                cache,
                bound.thresholds,
                structure=bound.structure,
                start=first,
                stop=stop,
                fresh=start == 0,
            )
            self.cache[first:stop] = cache
            self.result.written[first:stop] += going + rested
            if verdict is not None:
                active, resting, going, rested = self._regroup(active, resting, verdict, stop, rested)
        self.result.logits = leave(self.model, active, lengths, self.result.logits)

    def _room(self, first: int, stop: int, added: Int[np.ndarray, " batch"]) -> Cache:
        """The caches of a stage's layers, made or grown for the tokens about to come and those to follow."""
        config = self.model.config
        written = int((self.result.written[first] + added).max())
        if first == 0:
            written = int(self.lengths.max())
        capacity = first_capacity(written, self.new_tokens, self.chunk, config.max_position_embeddings)
        fusion = self.bound.structure.fusion
        layers = [layer for layer in self.cache[first:stop] if layer is not None]
        if not layers:
            make = partial(
                allocate, config, len(self.prompts), capacity, self.model.embedding.table.dtype,
                biased=fusion is not None and fusion.size_bias,
            )  # fmt: skip
            return tuple(make() for _ in range(first, stop))
        if layers[0].capacity >= capacity:
            return tuple(layers)
        return grow_jit(tuple(layers), capacities=(capacity,) * len(layers))

    def _regroup(
        self,
        active: Tokens,
        resting: Tokens | None,
        verdict: Verdict,
        layer: int,
        rested: Int[np.ndarray, " batch"],
    ) -> tuple[Tokens, Tokens | None, Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """Gather the tokens that go on into the smallest bucket; returns the groups and each row's counts of both."""
        halted, absorbed, signal, valid, origins = jax.device_get((*verdict, active.valid, active.origins))
        self._note(halted, absorbed, signal, valid, origins, layer)
        going = (valid & ~halted & ~absorbed).sum(axis=1, dtype=np.int32)
        if not (halted | absorbed).any():
            return active, resting, going, rested
        if self.bound.structure.kv_rule != "drop":
            rested = rested + halted.sum(axis=1, dtype=np.int32)
        width = bucket(int(going.max()), valid.shape[1], smallest=_SMALLEST_PIECE, per_octave=_SIZES_PER_OCTAVE)
        rest_width = bucket(int(rested.max()), PIECE, smallest=_SMALLEST_PIECE, per_octave=_SIZES_PER_OCTAVE)
        active, resting = regroup(active, resting, verdict, width=width, rest_width=rest_width if rested.any() else 0)
        return active, resting, going, rested

    def _note(
        self,
        halted: Bool[np.ndarray, "batch tokens"],
        absorbed: Bool[np.ndarray, "batch tokens"],
        signal: Float[np.ndarray, "batch tokens"],
        valid: Bool[np.ndarray, "batch tokens"],
        origins: Int[np.ndarray, "batch tokens"],
        layer: int,
    ) -> None:
        """Write a verdict into the trace."""
        trace, halting = self.result.trace, self.bound.structure.prompt
        for row in range(len(valid)):
            if halting is not None and layer in halting.layers:  # else tokens were only asked to fuse
                trace.signal[row][origins[row, valid[row]]] = signal[row, valid[row]]
            trace.layers_run[row][origins[row, halted[row]]] = layer
            gone = np.flatnonzero(absorbed[row])
            trace.layers_run[row][origins[row, gone]] = layer
            trace.fused_with[row][origins[row, gone]] = origins[row, gone + 1]
