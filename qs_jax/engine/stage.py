"""The compiled parts of prefill: run a stage of layers and decide, regroup.

Between two stages prompt tokens halt or fuse, and the host gathers those that go on into a smaller bucket: the work of
the others disappears.

What a prompt token can be:

| state | what happens to it | how it becomes so |
|---|---|---|
| padding | nothing: it is not `valid`, and fills the bucket | behind the prompt, or left over by a gathering |
| active | runs the layer | from the first layer on |
| halted | takes no further compute | the policy decided after a stage |
| resting | forms the second group, of which the K/V rule leaves keys and values | by halting, but under `drop` |
| absorbed | gone: it went on in its right neighbour | by fusion, among the tokens that go on |
| protected | neither halts nor fuses | a prompt's first and last tokens, special ones |
| read | its logits choose the first new token: it alone runs the last layer whole | a prompt's last token |

Of the last layer all other tokens, active or resting, leave their keys and values and no more: nobody reads what would
come out of it.

Six tokens, after a stage in which b and e halt and d goes into e's right neighbour f; a bucket holds four:

    before      active  | a | b | c | d | e | f |
    after       active  | a | c | f'| - |              f' stands for d and f; - is padding
                resting | b | e | - | - |              under `drop` there is no such group
    next layer's cache  | a | c | f'| b | e |          slots in the order they were written, each with its position

Attention goes by position in the text, not by slot: c sees a and b, and f' sees all.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.fusion import fuse
from qs_jax.adaptive.protection import Protection
from qs_jax.adaptive.signals import Evidence, Shown, probe_entropy
from qs_jax.cache import Cache, LayerCache, allocate, append, segment
from qs_jax.errors import require
from qs_jax.kernels import at_bits
from qs_jax.models import alike
from qs_jax.models.attention import Segment, new_segment
from qs_jax.models.base import Block, CausalLM, Heads, LayerOutput
from qs_jax.sharding import laid_out


class Tokens(NamedTuple):
    """A group of prompt tokens between two layers; padding is not `valid` and comes last.

    Active ones are in the order of the text, resting ones in that of halting.

    `origins` is where in the prompt a token stands (for a fused one, its last member), `positions` what the model is
    told, `sizes` how many tokens it stands for. `protected` ones neither halt nor fuse. Of a row at most one is `read`,
    its logits that is, and that one is protected. `aside` are states after as many layers as the K/V rule looks back
    to, for as far as the tokens have come.
    """

    hidden_states: Float[Array, "batch tokens hidden"]
    ids: Int[Array, "batch tokens"]
    origins: Int[Array, "batch tokens"]
    positions: Int[Array, "batch tokens"]
    sizes: Int[Array, "batch tokens"]
    valid: Bool[Array, "batch tokens"]
    protected: Bool[Array, "batch tokens"]
    read: Bool[Array, "batch tokens"]
    aside: tuple[Float[Array, "batch tokens hidden"], ...] = ()

    def validate(self, *, active: bool) -> None:
        """Check what is promised above, on the host and on concrete arrays: for tests.

        Raises:
            StateError: it names what does not hold.
        """
        own = jax.device_get(self)
        shapes = {str(leaf.shape[:2]) for leaf in jax.tree.leaves(own)}
        require(len(shapes) == 1, f"tokens differ: {sorted(shapes)}")
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
        read = own.valid & own.read
        require(bool((read.sum(axis=1) <= 1).all()), "more than one token of a row is read")
        require(bool(own.protected[read].all()), "a token that is read is not protected")
        require(active or not read.any(), "a token that is read rests")


class Entering(NamedTuple):
    """A piece of the prompts before the first layer: tokens `start` … of rows of so many tokens in all."""

    ids: Int[Array | np.ndarray, "batch tokens"]
    start: Int[Array | np.ndarray, ""]
    lengths: Int[Array | np.ndarray, " batch"]
    protection: Protection

    def embedded(self, model: CausalLM) -> Tokens:
        ids, lengths = jnp.asarray(self.ids), jnp.asarray(self.lengths)
        positions = jnp.broadcast_to(self.start + jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        return Tokens(
            hidden_states=model.embed(ids, positions),
            ids=ids,
            origins=positions,
            positions=positions,
            sizes=jnp.ones_like(ids),
            valid=positions < lengths[:, None],
            protected=self.protection.of_prompt(ids, positions, lengths),
            read=positions == lengths[:, None] - 1,
        )


class Decision(NamedTuple):
    """After a stage, per token: does it halt, was it absorbed by its right neighbour, and what did it show."""

    halts: Bool[Array, "batch tokens"]
    absorbed: Bool[Array, "batch tokens"]
    signal: Float[Array, "batch tokens"]


class Staged(NamedTuple):
    """What comes out of a stage: tokens on their way and what was decided about them, or, after the last layer, the
    logits of those that are read."""

    active: Tokens | None
    resting: Tokens | None
    cache: Cache
    decision: Decision | None
    logits: Float[Array, "batch vocab"] | None


class _Group(NamedTuple):
    """Tokens in a layer, with the keys and values that others see of them."""

    tokens: Tokens
    k: Heads
    v: Heads


_Held = TypeVar("_Held", Tokens, _Group)


@partial(jax.jit, static_argnames=("start", "stop", "capacity"), donate_argnames=("cache", "logits"))
def run_stage(
    model: CausalLM,
    active: Entering | Tokens,
    resting: Tokens | None,
    cache: Cache | None,
    logits: Float[Array, "batch vocab"] | None,
    policy: BoundPolicy,
    *,
    start: int,
    stop: int,
    capacity: int | None = None,
) -> Staged:
    """Layers `start` … `stop` - 1 for the active tokens.

    Args:
        model: the network.
        active: tokens that enter the first layer, or come out of the stage before.
        resting: those that do not go on.
        cache: of these layers; None where it holds nothing yet: it then begins with `capacity` slots.
        logits: for the last stage, those that stay where no token of a row is read; None if there are none yet.
        policy: what decides after the stage.
        start: the first layer.
        stop: the layer after the last.
        capacity: see `cache`.
    """
    rule = policy.kv_rule
    back = rule.looks_back(model)
    if isinstance(active, Entering):
        active = _set_aside(laid_out(active.embedded(model), like=model), 0, back)
    if resting is not None:
        settled = rule.settle(model, start, resting.hidden_states, resting.aside)
        resting = resting._replace(hidden_states=settled, aside=())
    fresh, layers, shown = cache is None, [], Shown.by_none(active.hidden_states)
    if cache is None:
        assert capacity is not None
        dtype = model.embedding.table.dtype
        empty = allocate(model.config, active.ids.shape[0], capacity, dtype, biased=policy.biased)
        cache = (empty,) * (stop - start)
    for number, layer in enumerate(cache, start):
        active, resting, shown, layer = _layer(model, number, layer, active, resting, policy, fresh=fresh)
        active = _set_aside(active, number + 1, back)
        layers.append(layer)
    if stop == policy.num_layers:
        found = model.head(active.hidden_states[:, 0])
        found = found if logits is None else jnp.where(active.valid, found, logits)
        return laid_out(Staged(None, None, tuple(layers), None, found), like=model)
    active, decision = _decide(model, active, shown, policy, stop)
    return laid_out(Staged(active, resting, tuple(layers), decision, None), like=model)


def _set_aside(tokens: Tokens, layers_run: int, back: tuple[int, ...]) -> Tokens:
    """With their states among what is set aside, if the rule looks back to there."""
    return tokens._replace(aside=(*tokens.aside, tokens.hidden_states)) if layers_run in back else tokens


def _layer(
    model: CausalLM,
    number: int,
    layer: LayerCache,
    active: Tokens,
    resting: Tokens | None,
    policy: BoundPolicy,
    *,
    fresh: bool,
) -> tuple[Tokens, Tokens | None, Shown, LayerCache]:
    """One layer for both groups; every token sees, of both and of the past, what stands before it."""
    block, rule, is_last = model.blocks[number], policy.kv_rule, number + 1 == policy.num_layers
    past = () if fresh else (segment(layer),)
    running = _Group(active, *alike.kv(block, active.hidden_states, active.positions))
    groups = [running]

    def through(block: Block, group: _Group) -> LayerOutput:
        view = (*past, *(_seen_by(group.tokens, other, policy) for other in groups))
        return alike.run_over(block, group.tokens.hidden_states, group.tokens.positions, view, group.k, group.v)

    if resting is not None:
        low = at_bits(block, rule.resting_bits) if rule.resting_bits and policy.demotes(number) else block
        rested = _Group(resting, *rule.kv(model, number, low, resting.hidden_states, resting.positions))
        groups.append(rested)
        if not is_last:
            state = resting.hidden_states
            state = through(low, rested).hidden_states if rule.keeps_running else rule.carry(model, number, state)
            resting = resting._replace(hidden_states=state)
    if is_last:
        running = _what_is_read(running)
    output = through(block, running)
    for tokens, k, v in groups:
        layer = append(layer, k, v, tokens.positions, tokens.valid, _bias(tokens, policy))
    active = running.tokens._replace(hidden_states=output.hidden_states)
    return active, resting, Shown.by(running.tokens.hidden_states, output), layer


def _what_is_read(group: _Group) -> _Group:
    """Of every row the token that is read; of a row that has none here its first, as padding."""
    chosen = group.tokens.valid & group.tokens.read
    alone = group._replace(tokens=group.tokens._replace(valid=chosen))
    return _taken(alone, jnp.argmax(chosen, axis=1, keepdims=True))


def _seen_by(queries: Tokens, group: _Group, policy: BoundPolicy) -> Segment:
    """The tokens of a group as the queries see them: those up to themselves. Padding too must see something: itself
    among its own, all of any other group."""
    tokens = group.tokens
    visible = (tokens.origins[:, None, :] <= queries.origins[:, :, None]) & tokens.valid[:, None, :]
    visible |= jnp.eye(tokens.valid.shape[1], dtype=bool) if queries is tokens else ~queries.valid[:, :, None]
    return new_segment(group.k, group.v, visible, _bias(tokens, policy))


def _bias(tokens: Tokens, policy: BoundPolicy) -> Float[Array, "batch tokens"] | None:
    return None if policy.fusion is None else policy.fusion.bias(tokens.sizes)


def _decide(model: CausalLM, active: Tokens, shown: Shown, policy: BoundPolicy, layer: int) -> tuple[Tokens, Decision]:
    """After `layer` layers: halting first, then fusion among the tokens that go on."""
    nobody = jnp.zeros_like(active.valid)
    halts, absorbed, signal = nobody, nobody, jnp.zeros(active.valid.shape, jnp.float32)
    halting, fusion = policy.prompt_halting, policy.fusion
    if halting is not None and layer in halting.layers:
        probe = partial(probe_entropy, model, shown.after, policy.shortlist)
        seen = Evidence(layer, shown, active.ids, active.origins, probe)
        halts, signal = halting.decide(seen, active.protected | ~active.valid)
    if fusion is not None and layer in fusion.layers:
        may_fuse = active.valid & ~halts & ~active.protected
        fuses = fusion.decide(layer, active.hidden_states, may_fuse)
        fused = fuse(active.hidden_states, active.positions, active.sizes, fuses, fusion.position)
        absorbed = fused.absorbed
        active = active._replace(hidden_states=fused.hidden_states, positions=fused.positions, sizes=fused.sizes)
    return active, Decision(halts, absorbed, signal)


@partial(jax.jit, static_argnames=("halting", "width", "rest_width"))
def regroup(
    active: Tokens, resting: Tokens | None, decision: Decision, *, halting: bool, width: int, rest_width: int
) -> tuple[Tokens, Tokens | None]:
    """Gather the tokens that go on into `width` places, and those that rest into `rest_width` (0: there are none);
    `halting`, if tokens were asked to."""
    going = active.valid & ~decision.halts & ~decision.absorbed
    rested = active._replace(valid=active.valid & decision.halts)
    if not rest_width:
        return laid_out((_gathered(active, going, width), None), like=active)
    joined = rested if resting is None else _joined((resting, rested)) if halting else resting
    gathered = _gathered(active, going, width), _gathered(joined, joined.valid, rest_width)
    return laid_out(gathered, like=active)


def _joined(groups: Sequence[Tokens]) -> Tokens:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *groups)


def _gathered(tokens: Tokens, chosen: Bool[Array, "batch tokens"], width: int) -> Tokens:
    return _taken(tokens._replace(valid=chosen), jnp.argsort(~chosen, axis=1, stable=True)[:, :width])


def _taken(group: _Held, places: Int[Array, "batch width"]) -> _Held:
    """What stands at these places of every row, of all that a group holds."""

    def take(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, places.reshape(*places.shape, *[1] * (leaf.ndim - 2)), axis=1)

    return jax.tree.map(take, group)
