"""One decode step's way down the layers: rows halt, rest and change precision as the policy says.

Layers run in *spans*, cut where the policy decides. A span that no row needs is skipped by a scalar `lax.cond`: its
weights are not read. A span that few rows need runs on those rows alone, gathered into a smaller static batch.

What a row can be in a step:

| state | what happens to it | how it becomes so |
|---|---|---|
| idle | nothing: it writes no keys and values, and its output is ignored | its text was done before the step |
| active | runs the layer | from the first layer on |
| halted | takes no further compute; under a rule that keeps it running, fewer bits | the policy decided after a span |
| resting | a halted row in a later layer: the K/V rule says what it leaves there, and carries its state | by halting |
| protected | active in all layers, at 8 bits | special tokens, and the first of a text |

The cache of a later layer after four tokens a b c d, of which b halted earlier; slots are filled from the left:

    drop     | a | c | d |   |    length 3: b takes no slot, and attention has less to do
    frozen   | a | b'| c | d |    length 4: b' is projected from the state in which b halted
    affine   | a | b"| c | d |    b" from that state, carried on by the lens through the layers between
    zero     | a | 0 | c | d |    a key of zeros still draws attention
    shallow  | a | b*| c | d |    b ran on at fewer bits

Rows of a batch fill their slots independently of each other: lengths differ by row and by layer.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qs_jax.adaptive.binding import BoundPolicy
from qs_jax.adaptive.ledger import Work
from qs_jax.adaptive.precision import precisions_in_use
from qs_jax.adaptive.signals import Evidence, Shown, probe_entropy
from qs_jax.cache import Cache, LayerCache, segment
from qs_jax.choices import FULL
from qs_jax.kernels import at_bits, most_bits
from qs_jax.models import alike
from qs_jax.models.base import Block, CausalLM, Heads, Hidden

PerRow = Bool[Array, " batch"]
Bits = Int[Array, " batch"]

_FEWEST_ROWS_TO_GATHER = 4


class Context(NamedTuple):
    """What the rows carry unchanged through all layers; `previous_entropy` in bits."""

    tokens: Int[Array, " batch"]
    positions: Int[Array, "batch 1"]
    protected: PerRow
    idle: PerRow
    previous_entropy: Float[Array, " batch"]


class Rows(NamedTuple):
    """The batch on its way down.

    `halted` rows keep their state from here on (under the shallow rule they go on at fewer bits). `bits_read` sums the
    precision over the layers run. `signal` is what a row showed at its last decision.
    """

    hidden_states: Float[Array, "batch 1 hidden"]
    halted: PerRow
    bits: Int[Array, " batch"]
    layers_run: Int[Array, " batch"]
    bits_read: Int[Array, " batch"]
    signal: Float[Array, " batch"]


class NewSlots(NamedTuple):
    """Keys and values of one layer, and which rows write them into the cache."""

    k: Float[Array, "batch 1 kv_heads head_dim"]
    v: Float[Array, "batch 1 kv_heads head_dim"]
    writes: Bool[Array, "batch 1"]


class Descent(NamedTuple):
    """The end of the way down."""

    rows: Rows
    new_slots: tuple[NewSlots, ...]
    work: Work


class _Input(NamedTuple):
    """What a span works on; every leaf has one row per row of the batch, so that rows can be gathered.

    `bits` holds each row's precision by layer, None where every row reads all bits, so that nothing is traced for it.
    """

    hidden_states: Hidden
    positions: Int[Array, "batch 1"]
    active: PerRow
    layers: tuple[LayerCache, ...]
    bits: tuple[Bits | None, ...]


class _Output(NamedTuple):
    """A span's outcome; what the last of its layers showed is what signals look at."""

    hidden_states: Hidden
    shown: Shown
    kv: tuple[tuple[Heads, Heads], ...]


