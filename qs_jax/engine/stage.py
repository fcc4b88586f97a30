"""The compiled parts of prefill: enter, run a stage of layers, judge, regroup, leave.

Between two stages tokens halt or fuse, and the host gathers those that go on into a smaller bucket: the work of the
others disappears. Halted tokens whose keys and values deeper layers still want form a second group, the resting ones.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive import signals
from qs_jax.adaptive.binding import Structure, Thresholds
from qs_jax.adaptive.fusion import fuse, pairs
from qs_jax.adaptive.halting import halts, is_special
from qs_jax.cache import Cache, LayerCache, append, segment
from qs_jax.errors import require
from qs_jax.matryoshka.linear import at_bits
from qs_jax.models.attention import Segment, new_segment
from qs_jax.models.base import Block, CausalLM


class Tokens(NamedTuple):
    """A group of prompt tokens between two layers; padding is not `valid` and comes last.

    Active ones are in the order of the text, resting ones in that of halting.

    `origins` is where in the prompt a token stands (for a fused one, its last member), `positions` what the model is
    told, `sizes` how many tokens it stands for. `protected` ones neither halt nor fuse.
    """

    hidden_states: Float[Array, "batch tokens hidden"]
    ids: Int[Array, "batch tokens"]
    origins: Int[Array, "batch tokens"]
    positions: Int[Array, "batch tokens"]
    sizes: Int[Array, "batch tokens"]
    valid: Bool[Array, "batch tokens"]
    protected: Bool[Array, "batch tokens"]

    def validate(self, *, active: bool) -> None:
        """Check what is promised above, on the host and on concrete arrays: for tests.

        Raises:
            StateError: it names what does not hold.
        """
        own = jax.device_get(self)
        shapes = {name: leaf.shape[:2] for name, leaf in own._asdict().items()}
        require(len(set(shapes.values())) == 1, f"tokens differ: {shapes}")
        require(not (own.valid[:, 1:] & ~own.valid[:, :-1]).any(), "padding comes before a token")
        finite = np.isfinite(own.hidden_states.astype(np.float32)).all(axis=-1)
        require(bool(finite[own.valid].all()), "a hidden state is not finite")
        origins, positions, sizes = (part[own.valid] for part in (own.origins, own.positions, own.sizes))
        require(bool((sizes >= 1).all()), "a token stands for none")
        # all that a token stands for lies after the active token before it, and ends with itself
        before = np.concatenate([np.full_like(own.origins[:, :1], -1), own.origins[:, :-1]], axis=1)[own.valid]
        first = before + 1 if active else np.zeros_like(origins)
        require(not active or bool((origins > before).all()), "tokens are not in the order of the text")
        require(bool((sizes <= origins - first + 1).all()), "a token stands for more than lie before it")
        require(bool(((positions >= first) & (positions <= origins)).all()), "a position is not among a token's own")
        repeated = any(len(set(row[seen])) < seen.sum() for row, seen in zip(own.origins, own.valid, strict=True))
        require(not repeated, "a token is there twice")


class Verdict(NamedTuple):
    """After a stage, per token: does it halt, was it absorbed by its right neighbour, and what did it show."""

    halts: Bool[Array, "batch tokens"]
    absorbed: Bool[Array, "batch tokens"]
    signal: Float[Array, "batch tokens"]


class _Last(NamedTuple):
    """The last layer of a stage: what it was given, what it made of that, and its attention update."""

    before: Float[Array, "batch tokens hidden"]
    after: Float[Array, "batch tokens hidden"]
    update: Float[Array, "batch tokens hidden"]


@partial(jax.jit, static_argnames="structure")
def enter(
    model: CausalLM,
    ids: Int[Array, "batch tokens"],
    start: Int[Array, ""],
    lengths: Int[Array, " batch"],
    thresholds: Thresholds,
    *,
    structure: Structure,
) -> Tokens:
    """Tokens start … start + width - 1 of the prompts, embedded."""
    positions = start + jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    ends = (positions < structure.protect_first) | (positions >= lengths[:, None] - structure.protect_last)
    return Tokens(
        hidden_states=model.embed(ids, positions),
        ids=ids,
        origins=positions,
        positions=positions,
        sizes=jnp.ones_like(ids),
        valid=positions < lengths[:, None],
        protected=ends | is_special(ids, thresholds.special_ids),
    )


@partial(jax.jit, static_argnames=("structure", "start", "stop", "fresh"), donate_argnames="cache")
def run_stage(
    model: CausalLM,
    active: Tokens,
    resting: Tokens | None,
    cache: Cache,
    thresholds: Thresholds,
    *,
    structure: Structure,
    start: int,
    stop: int,
    fresh: bool,
) -> tuple[Tokens, Tokens | None, Cache, Verdict | None]:
    """Layers `start` … `stop` - 1 for the active tokens; `cache` is those layers'.

    `fresh` says that the cache holds nothing yet, so that attention does not look at it. There is no verdict after the
    last layer.
    """
    layers = []
    last = _Last(active.hidden_states, active.hidden_states, active.hidden_states)
    for number, layer in enumerate(cache, start):
        parts = _parts(model.blocks[number], number, structure)
        active, after, layer, last = _layer(parts, layer, active, resting, structure, fresh=fresh)
        if resting is not None and structure.carries_resting and number + 1 < structure.num_layers:
            after = resting._replace(hidden_states=model.shortcut(number, resting.hidden_states))
        resting = after
        layers.append(layer)
    if stop == structure.num_layers:
        return active, resting, tuple(layers), None
    active, verdict = _judge(model, active, last, structure, thresholds, stop)
    return active, resting, tuple(layers), verdict


def _parts(block: Block, number: int, structure: Structure) -> tuple[Block, Block]:
    """A layer as the active tokens read it, and as the resting ones do."""
    return block, at_bits(block, structure.shallow_bits) if structure.demotes(number) else block


def _layer(
    parts: tuple[Block, Block],
    layer: LayerCache,
    active: Tokens,
    resting: Tokens | None,
    structure: Structure,
    *,
    fresh: bool,
) -> tuple[Tokens, Tokens | None, LayerCache, _Last]:
    """One layer for both groups; every token sees, of both and of the past, what stands before it."""
    block, low = parts
    past = () if fresh else (segment(layer),)
    k, v = block.kv(active.hidden_states, active.positions)
    groups = [(active, k, v)]
    if resting is not None:
        rest_k, rest_v = low.kv(resting.hidden_states, resting.positions)  # under `zero` only their shapes survive
        if structure.kv_rule == "zero":
            rest_k, rest_v = jnp.zeros_like(rest_k), jnp.zeros_like(rest_v)
        groups.append((resting, rest_k, rest_v))

    def attended(block: Block, queries: Tokens) -> tuple[Array, Array]:
        view = (*past, *(_seen_by(queries, tokens, k, v, structure) for tokens, k, v in groups))
        update = block.attend(queries.hidden_states, queries.positions, view)
        return update, block.finish(queries.hidden_states, update)

    update, after = attended(block, active)
    last = _Last(active.hidden_states, after, update)
    if resting is not None and structure.kv_rule == "shallow":
        resting = resting._replace(hidden_states=attended(low, resting)[1])
    for tokens, k, v in groups:
        layer = append(layer, k, v, tokens.positions, tokens.valid, _bias(tokens, structure))
    return active._replace(hidden_states=after), resting, layer, last


def _seen_by(queries: Tokens, tokens: Tokens, k: Array, v: Array, structure: Structure) -> Segment:
    """The tokens of a group as the queries see them: those before, and oneself (so that padding sees something)."""
    before = tokens.origins[:, None, :] < queries.origins[:, :, None]
    visible = before & tokens.valid[:, None, :]
    if queries is tokens:
        visible |= jnp.eye(tokens.valid.shape[1], dtype=bool)
    return new_segment(k, v, visible, _bias(tokens, structure))


def _bias(tokens: Tokens, structure: Structure) -> Float[Array, "batch tokens"] | None:
    """log(size) on a fused token's attention logits, where the policy asks for it."""
    biased = structure.fusion is not None and structure.fusion.size_bias
    return jnp.log(tokens.sizes.astype(jnp.float32)) if biased else None


def _judge(
    model: CausalLM, active: Tokens, last: _Last, structure: Structure, thresholds: Thresholds, layer: int
) -> tuple[Tokens, Verdict]:
    """After `layer` layers: halting first, then fusion among the tokens that go on."""
    nobody = jnp.zeros_like(active.valid)
    halt, absorbed, signal = nobody, nobody, jnp.zeros(active.valid.shape, jnp.float32)
    halting, fusion = structure.prompt, structure.fusion
    if halting is not None and layer in halting.layers:
        entropy = signals.lens_entropy(model, last.after, structure.shortlist) if halting.probes else None
        seen = signals.Evidence(*last, active.origins, active.ids, entropy)
        values = {name: seen.value(name, layer) for name in halting.reads}
        exempt = active.protected | ~active.valid
        halt = halts(halting, values, thresholds.prompt_halt[layer], thresholds.prompt_entropy, exempt)
        signal = values[halting.signal]
    if fusion is not None and layer in fusion.layers:
        may_fuse = active.valid & ~halt & ~active.protected
        fuses = pairs(fusion, active.hidden_states, may_fuse, thresholds.fuse[layer])
        fused = fuse(active.hidden_states, active.positions, active.sizes, fuses, fusion.position)
        absorbed = fused.absorbed
        active = active._replace(hidden_states=fused.hidden_states, positions=fused.positions, sizes=fused.sizes)
    return active, Verdict(halt, absorbed, signal)


@partial(jax.jit, static_argnames=("width", "rest_width"))
def regroup(
    active: Tokens, resting: Tokens | None, verdict: Verdict, *, width: int, rest_width: int
) -> tuple[Tokens, Tokens | None]:
    """Gather the tokens that go on into `width` places, and those that rest into `rest_width` (0: there are none)."""
    going = active.valid & ~verdict.halts & ~verdict.absorbed
    rested = active._replace(valid=active.valid & verdict.halts)
    if not rest_width:
        return _gathered(active, going, width), None
    joined = rested if resting is None else _joined((resting, rested))
    return _gathered(active, going, width), _gathered(joined, joined.valid, rest_width)


def _joined(groups: Sequence[Tokens]) -> Tokens:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *groups)


def _gathered(tokens: Tokens, chosen: Bool[Array, "batch tokens"], width: int) -> Tokens:
    order = jnp.argsort(~chosen, axis=1, stable=True)[:, :width]

    def take(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, order.reshape(*order.shape, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(take, tokens._replace(valid=chosen))


@partial(jax.jit, donate_argnames="logits")
def leave(
    model: CausalLM, active: Tokens, lengths: Int[Array, " batch"], logits: Float[Array, "batch vocab"]
) -> Float[Array, "batch vocab"]:
    """Logits after the last token of every row whose last token is among the active ones; the others' stay."""
    is_last = active.valid & (active.origins == lengths[:, None] - 1)
    place = jnp.argmax(is_last, axis=1)
    hidden_states = jnp.take_along_axis(active.hidden_states, place[:, None, None], axis=1)[:, 0]
    return jnp.where(is_last.any(axis=1)[:, None], model.head(hidden_states), logits)