def descend(model: CausalLM, cache: Cache, context: Context, policy: BoundPolicy) -> Descent:
    """Run the pending token of every row through as many layers as it needs.

    The cache is read here and written by the caller: a conditional that returned it would have to copy it.
    """
    zeros = jnp.zeros(context.idle.shape, jnp.int32)
    hidden_states = model.embed(context.tokens[:, None], context.positions)
    rows = Rows(
        hidden_states=hidden_states,
        halted=jnp.zeros_like(context.idle),
        bits=_first_bits(hidden_states, context, policy),
        layers_run=zeros,
        bits_read=zeros,
        signal=zeros.astype(jnp.float32),
    )
    new_slots: list[NewSlots] = []
    work: list[Work] = []
    for start, stop in policy.spans:
        rows, output, new, cost = _span(model, cache[start:stop], rows, context, policy, start)
        new_slots += new
        if stop < policy.num_layers:
            rows, probed = _decide(model, rows, output.shown, context, policy, stop)
            cost = cost._replace(rows_probed=probed)
        work.append(cost)
    return Descent(rows, tuple(new_slots), jax.tree.map(lambda *parts: jnp.stack(parts), *work))


def _first_bits(hidden_states: Hidden, context: Context, policy: BoundPolicy) -> Bits:
    """Precision as far as it is known before the first layer."""
    if policy.precision is None or policy.precision.layers:
        return jnp.full(context.idle.shape, FULL, jnp.int32)
    return policy.precision.decide(_evidence(0, Shown.by_none(hidden_states), context), context.protected)


def _span(
    model: CausalLM,
    layers: Sequence[LayerCache],
    rows: Rows,
    context: Context,
    policy: BoundPolicy,
    start: int,
) -> tuple[Rows, _Output, list[NewSlots], Work]:
    """Run the layers `start` … for the rows that need them; say what was done."""
    rule, numbers = policy.kv_rule, range(start, start + len(layers))
    active = ~context.idle if rule.keeps_running else ~context.idle & ~rows.halted
    bits = rule.bits(rows.bits, rows.halted)
    per_layer = tuple(_bits_of(layer, bits, rows.halted, policy) for layer in numbers)
    given = _Input(rows.hidden_states, context.positions, active, tuple(layers), per_layer)
    output, rows_run = _run_or_rest(model, numbers, given, policy)
    read = jnp.zeros_like(bits)
    for layer, of_rows in zip(numbers, per_layer, strict=True):
        read += most_bits(model.blocks[layer]) if of_rows is None else of_rows
    rows = rows._replace(
        hidden_states=output.hidden_states,
        layers_run=rows.layers_run + jnp.where(active, len(numbers), 0).astype(jnp.int32),
        bits_read=rows.bits_read + jnp.where(active, read, 0),
    )
    resting = ~context.idle & ~active
    writes = ~context.idle if rule.keeps_slots else active
    new_slots = [NewSlots(*rule.blank(k, v, resting[:, None]), writes[:, None]) for k, v in output.kv]
    work = Work(rows_run, precisions_in_use(bits, active), precisions_in_use(bits, resting), jnp.int32(0))
    return rows, output, new_slots, work


def _bits_of(layer: int, bits: Bits, halted: PerRow, policy: BoundPolicy) -> Bits | None:
    """Each row's precision in a layer, or None: see `_Input`."""
    adapts = policy.precision is not None and policy.precision.adapts(layer)
    if policy.decode_halting is not None and policy.demotes(layer):
        return bits if adapts else jnp.where(halted, bits, FULL)
    return bits if adapts else None


def _run_or_rest(model: CausalLM, numbers: range, given: _Input, policy: BoundPolicy) -> tuple[_Output, Int[Array, ""]]:
    """The layers for all rows, for the active ones alone, or for none; and how many rows ran."""
    batch, may_rest = given.active.shape[0], policy.decode_halting is not None and not policy.kv_rule.keeps_running
    run = partial(_run, model, numbers, policy=policy, mixed=may_rest and numbers.start > 0 and batch > 1)
    if not may_rest or numbers.start == 0:
        return run(given), jnp.int32(batch)
    rest = partial(_rest, model, numbers, policy=policy)
    sizes = [0, batch // 2, batch] if batch >= _FEWEST_ROWS_TO_GATHER else [0, batch]
    branches = [rest, *(partial(_run_gathered, run, rest, size) for size in sizes[1:-1]), run]
    branch = (given.active.sum(dtype=jnp.int32) > jnp.asarray(sizes[:-1], jnp.int32)).sum(dtype=jnp.int32)
    return jax.lax.switch(branch, branches, given), jnp.asarray(sizes, jnp.int32)[branch]


def _read_at(block: Block, bits: Bits | None) -> Block:
    return block if bits is None else at_bits(block, bits)


def _run(model: CausalLM, numbers: range, given: _Input, *, policy: BoundPolicy, mixed: bool) -> _Output:
    """All layers of a span for the whole batch, `mixed` if some of its rows may be inactive: they only rest."""
    hidden_states, shown = given.hidden_states, Shown.by_none(given.hidden_states)
    kv: list[tuple[Heads, Heads]] = []
    for number, layer, bits in zip(numbers, given.layers, given.bits, strict=True):
        before, block = hidden_states, _read_at(model.blocks[number], bits)
        output = alike.run(block, before, given.positions, (segment(layer),))
        hidden_states = output.hidden_states
        if mixed:
            carried = policy.kv_rule.carry(model, number, before)
            hidden_states = jnp.where(given.active[:, None, None], hidden_states, carried)
        shown = Shown.by(before, output)
        kv.append((output.k, output.v))
    return _Output(hidden_states, shown, tuple(kv))


def _rest(model: CausalLM, numbers: range, given: _Input, *, policy: BoundPolicy) -> _Output:
    """What is left to do where no row runs: keys and values from the rows' own states, or nothing."""
    hidden_states = given.hidden_states
    kv: list[tuple[Heads, Heads]] = []
    for number, bits in zip(numbers, given.bits, strict=True):
        block = _read_at(model.blocks[number], bits)
        kv.append(policy.kv_rule.kv(model, number, block, hidden_states, given.positions))
        hidden_states = policy.kv_rule.carry(model, number, hidden_states)
    return _Output(hidden_states, Shown.by_none(hidden_states), tuple(kv))


def _run_gathered(run: partial, rest: partial, size: int, given: _Input) -> _Output:
    """The active rows alone, gathered into a batch of `size`; the others rest."""
    chosen = jnp.argsort(~given.active, stable=True)[:size]
    part = run(jax.tree.map(lambda leaf: leaf[chosen], given))
    return jax.tree.map(lambda all_rows, some: all_rows.at[chosen].set(some), rest(given), part)


def _evidence(layer: int, shown: Shown, context: Context, probe: Callable[[], Array] | None = None) -> Evidence:
    """Of one token per row."""
    one = Shown(*(leaf[:, 0] for leaf in shown))
    return Evidence(layer, one, context.tokens, context.positions[:, 0], probe, context.previous_entropy)


def _decide(
    model: CausalLM, rows: Rows, shown: Shown, context: Context, policy: BoundPolicy, layer: int
) -> tuple[Rows, Int[Array, ""]]:
    """After `layer` layers: which rows halt, and at how many bits the others go on; rows the probe was taken on."""
    halting, precision, running = policy.decode_halting, policy.precision, ~context.idle & ~rows.halted

    def probe() -> Float[Array, " batch"]:
        take = partial(probe_entropy, model, shortlist=policy.shortlist)
        return jax.lax.cond(running.any(), take, lambda h: jnp.zeros(h.shape[:1]), rows.hidden_states[:, 0])

    seen = _evidence(layer, shown, context, probe)
    if precision and layer in precision.layers:
        bits = precision.decide(seen, context.protected)
        # a row that has halted keeps its bits: whether its entropy was taken at all depends on its batch mates
        rows = rows._replace(bits=jnp.where(running, bits, rows.bits))
    if halting and layer in halting.layers:
        halts, signal = halting.decide(seen, context.protected)
        rows = rows._replace(halted=rows.halted | (halts & running), signal=jnp.where(running, signal, rows.signal))
    probes = any(part.probes for part in policy.on_generated if layer in part.layers)
    probed = jnp.where(running.any(), running.shape[0], 0) if probes else 0
    return rows, jnp.asarray(probed, jnp.int32)
